//===- SortKernel.cpp - stable counting sort by expert on a GPU -----------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GPUBuilder.h"

using namespace mlir;
using namespace mlir::moe;

// Each block reads all ids: they are few, in L2 after the first block and in L1 for the blocks that
// share a processor; in return there is one launch, no atomic and no order to restore.
void mlir::moe::emitSort(OpBuilder &b, LLVM::LLVMFuncOp kernel, int64_t E) {
  GPUBuilder g(b, kernel.getLoc());
  ValueRange args = kernel.getArguments();
  Value ids = args[0], count = args[1], slots = args[2];
  Value offsets = args[3], pair = args[4], order = args[5];
  constexpr int64_t warps = kSortThreads / 32;
  Value expert = g.blockX(), lane = g.rem(g.thread(), 32), warp = g.div(g.thread(), 32);
  // Every warp has one stretch of ids, so that its rows are known before it writes them.
  Value length = g.mul(g.div(g.add(count, warps * 32 - 1), warps * 32), 32);
  Value begin = g.mul(warp, length), end = g.min(count, g.add(begin, length));

  // Ids below this expert, and its own.
  auto idAt = [&](Value i) {
    auto read = scf::IfOp::create(g.b, g.loc, g.i32(), g.less(i, end), /*withElse=*/true);
    OpBuilder::InsertionGuard guard(g.b);
    g.b.setInsertionPointToStart(read.thenBlock());
    scf::YieldOp::create(g.b, g.loc, g.loadI32(g.element(ids, i, 4)));
    g.b.setInsertionPointToStart(read.elseBlock());
    scf::YieldOp::create(g.b, g.loc, g.c(-1));
    return read.getResult(0);
  };
  auto counts = g.loop(begin, end, g.c(32), {g.c(0), g.c(0)},
                       [&](Value i, ValueRange state) -> SmallVector<Value> {
                         Value id = idAt(g.add(i, lane));
                         // Negative ids are large as unsigned numbers.
                         Value below = g.icmp(arith::CmpIPredicate::ult, id, expert);
                         return {g.add(state[0], g.popcount(g.ballot(below))),
                                 g.add(state[1], g.popcount(g.ballot(g.equal(id, expert))))};
                       });
  Value shared = g.sharedBase();
  g.ifThen(g.equal(lane, 0), [&] {
    Value place = g.at(shared, g.mul(warp, 8));
    g.store(counts[0], place, 4);
    g.store(counts[1], g.at(place, 4), 4);
  });
  g.barrier();
  Value first = g.c(0), start = g.c(0), rows = g.c(0);
  for (int64_t w = 0; w < warps; ++w) {
    Value own = g.loadI32(g.at(shared, w * 8 + 4));
    first = g.add(first, g.loadI32(g.at(shared, w * 8)));
    start = g.add(start, g.select(g.less(g.c(w), warp), own, g.c(0)));
    rows = g.add(rows, own);
  }
  g.ifThen(g.equal(g.thread(), 0), [&] {
    g.store(first, g.element(offsets, expert, 4), 4);
    g.ifThen(g.equal(expert, E - 1),
             [&] { g.store(g.add(first, rows), g.element(offsets, g.c(E), 4), 4); });
  });

  g.loop(begin, end, g.c(32), {g.add(first, start)},
         [&](Value i, ValueRange state) -> SmallVector<Value> {
           Value position = g.add(i, lane), id = idAt(position);
           Value match = g.equal(id, expert);
           Value votes = g.ballot(match);
           g.ifThen(match, [&] {
             Value row = g.add(state[0], g.popcount(g.andi(votes, g.maskBelow(lane))));
             g.store(position, g.element(pair, row, 4), 4);
             // The rank among the token's rows: by expert, then by slot.
             Value token = g.div(position, slots), slot = g.rem(position, slots);
             Value firstSlot = g.mul(token, slots);
             auto rank = g.loop(
                 g.c(0), slots, g.c(1), {g.c(0)},
                 [&](Value other, ValueRange before) -> SmallVector<Value> {
                   Value otherId = g.loadI32(g.element(ids, g.add(firstSlot, other), 4));
                   Value earlier = g.ori(g.icmp(arith::CmpIPredicate::ult, otherId, expert),
                                         g.andi(g.equal(otherId, expert), g.less(other, slot)));
                   return {g.add(before[0],
                                 arith::ExtUIOp::create(g.b, g.loc, g.i32(), earlier).getResult())};
                 });
             g.store(row, g.element(order, g.add(firstSlot, rank[0]), 4), 4);
           });
           return {g.add(state[0], g.popcount(votes))};
         });
}
