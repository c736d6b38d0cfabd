//===- TileTasks.cpp - entries become stages of tasks ---------------------===//
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
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/CPU/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/Dialect/Vector/IR/VectorOps.h"
#include "mlir/IR/IRMapping.h"
#include "llvm/ADT/TypeSwitch.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOECPUTILETASKS
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

constexpr int64_t kPanelWidth = 32;
/// Rows of f32 of one panel (32 columns) that a lane's sums may have: 512 KB, which leaves room for
/// the row blocks and the panel in a 1 MB L2. Larger T makes tasks narrower, not the scratch
/// larger.
constexpr int64_t kScratchRows = 4096;
/// Rows that one task of an elementwise stage covers.
constexpr int64_t kElementwiseRows = 16;

int64_t roundUp(int64_t value, int64_t multiple) {
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

/// The rows that a grouped operation works on, and how they are cut into chunks.
struct Groups {
  Value offsets;     ///< memref<(E+1)xi32>; null for a single group
  int64_t experts;   ///< E
  Value singleRows;  ///< number of rows of a single group, else null
  Value plan, count; ///< memref<?x3xi32> and memref<1xi32>, else null
  int64_t chunkRows;
};

using LoopBody = llvm::function_ref<void(OpBuilder &, Value)>;
using ExpertBody = llvm::function_ref<void(OpBuilder &, Value, Value)>;

class EntryTiler {
public:
  explicit EntryTiler(func::FuncOp func) : func(func), b(func.getContext()), loc(func.getLoc()) {}

  LogicalResult run();

private:
  //===--- Pieces of IR ---------------------------------------------------===//
  void forLoop(OpBuilder &b, Value from, Value to, int64_t step, LoopBody body) {
    auto loop = scf::ForOp::create(b, loc, from, to, Index(b, loc).constant(step));
    OpBuilder inner = OpBuilder::atBlockTerminator(loop.getBody());
    body(inner, loop.getInductionVar());
  }
  /// Claims tasks 0 … total−1 until there are none. `guided`: many at once while many are left, so
  /// that a lane's tasks are neighbours. `state` goes from one task to the next on a lane.
  void claimTasks(OpBuilder &b, StageOp stage, Value total, bool guided, ValueRange state,
                  llvm::function_ref<SmallVector<Value>(OpBuilder &, Value, ValueRange)> body);
  Value alloc(OpBuilder &b, ArrayRef<int64_t> shape, Type element, ValueRange sizes = {}) {
    return memref::AllocOp::create(b, loc, MemRefType::get(shape, element), sizes,
                                   b.getI64IntegerAttr(64));
  }
  /// The tail of a vector buffer from `offset` on.
  Value tailFrom(OpBuilder &b, Value buffer, Value offset) {
    Index index(b, loc);
    Value size = index.sub(b.createOrFold<memref::DimOp>(loc, buffer, 0), offset);
    return memref::SubViewOp::create(b, loc, buffer, ArrayRef<OpFoldResult>{offset},
                                     ArrayRef<OpFoldResult>{size},
                                     ArrayRef<OpFoldResult>{b.getIndexAttr(1)});
  }
  /// Rows of a matrix of scratch as one vector buffer.
  Value flatten(OpBuilder &b, Value matrix) {
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
  /// for every block of a chunk: body(first row of the block in the chunk, rows of the block).
  void forBlocks(OpBuilder &b, Value rows, UkernelAttr kernel,
                 llvm::function_ref<void(OpBuilder &, Value, Value)> body);
  void sortPairs(OpBuilder &b, Value ids, const Groups &groups, Value pair, Value cursor);
  /// Panels per task of a stage that owns its panels for all rows.
  Value panelsPerTask(OpBuilder &b, StageOp stage, int64_t panels, int64_t most, int64_t step,
                      Value tokens);
  Value panelScratch(OpBuilder &b, int64_t most, int64_t step, Value tokens);
  Value panelView(OpBuilder &b, Value scratch, Value panel, int64_t panels, Value tokens);

  //===--- Vectors --------------------------------------------------------===//
  Value loadF32(OpBuilder &b, Value buffer, ValueRange indices, int64_t lanes);
  void storeF32(OpBuilder &b, Value value, Value buffer, ValueRange indices);
  Value applyRegion(OpBuilder &b, Region &region, ValueRange arguments, VectorType type);

  //===--- Operations -----------------------------------------------------===//
  LogicalResult tileRouter(Operation *op, Value x, Value weight, Value outWeights, Value outExperts,
                           Value outLogits, RouterAttr router, std::optional<Type> compute,
                           StrategyAttr strategy, std::optional<std::pair<Value, Value>> dispatch);
  LogicalResult tileDispatch(DispatchOp op);
  LogicalResult tileSingleGroup(SingleGroupOp op);
  LogicalResult tileGather(GatherOp op);
  LogicalResult tileMatmul(GroupedMatmulOp op);
  LogicalResult tileMatmulToBuffer(GroupedMatmulOp op, const Groups &groups);
  LogicalResult tileMatmulCombine(GroupedMatmulOp op, const Groups &groups);
  LogicalResult tileActivate(ActivateOp op);
  LogicalResult tileCombine(CombineOp op);

  FailureOr<Groups> makeGroups(Operation *op, Value offsets, Value rows, int64_t experts);
  FailureOr<Groups *> groupsOf(Operation *op, Value offsets);
  /// Packs block `rows` from sorted row `first` of the matmul's rows into `into`.
  void packBlock(OpBuilder &b, GroupedMatmulOp op, Value first, Value rows, Value into);
  /// Element type of the row blocks that a kernel reads, and elements per row of K columns.
  static std::pair<Type, int64_t> blockOf(UkernelAttr kernel, int64_t cols) {
    Builder b(kernel.getContext());
    return kernel.getProduct() == KernelProduct::Fma
               ? std::make_pair(Type(b.getF32Type()), roundUp(cols, 16))
               : std::make_pair(Type(b.getBF16Type()), roundUp(cols, 32));
  }
  /// Elements beyond a row block that a kernel may read: a tile is loaded whole, whatever the rows.
  static int64_t blockSlack(UkernelAttr kernel) {
    return kernel.getProduct() == KernelProduct::TileBF16 ? 16 * 32 : 0;
  }
  int64_t nextCounter() { return counters++; }
  int64_t lanesOf() const { return level->lanes(); }
  Value accumulateOf(OpBuilder &b, Value accumulate) {
    return accumulate ? accumulate : arith::ConstantIntOp::create(b, loc, 0, 1).getResult();
  }

  func::FuncOp func;
  OpBuilder b;
  Location loc;
  const CPULevel *level = nullptr;
  int64_t counters = 0;
  DenseMap<Value, Value> buffers;
  DenseMap<Value, Groups> groupings;
};

} // namespace

//===----------------------------------------------------------------------===//
// Pieces of IR
//===----------------------------------------------------------------------===//

void EntryTiler::claimTasks(
    OpBuilder &b, StageOp stage, Value total, bool guided, ValueRange state,
    llvm::function_ref<SmallVector<Value>(OpBuilder &, Value, ValueRange)> body) {
  int64_t counter = nextCounter();
  Index index(b, loc);
  Type indexType = b.getIndexType();
  SmallVector<Value> inits = {index.constant(0)};
  llvm::append_range(inits, state);
  SmallVector<Type> stateTypes(state.getTypes());
  SmallVector<Type> beforeTypes = {indexType};
  llvm::append_range(beforeTypes, stateTypes);
  SmallVector<Type> afterTypes = {indexType, indexType};
  llvm::append_range(afterTypes, stateTypes);
  SmallVector<Location> beforeLocs(beforeTypes.size(), loc), afterLocs(afterTypes.size(), loc);

  auto loop = scf::WhileOp::create(b, loc, afterTypes, inits);
  {
    OpBuilder::InsertionGuard guard(b);
    Block *before = b.createBlock(&loop.getBefore(), {}, beforeTypes, beforeLocs);
    b.setInsertionPointToStart(before);
    Value count = index.constant(1);
    if (guided) {
      // Half of an equal share of what is left: few claims at first, small ones at the end.
      Value left = index.sub(total, before->getArgument(0));
      count = index.max(index.div(left, index.mul(stage.getLanes(), 2)), count);
    }
    Value first = ClaimOp::create(b, loc, indexType, b.getI64IntegerAttr(counter), count);
    Value more = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ult, first, total);
    SmallVector<Value> passed = {first, count};
    llvm::append_range(passed, before->getArguments().drop_front(1));
    scf::ConditionOp::create(b, loc, more, passed);
  }
  {
    OpBuilder::InsertionGuard guard(b);
    Block *after = b.createBlock(&loop.getAfter(), {}, afterTypes, afterLocs);
    b.setInsertionPointToStart(after);
    Value first = after->getArgument(0);
    ValueRange carried = after->getArguments().drop_front(2);
    SmallVector<Value> results;
    Value end;
    if (guided) {
      end = index.min(index.add(first, after->getArgument(1)), total);
      auto tasks =
          scf::ForOp::create(b, loc, first, end, index.constant(1), carried,
                             [&](OpBuilder &inner, Location, Value task, ValueRange state) {
                               scf::YieldOp::create(inner, loc, body(inner, task, state));
                             });
      results.assign(tasks.getResults().begin(), tasks.getResults().end());
    } else {
      end = first;
      results = body(b, first, carried);
    }
    results.insert(results.begin(), end);
    scf::YieldOp::create(b, loc, results);
  }
}

