//===- SelectKernel.cpp - scores and top-k on a GPU -----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A warp has one token; its lanes share the experts, and later the chosen. As on the CPU,
// everything is chosen by integer keys that are ordered like the numbers they are made of, and by
// logits where nothing is added to scores: every score function is increasing, and two scores may
// round to the same float.
//
//===----------------------------------------------------------------------===//

#include "Router.h"

using namespace mlir;
using namespace mlir::moe;

namespace {

class SelectEmitter : SelectValues {
public:
  SelectEmitter(GPUBuilder &g, const SelectKernel &spec, const SelectValues &values, Value token)
      : SelectValues(values), g(g), spec(spec), router(spec.router), P(spec.panels),
        K(router.getTopK()), keep(llvm::divideCeil(K, 32)), lane(g.rem(g.thread(), 32)),
        token(token) {}

  void emit();

private:
  using Values = SmallVector<Value>;
  /// The largest of the values that all lanes have, and its number (the lowest, if several do).
  struct Best {
    Value key, id;
  };

  Values readLogits();
  Value loadVector(Value vector, int64_t j) { return g.loadF32(g.element(vector, ids[j], 4)); }
  Value transform(Value z);
  /// The result of a step of a router that a model computes in bf16.
  Value step(Value v) { return router.roundsSteps() ? g.round(v) : v; }
  Value sigmoid(Value v) {
    Value negated = arith::NegFOp::create(g.b, g.loc, v);
    return step(g.divf(g.f(1), g.addf(g.f(1), g.exp(negated))));
  }
  Value toKey(Value score);
  Value toScore(Value key);
  Values keysOf(ArrayRef<Value> values);
  Best largest(ArrayRef<Value> keys, ArrayRef<Value> numbers);
  /// values[number], which one lane has.
  Value valueOf(ArrayRef<Value> values, Value number);
  Value sumReal(ArrayRef<Value> values, ArrayRef<Value> isReal,
                function_ref<Value(Value, int64_t)> f);
  Value largestLogit(ArrayRef<Value> z);
  void keepGroups(GroupsAttr groups, MutableArrayRef<Value> keys);
  void choose(ArrayRef<Value> values, ArrayRef<Value> by, bool same);
  void chooseSparseMixer(ArrayRef<Value> z);
  void scoreChosen(ArrayRef<Value> z);
  void writeWeights();

  GPUBuilder &g;
  const SelectKernel &spec;
  RouterAttr router;
  int64_t P, K, keep;
  Value lane, token;
  /// Experts of this lane, and whether they exist (null: all lanes have one).
  Values ids, real;
  /// The chosen: lane l has those in places l, 32 + l, …
  Values chosen, weight, isChosen;
};

} // namespace

//===----------------------------------------------------------------------===//
// Logits
//===----------------------------------------------------------------------===//

SelectEmitter::Values SelectEmitter::readLogits() {
  auto at = [&](Value slice, int64_t j) {
    Value row = g.add(g.mul(g.wide(slice), g.wide(tokens)), g.wide(token));
    return g.loadF32(g.element(partial, g.add(g.mul(row, P * 32), g.wide(ids[j])), 4));
  };
  Values z;
  for (int64_t j = 0; j < P; ++j)
    z.push_back(at(g.c(0), j));
  if (!slices && spec.slices * P <= 64) {
    // All loads first: one warp waits for them.
    Values terms;
    for (int64_t slice = 1; slice < spec.slices; ++slice)
      for (int64_t j = 0; j < P; ++j)
        terms.push_back(at(g.c(slice), j));
    for (auto [i, term] : llvm::enumerate(terms))
      z[i % P] = g.addf(z[i % P], term);
  } else if (spec.slices > 1) {
    Value end = slices ? slices : g.c(spec.slices);
    z = g.loop(g.c(1), end, g.c(1), z, [&](Value slice, ValueRange state) -> Values {
      Values sum(state);
      for (int64_t j = 0; j < P; ++j)
        sum[j] = g.addf(sum[j], at(slice, j));
      return sum;
    });
  }
  // Vectors are padded to whole panels.
  if (bias)
    for (int64_t j = 0; j < P; ++j)
      z[j] = g.addf(z[j], loadVector(bias, j));
  if (router.roundsLogits())
    for (Value &v : z)
      v = g.round(v);
  if (logits)
    for (int64_t j = 0; j < P; ++j) {
      auto write = [&] {
        Value index = g.add(g.mul(g.wide(token), logitsStride), g.wide(ids[j]));
        g.store(z[j], g.element(logits, index, 4), 4);
      };
      real[j] ? g.ifThen(real[j], write) : write();
    }
  if (router.getLogitTransform())
    for (Value &v : z)
      v = transform(v);
  return z;
}

