//===- EntryEmitter.h - an entry, while it becomes kernels ------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_ENTRYEMITTER_H
#define MOE_LIB_TARGET_GPU_ENTRYEMITTER_H

#include "Layer.h"

#include "mlir/Dialect/Arith/IR/Arith.h"

#include <array>
#include <cstddef>

#include "moec/module.h"

namespace mlir::moe {

/// Buffers of the workspace, in their order there.
enum Scratch {
  Rows,
  Partial,
  Factors,
  Offsets,
  Pair,
  Order,
  Weighed,
  Hidden,
  Products,
  Sums,
  GroupOffsets,
  GroupHidden,
  GroupProducts,
  Gate,
  ScratchCount
};

class EntryEmitter {
public:
  EntryEmitter(func::FuncOp func, Layer layer) : func(func), layer(layer), b(func) {}
  LogicalResult emit();

private:
  /// Bytes of every buffer for one token and for one sorted row, and what both do not count.
  struct Size {
    int64_t perToken = 0, perRow = 0, fixed = 0;
  };
  std::array<Size, ScratchCount> sizes() const;
  Value total(OpBuilder &b, Value tokens, Value rows, MutableArrayRef<Value> offsets);
  void makeBytesFunction();
  LLVM::LLVMFuncOp makeKernel(StringRef name, ArrayRef<Type> types, int64_t threads,
                              int64_t sharedBytes);
  /// Makes a kernel, fills it by `fill` and launches it.
  LogicalResult launch(StringRef name, Value gridX, Value gridY, int64_t threads,
                       int64_t sharedBytes, ArrayRef<Value> args,
                       function_ref<LogicalResult(OpBuilder &, LLVM::LLVMFuncOp)> fill);
  /// A kernel whose emitter cannot fail.
  template <typename Fill>
  LogicalResult launchPlain(StringRef name, Value gridX, Value gridY, int64_t threads,
                            int64_t sharedBytes, ArrayRef<Value> args, Fill fill) {
    return launch(name, gridX, gridY, threads, sharedBytes, args,
                  [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                    fill(inner, kernel);
                    return success();
                  });
  }
  /// Rows of one matmul and where it finds them.
  struct MatmulRows {
    Value rows, offsets, count;
    int64_t rowWidth;
    bool gather;
  };
  LogicalResult launchMatmul(StringRef name, GroupedMatmulOp op, const MatmulRows &from,
                             Value result, bool add = false);
  LogicalResult launchStage();
  LogicalResult launchLogits(StringRef name, const StageKernel &stage, ArrayRef<Value> args);
  LogicalResult launchRouter(StageKernel stage, ArrayRef<Value> stageArgs);
  LogicalResult launchSort();
  LogicalResult launchExperts();
  LogicalResult launchGroup();
  LogicalResult launchCombine();
  void readFrame();
  LogicalResult makeHost();
  FailureOr<Value> onHost(Value v);

  Value c32(int64_t v) { return arith::ConstantIntOp::create(b, loc, v, 32); }
  Value c64(int64_t v) { return arith::ConstantIntOp::create(b, loc, v, 64); }
  Type ptr(unsigned space = 0) { return LLVM::LLVMPointerType::get(b.getContext(), space); }
  Value field(Type type, int64_t offset);
  Value global(Value pointer) { return LLVM::AddrSpaceCastOp::create(b, loc, ptr(1), pointer); }
  Value framePointer(int64_t offset) { return global(field(ptr(), offset)); }
  Value weight(Value argument);
  /// How many blocks of `size` n things need.
  Value blocks(Value n, int64_t size) {
    return arith::DivUIOp::create(b, loc, arith::AddIOp::create(b, loc, n, c32(size - 1)),
                                  c32(size));
  }

  func::FuncOp func;
  Layer layer;
  OpBuilder b;
  Location loc = func.getLoc();
  gpu::GPUModuleOp kernels;
  Value frame, tokens, slots, count, ids, weights;
  Value groupCount, scale, groupScale; ///< tokens of the one group, factors of the sums
  std::array<Value, ScratchCount> scratch;
};

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_ENTRYEMITTER_H