Value EntryTiler::chunkCount(OpBuilder &b, const Groups &groups) {
  Index index(b, loc);
  if (groups.singleRows)
    return index.ceilDiv(groups.singleRows, groups.chunkRows);
  return index.load(groups.count, index.constant(0));
}

Chunk EntryTiler::chunkAt(OpBuilder &b, const Groups &groups, Value i) {
  Index index(b, loc);
  if (groups.singleRows) {
    Value count = chunkCount(b, groups);
    Value first = index.part(groups.singleRows, i, count);
    Value end = index.part(groups.singleRows, index.add(i, index.constant(1)), count);
    return {index.constant(0), first, index.sub(end, first)};
  }
  auto field = [&](int64_t f) { return index.load(groups.plan, {i, index.constant(f)}); };
  return {field(0), field(1), field(2)};
}

Value EntryTiler::usedRows(OpBuilder &b, const Groups &groups) {
  Index index(b, loc);
  if (groups.singleRows)
    return groups.singleRows;
  return index.load(groups.offsets, index.constant(groups.experts));
}

void EntryTiler::forBlocks(OpBuilder &b, Value rows, UkernelAttr kernel,
                           llvm::function_ref<void(OpBuilder &, Value, Value)> body) {
  Index index(b, loc);
  Value blocks = index.ceilDiv(rows, kernel.getRows());
  if (kernel.getProduct() == KernelProduct::TileBF16) {
    // Tiles are whole: blocks of nearly equal size would cut more of them.
    forLoop(b, index.constant(0), rows, kernel.getRows(), [&](OpBuilder &b, Value begin) {
      Index index(b, loc);
      body(b, begin, index.min(index.sub(rows, begin), index.constant(kernel.getRows())));
    });
    return;
  }
  forLoop(b, index.constant(0), blocks, 1, [&](OpBuilder &b, Value block) {
    Index index(b, loc);
    Value begin = index.part(rows, block, blocks);
    Value end = index.part(rows, index.add(block, index.constant(1)), blocks);
    body(b, begin, index.sub(end, begin));
  });
}

