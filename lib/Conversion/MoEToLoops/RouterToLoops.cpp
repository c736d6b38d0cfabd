//===- RouterToLoops.cpp - routers as loops -------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "LoopBuilder.h"

#include "moe/Conversion/MoEToLoops/MoEToLoops.h"

#include "mlir/Dialect/Utils/StaticValueUtils.h"

using namespace mlir;
using namespace mlir::moe;

namespace {

/// Buffers of one token: E logits, E scores, E flags, K ids.
struct Scratch {
  Value logits, scores, taken, chosen;
};

Value applyTransform(LoopBuilder &l, LogitTransformAttr transform, Value z) {
  if (!transform)
    return z;
  Value c = l.real(transform.getValue());
  if (transform.getKind() == LogitTransformKind::Scale)
    return l.mul(c, z);
  return l.mul(c, math::TanhOp::create(l.b, l.loc, l.div(z, c)));
}

/// Sigmoid or sqrt(softplus) of one logit.
Value scoreOne(LoopBuilder &l, ScoreFunction function, Value z) {
  Value one = l.real(1.0), negated = arith::NegFOp::create(l.b, l.loc, z);
  if (function == ScoreFunction::Sigmoid)
    return l.div(one, l.add(one, l.exp(negated)));
  // softplus(z) = max(z, 0) + log(1 + exp(-|z|)), which does not overflow.
  Value magnitude = math::AbsFOp::create(l.b, l.loc, z);
  Value rest =
      math::Log1pOp::create(l.b, l.loc, l.exp(arith::NegFOp::create(l.b, l.loc, magnitude)));
  return math::SqrtOp::create(l.b, l.loc, l.add(l.max(z, l.real(0.0)), rest));
}

/// scores[at(i)] = softmax over i in [0, count) of logits[at(i)].
void buildSoftmax(LoopBuilder &l, Value count, Value logits, Value scores,
                  function_ref<Value(Value)> at) {
  Value minusInf = arith::ConstantOp::create(
      l.b, l.loc, l.b.getF32FloatAttr(-std::numeric_limits<float>::infinity()));
  Value maximum = l.fold(count, minusInf, [&](Value i, ValueRange state) -> SmallVector<Value> {
    return {l.max(state[0], l.load(logits, at(i)))};
  })[0];
  Value sum = l.fold(count, l.real(0.0), [&](Value i, ValueRange state) -> SmallVector<Value> {
    Value position = at(i);
    Value power = l.exp(l.sub(l.load(logits, position), maximum));
    l.store(power, scores, position);
    return {l.add(state[0], power)};
  })[0];
  l.loop(count, [&](Value i) {
    Value position = at(i);
    l.store(l.div(l.load(scores, position), sum), scores, position);
  });
}

/// Id of the best key that is not taken: largest first, NaN before all, equal keys by rising id.
Value buildBest(LoopBuilder &l, Value experts, Value keys, Value taken) {
  SmallVector<Value> init = {l.index(0), l.real(0.0), l.boolean(false)};
  return l.fold(experts, init, [&](Value e, ValueRange best) -> SmallVector<Value> {
    Value key = l.load(keys, e);
    Value greater = l.cmp(arith::CmpFPredicate::OGT, key, best[1]);
    Value keyIsNaN = l.cmp(arith::CmpFPredicate::UNO, key, key);
    Value bestIsNumber = l.cmp(arith::CmpFPredicate::ORD, best[1], best[1]);
    Value none = arith::XOrIOp::create(l.b, l.loc, best[2], l.boolean(true));
    Value better = l.ori(none, l.ori(greater, l.andi(keyIsNaN, bestIsNumber)));
    Value free = arith::XOrIOp::create(l.b, l.loc, l.load(taken, e), l.boolean(true));
    Value take = l.andi(free, better);
    return {l.select(take, e, best[0]), l.select(take, key, best[1]),
            l.select(take, l.boolean(true), best[2])};
  })[0];
}

/// weights[t, :] divided by its sum or norm, and scaled.
void buildRenormalize(LoopBuilder &l, RouterAttr router, Value weights, Value t) {
  Value count = l.index(router.getTopK());
  Value divisor;
  if (router.getRenormalize() != Renormalize::None) {
    bool isNorm = router.getRenormalize() == Renormalize::LpNorm;
    Value p = l.real(router.getNormP());
    divisor = l.fold(count, l.real(0.0), [&](Value s, ValueRange sum) -> SmallVector<Value> {
      Value term = l.load(weights, {t, s});
      if (isNorm)
        term = math::PowFOp::create(l.b, l.loc, math::AbsFOp::create(l.b, l.loc, term), p);
      return {l.add(sum[0], term)};
    })[0];
    if (isNorm)
      divisor = math::PowFOp::create(l.b, l.loc, divisor, l.real(1.0 / router.getNormP()));
    else if (router.getRenormalize() == Renormalize::ClampSum)
      divisor = l.max(divisor, l.real(router.getEpsilon()));
    else
      divisor = l.add(divisor, l.real(router.getEpsilon()));
  }
  l.loop(count, [&](Value s) {
    Value weight = l.load(weights, {t, s});
    if (divisor)
      weight = l.div(weight, divisor);
    if (router.getScale().value != 1.0)
      weight = l.mul(weight, l.real(router.getScale()));
    l.store(weight, weights, {t, s});
  });
}

/// Experts and weights of token `t` from its logits.
void buildSelect(LoopBuilder &l, RouterAttr router, int64_t experts, const Scratch &scratch,
                 Value t, Value outWeights, Value outExperts) {
  Value count = l.index(experts), top = l.index(router.getTopK());
  bool scoreFirst = router.getOrder() == RouterOrder::ScoreThenSelect;
  bool softmax = router.getScore() == ScoreFunction::Softmax;
  if (scoreFirst && softmax)
    buildSoftmax(l, count, scratch.logits, scratch.scores, [](Value e) { return e; });
  if (!softmax)
    l.loop(count, [&](Value e) {
      l.store(scoreOne(l, router.getScore(), l.load(scratch.logits, e)), scratch.scores, e);
    });

  Value keys = scoreFirst ? scratch.scores : scratch.logits;
  l.loop(count, [&](Value e) { l.store(l.boolean(false), scratch.taken, e); });
  l.loop(top, [&](Value s) {
    Value best = buildBest(l, count, keys, scratch.taken);
    l.store(l.boolean(true), scratch.taken, best);
    l.store(best, scratch.chosen, s);
    l.store(l.toI32(best), outExperts, {t, s});
  });
  if (!scoreFirst && softmax)
    buildSoftmax(l, top, scratch.logits, scratch.scores,
                 [&](Value s) { return l.load(scratch.chosen, s); });
  l.loop(top, [&](Value s) {
    l.store(l.load(scratch.scores, l.load(scratch.chosen, s)), outWeights, {t, s});
  });
  buildRenormalize(l, router, outWeights, t);
}

/// The first attribute value that needs operands which the operations do not have yet.
std::string getRefused(RouterAttr router) {
  // With the values that this lowering does know put aside, what is left has no lowering anywhere.
  return RouterAttr::get(
             router.getContext(), ScoreFunction::Softmax, router.getOrder(), router.getTopK(),
             router.getRenormalize() == Renormalize::JointShared ? Renormalize::JointShared
                                                                 : Renormalize::None,
             0.0, 2.0, 1.0, router.getPrecision(), router.getInput(), LogitTransformAttr(),
             router.getSelect(), router.getSelectionBias(), router.getGroups(),
             router.getExtraRows())
      .getUnimplemented();
}

template <typename OpTy>
LogicalResult lowerRouter(OpTy op, Value packed, Value outLogits, PatternRewriter &rewriter) {
  RouterAttr router = op.getRouter();
  if (std::string refused = getRefused(router); !refused.empty())
    return op.emitOpError() << "expected router attributes with a reference lowering, but got "
                            << refused;
  LoopBuilder l{rewriter, op.getLoc()};
  auto weight = cast<WeightType>(op.getWeight().getType());
  int64_t experts = weight.getRows();
  Value x = op.getX();
  Type compute =
      op.getCompute() ? *op.getCompute() : cast<MemRefType>(x.getType()).getElementType();
  OpFoldResult e = rewriter.getIndexAttr(experts);
  OpFoldResult k = rewriter.getIndexAttr(router.getTopK());
  Type f32 = rewriter.getF32Type();
  Scratch scratch{l.alloc(e, f32), l.alloc(e, f32), l.alloc(e, rewriter.getI1Type()),
                  l.alloc(k, rewriter.getIndexType())};
  Value zero = l.index(0);
  l.loop(l.dim(x, 0), [&](Value t) {
    l.loop(experts, [&](Value row) {
      Value z = l.fold(l.index(weight.getCols()), l.real(0.0),
                       [&](Value i, ValueRange sum) -> SmallVector<Value> {
                         Value a = l.round(l.loadF32(x, {t, i}), compute);
                         Value w = loadWeight(l, weight, packed, zero, /*part=*/0, row, i);
                         return {l.fma(a, w, sum[0])};
                       })[0];
      if (outLogits)
        l.store(z, outLogits, {t, row});
      l.store(applyTransform(l, router.getLogitTransform(), z), scratch.logits, row);
    });
    buildSelect(l, router, experts, scratch, t, op.getOutWeights(), op.getOutExperts());
  });
  for (Value buffer : {scratch.logits, scratch.scores, scratch.taken, scratch.chosen})
    l.free(buffer);
  return success();
}

struct LowerRouter : OpConversionPattern<RouterOp> {
  using OpConversionPattern::OpConversionPattern;

