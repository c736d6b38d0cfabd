//===- GemmKernel.cpp - Matrix kernels of exact tile sizes ----------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GemmEmitter.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"

#include <algorithm>

using namespace mlir;
using namespace mlir::moe;

//===----------------------------------------------------------------------===//
// The k loop
//===----------------------------------------------------------------------===//

/// Element `step` of a row of the group at `a` in every lane: one k in f32, or a pair of bf16.
Value GemmEmitter::loadA(Value a, int64_t row, int64_t step) {
  OpBuilder &b = k.b;
  Type element = spec.isDot() ? Type(b.getI32Type()) : b.getF32Type();
  Value scalar = k.load(element, k.at(a, row * 64 + step * 4));
  if (spec.isWide()) {
    element = b.getF64Type();
    scalar = arith::ExtFOp::create(b, k.loc, element, scalar);
  }
  Value v = vector::BroadcastOp::create(b, k.loc, k.vec(lanes, element), scalar);
  return spec.isDot() ? vector::BitCastOp::create(b, k.loc, k.vec(2 * lanes, b.getBF16Type()), v)
                      : v;
}

/// acc + a * b, for each of a pair in turn.
Value GemmEmitter::product(Value av, Value bv, Value acc) {
  OpBuilder &b = k.b;
  if (!spec.isDot())
    return vector::FMAOp::create(b, k.loc, av, bv, acc);
  return LLVM::CallIntrinsicOp::create(b, k.loc, acc.getType(),
                                       b.getStringAttr("llvm.x86.avx512bf16.dpbf16ps.512"),
                                       ValueRange{acc, av, bv})
      .getResult(0);
}

/// Vector `vector` of one row of the panels: one k of f32 weights, a row of bf16 pairs, or its even
/// or odd k as f32.
Value GemmEmitter::loadB(ArrayRef<Value> panelRows, int64_t vector, bool odd) {
  OpBuilder &b = k.b;
  Value p = k.at(panelRows[vector / panelVectors], (vector % panelVectors) * lanes * 4);
  if (spec.isDot())
    return k.load(k.vec(2 * lanes, b.getBF16Type()), p);
  if (!spec.bf16Weights) {
    Value v = k.load(k.vec(lanes, b.getF32Type()), p);
    if (spec.isWide())
      v = arith::ExtFOp::create(b, k.loc, k.vec(lanes, b.getF64Type()), v);
    return v;
  }
  Value pairs = k.load(k.vec(lanes, b.getI32Type()), p);
  if (!odd)
    return k.widenBits(pairs);
  Value mask = maskSlot ? LLVM::LoadOp::create(b, k.loc, k.vec(lanes, b.getI32Type()), maskSlot,
                                               /*alignment=*/64, /*isVolatile=*/true)
                              .getResult()
                        : highMask();
  Value high = arith::AndIOp::create(b, k.loc, pairs, mask);
  return vector::BitCastOp::create(b, k.loc, k.vec(lanes, b.getF32Type()), high);
}

/// Steps of k for `steps` rows of b: acc[r][v] += a[r] * b[v]. `a` points at element (0, k) of a
/// group of the block, `bRow` at the first row of the first panel. The order of emission is what
/// keeps the registers: the fewer of the two operands is held whole, the other passes through one
/// register.
SmallVector<Value> GemmEmitter::emitSteps(Value a, Value bRow, int64_t steps,
                                          SmallVector<Value> acc) {
  OpBuilder &b = k.b;
  int64_t halves = stepsPerRow();
  auto barrier = [&] {
    LLVM::FenceOp::create(b, k.loc, LLVM::AtomicOrdering::acq_rel, "singlethread");
  };
  // Within a step as many loads may move up as there are free registers; a widened load takes two.
  int64_t free = getLevelRegisters(spec.level) - spec.getRegisters();
  int64_t ahead = std::max<int64_t>(1, free / 2);
  for (int64_t row = 0; row < steps; ++row) {
    SmallVector<Value> panelRows;
    for (int64_t p = 0; p < spec.panels; ++p) {
      Value panel = p ? k.at(bRow, k.mul(panelBytes, p)) : bRow;
      panelRows.push_back(k.at(panel, row * 128));
    }
    if (spec.prefetch)
      for (Value panelRow : panelRows)
        for (int64_t line : {0, 64})
          k.prefetch(k.at(panelRow, spec.prefetch + line), spec.prefetchesL2());
    for (int64_t half = 0; half < halves; ++half) {
      int64_t step = row * halves + half;
      // Steps are separated by a barrier: it emits no instruction and keeps the scheduler from
      // moving the next step's loads up, into registers that the tile has not got. The odd half of
      // a bf16 row therefore loads its pairs again instead of holding them.
      if (step)
        barrier();
      auto fma = [&](int64_t r, int64_t v, Value av, Value bv) {
        Value &c = acc[r * vectors + v];
        c = product(av, bv, c);
      };
      if (spec.isBFirst()) {
        SmallVector<Value> bv;
        for (int64_t v = 0; v < vectors; ++v)
          bv.push_back(loadB(panelRows, v, half));
        for (int64_t r = 0; r < spec.rows; ++r) {
          if (r && r % ahead == 0)
            barrier();
          Value av = loadA(a, r, step);
          for (int64_t v = 0; v < vectors; ++v)
            fma(r, v, av, bv[v]);
        }
      } else {
        SmallVector<Value> av;
        for (int64_t r = 0; r < spec.rows; ++r)
          av.push_back(loadA(a, r, step));
        for (int64_t v = 0; v < vectors; ++v) {
          if (v && v % ahead == 0)
            barrier();
          Value bv = loadB(panelRows, v, half);
          for (int64_t r = 0; r < spec.rows; ++r)
            fma(r, v, av[r], bv);
        }
      }
    }
  }
  return acc;
}

