//===- EntryTiler.h - entries become stages of tasks -------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The schedule of the CPU. Three stages of a fused MoE layer:
//
//   route: parallel over row blocks of tokens; the last lane sorts the pairs and lists the chunks
//   up:    task = (chunk of an expert's rows, group of panels of F)
//   down:  task = group of panels of H, for all chunks in ascending order; combines as it goes
//
// A chunk is a run of at most `chunk_rows` rows of one expert. Its rows are cut into blocks of at
// most `rows` rows, all of nearly equal size, so that a kernel computes no row that does not exist.
// Which lane runs which task changes no result: every product is one chain of additions.
//
// A shared expert is one more group, whose rows are all tokens. It adds no stage: its tasks are
// claimed after those of the routed experts in the same stages, and in `down` its rows continue the
// sums of a task's panels.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_CPU_TILE_ENTRYTILER_H
#define MOE_LIB_TARGET_CPU_TILE_ENTRYTILER_H

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Level.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/Dialect/Vector/IR/VectorOps.h"

namespace mlir::moe::tile {

constexpr int64_t kPanelWidth = 32;
/// Rows that one task of an elementwise stage covers.
constexpr int64_t kElementwiseRows = 16;

inline int64_t roundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Index arithmetic that folds constants, at the insertion point of `b`.
class Index {
public:
  Index(OpBuilder &b, Location loc) : b(b), loc(loc) {}

  Value constant(int64_t value) { return arith::ConstantIndexOp::create(b, loc, value); }
  Value add(Value x, Value y) { return b.createOrFold<arith::AddIOp>(loc, x, y); }
  Value sub(Value x, Value y) { return b.createOrFold<arith::SubIOp>(loc, x, y); }
  Value mul(Value x, Value y) { return b.createOrFold<arith::MulIOp>(loc, x, y); }
  Value mul(Value x, int64_t y) { return mul(x, constant(y)); }
  Value div(Value x, Value y) { return b.createOrFold<arith::DivUIOp>(loc, x, y); }
  Value rem(Value x, Value y) { return b.createOrFold<arith::RemUIOp>(loc, x, y); }
  Value min(Value x, Value y) { return b.createOrFold<arith::MinUIOp>(loc, x, y); }
  Value max(Value x, Value y) { return b.createOrFold<arith::MaxUIOp>(loc, x, y); }
  Value ceilDiv(Value x, int64_t y) { return div(add(x, constant(y - 1)), constant(y)); }
  Value ceilDiv(Value x, Value y) { return div(add(x, sub(y, constant(1))), y); }
  /// value · i / n: the i-th of n nearly equal parts.
  Value part(Value value, Value i, Value n) { return div(mul(value, i), n); }
  Value fromI32(Value x) { return arith::IndexCastOp::create(b, loc, b.getIndexType(), x); }
  Value toI32(Value x) { return arith::IndexCastOp::create(b, loc, b.getI32Type(), x); }
  Value load(Value buffer, ValueRange indices) {
    return fromI32(memref::LoadOp::create(b, loc, buffer, indices));
  }

private:
  OpBuilder &b;
  Location loc;
};

/// A run of rows of one expert, cut into blocks.
struct Chunk {
  Value expert, first, rows;
};

/// A block of a chunk: its first row in the chunk, its rows, its number, and how many there are.
struct RowBlock {
  Value begin, rows, number, blocks;
};

/// The rows that a grouped operation works on, and how they are cut into chunks.
struct Groups {
  Value offsets;     ///< memref<(E+1)xi32>; null for a single group
  int64_t experts;   ///< E
  Value singleRows;  ///< number of rows of a single group, else null
  Value plan, count; ///< memref<?x3xi32> and memref<1xi32>, else null
  int64_t chunkRows;
};

using LoopBody = llvm::function_ref<void(OpBuilder &, Value)>;
using TaskBody = llvm::function_ref<SmallVector<Value>(OpBuilder &, Value, ValueRange)>;

class EntryTiler {
public:
  explicit EntryTiler(func::FuncOp func) : func(func), b(func.getContext()), loc(func.getLoc()) {}

