//===- Row.h - a row of the model table, applied ----------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_SPEC_ROW_H
#define MOE_LIB_SPEC_ROW_H

#include "Config.h"

#include "moe/Support/JSON.h"

#include <set>

namespace moec {

/// Applies the rules of a row to a configuration.
class RowReader {
public:
  RowReader(const ModelRow &row, const Config &config, const std::string &file)
      : row(row), config(config), rowDoc(row.file, ErrorCode::CONFIG),
        configDoc(file, ErrorCode::CONFIG) {}

  /// One layer before its weights are bound.
  struct Layer {
    LayerSpec spec;
    std::string module;                ///< "layers.3.mlp"
    std::vector<std::string> prefixes; ///< where its tensors may lie
    /// Role to forms; a form is a list of sources relative to the prefix.
    std::map<std::string, std::vector<std::vector<WeightSource>>> forms;
  };

  llvm::Expected<std::vector<Layer>> run();
  /// Where the text model of a composite model lies in transformers' tree.
  std::string compositeRoot() const {
    return rules().getString("composite_root").value_or("model.language_model.").str();
  }
  /// Keys of the MoE family that the row does not read.
  std::vector<std::string> unreadKeys() const;

private:
  const llvm::json::Object &rules() const { return *row.rules->getAsObject(); }

  bool failed() const { return rowDoc.failed() || configDoc.failed(); }
  void badRow(const std::string &at, const llvm::Twine &expected, const llvm::json::Value *got) {
    rowDoc.fail(at, expected, describeJSON(got));
  }

  void readKeys();
  void readKey(const std::string &key, JSONReader &rule);
  Sourced evaluate(const llvm::json::Value *expression, const std::string &at);
  bool holds(const llvm::json::Value *condition, const std::string &at, std::string &origin);
  const Sourced *valueOf(llvm::StringRef key, const std::string &at);
  std::optional<int64_t> integerOf(llvm::StringRef key, const std::string &at, std::string &origin);
  int64_t size(JSONReader &block, const char *attribute, LayerSpec &layer);
  std::string withNumber(std::string text) const;
  void readBlock(JSONReader &block, const std::string &at, Layer &out);
  void readForms(JSONReader &block, Layer &out);
  template <typename Read>
  void readGroup(JSONReader &block, const char *group, LayerSpec &layer, bool required, Read read);

  const ModelRow &row;
  const Config &config;
  JSONDocument rowDoc, configDoc;
  std::map<std::string, Sourced> values;
  std::set<std::string> readSpellings;
  std::map<std::string, std::string> keyPaths; ///< where a key's value stands, for errors
  int64_t layerIndex = 0;
};

} // namespace moec

#endif // MOE_LIB_SPEC_ROW_H
