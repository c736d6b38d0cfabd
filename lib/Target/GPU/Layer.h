//===- Layer.h - what the GPU reads out of an entry -------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_LAYER_H
#define MOE_LIB_TARGET_GPU_LAYER_H

#include "Kernels/Kernels.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"

namespace mlir::moe {

/// Tiles of a grouped matmul: an array of #moe.gpu_tile.
inline constexpr llvm::StringLiteral kGPUTilesAttrName = "gpu_tiles";

/// A bufferized, fused entry, understood as a whole. Everything in it has GPU code, or `read`
/// fails and says what does not.
struct Layer {
  LogicalResult read(func::FuncOp func);

  func::FuncOp func;
  Operation *router = nullptr; ///< moe.router, moe.route_dispatch or null
  RouterAttr routerAttr;
  RouterVectors vectors;    ///< of the router; null where there is none
  bool logits = false;      ///< the route entry's third result
  GroupedMatmulOp up, down; ///< null in a route entry
  bool dense = false;       ///< one group of all rows
  Type xType, yType;

  Value routerWeightValue() const;
  WeightType routerWeight() const { return cast<WeightType>(routerWeightValue().getType()); }
  int64_t experts() const;
  /// Columns in memory: of x after rounding, of the hidden rows, of the expert's result.
  int64_t rowWidth() const;
  int64_t hiddenWidth() const { return llvm::alignTo(GroupedMatmulOp(up).getNumCols(), 32); }
  int64_t productWidth() const { return llvm::alignTo(GroupedMatmulOp(down).getNumCols(), 32); }
  StageKernel stage() const;
  /// The position of a weight argument in the table of weights.
  int64_t weightIndex(Value weight) const;

private:
  LogicalResult readMatmul(GroupedMatmulOp op);
  LogicalResult checkRouter();
};

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_LAYER_H
