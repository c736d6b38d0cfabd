//===- StageKernel.cpp - x into rows, and logits, on a GPU ----------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GPUBuilder.h"

#include <cmath>

using namespace mlir;
using namespace mlir::moe;

/// x, rounded, in rows of the workspace and, for the logits, as f32 in shared memory.
static void stageRows(GPUBuilder &g, const StageKernel &spec, Value x, Value stride, Value tokens,
                      Value rows, Value sums, Value firstToken, Value firstColumn, Value shared) {
  int64_t elementBytes = spec.x.isF32() ? 4 : 2;
  g.loop(g.thread(), g.c(kLogitsTokens * kLogitsSlice), g.c(spec.threads()), [&](Value i) {
    Value token = g.add(firstToken, g.div(i, kLogitsSlice));
    Value column = g.add(firstColumn, g.rem(i, kLogitsSlice));
    Value real = g.andi(g.less(token, tokens), g.less(column, spec.H));
    Value bits = g.choose(
        real, g.i16(),
        [&]() -> SmallVector<Value> {
          Value index = g.add(g.mul(g.wide(token), stride), g.wide(column));
          return {g.roundBits(g.loadElement(g.element(x, index, elementBytes), spec.x))};
        },
        [&]() -> SmallVector<Value> {
          return {arith::ConstantOp::create(g.b, g.loc, g.b.getI16IntegerAttr(0))};
        })[0];
    if (shared)
      g.store(g.widenBits(bits), g.at(shared, g.mul(i, 4)), 4);
    if (!rows && !sums)
      return;
    g.ifThen(g.andi(g.less(token, tokens), g.less(column, spec.width)), [&] {
      Value index = g.add(g.mul(g.wide(token), spec.width), g.wide(column));
      if (rows)
        g.store(bits, g.element(rows, index, 2), 2);
      if (sums)
        g.store(g.f(0), g.element(sums, index, 4), 4);
    });
  });
}

/// The normalised x in place of x.
static void normalizeSlice(GPUBuilder &g, const StageKernel &spec, Value tokens, Value factors,
                           Value scale, Value firstToken, Value slice, Value shared) {
  auto step = [&](Value v) { return spec.rounds ? g.round(v) : v; };
  Value last = g.f(float(1.0 / std::sqrt(double(spec.H))));
  g.loop(g.thread(), g.c(kLogitsTokens * kLogitsSlice), g.c(spec.threads()), [&](Value i) {
    Value token = g.add(firstToken, g.div(i, kLogitsSlice));
    Value column = g.add(g.mul(slice, kLogitsSlice), g.rem(i, kLogitsSlice));
    g.ifThen(g.andi(g.less(token, tokens), g.less(column, spec.H)), [&] {
      Value place = g.at(shared, g.mul(i, 4));
      Value v = step(g.mulf(g.loadF32(place), g.loadF32(g.element(factors, token, 4))));
      v = step(g.mulf(v, g.loadF32(g.element(scale, column, 4))));
      g.store(step(g.mulf(v, last)), place, 4);
    });
  });
  g.barrier();
}