Value SelectEmitter::transform(Value z) {
  LogitTransformAttr transform = router.getLogitTransform();
  Value c = g.f(float(double(transform.getValue())));
  if (transform.getKind() == LogitTransformKind::Scale)
    return step(g.mulf(c, z));
  return step(g.mulf(c, step(g.tanh(step(g.divf(z, c))))));
}

//===----------------------------------------------------------------------===//
// Keys
//===----------------------------------------------------------------------===//

/// An unsigned number that is larger where a score is: NaN is largest, -0 equals 0; never 0.
Value SelectEmitter::toKey(Value score) {
  Value bits = g.bits(g.addf(score, g.f(0)));
  Value sign = arith::ShRSIOp::create(g.b, g.loc, bits, g.c(31));
  Value key = g.xori(bits, g.ori(sign, g.c(int32_t(0x80000000))));
  return g.select(g.isNaN(score), g.c(-1), key);
}

/// The score that a key was made of.
Value SelectEmitter::toScore(Value key) {
  Value positive = g.less(key, 0);
  Value bits = g.select(positive, g.xori(key, g.c(int32_t(0x80000000))), g.xori(key, g.c(-1)));
  return g.real(bits);
}

/// Keys of all experts; 0 where there is none.
SelectEmitter::Values SelectEmitter::keysOf(ArrayRef<Value> values) {
  Values keys;
  for (auto [value, isReal] : llvm::zip_equal(values, real)) {
    Value key = toKey(value);
    keys.push_back(isReal ? g.select(isReal, key, g.c(0)) : key);
  }
  return keys;
}

SelectEmitter::Best SelectEmitter::largest(ArrayRef<Value> keys, ArrayRef<Value> numbers) {
  Value key = keys[0], id = numbers[0];
  for (size_t j = 1; j < keys.size(); ++j) {
    Value better = g.icmp(arith::CmpIPredicate::ugt, keys[j], key);
    id = g.select(better, numbers[j], id);
    key = g.select(better, keys[j], key);
  }
  Value best = g.redux(key, NVVM::ReduxKind::UMAX);
  Value candidate = g.select(g.equal(key, best), id, g.c(-1));
  return {best, g.redux(candidate, NVVM::ReduxKind::UMIN)};
}

Value SelectEmitter::valueOf(ArrayRef<Value> values, Value number) {
  Value own = g.c(0); // one lane has it
  for (int64_t j = 0; j < P; ++j)
    own = g.select(g.equal(ids[j], number), g.bits(values[j]), own);
  return g.real(g.redux(own, NVVM::ReduxKind::UMAX));
}

Value SelectEmitter::sumReal(ArrayRef<Value> values, ArrayRef<Value> isReal,
                             function_ref<Value(Value, int64_t)> f) {
  Value sum;
  for (size_t j = 0; j < values.size(); ++j) {
    Value term = f(values[j], int64_t(j));
    if (isReal[j])
      term = g.select(isReal[j], term, g.f(0));
    sum = sum ? g.addf(sum, term) : term;
  }
  return g.sumLanes(sum);
}

