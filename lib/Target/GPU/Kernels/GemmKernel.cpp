//===- GemmKernel.cpp - grouped matmul on tensor cores --------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// One thread block computes a tile: packed weight columns by rows of one expert.
//
//   weight (left operand, 16 columns an instruction): the panels of the file as they are. A word
//   holds two steps of the reduction of one column, which is what a thread of mma.m16n8k16 wants,
//   so operands are plain 32-bit loads. Row r of a panel (128 bytes, 8 chunks of 16) keeps chunk c
//   at c ^ 2 (r mod 4): the four rows that a warp reads at once lie in different banks.
//
//   rows (right operand, 8 rows an instruction): row-major, gathered by cp.async, read by
//   ldmatrix. A row of 64 (128) bytes keeps chunk c at c ^ (row / 2 mod 4) (c ^ row mod 8).
//
//   The ring: every step waits for its stage, meets the other warps at one barrier (which also says
//   that nobody reads the stage before it any more), orders the copy of the stage that takes that
//   place, and multiplies.
//
// The reduction runs upwards in steps of 16, in every tile: tiles differ in what they load, not in
// what they add.
//
//===----------------------------------------------------------------------===//

#include "AtomicSums.h"
#include "TileSearch.h"

using namespace mlir;
using namespace mlir::moe;

int64_t GemmKernel::colBlocks() const {
  return llvm::divideCeil(resultWidth, tile.getCols() / weight.getParts());
}

namespace {

class GemmEmitter {
public:
  GemmEmitter(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GemmKernel &spec)
      : g(b, kernel.getLoc()), spec(spec), tile(spec.tile), args(kernel.getArguments()) {}
  LogicalResult emit();

private:
  void findTile(function_ref<void()> body);
  void prepareCopies();
  void copyStage(Value step, Value stage);
  SmallVector<Value> multiply(Value stage, ValueRange sums);
  LogicalResult storeResult(ValueRange sums);

  int64_t parts() const { return spec.weight.getParts(); }
  int64_t stageBytes() const { return tile.getWeightBytes() + tile.getRowBytes(); }
  int64_t steps() const { return llvm::divideCeil(spec.weight.paddedCols(), tile.getK()); }
  /// Whether the last step is only half there.
  bool ragged() const { return spec.weight.paddedCols() % tile.getK() != 0; }
  void copy(Value to, Value from, Value real);

  GPUBuilder g;
  const GemmKernel &spec;
  GPUTileAttr tile;
  ValueRange args;
  Value shared, lane, warp;
  // Of this block.
  Value expert, colBlock, firstRow, rowCount;
  // One copy of this thread per stage: where to, from where at step 0, its chunk of k, and whether
  // it is there at all (null: yes).
  struct Copy {
    Value to, from, chunk, real, active;
  };
  SmallVector<Copy> weightCopies, rowCopies;
};

} // namespace

/// Block b has tile b. Blocks beyond the last tile do nothing.
void GemmEmitter::findTile(function_ref<void()> body) {
  TileSearch search(g, spec, args[3], lane);
  TileSearch::Found found = search.find(g.blockX(), g.c(0), g.c(0));
  g.ifThen(found.found, [&] {
    expert = found.expert;
    auto [column, row, count] =
        search.place(g.blockX(), found.expert, found.before, found.rowTiles);
    colBlock = column, firstRow = row, rowCount = count;
    body();
  });
}

