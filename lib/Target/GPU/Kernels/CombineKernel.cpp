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

// A thread sums 8 columns. y may lie anywhere: where a row of y is not aligned to 16 bytes, or not
// whole chunks wide, elements are read and written one by one.
void mlir::moe::emitCombine(OpBuilder &b, LLVM::LLVMFuncOp kernel, const CombineKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  ValueRange args = kernel.getArguments();
  Value rows = args[0], y = args[1], stride = args[2], accumulate = args[3];
  int64_t yBytes = spec.y.isF32() ? 4 : 2, chunks = llvm::divideCeil(spec.H, 8);
  Value token = g.blockX();
  Value yRow = g.element(y, g.mul(g.wide(token), stride), yBytes);
  Value first = g.c(0), count = g.c(1);
  if (spec.routed) {
    Value ids = args[4], slots = args[5];
    first = g.mul(token, slots);
    auto real =
        g.loop(g.c(0), slots, g.c(1), {g.c(0)}, [&](Value s, ValueRange n) -> SmallVector<Value> {
          Value id = g.loadI32(g.element(ids, g.add(first, s), 4));
          Value has = g.icmp(arith::CmpIPredicate::ult, id, g.c(spec.E));
          Value one = arith::ExtUIOp::create(g.b, g.loc, g.i32(), has);
          return {g.add(n[0], one)};
        });
    count = real[0];
  }
  Value address = LLVM::PtrToIntOp::create(g.b, g.loc, g.i64(), yRow);
  Value aligned = g.equal(g.andi(address, 15), 0);
  Value adds = g.icmp(arith::CmpIPredicate::ne, accumulate, g.c(0));

  g.loop(g.thread(), g.c(chunks), g.c(kCombineThreads), [&](Value chunk) {
    Value column = g.mul(chunk, 8);
    // The old content is read where it is added to, and nowhere else.
    SmallVector<Value> init(8, g.f(0));
    auto old = scf::IfOp::create(g.b, g.loc, SmallVector<Type>(8, g.f32()), adds, true);
    {
      OpBuilder::InsertionGuard guard(g.b);
      g.b.setInsertionPointToStart(old.thenBlock());
      SmallVector<Value> values;
      for (int64_t i = 0; i < 8; ++i) {
        Value place = g.add(column, i);
        if (spec.H % 8 != 0)
          place = g.min(place, g.c(spec.H - 1));
        values.push_back(g.loadElement(g.element(yRow, place, yBytes), spec.y));
      }
      scf::YieldOp::create(g.b, g.loc, values);
      g.b.setInsertionPointToStart(old.elseBlock());
      scf::YieldOp::create(g.b, g.loc, init);
    }
    auto addRow = [&](Value row, Value weight, ValueRange sums) {
      Value index = g.add(g.mul(g.wide(row), spec.rowWidth), g.wide(column));
      Value words = g.load(g.vec4(), g.element(rows, index, 2), 16);
      SmallVector<Value> next(sums);
      for (int64_t i = 0; i < 8; ++i) {
        Value word = g.lane(words, i / 2);
        Value v = i % 2 ? g.highHalf(word) : g.lowHalf(word);
        next[i] = weight ? g.fma(weight, v, sums[i]) : g.addf(sums[i], v);
      }
      return next;
    };
    SmallVector<Value> sums(old.getResults());
    if (spec.routed) {
      sums =
          g.loop(g.c(0), count, g.c(1), sums, [&](Value i, ValueRange state) -> SmallVector<Value> {
            Value row = g.loadI32(g.element(args[7], g.add(first, i), 4));
            Value position = g.loadI32(g.element(args[6], row, 4));
            Value weight = g.loadF32(g.element(args[8], position, 4));
            return addRow(row, weight, state);
          });
    } else {
      sums = addRow(token, Value(), sums);
    }
    auto oneByOne = [&] {
      for (int64_t i = 0; i < 8; ++i) {
        Value place = g.add(column, i);
        auto write = [&] { g.storeElement(sums[i], g.element(yRow, place, yBytes), spec.y); };
        spec.H % 8 == 0 ? write() : g.ifThen(g.less(place, spec.H), write);
      }
    };
    if (spec.H % 8 != 0)
      return oneByOne();
    g.ifThenElse(
        aligned,
        [&] {
          Value to = g.element(yRow, column, yBytes);
          SmallVector<Value> words;
          for (auto [i, v] : llvm::enumerate(sums)) {
            if (spec.y.isF32()) {
              words.push_back(g.bits(v));
              continue;
            }
            Value half = arith::ExtUIOp::create(g.b, g.loc, g.i32(), g.roundBits(v));
            if (i % 2 == 0)
              words.push_back(half);
            else
              words.back() = g.ori(words.back(), g.shl(half, 16));
          }
          for (size_t i = 0; i < words.size(); i += 4)
            g.store(g.pack(ArrayRef<Value>(words).slice(i, 4)), g.at(to, int64_t(i * 4)), 16);
        },
        oneByOne);
  });
}