/// NaN if there is one.
Value SelectEmitter::largestLogit(ArrayRef<Value> z) {
  Value most;
  for (int64_t j = 0; j < P; ++j) {
    Value v = real[j] ? g.select(real[j], z[j], g.f(-INFINITY)) : z[j];
    most = most ? g.maxf(most, v) : v;
  }
  return g.reduce(most, [&](Value x, Value y) { return g.maxf(x, y); });
}

//===----------------------------------------------------------------------===//
// Choice
//===----------------------------------------------------------------------===//

/// Gives the keys of experts outside of the best groups the key of the fill.
void SelectEmitter::keepGroups(GroupsAttr groups, MutableArrayRef<Value> keys) {
  int64_t count = groups.getCount(), size = spec.E / count, words = llvm::divideCeil(count, 32);
  // The largest key of the group, and the expert that has it.
  auto largestOf = [&](Value group, Value except) {
    Values masked;
    for (int64_t j = 0; j < P; ++j) {
      Value inside = g.equal(g.div(ids[j], size), group);
      if (except)
        inside = g.andi(inside, g.icmp(arith::CmpIPredicate::ne, ids[j], except));
      masked.push_back(g.select(inside, keys[j], g.c(0)));
    }
    return largest(masked, ids);
  };
  // Lane l has the keys of groups l, 32 + l, …; 0 where there is none.
  Values numbers, state(words, g.c(0));
  for (int64_t w = 0; w < words; ++w)
    numbers.push_back(g.add(lane, w * 32));
  state = g.loop(g.c(0), g.c(count), g.c(1), state, [&](Value n, ValueRange old) -> Values {
    Best best = largestOf(n, {});
    Value score = toScore(best.key);
    if (groups.getReduce() == GroupScore::SumTop2)
      score = step(g.addf(score, toScore(largestOf(n, best.id).key)));
    Value key = toKey(score);
    Values next(old);
    for (int64_t w = 0; w < words; ++w)
      next[w] = g.select(g.equal(numbers[w], n), key, next[w]);
    return next;
  });
  // Then a bit for every group that is kept.
  state.append(words, g.c(0));
  state =
      g.loop(g.c(0), g.c(groups.getKeep()), g.c(1), state, [&](Value, ValueRange old) -> Values {
        Values next(old);
        Value winner = largest(ArrayRef<Value>(next).take_front(words), numbers).id;
        Value bit = arith::ShLIOp::create(g.b, g.loc, g.c(1), g.andi(winner, 31));
        Value word = g.shr(winner, 5);
        for (int64_t w = 0; w < words; ++w) {
          next[w] = g.select(g.equal(numbers[w], winner), g.c(0), next[w]);
          Value &mask = next[words + w];
          mask = g.select(g.equal(word, w), g.ori(mask, bit), mask);
        }
        return next;
      });
  // Keys of +0 and of -inf.
  int32_t fill = groups.getFill() == GroupFill::Zero ? int32_t(0x80000000) : 0x007fffff;
  for (int64_t j = 0; j < P; ++j) {
    Value of = g.div(ids[j], size), mask = state[words];
    for (int64_t w = 1; w < words; ++w)
      mask = g.select(g.equal(g.shr(of, 5), w), state[words + w], mask);
    Value bit = g.andi(arith::ShRUIOp::create(g.b, g.loc, mask, g.andi(of, 31)).getResult(), 1);
    Value taken = g.select(g.equal(bit, 1), keys[j], g.c(fill));
    // Padding stays padding.
    keys[j] = g.select(g.equal(keys[j], 0), keys[j], taken);
  }
}

