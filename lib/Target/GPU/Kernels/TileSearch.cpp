//===- TileSearch.cpp - which tile of a grouped matmul is it --------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "TileSearch.h"

using namespace mlir;
using namespace mlir::moe;

/// 32 experts at a time, one a lane: a sum over the lanes says which expert's tiles reach beyond
/// the tile that is looked for.
TileSearch::Found TileSearch::find(Value number, Value firstExpert, Value tilesBefore) {
  int64_t E = spec.weight.getExperts(), rows = spec.tile.getRows();
  // As in Found.
  SmallVector<Value> init = {firstExpert, tilesBefore, g.bit(false), g.c(0), g.c(0), g.c(0)};
  SmallVector<Value> state = g.whileLoop(
      init, [&](ValueRange s) { return g.andi(g.less(s[0], E), g.xori(s[2], g.bit(true))); },
      [&](ValueRange s) -> SmallVector<Value> {
        Value e = g.add(s[0], lane);
        Value count = g.choose(
            g.less(e, E), g.i32(),
            [&]() -> SmallVector<Value> {
              Value begin = g.loadI32(g.element(offsets, e, 4));
              Value end = g.loadI32(g.element(offsets, g.add(e, 1), 4));
              return {g.sub(end, begin)};
            },
            [&]() -> SmallVector<Value> { return {g.c(0)}; })[0];
        Value rowTiles = g.div(g.add(count, rows - 1), rows);
        Value tiles = g.mul(rowTiles, spec.colBlocks()), sum = tiles;
        for (int64_t distance = 1; distance < 32; distance *= 2) {
          Value other = g.shuffle(NVVM::ShflKind::up, sum, g.c(distance));
          sum = g.add(sum, g.select(g.less(lane, distance), g.c(0), other));
        }
        Value end = g.add(s[1], sum);
        Value votes = g.ballot(g.less(number, end));
        Value found = g.icmp(arith::CmpIPredicate::ne, votes, g.c(0));
        Value first = LLVM::CountTrailingZerosOp::create(g.b, g.loc, g.i32(), votes, false);
        auto from = [&](Value v) { return g.shuffle(NVVM::ShflKind::idx, v, g.andi(first, 31)); };
        Value total = g.shuffle(NVVM::ShflKind::idx, end, g.c(31));
        return {g.select(found, s[0], g.add(s[0], 32)),
                g.select(found, s[1], total),
                found,
                g.add(s[0], first),
                from(g.sub(end, tiles)),
                from(rowTiles)};
      });
  return {state[0], state[1], state[2], state[3], state[4], state[5]};
}

TileSearch::Place TileSearch::place(Value number, Value expert, Value before, Value rowTiles) {
  int64_t rows = spec.tile.getRows();
  Value local = g.sub(number, before), rowTile, colBlock;
  if (spec.tile.getRaster() == GPURaster::Rows) {
    colBlock = g.div(local, rowTiles);
    rowTile = g.rem(local, rowTiles);
  } else {
    rowTile = g.div(local, spec.colBlocks());
    colBlock = g.rem(local, spec.colBlocks());
  }
  Value begin = g.loadI32(g.element(offsets, expert, 4));
  Value end = g.loadI32(g.element(offsets, g.add(expert, 1), 4));
  Value firstRow = g.add(begin, g.mul(rowTile, rows));
  return {colBlock, firstRow, g.min(g.c(rows), g.sub(end, firstRow))};
}