/// Stable counting sort of ids into offsets and pair, then the list of chunks.
void EntryTiler::sortPairs(OpBuilder &b, Value ids, const Groups &groups, Value pair,
                           Value cursor) {
  Index index(b, loc);
  Value zero = index.constant(0), one = index.constant(1);
  Value experts = index.constant(groups.experts);
  Value flat = flatten(b, ids);
  Value pairs = b.createOrFold<memref::DimOp>(loc, flat, 0);
  auto constantI32 = [&](OpBuilder &b, int64_t value) -> Value {
    return arith::ConstantIntOp::create(b, loc, value, 32);
  };
  Value offsets = groups.offsets;

  forLoop(b, zero, index.add(experts, one), 1, [&](OpBuilder &b, Value e) {
    memref::StoreOp::create(b, loc, constantI32(b, 0), offsets, e);
  });
  auto forKnownIds = [&](ExpertBody body) {
    forLoop(b, zero, pairs, 1, [&](OpBuilder &b, Value n) {
      Value id = memref::LoadOp::create(b, loc, flat, n);
      // Unsigned: a negative id is larger than every expert.
      Value known = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ult, id,
                                          constantI32(b, groups.experts));
      auto guard = scf::IfOp::create(b, loc, known, /*withElseRegion=*/false);
      OpBuilder inner = OpBuilder::atBlockTerminator(guard.thenBlock());
      body(inner, n, Index(inner, loc).fromI32(id));
    });
  };
  forKnownIds([&](OpBuilder &b, Value, Value expert) {
    Value slot = Index(b, loc).add(expert, Index(b, loc).constant(1));
    Value old = memref::LoadOp::create(b, loc, offsets, slot);
    memref::StoreOp::create(b, loc, arith::AddIOp::create(b, loc, old, constantI32(b, 1)), offsets,
                            slot);
  });
  // offsets[e + 1] holds the rows of e; make them sums, and remember where each expert starts.
  forLoop(b, zero, experts, 1, [&](OpBuilder &b, Value e) {
    Value next = Index(b, loc).add(e, Index(b, loc).constant(1));
    Value start = memref::LoadOp::create(b, loc, offsets, e);
    Value rows = memref::LoadOp::create(b, loc, offsets, next);
    memref::StoreOp::create(b, loc, start, cursor, e);
    memref::StoreOp::create(b, loc, arith::AddIOp::create(b, loc, start, rows), offsets, next);
  });
  forKnownIds([&](OpBuilder &b, Value n, Value expert) {
    Value place = memref::LoadOp::create(b, loc, cursor, expert);
    memref::StoreOp::create(b, loc, Index(b, loc).toI32(n), pair, Index(b, loc).fromI32(place));
    memref::StoreOp::create(b, loc, arith::AddIOp::create(b, loc, place, constantI32(b, 1)), cursor,
                            expert);
  });

  auto chunks = scf::ForOp::create(
      b, loc, zero, experts, one, zero, [&](OpBuilder &b, Location, Value e, ValueRange state) {
        Index index(b, loc);
        Value first = index.load(offsets, e);
        Value end = index.load(offsets, index.add(e, index.constant(1)));
        Value rows = index.sub(end, first);
        Value count = index.ceilDiv(rows, groups.chunkRows);
        auto inner = scf::ForOp::create(
            b, loc, index.constant(0), count, index.constant(1), state,
            [&](OpBuilder &b, Location, Value c, ValueRange state) {
              Index index(b, loc);
              Value begin = index.part(rows, c, count);
              Value end = index.part(rows, index.add(c, index.constant(1)), count);
              Value fields[] = {e, index.add(first, begin), index.sub(end, begin)};
              for (auto [i, field] : llvm::enumerate(fields))
                memref::StoreOp::create(b, loc, index.toI32(field), groups.plan,
                                        ValueRange{state[0], index.constant(i)});
              scf::YieldOp::create(b, loc, index.add(state[0], index.constant(1)));
            });
        scf::YieldOp::create(b, loc, inner.getResults());
      });
  memref::StoreOp::create(b, loc, index.toI32(chunks.getResult(0)), groups.count, zero);
}

Value EntryTiler::panelsPerTask(OpBuilder &b, StageOp stage, int64_t panels, int64_t most,
                                int64_t step, Value tokens) {
  Index index(b, loc);
  Value share = index.ceilDiv(index.constant(panels), index.mul(stage.getLanes(), 4));
  Value room = index.div(index.constant(kScratchRows), index.max(tokens, index.constant(1)));
  Value count = index.min(index.min(share, room), index.constant(most));
  if (step == 1)
    return index.max(count, index.constant(1));
  return index.max(index.mul(index.div(count, index.constant(step)), step), index.constant(step));
}

/// A lane's sums for the panels of a task: [panels, T, 32], as a vector because the number of
/// panels depends on T.
Value EntryTiler::panelScratch(OpBuilder &b, int64_t most, int64_t step, Value tokens) {
  Index index(b, loc);
  Value rows = index.min(index.mul(tokens, most),
                         index.max(index.constant(kScratchRows), index.mul(tokens, step)));
  return alloc(b, {ShapedType::kDynamic}, b.getF32Type(), index.mul(rows, kPanelWidth));
}

Value EntryTiler::panelView(OpBuilder &b, Value scratch, Value panel, int64_t panels,
                            Value tokens) {
  Index index(b, loc);
  Value stride = index.mul(tokens, kPanelWidth);
  Value offset = index.mul(panel, stride);
  auto layout = StridedLayoutAttr::get(b.getContext(), ShapedType::kDynamic,
                                       {ShapedType::kDynamic, kPanelWidth, 1});
  auto type = MemRefType::get({panels, ShapedType::kDynamic, kPanelWidth}, b.getF32Type(), layout);
  return memref::ReinterpretCastOp::create(
      b, loc, type, scratch, OpFoldResult(offset),
      ArrayRef<OpFoldResult>{b.getIndexAttr(panels), tokens, b.getIndexAttr(kPanelWidth)},
      ArrayRef<OpFoldResult>{stride, b.getIndexAttr(kPanelWidth), b.getIndexAttr(1)});
}

//===----------------------------------------------------------------------===//
// Vectors
//===----------------------------------------------------------------------===//

/// Loads `lanes` elements (1: a scalar) and widens bf16 exactly.
Value EntryTiler::loadF32(OpBuilder &b, Value buffer, ValueRange indices, int64_t lanes) {
  Type element = cast<MemRefType>(buffer.getType()).getElementType();
  auto shaped = [&](Type type) -> Type {
    return lanes == 1 ? type : Type(VectorType::get(lanes, type));
  };
  Value value = lanes == 1 ? memref::LoadOp::create(b, loc, buffer, indices).getResult()
                           : vector::LoadOp::create(b, loc, cast<VectorType>(shaped(element)),
                                                    buffer, indices)
                                 .getResult();
  if (element.isF32())
    return value;
  Value bits = arith::BitcastOp::create(b, loc, shaped(b.getI16Type()), value);
  Value wide = arith::ExtUIOp::create(b, loc, shaped(b.getI32Type()), bits);
  Value shift = arith::ConstantOp::create(
      b, loc,
      lanes == 1 ? TypedAttr(b.getI32IntegerAttr(16))
                 : TypedAttr(DenseElementsAttr::get(cast<ShapedType>(shaped(b.getI32Type())),
                                                    int32_t(16))));
  wide = arith::ShLIOp::create(b, loc, wide, shift);
  return arith::BitcastOp::create(b, loc, shaped(b.getF32Type()), wide);
}

