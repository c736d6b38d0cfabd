//===- SelectKernel.cpp - Scores and top-k of a row of logits -------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Selection compares integer keys that are ordered like the logits, so that every comparison is
// total: NaN is one key above +inf, -0 and +0 are equal, padding and taken experts are one key
// below -inf. Sums run over vectors of 16 lanes in ascending order and then over a fixed tree, on
// every level, whatever the number of tokens.
//
//===----------------------------------------------------------------------===//

#include "KernelBuilder.h"

#include "llvm/ADT/bit.h"
#include "llvm/Support/FormatVariadic.h"

#include <limits>

using namespace mlir;
using namespace mlir::moe;

static constexpr int64_t kLanes = 16;
static constexpr int32_t kTaken = std::numeric_limits<int32_t>::min();

std::string SelectKernelSpec::getName() const {
  std::string name =
      llvm::formatv("moe_select_{0}_e{1}_k{2}_{3}", level == KernelLevel::V3 ? "v3" : "v4", experts,
                    topK, scoreFirst ? "all" : "chosen");
  if (renormalize)
    name += llvm::formatv("_sum_{0:x-8}", llvm::bit_cast<uint32_t>(epsilon)).str();
  if (scale != 1.0f)
    name += llvm::formatv("_scale_{0:x-8}", llvm::bit_cast<uint32_t>(scale)).str();
  if (copyLogits)
    name += "_copy";
  return name;
}

namespace {

class SelectEmitter {
public:
  SelectEmitter(OpBuilder &b, Location loc, const SelectKernelSpec &spec)
      : k(b, loc), b(b), loc(loc), spec(spec) {}

  func::FuncOp emit();

private:
  VectorType f32v() { return k.vec(kLanes, b.getF32Type()); }
  VectorType i32v() { return k.vec(kLanes, b.getI32Type()); }
  Value splat(Value v) {
    return vector::BroadcastOp::create(b, loc, k.vec(kLanes, v.getType()), v);
  }
  /// Numbers 0 to 15.
  Value iota() {
    SmallVector<int32_t> numbers;
    for (int32_t l = 0; l < kLanes; ++l)
      numbers.push_back(l);
    return arith::ConstantOp::create(b, loc, DenseIntElementsAttr::get(i32v(), ArrayRef(numbers)));
  }
  Value addf(Value x, Value y) { return arith::AddFOp::create(b, loc, x, y); }
  Value select(Value c, Value x, Value y) { return arith::SelectOp::create(b, loc, c, x, y); }
  Value cmpi(arith::CmpIPredicate p, Value x, Value y) {
    return arith::CmpIOp::create(b, loc, p, x, y);
  }
  /// The i1 vector of the lanes of vector `v` (an i64) whose number is below `count`.
  Value realLanes(Value v, int64_t count) {
    Value first = arith::TruncIOp::create(b, loc, b.getI32Type(), k.mul(v, kLanes));
    Value numbers = arith::AddIOp::create(b, loc, iota(), splat(first));
    return cmpi(arith::CmpIPredicate::slt, numbers, splatI32(b, loc, kLanes, count));
  }
  /// Halves added to halves until one lane is left.
  Value sum(Value v) {
    for (int64_t n = kLanes / 2; n >= 1; n /= 2) {
      auto half = [&](int64_t at) -> Value {
        return vector::ExtractStridedSliceOp::create(b, loc, v, ArrayRef<int64_t>{at},
                                                     ArrayRef<int64_t>{n}, ArrayRef<int64_t>{1});
      };
      v = addf(half(0), half(n));
    }
    return vector::ExtractOp::create(b, loc, v, ArrayRef<int64_t>{0});
  }
  /// Sum over `count` f32 at p of f(vector), lanes at or beyond count left out.
  Value sumOver(Value p, int64_t count, function_ref<Value(Value)> f);
  Value loadFloats(Value p, Value v, int64_t count, bool padded);