void GemmEmitter::prepareCopies() {
  int64_t threads = tile.getThreads(), chunks = tile.getK() / 8;
  Value tid = g.thread();
  auto each = [&](int64_t count, SmallVector<Copy> &copies, function_ref<Copy(Value)> make) {
    for (int64_t i = 0; i * threads < count; ++i) {
      Value q = g.add(tid, i * threads);
      Value active = (i + 1) * threads <= count ? Value() : g.less(q, count);
      // Threads without a copy compute a place that exists.
      if (active)
        q = g.select(active, q, g.c(0));
      Copy copy = make(q);
      copy.active = active;
      copies.push_back(copy);
    }
  };
  // Rows: chunk c of row r.
  Value rows = args[0], pair = args[1], slots = args[2];
  each(tile.getRows() * chunks, rowCopies, [&](Value q) {
    Value r = g.div(q, chunks), c = g.rem(q, chunks);
    Value real = g.less(r, rowCount);
    Value source = g.add(firstRow, g.select(real, r, g.c(0)));
    if (spec.gather)
      source = g.div(g.loadI32(g.element(pair, source, 4)), slots);
    Value from = g.element(rows, source, spec.rowWidth * 2);
    from = g.at(from, g.wide(g.mul(c, 16)));
    Value turn = tile.getK() == 32 ? g.andi(g.shr(r, 1), 3) : g.andi(r, 7);
    Value to = g.add(g.mul(r, tile.getK() * 2), g.mul(g.xori(c, turn), 16));
    return Copy{g.at(shared, g.add(to, tile.getWeightBytes())), from, c, real, {}};
  });
  // Weight: chunk c of row r (two steps of the reduction) of panel p.
  int64_t panelRows = tile.getK() / 2;
  Value weight = args[4];
  each(tile.getCols() / 32 * panelRows * 8, weightCopies, [&](Value q) {
    Value p = g.div(q, panelRows * 8), r = g.rem(g.div(q, 8), panelRows), c = g.rem(q, 8);
    Value panel = g.add(g.mul(colBlock, tile.getCols() / 32), p);
    Value real = g.less(panel, spec.weight.panelCount());
    Value global = g.add(g.mul(g.wide(expert), spec.weight.panelCount()),
                         g.wide(g.select(real, panel, g.c(0))));
    Value from = g.at(weight, g.mul(global, spec.weight.panelBytes()));
    from = g.at(from, g.wide(g.add(g.mul(r, 128), g.mul(c, 16))));
    Value to = g.add(g.mul(g.add(g.mul(p, panelRows), r), 128),
                     g.mul(g.xori(c, g.shl(g.andi(r, 3), 1)), 16));
    // In units of chunks of the rows: 8 steps of the reduction are 4 rows.
    return Copy{g.at(shared, to), from, g.shr(r, 2), real, {}};
  });
}

/// 16 bytes, or zeros where `real` is false (the source is not read then).
void GemmEmitter::copy(Value to, Value from, Value real) {
  Value bytes = g.select(real, g.c(16), g.c(0));
  NVVM::CpAsyncOp::create(g.b, g.loc, to, from, 16, NVVM::LoadCacheModifierKind::CG, bytes);
}

void GemmEmitter::copyStage(Value step, Value stage) {
  Value place = g.mul(stage, stageBytes());
  auto all = [&](ArrayRef<Copy> copies, int64_t stepBytes) {
    for (const Copy &one : copies) {
      auto issue = [&] {
        Value real = one.real, distance = g.mul(g.wide(step), stepBytes);
        if (ragged()) {
          // Beyond the end of the reduction nothing is read, and zeros are multiplied.
          Value chunk = g.add(g.mul(step, tile.getK() / 8), one.chunk);
          Value inside = g.less(chunk, spec.weight.paddedCols() / 8);
          real = g.andi(real, inside);
          distance = g.select(inside, distance, g.c64(0));
        }
        copy(g.at(one.to, place), g.at(one.from, distance), real);
      };
      one.active ? g.ifThen(one.active, issue) : issue();
    }
  };
  all(weightCopies, tile.getK() / 2 * 128);
  all(rowCopies, tile.getK() * 2);
}

