//===- ModelTable.cpp - the rows of share/moec/models ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Load.h"

#include "moe/Support/Files.h"
#include "moe/Support/JSON.h"

#include "llvm/Support/FileSystem.h"
#include "llvm/Support/Path.h"

namespace moec {

const ModelRow *ModelTable::find(llvm::StringRef modelType) const {
  auto it = table.find(modelType.str());
  if (it != table.end())
    return &it->second;
  for (const auto &[type, row] : table)
    if (llvm::is_contained(row.aliases, modelType))
      return &row;
  return nullptr;
}

llvm::Error ModelTable::add(llvm::StringRef path, bool replace) {
  llvm::Expected<llvm::json::Value> value = readJSON(path, ErrorCode::CONFIG);
  if (!value)
    return value.takeError();

  ModelRow row;
  row.file = path.str();
  row.rules = std::make_shared<llvm::json::Value>(std::move(*value));
  JSONDocument doc(path, ErrorCode::CONFIG);
  JSONReader reader(doc, row.rules.get(), "");
  if (int64_t schema = reader.integer("schema", 1, 1 << 30); schema > 1)
    doc.fail(ErrorCode::ABI, "schema", "1", llvm::Twine(schema), "a newer moec wrote this row");
  row.modelType = reader.string("model_type");
  row.configClass = reader.string("config_class");
  for (const char *key : {"keys", "layers", "blocks"})
    reader.require(key, "the rules of a row");
  reader.strings("ignored", false);
  reader.string("composite_root", "");
  row.aliases = reader.strings("aliases", false);
  reader.finish();
  if (llvm::Error error = doc.take())
    return error;
  auto [it, fresh] = table.try_emplace(row.modelType, row);
  if (!fresh && !replace)
    return makeError(ErrorCode::CONFIG, path, "one row for each model_type",
                     "`" + row.modelType + "`, which `" + it->second.file + "` has as well");
  it->second = std::move(row);
  return llvm::Error::success();
}

llvm::Expected<ModelTable> ModelTable::load(llvm::StringRef shippedFolder,
                                            const std::vector<std::string> &userRows) {
  ModelTable out;
  auto addFolder = [&](llvm::StringRef path, bool replace) -> llvm::Error {
    llvm::Expected<std::unique_ptr<InputFolder>> folder = InputFolder::open(path);
    if (!folder)
      return folder.takeError();
    for (const std::string &member : (*folder)->members())
      if (llvm::StringRef(member).ends_with(".json"))
        if (llvm::Error error = out.add((*folder)->path() + "/" + member, replace))
          return error;
    return llvm::Error::success();
  };
  if (llvm::Error error = addFolder(shippedFolder, false))
    return error;
  for (const std::string &path : userRows)
    if (llvm::Error error =
            llvm::sys::fs::is_directory(path) ? addFolder(path, true) : out.add(path, true))
      return error;
  return out;
}

std::string shippedModelRows(const char *argv0, void *mainAddress) {
  std::string program = llvm::sys::fs::getMainExecutable(argv0, mainAddress);
  llvm::SmallString<256> path(llvm::sys::path::parent_path(program));
  llvm::sys::path::append(path, "..", "share", "moec", "models");
  llvm::sys::path::remove_dots(path, /*remove_dot_dot=*/true);
  return std::string(path);
}

} // namespace moec
