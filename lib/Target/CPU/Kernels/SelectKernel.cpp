//===- SelectKernel.cpp - Scores and top-k of a row of logits -------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Selection compares integer keys that are ordered like the numbers they are made of, so that every
// comparison is total: NaN is one key above +inf, -0 and +0 are equal, padding and taken experts
// are one key below -inf. Sums run over vectors of 16 lanes in ascending order and then over a
// fixed tree, on every level, whatever the number of tokens.
//
// What a choice is made by: the logits themselves where nothing is added to the scores and no group
// is summed, as every score function is increasing and two scores may round to the same float;
// otherwise the scores of all experts, with the selection bias. Scores that the model itself rounds
// to bf16 decide: many are equal, and equal scores are to be listed by rising id.
//
// `precision = model`: everything stays in f32 registers; what the model's code leaves in bf16 is
// rounded to it and widened again.
//
//===----------------------------------------------------------------------===//

#include "KernelBuilder.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/Support/xxhash.h"

#include <limits>

using namespace mlir;
using namespace mlir::moe;

static constexpr int64_t kLanes = 16;
static constexpr int32_t kTaken = std::numeric_limits<int32_t>::min();

bool SelectKernelSpec::hasSelectionBias() const {
  return router.getSelectionBias() != SelectionBias::None;
}

std::string SelectKernelSpec::getName() const {
  // The attribute says all that decides the code but the numbers of experts; its text is hashed.
  std::string text;
  llvm::raw_string_ostream(text) << router;
  std::string name =
      llvm::formatv("moe_select_{0}_e{1}_k{2}_{3}_{4}", level == KernelLevel::V3 ? "v3" : "v4",
                    experts, router.getTopK(), stringifyScoreFunction(router.getScore()),
                    llvm::utohexstr(llvm::xxh3_64bits(text), /*LowerCase=*/true,
                                    /*Width=*/16));
  if (expertScale)
    name += "_scaled";
  if (copyLogits)
    name += "_copy";
  return name;
}

namespace {

class SelectEmitter {
public:
  SelectEmitter(OpBuilder &b, Location loc, const SelectKernelSpec &spec)
      : k(b, loc), b(b), loc(loc), spec(spec), router(spec.router), topK(router.getTopK()),
        experts(spec.experts) {}

  func::FuncOp emit();

private:
  VectorType f32v() { return k.vec(kLanes, b.getF32Type()); }
  VectorType i32v() { return k.vec(kLanes, b.getI32Type()); }
  Value splat(Value v) {
    return vector::BroadcastOp::create(b, loc, k.vec(kLanes, v.getType()), v);
  }
  Value splatF(double v) { return splatF32(b, loc, kLanes, static_cast<float>(v)); }
  Value splatI(int32_t v) { return splatI32(b, loc, kLanes, v); }
  /// Numbers 0 to 15.
  Value iota() {
    SmallVector<int32_t> numbers;
    for (int32_t l = 0; l < kLanes; ++l)
      numbers.push_back(l);
    return arith::ConstantOp::create(b, loc, DenseIntElementsAttr::get(i32v(), ArrayRef(numbers)));
  }
  Value addf(Value x, Value y) { return arith::AddFOp::create(b, loc, x, y); }
  Value subf(Value x, Value y) { return arith::SubFOp::create(b, loc, x, y); }
  Value mulf(Value x, Value y) { return arith::MulFOp::create(b, loc, x, y); }
  Value divf(Value x, Value y) { return arith::DivFOp::create(b, loc, x, y); }
  Value maxf(Value x, Value y) { return arith::MaximumFOp::create(b, loc, x, y); }
  /// A vector or a scalar rounded to bf16, as f32.
  Value toBF16(Value x) {
    if (isa<VectorType>(x.getType()))
      return emitRoundToBF16(b, loc, x);
    Value one = vector::BroadcastOp::create(b, loc, k.vec(1, x.getType()), x);
    return vector::ExtractOp::create(b, loc, emitRoundToBF16(b, loc, one), int64_t(0));
  }
  /// The result of a step of the router.
  Value step(Value x) { return router.roundsSteps() ? toBF16(x) : x; }
  Value select(Value c, Value x, Value y) { return arith::SelectOp::create(b, loc, c, x, y); }
  Value cmpi(arith::CmpIPredicate p, Value x, Value y) {
    return arith::CmpIOp::create(b, loc, p, x, y);
  }
  /// Vectors that hold `count` elements.
  Value vectorsOf(int64_t count) { return k.index(llvm::divideCeil(count, kLanes)); }
  /// Address of vector `v`, or of element `e`, at p.
  Value vectorAt(Value p, Value v) { return k.at(p, k.mul(v, kLanes * 4)); }
  Value elementAt(Value p, Value e) { return k.at(p, k.mul(e, 4)); }
  Value loadFloat(Value p) { return k.load(b.getF32Type(), p); }
  Value toOffset(Value id) { return arith::ExtUIOp::create(b, loc, k.i64(), id); }
  /// The i1 vector of the lanes of vector `v` (an i64) whose number is below `count`.
  Value realLanes(Value v, int64_t count) {
    return cmpi(arith::CmpIPredicate::slt, numbers(v), splatI(static_cast<int32_t>(count)));
  }
  /// Numbers of the lanes of vector `v`.
  Value numbers(Value v) {
    Value first = arith::TruncIOp::create(b, loc, b.getI32Type(), k.mul(v, kLanes));
    return arith::AddIOp::create(b, loc, iota(), splat(first));
  }