  void emitKeys(Value logits, Value keys);
  Value emitLargest(Value keys);
  void emitToken(Value logits, Value weights, Value ids, Value keys, Value chosen);

  KernelBuilder k;
  OpBuilder &b;
  Location loc;
  const SelectKernelSpec &spec;
};

} // namespace

Value SelectEmitter::sumOver(Value p, int64_t count, function_ref<Value(Value)> f) {
  Value zero = splatF32(b, loc, kLanes, 0.0f);
  SmallVector<Value> total = k.loop(k.index(llvm::divideCeil(count, kLanes)), 1, ValueRange{zero},
                                    [&](Value v, ValueRange acc) -> SmallVector<Value> {
                                      Value term = f(k.load(f32v(), k.at(p, k.mul(v, kLanes * 4))));
                                      if (count % kLanes)
                                        term = select(realLanes(v, count), term, zero);
                                      return {addf(acc[0], term)};
                                    });
  return sum(total[0]);
}

/// keys[e] for all experts, and the smallest key in the padding.
void SelectEmitter::emitKeys(Value logits, Value keys) {
  k.loop(k.index(llvm::divideCeil(spec.experts, kLanes)), 1, [&](Value v) {
    Value x = k.load(f32v(), k.at(logits, k.mul(v, kLanes * 4)));
    // Adding +0 turns -0 into +0 and changes nothing else.
    Value bits = vector::BitCastOp::create(b, loc, i32v(), addf(x, splatF32(b, loc, kLanes, 0.0f)));
    Value sign = arith::ShRSIOp::create(b, loc, bits, splatI32(b, loc, kLanes, 31));
    Value flip = arith::AndIOp::create(b, loc, sign, splatI32(b, loc, kLanes, 0x7fffffff));
    Value key = arith::XOrIOp::create(b, loc, bits, flip);
    Value nan = arith::CmpFOp::create(b, loc, arith::CmpFPredicate::UNO, x, x);
    key = select(nan, splatI32(b, loc, kLanes, 0x7fffffff), key);
    if (spec.experts % kLanes)
      key = select(realLanes(v, spec.experts), key, splatI32(b, loc, kLanes, kTaken));
    k.store(key, k.at(keys, k.mul(v, kLanes * 4)));
  });
}

/// The lowest expert among those with the largest key, as i32.
Value SelectEmitter::emitLargest(Value keys) {
  Value least = splatI32(b, loc, kLanes, kTaken);
  Value none = splatI32(b, loc, kLanes, std::numeric_limits<int32_t>::max());
  // Per lane: the largest key so far and its first expert. Strictly larger replaces, so that the
  // first stays.
  SmallVector<Value> best =
      k.loop(k.index(llvm::divideCeil(spec.experts, kLanes)), 1, ValueRange{least, none},
             [&](Value v, ValueRange acc) -> SmallVector<Value> {
               Value key = k.load(i32v(), k.at(keys, k.mul(v, kLanes * 4)));
               Value first = arith::TruncIOp::create(b, loc, b.getI32Type(), k.mul(v, kLanes));
               Value number = arith::AddIOp::create(b, loc, iota(), splat(first));
               Value larger = cmpi(arith::CmpIPredicate::sgt, key, acc[0]);
               return {select(larger, key, acc[0]), select(larger, number, acc[1])};
             });
  Value top = vector::ReductionOp::create(b, loc, vector::CombiningKind::MAXSI, best[0]);
  Value candidates = select(cmpi(arith::CmpIPredicate::eq, best[0], splat(top)), best[1], none);
  return vector::ReductionOp::create(b, loc, vector::CombiningKind::MINSI, candidates);
}