/// The K experts with the largest `by`, and their `values`; `same`: they are the same numbers.
void SelectEmitter::choose(ArrayRef<Value> values, ArrayRef<Value> by, bool same) {
  Values state = keysOf(by);
  if (router.getGroups()) {
    keepGroups(router.getGroups(), state);
    same = false; // the fill is no value
  }
  state.append(2 * keep, g.c(0)); // ids and values of the chosen, K of them spread over the lanes
  state = g.loop(g.c(0), g.c(K), g.c(1), state, [&](Value round, ValueRange old) -> Values {
    Values next(old);
    Best best = largest(ArrayRef<Value>(next).take_front(P), ids);
    Value kept = same ? best.key : g.bits(valueOf(values, best.id));
    for (int64_t j = 0; j < P; ++j)
      next[j] = g.select(g.equal(ids[j], best.id), g.c(0), next[j]);
    for (int64_t q = 0; q < keep; ++q) {
      Value mine = g.equal(g.add(lane, q * 32), round);
      next[P + q] = g.select(mine, best.id, next[P + q]);
      next[P + keep + q] = g.select(mine, kept, next[P + keep + q]);
    }
    return next;
  });
  for (int64_t q = 0; q < keep; ++q) {
    Value kept = state[P + keep + q];
    chosen.push_back(state[P + q]);
    weight.push_back(same ? toScore(kept) : g.real(kept));
  }
}

/// The two best logits; the weight of each is its softmax over the logits that are close to it, for
/// the second without the first.
void SelectEmitter::chooseSparseMixer(ArrayRef<Value> z) {
  Values keys = keysOf(z);
  Value threshold = step(g.f(float(2.0 * double(router.getJitter())))), before;
  chosen = {g.c(0)};
  weight = {g.f(0)};
  for (int64_t slot : {0, 1}) {
    Value expert = largest(keys, ids).id, top = valueOf(z, expert);
    Value total = sumReal(z, real, [&](Value v, int64_t j) {
      Value factor = g.maxf(g.real(g.andi(g.bits(v), 0x7fffffff)), top);
      Value far = g.greater(step(g.divf(step(g.subf(top, v)), factor)), threshold);
      if (before)
        far = g.ori(far, g.equal(ids[j], before));
      return g.select(far, g.f(0), g.exp(g.subf(v, top)));
    });
    Value mine = g.equal(lane, slot);
    chosen[0] = g.select(mine, expert, chosen[0]);
    weight[0] = g.select(mine, step(g.divf(g.f(1), total)), weight[0]);
    for (int64_t j = 0; j < P; ++j)
      keys[j] = g.select(g.equal(ids[j], expert), g.c(0), keys[j]);
    before = expert;
  }
}

//===----------------------------------------------------------------------===//
// Weights
//===----------------------------------------------------------------------===//

/// The scores of chosen logits.
void SelectEmitter::scoreChosen(ArrayRef<Value> z) {
  if (router.getScore() == ScoreFunction::Sigmoid) {
    for (Value &v : weight)
      v = sigmoid(v);
    return;
  }
  // The largest logit, or NaN if there is one: the first of the chosen, unless a bias chose.
  Value top = selectionBias ? largestLogit(z) : g.shuffle(NVVM::ShflKind::idx, weight[0], g.c(0));
  auto power = [&](Value v, int64_t = 0) { return g.exp(g.subf(v, top)); };
  bool overAll = router.getOrder() == RouterOrder::ScoreThenSelect;
  Value total = overAll ? sumReal(z, real, power) : sumReal(weight, isChosen, power);
  for (Value &v : weight)
    v = step(g.divf(power(v), total));
}

