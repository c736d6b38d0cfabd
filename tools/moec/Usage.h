//===- Usage.h - which experts served which tokens --------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// usage.safetensors, schema 1. For every traced layer NAME of T tokens:
//   NAME.experts  I32 [T,K]  chosen experts, best first
//   NAME.weights  F32 [T,K]  their weights
//   NAME.counts   I64 [E]    rows each expert got
// and, if the caller knows them, `tokens` I32 [T]. __metadata__ holds
//   format = "moec-usage", schema = "1", model = the module's name.
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_USAGE_H
#define MOEC_TOOL_USAGE_H

#include "moe/Support/Error.h"

#include <string>
#include <vector>

namespace moec::tool {

struct LayerUsage {
  std::string layer;
  int64_t tokens = 0, chosen = 0; ///< T, K
  std::vector<int32_t> experts;   ///< [T,K]
  std::vector<float> weights;     ///< [T,K]
  std::vector<int64_t> counts;    ///< [E]
};

struct Usage {
  std::string model;
  std::vector<LayerUsage> layers;
};

/// The bytes of a usage file.
std::string usageText(const Usage &usage);

/// E-IO, E-FILE-FORMAT, E-ABI (a higher schema).
llvm::Expected<Usage> readUsage(llvm::StringRef path);

/// How evenly a layer's experts were used.
struct Balance {
  double entropy = 0;   ///< of the counts, divided by log E: 1 even, 0 one expert
  double imbalance = 0; ///< largest count over mean count
  int64_t unused = 0;   ///< experts without a row
};
Balance balanceOf(const LayerUsage &layer);

/// The heat map for a terminal of `columns` columns: a line per layer. With colours if `colours`.
std::string usageTable(const Usage &usage, unsigned columns, bool colours);

/// The same as an SVG image.
std::string usageSVG(const Usage &usage);

} // namespace moec::tool

#endif // MOEC_TOOL_USAGE_H
