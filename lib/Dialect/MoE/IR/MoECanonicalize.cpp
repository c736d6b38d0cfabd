//===- MoECanonicalize.cpp - canonicalizations of the moe dialect ---------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"

#include "mlir/IR/Matchers.h"
#include "mlir/IR/PatternMatch.h"

using namespace mlir;
using namespace mlir::moe;

//===----------------------------------------------------------------------===//
// Router
//===----------------------------------------------------------------------===//

/// The simplest router with the same choice and, but for rounding, the same weights. Equal routers
/// of different models become equal attributes, so their layers share code.
static RouterAttr simplify(RouterAttr router, int64_t experts) {
  Renormalize renormalize = router.getRenormalize();
  Real epsilon = router.getEpsilon(), normP = router.getNormP();
  RouterOrder order = router.getOrder();
  GroupsAttr groups = router.getGroups();

  // All groups are kept.
  if (groups && groups.getKeep() == groups.getCount())
    groups = GroupsAttr();
  // As long as a score is positive, a group without it cannot win with 0 rather than −∞; but a
  // selection bias may make a score negative, so `fill` stays as it is then.
  if (groups && groups.getFill() == GroupFill::Zero &&
      router.getSelectionBias() == SelectionBias::None &&
      experts / groups.getCount() * groups.getKeep() >= router.getTopK())
    groups = GroupsAttr::get(router.getContext(), groups.getCount(), groups.getKeep(),
                             groups.getReduce(), GroupFill::NegInf);
  // Scores are never negative, so the norm with p = 1 is the sum.
  if (renormalize == Renormalize::LpNorm && normP.value == 1.0) {
    renormalize = Renormalize::Sum;
    epsilon = 0.0;
  }
  // Softmax over all, then the K best, then divided by their sum, is softmax over the K best: the
  // sum over all experts cancels. Sigmoid is not reordered in the same way although it is monotonic
  // too: it saturates at 1, where equal scores (lowest id first) hide different logits.
  if (router.getScore() == ScoreFunction::Softmax && renormalize == Renormalize::Sum &&
      epsilon.value == 0.0 && router.getSelect() == Selection::TopK &&
      router.getSelectionBias() == SelectionBias::None && !groups && router.getExtraRows() == 0) {
    order = RouterOrder::SelectThenScore;
    renormalize = Renormalize::None;
  }
  // Parameters that mean nothing.
  if (renormalize != Renormalize::LpNorm)
    normP = 2.0;
  if (renormalize == Renormalize::None || renormalize == Renormalize::LpNorm)
    epsilon = 0.0;

  return RouterAttr::get(router.getContext(), router.getScore(), order, router.getTopK(),
                         renormalize, epsilon, normP, router.getScale(), router.getPrecision(),
                         router.getInput(), router.getLogitTransform(), router.getSelect(),
                         router.getSelectionBias(), groups, router.getExtraRows(),
                         router.getInputEpsilon(), router.getJitter(), router.getModelArithmetic(),
                         router.getWeightDtype());
}

template <typename OpTy> static LogicalResult simplifyRouter(OpTy op, PatternRewriter &rewriter) {
  // `precision = model` promises the model's own rounding.
  if (op.getRouter().getPrecision() == RouterPrecision::Model)
    return rewriter.notifyMatchFailure(op, "the model's rounding is asked for");
  RouterAttr router = simplify(op.getRouter(), op.getNumExperts());
  if (router == op.getRouter())
    return rewriter.notifyMatchFailure(op, "the router is in its simplest form");
  rewriter.modifyOpInPlace(op, [&] { op.setRouterAttr(router); });
  return success();
}

LogicalResult RouterOp::canonicalize(RouterOp op, PatternRewriter &rewriter) {
  return simplifyRouter(op, rewriter);
}

LogicalResult RouteDispatchOp::canonicalize(RouteDispatchOp op, PatternRewriter &rewriter) {
  return simplifyRouter(op, rewriter);
}

//===----------------------------------------------------------------------===//
// Accumulation
//===----------------------------------------------------------------------===//

/// `accumulate %false` is no accumulate: nothing is read. `scale %one` is no scale.
template <typename OpTy> static LogicalResult simplifySum(OpTy op, PatternRewriter &rewriter) {
  if (op.getScale() && matchPattern(op.getScale(), m_OneFloat())) {
    rewriter.modifyOpInPlace(op, [&] { op.getScaleMutable().clear(); });
    return success();
  }
  if (!op.getAccumulate() || !matchPattern(op.getAccumulate(), m_Zero()))
    return rewriter.notifyMatchFailure(op, "accumulate is not constant false, scale not one");
  rewriter.modifyOpInPlace(op, [&] {
    op.getAccumulateMutable().clear();
    op.getStartMutable().clear();
  });
  return success();
}

LogicalResult CombineOp::canonicalize(CombineOp op, PatternRewriter &rewriter) {
  return simplifySum(op, rewriter);
}

LogicalResult FfnOp::canonicalize(FfnOp op, PatternRewriter &rewriter) {
  return simplifySum(op, rewriter);
}

LogicalResult GroupedMatmulOp::canonicalize(GroupedMatmulOp op, PatternRewriter &rewriter) {
  return simplifySum(op, rewriter);
}
