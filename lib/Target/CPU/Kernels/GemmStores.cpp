//===- GemmStores.cpp - What a matrix kernel does with its sums -----------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GemmEmitter.h"

using namespace mlir;
using namespace mlir::moe;

/// Vector s of the merged columns of panel p of one row.
FailureOr<Value> GemmEmitter::applyEpilogue(ArrayRef<Value> acc, int64_t p, int64_t s) {
  SmallVector<Value> parts;
  for (int64_t part = 0; part < spec.parts; ++part)
    parts.push_back(acc[p * panelVectors + part * outVectors() + s]);
  if (!spec.epilogue)
    return parts.front();
  FailureOr<SmallVector<Value>> results = emitRegionOnVectors(k.b, *spec.epilogue, parts);
  if (failed(results))
    return failure();
  return results->front();
}

/// Vectors of whole rows with the bias of their lanes.
SmallVector<Value> GemmEmitter::addBias(ArrayRef<Value> acc) {
  SmallVector<Value> sums(acc);
  if (!spec.bias)
    return sums;
  for (auto [v, sum] : llvm::enumerate(sums)) {
    // Panels of 32 lanes follow each other, in the order of the panel's own lanes.
    int64_t vector = static_cast<int64_t>(v) % vectors;
    Value lane = k.load(k.vec(lanes, k.b.getF32Type()), k.at(bias, vector * lanes * 4));
    if (spec.isWide())
      lane = arith::ExtFOp::create(k.b, k.loc, sum.getType(), lane);
    sum = arith::AddFOp::create(k.b, k.loc, sum, lane);
  }
  return sums;
}

/// Runs `store` on every row's vectors, bias added. The accumulators go through the stack and the
/// rows through a loop: unrolled, the epilogue's constants would be kept in registers across the k
/// loop, which has none to spare, and its code would be `rows` times as long. The copy costs one
/// store and one load per vector and whole product.
LogicalResult GemmEmitter::forEachRow(ArrayRef<Value> acc,
                                      function_ref<LogicalResult(Value, ArrayRef<Value>)> store) {
  // A bias of sums in f64 was added before they were rounded.
  auto biased = [&](ArrayRef<Value> row) {
    return spec.isWide() ? SmallVector<Value>(row) : addBias(row);
  };
  if (spec.rows == 1)
    return store(k.index(0), biased(acc));
  Value rows = spec.isTile() ? realRows : k.index(spec.rows);
  if (!spec.steps)
    storeSums(acc);
  LogicalResult result = success();
  k.loop(rows, 1, [&](Value row) {
    result = store(row, biased(loadSums(k.at(stack, k.mul(row, vectors * lanes * 4)))));
  });
  return result;
}

void GemmEmitter::storeSums(ArrayRef<Value> acc) {
  for (auto [i, v] : llvm::enumerate(acc))
    k.store(v, k.at(stack, static_cast<int64_t>(i) * lanes * 4));
}

/// The sums of one row.
SmallVector<Value> GemmEmitter::loadSums(Value from) {
  SmallVector<Value> loaded;
  for (int64_t v = 0; v < vectors; ++v)
    loaded.push_back(k.load(k.vec(lanes, k.b.getF32Type()), k.at(from, v * lanes * 4)));
  return loaded;
}

LogicalResult GemmEmitter::leaveRow(Value row, ArrayRef<Value> acc, bool whole) {
  switch (spec.form) {
  case KernelForm::Blocked:
    return storeBlocked(row, acc);
  case KernelForm::Rows:
    return storeRows(row, acc, whole);
  case KernelForm::Combine:
    return storeCombine(row, acc);
  }
  llvm_unreachable("all forms are handled");
}

void GemmEmitter::inBlockBefore(function_ref<void()> body) {
  Value ownOut = out, ownStack = stack;
  SmallVector<Value> ownArgs = formArgs;
  stack = k.at(stack, -32 * 32 * 4);
  if (spec.form == KernelForm::Combine && spec.indexed)
    formArgs[1] = before;
  else
    out = before;
  if (spec.form == KernelForm::Combine && spec.weighted && !spec.indexed)
    formArgs[1] = k.at(formArgs[1], -32 * 4);
  body();
  out = ownOut;
  stack = ownStack;
  formArgs = ownArgs;
}

/// The i1 vector of the lanes whose column, counted from `column`, is below the i64 `limit`.
Value GemmEmitter::realLanes(int64_t column, Value limit) {
  OpBuilder &b = k.b;
  Value clamped = arith::TruncIOp::create(
      b, k.loc, b.getI32Type(),
      arith::MinSIOp::create(b, k.loc, limit, k.index(spec.panels * panelColumns())));
  SmallVector<int32_t> numbers;
  for (int64_t l = 0; l < lanes; ++l)
    numbers.push_back(static_cast<int32_t>(column + l));
  Value number = arith::ConstantOp::create(
      b, k.loc,
      DenseIntElementsAttr::get(k.vec(lanes, b.getI32Type()), ArrayRef<int32_t>(numbers)));
  return arith::CmpIOp::create(
      b, k.loc, arith::CmpIPredicate::slt, number,
      vector::BroadcastOp::create(b, k.loc, k.vec(lanes, b.getI32Type()), clamped));
}