/// Stores a scalar or a vector of f32, rounded to bf16 (nearest even, NaN stays NaN) where the
/// buffer is bf16. Spelled out: LLVM would call a library function below AVX512-BF16.
void EntryTiler::storeF32(OpBuilder &b, Value value, Value buffer, ValueRange indices) {
  Type element = cast<MemRefType>(buffer.getType()).getElementType();
  auto vector = dyn_cast<VectorType>(value.getType());
  auto shaped = [&](Type type) -> Type {
    return vector ? Type(VectorType::get(vector.getShape(), type)) : type;
  };
  if (element.isBF16()) {
    Type i32 = shaped(b.getI32Type());
    auto constant = [&](int32_t c) -> Value {
      return arith::ConstantOp::create(
          b, loc,
          vector ? TypedAttr(DenseElementsAttr::get(cast<ShapedType>(i32), c))
                 : TypedAttr(b.getI32IntegerAttr(c)));
    };
    Value bits = arith::BitcastOp::create(b, loc, i32, value);
    Value upper = arith::ShRUIOp::create(b, loc, bits, constant(16));
    Value odd = arith::AndIOp::create(b, loc, upper, constant(1));
    Value rounded =
        arith::AddIOp::create(b, loc, arith::AddIOp::create(b, loc, bits, constant(0x7fff)), odd);
    rounded = arith::ShRUIOp::create(b, loc, rounded, constant(16));
    Value quiet = arith::OrIOp::create(b, loc, upper, constant(0x40));
    Value nan = arith::CmpFOp::create(b, loc, arith::CmpFPredicate::UNO, value, value);
    rounded = arith::SelectOp::create(b, loc, nan, quiet, rounded);
    Value narrow = arith::TruncIOp::create(b, loc, shaped(b.getI16Type()), rounded);
    value = arith::BitcastOp::create(b, loc, shaped(b.getBF16Type()), narrow);
  }
  if (vector)
    vector::StoreOp::create(b, loc, value, buffer, indices);
  else
    memref::StoreOp::create(b, loc, value, buffer, indices);
}

/// The scalar region on whole vectors: every operation once more with vector types.
Value EntryTiler::applyRegion(OpBuilder &b, Region &region, ValueRange arguments, VectorType type) {
  IRMapping mapping;
  mapping.map(region.front().getArguments(), arguments);
  auto widened = [&](Type element) -> Type { return VectorType::get(type.getShape(), element); };
  for (Operation &op : region.front().without_terminator()) {
    if (auto constant = dyn_cast<arith::ConstantOp>(op)) {
      auto shape = cast<ShapedType>(widened(constant.getType()));
      mapping.map(constant.getResult(),
                  arith::ConstantOp::create(
                      b, loc, DenseElementsAttr::get(shape, Attribute(constant.getValue())))
                      .getResult());
      continue;
    }
    Operation *copy = b.clone(op, mapping);
    for (OpResult result : copy->getResults())
      result.setType(widened(result.getType()));
  }
  return mapping.lookup(region.front().getTerminator()->getOperand(0));
}

//===----------------------------------------------------------------------===//
// Groups
//===----------------------------------------------------------------------===//

/// Cuts the rows of `offsets` into chunks as the matmuls that use them say.
FailureOr<Groups> EntryTiler::makeGroups(Operation *op, Value offsets, Value rows,
                                         int64_t experts) {
  Groups groups{physical(offsets), experts, nullptr, nullptr, nullptr, 0};
  for (Operation *user : offsets.getUsers()) {
    auto matmul = dyn_cast<GroupedMatmulOp>(user);
    if (!matmul)
      continue;
    StrategyAttr strategy = matmul.getStrategyAttr();
    if (!strategy)
      return matmul.emitOpError("expected a strategy, but got none; run moe-select-strategy");
    if (groups.chunkRows && groups.chunkRows != strategy.getChunkRows())
      return matmul.emitOpError("expected chunk_rows ")
             << groups.chunkRows << " as the other matmul of this function has, but got "
             << strategy.getChunkRows();
    groups.chunkRows = strategy.getChunkRows();
  }
  if (!groups.chunkRows)
    groups.chunkRows = 256; // Nothing but gather and combine: any cut will do.
  Index index(b, loc);
  Value chunks =
      index.add(index.div(rows, index.constant(groups.chunkRows)), index.constant(experts));
  groups.plan = alloc(b, {ShapedType::kDynamic, 3}, b.getI32Type(), chunks);
  groups.count = alloc(b, {1}, b.getI32Type());
  groupings[offsets] = groups;
  (void)op;
  return groups;
}

FailureOr<Groups *> EntryTiler::groupsOf(Operation *op, Value offsets) {
  auto it = groupings.find(offsets);
  if (it == groupings.end())
    return op->emitOpError("expected offsets of a dispatch or single_group of this function, but "
                           "got another value");
  return &it->second;
}

//===----------------------------------------------------------------------===//
// Router and dispatch
//===----------------------------------------------------------------------===//

LogicalResult EntryTiler::tileRouter(Operation *op, Value x, Value weight, Value outWeights,
                                     Value outExperts, Value outLogits, RouterAttr router,
                                     std::optional<Type> compute, StrategyAttr strategy,
                                     std::optional<std::pair<Value, Value>> dispatch) {
  if (!strategy)
    return op->emitOpError("expected a strategy, but got none; run moe-select-strategy");
  std::string unimplemented = router.getUnimplemented();
  if (!unimplemented.empty())
    return op->emitOpError("expected a router that the CPU target implements, but got ")
           << unimplemented;
  if (router.getPrecision() != RouterPrecision::F32)
    return op->emitOpError("expected router precision f32, but got model: not built yet");
  auto type = cast<WeightType>(weight.getType());
  UkernelAttr kernel = strategy.getUkernel();
  Type element = compute ? *compute : cast<MemRefType>(x.getType()).getElementType();
  int64_t experts = type.getRows();
  Value tokens = rowCount(x);
  FailureOr<Groups> groups = failure();
  Value cursor;
  if (dispatch) {
    groups = makeGroups(op, dispatch->first, Index(b, loc).mul(tokens, router.getTopK()), experts);
    if (failed(groups))
      return failure();
    cursor = alloc(b, {experts}, b.getI32Type());
  }
  auto stage = StageOp::create(b, loc, "route", /*withTail=*/bool(dispatch));
  OpBuilder body = OpBuilder::atBlockTerminator(&stage.getBody().front());
  Value a = alloc(body, {kernel.getRows() * roundUp(type.getCols(), 16)}, body.getF32Type());
  Value logits =
      alloc(body, {kernel.getRows(), type.panelCount() * kPanelWidth}, body.getF32Type());
  Value blocks = Index(body, loc).ceilDiv(tokens, kernel.getRows());
  claimTasks(body, stage, blocks, /*guided=*/false, {},
             [&](OpBuilder &b, Value block, ValueRange) -> SmallVector<Value> {
               Index index(b, loc);
               Value first = index.part(tokens, block, blocks);
               Value end = index.part(tokens, index.add(block, index.constant(1)), blocks);
               Value count = index.sub(end, first);
               PackRowsOp::create(b, loc, x, Value(), Value(), first, count, a,
                                  TypeAttr::get(element));
               Value zero = index.constant(0);
               forLoop(b, zero, index.constant(type.panelCount()), kernel.getPanels(),
                       [&](OpBuilder &b, Value panel) {
                         GemmTileOp::create(b, loc, count, a, weight, zero, panel, logits, zero,
                                            Value(), Value(), Value(),
                                            ResultFormAttr::get(b.getContext(), ResultForm::Rows),
                                            TypeAttr(), kernel);
                       });
               SelectExpertsOp::create(b, loc, logits, first, count, outWeights, outExperts,
                                       outLogits, b.getI64IntegerAttr(experts), router);
               return {};
             });
  if (dispatch) {
    OpBuilder tail = OpBuilder::atBlockTerminator(&stage.getTail().front());
    sortPairs(tail, outExperts, *groups, dispatch->second, cursor);
  }
  return success();
}