  LogicalResult run();

private:
  /// One combine of a chain that ends in y: routed experts, or a shared one.
  struct Summand {
    GroupedMatmulOp op;
    const Groups *groups;
    Value packed;  ///< its rows as blocks; scratch of a lane if they are packed on the way
    Value weights; ///< of the pairs, as a vector; null: 1
    Value gate;    ///< of the tokens, as a vector; null: 1
    Value sums;    ///< between steps of k; null: none
    bool isBlocked() { return op.getStrategyAttr().getSource() == RowSource::Blocked; }
  };

  //===--- Stages ---------------------------------------------------------===//
  /// The earliest stage of that label that runs after everything `ops` read is written, but for
  /// what they hand to each other; a new stage where there is none. What they write is written
  /// there.
  StageOp stageFor(ArrayRef<Operation *> ops, StringRef label, bool withTail = false);
  static OpBuilder atEnd(Region &region) { return OpBuilder::atBlockTerminator(&region.front()); }

  //===--- Pieces of IR ---------------------------------------------------===//
  void forLoop(OpBuilder &b, Value from, Value to, int64_t step, LoopBody body) {
    auto loop = scf::ForOp::create(b, loc, from, to, Index(b, loc).constant(step));
    OpBuilder inner = OpBuilder::atBlockTerminator(loop.getBody());
    body(inner, loop.getInductionVar());
  }
  /// Claims tasks 0 … total−1 until there are none. `guided`: many at once while many are left, so
  /// that a lane's tasks are neighbours. `state` goes from one task to the next on a lane.
  void claimTasks(OpBuilder &b, StageOp stage, Value total, bool guided, ValueRange state,
                  TaskBody body);
  /// Claims tasks of some rows each; body(row) for every row in [0, rows).
  void claimRows(OpBuilder &b, StageOp stage, Value rows, LoopBody body);
  Value alloc(OpBuilder &b, ArrayRef<int64_t> shape, Type element, ValueRange sizes = {}) {
    return memref::AllocOp::create(b, loc, MemRefType::get(shape, element), sizes,
                                   b.getI64IntegerAttr(64));
  }
  /// The tail of a vector buffer from `offset` on.
  Value tailFrom(OpBuilder &b, Value buffer, Value offset);
  /// A compact matrix as one vector buffer; null stays null.
  Value flatten(OpBuilder &b, Value matrix) {
    if (!matrix)
      return matrix;
    return memref::CollapseShapeOp::create(b, loc, matrix, ArrayRef<ReassociationIndices>{{0, 1}});
  }
  Value rowCount(Value buffer) { return b.createOrFold<memref::DimOp>(loc, buffer, 0); }
  /// The physical buffer behind a bufferized intermediate; the buffer itself where it is an
  /// argument.
  Value physical(Value buffer) {
    auto it = buffers.find(buffer);
    return it == buffers.end() ? buffer : it->second;
  }