  /// Sum over `count` f32 at p of f(vector, number of the vector), lanes at or beyond count left
  /// out.
  Value sumOver(Value p, int64_t count, function_ref<Value(Value, Value)> f);
  /// to[i] = f(from[i], number of the vector) for `count` elements.
  void map(Value from, Value to, int64_t count, function_ref<Value(Value, Value)> f) {
    k.loop(vectorsOf(count), 1,
           [&](Value v) { k.store(f(k.load(f32v(), vectorAt(from, v)), v), vectorAt(to, v)); });
  }

  Value transform(Value z);
  Value sigmoid(Value z) {
    Value one = splatF(1.0);
    return divf(one, addf(one, emitExp(b, loc, arith::NegFOp::create(b, loc, z))));
  }
  Value toKey(Value x);
  void emitKeys(Value from, Value keys, int64_t count);
  Value emitLargest(Value keys, Value first, int64_t count, Value except = nullptr);
  Value emitLargest(Value keys) { return emitLargest(keys, k.index(0), experts); }
  void emitGroups(GroupsAttr groups);
  void emitAllScores(Value logits);
  void emitChoice(Value values, Value ids);
  void emitSparseMixer(Value logits, Value ids);
  void emitWeights(Value weights, Value ids);
  void emitToken(Value logits, Value weights, Value ids);

  /// Whether the scores of all experts decide, not the logits.
  bool needsAllScores() {
    bool scoreFirst = router.getOrder() == RouterOrder::ScoreThenSelect;
    return router.getSelectionBias() == SelectionBias::Score ||
           (scoreFirst && (router.getGroups() || router.roundsSteps()));
  }

  KernelBuilder k;
  OpBuilder &b;
  Location loc;
  const SelectKernelSpec &spec;
  RouterAttr router;
  int64_t topK, experts;
  /// Arguments and scratch: the vectors; keys of all experts, numbers the choice is made by, scores
  /// of all experts; numbers of the chosen; scores and keys of the groups.
  Value selectionBias, expertScale, keys, choice, scores, chosen, groupScores, groupKeys;
};

} // namespace

Value SelectEmitter::sumOver(Value p, int64_t count, function_ref<Value(Value, Value)> f) {
  Value zero = splatF(0.0);
  SmallVector<Value> total = k.loop(vectorsOf(count), 1, ValueRange{zero},
                                    [&](Value v, ValueRange acc) -> SmallVector<Value> {
                                      Value term = f(k.load(f32v(), vectorAt(p, v)), v);
                                      if (count % kLanes)
                                        term = select(realLanes(v, count), term, zero);
                                      return {addf(acc[0], term)};
                                    });
  return k.sum(total[0]);
}

Value SelectEmitter::transform(Value z) {
  LogitTransformAttr transform = router.getLogitTransform();
  Value c = splatF(transform.getValue());
  if (transform.getKind() == LogitTransformKind::Scale)
    return step(mulf(c, z));
  return step(mulf(c, step(emitTanh(b, loc, step(divf(z, c))))));
}

//===----------------------------------------------------------------------===//
// Choice
//===----------------------------------------------------------------------===//

Value SelectEmitter::toKey(Value x) {
  // Adding +0 turns -0 into +0 and changes nothing else.
  Value bits = vector::BitCastOp::create(b, loc, i32v(), addf(x, splatF(0.0)));
  Value sign = arith::ShRSIOp::create(b, loc, bits, splatI(31));
  Value flip = arith::AndIOp::create(b, loc, sign, splatI(0x7fffffff));
  Value key = arith::XOrIOp::create(b, loc, bits, flip);
  Value nan = arith::CmpFOp::create(b, loc, arith::CmpFPredicate::UNO, x, x);
  return select(nan, splatI(0x7fffffff), key);
}

