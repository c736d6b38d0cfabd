//===- Load.h - from a model on disk to a ModelSpec -------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Reads a Hugging Face checkpoint folder, a bare config.json or a *.moe.json
// file. What a model_type means is data: one JSON row for each in
// share/moec/models, and in files the user adds. Nothing in a model folder is
// executed.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SPEC_LOAD_H
#define MOE_SPEC_LOAD_H

#include "moe/Spec/ModelSpec.h"
#include "moe/Spec/Safetensors.h"

#include "llvm/Support/JSON.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace moec {

/// One row of the model table: how to read configurations and checkpoints of a model_type.
struct ModelRow {
  std::string modelType;            ///< "mixtral"
  std::string configClass;          ///< "MixtralConfig", whose defaults the row holds
  std::vector<std::string> aliases; ///< other model_types of the same configuration
  std::string file;                 ///< where the row was read
  std::shared_ptr<llvm::json::Value> rules;
};

/// The model table.
class ModelTable {
public:
  /// Reads every *.json of the folder of shipped rows, then the user's files and folders, whose
  /// rows replace shipped ones of the same model_type. E-CONFIG for a malformed row, E-IO.
  static llvm::Expected<ModelTable> load(llvm::StringRef shippedFolder,
                                         const std::vector<std::string> &userRows = {});

  /// Rows by model_type.
  const std::map<std::string, ModelRow> &rows() const { return table; }
  /// The row of a model_type or of an alias.
  const ModelRow *find(llvm::StringRef modelType) const;

private:
  llvm::Error add(llvm::StringRef path, bool replace);

  std::map<std::string, ModelRow> table;
};

/// <folder of this program>/../share/moec/models. `argv0` and `mainAddress` as for
/// llvm::sys::fs::getMainExecutable.
std::string shippedModelRows(const char *argv0, void *mainAddress);

/// What the user asked for.
struct LoadOptions {
  /// Format of expert weights and of computation; nothing: as in the checkpoint.
  std::optional<Format> dtype;
  /// Weights from elsewhere: a folder or a .safetensors file. Empty: from the model's own folder.
  std::string checkpoint;
  /// Take no weights at all, even if the model's folder has them.
  bool shapesOnly = false;
  /// Symbolic links in model folders may lead anywhere.
  bool followLinks = false;
};

/// A model and, where there are any, its weights.
struct LoadedModel {
  ModelSpec spec;
  /// Null: shapes only. Else every source of every weight was checked: present, of the right shape
  /// and of a dtype that can be read.
  std::unique_ptr<Checkpoint> checkpoint;
};

/// Reads `path`: a folder with config.json, a config.json (any *.json that is not *.moe.json), or a
/// *.moe.json file. Layers are consistent (checkConsistent) but may ask for what is not implemented
/// (checkModel). E-CONFIG, E-UNKNOWN-MODEL, E-UNSUPPORTED, E-TENSOR, E-FILE-FORMAT, E-PATH, E-IO.
llvm::Expected<LoadedModel> loadModel(llvm::StringRef path, const ModelTable &table,
                                      const LoadOptions &options = {});

} // namespace moec

#endif // MOE_SPEC_LOAD_H
