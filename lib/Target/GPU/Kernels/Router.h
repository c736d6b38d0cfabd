//===- Router.h - parts of the kernels of a router --------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Kernels `stage`, `logits`, `select` and `sort` are made of these parts; `route` is all of them.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_KERNELS_ROUTER_H
#define MOE_LIB_TARGET_GPU_KERNELS_ROUTER_H

#include "GPUBuilder.h"

namespace mlir::moe {

/// What a block of `stage` and `logits` does; takes their arguments. Returns tokens and partial
/// sums (null without a router).
struct Staged {
  Value tokens, partial;
};
Staged emitStageBlock(GPUBuilder &g, const StageKernel &spec, Arguments &args);

/// What `select` reads and writes.
struct SelectValues {
  /// Takes what follows partial sums, tokens and slices.
  SelectValues(Value partial, Value tokens, Value slices, const SelectKernel &spec,
               Arguments &args);

  Value partial, tokens;
  Value slices; ///< null: spec.slices of them
  Value weights, experts, logits, logitsStride, bias, selectionBias, expertScale;
};

/// A warp chooses the experts of a token.
void emitSelectToken(GPUBuilder &g, const SelectKernel &spec, const SelectValues &values,
                     Value token);

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_KERNELS_ROUTER_H
