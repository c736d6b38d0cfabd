//===- FusePass.h - what the rewrite passes share ---------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_DIALECT_MOE_TRANSFORMS_FUSEPASS_H
#define MOE_LIB_DIALECT_MOE_TRANSFORMS_FUSEPASS_H

#include "mlir/IR/Diagnostics.h"
#include "mlir/IR/PatternMatch.h"
#include "mlir/Pass/Pass.h"
#include "mlir/Transforms/GreedyPatternRewriteDriver.h"

namespace mlir::moe {

/// Collects the last reason for which a pattern did not match at a location.
struct ReasonListener : RewriterBase::Listener {
  void notifyMatchFailure(Location loc, function_ref<void(Diagnostic &)> reason) override {
    Diagnostic diagnostic(loc, DiagnosticSeverity::Remark);
    reason(diagnostic);
    reasons[loc] = diagnostic.str();
  }
  DenseMap<Location, std::string> reasons;
};

/// Applies `patterns` to `root` and nothing else: no folding, no simplification of regions, so that
/// a pass that declines changes nothing. Operations of the kinds `OpTys` that disappear are counted
/// in `did`, those that remain in `declined`, with a remark each where `remarks` is set.
template <typename... OpTys>
LogicalResult rewriteAll(Operation *root, RewritePatternSet &&patterns, Pass::Statistic &did,
                         Pass::Statistic &declined, bool remarks) {
  auto visit = [&](function_ref<void(Operation *)> callback) {
    root->walk([&](Operation *op) {
      if (isa<OpTys...>(op))
        callback(op);
    });
  };
  int64_t before = 0, after = 0;
  visit([&](Operation *) { ++before; });
  ReasonListener listener;
  GreedyRewriteConfig config;
  config.enableFolding(false);
  config.enableConstantCSE(false);
  config.setRegionSimplificationLevel(GreedySimplifyRegionLevel::Disabled);
  if (remarks)
    config.setListener(&listener);
  if (failed(applyPatternsGreedily(root, std::move(patterns), config)))
    return failure();
  visit([&](Operation *op) {
    ++after;
    if (remarks)
      op->emitRemark("left as it is: ") << listener.reasons.lookup(op->getLoc());
  });
  did += before - after;
  declined += after;
  return success();
}

/// A pass that applies the patterns of `populate` to every operation of the kinds `OpTys`.
/// `PassBase` is the generated base, with statistics numFused and numDeclined and the option
/// remarks.
template <typename PassBase, void (*populate)(RewritePatternSet &), typename... OpTys>
struct FusePass : PassBase {
  using PassBase::PassBase;

  void runOnOperation() override {
    RewritePatternSet patterns(&this->getContext());
    populate(patterns);
    if (failed(rewriteAll<OpTys...>(this->getOperation(), std::move(patterns), this->numFused,
                                    this->numDeclined, this->remarks)))
      this->signalPassFailure();
  }
};

} // namespace mlir::moe

#endif // MOE_LIB_DIALECT_MOE_TRANSFORMS_FUSEPASS_H
