//===- LoopBuilder.h - scalar code in few words -----------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_CONVERSION_MOETOLOOPS_LOOPBUILDER_H
#define MOE_LIB_CONVERSION_MOETOLOOPS_LOOPBUILDER_H

#include "moe/Dialect/MoE/IR/MoEOps.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/IR/Builders.h"
#include "mlir/Transforms/DialectConversion.h"

namespace mlir::moe {

/// Writes scalar arithmetic and loops at the insertion point of a builder.
struct LoopBuilder {
  OpBuilder &b;
  Location loc;

  Value index(int64_t value) { return arith::ConstantIndexOp::create(b, loc, value); }
  Value real(double value) {
    return arith::ConstantOp::create(b, loc, b.getF32FloatAttr(static_cast<float>(value)));
  }
  Value i32(int64_t value) {
    return arith::ConstantOp::create(b, loc, b.getI32IntegerAttr(static_cast<int32_t>(value)));
  }
  Value boolean(bool value) { return arith::ConstantOp::create(b, loc, b.getBoolAttr(value)); }

  Value dim(Value memref, int64_t dim) { return memref::DimOp::create(b, loc, memref, dim); }
  Value addi(Value a, Value c) { return arith::AddIOp::create(b, loc, a, c); }
  Value addi(Value a, int64_t c) { return addi(a, index(c)); }
  Value muli(Value a, Value c) { return arith::MulIOp::create(b, loc, a, c); }
  Value muli(Value a, int64_t c) { return muli(a, index(c)); }
  Value divi(Value a, Value c) { return arith::DivUIOp::create(b, loc, a, c); }
  Value divi(Value a, int64_t c) { return divi(a, index(c)); }
  Value remi(Value a, Value c) { return arith::RemUIOp::create(b, loc, a, c); }
  Value remi(Value a, int64_t c) { return remi(a, index(c)); }
  Value add(Value a, Value c) { return arith::AddFOp::create(b, loc, a, c); }
  Value sub(Value a, Value c) { return arith::SubFOp::create(b, loc, a, c); }
  Value mul(Value a, Value c) { return arith::MulFOp::create(b, loc, a, c); }
  Value div(Value a, Value c) { return arith::DivFOp::create(b, loc, a, c); }
  Value max(Value a, Value c) { return arith::MaximumFOp::create(b, loc, a, c); }
  Value fma(Value a, Value c, Value d) { return math::FmaOp::create(b, loc, a, c, d); }
  Value exp(Value a) { return math::ExpOp::create(b, loc, a); }
  Value cmp(arith::CmpFPredicate predicate, Value a, Value c) {
    return arith::CmpFOp::create(b, loc, predicate, a, c);
  }
  Value cmp(arith::CmpIPredicate predicate, Value a, Value c) {
    return arith::CmpIOp::create(b, loc, predicate, a, c);
  }
  Value subi(Value a, Value c) { return arith::SubIOp::create(b, loc, a, c); }
  Value noti(Value a) { return arith::XOrIOp::create(b, loc, a, boolean(true)); }
  Value andi(Value a, Value c) { return arith::AndIOp::create(b, loc, a, c); }
  Value ori(Value a, Value c) { return arith::OrIOp::create(b, loc, a, c); }
  Value select(Value condition, Value a, Value c) {
    return arith::SelectOp::create(b, loc, condition, a, c);
  }
  Value toIndex(Value a) { return arith::IndexCastOp::create(b, loc, b.getIndexType(), a); }
  Value toI32(Value a) { return arith::IndexCastOp::create(b, loc, b.getI32Type(), a); }

  Value alloc(ArrayRef<OpFoldResult> sizes, Type element) {
    SmallVector<int64_t> shape;
    SmallVector<Value> dynamic;
    dispatchIndexOpFoldResults(sizes, dynamic, shape);
    return memref::AllocOp::create(b, loc, MemRefType::get(shape, element), dynamic);
  }
  void free(Value memref) { memref::DeallocOp::create(b, loc, memref); }

  Value load(Value memref, ValueRange at) { return memref::LoadOp::create(b, loc, memref, at); }
  /// An element as index.
  Value loadIndex(Value memref, ValueRange at) { return toIndex(load(memref, at)); }
  /// An element, widened exactly to f32.
  Value loadF32(Value memref, ValueRange at) { return widen(load(memref, at)); }
  void store(Value value, Value memref, ValueRange at) {
    memref::StoreOp::create(b, loc, value, memref, at);
  }
  /// Stores an f32, rounded to the element type.
  void storeF32(Value value, Value memref, ValueRange at) {
    Type element = cast<MemRefType>(memref.getType()).getElementType();
    if (!element.isF32())
      value = arith::TruncFOp::create(b, loc, element, value);
    store(value, memref, at);
  }
  Value widen(Value value) {
    if (value.getType().isF32())
      return value;
    return arith::ExtFOp::create(b, loc, b.getF32Type(), value);
  }
  /// Rounds an f32 to `type`, kept as f32.
  Value round(Value value, Type type) {
    if (type.isF32())
      return value;
    return widen(arith::TruncFOp::create(b, loc, type, value));
  }

  /// for i in [begin, end): body(i).
  void loop(Value begin, Value end, function_ref<void(Value)> body) {
    auto loop = scf::ForOp::create(b, loc, begin, end, index(1));
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPoint(loop.getBody()->getTerminator());
    body(loop.getInductionVar());
  }
  void loop(Value end, function_ref<void(Value)> body) { loop(index(0), end, body); }
  void loop(int64_t end, function_ref<void(Value)> body) { loop(index(end), body); }

  /// for i in [0, end): state = body(i, state); gives the last state.
  SmallVector<Value> fold(Value end, ValueRange init,
                          function_ref<SmallVector<Value>(Value, ValueRange)> body) {
    auto loop = scf::ForOp::create(b, loc, index(0), end, index(1), init,
                                   [&](OpBuilder &, Location, Value i, ValueRange state) {
                                     OpBuilder::InsertionGuard guard(b);
                                     b.setInsertionPointToStart(cast<BlockArgument>(i).getOwner());
                                     SmallVector<Value> next = body(i, state);
                                     scf::YieldOp::create(b, loc, next);
                                   });
    return SmallVector<Value>(loop.getResults());
  }
  /// if condition: body().
  void when(Value condition, function_ref<void()> body) {
    auto branch = scf::IfOp::create(b, loc, condition, /*withElseRegion=*/false);
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPoint(branch.thenBlock()->getTerminator());
    body();
  }
};

/// Element (expert, part, row, col) of a packed weight, widened to f32.
Value loadWeight(LoopBuilder &l, WeightType type, Value packed, Value expert, int64_t part,
                 Value row, Value col);

/// Patterns of moe.router; the others are in MoEToLoops.cpp.
void populateRouterToLoopsPatterns(const TypeConverter &converter, RewritePatternSet &patterns);

/// Writes offsets and pair of moe.dispatch.
void buildDispatch(LoopBuilder &l, Value ids, Value offsets, Value pair, int64_t experts);

} // namespace mlir::moe

#endif // MOE_LIB_CONVERSION_MOETOLOOPS_LOOPBUILDER_H