  Value chunkCount(OpBuilder &b, const Groups &groups);
  Chunk chunkAt(OpBuilder &b, const Groups &groups, Value index);
  Value usedRows(OpBuilder &b, const Groups &groups);
  using BlockBody = llvm::function_ref<void(OpBuilder &, const RowBlock &)>;
  void forBlocks(OpBuilder &b, Value rows, UkernelAttr kernel, BlockBody body);
  /// The tiles of a chunk's blocks and the panels from `first` to `end`, in the strategy's order:
  /// blocks, and in them panels; or chunks of k, in them panels, steps of k, and blocks. `make`
  /// makes the tile of a block and a panel, whose weights come `later` panels before those it
  /// touches ahead. `sums`: for kernels that work in steps, 1024 numbers for every block, and for
  /// every panel where there are chunks of k; else null.
  using TileBody =
      llvm::function_ref<GemmTileOp(OpBuilder &, const RowBlock &, Value, UkernelAttr)>;
  void forTiles(OpBuilder &b, const Chunk &chunk, StrategyAttr strategy, WeightType weight,
                Value first, Value end, Value later, Value sums, TileBody make);
  /// Memory of a lane for sums between steps of k; null where the kernel works in one go.
  Value sumsOf(OpBuilder &b, StrategyAttr strategy, WeightType weight);
  /// Lets `tile` touch its block's share of the panel that is `panels` (an index) later.
  void touchAhead(OpBuilder &b, GemmTileOp tile, Value panels, const RowBlock &block);
  /// Panels from those of chunk `i` to those of the chunk after it.
  Value panelsToNextChunk(OpBuilder &b, WeightType weight, const Groups &groups, Value i,
                          const Chunk &chunk);
  void sortPairs(OpBuilder &b, Value ids, const Groups &groups, Value pair, Value cursor);
  /// Panels per task of a stage that owns its panels for all rows.
  Value panelsPerTask(OpBuilder &b, StageOp stage, int64_t panels, int64_t most, int64_t step,
                      int64_t sumRows, Value tokens);
  Value panelScratch(OpBuilder &b, int64_t most, int64_t step, int64_t sumRows, Value tokens);
  Value panelView(OpBuilder &b, Value scratch, Value panel, int64_t panels, Value tokens);
  /// Tasks of at most `most` of `panels` panels, and `sumRows` rows, of sums: begins them as `op`'s
  /// clauses say, lets `body(first panel, end panel, view of a panel)` add to them, ends them in y.
  template <typename OpTy>
  void claimPanels(OpBuilder &b, StageOp stage, OpTy first, Value y, int64_t panels, int64_t most,
                   int64_t step, int64_t sumRows,
                   llvm::function_ref<void(OpBuilder &, Value, Value,
                                           llvm::function_ref<Value(OpBuilder &, Value)>)>
                       body);

  //===--- Vectors --------------------------------------------------------===//
  Value loadF32(OpBuilder &b, Value buffer, ValueRange indices, int64_t lanes);
  void storeF32(OpBuilder &b, Value value, Value buffer, ValueRange indices);
  Value applyRegion(OpBuilder &b, Region &region, ValueRange arguments, VectorType type);

  //===--- Operations -----------------------------------------------------===//
  template <typename OpTy>
  LogicalResult tileRouter(OpTy op, Value outLogits,
                           std::optional<std::pair<Value, Value>> dispatch);
  LogicalResult tile(RouterOp op);
  LogicalResult tile(RouteDispatchOp op);
  LogicalResult tile(DispatchOp op);
  LogicalResult tile(SingleGroupOp op);
  LogicalResult tile(GatherOp op);
  LogicalResult tile(GroupedMatmulOp op);
  LogicalResult tile(ActivateOp op);
  LogicalResult tile(CombineOp op);
  LogicalResult tileMatmulToBuffer(GroupedMatmulOp op, const Groups &groups);
  LogicalResult tileMatmulCombine(GroupedMatmulOp op);

  FailureOr<Groups> makeGroups(Value offsets, Value rows, int64_t experts);
  FailureOr<Groups *> groupsOf(Operation *op, Value offsets);
  /// Packs block `rows` from sorted row `first` of the matmul's rows into `into`.
  void packBlock(OpBuilder &b, GroupedMatmulOp op, Value first, Value rows, Value into);
  /// Packs all blocks of a chunk, `stride` elements a row, into `into`.
  void packChunk(OpBuilder &b, GroupedMatmulOp op, const Chunk &chunk, Value into, int64_t stride);
  /// The combine that goes on with the sums of `op`, if that alone uses them.
  GroupedMatmulOp continuation(GroupedMatmulOp op);
  int64_t nextCounter() { return counters++; }
  int64_t lanesOf() const { return level->lanes(); }

  func::FuncOp func;
  /// Stands before the stages: scratch and sizes that several stages use are made there.
  OpBuilder b;
  Location loc;
  const CPULevel *level = nullptr;
  int64_t counters = 0;
  SmallVector<StageOp> stages;
  DenseMap<Value, size_t> written; ///< number of the stage in which a buffer is written
  DenseMap<Value, Value> buffers;
  DenseMap<Value, Groups> groupings;
};

} // namespace mlir::moe::tile

#endif // MOE_LIB_TARGET_CPU_TILE_ENTRYTILER_H
