//===- GPUBuilder.h - short names for kernel code ---------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_KERNELS_GPUBUILDER_H
#define MOE_LIB_TARGET_GPU_KERNELS_GPUBUILDER_H

#include "Kernels.h"
#include "moe/Target/CPU/VectorMath.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/GPU/IR/GPUDialect.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/Dialect/Vector/IR/VectorOps.h"
#include "mlir/IR/Builders.h"

namespace mlir::moe {

/// The arguments of a kernel, taken one after another in the order of its comment.
class Arguments {
public:
  explicit Arguments(ValueRange values) : values(values) {}
  Value next() { return values[taken++]; }
  Value nextIf(bool has) { return has ? next() : Value(); }

private:
  ValueRange values;
  size_t taken = 0;
};

/// Numbers of a kernel are i32, distances in global memory i64 bytes. Pointers are in address
/// space 1 (global) or 3 (shared).
class GPUBuilder {
public:
  GPUBuilder(OpBuilder &b, Location loc) : b(b), loc(loc) {}

  OpBuilder &b;
  Location loc;

  Type i1() { return b.getI1Type(); }
  Type i16() { return b.getI16Type(); }
  Type i32() { return b.getI32Type(); }
  Type i64() { return b.getI64Type(); }
  Type f32() { return b.getF32Type(); }
  Type ptr(unsigned space) { return LLVM::LLVMPointerType::get(b.getContext(), space); }
  Type vec4() { return VectorType::get({4}, b.getI32Type()); }

  Value c(int64_t v) { return arith::ConstantOp::create(b, loc, b.getI32IntegerAttr(int32_t(v))); }
  Value c64(int64_t v) { return arith::ConstantOp::create(b, loc, b.getI64IntegerAttr(v)); }
  Value bit(bool v) { return arith::ConstantOp::create(b, loc, b.getBoolAttr(v)); }
  Value f(float v) { return arith::ConstantOp::create(b, loc, b.getF32FloatAttr(v)); }

  template <typename Op> Value fold(Value x, Value y) { return b.createOrFold<Op>(loc, x, y); }
  Value add(Value x, Value y) { return fold<arith::AddIOp>(x, y); }
  Value add(Value x, int64_t y) { return y ? add(x, like(x, y)) : x; }
  Value sub(Value x, Value y) { return fold<arith::SubIOp>(x, y); }
  Value mul(Value x, Value y) { return fold<arith::MulIOp>(x, y); }
  Value mul(Value x, int64_t y) { return mul(x, like(x, y)); }
  Value div(Value x, int64_t y) { return div(x, like(x, y)); }
  Value div(Value x, Value y) { return fold<arith::DivUIOp>(x, y); }
  Value rem(Value x, int64_t y) { return rem(x, like(x, y)); }
  Value rem(Value x, Value y) { return fold<arith::RemUIOp>(x, y); }
  Value min(Value x, Value y) { return fold<arith::MinSIOp>(x, y); }
  Value andi(Value x, Value y) { return fold<arith::AndIOp>(x, y); }
  Value andi(Value x, int64_t y) { return andi(x, like(x, y)); }
  Value ori(Value x, Value y) { return fold<arith::OrIOp>(x, y); }
  Value xori(Value x, Value y) { return fold<arith::XOrIOp>(x, y); }
  Value shl(Value x, int64_t y) { return fold<arith::ShLIOp>(x, like(x, y)); }
  Value shr(Value x, int64_t y) { return fold<arith::ShRUIOp>(x, like(x, y)); }
  Value like(Value x, int64_t v) { return x.getType().isInteger(64) ? c64(v) : c(v); }
  Value wide(Value x) { return b.createOrFold<arith::ExtSIOp>(loc, i64(), x); }
  Value narrow(Value x) { return b.createOrFold<arith::TruncIOp>(loc, i32(), x); }
  Value select(Value condition, Value x, Value y) {
    return b.createOrFold<arith::SelectOp>(loc, condition, x, y);
  }
  Value icmp(arith::CmpIPredicate p, Value x, Value y) {
    return b.createOrFold<arith::CmpIOp>(loc, p, x, y);
  }
  Value less(Value x, Value y) { return icmp(arith::CmpIPredicate::slt, x, y); }
  Value less(Value x, int64_t y) { return less(x, like(x, y)); }
  Value equal(Value x, Value y) { return icmp(arith::CmpIPredicate::eq, x, y); }
  Value equal(Value x, int64_t y) { return equal(x, like(x, y)); }

