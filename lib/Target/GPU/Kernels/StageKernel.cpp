//===- StageKernel.cpp - x into rows, and logits, on a GPU ----------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Router.h"

#include <cmath>

using namespace mlir;
using namespace mlir::moe;

/// Where 16 bytes of a row in shared memory are, for tensor cores: chunk c of 32 at c ^ row mod 8.
static Value placeOf(GPUBuilder &g, Value row, Value chunk) {
  return g.add(g.mul(row, kLogitsSlice * 2), g.mul(g.xori(chunk, g.andi(row, 7)), 16));
}

/// x, rounded, in rows of the workspace and, for the logits, in shared memory: bf16 for tensor
/// cores, else f32.
static void stageRows(GPUBuilder &g, const StageKernel &spec, Value x, Value stride, Value tokens,
                      Value rows, Value sums, Value firstToken, Value firstColumn, Value shared) {
  int64_t elementBytes = spec.x.isF32() ? 4 : 2;
  g.loop(g.thread(), g.c(spec.blockTokens * kLogitsSlice), g.c(spec.kThreads), [&](Value i) {
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
    if (shared && spec.onTensorCores()) {
      Value inRow = g.rem(i, kLogitsSlice);
      Value place = placeOf(g, g.div(i, kLogitsSlice), g.div(inRow, 8));
      g.store(bits, g.at(shared, g.add(place, g.mul(g.rem(inRow, 8), 2))), 2);
    } else if (shared) {
      g.store(g.widenBits(bits), g.at(shared, g.mul(i, 4)), 4);
    }
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
  g.loop(g.thread(), g.c(spec.blockTokens * kLogitsSlice), g.c(spec.kThreads), [&](Value i) {
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
  g.loop(warp, g.c(panels), g.c(spec.kWarps), [&](Value panel) {
    Value base = g.at(weight, g.mul(g.wide(panel), panelBytes));
    base = g.at(base, g.wide(g.mul(lane, 4)));
    SmallVector<Value> init(kFewTokens, g.f(0));
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
            for (int64_t t = 0; t < kFewTokens; ++t) {
              Value place = g.add(g.mul(k, 4), (t * kLogitsSlice + quad * 4) * 4);
              Value four = g.load(VectorType::get({4}, g.f32()), g.at(shared, place), 16);
              for (int64_t i = 0; i < 4; ++i)
                sum[t] = g.fma(g.lane(four, i), w[quad * 4 + i], sum[t]);
            }
          return sum;
        });
    Value column = g.add(g.mul(panel, 32), lane);
    for (int64_t t = 0; t < kFewTokens; ++t) {
      Value token = g.add(firstToken, t);
      g.ifThen(g.less(token, tokens), [&] {
        Value row = g.add(g.mul(g.wide(slice), g.wide(tokens)), g.wide(token));
        Value index = g.add(g.mul(row, panels * 32), g.wide(column));
        g.store(sums[t], g.element(partial, index, 4), 4);
      });
    }
  });
}

/// The same on tensor cores, of one panel: its columns by tokens, as mma.sync leaves them (16
/// columns, then 8 tokens). Words of the panel are the left operand as they are.
static SmallVector<Value> multiplySlice(GPUBuilder &g, const StageKernel &spec, Value weight,
                                        Value panel, Value slice, Value shared) {
  int64_t tiles = spec.blockTokens / 8, cols = spec.router.paddedCols();
  Value lane = g.rem(g.thread(), 32), quad = g.rem(lane, 4), group = g.div(lane, 4);
  Value begin = g.mul(slice, kLogitsSlice);
  Value length = g.min(g.c(kLogitsSlice), g.sub(g.c(cols), begin));
  Value base = g.at(weight, g.mul(g.wide(panel), spec.router.panelBytes()));
  base = g.at(base, g.wide(g.add(g.mul(quad, 128), g.mul(group, 4))));
  // As many loads at once as registers allow: a warp waits for them.
  int64_t ahead = spec.whole ? 32 : cols % 128 == 0 ? 128 : cols % 64 == 0 ? 64 : 32;
  auto steps = [&](Value k, ValueRange old) {
    SmallVector<Value> sums(old), left;
    // Two steps of the reduction are a row of 128 bytes.
    Value place = g.at(base, g.wide(g.mul(g.add(begin, k), 64)));
    for (int64_t step = 0; step < ahead; step += 16)
      for (int64_t m = 0; m < 2; ++m)
        for (int64_t i = 0; i < 4; ++i) {
          int64_t row = step / 2 + i / 2 * 4, column = m * 16 + i % 2 * 8;
          left.push_back(g.loadI32(g.at(place, row * 128 + column * 4)));
        }
    for (int64_t step = 0; step < ahead; step += 16) {
      SmallVector<Value> right;
      for (int64_t n = 0; n < tiles; n += 2) {
        Value row = g.add(g.rem(lane, 8), n * 8);
        if (tiles > 1)
          row = g.add(row, g.mul(g.div(lane, 16), 8));
        Value chunk = g.add(g.add(g.div(k, 8), step / 8), g.rem(g.div(lane, 8), 2));
        Value at = g.at(shared, placeOf(g, row, chunk));
        llvm::append_range(right, g.loadMatrices(at, tiles > 1 ? 4 : 2));
      }
      for (int64_t m = 0; m < 2; ++m)
        for (int64_t n = 0; n < tiles; ++n)
          g.multiply(MutableArrayRef<Value>(sums).slice((m * tiles + n) * 4, 4),
                     ArrayRef<Value>(left).slice(step / 2 + m * 4, 4),
                     ArrayRef<Value>(right).slice(n * 2, 2));
    }
    return sums;
  };
  return g.loop(g.c(0), length, g.c(ahead), SmallVector<Value>(2 * tiles * 4, g.f(0)), steps);
}

static void storePanel(GPUBuilder &g, const StageKernel &spec, ValueRange sums, Value tokens,
                       Value partial, Value firstToken, Value slice, Value panel) {
  int64_t tiles = spec.blockTokens / 8, width = spec.router.panelCount() * 32;
  Value lane = g.rem(g.thread(), 32), quad = g.rem(lane, 4), group = g.div(lane, 4);
  for (int64_t n = 0; n < tiles; ++n)
    for (int64_t right = 0; right < 2; ++right) {
      Value token = g.add(firstToken, g.add(g.mul(quad, 2), n * 8 + right));
      g.ifThen(g.less(token, tokens), [&] {
        Value row = g.add(g.mul(g.wide(slice), g.wide(tokens)), g.wide(token));
        Value index = g.add(g.mul(row, width), g.wide(g.add(g.mul(panel, 32), group)));
        for (int64_t i = 0; i < 4; ++i)
          g.store(sums[(i / 2 * tiles + n) * 4 + i % 2 * 2 + right],
                  g.element(partial, g.add(index, i * 8), 4), 4);
      });
    }
}

/// All slices one after another: the sums of this warp's panels stay in registers and are added as
/// `select` adds them.
static void sumWhole(GPUBuilder &g, const StageKernel &spec, Value weight, Value tokens,
                     Value partial, Value firstToken, Value shared,
                     function_ref<void(Value)> stage) {
  int64_t panels = spec.router.panelCount(), own = llvm::divideCeil(panels, spec.kWarps);
  int64_t each = spec.blockTokens; // sums of a panel in a thread
  Value warp = g.div(g.thread(), 32);
  auto forEachPanel = [&](function_ref<void(Value, Value, int64_t)> body) {
    for (int64_t i = 0; i < own; ++i) {
      Value panel = g.add(warp, i * spec.kWarps);
      body(panel, g.less(panel, panels), i * each);
    }
  };
  auto addSlice = [&](Value slice, ValueRange old) {
    stage(slice);
    SmallVector<Value> next;
    forEachPanel([&](Value panel, Value real, int64_t first) {
      ValueRange before = old.slice(first, each);
      auto add = [&] {
        auto sums = multiplySlice(g, spec, weight, panel, slice, shared);
        for (auto [sum, other] : llvm::zip_equal(sums, before))
          sum = g.select(g.equal(slice, 0), sum, g.addf(other, sum));
        return sums;
      };
      auto keep = [&] { return SmallVector<Value>(before); };
      llvm::append_range(next, g.choose(real, SmallVector<Type>(each, g.f32()), add, keep));
    });
    g.barrier(); // nobody reads this slice any more
    return next;
  };
  SmallVector<Value> all(own * each, g.f(0));
  all = g.loop(g.c(0), g.c(spec.slices()), g.c(1), all, addSlice);
  forEachPanel([&](Value panel, Value real, int64_t first) {
    g.ifThen(real, [&] {
      storePanel(g, spec, ArrayRef<Value>(all).slice(first, each), tokens, partial, firstToken,
                 g.c(0), panel);
    });
  });
}

Staged mlir::moe::emitStageBlock(GPUBuilder &g, const StageKernel &spec, Arguments &args) {
  Value x = args.next(), stride = args.next(), tokens = args.next();
  Value rows = args.nextIf(spec.rows), sums = args.nextIf(spec.sums);
  Value offsets = args.nextIf(spec.group), count = args.nextIf(spec.group);
  Value weight = args.nextIf(bool(spec.router)), partial = args.nextIf(bool(spec.router));
  Value factors = args.nextIf(spec.normalize), scale = args.nextIf(spec.normalize);
  Value firstToken = g.mul(g.blockX(), spec.blockTokens), slice = g.blockY();
  Value shared = spec.router ? g.sharedBase() : Value();
  auto stage = [&](Value slice) {
    stageRows(g, spec, x, stride, tokens, rows, sums, firstToken, g.mul(slice, kLogitsSlice),
              shared);
    if (spec.router)
      g.barrier();
  };
  if (spec.group)
    g.ifThen(g.equal(g.ori(g.ori(g.blockX(), slice), g.thread()), 0), [&] {
      g.store(g.c(0), offsets, 4);
      g.store(count, g.at(offsets, 4), 4);
    });
  if (spec.whole) {
    sumWhole(g, spec, weight, tokens, partial, firstToken, shared, stage);
    return {tokens, partial};
  }
  stage(slice);
  if (spec.normalize)
    normalizeSlice(g, spec, tokens, factors, scale, firstToken, slice, shared);
  if (spec.onTensorCores())
    g.loop(g.div(g.thread(), 32), g.c(spec.router.panelCount()), g.c(spec.kWarps),
           [&](Value panel) {
             auto sum = multiplySlice(g, spec, weight, panel, slice, shared);
             storePanel(g, spec, sum, tokens, partial, firstToken, slice, panel);
           });
  else if (spec.router)
    sumSlice(g, spec, tokens, weight, partial, firstToken, slice, shared);
  return {tokens, partial};
}

void mlir::moe::emitStage(OpBuilder &b, LLVM::LLVMFuncOp kernel, const StageKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  Arguments args(kernel.getArguments());
  emitStageBlock(g, spec, args);
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
