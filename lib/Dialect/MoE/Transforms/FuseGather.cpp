//===- FuseGather.cpp - moe-fuse-gather -----------------------------------===//
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
#define GEN_PASS_DEF_FUSEGATHERPASS
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

struct FuseGather : OpRewritePattern<GatherOp> {
  using OpRewritePattern::OpRewritePattern;

  LogicalResult matchAndRewrite(GatherOp op, PatternRewriter &rewriter) const override {
    if (!op.hasPureTensorSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not tensors");
    Type rounded = cast<RankedTensorType>(op.getOut().getType()).getElementType();
    for (OpOperand &use : op->getUses()) {
      auto matmul = dyn_cast<GroupedMatmulOp>(use.getOwner());
      if (!matmul || matmul.getRowsMutable().getOperandNumber() != use.getOperandNumber())
        return rewriter.notifyMatchFailure(op, "the rows are used by something else than a matmul");
      if (matmul.hasVia())
        return rewriter.notifyMatchFailure(op, "a matmul reads the rows through pairs");
      if (matmul.getOffsets() != op.getOffsets())
        return rewriter.notifyMatchFailure(op, "gather and matmul have different groups");
      if (matmul.getRowType() && *matmul.getRowType() != rounded)
        return rewriter.notifyMatchFailure(op, "rows are rounded twice");
    }
    if (op->use_empty())
      return rewriter.notifyMatchFailure(op, "the rows are not used");
    for (Operation *user : llvm::make_early_inc_range(op->getUsers())) {
      auto matmul = cast<GroupedMatmulOp>(user);
      rewriter.modifyOpInPlace(matmul, [&] {
        matmul.getRowsMutable().set(op.getX());
        matmul.getViaPairMutable().assign(op.getPair());
        matmul.getViaSlotsMutable().assign(op.getSlots());
        if (op.getRowWeights())
          matmul.getRowWeightsMutable().assign(op.getRowWeights());
        matmul.setRowTypeAttr(TypeAttr::get(rounded));
      });
    }
    rewriter.eraseOp(op);
    return success();
  }
};

struct FuseGatherPass final : FusePass<moe::impl::FuseGatherPassBase<FuseGatherPass>,
                                       populateFuseGatherPatterns, GatherOp> {
  using FusePass::FusePass;
};

} // namespace

void moe::populateFuseGatherPatterns(RewritePatternSet &patterns) {
  patterns.add<FuseGather>(patterns.getContext());
}