  Value addf(Value x, Value y) { return arith::AddFOp::create(b, loc, x, y); }
  Value subf(Value x, Value y) { return arith::SubFOp::create(b, loc, x, y); }
  Value mulf(Value x, Value y) { return arith::MulFOp::create(b, loc, x, y); }
  Value divf(Value x, Value y) { return arith::DivFOp::create(b, loc, x, y); }
  Value maxf(Value x, Value y) { return arith::MaximumFOp::create(b, loc, x, y); }
  Value sqrt(Value x) { return LLVM::SqrtOp::create(b, loc, x.getType(), x); }
  Value greater(Value x, Value y) {
    return arith::CmpFOp::create(b, loc, arith::CmpFPredicate::OGT, x, y);
  }
  Value fma(Value x, Value y, Value z) { return LLVM::FMAOp::create(b, loc, x.getType(), x, y, z); }
  Value isNaN(Value x) { return arith::CmpFOp::create(b, loc, arith::CmpFPredicate::UNO, x, x); }
  Value bits(Value x) { return arith::BitcastOp::create(b, loc, i32(), x); }
  Value real(Value x) { return arith::BitcastOp::create(b, loc, f32(), x); }
  /// e^x by the polynomial that the CPU's kernels use.
  Value exp(Value x) { return fromVector(emitExp(b, loc, toVector(x))); }
  Value tanh(Value x) { return fromVector(emitTanh(b, loc, toVector(x))); }

  /// Scalars as vectors of one element, for code that is written on vectors.
  Value toVector(Value x) {
    return vector::FromElementsOp::create(b, loc, VectorType::get({1}, x.getType()), x);
  }
  Value fromVector(Value v) { return vector::ExtractOp::create(b, loc, v, ArrayRef<int64_t>{0}); }

  /// bf16 bits in the low or high half of a word, as f32: exact.
  Value lowHalf(Value word) { return real(shl(word, 16)); }
  Value highHalf(Value word) { return real(andi(word, 0xffff0000)); }
  /// f32 rounded to bf16: its bits as i16.
  Value roundBits(Value x) {
    Value half = LLVM::FPTruncOp::create(b, loc, b.getBF16Type(), x);
    return LLVM::BitcastOp::create(b, loc, i16(), half);
  }
  /// Two f32 rounded to bf16, in the halves of a word.
  Value pair(Value low, Value high) {
    Value bits = arith::ExtUIOp::create(b, loc, i32(), roundBits(low));
    Value upper = arith::ExtUIOp::create(b, loc, i32(), roundBits(high));
    return ori(bits, shl(upper, 16));
  }
  Value widenBits(Value half) { return real(shl(arith::ExtUIOp::create(b, loc, i32(), half), 16)); }
  /// f32 rounded to bf16 and widened again.
  Value round(Value x) { return widenBits(roundBits(x)); }

  //===--------------------------------------------------------------------===//
  // Memory
  //===--------------------------------------------------------------------===//

  /// p + bytes, i64 for global and i32 for shared memory.
  Value at(Value p, Value bytes) {
    return LLVM::GEPOp::create(b, loc, p.getType(), b.getI8Type(), p,
                               ArrayRef<LLVM::GEPArg>{bytes});
  }
  Value at(Value p, int64_t bytes) {
    if (bytes == 0)
      return p;
    return LLVM::GEPOp::create(b, loc, p.getType(), b.getI8Type(), p,
                               ArrayRef<LLVM::GEPArg>{int32_t(bytes)});
  }
  /// The address of element `i` of elements of `size` bytes in global memory.
  Value element(Value p, Value i, int64_t size) {
    return at(p, mul(i.getType().isInteger(64) ? i : wide(i), size));
  }
  Value load(Type type, Value p, unsigned align) {
    return LLVM::LoadOp::create(b, loc, type, p, align);
  }
  Value loadI32(Value p) { return load(i32(), p, 4); }
  Value loadF32(Value p) { return load(f32(), p, 4); }
  void store(Value v, Value p, unsigned align) { LLVM::StoreOp::create(b, loc, v, p, align); }
  Value lane(Value vector, int64_t i) {
    return LLVM::ExtractElementOp::create(b, loc, vector, c(i));
  }
  Value pack(ArrayRef<Value> words) {
    Value v = LLVM::UndefOp::create(b, loc, VectorType::get({int64_t(words.size())}, i32()));
    for (auto [i, word] : llvm::enumerate(words))
      v = LLVM::InsertElementOp::create(b, loc, v, word, c(int64_t(i)));
    return v;
  }
  /// One element of x or y as f32.
  Value loadElement(Value p, Type type) {
    return type.isF32() ? loadF32(p) : widenBits(load(i16(), p, 2));
  }
  void storeElement(Value v, Value p, Type type) {
    if (type.isF32())
      store(v, p, 4);
    else
      store(roundBits(v), p, 2);
  }

  //===--------------------------------------------------------------------===//
  // Control
  //===--------------------------------------------------------------------===//