/// keys[e] of `count` numbers, and the smallest key in the padding.
void SelectEmitter::emitKeys(Value from, Value keys, int64_t count) {
  k.loop(vectorsOf(count), 1, [&](Value v) {
    Value key = toKey(k.load(f32v(), vectorAt(from, v)));
    if (count % kLanes)
      key = select(realLanes(v, count), key, splatI(kTaken));
    k.store(key, vectorAt(keys, v));
  });
}

/// The lowest number, counted from `first` (an i64), among those of `count` keys from there on that
/// are largest, as i32; `except` (an i32) is left out.
Value SelectEmitter::emitLargest(Value keys, Value first, int64_t count, Value except) {
  Value least = splatI(kTaken), none = splatI(std::numeric_limits<int32_t>::max());
  Value base = elementAt(keys, first);
  // Per lane: the largest key so far and its first number. Strictly larger replaces, so that the
  // first stays.
  SmallVector<Value> best =
      k.loop(vectorsOf(count), 1, ValueRange{least, none},
             [&](Value v, ValueRange acc) -> SmallVector<Value> {
               Value key = k.load(i32v(), vectorAt(base, v));
               Value number = numbers(v);
               Value larger = cmpi(arith::CmpIPredicate::sgt, key, acc[0]);
               // All experts are padded with the smallest key; a group is followed by the next.
               if (count % kLanes && count != experts)
                 larger = arith::AndIOp::create(b, loc, larger, realLanes(v, count));
               if (except)
                 larger = arith::AndIOp::create(
                     b, loc, larger, cmpi(arith::CmpIPredicate::ne, number, splat(except)));
               return {select(larger, key, acc[0]), select(larger, number, acc[1])};
             });
  Value top = vector::ReductionOp::create(b, loc, vector::CombiningKind::MAXSI, best[0]);
  Value candidates = select(cmpi(arith::CmpIPredicate::eq, best[0], splat(top)), best[1], none);
  return vector::ReductionOp::create(b, loc, vector::CombiningKind::MINSI, candidates);
}

/// Replaces the keys of experts in groups that are not kept by that of the fill.
void SelectEmitter::emitGroups(GroupsAttr groups) {
  int64_t count = groups.getCount(), size = experts / count;
  k.loop(k.index(count), 1, [&](Value g) {
    Value first = k.mul(g, size);
    Value best = emitLargest(keys, first, size);
    auto valueOf = [&](Value id) {
      return loadFloat(elementAt(choice, k.add(first, toOffset(id))));
    };
    Value score = valueOf(best);
    if (groups.getReduce() == GroupScore::SumTop2)
      score = step(addf(score, valueOf(emitLargest(keys, first, size, best))));
    k.store(score, elementAt(groupScores, g));
  });
  emitKeys(groupScores, groupKeys, count);
  k.loop(k.index(groups.getKeep()), 1, [&](Value) {
    Value best = emitLargest(groupKeys, k.index(0), count);
    k.store(k.int32(kTaken), elementAt(groupKeys, toOffset(best)));
  });
  // Keys of +0 and of -inf.
  int32_t fill = groups.getFill() == GroupFill::Zero ? 0 : static_cast<int32_t>(0x807fffff);
  k.loop(k.index(count), 1, [&](Value g) {
    Value kept = cmpi(arith::CmpIPredicate::eq, k.load(b.getI32Type(), elementAt(groupKeys, g)),
                      k.int32(kTaken));
    Value base = elementAt(keys, k.mul(g, size));
    k.loop(vectorsOf(size), 1, [&](Value v) {
      Value at = vectorAt(base, v), old = k.load(i32v(), at);
      Value key = select(kept, old, splatI(fill));
      if (size % kLanes)
        key = select(realLanes(v, size), key, old);
      k.store(key, at);
    });
  });
}

/// scores[e] of all experts.
void SelectEmitter::emitAllScores(Value logits) {
  if (router.getScore() == ScoreFunction::Sigmoid)
    return map(logits, scores, experts, [&](Value z, Value) { return step(sigmoid(z)); });
  emitKeys(logits, keys, experts);
  Value top = splat(loadFloat(elementAt(logits, toOffset(emitLargest(keys)))));
  map(logits, scores, experts, [&](Value z, Value) { return emitExp(b, loc, subf(z, top)); });
  Value total = splat(sumOver(scores, experts, [](Value x, Value) { return x; }));
  map(scores, scores, experts, [&](Value x, Value) { return step(divf(x, total)); });
}

