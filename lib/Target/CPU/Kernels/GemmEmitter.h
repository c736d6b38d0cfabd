//===- GemmEmitter.h - Emission of one matrix kernel ----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_CPU_KERNELS_GEMMEMITTER_H
#define MOE_LIB_TARGET_CPU_KERNELS_GEMMEMITTER_H

#include "KernelBuilder.h"

namespace mlir {
namespace moe {

/// Emits one GEMM kernel.
class GemmEmitter {
public:
  GemmEmitter(OpBuilder &b, Location loc, const GemmKernelSpec &spec)
      : k(b, loc), spec(spec), lanes(spec.getLanes()), panelVectors(spec.getVectorsPerPanel()),
        vectors(spec.panels * panelVectors) {}

  FailureOr<func::FuncOp> emit();

private:
  SmallVector<Value> emitProduct();
  LogicalResult emitTiles();
  void touchSums();
  /// Keeps sums of f32 at `stack`; what waits there.
  void storeSums(ArrayRef<Value> acc);
  SmallVector<Value> loadSums(Value from);
  SmallVector<Value> emitSteps(Value a, Value bRow, int64_t steps, SmallVector<Value> acc);
  Value loadA(Value a, int64_t row, int64_t step);
  Value loadB(ArrayRef<Value> panelRows, int64_t vector, bool odd);
  Value product(Value a, Value b, Value acc);
  LogicalResult forEachRow(ArrayRef<Value> acc,
                           function_ref<LogicalResult(Value, ArrayRef<Value>)> store);
  SmallVector<Value> addBias(ArrayRef<Value> acc);
  FailureOr<Value> applyEpilogue(ArrayRef<Value> acc, int64_t p, int64_t s);
  /// Whether the kernel writes half of a group and may have to zero the other half.
  bool fillsGroup() const {
    return spec.form == KernelForm::Blocked && spec.bf16Result && spec.panels == 1 &&
           spec.parts == 2;
  }
  /// Leaves the result of row `row`. `whole` says that all columns of the tile are real.
  LogicalResult leaveRow(Value row, ArrayRef<Value> acc, bool whole);
  /// The arguments of the block before take the places of the block's own while `body` runs.
  void inBlockBefore(function_ref<void()> body);
  LogicalResult storeBlocked(Value row, ArrayRef<Value> acc);
  LogicalResult storeRows(Value row, ArrayRef<Value> acc, bool whole);
  Value realLanes(int64_t column, Value limit);
  LogicalResult storeCombine(Value row, ArrayRef<Value> acc);

  /// Keeps the odd k of pairs.
  Value highMask() { return splatI32(k.b, k.loc, lanes, static_cast<int32_t>(0xffff0000)); }
  /// Steps of k that a row of 128 bytes of the panel takes.
  int64_t stepsPerRow() const {
    return spec.bf16Weights && spec.product == KernelProduct::Fma ? 2 : 1;
  }
  /// Output columns of a panel, and the vectors that hold them (parts merged).
  int64_t panelColumns() const { return 32 / spec.parts; }
  int64_t outVectors() const { return panelVectors / spec.parts; }

  KernelBuilder k;
  const GemmKernelSpec &spec;
  int64_t lanes, panelVectors, vectors;
  Value aBlock, bPanels, groups, panelBytes, out, bias, stack, maskSlot;
  Value realRows;           // of a block of tiles
  Value firstStep, endStep; // of a call that makes some of the steps; else null
  Value before, last;       // of a call that leaves the block before
  SmallVector<Value> formArgs;
};

} // namespace moe
} // namespace mlir

#endif // MOE_LIB_TARGET_CPU_KERNELS_GEMMEMITTER_H
