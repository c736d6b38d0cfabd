//===- TensorMap.h - views of packed weights for the TMA unit ---*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_TENSORMAP_H
#define MOE_LIB_TARGET_GPU_TENSORMAP_H

#include "Kernels/Kernels.h"

namespace mlir::moe {

/// Host code that has the launcher of a call make the tensor map of a packed weight, as kernels
/// with wgmma take it. `packed` is where the weight is on the device; the result points at 128
/// bytes on the stack of the function.
Value createWeightMap(OpBuilder &b, Location loc, Value frame, Value packed, WeightType weight,
                      GPUTileAttr tile);

/// Makes an argument of a kernel a tensor map.
void setMapArgument(LLVM::LLVMFuncOp kernel, unsigned argument);

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_TENSORMAP_H
