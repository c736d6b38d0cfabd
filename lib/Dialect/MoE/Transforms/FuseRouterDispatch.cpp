//===- FuseRouterDispatch.cpp - moe-fuse-router-dispatch ------------------===//
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
#define GEN_PASS_DEF_FUSEROUTERDISPATCHPASS
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

struct FuseRouterDispatch : OpRewritePattern<DispatchOp> {
  using OpRewritePattern::OpRewritePattern;

  LogicalResult matchAndRewrite(DispatchOp op, PatternRewriter &rewriter) const override {
    if (!op.hasPureTensorSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not tensors");
    auto router = op.getIds().getDefiningOp<RouterOp>();
    if (!router || op.getIds() != router.getResult(1))
      return rewriter.notifyMatchFailure(op, "ids do not come from a router");
    if (router.getOutLogits())
      return rewriter.notifyMatchFailure(op, "the router gives its logits");
    if (router->getBlock() != op->getBlock())
      return rewriter.notifyMatchFailure(op, "router and dispatch are in different blocks");
    if (static_cast<int64_t>(op.getExperts()) != router.getNumExperts())
      return rewriter.notifyMatchFailure(op, "router and dispatch have different experts");
    // The fused operation stands where the dispatch stood, after the dispatch's outs.
    for (Operation *user : router->getUsers())
      if (user != op && !op->isBeforeInBlock(op->getBlock()->findAncestorOpInBlock(*user)))
        return rewriter.notifyMatchFailure(op, "the router's results are used before the dispatch");

    auto fused = RouteDispatchOp::create(rewriter, op.getLoc(), router.getX(), router.getWeight(),
                                         router.getVectors(),
                                         ValueRange{router.getOutWeights(), router.getOutExperts(),
                                                    op.getOutOffsets(), op.getOutPair()},
                                         router.getRouter(), router.getComputeAttr());
    rewriter.replaceOp(op, fused.getResults().drop_front(2));
    rewriter.replaceOp(router, fused.getResults().take_front(2));
    return success();
  }
};

struct FuseRouterDispatchPass final
    : FusePass<moe::impl::FuseRouterDispatchPassBase<FuseRouterDispatchPass>,
               populateFuseRouterDispatchPatterns, DispatchOp> {
  using FusePass::FusePass;
};

} // namespace

void moe::populateFuseRouterDispatchPatterns(RewritePatternSet &patterns) {
  patterns.add<FuseRouterDispatch>(patterns.getContext());
}
