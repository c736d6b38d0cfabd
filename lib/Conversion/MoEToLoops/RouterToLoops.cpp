//===- RouterToLoops.cpp - routers as loops -------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "LoopBuilder.h"

#include "moe/Conversion/MoEToLoops/MoEToLoops.h"

#include "mlir/Dialect/Utils/StaticValueUtils.h"

#include <cmath>
#include <limits>

using namespace mlir;
using namespace mlir::moe;

namespace {

/// Buffers of one token: E logits, E scores, E keys of the choice, E flags, K ids.
struct Scratch {
  Value logits, scores, keys, taken, chosen;
};

/// A vector of the router as memref of its packed elements; null where there is none.
struct PackedVectors {
  Value bias, selectionBias, expertScale, inputScale;
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
  Value minusInf = l.real(-std::numeric_limits<double>::infinity());
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

/// Id in [begin, end) of the best key that is not taken: largest first, NaN before all, equal keys
/// by rising id. `taken` may be null.
Value buildBest(LoopBuilder &l, Value begin, Value end, Value keys, Value taken) {
  SmallVector<Value> init = {begin, l.real(0.0), l.boolean(false)};
  auto loop = l.fold(l.subi(end, begin), init, [&](Value i, ValueRange best) {
    Value e = l.addi(begin, i);
    Value key = l.load(keys, e);
    Value greater = l.cmp(arith::CmpFPredicate::OGT, key, best[1]);
    Value keyIsNaN = l.cmp(arith::CmpFPredicate::UNO, key, key);
    Value bestIsNumber = l.cmp(arith::CmpFPredicate::ORD, best[1], best[1]);
    Value take = l.ori(l.noti(best[2]), l.ori(greater, l.andi(keyIsNaN, bestIsNumber)));
    if (taken)
      take = l.andi(take, l.noti(l.load(taken, e)));
    return SmallVector<Value>{l.select(take, e, best[0]), l.select(take, key, best[1]),
                              l.select(take, l.boolean(true), best[2])};
  });
  return loop[0];
}

/// Marks the best key in [begin, end) that is not taken, and gives its id.
Value takeBest(LoopBuilder &l, Value begin, Value end, Value keys, Value taken) {
  Value best = buildBest(l, begin, end, keys, taken);
  l.store(l.boolean(true), taken, best);
  return best;
}

void clearFlags(LoopBuilder &l, Value count, Value flags) {
  l.loop(count, [&](Value e) { l.store(l.boolean(false), flags, e); });
}

/// Keys of experts outside of the kept groups become the fill.
void buildGroups(LoopBuilder &l, GroupsAttr groups, int64_t experts, const Scratch &scratch) {
  int64_t size = experts / groups.getCount();
  OpFoldResult count = l.b.getIndexAttr(groups.getCount());
  Value best = l.alloc(count, l.b.getF32Type()), kept = l.alloc(count, l.b.getI1Type());
  clearFlags(l, l.index(experts), scratch.taken);
  l.loop(groups.getCount(), [&](Value g) {
    Value begin = l.muli(g, size), end = l.addi(begin, size);
    Value score = l.load(scratch.keys, takeBest(l, begin, end, scratch.keys, scratch.taken));
    if (groups.getReduce() == GroupScore::SumTop2)
      score =
          l.add(score, l.load(scratch.keys, takeBest(l, begin, end, scratch.keys, scratch.taken)));
    l.store(score, best, g);
    l.store(l.boolean(false), kept, g);
  });
  l.loop(groups.getKeep(),
         [&](Value) { takeBest(l, l.index(0), l.index(groups.getCount()), best, kept); });
  double fill =
      groups.getFill() == GroupFill::Zero ? 0.0 : -std::numeric_limits<double>::infinity();
  l.loop(experts, [&](Value e) {
    Value key = l.load(scratch.keys, e);
    l.store(l.select(l.load(kept, l.divi(e, size)), key, l.real(fill)), scratch.keys, e);
  });
  l.free(best);
  l.free(kept);
}

/// select = sparse_mixer: the two best logits, each with its softmax over what is close to it.
void buildSparseMixer(LoopBuilder &l, RouterAttr router, int64_t experts, const Scratch &scratch,
                      Value t, Value outWeights, Value outExperts) {
  Value count = l.index(experts);
  clearFlags(l, count, scratch.taken);
  for (int64_t slot : {0, 1}) {
    Value best = buildBest(l, l.index(0), count, scratch.logits, scratch.taken);
    Value m = l.load(scratch.logits, best);
    Value sum = l.fold(count, l.real(0.0), [&](Value e, ValueRange state) -> SmallVector<Value> {
      Value z = l.load(scratch.logits, e);
      Value factor = l.max(math::AbsFOp::create(l.b, l.loc, z), m);
      Value far = l.cmp(arith::CmpFPredicate::OGT, l.div(l.sub(m, z), factor),
                        l.real(2.0 * router.getJitter()));
      Value out = l.ori(far, l.load(scratch.taken, e));
      return {l.add(state[0], l.select(out, l.real(0.0), l.exp(l.sub(z, m))))};
    })[0];
    l.store(l.boolean(true), scratch.taken, best);
    l.store(l.toI32(best), outExperts, {t, l.index(slot)});
    l.store(best, scratch.chosen, l.index(slot));
    l.store(l.div(l.real(1.0), sum), outWeights, {t, l.index(slot)});
  }
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
void buildSelect(LoopBuilder &l, RouterAttr router, int64_t experts, const PackedVectors &vectors,
                 const Scratch &scratch, Value t, Value outWeights, Value outExperts) {
  Value count = l.index(experts), top = l.index(router.getTopK());
  if (router.getSelect() == Selection::SparseMixer) {
    buildSparseMixer(l, router, experts, scratch, t, outWeights, outExperts);
  } else {
    bool scoreFirst = router.getOrder() == RouterOrder::ScoreThenSelect;
    bool softmax = router.getScore() == ScoreFunction::Softmax;
    if (scoreFirst && softmax)
      buildSoftmax(l, count, scratch.logits, scratch.scores, [](Value e) { return e; });
    if (!softmax)
      l.loop(count, [&](Value e) {
        l.store(scoreOne(l, router.getScore(), l.load(scratch.logits, e)), scratch.scores, e);
      });
    bool byScore = router.getSelectionBias() == SelectionBias::Score ||
                   (router.getSelectionBias() == SelectionBias::None && scoreFirst);
    l.loop(count, [&](Value e) {
      Value key = l.load(byScore ? scratch.scores : scratch.logits, e);
      if (vectors.selectionBias)
        key = l.add(key, l.load(vectors.selectionBias, e));
      l.store(key, scratch.keys, e);
    });
    if (GroupsAttr groups = router.getGroups())
      buildGroups(l, groups, experts, scratch);
    clearFlags(l, count, scratch.taken);
    l.loop(top, [&](Value s) {
      Value best = takeBest(l, l.index(0), count, scratch.keys, scratch.taken);
      l.store(best, scratch.chosen, s);
      l.store(l.toI32(best), outExperts, {t, s});
    });
    if (!scoreFirst && softmax)
      buildSoftmax(l, top, scratch.logits, scratch.scores,
                   [&](Value s) { return l.load(scratch.chosen, s); });
    l.loop(top, [&](Value s) {
      l.store(l.load(scratch.scores, l.load(scratch.chosen, s)), outWeights, {t, s});
    });
  }
  buildRenormalize(l, router, outWeights, t);
  if (vectors.expertScale)
    l.loop(top, [&](Value s) {
      Value factor = l.load(vectors.expertScale, l.load(scratch.chosen, s));
      l.store(l.mul(l.load(outWeights, {t, s}), factor), outWeights, {t, s});
    });
}

/// 1 / rms of row t of x, rounded as `compute` says.
Value buildRowFactor(LoopBuilder &l, Value x, Value t, int64_t cols, Type compute, double epsilon) {
  Value sum =
      l.fold(l.index(cols), l.real(0.0), [&](Value i, ValueRange state) -> SmallVector<Value> {
        Value a = l.round(l.loadF32(x, {t, i}), compute);
        return {l.fma(a, a, state[0])};
      })[0];
  Value mean = l.add(l.div(sum, l.real(cols)), l.real(epsilon));
  return l.div(l.real(1.0), math::SqrtOp::create(l.b, l.loc, mean));
}

/// The first attribute value without a lowering here. sqrt(softplus), which the CPU target has no
/// code for, has one; a model's own rounding, for which it has, has none.
std::string getRefused(RouterAttr router) {
  if (router.getPrecision() != RouterPrecision::F32)
    return ("precision = " + stringifyRouterPrecision(router.getPrecision())).str();
  if (router.getScore() != ScoreFunction::SqrtSoftplus)
    return router.getUnimplemented();
  return RouterAttr::get(router.getContext(), ScoreFunction::Sigmoid, router.getOrder(),
                         router.getTopK(), router.getRenormalize(), router.getEpsilon(),
                         router.getNormP(), router.getScale(), router.getPrecision(),
                         router.getInput(), router.getLogitTransform(), router.getSelect(),
                         router.getSelectionBias(), router.getGroups(), router.getExtraRows(),
                         router.getInputEpsilon(), router.getJitter(), router.getModelArithmetic(),
                         router.getWeightDtype())
      .getUnimplemented();
}

template <typename OpTy, typename AdaptorTy>
LogicalResult lowerRouter(OpTy op, AdaptorTy adaptor, Value outLogits, PatternRewriter &rewriter) {
  RouterAttr router = op.getRouter();
  if (std::string refused = getRefused(router); !refused.empty())
    return op.emitOpError() << "expected router attributes with a reference lowering, but got "
                            << refused;
  LoopBuilder l{rewriter, op.getLoc()};
  auto weight = cast<WeightType>(op.getWeight().getType());
  int64_t experts = op.getNumExperts(), cols = weight.getCols();
  PackedVectors vectors{adaptor.getBias(), adaptor.getSelectionBias(), adaptor.getExpertScale(),
                        adaptor.getInputScale()};
  Value x = op.getX();
  Type compute =
      op.getCompute() ? *op.getCompute() : cast<MemRefType>(x.getType()).getElementType();
  OpFoldResult e = rewriter.getIndexAttr(experts);
  OpFoldResult k = rewriter.getIndexAttr(router.getTopK());
  Type f32 = rewriter.getF32Type();
  Scratch scratch{l.alloc(e, f32), l.alloc(e, f32), l.alloc(e, f32),
                  l.alloc(e, rewriter.getI1Type()), l.alloc(k, rewriter.getIndexType())};
  Value zero = l.index(0);
  l.loop(l.dim(x, 0), [&](Value t) {
    Value factor;
    if (vectors.inputScale)
      factor = buildRowFactor(l, x, t, cols, compute, router.getInputEpsilon());
    l.loop(experts, [&](Value row) {
      Value z =
          l.fold(l.index(cols), l.real(0.0), [&](Value i, ValueRange sum) -> SmallVector<Value> {
            Value a = l.round(l.loadF32(x, {t, i}), compute);
            if (factor) {
              a = l.mul(l.mul(a, factor), l.load(vectors.inputScale, i));
              a = l.mul(a, l.real(1.0 / std::sqrt(double(cols))));
            }
            Value w = loadWeight(l, weight, adaptor.getWeight(), zero, /*part=*/0, row, i);
            return {l.fma(a, w, sum[0])};
          })[0];
      if (vectors.bias)
        z = l.add(z, l.load(vectors.bias, row));
      if (outLogits)
        l.store(z, outLogits, {t, row});
      l.store(applyTransform(l, router.getLogitTransform(), z), scratch.logits, row);
    });
    buildSelect(l, router, experts, vectors, scratch, t, op.getOutWeights(), op.getOutExperts());
  });
  for (Value buffer : {scratch.logits, scratch.scores, scratch.keys, scratch.taken, scratch.chosen})
    l.free(buffer);
  return success();
}

Value getLogits(RouterOp op) { return op.getOutLogits(); }
Value getLogits(RouteDispatchOp) { return {}; }

template <typename OpTy> struct LowerRouter : OpConversionPattern<OpTy> {
  using OpConversionPattern<OpTy>::OpConversionPattern;
  using OpAdaptor = typename OpConversionPattern<OpTy>::OpAdaptor;

  LogicalResult matchAndRewrite(OpTy op, OpAdaptor adaptor,
                                ConversionPatternRewriter &rewriter) const override {
    if (!op.hasPureBufferSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not memrefs");
    if (failed(lowerRouter(op, adaptor, getLogits(op), rewriter)))
      return failure();
    if constexpr (std::is_same_v<OpTy, RouteDispatchOp>) {
      LoopBuilder l{rewriter, op.getLoc()};
      buildDispatch(l, op.getOutExperts(), op.getOutOffsets(), op.getOutPair(), op.getNumExperts());
    }
    rewriter.eraseOp(op);
    return success();
  }
};

} // namespace

void moe::populateRouterToLoopsPatterns(const TypeConverter &converter,
                                        RewritePatternSet &patterns) {
  patterns.add<LowerRouter<RouterOp>, LowerRouter<RouteDispatchOp>>(converter,
                                                                    patterns.getContext());
}
