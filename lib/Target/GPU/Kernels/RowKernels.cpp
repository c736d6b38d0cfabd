//===- RowKernels.cpp - one number or one factor for a row, on a GPU ------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GPUBuilder.h"

using namespace mlir;
using namespace mlir::moe;

void mlir::moe::emitWeigh(OpBuilder &b, LLVM::LLVMFuncOp kernel, const WeighKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  Arguments args(kernel.getArguments());
  Value rows = args.next(), weights = args.next(), pair = args.next(), slots = args.next();
  Value offsets = args.next(), result = args.next(), row = g.blockX();
  // Ids that are missing have no row: there may be fewer rows than blocks.
  g.ifThen(g.less(row, g.loadI32(g.at(offsets, spec.E * 4))), [&] {
    Value position = g.loadI32(g.element(pair, row, 4));
    Value weight = g.loadF32(g.element(weights, position, 4));
    Value from = g.element(rows, g.mul(g.wide(g.div(position, slots)), spec.width), 2);
    Value to = g.element(result, g.mul(g.wide(row), spec.width), 2);
    g.loop(g.thread(), g.c(spec.width / 8), g.c(kWeighThreads), [&](Value chunk) {
      Value distance = g.mul(g.wide(chunk), 16);
      Value words = g.load(g.vec4(), g.at(from, distance), 16);
      SmallVector<Value> out;
      for (int64_t i = 0; i < 4; ++i) {
        Value word = g.lane(words, i);
        out.push_back(g.pair(g.mulf(g.lowHalf(word), weight), g.mulf(g.highHalf(word), weight)));
      }
      g.store(g.pack(out), g.at(to, distance), 16);
    });
  });
}

LogicalResult mlir::moe::emitGate(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GateKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  Arguments args(kernel.getArguments());
  Value rows = args.next(), tokens = args.next(), weight = args.next(), result = args.next();
  bool f32 = spec.weight.getFormat().getStorageType().isF32();
  Value lane = g.rem(g.thread(), 32), warp = g.div(g.thread(), 32);
  Value first = g.mul(g.add(g.mul(g.blockX(), kGateWarps), warp), kGateTokens);
  // Tokens beyond the last read the last.
  SmallVector<Value> from;
  for (int64_t t = 0; t < kGateTokens; ++t) {
    Value token = g.min(g.add(first, t), g.add(tokens, -1));
    from.push_back(g.element(rows, g.mul(g.wide(token), spec.width), 2));
  }
  SmallVector<Value> init(kGateTokens, g.f(0));
  SmallVector<Value> sums = g.loop(lane, g.c(spec.width / 2), g.c(32), init,
                                   [&](Value i, ValueRange state) -> SmallVector<Value> {
                                     // Lane 0 of the panel in rows 2i and 2i + 1 of the reduction.
                                     Value low, high;
                                     if (f32) {
                                       low = g.loadF32(g.element(weight, i, 256));
                                       high = g.loadF32(g.at(g.element(weight, i, 256), 128));
                                     } else {
                                       Value word = g.loadI32(g.element(weight, i, 128));
                                       low = g.lowHalf(word);
                                       high = g.highHalf(word);
                                     }
                                     SmallVector<Value> next(state);
                                     for (int64_t t = 0; t < kGateTokens; ++t) {
                                       Value word = g.loadI32(g.element(from[t], i, 4));
                                       next[t] = g.fma(g.lowHalf(word), low, next[t]);
                                       next[t] = g.fma(g.highHalf(word), high, next[t]);
                                     }
                                     return next;
                                   });
  for (int64_t t = 0; t < kGateTokens; ++t) {
    Value value = g.sumLanes(sums[t]);
    if (spec.epilogue) {
      auto results = emitRegionOnVectors(g.b, *spec.epilogue, g.toVector(value));
      if (failed(results))
        return failure();
      value = g.fromVector((*results)[0]);
    }
    Value token = g.add(first, t);
    g.ifThen(g.andi(g.equal(lane, 0), g.less(token, tokens)),
             [&] { g.store(value, g.element(result, token, 4), 4); });
  }
  return success();
}