/// Partial sums of one slice for the panels of this warp.
static void sumSlice(GPUBuilder &g, const StageKernel &spec, Value tokens, Value weight,
                     Value partial, Value firstToken, Value slice, Value shared) {
  bool f32 = spec.router.getFormat().getStorageType().isF32();
  int64_t panels = spec.router.panelCount(), panelBytes = spec.router.panelBytes();
  Value warp = g.div(g.thread(), 32), lane = g.rem(g.thread(), 32);
  Value begin = g.mul(slice, kLogitsSlice);
  // The reduction is padded to 32, so a slice is whole steps of 16.
  Value length = g.min(g.c(kLogitsSlice), g.sub(g.c(spec.router.paddedCols()), begin));
  g.loop(warp, g.c(panels), g.c(spec.threads() / 32), [&](Value panel) {
    Value base = g.at(weight, g.mul(g.wide(panel), panelBytes));
    base = g.at(base, g.wide(g.mul(lane, 4)));
    SmallVector<Value> init(kLogitsTokens, g.f(0));
    auto sums =
        g.loop(g.c(0), length, g.c(16), init, [&](Value k, ValueRange state) -> SmallVector<Value> {
          SmallVector<Value> sum(state);
          // All loads first: they are what the warp waits for.
          Value row = g.add(begin, k);
          SmallVector<Value> w;
          for (int64_t i = 0; i < 16; ++i) {
            if (f32) {
              w.push_back(g.loadF32(g.element(base, g.add(row, i), 128)));
            } else if (i % 2 == 0) {
              Value word = g.loadI32(g.element(base, g.add(g.shr(row, 1), i / 2), 128));
              w.push_back(g.lowHalf(word));
              w.push_back(g.highHalf(word));
            }
          }
          for (int64_t quad = 0; quad < 4; ++quad)
            for (int64_t t = 0; t < kLogitsTokens; ++t) {
              Value place = g.add(g.mul(k, 4), (t * kLogitsSlice + quad * 4) * 4);
              Value four = g.load(VectorType::get({4}, g.f32()), g.at(shared, place), 16);
              for (int64_t i = 0; i < 4; ++i)
                sum[t] = g.fma(g.lane(four, i), w[quad * 4 + i], sum[t]);
            }
          return sum;
        });
    Value column = g.add(g.mul(panel, 32), lane);
    for (int64_t t = 0; t < kLogitsTokens; ++t) {
      Value token = g.add(firstToken, t);
      g.ifThen(g.less(token, tokens), [&] {
        Value row = g.add(g.mul(g.wide(slice), g.wide(tokens)), g.wide(token));
        Value index = g.add(g.mul(row, panels * 32), g.wide(column));
        g.store(sums[t], g.element(partial, index, 4), 4);
      });
    }
  });
}

void mlir::moe::emitStage(OpBuilder &b, LLVM::LLVMFuncOp kernel, const StageKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  Arguments args(kernel.getArguments());
  Value x = args.next(), stride = args.next(), tokens = args.next();
  Value rows = args.nextIf(spec.rows), sums = args.nextIf(spec.sums);
  Value offsets = args.nextIf(spec.group), count = args.nextIf(spec.group);
  Value firstToken = g.mul(g.blockX(), kLogitsTokens), slice = g.blockY();
  Value shared = spec.router ? g.sharedBase() : Value();
  stageRows(g, spec, x, stride, tokens, rows, sums, firstToken, g.mul(slice, kLogitsSlice), shared);
  if (spec.group)
    g.ifThen(g.equal(g.ori(g.ori(g.blockX(), slice), g.thread()), 0), [&] {
      g.store(g.c(0), offsets, 4);
      g.store(count, g.at(offsets, 4), 4);
    });
  if (!spec.router)
    return;
  Value weight = args.next(), partial = args.next();
  g.barrier();
  if (spec.normalize) {
    Value factors = args.next(), scale = args.next();
    normalizeSlice(g, spec, tokens, factors, scale, firstToken, slice, shared);
  }
  sumSlice(g, spec, tokens, weight, partial, firstToken, slice, shared);
}

void mlir::moe::emitNorm(OpBuilder &b, LLVM::LLVMFuncOp kernel, const NormKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  Arguments args(kernel.getArguments());
  Value x = args.next(), stride = args.next(), tokens = args.next(), factors = args.next();
  int64_t elementBytes = spec.x.isF32() ? 4 : 2;
  Value lane = g.rem(g.thread(), 32);
  Value token = g.add(g.mul(g.blockX(), kNormWarps), g.div(g.thread(), 32));
  g.ifThen(g.less(token, tokens), [&] {
    Value row = g.element(x, g.mul(g.wide(token), stride), elementBytes);
    Value sum = g.loop(lane, g.c(spec.H), g.c(32), {g.f(0)},
                       [&](Value i, ValueRange state) -> SmallVector<Value> {
                         Value v = g.round(g.loadElement(g.element(row, i, elementBytes), spec.x));
                         return {g.fma(v, v, state[0])};
                       })[0];
    sum = g.sumLanes(sum);
    Value mean = g.addf(g.divf(sum, g.f(spec.H)), g.f(float(spec.epsilon)));
    g.ifThen(g.equal(lane, 0),
             [&] { g.store(g.divf(g.f(1), g.sqrt(mean)), g.element(factors, token, 4), 4); });
  });
}
