//===- GemmTiles.cpp - Products on tiles (AMX) ----------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GemmEmitter.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"

using namespace mlir;
using namespace mlir::moe;

/// The sums of a block of up to 16 or 32 rows into `stack`, rows of 32 columns: one or two tiles of
/// rows (4, 5) by the two tiles of a panel (6, 7) into the sums (0 to 3). Tiles have fixed numbers,
/// so there is nothing to allocate and nothing to spill.
///
/// The weights are wanted from the second cache. A kernel of one tile of rows reads its panel once
/// and prefetches it `prefetch` bytes ahead. One of two tiles touches the weights that come later,
/// `ahead` lines at each step, each the next one of a run of its own: walked line by line a
/// prefetch holds the buffers that the loads of tiles wait for, while the hardware's streams follow
/// 32 slow ones (measured by hand on a machine with AMX: a third at 64 to 128 rows).
///
/// With `defer` the block before is finished while this one's products run (by hand: 3 to 8 %).
LogicalResult GemmEmitter::emitTiles() {
  OpBuilder &b = k.b;
  LogicalResult result = success();
  int64_t high = spec.rows / 16;
  auto call = [&](StringRef name, ArrayRef<int64_t> tiles, ValueRange rest = {}) {
    SmallVector<Value> args;
    for (int64_t tile : tiles)
      args.push_back(LLVM::ConstantOp::create(b, k.loc, b.getI8Type(), b.getI8IntegerAttr(tile)));
    llvm::append_range(args, rest);
    LLVM::CallIntrinsicOp::create(b, k.loc, b.getStringAttr("llvm.x86." + name), args);
  };
  auto load = [&](StringRef name, int64_t tile, Value from, int64_t stride) {
    call(name, {tile}, {from, k.index(stride)});
  };
  auto place = [&](int64_t sum) { return k.at(stack, sum / 2 * 16 * 128 + sum % 2 * 64); };
  auto zeroAll = [&] {
    for (int64_t sum = 0; sum < 2 * high; ++sum)
      call("tilezero", {sum});
  };
  if (firstStep)
    k.ifThenElse(k.less(firstStep, k.index(1)), zeroAll, [&] {
      for (int64_t sum = 0; sum < 2 * high; ++sum)
        load("tileloaddt164", sum, place(sum), 128);
    });
  else
    zeroAll();
  // Rows of the block before that this call leaves, some at each step: the instructions of vectors
  // wait for nothing that the tiles do.
  Value waiting;
  auto leaveWaiting = [&](Value row) {
    inBlockBefore([&] {
      SmallVector<Value> sums = addBias(loadSums(k.at(stack, k.mul(row, vectors * lanes * 4))));
      if (failed(leaveRow(row, sums, /*whole=*/false)))
        result = failure();
    });
  };
  if (spec.defer) {
    Value none = LLVM::ZeroOp::create(b, k.loc, k.ptr());
    Value has = arith::AndIOp::create(
        b, k.loc, arith::CmpIOp::create(b, k.loc, arith::CmpIPredicate::eq, endStep, groups),
        LLVM::ICmpOp::create(b, k.loc, LLVM::ICmpPredicate::ne, before, none));
    waiting = arith::SelectOp::create(b, k.loc, has, k.index(32), k.index(0));
  }
  Value aBytes = k.mul(realRows, 64), next = k.at(bPanels, panelBytes);
  Value run = k.mul(groups, 64);
  k.loop(firstStep ? k.sub(endStep, firstStep) : groups, 1, [&](Value step) {
    Value number = step;
    if (firstStep)
      step = k.add(step, firstStep);
    Value a = k.at(aBlock, k.mul(step, aBytes)), w = k.at(bPanels, k.mul(step, 2048));
    if (spec.prefetch && high == 1) {
      for (int64_t line = 0; line < 2048; line += 64)
        k.prefetch(k.at(w, spec.prefetch + line), /*second=*/true);
    } else if (spec.touchesAhead()) {
      Value line = k.at(next, k.mul(step, 64));
      for (int64_t i = 0; i < spec.ahead; ++i, line = k.at(line, run))
        k.prefetch(line, /*second=*/true);
    }
    // Rows by the hint of streams: they come from the second cache and need not evict the weights.
    StringRef loadRows = spec.nearRows ? "tileloadd64" : "tileloaddt164";
    load(loadRows, 4, a, 64);
    load("tileloadd64", 6, w, 128);
    call("tdpbf16ps", {0, 4, 6});
    load("tileloadd64", 7, k.at(w, 64), 128);
    call("tdpbf16ps", {1, 4, 7});
    if (high == 2) {
      load(loadRows, 5, k.at(a, 16 * 64), 64);
      call("tdpbf16ps", {2, 5, 6});
      call("tdpbf16ps", {3, 5, 7});
    }
    if (spec.defer) {
      Value row = k.mul(number, spec.defer);
      k.ifThen(k.less(row, waiting), [&] {
        for (int64_t i = 0; i < spec.defer; ++i)
          leaveWaiting(k.add(row, k.index(i)));
      });
    }
  });
  if (spec.defer) {
    // What a product of few steps had no time for.
    Value done = k.mul(k.sub(endStep, firstStep), spec.defer);
    k.loop(k.sub(waiting, done), 1, [&](Value row) { leaveWaiting(k.add(row, done)); });
  }
  for (int64_t sum = 0; sum < 2 * high; ++sum)
    load("tilestored64", sum, place(sum), 128);
  return result;
}

StringRef moe::getTileFrameName(bool begin) {
  return begin ? "moe_tiles_begin_amx" : "moe_tiles_end_amx";
}

func::FuncOp moe::emitTileFrame(OpBuilder &b, Location loc, bool begin) {
  KernelBuilder k(b, loc);
  func::FuncOp function =
      k.start(getTileFrameName(begin), KernelLevel::V4, {}, "+amx-tile,+amx-bf16");
  if (begin) {
    // Palette 1; bytes of a row of each tile as i16 from byte 16 on, rows as i8 from byte 48 on.
    Value config = LLVM::AllocaOp::create(b, loc, k.ptr(), b.getI8Type(), k.index(64), 64);
    k.store(splatI32(b, loc, 16, 0), config);
    k.store(k.int32(1), config);
    k.store(splatI32(b, loc, 4, 64 << 16 | 64), k.at(config, 16));
    k.store(splatI32(b, loc, 2, 0x10101010), k.at(config, 48));
    LLVM::CallIntrinsicOp::create(b, loc, b.getStringAttr("llvm.x86.ldtilecfg"), config);
  } else {
    LLVM::CallIntrinsicOp::create(b, loc, b.getStringAttr("llvm.x86.tilerelease"), ValueRange{});
  }
  k.finish();
  return function;
}