void SelectEmitter::emitToken(Value logits, Value weights, Value ids, Value keys, Value chosen) {
  emitKeys(logits, keys);
  k.loop(k.index(spec.topK), 1, [&](Value slot) {
    Value expert = emitLargest(keys);
    Value at4 = k.mul(slot, 4);
    k.store(expert, k.at(ids, at4));
    Value offset = k.mul(arith::ExtUIOp::create(b, loc, k.i64(), expert), 4);
    k.store(k.load(b.getF32Type(), k.at(logits, offset)), k.at(chosen, at4));
    k.store(k.int32(kTaken), k.at(keys, offset));
  });
  // The first chosen logit is the largest, or NaN if there is one.
  Value top = splat(k.load(b.getF32Type(), chosen));
  auto expShifted = [&](Value x) { return emitExp(b, loc, arith::SubFOp::create(b, loc, x, top)); };
  Value total = spec.scoreFirst ? sumOver(logits, spec.experts, expShifted)
                                : sumOver(chosen, spec.topK, expShifted);
  Value divisor = splat(total);
  Value last = k.index(llvm::divideCeil(spec.topK, kLanes));
  k.loop(last, 1, [&](Value v) {
    Value p = k.at(chosen, k.mul(v, kLanes * 4));
    k.store(arith::DivFOp::create(b, loc, expShifted(k.load(f32v(), p)), divisor), p);
  });
  Value norm;
  if (spec.renormalize) {
    Value chosenSum = sumOver(chosen, spec.topK, [](Value x) { return x; });
    norm = splat(addf(chosenSum, k.float32(spec.epsilon)));
  }
  k.loop(last, 1, [&](Value v) {
    Value p = k.at(chosen, k.mul(v, kLanes * 4));
    Value w = k.load(f32v(), p);
    if (norm)
      w = arith::DivFOp::create(b, loc, w, norm);
    if (spec.scale != 1.0f)
      w = arith::MulFOp::create(b, loc, w, splatF32(b, loc, kLanes, spec.scale));
    k.store(w, p);
  });
  k.loop(k.index(spec.topK), 1, [&](Value slot) {
    Value at4 = k.mul(slot, 4);
    k.store(k.load(b.getF32Type(), k.at(chosen, at4)), k.at(weights, at4));
  });
}

func::FuncOp SelectEmitter::emit() {
  Type ptr = k.ptr(), i64 = k.i64();
  SmallVector<Type> args = {ptr, i64, i64, ptr, ptr};
  if (spec.copyLogits)
    args.append({ptr, i64});
  func::FuncOp function = k.start(spec.getName(), spec.level, args);
  Value logits = function.getArgument(0), rowBytes = function.getArgument(1);
  Value tokens = function.getArgument(2);
  Value weights = function.getArgument(3), ids = function.getArgument(4);
  auto scratch = [&](int64_t count) -> Value {
    int64_t padded = llvm::divideCeil(count, kLanes) * kLanes;
    return LLVM::AllocaOp::create(b, loc, ptr, b.getI32Type(), k.index(padded), 64);
  };
  Value keys = scratch(spec.experts), chosen = scratch(spec.topK);
  // Lanes beyond topK are computed and dropped; they must not start as signalling garbage.
  k.loop(k.index(llvm::divideCeil(spec.topK, kLanes)), 1, [&](Value v) {
    k.store(splatF32(b, loc, kLanes, 0.0f), k.at(chosen, k.mul(v, kLanes * 4)));
  });
  k.loop(tokens, 1, [&](Value token) {
    Value row = k.at(logits, k.mul(token, rowBytes));
    if (spec.copyLogits) {
      Value to = k.at(function.getArgument(5), k.mul(token, function.getArgument(6)));
      k.loop(k.index(spec.experts), 1, [&](Value e) {
        Value at4 = k.mul(e, 4);
        k.store(k.load(b.getF32Type(), k.at(row, at4)), k.at(to, at4));
      });
    }
    Value first = k.mul(token, spec.topK * 4);
    emitToken(row, k.at(weights, first), k.at(ids, first), keys, chosen);
  });
  k.finish();
  return function;
}

func::FuncOp moe::emitSelectKernel(OpBuilder &b, Location loc, const SelectKernelSpec &spec) {
  return SelectEmitter(b, loc, spec).emit();
}