SmallVector<Value> GemmEmitter::multiply(Value stage, ValueRange old) {
  SmallVector<Value> sums(old);
  int64_t colTiles = tile.getColTiles(), rowTiles = tile.getRowTiles();
  int64_t panelRows = tile.getK() / 2, rowBytes = tile.getK() * 2;
  Value place = g.at(shared, g.mul(stage, stageBytes()));
  Value warpCol = g.rem(warp, tile.getWarpsCols()), warpRow = g.div(warp, tile.getWarpsCols());
  Value quad = g.rem(lane, 4), group = g.div(lane, 4);
  Value rowsPlace = g.at(place, tile.getWeightBytes());
  // Words of the left operand: rows of the panel `quad` (+ 4), columns `group` (+ 8, 16, 24).
  // Every row that this thread reads is `quad` mod 4, so the turn is the same for all.
  Value turn = g.shl(quad, 3); // of words: 2 · quad chunks
  SmallVector<Value> column;
  for (int64_t i = 0; i < 4; ++i)
    column.push_back(g.mul(g.xori(g.add(group, i * 8), turn), 4));
  Value panelPlace =
      g.at(place, g.add(g.mul(warpCol, colTiles / 2 * panelRows * 128), g.mul(quad, 128)));
  for (int64_t k = 0; k < tile.getK(); k += 16) {
    SmallVector<Value> left, right;
    for (int64_t m = 0; m < colTiles; ++m)
      for (int64_t i = 0; i < 4; ++i) {
        // Operand i: column + 8 (i mod 2), reduction + 8 (i / 2), which is 4 rows of the panel.
        int64_t row = m / 2 * panelRows + k / 2 + i / 2 * 4;
        Value at = g.at(g.at(panelPlace, column[m % 2 * 2 + i % 2]), row * 128);
        left.push_back(g.load(g.i32(), at, 4));
      }
    for (int64_t n = 0; n < rowTiles; n += 2) {
      // Matrices (rows, k), (rows, k + 8), (rows + 8, k), (rows + 8, k + 8).
      bool two = rowTiles > 1;
      Value r = g.add(g.mul(warpRow, rowTiles * 8), n * 8);
      r = g.add(r, g.rem(lane, 8));
      if (two)
        r = g.add(r, g.mul(g.div(lane, 16), 8));
      Value c = g.add(g.rem(g.div(lane, 8), 2), k / 8);
      Value rowTurn = tile.getK() == 32 ? g.andi(g.shr(r, 1), 3) : g.andi(r, 7);
      Value at = g.at(rowsPlace, g.add(g.mul(r, rowBytes), g.mul(g.xori(c, rowTurn), 16)));
      llvm::append_range(right, g.loadMatrices(at, two ? 4 : 2));
    }
    for (int64_t m = 0; m < colTiles; ++m)
      for (int64_t n = 0; n < rowTiles; ++n)
        g.multiply(MutableArrayRef<Value>(sums).slice((m * rowTiles + n) * 4, 4),
                   ArrayRef<Value>(left).slice(m * 4, 4), ArrayRef<Value>(right).slice(n * 2, 2));
  }
  return sums;
}