  LogicalResult matchAndRewrite(RouterOp op, OpAdaptor adaptor,
                                ConversionPatternRewriter &rewriter) const override {
    if (!op.hasPureBufferSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not memrefs");
    if (failed(lowerRouter(op, adaptor.getWeight(), op.getOutLogits(), rewriter)))
      return failure();
    rewriter.eraseOp(op);
    return success();
  }
};

struct LowerRouteDispatch : OpConversionPattern<RouteDispatchOp> {
  using OpConversionPattern::OpConversionPattern;

  LogicalResult matchAndRewrite(RouteDispatchOp op, OpAdaptor adaptor,
                                ConversionPatternRewriter &rewriter) const override {
    if (!op.hasPureBufferSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not memrefs");
    if (failed(lowerRouter(op, adaptor.getWeight(), /*outLogits=*/Value(), rewriter)))
      return failure();
    LoopBuilder l{rewriter, op.getLoc()};
    buildDispatch(l, op.getOutExperts(), op.getOutOffsets(), op.getOutPair(),
                  cast<WeightType>(op.getWeight().getType()).getRows());
    rewriter.eraseOp(op);
    return success();
  }
};

} // namespace

void moe::populateRouterToLoopsPatterns(const TypeConverter &converter,
                                        RewritePatternSet &patterns) {
  patterns.add<LowerRouter, LowerRouteDispatch>(converter, patterns.getContext());
}
