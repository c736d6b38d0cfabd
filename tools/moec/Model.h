//===- Model.h - what compile, pack and inspect read ------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_MODEL_H
#define MOEC_TOOL_MODEL_H

#include "moe/Export/Weights.h"
#include "moe/Spec/Load.h"

#include "llvm/ADT/STLFunctionalExtras.h"

#include <memory>
#include <string>
#include <vector>

namespace moec::tool {

/// The model table: shipped rows and --model-rows.
llvm::Expected<ModelTable> modelTable();

/// What a value of --checkpoint means.
struct WeightsChoice {
  enum Kind { Own, Path, Random, None } kind = Own;
  std::string path;
  uint64_t seed = 0;
};
/// "" (the model's own), "none", "random:SEED", or a path. E-ARGUMENT.
llvm::Expected<WeightsChoice> parseWeightsChoice(llvm::StringRef text);

/// Loads a folder, config.json or *.moe.json with its weights.
llvm::Expected<LoadedModel> loadModelWith(llvm::StringRef path, const WeightsChoice &weights,
                                          std::optional<Format> dtype);

/// E-ARGUMENT for a number in --layers that no layer of the model has.
llvm::Error noSuchLayer(const ModelSpec &spec, int64_t number);

/// --threads: 0 to 4095; 0 is one for every CPU that this process may use. E-ARGUMENT.
llvm::Expected<unsigned> parseThreads(int64_t value);

/// Packs all layers of `spec` into `folder` with progress. `ids`: one for each layer; `makeReader`
/// is called for every worker. Refuses before the first byte when the disk is too small (E-SPACE).
llvm::Error packModel(const ModelSpec &spec, llvm::ArrayRef<std::array<uint8_t, 32>> ids,
                      llvm::function_ref<std::unique_ptr<WeightReader>()> makeReader,
                      llvm::StringRef folder, unsigned threads);

/// A printed table: the first row is the heading; columns that hold only numbers are right-aligned.
std::string tableText(const std::vector<std::vector<std::string>> &rows);

} // namespace moec::tool

#endif // MOEC_TOOL_MODEL_H