  /// for (i32 i = begin; i < end; i += step).
  void loop(Value begin, Value end, Value step, function_ref<void(Value)> body) {
    auto op = scf::ForOp::create(b, loc, begin, end, step);
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(op.getBody());
    body(op.getInductionVar());
  }
  SmallVector<Value> loop(Value begin, Value end, Value step, ValueRange init,
                          function_ref<SmallVector<Value>(Value, ValueRange)> body) {
    auto op = scf::ForOp::create(b, loc, begin, end, step, init);
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(op.getBody());
    scf::YieldOp::create(b, loc, body(op.getInductionVar(), op.getRegionIterArgs()));
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
  /// condition ? then() : otherwise(), of which one is computed.
  SmallVector<Value> choose(Value condition, ArrayRef<Type> types,
                            function_ref<SmallVector<Value>()> then,
                            function_ref<SmallVector<Value>()> otherwise) {
    auto op = scf::IfOp::create(b, loc, types, condition, /*withElse=*/true);
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(op.thenBlock());
    scf::YieldOp::create(b, loc, then());
    b.setInsertionPointToStart(op.elseBlock());
    scf::YieldOp::create(b, loc, otherwise());
    return SmallVector<Value>(op.getResults());
  }
  /// while (condition(state)) state = body(state).
  SmallVector<Value> whileLoop(ValueRange init, function_ref<Value(ValueRange)> condition,
                               function_ref<SmallVector<Value>(ValueRange)> body) {
    auto op = scf::WhileOp::create(
        b, loc, init.getTypes(), init,
        [&](OpBuilder &, Location, ValueRange state) {
          scf::ConditionOp::create(b, loc, condition(state), state);
        },
        [&](OpBuilder &, Location, ValueRange state) {
          scf::YieldOp::create(b, loc, body(state));
        });
    return SmallVector<Value>(op.getResults());
  }

  //===--------------------------------------------------------------------===//
  // Threads
  //===--------------------------------------------------------------------===//

  Value thread() { return NVVM::ThreadIdXOp::create(b, loc, i32()); }
  Value blockX() { return NVVM::BlockIdXOp::create(b, loc, i32()); }
  Value blockY() { return NVVM::BlockIdYOp::create(b, loc, i32()); }
  void barrier() { NVVM::BarrierOp::create(b, loc); }
  Value all() { return c(-1); }
  Value shuffle(NVVM::ShflKind kind, Value v, Value offset) {
    // The clamp of `up` is the first lane, that of the others the last.
    Value clamp = c(kind == NVVM::ShflKind::up ? 0 : 31);
    return NVVM::ShflOp::create(b, loc, v.getType(), all(), v, offset, clamp, kind, UnitAttr());
  }
  Value ballot(Value predicate) {
    return NVVM::VoteSyncOp::create(b, loc, i32(), all(), predicate, NVVM::VoteSyncKind::ballot);
  }
  Value popcount(Value x) { return LLVM::CtPopOp::create(b, loc, i32(), x); }
  Value redux(Value v, NVVM::ReduxKind kind) {
    return NVVM::ReduxOp::create(b, loc, i32(), v, kind, all());
  }
  /// Two or four matrices of 8 x 8 bf16 in shared memory; lanes 8i … 8i + 7 name the rows of the
  /// i-th.
  SmallVector<Value> loadMatrices(Value row, int64_t count) {
    auto words = LLVM::LLVMStructType::getLiteral(b.getContext(), SmallVector<Type>(count, i32()));
    Value all = NVVM::LdMatrixOp::create(b, loc, words, row, count, NVVM::MMALayout::row,
                                         NVVM::LdStMatrixShapeAttr::get(b.getContext(), 8, 8),
                                         NVVM::LdStMatrixEltType::B16);
    SmallVector<Value> result;
    for (int64_t i = 0; i < count; ++i)
      result.push_back(LLVM::ExtractValueOp::create(b, loc, all, ArrayRef<int64_t>{i}));
    return result;
  }
  /// sums += left (16 x 16 of bf16) · right (16 x 8).
  void multiply(MutableArrayRef<Value> sums, ArrayRef<Value> left, ArrayRef<Value> right) {
    auto f4 = LLVM::LLVMStructType::getLiteral(b.getContext(), SmallVector<Type>(4, f32()));
    Value product = NVVM::MmaOp::create(
        b, loc, f4, left, right, ArrayRef<Value>(sums), ArrayRef<int64_t>{16, 8, 16}, std::nullopt,
        std::nullopt, std::array<NVVM::MMATypes, 2>{NVVM::MMATypes::bf16, NVVM::MMATypes::bf16},
        std::array<NVVM::MMALayout, 2>{NVVM::MMALayout::row, NVVM::MMALayout::col});
    for (int64_t i = 0; i < 4; ++i)
      sums[i] = LLVM::ExtractValueOp::create(b, loc, product, ArrayRef<int64_t>{i});
  }
  /// The sum of the values of all lanes.
  Value sumLanes(Value v) {
    return reduce(v, [&](Value x, Value y) { return addf(x, y); });
  }
  /// Dynamic shared memory.
  Value sharedBase() { return LLVM::AddressOfOp::create(b, loc, ptr(3), kSharedName); }
  /// Bits below the lane.
  Value maskBelow(Value laneId) { return sub(arith::ShLIOp::create(b, loc, c(1), laneId), c(1)); }
  /// Combines the values of all lanes by exchanging halves, quarters, …: one fixed tree.
  Value reduce(Value v, function_ref<Value(Value, Value)> combine) {
    for (int64_t distance = 16; distance; distance /= 2)
      v = combine(v, shuffle(NVVM::ShflKind::bfly, v, c(distance)));
    return v;
  }
};

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_KERNELS_GPUBUILDER_H
