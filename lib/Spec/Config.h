//===- Config.h - what a config.json says of its own ------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_SPEC_CONFIG_H
#define MOE_LIB_SPEC_CONFIG_H

#include "moe/Spec/Load.h"

namespace moec {

/// A value and where it came from.
struct Sourced {
  llvm::json::Value value = nullptr;
  std::string origin;
};

/// The object of a configuration that describes the text model, and the way to it.
struct Config {
  const llvm::json::Object *object = nullptr; ///< with the row's keys
  const llvm::json::Object *outer = nullptr;  ///< the whole file
  std::string path;                           ///< "" or "text_config."
  std::string modelType;
  bool composite() const { return object != outer; }
};

/// The dtype a configuration states: `dtype` or `torch_dtype`, of the text model or of the whole.
struct ConfigDtype {
  std::optional<Format> format;
  std::string origin;
  bool half = false; ///< float16, which becomes f32
};

/// Finds the object whose model_type has a row: the file itself, or the text model inside it.
llvm::Expected<std::pair<Config, const ModelRow *>>
findConfig(const llvm::json::Value &root, const std::string &file, const ModelTable &table);

/// The encoding that a quantization_config names: FP8 or MXFP4 where weights of that kind can be
/// read, Plain where there is no such configuration; all others are refused by name and format.
llvm::Expected<Encoding> configEncoding(const Config &config, const std::string &file);

llvm::Expected<ConfigDtype> configDtype(const Config &config, const std::string &file);

} // namespace moec

#endif // MOE_LIB_SPEC_CONFIG_H
