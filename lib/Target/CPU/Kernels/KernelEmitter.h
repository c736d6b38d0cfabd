//===- KernelEmitter.h - Task operations to calls of kernels --------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_CPU_KERNELS_KERNELEMITTER_H
#define MOE_LIB_TARGET_CPU_KERNELS_KERNELEMITTER_H

#include "KernelBuilder.h"

#include "moe/Dialect/MoE/IR/MoEOps.h"

#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/SymbolTable.h"

namespace mlir {
namespace moe {

/// A memref as a kernel sees it: the address of element 0 and strides in bytes.
struct Buffer {
  Value pointer;
  SmallVector<Value> strideBytes; // i64
  int64_t elementBytes;
};

/// Replaces the task operations of one module.
class KernelEmitter {
public:
  explicit KernelEmitter(ModuleOp module) : module(module), symbols(module) {}

  LogicalResult run();

private:
  LogicalResult lower(GemmTileOp op);
  LogicalResult lower(PackRowsOp op);
  LogicalResult lower(NormalizeRowsOp op);
  LogicalResult lower(SelectExpertsOp op);
  LogicalResult lower(BeginPanelsOp op);
  LogicalResult lower(EndPanelsOp op);

  template <typename PanelsOp> LogicalResult lowerPanels(PanelsOp op, Value accumulate);

  FailureOr<GemmKernelSpec> getSpec(GemmTileOp op);
  LogicalResult callGemm(KernelBuilder &k, GemmTileOp op, const GemmKernelSpec &spec, Value panel);

  /// The level of the function that holds `op`.
  FailureOr<KernelLevel> getLevel(Operation *op);
  FailureOr<Buffer> getBuffer(KernelBuilder &k, Operation *op, Value memref);
  Value toI64(KernelBuilder &k, Value index) {
    return arith::IndexCastOp::create(k.b, k.loc, k.i64(), index);
  }
  /// The address of a weight's packed bytes.
  Value toPointer(KernelBuilder &k, Value weight) {
    return UnrealizedConversionCastOp::create(k.b, k.loc, k.ptr(), weight).getResult(0);
  }
  void call(KernelBuilder &k, func::FuncOp kernel, ArrayRef<Value> args) {
    func::CallOp::create(k.b, k.loc, kernel, args);
  }
  /// The kernel of that name, emitted now if there is none yet.
  FailureOr<func::FuncOp> get(StringRef name,
                              function_ref<FailureOr<func::FuncOp>(OpBuilder &)> emit);

  LogicalResult frameTiles(GemmTileOp op);

  ModuleOp module;
  SymbolTable symbols;
  llvm::SmallPtrSet<Block *, 4> framed; ///< stages and functions that have tiles
};

} // namespace moe
} // namespace mlir

#endif // MOE_LIB_TARGET_CPU_KERNELS_KERNELEMITTER_H