/// The accumulators of the tile, row by row: a loop over the groups of columns of a, and in it
/// a loop over the group's rows of b unless they are unrolled whole.
SmallVector<Value> GemmEmitter::emitProduct() {
  OpBuilder &b = k.b;
  int64_t stepsPerRow = this->stepsPerRow(), groupRows = 16 / stepsPerRow;
  // About 48 multiply-adds per loop body: the counter and the branch are then noise, and the body
  // stays within the cache of decoded instructions.
  int64_t unroll = 1;
  while (unroll < groupRows && unroll * stepsPerRow * spec.rows * vectors < 48)
    unroll *= 2;

  Type element = spec.isWide() ? b.getF64Type() : b.getF32Type();
  Value zero = arith::ConstantOp::create(b, k.loc, b.getZeroAttr(k.vec(lanes, element)));
  SmallVector<Value> init(spec.rows * vectors, zero);
  if (spec.steps) {
    // Through memory at the first step, too: both ways into the loop are then one.
    k.ifThen(k.less(firstStep, k.index(1)), [&] { storeSums(init); });
    for (int64_t row = 0; row < spec.rows; ++row)
      llvm::copy(loadSums(k.at(stack, row * vectors * lanes * 4)), init.begin() + row * vectors);
  }
  // Lines of the next task's weights, each the next one of a run as long as there are groups.
  Value next, run;
  if (spec.touchesAhead()) {
    next = k.at(bPanels, panelBytes);
    run = k.mul(groups, 64);
  }
  auto body = [&](Value group, ValueRange acc) -> SmallVector<Value> {
    if (firstStep)
      group = k.add(group, firstStep);
    Value a = k.at(aBlock, k.mul(group, spec.rows * 64));
    Value bRow = k.at(bPanels, k.mul(group, groupRows * 128));
    if (spec.touchesAhead()) {
      Value line = k.at(next, k.mul(group, 64));
      for (int64_t i = 0; i < spec.ahead; ++i, line = k.at(line, run))
        k.prefetch(line, /*second=*/true);
    }
    if (unroll == groupRows)
      return emitSteps(a, bRow, unroll, SmallVector<Value>(acc));
    return k.loop(
        k.index(groupRows), unroll, acc, [&](Value row, ValueRange inner) -> SmallVector<Value> {
          return emitSteps(k.at(a, k.mul(row, stepsPerRow * 4)), k.at(bRow, k.mul(row, 128)),
                           unroll, SmallVector<Value>(inner));
        });
  };
  SmallVector<Value> sums = k.loop(firstStep ? k.sub(endStep, firstStep) : groups, 1, init, body);
  if (spec.steps)
    storeSums(sums);
  if (spec.isWide()) {
    sums = addBias(sums);
    for (Value &sum : sums)
      sum = arith::TruncFOp::create(b, k.loc, k.vec(lanes, b.getF32Type()), sum);
  }
  return sums;
}

//===----------------------------------------------------------------------===//
// The kernel
//===----------------------------------------------------------------------===//

/// Touches the sums that the rows will be added to: by the time that the product is done they have
/// come from wherever they were.
void GemmEmitter::touchSums() {
  OpBuilder &b = k.b;
  Value pairs = formArgs[1];
  Value slots = arith::TruncIOp::create(b, k.loc, b.getI32Type(), formArgs[spec.weighted ? 3 : 2]);
  for (int64_t row = 0; row < spec.rows; ++row) {
    Value pair = k.load(b.getI32Type(), k.at(pairs, row * 4));
    Value token =
        arith::ExtUIOp::create(b, k.loc, k.i64(), arith::DivUIOp::create(b, k.loc, pair, slots));
    Value sums = k.at(out, k.mul(token, 128));
    for (int64_t line : {0, 64})
      k.prefetch(k.at(sums, line));
  }
}