/// The ids of the `topK` largest keys; chosen[slot] = values[id].
void SelectEmitter::emitChoice(Value values, Value ids) {
  k.loop(k.index(topK), 1, [&](Value slot) {
    Value expert = emitLargest(keys);
    k.store(expert, elementAt(ids, slot));
    Value offset = toOffset(expert);
    k.store(loadFloat(elementAt(values, offset)), elementAt(chosen, slot));
    k.store(k.int32(kTaken), elementAt(keys, offset));
  });
}

/// The two best logits; the weight of each is its softmax over the logits that are close to it, for
/// the second without the first. The logits are those of this token's scratch: the first is marked.
void SelectEmitter::emitSparseMixer(Value logits, Value ids) {
  emitKeys(logits, keys, experts);
  Value threshold = step(splatF(2.0 * double(router.getJitter())));
  Value before;
  for (int64_t slot : {0, 1}) {
    Value expert = emitLargest(keys);
    Value offset = toOffset(expert), top = splat(loadFloat(elementAt(logits, offset)));
    Value total = sumOver(logits, experts, [&](Value z, Value v) {
      Value magnitude = vector::BitCastOp::create(
          b, loc, f32v(),
          arith::AndIOp::create(b, loc, vector::BitCastOp::create(b, loc, i32v(), z).getResult(),
                                splatI(0x7fffffff)));
      Value distance = step(divf(step(subf(top, z)), maxf(magnitude, top)));
      Value far = arith::CmpFOp::create(b, loc, arith::CmpFPredicate::OGT, distance, threshold);
      if (before)
        far = arith::OrIOp::create(b, loc, far,
                                   cmpi(arith::CmpIPredicate::eq, numbers(v), splat(before)));
      return select(far, splatF(0.0), emitExp(b, loc, subf(z, top)));
    });
    k.store(expert, k.at(ids, slot * 4));
    k.store(step(divf(k.float32(1.0f), total)), k.at(chosen, slot * 4));
    k.store(k.int32(kTaken), elementAt(keys, offset));
    before = expert;
  }
}

//===----------------------------------------------------------------------===//
// Weights
//===----------------------------------------------------------------------===//

/// chosen[slot], the scores of the chosen, normalised and scaled into weights[slot].
void SelectEmitter::emitWeights(Value weights, Value ids) {
  Value norm;
  auto sum = [&](function_ref<Value(Value, Value)> f) { return step(sumOver(chosen, topK, f)); };
  float epsilon = static_cast<float>(double(router.getEpsilon()));
  switch (router.getRenormalize()) {
  case Renormalize::None:
  case Renormalize::JointShared:
    break;
  case Renormalize::Sum:
    norm = step(addf(sum([](Value x, Value) { return x; }), k.float32(epsilon)));
    break;
  case Renormalize::ClampSum:
    norm = step(maxf(sum([](Value x, Value) { return x; }), k.float32(epsilon)));
    break;
  case Renormalize::LpNorm:
    if (double(router.getNormP()) == 1.0)
      norm = sum([](Value x, Value) { return x; });
    else
      norm = step(LLVM::SqrtOp::create(b, loc, b.getF32Type(),
                                       sum([&](Value x, Value) { return step(mulf(x, x)); })));
    break;
  }
  double scale = router.getScale();
  if (norm || scale != 1.0) {
    Value divisor = norm ? splat(norm) : Value();
    map(chosen, chosen, topK, [&](Value w, Value) {
      if (divisor)
        w = step(divf(w, divisor));
      return scale == 1.0 ? w : step(mulf(w, splatF(scale)));
    });
  }
  k.loop(k.index(topK), 1, [&](Value slot) {
    Value w = loadFloat(elementAt(chosen, slot));
    if (spec.expertScale) {
      Value id = toOffset(k.load(b.getI32Type(), elementAt(ids, slot)));
      w = step(mulf(w, loadFloat(elementAt(expertScale, id))));
    }
    if (router.roundsWeights())
      w = toBF16(w);
    k.store(w, elementAt(weights, slot));
  });
}

