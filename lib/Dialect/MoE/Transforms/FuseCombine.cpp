//===- FuseCombine.cpp - moe-fuse-combine ---------------------------------===//
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
#define GEN_PASS_DEF_FUSECOMBINEPASS
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

struct FuseCombine : OpRewritePattern<CombineOp> {
  using OpRewritePattern::OpRewritePattern;

  LogicalResult matchAndRewrite(CombineOp op, PatternRewriter &rewriter) const override {
    if (!op.hasPureTensorSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not tensors");
    auto matmul = op.getRows().getDefiningOp<GroupedMatmulOp>();
    if (!matmul)
      return rewriter.notifyMatchFailure(op, "rows do not come from a matmul");
    if (!matmul->hasOneUse())
      return rewriter.notifyMatchFailure(op, "the rows are used elsewhere");
    if (matmul.hasCombine())
      return rewriter.notifyMatchFailure(op, "the matmul has a combine clause");
    if (matmul.getOffsets() != op.getOffsets())
      return rewriter.notifyMatchFailure(op, "matmul and combine have different groups");

    auto fused = GroupedMatmulOp::create(rewriter, op.getLoc(), matmul.getRows(),
                                         matmul.getOffsets(), matmul.getWeight(), op.getOut());
    fused.copyRowClauses(matmul);
    fused.setCombineTypeAttr(
        TypeAttr::get(cast<RankedTensorType>(op.getRows().getType()).getElementType()));
    if (op.getPair()) {
      fused.getCombinePairMutable().assign(op.getPair());
      fused.getCombineWeightsMutable().assign(op.getWeights());
      fused.getCombineSlotsMutable().assign(op.getSlots());
    }
    fused.setUnweighted(op.getUnweighted());
    if (op.getGate())
      fused.getGateMutable().assign(op.getGate());
    if (op.getScale())
      fused.getScaleMutable().assign(op.getScale());
    if (op.getAccumulate())
      fused.getAccumulateMutable().assign(op.getAccumulate());
    if (op.getStart())
      fused.getStartMutable().assign(op.getStart());
    rewriter.inlineRegionBefore(matmul.getEpilogue(), fused.getEpilogue(),
                                fused.getEpilogue().end());
    rewriter.replaceOp(op, fused.getResults());
    rewriter.eraseOp(matmul);
    return success();
  }
};

struct FuseCombinePass final : FusePass<moe::impl::FuseCombinePassBase<FuseCombinePass>,
                                        populateFuseCombinePatterns, CombineOp> {
  using FusePass::FusePass;
};

} // namespace

void moe::populateFuseCombinePatterns(RewritePatternSet &patterns) {
  patterns.add<FuseCombine>(patterns.getContext());
}
