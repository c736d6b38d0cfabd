//===- CombineKernel.cpp - weighted sums of rows on a GPU -----------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GPUBuilder.h"
#include "Kernels.h"

using namespace mlir;
using namespace mlir::moe;

namespace {

/// What a thread adds for its 8 columns, in order.
class CombineEmitter {
public:
  CombineEmitter(OpBuilder &b, LLVM::LLVMFuncOp kernel, const CombineKernel &spec)
      : g(b, kernel.getLoc()), spec(spec), arguments(kernel.getArguments()),
        yBytes(spec.y.isF32() ? 4 : 2) {}
  void emit();

private:
  using Values = SmallVector<Value>;
  Values readOld(Value column);
  Values addRow(Value rows, Value row, Value column, Value weight, ValueRange sums);
  Values addRouted(Value column, ValueRange sums);
  Values addShared(Value column, ValueRange sums);
  void write(Value column, ArrayRef<Value> sums);

  GPUBuilder g;
  const CombineKernel &spec;
  Arguments arguments;
  int64_t yBytes;
  Value token, yRow, adds, aligned;
  Value rows, ids, slots, pair, order, weights, scale, first, count;
  Value sharedRows, sharedCount, gate, sharedScale;
};

} // namespace

/// The old content of y is read where it is added to, and nowhere else.
CombineEmitter::Values CombineEmitter::readOld(Value column) {
  return g.choose(
      adds, SmallVector<Type>(8, g.f32()),
      [&] {
        Values values;
        for (int64_t i = 0; i < 8; ++i) {
          Value place = g.add(column, i);
          if (spec.H % 8 != 0)
            place = g.min(place, g.c(spec.H - 1));
          values.push_back(g.loadElement(g.element(yRow, place, yBytes), spec.y));
        }
        return values;
      },
      [&] { return Values(8, g.f(0)); });
}

/// fma(weight, row, sums); without a weight the row is added.
CombineEmitter::Values CombineEmitter::addRow(Value rows, Value row, Value column, Value weight,
                                              ValueRange sums) {
  Value index = g.add(g.mul(g.wide(row), spec.rowWidth), g.wide(column));
  Value words = g.load(g.vec4(), g.element(rows, index, 2), 16);
  Values next(sums);
  for (int64_t i = 0; i < 8; ++i) {
    Value word = g.lane(words, i / 2);
    Value v = i % 2 ? g.highHalf(word) : g.lowHalf(word);
    next[i] = g.fma(weight, v, sums[i]);
  }
  return next;
}

CombineEmitter::Values CombineEmitter::addRouted(Value column, ValueRange sums) {
  if (spec.rows == CombineKernel::Rows::Sums) {
    Value index = g.add(g.mul(g.wide(token), spec.rowWidth), g.wide(column));
    Values next(sums);
    for (int64_t i = 0; i < 8; i += 4) {
      Value four = g.load(VectorType::get({4}, g.f32()), g.element(rows, g.add(index, i), 4), 16);
      for (int64_t j = 0; j < 4; ++j)
        next[i + j] = g.addf(sums[i + j], g.lane(four, j));
    }
    return next;
  }
  return g.loop(g.c(0), count, g.c(1), sums, [&](Value i, ValueRange state) -> Values {
    Value row = g.loadI32(g.element(order, g.add(first, i), 4)), weight = scale;
    if (weights) {
      Value position = g.loadI32(g.element(pair, row, 4));
      weight = g.mulf(g.loadF32(g.element(weights, position, 4)), scale);
    }
    return addRow(rows, row, column, weight, state);
  });
}

CombineEmitter::Values CombineEmitter::addShared(Value column, ValueRange sums) {
  return g.choose(
      g.less(token, sharedCount), SmallVector<Type>(8, g.f32()),
      [&] {
        Value weight = sharedScale;
        if (gate)
          weight = g.mulf(g.loadF32(g.element(gate, token, 4)), sharedScale);
        return addRow(sharedRows, token, column, weight, sums);
      },
      [&] { return Values(sums); });
}

/// y may lie anywhere: where a row of y is not aligned to 16 bytes, or not whole chunks wide,
/// elements are written one by one.
void CombineEmitter::write(Value column, ArrayRef<Value> sums) {
  auto oneByOne = [&] {
    for (int64_t i = 0; i < 8; ++i) {
      Value place = g.add(column, i);
      auto store = [&] { g.storeElement(sums[i], g.element(yRow, place, yBytes), spec.y); };
      spec.H % 8 == 0 ? store() : g.ifThen(g.less(place, spec.H), store);
    }
  };
  if (spec.H % 8 != 0)
    return oneByOne();
  g.ifThenElse(
      aligned,
      [&] {
        Value to = g.element(yRow, column, yBytes);
        Values words;
        for (int64_t i = 0; i < 8; i += spec.y.isF32() ? 1 : 2)
          words.push_back(spec.y.isF32() ? g.bits(sums[i]) : g.pair(sums[i], sums[i + 1]));
        for (size_t i = 0; i < words.size(); i += 4)
          g.store(g.pack(ArrayRef<Value>(words).slice(i, 4)), g.at(to, int64_t(i * 4)), 16);
      },
      oneByOne);
}

void CombineEmitter::emit() {
  Value y = arguments.next(), stride = arguments.next(), accumulate = arguments.next();
  bool routed = spec.rows == CombineKernel::Rows::Routed;
  rows = arguments.nextIf(spec.rows != CombineKernel::Rows::None);
  ids = arguments.nextIf(routed);
  slots = arguments.nextIf(routed);
  pair = arguments.nextIf(routed);
  order = arguments.nextIf(routed);
  weights = arguments.nextIf(routed && !spec.unweighted);
  scale = arguments.nextIf(routed);
  sharedRows = arguments.nextIf(spec.shared);
  sharedCount = arguments.nextIf(spec.shared);
  gate = arguments.nextIf(spec.gate);
  sharedScale = arguments.nextIf(spec.shared);
  token = g.blockX();
  yRow = g.element(y, g.mul(g.wide(token), stride), yBytes);
  if (routed) {
    first = g.mul(token, slots);
    count = g.loop(g.c(0), slots, g.c(1), {g.c(0)}, [&](Value s, ValueRange n) -> Values {
      Value id = g.loadI32(g.element(ids, g.add(first, s), 4));
      Value has = g.icmp(arith::CmpIPredicate::ult, id, g.c(spec.E));
      Value one = arith::ExtUIOp::create(g.b, g.loc, g.i32(), has);
      return {g.add(n[0], one)};
    })[0];
  }
  Value address = LLVM::PtrToIntOp::create(g.b, g.loc, g.i64(), yRow);
  aligned = g.equal(g.andi(address, 15), 0);
  adds = g.icmp(arith::CmpIPredicate::ne, accumulate, g.c(0));
  g.loop(g.thread(), g.c(llvm::divideCeil(spec.H, 8)), g.c(kCombineThreads), [&](Value chunk) {
    Value column = g.mul(chunk, 8);
    Values sums = readOld(column);
    if (spec.rows != CombineKernel::Rows::None)
      sums = addRouted(column, sums);
    if (spec.shared)
      sums = addShared(column, sums);
    write(column, sums);
  });
}

void mlir::moe::emitCombine(OpBuilder &b, LLVM::LLVMFuncOp kernel, const CombineKernel &spec) {
  CombineEmitter(b, kernel, spec).emit();
}
