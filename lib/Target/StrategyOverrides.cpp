//===- StrategyOverrides.cpp - schedules that a person changed ------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Target/StrategyOverrides.h"

#include "mlir/IR/Diagnostics.h"
#include "llvm/Support/raw_ostream.h"

using namespace mlir;
using namespace mlir::moe;

/// `*` stands for any characters.
static bool matches(StringRef pattern, StringRef text) {
  size_t star = pattern.find('*');
  if (star == StringRef::npos)
    return pattern == text;
  if (!text.consume_front(pattern.take_front(star)))
    return false;
  StringRef rest = pattern.drop_front(star + 1);
  for (size_t i = 0; i <= text.size(); ++i)
    if (matches(rest, text.drop_front(i)))
      return true;
  return false;
}

LogicalResult StrategyOverrides::read(Operation *at, StringRef given) {
  changes = nullptr;
  used.clear();
  std::string text = given.trim().str();
  if (text.empty())
    return success();
  // The reader of pass options takes one pair of braces off `overrides={...}`.
  if (text.front() != '{')
    text = "{" + text + "}";
  auto parsed = llvm::json::parse(text);
  if (!parsed)
    return at->emitError("expected strategy overrides as JSON, but got: ")
           << llvm::toString(parsed.takeError());
  if (!parsed->getAsObject())
    return at->emitError(
        "expected strategy overrides as a JSON object of functions, but got another value");
  changes = std::move(*parsed);
  return success();
}

LogicalResult
StrategyOverrides::visit(Operation *op, StringRef function, StringRef name,
                         function_ref<LogicalResult(const llvm::json::Object &)> apply) {
  const llvm::json::Object *functions = changes.getAsObject();
  if (!functions)
    return success();
  // JSON objects have no order here.
  auto ordered = [&](const llvm::json::Object &object, StringRef text) {
    SmallVector<std::pair<StringRef, const llvm::json::Value *>> found;
    for (const auto &[key, value] : object)
      if (matches(StringRef(key), text))
        found.push_back({StringRef(key), &value});
    llvm::sort(found, [](auto &a, auto &b) {
      auto rank = [](StringRef key) {
        return std::make_tuple(!key.contains('*'), key.size(), key);
      };
      return rank(a.first) < rank(b.first);
    });
    return found;
  };
  for (auto [functionKey, ops] : ordered(*functions, function)) {
    const llvm::json::Object *object = ops->getAsObject();
    if (!object)
      return op->emitOpError("expected strategy overrides of `")
             << functionKey << "` as a JSON object, but got another value";
    for (auto [opKey, fields] : ordered(*object, name)) {
      const llvm::json::Object *change = fields->getAsObject();
      if (!change)
        return op->emitOpError("expected strategy overrides of `")
               << opKey << "` as a JSON object, but got another value";
      used.insert((functionKey + "/" + opKey).str());
      if (failed(apply(*change)))
        return failure();
    }
  }
  return success();
}

LogicalResult StrategyOverrides::checkAllUsed(Operation *at) const {
  if (const llvm::json::Object *functions = changes.getAsObject())
    for (const auto &[functionKey, ops] : *functions)
      if (const llvm::json::Object *object = ops.getAsObject())
        for (const auto &[opKey, value] : *object)
          if (!used.contains((StringRef(functionKey) + "/" + StringRef(opKey)).str()))
            return at->emitError("expected strategy overrides to name a matmul, but got `")
                   << StringRef(functionKey) << "` / `" << StringRef(opKey)
                   << "`, which matches none";
  return success();
}
