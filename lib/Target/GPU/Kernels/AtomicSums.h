//===- AtomicSums.h - the atomic combine of a matmul ------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_KERNELS_ATOMICSUMS_H
#define MOE_LIB_TARGET_GPU_KERNELS_ATOMICSUMS_H

#include "GPUBuilder.h"

namespace mlir::moe {

/// 8 columns of a row (4 words of bf16), times the row's weight, into the sums of its token. `args`
/// are those of a GemmKernel with `add`.
inline void emitAddToSums(GPUBuilder &g, const GemmKernel &spec, ValueRange args, Value row,
                          Value col, Value words) {
  Value position = g.loadI32(g.element(args[1], row, 4));
  Value scale = args.back(), weight = scale;
  if (!spec.unweighted)
    weight = g.mulf(g.loadF32(g.element(args[args.size() - 2], position, 4)), scale);
  Value token = g.div(position, args[2]);
  Value index = g.add(g.mul(g.wide(token), spec.resultWidth), g.wide(col));
  for (int64_t i = 0; i < 8; ++i) {
    Value word = g.lane(words, i / 2), v = i % 2 ? g.highHalf(word) : g.lowHalf(word);
    LLVM::AtomicRMWOp::create(g.b, g.loc, LLVM::AtomicBinOp::fadd,
                              g.element(args[5], g.add(index, i), 4), g.mulf(weight, v),
                              LLVM::AtomicOrdering::monotonic, "device");
  }
}

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_KERNELS_ATOMICSUMS_H