void SelectEmitter::writeWeights() {
  Value norm, epsilon = g.f(float(double(router.getEpsilon())));
  auto sum = [&](function_ref<Value(Value, int64_t)> f) {
    return step(sumReal(weight, isChosen, f));
  };
  auto plain = [](Value v, int64_t) { return v; };
  switch (router.getRenormalize()) {
  case Renormalize::None:
  case Renormalize::JointShared:
    break;
  case Renormalize::Sum:
    norm = step(g.addf(sum(plain), epsilon));
    break;
  case Renormalize::ClampSum:
    norm = step(g.maxf(sum(plain), epsilon));
    break;
  case Renormalize::LpNorm:
    norm = double(router.getNormP()) == 1.0
               ? sum(plain)
               : step(g.sqrt(sum([&](Value v, int64_t) { return step(g.mulf(v, v)); })));
    break;
  }
  for (int64_t q = 0; q < keep; ++q) {
    Value v = weight[q];
    if (norm)
      v = step(g.divf(v, norm));
    if (router.getScale().value != 1.0)
      v = step(g.mulf(v, g.f(router.getScale())));
    g.ifThen(isChosen[q], [&] {
      if (expertScale)
        v = step(g.mulf(v, g.loadF32(g.element(expertScale, chosen[q], 4))));
      if (router.roundsWeights())
        v = g.round(v);
      Value index = g.add(g.mul(g.wide(token), K), g.wide(g.add(lane, q * 32)));
      g.store(v, g.element(weights, index, 4), 4);
      g.store(chosen[q], g.element(experts, index, 4), 4);
    });
  }
}

void SelectEmitter::emit() {
  for (int64_t j = 0; j < P; ++j) {
    ids.push_back(g.add(lane, j * 32));
    real.push_back((j + 1) * 32 <= spec.E ? Value() : g.less(ids[j], spec.E));
  }
  for (int64_t q = 0; q < keep; ++q)
    isChosen.push_back(g.less(g.add(lane, q * 32), K));
  Values z = readLogits();
  if (router.getSelect() == Selection::SparseMixer) {
    chooseSparseMixer(z);
    return writeWeights();
  }
  // The scores of all experts are made where they decide.
  bool scoreFirst = router.getOrder() == RouterOrder::ScoreThenSelect;
  bool allScores = router.getSelectionBias() == SelectionBias::Score ||
                   (scoreFirst && (router.getGroups() || router.roundsSteps()));
  Values from = z;
  if (allScores && router.getScore() == ScoreFunction::Sigmoid) {
    for (Value &v : from)
      v = sigmoid(v);
  } else if (allScores) {
    Value top = largestLogit(z);
    for (Value &v : from)
      v = g.exp(g.subf(v, top));
    Value total = sumReal(from, real, [](Value v, int64_t) { return v; });
    for (Value &v : from)
      v = step(g.divf(v, total));
  }
  Values by = router.getSelectionBias() == SelectionBias::Logit ? z : from;
  if (selectionBias)
    for (int64_t j = 0; j < P; ++j)
      by[j] = g.addf(by[j], loadVector(selectionBias, j));
  choose(from, by, /*same=*/!selectionBias);
  if (!allScores)
    scoreChosen(z);
  writeWeights();
}

SelectValues::SelectValues(Value partial, Value tokens, Value slices, const SelectKernel &spec,
                           Arguments &args)
    : partial(partial), tokens(tokens), slices(slices), weights(args.next()), experts(args.next()),
      logits(args.nextIf(spec.logits)), logitsStride(args.nextIf(spec.logits)),
      bias(args.nextIf(spec.bias)), selectionBias(args.nextIf(spec.selectionBias)),
      expertScale(args.nextIf(spec.expertScale)) {}

void mlir::moe::emitSelectToken(GPUBuilder &g, const SelectKernel &spec, const SelectValues &values,
                                Value token) {
  SelectEmitter(g, spec, values, token).emit();
}

void mlir::moe::emitSelect(OpBuilder &b, LLVM::LLVMFuncOp kernel, const SelectKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  Arguments args(kernel.getArguments());
  Value partial = args.next(), tokens = args.next(), slices = args.next();
  SelectValues values(partial, tokens, slices, spec, args);
  // Uniform in a warp: one warp per token.
  Value token = g.add(g.mul(g.blockX(), kSelectWarps), g.div(g.thread(), 32));
  g.ifThen(g.less(token, tokens), [&] { emitSelectToken(g, spec, values, token); });
}
