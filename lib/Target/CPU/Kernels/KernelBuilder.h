//===- KernelBuilder.h - Addresses, loads, stores of kernels ----*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_CPU_KERNELS_KERNELBUILDER_H
#define MOE_LIB_TARGET_CPU_KERNELS_KERNELBUILDER_H

#include "moe/Target/CPU/Kernels.h"
#include "moe/Target/CPU/VectorMath.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/Dialect/Vector/IR/VectorOps.h"

namespace mlir {
namespace moe {

/// A byte-addressed view of the builder: pointers are !llvm.ptr, offsets are bytes.
class KernelBuilder {
public:
  KernelBuilder(OpBuilder &b, Location loc) : b(b), loc(loc) {}

  OpBuilder &b;
  Location loc;

  Type ptr() { return LLVM::LLVMPointerType::get(b.getContext()); }
  Type i64() { return b.getI64Type(); }
  VectorType vec(int64_t lanes, Type element) { return VectorType::get({lanes}, element); }

  Value index(int64_t v) { return arith::ConstantOp::create(b, loc, b.getI64IntegerAttr(v)); }
  Value int32(int32_t v) { return arith::ConstantOp::create(b, loc, b.getI32IntegerAttr(v)); }
  Value float32(float v) { return arith::ConstantOp::create(b, loc, b.getF32FloatAttr(v)); }
  Value add(Value x, Value y) { return arith::AddIOp::create(b, loc, x, y); }
  Value sub(Value x, Value y) { return arith::SubIOp::create(b, loc, x, y); }
  Value mul(Value x, Value y) { return arith::MulIOp::create(b, loc, x, y); }
  Value mul(Value x, int64_t y) { return mul(x, index(y)); }

  /// p + bytes.
  Value at(Value p, int64_t bytes) {
    if (bytes == 0)
      return p;
    return LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), p,
                               ArrayRef<LLVM::GEPArg>{static_cast<int32_t>(bytes)});
  }
  Value at(Value p, Value bytes) {
    return LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), p, ArrayRef<LLVM::GEPArg>{bytes});
  }
  /// Loads and stores assume element alignment only.
  Value load(Type type, Value p) {
    return LLVM::LoadOp::create(b, loc, type, p, elementBytes(type));
  }
  void store(Value v, Value p) { LLVM::StoreOp::create(b, loc, v, p, elementBytes(v.getType())); }
  /// Prefetches the line at p into the first cache (prefetcht0) or the second (prefetcht1).
  void prefetch(Value p, bool second = false) {
    LLVM::Prefetch::create(b, loc, p, /*rw=*/0, /*hint=*/second ? 2 : 3, /*cache=*/1);
  }

  /// for (i64 i = 0; i < end; i += step), with the builder inside while `body` runs.
  void loop(Value end, int64_t step, function_ref<void(Value)> body) {
    auto op = scf::ForOp::create(b, loc, index(0), end, index(step));
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(op.getBody());
    body(op.getInductionVar());
  }
  /// As above with values carried from step to step; returns their last values.
  SmallVector<Value> loop(Value end, int64_t step, ValueRange init,
                          function_ref<SmallVector<Value>(Value, ValueRange)> body) {
    auto op = scf::ForOp::create(b, loc, index(0), end, index(step), init);
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(op.getBody());
    SmallVector<Value> next = body(op.getInductionVar(), op.getRegionIterArgs());
    if (!next.empty())
      scf::YieldOp::create(b, loc, next);
    return SmallVector<Value>(op.getResults());
  }
  void ifThen(Value condition, function_ref<void()> then) {
    auto op = scf::IfOp::create(b, loc, condition, /*withElse=*/false);
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(op.thenBlock());
    then();
  }
  void ifThenElse(Value condition, function_ref<void()> then, function_ref<void()> otherwise) {
    auto op = scf::IfOp::create(b, loc, condition, /*withElse=*/true);
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(op.thenBlock());
    then();
    b.setInsertionPointToStart(op.elseBlock());
    otherwise();
  }
  /// Sum of a vector of a power of two lanes: halves added to halves until one lane is left.
  Value sum(Value v) {
    for (int64_t n = cast<VectorType>(v.getType()).getNumElements() / 2; n >= 1; n /= 2) {
      auto half = [&](int64_t at) -> Value {
        return vector::ExtractStridedSliceOp::create(b, loc, v, ArrayRef<int64_t>{at},
                                                     ArrayRef<int64_t>{n}, ArrayRef<int64_t>{1});
      };
      v = arith::AddFOp::create(b, loc, half(0), half(n));
    }
    return vector::ExtractOp::create(b, loc, v, ArrayRef<int64_t>{0});
  }
  /// i1 of a signed comparison.
  Value less(Value x, Value y) {
    return arith::CmpIOp::create(b, loc, arith::CmpIPredicate::slt, x, y);
  }

  /// bf16 bits in the low half of an i32 (scalar or vector) as f32.
  Value widenBits(Value bits) {
    Type i32 = bits.getType();
    if (auto v = dyn_cast<VectorType>(i32)) {
      Value shifted = arith::ShLIOp::create(b, loc, bits, splatI32(b, loc, v.getNumElements(), 16));
      return vector::BitCastOp::create(b, loc, vec(v.getNumElements(), b.getF32Type()), shifted);
    }
    Value shifted = arith::ShLIOp::create(b, loc, bits, int32(16));
    return arith::BitcastOp::create(b, loc, b.getF32Type(), shifted);
  }
  /// `lanes` consecutive f32 or bf16 values as vector<lanes x f32>.
  Value loadF32(Value p, int64_t lanes, bool bf16) {
    if (!bf16)
      return load(vec(lanes, b.getF32Type()), p);
    Value half = load(vec(lanes, b.getI16Type()), p);
    return widenBits(arith::ExtUIOp::create(b, loc, vec(lanes, b.getI32Type()), half));
  }
  /// Stores vector<lanes x f32>, rounded to bf16 if asked.
  void storeF32(Value v, Value p, bool bf16) {
    if (!bf16)
      return store(v, p);
    storeBF16Bits(emitRoundToBF16Bits(b, loc, v), p);
  }

  /// As above for the bits alone, in the low halves.
  void storeBF16Bits(Value v, Value p) {
    int64_t lanes = cast<VectorType>(v.getType()).getNumElements();
    store(arith::TruncIOp::create(b, loc, vec(lanes, b.getI16Type()), v), p);
  }

  /// A private function of `level` with `args` in which the builder is left; finish() returns
  /// from it and restores the builder. `features`: those beyond the level's, as "+avx512bf16".
  func::FuncOp start(StringRef name, KernelLevel level, ArrayRef<Type> args,
                     StringRef features = "");
  void finish();

private:
  static unsigned elementBytes(Type type) {
    return getElementTypeOrSelf(type).getIntOrFloatBitWidth() / 8;
  }
  OpBuilder::InsertPoint saved;
};

} // namespace moe
} // namespace mlir

#endif // MOE_LIB_TARGET_CPU_KERNELS_KERNELBUILDER_H