LogicalResult EntryTiler::tileDispatch(DispatchOp op) {
  Value ids = op.getIds();
  Index index(b, loc);
  Value rows = index.mul(rowCount(ids), b.createOrFold<memref::DimOp>(loc, ids, 1));
  FailureOr<Groups> groups = makeGroups(op, op.getOutOffsets(), rows, op.getExperts());
  if (failed(groups))
    return failure();
  Value cursor = alloc(b, {int64_t(op.getExperts())}, b.getI32Type());
  auto stage = StageOp::create(b, loc, "dispatch", /*withTail=*/true);
  OpBuilder tail = OpBuilder::atBlockTerminator(&stage.getTail().front());
  sortPairs(tail, ids, *groups, op.getOutPair(), cursor);
  return success();
}

LogicalResult EntryTiler::tileSingleGroup(SingleGroupOp op) {
  // One group needs no list: its chunks are computed where they are used.
  FailureOr<Groups> groups = makeGroups(op, op.getOut(), op.getRows(), 1);
  if (failed(groups))
    return failure();
  Groups &entry = groupings[op.getOut()];
  entry.plan.getDefiningOp()->erase();
  entry.count.getDefiningOp()->erase();
  entry.plan = entry.count = nullptr;
  entry.singleRows = op.getRows();
  return success();
}

//===----------------------------------------------------------------------===//
// Matmul
//===----------------------------------------------------------------------===//

void EntryTiler::packBlock(OpBuilder &b, GroupedMatmulOp op, Value first, Value rows, Value into) {
  Value source = physical(op.getRows());
  Type element = op.getRowType() ? *op.getRowType()
                                 : cast<MemRefType>(op.getRows().getType()).getElementType();
  // A scratch matrix is padded to whole panels; only its real columns are packed.
  auto type = cast<MemRefType>(source.getType());
  int64_t cols = op.getWeightType().getCols();
  if (type.getDimSize(1) != cols)
    source = memref::SubViewOp::create(
        b, loc, source, ArrayRef<OpFoldResult>{b.getIndexAttr(0), b.getIndexAttr(0)},
        ArrayRef<OpFoldResult>{b.createOrFold<memref::DimOp>(loc, source, 0), b.getIndexAttr(cols)},
        ArrayRef<OpFoldResult>{b.getIndexAttr(1), b.getIndexAttr(1)});
  PackRowsOp::create(b, loc, source, op.getViaPair(), op.getViaSlots(), first, rows, into,
                     TypeAttr::get(element));
}

LogicalResult EntryTiler::tileMatmul(GroupedMatmulOp op) {
  StrategyAttr strategy = op.getStrategyAttr();
  if (!strategy)
    return op.emitOpError("expected a strategy, but got none; run moe-select-strategy");
  FailureOr<Groups *> groups = groupsOf(op, op.getOffsets());
  if (failed(groups))
    return failure();
  bool blocked = isa<MemRefType>(physical(op.getRows()).getType()) &&
                 cast<MemRefType>(physical(op.getRows()).getType()).getRank() == 1;
  if (blocked != (strategy.getSource() == RowSource::Blocked))
    return op.emitOpError("expected source ")
           << (blocked ? "blocked" : "rows or gather") << " for rows that were left "
           << (blocked ? "as row blocks" : "row-major") << ", but got "
           << stringifyRowSource(strategy.getSource());
  if ((strategy.getSource() == RowSource::Gather) != op.hasVia())
    return op.emitOpError("expected source gather together with a via clause, but got ")
           << stringifyRowSource(strategy.getSource());
  return op.hasCombine() ? tileMatmulCombine(op, **groups) : tileMatmulToBuffer(op, **groups);
}

