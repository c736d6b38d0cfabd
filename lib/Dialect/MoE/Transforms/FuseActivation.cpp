//===- FuseActivation.cpp - moe-fuse-activation ---------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "FusePass.h"

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Dialect/MoE/Transforms/Passes.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"

namespace mlir::moe {
#define GEN_PASS_DEF_FUSEACTIVATIONPASS
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

struct FuseActivation : OpRewritePattern<ActivateOp> {
  using OpRewritePattern::OpRewritePattern;

  LogicalResult matchAndRewrite(ActivateOp op, PatternRewriter &rewriter) const override {
    if (!op.hasPureTensorSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not tensors");
    auto matmul = op.getParts().getDefiningOp<GroupedMatmulOp>();
    if (!matmul)
      return rewriter.notifyMatchFailure(op, "parts do not come from a matmul");
    if (!matmul->hasOneUse())
      return rewriter.notifyMatchFailure(op, "the products are used elsewhere");
    if (matmul.hasEpilogue() || matmul.hasCombine())
      return rewriter.notifyMatchFailure(op, "the matmul has a region or a combine clause");
    if (!cast<RankedTensorType>(op.getParts().getType()).getElementType().isF32())
      return rewriter.notifyMatchFailure(op, "products are rounded before the activation");

    auto fused = GroupedMatmulOp::create(rewriter, op.getLoc(), matmul.getRows(),
                                         matmul.getOffsets(), matmul.getWeight(), op.getOut());
    fused.copyRowClauses(matmul);
    rewriter.inlineRegionBefore(op.getEpilogue(), fused.getEpilogue(), fused.getEpilogue().end());
    rewriter.replaceOp(op, fused.getResults());
    rewriter.eraseOp(matmul);
    return success();
  }
};

struct FuseActivationPass final : FusePass<moe::impl::FuseActivationPassBase<FuseActivationPass>,
                                           populateFuseActivationPatterns, ActivateOp> {
  using FusePass::FusePass;
};

} // namespace

void moe::populateFuseActivationPatterns(RewritePatternSet &patterns) {
  patterns.add<FuseActivation>(patterns.getContext());
}