FailureOr<func::FuncOp> GemmEmitter::emit() {
  if (failed(spec.verify(k.loc)))
    return failure();
  Type ptr = k.ptr(), i64 = k.i64();
  SmallVector<Type> args = {ptr, ptr, i64, i64, ptr};
  if (spec.isTile())
    args.push_back(i64);
  if (spec.bias)
    args.push_back(ptr);
  unsigned formArg = args.size();
  switch (spec.form) {
  case KernelForm::Blocked:
    args.append(fillsGroup() ? 2 : 1, i64);
    break;
  case KernelForm::Rows:
    args.append({i64, i64, i64});
    break;
  case KernelForm::Combine:
    args.push_back(i64);
    if (spec.indexed)
      args.push_back(ptr);
    if (spec.weighted)
      args.push_back(ptr);
    if (spec.indexed)
      args.push_back(i64);
    if (spec.scaled)
      args.push_back(k.b.getF32Type());
    break;
  }
  if (spec.steps)
    args.append({i64, i64, ptr});
  unsigned stepArg = args.size() - (spec.steps ? 3 : 0);
  if (spec.defer)
    args.append({ptr, i64});
  func::FuncOp function = k.start(spec.getName(), spec.level, args, spec.getFeatures());
  aBlock = function.getArgument(0);
  bPanels = function.getArgument(1);
  groups = function.getArgument(2);
  panelBytes = function.getArgument(3);
  out = function.getArgument(4);
  if (spec.isTile())
    realRows = function.getArgument(5);
  if (spec.bias)
    bias = function.getArgument(formArg - 1);
  for (unsigned i = formArg; i < stepArg; ++i)
    formArgs.push_back(function.getArgument(i));
  if (spec.steps) {
    firstStep = function.getArgument(stepArg);
    endStep = function.getArgument(stepArg + 1);
    stack = function.getArgument(stepArg + 2);
  }
  if (spec.defer) {
    before = function.getArgument(stepArg + 3);
    last = function.getArgument(stepArg + 4);
  }

  if (spec.rows > 1 && !stack)
    stack = LLVM::AllocaOp::create(k.b, k.loc, ptr, k.b.getF32Type(),
                                   k.index(spec.rows * vectors * lanes), 64);
  // A tile that fills the registers has none for the mask of odd k. It is then read from the stack
  // at every use (volatile: the compiler would keep it in a register, and spill an accumulator).
  // AVX2 code widens into a second register, so it runs out earlier.
  int64_t spare = spec.level == KernelLevel::V3 ? 6 : spec.isBFirst();
  if (stepsPerRow() == 2 && spec.getRegisters() + spare >= getLevelRegisters(spec.level)) {
    maskSlot = LLVM::AllocaOp::create(k.b, k.loc, ptr, k.b.getF32Type(), k.index(lanes), 64);
    k.store(highMask(), maskSlot);
  }
  if (spec.touchesSums())
    touchSums();
  SmallVector<Value> acc;
  LogicalResult stored = success();
  if (spec.isTile())
    stored = emitTiles();
  else
    acc = emitProduct();
  auto storeAll = [&](bool whole) {
    if (failed(forEachRow(
            acc, [&](Value row, ArrayRef<Value> rowAcc) { return leaveRow(row, rowAcc, whole); })))
      stored = failure();
  };
  auto leave = [&] {
    if (spec.form == KernelForm::Rows) {
      Value cut = k.less(formArgs[2], k.index(spec.panels * panelColumns()));
      k.ifThenElse(cut, [&] { storeAll(false); }, [&] { storeAll(true); });
    } else {
      storeAll(true);
    }
  };
  if (spec.steps) {
    Value due = arith::CmpIOp::create(k.b, k.loc, arith::CmpIPredicate::eq, endStep, groups);
    if (spec.defer)
      due = arith::AndIOp::create(
          k.b, k.loc, due,
          arith::CmpIOp::create(k.b, k.loc, arith::CmpIPredicate::ne, last, k.index(0)));
    k.ifThen(due, leave);
  } else {
    leave();
  }
  k.finish();
  if (failed(stored)) {
    function.erase();
    return failure();
  }
  return function;
}

FailureOr<func::FuncOp> moe::emitGemmKernel(OpBuilder &b, Location loc,
                                            const GemmKernelSpec &spec) {
  return GemmEmitter(b, loc, spec).emit();
}