/// Tasks are (chunk, group of panels); the product goes to row blocks or to a row-major matrix.
LogicalResult EntryTiler::tileMatmulToBuffer(GroupedMatmulOp op, const Groups &groups) {
  StrategyAttr strategy = op.getStrategyAttr();
  UkernelAttr kernel = strategy.getUkernel();
  WeightType weight = op.getWeightType();
  Type element = blockOf(kernel, weight.getCols()).first;
  int64_t padded = blockOf(kernel, weight.getCols()).second;
  int64_t width = weight.panelCount() * weight.panelCols();
  bool blockedResult = strategy.getResult() == ResultForm::Blocked;
  auto outType = cast<MemRefType>(op.getOut().getType());
  Index index(b, loc);
  Value rows = rowCount(op.getOut());

  Value out;
  int64_t blockStride = roundUp(weight.getRows(), outType.getElementType().isF32() ? 16 : 32);
  if (blockedResult) {
    if (!outType.getElementType().isF32() && kernel.getProduct() == KernelProduct::Fma)
      return op.emitOpError("expected an f32 result for row blocks, but got ")
             << outType.getElementType();
    Value size = index.add(index.mul(rows, blockStride), index.constant(blockSlack(kernel)));
    out = alloc(b, {ShapedType::kDynamic}, outType.getElementType(), size);
  } else if (outType.getRank() == 3) {
    out =
        alloc(b, {ShapedType::kDynamic, weight.getParts(), width}, outType.getElementType(), rows);
  } else {
    out = alloc(b, {ShapedType::kDynamic, width}, outType.getElementType(), rows);
  }
  buffers[op.getOut()] = out;

  auto stage = StageOp::create(b, loc, weight.getParts() > 1 || op.hasEpilogue() ? "up" : "down");
  OpBuilder body = OpBuilder::atBlockTerminator(&stage.getBody().front());
  Index bodyIndex(body, loc);
  bool blockedSource = strategy.getSource() == RowSource::Blocked;
  Value packed = physical(op.getRows());
  if (!blockedSource) {
    Value most = bodyIndex.min(rows, bodyIndex.constant(strategy.getChunkRows()));
    packed =
        alloc(body, {ShapedType::kDynamic}, element,
              bodyIndex.add(bodyIndex.mul(most, padded), bodyIndex.constant(blockSlack(kernel))));
  }
  int64_t panels = weight.panelCount();
  int64_t groupPanels = strategy.getPanelsPerTask();
  Value groupCount = bodyIndex.constant((panels + groupPanels - 1) / groupPanels);
  Value total = bodyIndex.mul(chunkCount(body, groups), groupCount);
  // The chunk whose rows lie in this lane's scratch; none at first.
  Value none = bodyIndex.constant(-1);
  claimTasks(
      body, stage, total, /*guided=*/true, none,
      [&](OpBuilder &b, Value task, ValueRange state) -> SmallVector<Value> {
        Index index(b, loc);
        Value chunkIndex = index.div(task, groupCount);
        Value group = index.rem(task, groupCount);
        Chunk chunk = chunkAt(b, groups, chunkIndex);
        if (!blockedSource) {
          Value other =
              arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ne, chunkIndex, state[0]);
          auto guard = scf::IfOp::create(b, loc, other, /*withElseRegion=*/false);
          OpBuilder inner = OpBuilder::atBlockTerminator(guard.thenBlock());
          forBlocks(inner, chunk.rows, kernel, [&](OpBuilder &b, Value begin, Value count) {
            Index index(b, loc);
            packBlock(b, op, index.add(chunk.first, begin), count,
                      tailFrom(b, packed, index.mul(begin, padded)));
          });
        }
        Value firstPanel = index.mul(group, groupPanels);
        Value endPanel =
            index.min(index.add(firstPanel, index.constant(groupPanels)), index.constant(panels));
        forBlocks(b, chunk.rows, kernel, [&](OpBuilder &b, Value begin, Value count) {
          Index index(b, loc);
          Value row = index.add(chunk.first, begin);
          Value a = tailFrom(b, packed, index.mul(blockedSource ? row : begin, padded));
          Value into = blockedResult ? tailFrom(b, out, index.mul(row, blockStride)) : out;
          forLoop(b, firstPanel, endPanel, kernel.getPanels(), [&](OpBuilder &b, Value panel) {
            auto tile = GemmTileOp::create(
                b, loc, count, a, op.getWeight(), chunk.expert, panel, into,
                blockedResult ? Value() : row, Value(), Value(), Value(),
                ResultFormAttr::get(b.getContext(),
                                    blockedResult ? ResultForm::Blocked : ResultForm::Rows),
                TypeAttr(), kernel);
            IRMapping mapping;
            op.getEpilogue().cloneInto(&tile.getEpilogue(), mapping);
          });
        });
        return {chunkIndex};
      });
  return success();
}

/// Tasks are groups of panels of the output, each for all chunks in ascending order: a lane owns
/// its columns, so sums need no fence and have one order.
LogicalResult EntryTiler::tileMatmulCombine(GroupedMatmulOp op, const Groups &groups) {
  StrategyAttr strategy = op.getStrategyAttr();
  UkernelAttr kernel = strategy.getUkernel();
  WeightType weight = op.getWeightType();
  if (op.hasEpilogue())
    return op.emitOpError("expected no region together with a combine clause, but got one");
  Type element = blockOf(kernel, weight.getCols()).first;
  int64_t padded = blockOf(kernel, weight.getCols()).second;
  int64_t panels = weight.panelCount(), step = kernel.getPanels();
  int64_t most = strategy.getPanelsPerTask();
  Value y = op.getOut();
  Value tokens = rowCount(y);
  Value rowsTotal = op.getCombinePair() ? rowCount(op.getCombinePair()) : tokens;
  bool blockedSource = strategy.getSource() == RowSource::Blocked;

  auto stage = StageOp::create(b, loc, "down");
  OpBuilder body = OpBuilder::atBlockTerminator(&stage.getBody().front());
  Index bodyIndex(body, loc);
  Value scratch = panelScratch(body, most, step, tokens);
  Value packed = physical(op.getRows());
  if (!blockedSource) {
    Value most = bodyIndex.min(rowsTotal, bodyIndex.constant(strategy.getChunkRows()));
    packed =
        alloc(body, {ShapedType::kDynamic}, element,
              bodyIndex.add(bodyIndex.mul(most, padded), bodyIndex.constant(blockSlack(kernel))));
  }
  Value weights = op.getCombineWeights() ? flatten(body, op.getCombineWeights()) : Value();
  Value accumulate = accumulateOf(body, op.getAccumulate());
  Value perTask = panelsPerTask(body, stage, panels, most, step, tokens);
  Value total = bodyIndex.ceilDiv(bodyIndex.constant(panels), perTask);
  claimTasks(body, stage, total, /*guided=*/false, {},
             [&](OpBuilder &b, Value task, ValueRange) -> SmallVector<Value> {
               Index index(b, loc);
               Value firstPanel = index.mul(task, perTask);
               Value endPanel = index.min(index.add(firstPanel, perTask), index.constant(panels));
               auto view = [&](OpBuilder &b, Value panel) {
                 return panelView(b, scratch, Index(b, loc).sub(panel, firstPanel), step, tokens);
               };
               forLoop(b, firstPanel, endPanel, step, [&](OpBuilder &b, Value panel) {
                 BeginPanelsOp::create(b, loc, view(b, panel), y, panel, accumulate,
                                       b.getI64IntegerAttr(step));
               });
               forLoop(b, index.constant(0), chunkCount(b, groups), 1, [&](OpBuilder &b, Value i) {
                 Chunk chunk = chunkAt(b, groups, i);
                 forBlocks(b, chunk.rows, kernel, [&](OpBuilder &b, Value begin, Value count) {
                   Index index(b, loc);
                   Value row = index.add(chunk.first, begin);
                   Value a = packed;
                   if (blockedSource)
                     a = tailFrom(b, packed, index.mul(row, padded));
                   else
                     packBlock(b, op, row, count, packed);
                   forLoop(b, firstPanel, endPanel, step, [&](OpBuilder &b, Value panel) {
                     GemmTileOp::create(b, loc, count, a, op.getWeight(), chunk.expert, panel,
                                        view(b, panel), row, op.getCombinePair(), weights,
                                        op.getCombineSlots(),
                                        ResultFormAttr::get(b.getContext(), ResultForm::Combine),
                                        op.getCombineTypeAttr(), kernel);
                   });
                 });
               });
               forLoop(b, firstPanel, endPanel, step, [&](OpBuilder &b, Value panel) {
                 EndPanelsOp::create(b, loc, view(b, panel), y, panel, b.getI64IntegerAttr(step));
               });
               return {};
             });
  return success();
}