/// Result columns and rows meet in shared memory, so that memory is written in whole chunks.
LogicalResult GemmEmitter::storeResult(ValueRange sums) {
  int64_t colTiles = tile.getColTiles(), rowTiles = tile.getRowTiles();
  int64_t cols = tile.getCols() / parts(), pitch = tile.getResultPitch(parts());
  int64_t panelCols = spec.weight.panelCols();
  Value warpCol = g.rem(warp, tile.getWarpsCols()), warpRow = g.div(warp, tile.getWarpsCols());
  Value quad = g.rem(lane, 4), group = g.div(lane, 4);
  Value firstCol = g.mul(colBlock, cols);
  auto sum = [&](int64_t m, int64_t n, int64_t i) { return sums[(m * rowTiles + n) * 4 + i]; };
  // The bias of instruction m, columns `group` and 8 further: lanes as those of a panel.
  SmallVector<Value> bias;
  if (spec.bias) {
    int64_t panels = spec.weight.panelCount();
    Value first = g.add(g.mul(colBlock, tile.getCols() / 32), g.mul(warpCol, colTiles / 2));
    for (int64_t m = 0; m < colTiles; ++m) {
      // Tiles reach beyond the last panel, where the result is not written.
      Value panel = g.min(g.add(first, m / 2), g.c(panels - 1));
      Value index = g.add(g.mul(g.add(g.mul(expert, panels), panel), 32), group);
      for (int64_t half = 0; half < 2; ++half)
        bias.push_back(g.loadF32(g.element(args[6], g.add(index, m % 2 * 16 + half * 8), 4)));
    }
  }
  // Gate and up of a column are in the same thread: instructions 2i and 2i + 1 of a panel.
  for (int64_t m = 0; m < colTiles; m += parts())
    for (int64_t n = 0; n < rowTiles; ++n)
      for (int64_t i = 0; i < 4; ++i) {
        SmallVector<Value> values;
        for (int64_t p = 0; p < parts(); ++p)
          values.push_back(spec.bias ? g.addf(sum(m + p, n, i), bias[(m + p) * 2 + i / 2])
                                     : sum(m + p, n, i));
        Value value = values[0];
        if (spec.epilogue) {
          for (Value &v : values)
            v = g.toVector(v);
          auto results = emitRegionOnVectors(g.b, *spec.epilogue, values);
          if (failed(results))
            return failure();
          value = g.fromVector((*results)[0]);
        }
        // Panel m / 2 of this warp; the columns of the second half only exist without parts.
        int64_t inWarp = m / 2 * panelCols + (parts() == 1 ? m % 2 * 16 : 0) + i / 2 * 8;
        Value col = g.add(g.add(g.mul(warpCol, colTiles / 2 * panelCols), group), inWarp);
        Value row = g.add(g.add(g.mul(warpRow, rowTiles * 8), g.mul(quad, 2)), n * 8 + i % 2);
        // Padding of the result is zero whatever the activation makes of zero.
        if (spec.weight.getRows() < spec.colBlocks() * cols)
          value = g.select(g.less(g.add(firstCol, col), spec.weight.getRows()), value, g.f(0));
        Value place = g.add(g.mul(row, pitch), g.mul(col, 2));
        g.store(g.roundBits(value), g.at(shared, place), 2);
      }
  g.barrier();
  int64_t chunks = cols / 8;
  g.loop(g.thread(), g.c(tile.getRows() * chunks), g.c(tile.getThreads()), [&](Value q) {
    Value row = g.div(q, chunks), chunk = g.rem(q, chunks);
    Value col = g.add(firstCol, g.mul(chunk, 8));
    g.ifThen(g.andi(g.less(row, rowCount), g.less(col, spec.resultWidth)), [&] {
      Value place = g.add(g.mul(row, pitch), g.mul(chunk, 16));
      Value words = g.load(g.vec4(), g.at(shared, place), 16);
      if (spec.add)
        return emitAddToSums(g, spec, args, g.add(firstRow, row), col, words);
      Value index = g.add(g.mul(g.wide(g.add(firstRow, row)), spec.resultWidth), g.wide(col));
      g.store(words, g.element(args[5], index, 2), 16);
    });
  });
  return success();
}

LogicalResult GemmEmitter::emit() {
  int64_t stages = tile.getStages(), count = steps();
  lane = g.rem(g.thread(), 32);
  warp = g.div(g.thread(), 32);
  shared = g.sharedBase();
  LogicalResult result = success();
  auto commit = [&] { NVVM::CpAsyncCommitGroupOp::create(g.b, g.loc); };
  findTile([&] {
    prepareCopies();
    for (int64_t s = 0; s < stages - 1; ++s) {
      if (s < count)
        copyStage(g.c(s), g.c(s));
      commit(); // empty groups keep the count
    }
    // Sums, then the stage that is read and the one that is filled.
    SmallVector<Value> state(tile.getColTiles() * tile.getRowTiles() * 4, g.f(0));
    state.push_back(g.c(0));
    state.push_back(g.c(stages - 1));
    state = g.loop(g.c(0), g.c(count), g.c(1), state,
                   [&](Value step, ValueRange old) -> SmallVector<Value> {
                     Value reads = old[old.size() - 2], fills = old[old.size() - 1];
                     NVVM::CpAsyncWaitGroupOp::create(g.b, g.loc, stages - 2);
                     g.barrier();
                     Value next = g.add(step, stages - 1);
                     g.ifThen(g.less(next, count), [&] { copyStage(next, fills); });
                     commit();
                     SmallVector<Value> sums = multiply(reads, old.drop_back(2));
                     auto turn = [&](Value stage) {
                       Value up = g.add(stage, 1);
                       return g.select(g.equal(up, stages), g.c(0), up);
                     };
                     sums.push_back(turn(reads));
                     sums.push_back(turn(fills));
                     return sums;
                   });
    NVVM::CpAsyncWaitGroupOp::create(g.b, g.loc, 0);
    g.barrier();
    result = storeResult(ValueRange(state).drop_back(2));
  });
  return result;
}

LogicalResult mlir::moe::emitGemm(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GemmKernel &spec) {
  if (spec.tile.isWgmma())
    return emitWgmmaGemm(b, kernel, spec);
  return GemmEmitter(b, kernel, spec).emit();
}
