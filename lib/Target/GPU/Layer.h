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
#include "llvm/ADT/SmallPtrSet.h"

namespace mlir::moe {

/// Tiles of a grouped matmul: an array of #moe.gpu_tile.
inline constexpr llvm::StringLiteral kGPUTilesAttrName = "gpu_tiles";
/// How a grouped matmul with `combine` adds rows up: "ordered", which is what is meant without it,
/// or "atomic".
inline constexpr llvm::StringLiteral kGPUCombineAttrName = "gpu_combine";

/// Whether a matmul is the gate of a shared expert: one number for each token, a kernel of its own
/// without tiles.
bool isGate(GroupedMatmulOp op);

/// On a gpu.module: the level of its kernels, "sm_80".
inline constexpr llvm::StringLiteral kLevelAttrName = "level";

/// A bufferized, fused entry, understood as a whole. Everything in it has GPU code, or `read`
/// fails and says what does not.
struct Layer {
  LogicalResult read(func::FuncOp func);

  func::FuncOp func;
  Operation *router = nullptr; ///< moe.router, moe.route_dispatch or null
  RouterAttr routerAttr;
  RouterVectors vectors;    ///< of the router; null where there is none
  bool logits = false;      ///< the route entry's third result
  bool routerX = false;     ///< the router reads an input of its own
  GroupedMatmulOp up, down; ///< of the experts; null in a route entry and in a dense layer
  /// Of one group of tokens: a dense layer, or a shared expert with its gate (null: none).
  GroupedMatmulOp groupUp, groupDown, gate;
  Value groupRows; ///< how many tokens are in it
  Type xType, yType;

  StringRef level() const {
    return func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName).getLevel();
  }
  bool isDense() const { return !router && !up; }
  bool isAtomic() const;
  bool isOnInput() const { return up && GroupedMatmulOp(up).getRowWeights(); }
  Value routerWeightValue() const;
  WeightType routerWeight() const { return cast<WeightType>(routerWeightValue().getType()); }
  int64_t experts() const;
  /// Columns of x, and in memory of x after rounding and of the result.
  int64_t hidden() const;
  int64_t rowWidth() const { return llvm::alignTo(hidden(), 32); }
  /// Columns in memory of the rows between two matmuls.
  static int64_t width(GroupedMatmulOp op) { return llvm::alignTo(op.getNumCols(), 32); }
  /// The position of a weight argument in the table of weights.
  int64_t weightIndex(Value weight) const;

private:
  LogicalResult readMatmul(GroupedMatmulOp op);
  LogicalResult readGroup(SingleGroupOp op);
  LogicalResult readArguments();
  LogicalResult checkRouter();
  LogicalResult checkChain();

  /// Offsets of one group of tokens.
  llvm::SmallPtrSet<Value, 2> groups;
};

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_LAYER_H