//===----------------------------------------------------------------------===//
// Unfused forms
//===----------------------------------------------------------------------===//

LogicalResult EntryTiler::tileGather(GatherOp op) {
  FailureOr<Groups *> groups = groupsOf(op, op.getOffsets());
  if (failed(groups))
    return failure();
  auto type = cast<MemRefType>(op.getOut().getType());
  int64_t cols = type.getDimSize(1), lanes = lanesOf(), whole = cols / lanes * lanes;
  Value out = alloc(b, type.getShape(), type.getElementType(), rowCount(op.getOut()));
  buffers[op.getOut()] = out;
  auto stage = StageOp::create(b, loc, "gather");
  OpBuilder body = OpBuilder::atBlockTerminator(&stage.getBody().front());
  Value rows = usedRows(body, **groups);
  Value total = Index(body, loc).ceilDiv(rows, kElementwiseRows);
  claimTasks(body, stage, total, /*guided=*/false, {},
             [&](OpBuilder &b, Value task, ValueRange) -> SmallVector<Value> {
               Index index(b, loc);
               Value first = index.mul(task, kElementwiseRows);
               Value end = index.min(index.add(first, index.constant(kElementwiseRows)), rows);
               forLoop(b, first, end, 1, [&](OpBuilder &b, Value n) {
                 Index index(b, loc);
                 Value token = index.div(index.load(op.getPair(), n), op.getSlots());
                 auto copy = [&](OpBuilder &b, Value c, int64_t width) {
                   storeF32(b, loadF32(b, op.getX(), {token, c}, width), out, {n, c});
                 };
                 forLoop(b, index.constant(0), index.constant(whole), lanes,
                         [&](OpBuilder &b, Value c) { copy(b, c, lanes); });
                 forLoop(b, index.constant(whole), index.constant(cols), 1,
                         [&](OpBuilder &b, Value c) { copy(b, c, 1); });
               });
               return {};
             });
  return success();
}

LogicalResult EntryTiler::tileActivate(ActivateOp op) {
  Value in = physical(op.getParts());
  auto inType = cast<MemRefType>(in.getType());
  auto outType = cast<MemRefType>(op.getOut().getType());
  int64_t width = inType.getShape().back(), lanes = lanesOf();
  if (width % 16)
    return op.emitOpError("expected parts padded to whole panels, but got a width of ") << width;
  Value rows = rowCount(op.getOut());
  Value out = alloc(b, {ShapedType::kDynamic, width}, outType.getElementType(), rows);
  buffers[op.getOut()] = out;
  auto stage = StageOp::create(b, loc, "activate");
  OpBuilder body = OpBuilder::atBlockTerminator(&stage.getBody().front());
  Value used = rows;
  if (auto matmul = op.getParts().getDefiningOp()) {
    // Only rows that exist are worth the work; the rest of the matrix is undefined.
    for (Operation *user : matmul->getUsers())
      if (auto producer = dyn_cast<GroupedMatmulOp>(user))
        if (producer.getOut() == op.getParts()) {
          FailureOr<Groups *> groups = groupsOf(producer, producer.getOffsets());
          if (failed(groups))
            return failure();
          used = usedRows(body, **groups);
        }
  }
  Value total = Index(body, loc).ceilDiv(used, kElementwiseRows);
  auto vector = VectorType::get(lanes, body.getF32Type());
  claimTasks(
      body, stage, total, /*guided=*/false, {},
      [&](OpBuilder &b, Value task, ValueRange) -> SmallVector<Value> {
        Index index(b, loc);
        Value first = index.mul(task, kElementwiseRows);
        Value end = index.min(index.add(first, index.constant(kElementwiseRows)), used);
        forLoop(b, first, end, 1, [&](OpBuilder &b, Value n) {
          Index index(b, loc);
          forLoop(b, index.constant(0), index.constant(width), lanes, [&](OpBuilder &b, Value c) {
            SmallVector<Value> parts;
            if (inType.getRank() == 2)
              parts.push_back(loadF32(b, in, {n, c}, lanes));
            else
              for (int64_t p = 0; p < inType.getDimSize(1); ++p)
                parts.push_back(loadF32(b, in, {n, Index(b, loc).constant(p), c}, lanes));
            storeF32(b, applyRegion(b, op.getEpilogue(), parts, vector), out, {n, c});
          });
        });
        return {};
      });
  return success();
}