LogicalResult GemmEmitter::storeBlocked(Value row, ArrayRef<Value> acc) {
  OpBuilder &b = k.b;
  // Lanes beyond the real columns become zero: their products may be NaN (inf times the zero
  // padding of the weights), and the next product would spread it over the row.
  Value zero = splatF32(b, k.loc, lanes, 0.0f);
  Value to = k.at(out, k.mul(row, 64));
  int64_t group = spec.bf16Result ? 32 : 16; // columns in 64 bytes
  for (int64_t p = 0; p < spec.panels; ++p)
    for (int64_t s = 0; s < outVectors(); ++s) {
      int64_t column = p * panelColumns() + s * lanes;
      Value real = realLanes(column, formArgs[0]);
      FailureOr<Value> value = applyEpilogue(acc, p, s);
      if (failed(value))
        return failure();
      Value masked = arith::SelectOp::create(b, k.loc, real, *value, zero);
      k.storeF32(masked,
                 k.at(to, (column / group) * spec.rows * 64 + (column % group) * (64 / group)),
                 spec.bf16Result);
    }
  if (fillsGroup()) {
    Value fill = arith::CmpIOp::create(b, k.loc, arith::CmpIPredicate::ne, formArgs[1], k.index(0));
    k.ifThen(fill, [&] { k.store(splatI32(b, k.loc, 8, 0), k.at(to, 32)); });
  }
  return success();
}

/// Stores a row; `whole` says that all columns of the tile are real, otherwise those beyond the
/// limit are left alone.
LogicalResult GemmEmitter::storeRows(Value row, ArrayRef<Value> acc, bool whole) {
  OpBuilder &b = k.b;
  int64_t elementBytes = spec.bf16Result ? 2 : 4;
  int64_t outParts = spec.epilogue ? 1 : spec.parts;
  Value to = k.at(out, k.mul(row, formArgs[0]));
  for (int64_t part = 0; part < outParts; ++part) {
    Value base = part ? k.at(to, formArgs[1]) : to;
    for (int64_t p = 0; p < spec.panels; ++p)
      for (int64_t s = 0; s < outVectors(); ++s) {
        FailureOr<Value> value = acc[p * panelVectors + part * outVectors() + s];
        if (spec.epilogue)
          value = applyEpilogue(acc, p, s);
        if (failed(value))
          return failure();
        int64_t column = p * panelColumns() + s * lanes;
        Value address = k.at(base, column * elementBytes);
        if (whole) {
          k.storeF32(*value, address, spec.bf16Result);
          continue;
        }
        Value stored = *value;
        if (spec.bf16Result)
          stored = arith::TruncIOp::create(b, k.loc, k.vec(lanes, b.getI16Type()),
                                           emitRoundToBF16Bits(b, k.loc, stored));
        LLVM::MaskedStoreOp::create(b, k.loc, stored, address, realLanes(column, formArgs[2]),
                                    elementBytes);
      }
  }
  return success();
}

/// Rows come in order and each read-modify-write is done before the next: a caller may give one
/// expert twice to one token.
LogicalResult GemmEmitter::storeCombine(Value row, ArrayRef<Value> acc) {
  OpBuilder &b = k.b;
  ArrayRef<Value> args = formArgs;
  auto next = [&] {
    Value arg = args.front();
    args = args.drop_front();
    return arg;
  };
  Value scratchBytes = next(), token = row, number = row;
  Value pairs = spec.indexed ? next() : Value(), weights = spec.weighted ? next() : Value();
  if (spec.indexed) {
    Value slots = arith::TruncIOp::create(b, k.loc, b.getI32Type(), next());
    Value pair = k.load(b.getI32Type(), k.at(pairs, k.mul(row, 4)));
    number = arith::ExtUIOp::create(b, k.loc, k.i64(), pair);
    token =
        arith::ExtUIOp::create(b, k.loc, k.i64(), arith::DivUIOp::create(b, k.loc, pair, slots));
  }
  Value to = k.at(out, k.mul(token, 128)), scalar;
  if (spec.weighted)
    scalar = k.load(b.getF32Type(), k.at(weights, k.mul(number, 4)));
  if (spec.scaled)
    scalar = scalar ? arith::MulFOp::create(b, k.loc, scalar, next()).getResult() : next();
  Value w = scalar ? vector::BroadcastOp::create(b, k.loc, k.vec(lanes, b.getF32Type()), scalar)
                   : splatF32(b, k.loc, lanes, 1.0f);
  for (int64_t v = 0; v < vectors; ++v) {
    Value panel = v < panelVectors ? to : k.at(to, k.mul(scratchBytes, v / panelVectors));
    Value p = k.at(panel, (v % panelVectors) * lanes * 4);
    Value value = acc[v];
    if (spec.bf16Result)
      value = emitRoundToBF16(b, k.loc, value);
    Value y = k.load(k.vec(lanes, b.getF32Type()), p);
    k.store(vector::FMAOp::create(b, k.loc, w, value, y), p);
  }
  return success();
}
