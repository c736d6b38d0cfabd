//===- MergeEqualFunctions.cpp - moe-merge-equal-functions ----------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Dialect/MoE/Transforms/Passes.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/IR/AttrTypeSubElements.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/OperationSupport.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MERGEEQUALFUNCTIONSPASS
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

/// All attributes of a function but its name.
DictionaryAttr getAttributesWithoutName(func::FuncOp func) {
  NamedAttrList attributes(func->getAttrDictionary());
  attributes.erase(func.getSymNameAttrName());
  return attributes.getDictionary(func.getContext());
}

struct MergeEqualFunctionsPass : moe::impl::MergeEqualFunctionsPassBase<MergeEqualFunctionsPass> {
  void runOnOperation() override {
    ModuleOp module = getOperation();
    DenseMap<DictionaryAttr, SmallVector<func::FuncOp>> kept;
    DenseMap<StringAttr, FlatSymbolRefAttr> replacements;
    DenseSet<StringAttr> outlined;
    for (auto code : module.getOps<CodeOp>()) {
      outlined.insert(code.getWorkspaceAttr().getAttr());
      for (auto stage : code.getStages().getAsRange<FlatSymbolRefAttr>())
        outlined.insert(stage.getAttr());
    }
    for (auto func : llvm::make_early_inc_range(module.getOps<func::FuncOp>())) {
      if (!func->hasAttr(MoEDialect::kEntryAttrName) && !outlined.contains(func.getSymNameAttr()))
        continue;
      SmallVector<func::FuncOp> &candidates = kept[getAttributesWithoutName(func)];
      auto equal = llvm::find_if(candidates, [&](func::FuncOp other) {
        return OperationEquivalence::isRegionEquivalentTo(&func.getBody(), &other.getBody(),
                                                          OperationEquivalence::IgnoreLocations);
      });
      if (equal == candidates.end()) {
        candidates.push_back(func);
        ++numKept;
        continue;
      }
      replacements[func.getSymNameAttr()] = FlatSymbolRefAttr::get(equal->getSymNameAttr());
      func.erase();
      ++numMerged;
    }
    if (replacements.empty())
      return;
    AttrTypeReplacer replacer;
    replacer.addReplacement([&](FlatSymbolRefAttr symbol) -> std::optional<Attribute> {
      auto it = replacements.find(symbol.getAttr());
      if (it == replacements.end())
        return std::nullopt;
      return it->second;
    });
    replacer.recursivelyReplaceElementsIn(module, /*replaceAttrs=*/true, /*replaceLocs=*/false,
                                          /*replaceTypes=*/false);
  }
};

} // namespace