LogicalResult EntryTiler::tileCombine(CombineOp op) {
  FailureOr<Groups *> groups = groupsOf(op, op.getOffsets());
  if (failed(groups))
    return failure();
  std::string unimplemented = op.getCombine().getUnimplemented();
  if (!unimplemented.empty())
    return op.emitOpError("expected a combine that the CPU target implements, but got ")
           << unimplemented;
  Value y = op.getOut(), in = physical(op.getRows());
  auto inType = cast<MemRefType>(in.getType());
  int64_t width = inType.getDimSize(1), panels = width / kPanelWidth, lanes = lanesOf();
  if (width % kPanelWidth)
    return op.emitOpError("expected rows padded to whole panels, but got a width of ") << width;
  constexpr int64_t most = 8;
  Value tokens = rowCount(y);
  auto stage = StageOp::create(b, loc, "combine");
  OpBuilder body = OpBuilder::atBlockTerminator(&stage.getBody().front());
  Value scratch = panelScratch(body, most, 1, tokens);
  Value weights = op.getWeights() ? flatten(body, op.getWeights()) : Value();
  Value accumulate = accumulateOf(body, op.getAccumulate());
  Value perTask = panelsPerTask(body, stage, panels, most, 1, tokens);
  Value used = usedRows(body, **groups);
  Value total = Index(body, loc).ceilDiv(Index(body, loc).constant(panels), perTask);
  auto vector = VectorType::get(lanes, body.getF32Type());
  claimTasks(body, stage, total, /*guided=*/false, {},
             [&](OpBuilder &b, Value task, ValueRange) -> SmallVector<Value> {
               Index index(b, loc);
               Value firstPanel = index.mul(task, perTask);
               Value endPanel = index.min(index.add(firstPanel, perTask), index.constant(panels));
               auto view = [&](OpBuilder &b, Value panel) {
                 return panelView(b, scratch, Index(b, loc).sub(panel, firstPanel), 1, tokens);
               };
               forLoop(b, firstPanel, endPanel, 1, [&](OpBuilder &b, Value panel) {
                 BeginPanelsOp::create(b, loc, view(b, panel), y, panel, accumulate,
                                       b.getI64IntegerAttr(1));
               });
               forLoop(b, index.constant(0), used, 1, [&](OpBuilder &b, Value n) {
                 Index index(b, loc);
                 Value token = n, weight;
                 if (op.getPair()) {
                   Value pair = index.load(op.getPair(), n);
                   token = index.div(pair, op.getSlots());
                   weight = memref::LoadOp::create(b, loc, weights, pair);
                 } else {
                   weight = arith::ConstantOp::create(b, loc, b.getF32FloatAttr(1.0f));
                 }
                 Value factor = vector::BroadcastOp::create(b, loc, vector, weight);
                 forLoop(b, firstPanel, endPanel, 1, [&](OpBuilder &b, Value panel) {
                   Index index(b, loc);
                   Value sums = view(b, panel);
                   for (int64_t lane = 0; lane < kPanelWidth; lane += lanes) {
                     Value at = index.constant(lane);
                     Value column = index.add(index.mul(panel, kPanelWidth), at);
                     Value row = loadF32(b, in, {n, column}, lanes);
                     SmallVector<Value> place = {index.constant(0), token, at};
                     Value old = vector::LoadOp::create(b, loc, vector, sums, place);
                     Value sum = vector::FMAOp::create(b, loc, factor, row, old);
                     vector::StoreOp::create(b, loc, sum, sums, place);
                   }
                 });
               });
               forLoop(b, firstPanel, endPanel, 1, [&](OpBuilder &b, Value panel) {
                 EndPanelsOp::create(b, loc, view(b, panel), y, panel, b.getI64IntegerAttr(1));
               });
               return {};
             });
  return success();
}

//===----------------------------------------------------------------------===//
// The function
//===----------------------------------------------------------------------===//

LogicalResult EntryTiler::run() {
  auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
  level = findCPULevel(target.getLevel());
  if (!level || !level->implemented)
    return func.emitOpError("expected level ")
           << implementedLevelNames() << ", but got `" << target.getLevel() << "`";
  SmallVector<Operation *> ops;
  for (Operation &op : func.getBody().front())
    if (isa<MoEDialect>(op.getDialect()))
      ops.push_back(&op);
  // The offsets are part of the frame: the runtime hands them on as counts.
  for (Operation *op : ops) {
    Value offsets;
    if (auto dispatch = dyn_cast<DispatchOp>(op))
      offsets = dispatch.getOutOffsets();
    else if (auto dispatch = dyn_cast<RouteDispatchOp>(op))
      offsets = dispatch.getOutOffsets();
    if (!offsets)
      continue;
    auto attr = DictionaryAttr::get(func.getContext(),
                                    {{StringAttr::get(func.getContext(), MoEDialect::kArgAttrName),
                                      StringAttr::get(func.getContext(), "offsets")}});
    unsigned position = func.getNumArguments();
    if (failed(func.insertArgument(position, offsets.getType(), attr, loc)))
      return failure();
    offsets.replaceAllUsesWith(func.getArgument(position));
  }
  for (Operation *op : ops) {
    b.setInsertionPoint(op);
    loc = op->getLoc();
    LogicalResult result =
        TypeSwitch<Operation *, LogicalResult>(op)
            .Case([&](RouterOp op) {
              return tileRouter(op, op.getX(), op.getWeight(), op.getOutWeights(),
                                op.getOutExperts(), op.getOutLogits(), op.getRouter(),
                                op.getCompute(), op.getStrategyAttr(), std::nullopt);
            })
            .Case([&](RouteDispatchOp op) {
              return tileRouter(op, op.getX(), op.getWeight(), op.getOutWeights(),
                                op.getOutExperts(), Value(), op.getRouter(), op.getCompute(),
                                op.getStrategyAttr(),
                                std::make_pair(op.getOutOffsets(), op.getOutPair()));
            })
            .Case([&](DispatchOp op) { return tileDispatch(op); })
            .Case([&](SingleGroupOp op) { return tileSingleGroup(op); })
            .Case([&](GatherOp op) { return tileGather(op); })
            .Case([&](GroupedMatmulOp op) { return tileMatmul(op); })
            .Case([&](ActivateOp op) { return tileActivate(op); })
            .Case([&](CombineOp op) { return tileCombine(op); })
            .Case<ExpertsOp, FfnOp>([&](auto op) -> LogicalResult {
              // What decomposition had a formula for is not here any more.
              std::string unimplemented = op.getExpert().getUnimplemented();
              if (unimplemented.empty())
                return op.emitOpError("expected matmuls; run the phases canonical and fuse first");
              return op.emitOpError("expected an expert that the CPU target implements, but got ")
                     << unimplemented;
            })
            .Default([&](Operation *op) {
              return op->emitOpError("expected an operation that the CPU target can tile; "
                                     "run the phases canonical and fuse first");
            });
    if (failed(result))
      return failure();
  }
  for (Operation *op : llvm::reverse(ops))
    op->erase();
  for (auto op : llvm::make_early_inc_range(func.getOps<memref::AllocOp>()))
    if (op->use_empty())
      op.erase();
  int64_t stages = 0, tails = 0;
  for (StageOp stage : func.getOps<StageOp>()) {
    ++stages;
    tails += !stage.getTail().empty();
  }
  if (stages > 8 || counters + tails > 16)
    return func.emitOpError("expected at most 8 stages and 16 counters, but got ")
           << stages << " and " << counters + tails;
  return success();
}

namespace {
struct TileTasksPass : public mlir::moe::impl::MoECPUTileTasksBase<TileTasksPass> {
  void runOnOperation() override {
    for (auto func : getOperation().getOps<func::FuncOp>())
      if (func->hasAttr(MoEDialect::kTargetAttrName) && failed(EntryTiler(func).run()))
        return signalPassFailure();
  }
};
} // namespace