void SelectEmitter::emitToken(Value logits, Value weights, Value ids) {
  if (router.getLogitTransform())
    map(logits, logits, experts, [&](Value z, Value) { return transform(z); });
  if (router.getSelect() == Selection::SparseMixer) {
    emitSparseMixer(logits, ids);
    return emitWeights(weights, ids);
  }
  Value from = logits;
  if (needsAllScores()) {
    emitAllScores(logits);
    from = scores;
  }
  // What the choice is made by: where it lies already, or with the bias in `choice`.
  Value by = from;
  if (selectionBias) {
    map(router.getSelectionBias() == SelectionBias::Logit ? logits : scores, choice, experts,
        [&](Value x, Value v) { return addf(x, k.load(f32v(), vectorAt(selectionBias, v))); });
    by = choice;
  } else if (router.getGroups()) {
    map(from, choice, experts, [](Value x, Value) { return x; });
    by = choice;
  }
  emitKeys(by, keys, experts);
  if (GroupsAttr groups = router.getGroups())
    emitGroups(groups);
  emitChoice(from, ids);
  if (from == logits) {
    // Only logits were chosen by; the scores of the chosen are still to be made.
    if (router.getScore() == ScoreFunction::Sigmoid) {
      map(chosen, chosen, topK, [&](Value z, Value) { return step(sigmoid(z)); });
    } else {
      // The largest logit, or NaN if there is one: the first chosen, unless a bias chose.
      Value place = chosen;
      if (selectionBias) {
        emitKeys(logits, keys, experts);
        place = elementAt(logits, toOffset(emitLargest(keys)));
      }
      Value top = splat(loadFloat(place));
      auto power = [&](Value x, Value) { return emitExp(b, loc, subf(x, top)); };
      bool overAll = router.getOrder() == RouterOrder::ScoreThenSelect;
      Value total = splat(overAll ? sumOver(logits, experts, power) : sumOver(chosen, topK, power));
      map(chosen, chosen, topK, [&](Value x, Value v) { return step(divf(power(x, v), total)); });
    }
  }
  emitWeights(weights, ids);
}

func::FuncOp SelectEmitter::emit() {
  Type ptr = k.ptr(), i64 = k.i64();
  SmallVector<Type> args = {ptr, i64, i64, ptr, ptr};
  auto addArgument = [&](bool wanted) {
    if (wanted)
      args.push_back(ptr);
    return wanted ? static_cast<int64_t>(args.size()) - 1 : -1;
  };
  int64_t biasArgument = addArgument(spec.hasSelectionBias());
  int64_t scaleArgument = addArgument(spec.expertScale);
  int64_t copyArgument = addArgument(spec.copyLogits);
  if (spec.copyLogits)
    args.push_back(i64);
  func::FuncOp function = k.start(spec.getName(), spec.level, args);
  Value logits = function.getArgument(0), rowBytes = function.getArgument(1);
  Value tokens = function.getArgument(2);
  Value weights = function.getArgument(3), ids = function.getArgument(4);
  if (biasArgument >= 0)
    selectionBias = function.getArgument(biasArgument);
  if (scaleArgument >= 0)
    expertScale = function.getArgument(scaleArgument);
  // One vector more than there are elements: a group is read in whole vectors from where it begins.
  auto scratch = [&](int64_t count) -> Value {
    int64_t padded = (llvm::divideCeil(count, kLanes) + 1) * kLanes;
    return LLVM::AllocaOp::create(b, loc, ptr, b.getI32Type(), k.index(padded), 64);
  };
  keys = scratch(experts);
  chosen = scratch(topK);
  if (needsAllScores())
    scores = scratch(experts);
  if (GroupsAttr groups = router.getGroups()) {
    groupScores = scratch(groups.getCount());
    groupKeys = scratch(groups.getCount());
    // Lanes beyond the groups are dropped; they must not start as signalling garbage.
    map(groupScores, groupScores, groups.getCount(), [&](Value, Value) { return splatF(0.0); });
  }
  if (spec.hasSelectionBias() || router.getGroups())
    choice = scratch(experts);
  // The same of lanes beyond topK, which are computed and dropped.
  map(chosen, chosen, topK, [&](Value, Value) { return splatF(0.0); });
  k.loop(tokens, 1, [&](Value token) {
    Value row = k.at(logits, k.mul(token, rowBytes));
    if (router.roundsLogits())
      map(row, row, experts, [&](Value z, Value) { return toBF16(z); });
    if (copyArgument >= 0) {
      Value to = k.at(function.getArgument(copyArgument),
                      k.mul(token, function.getArgument(copyArgument + 1)));
      k.loop(k.index(experts), 1,
             [&](Value e) { k.store(loadFloat(elementAt(row, e)), elementAt(to, e)); });
    }
    Value first = k.mul(token, topK * 4);
    emitToken(row, k.at(weights, first), k.at(ids, first));
  });
  k.finish();
  return function;
}

func::FuncOp moe::emitSelectKernel(OpBuilder &b, Location loc, const SelectKernelSpec &spec) {
  return SelectEmitter(b, loc, spec).emit();
}
