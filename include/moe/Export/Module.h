//===- Module.h - what a compiled module consists of ------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Identity and packed form of layers, and the C header of a module. The table of
// generated code itself is moe/Target/CPU/ModuleTable.h.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_EXPORT_MODULE_H
#define MOE_EXPORT_MODULE_H

#include "moe/Spec/ModelSpec.h"
#include "moe/Support/Error.h"

#include <array>
#include <string>
#include <vector>

namespace mlir::moe {
struct CodeTable;
}

namespace moec {

/// "0.1.0".
llvm::StringRef versionString();

/// The names of the layouts this build packs: of matrices, and of vectors (isVector).
constexpr llvm::StringLiteral packedLayout = "panel32-1", vectorLayout = "vector32-1";

/// BLAKE3 of the canonical text of everything that decides a layer's code and packed bytes
/// (semantics() with sorted keys, and the layout). Neither name nor index enters.
std::array<uint8_t, 32> layerId(const LayerSpec &layer);

/// "00ff…": 64 digits.
std::string hexText(const std::array<uint8_t, 32> &id);

/// The canonical text itself: JSON with sorted keys and no spaces.
std::string canonicalText(const llvm::json::Value &value);

/// One packed tensor of a layer.
struct PackedWeight {
  std::string role, format, layout;
  int64_t experts = 1, parts = 1, rows = 0, cols = 0;
  uint64_t bytes = 0; ///< multiple of 4096
};

/// The packed tensors of a layer with their sizes, in the order of its weights.
std::vector<PackedWeight> packedWeights(const LayerSpec &layer);

/// The documented C header of a module.
std::string headerText(const mlir::moe::CodeTable &table);

/// The attribute of a builtin module that holds its ModelSpec with origins, as JSON text. It is
/// there from import on, so every phase can be entered.
constexpr llvm::StringLiteral specAttribute = "moe.spec";

} // namespace moec

#endif // MOE_EXPORT_MODULE_H
