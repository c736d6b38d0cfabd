//===- Pieces.cpp - loops, claims, vectors of the tiler -----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "EntryTiler.h"

#include "mlir/IR/IRMapping.h"

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::tile;

/// Sums of a block of 32 rows by 32 columns.
static constexpr int64_t kSumsOfBlock = 1024;

//===----------------------------------------------------------------------===//
// Claims and loops
//===----------------------------------------------------------------------===//

void EntryTiler::claimTasks(OpBuilder &b, StageOp stage, Value total, bool guided, ValueRange state,
                            TaskBody body) {
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

void EntryTiler::forBlocks(OpBuilder &b, Value rows, UkernelAttr kernel, BlockBody body) {
  Index index(b, loc);
  Value blocks = index.ceilDiv(rows, kernel.getRows());
  if (kernel.getProduct() == KernelProduct::TileBF16) {
    // Tiles are whole: blocks of nearly equal size would cut more of them.
    forLoop(b, index.constant(0), blocks, 1, [&](OpBuilder &b, Value block) {
      Index index(b, loc);
      Value begin = index.mul(block, kernel.getRows());
      Value count = index.min(index.sub(rows, begin), index.constant(kernel.getRows()));
      body(b, {begin, count, block, blocks});
    });
    return;
  }
  forLoop(b, index.constant(0), blocks, 1, [&](OpBuilder &b, Value block) {
    Index index(b, loc);
    Value begin = index.part(rows, block, blocks);
    Value end = index.part(rows, index.add(block, index.constant(1)), blocks);
    body(b, {begin, index.sub(end, begin), block, blocks});
  });
}

/// Groups of k that kernels count in: 64 bytes of a packed row.
static int64_t kGroups(UkernelAttr kernel, WeightType weight) {
  int64_t columns = UkernelAttr::readsPairs(kernel.getProduct()) ? 32 : 16;
  return (weight.getCols() + columns - 1) / columns;
}

Value EntryTiler::sumsOf(OpBuilder &b, StrategyAttr strategy, WeightType weight) {
  UkernelAttr kernel = strategy.getUkernel();
  if (!kernel.getKBlock())
    return nullptr;
  int64_t blocks = (strategy.getChunkRows() + kernel.getRows() - 1) / kernel.getRows();
  bool waits = strategy.getKChunk() && strategy.getKChunk() < kGroups(kernel, weight);
  return alloc(b, {blocks * kSumsOfBlock * (waits ? strategy.getPanelsPerTask() : 1)},
               b.getF32Type());
}

void EntryTiler::forTiles(OpBuilder &b, const Chunk &chunk, StrategyAttr strategy,
                          WeightType weight, Value first, Value end, Value later, Value sums,
                          TileBody make) {
  UkernelAttr kernel = strategy.getUkernel();
  int64_t ahead = kernel.getAhead();
  // `make`, with as many lines touched ahead as make up the panel where there are few blocks: there
  // a tile's prefetch is the only one.
  auto makeTile = [&](OpBuilder &b, const RowBlock &block, Value panel,
                      llvm::function_ref<void(OpBuilder &, GemmTileOp)> finish) {
    auto one = [&](OpBuilder &b, UkernelAttr kernel) {
      GemmTileOp tile = make(b, block, panel, kernel);
      touchAhead(b, tile, later, block);
      finish(b, tile);
    };
    if (kernel.getProduct() != KernelProduct::TileBF16 || !ahead || ahead == 32)
      return one(b, kernel);
    Index index(b, loc);
    Value many = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::uge, block.blocks,
                                       index.constant(32 / ahead));
    auto choice = scf::IfOp::create(b, loc, many, /*withElseRegion=*/true);
    OpBuilder inner = OpBuilder::atBlockTerminator(choice.thenBlock());
    one(inner, kernel);
    inner = OpBuilder::atBlockTerminator(choice.elseBlock());
    one(inner, UkernelAttr::get(kernel.getContext(), kernel.getLevel(), kernel.getRows(),
                                kernel.getPanels(), kernel.getOrder(), kernel.getPrefetch(),
                                kernel.getProduct(), /*ahead=*/32, kernel.getKBlock(),
                                kernel.getHint(), kernel.getDefer()));
  };
  if (!sums)
    return forBlocks(b, chunk.rows, kernel, [&](OpBuilder &b, const RowBlock &block) {
      forLoop(b, first, end, kernel.getPanels(), [&](OpBuilder &b, Value panel) {
        makeTile(b, block, panel, [](OpBuilder &, GemmTileOp) {});
      });
    });
  // One block keeps its sums in registers: nothing is won by a step.
  Index index(b, loc);
  int64_t groups = kGroups(kernel, weight), kChunk = strategy.getKChunk();
  Value all = index.constant(groups);
  Value several = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ugt, chunk.rows,
                                        index.constant(kernel.getRows()));
  auto stepOf = [&](int64_t most) -> Value {
    return arith::SelectOp::create(b, loc, several, index.constant(std::min(most, groups)), all);
  };
  Value step = stepOf(kernel.getKBlock());
  Value blocks = index.ceilDiv(chunk.rows, kernel.getRows());
  // The panels, for the groups of k from `from` to `to`.
  auto forPanels = [&](OpBuilder &b, Value from, Value to) {
    forLoop(b, first, end, kernel.getPanels(), [&](OpBuilder &b, Value panel) {
      Index index(b, loc);
      Value mine = sums;
      if (kChunk && kChunk < groups)
        mine =
            tailFrom(b, sums, index.mul(index.mul(index.sub(panel, first), blocks), kSumsOfBlock));
      Value parts = index.ceilDiv(index.sub(to, from), step);
      forLoop(b, index.constant(0), parts, 1, [&](OpBuilder &b, Value part) {
        Index index(b, loc);
        Value firstStep = index.add(from, index.mul(part, step));
        Value endStep = index.min(index.add(firstStep, step), to);
        forBlocks(b, chunk.rows, kernel, [&](OpBuilder &b, const RowBlock &block) {
          makeTile(b, block, panel, [&](OpBuilder &b, GemmTileOp tile) {
            OpBuilder::InsertionGuard guard(b);
            b.setInsertionPoint(tile);
            Index index(b, loc);
            tile.setSteps(firstStep, endStep,
                          tailFrom(b, mine, index.mul(block.number, kSumsOfBlock)));
            if (kernel.getDefer())
              tile.setAfter(block.number, block.blocks);
          });
        });
      });
    });
  };
  if (!kChunk || kChunk >= groups)
    return forPanels(b, index.constant(0), all);
  Value stride = stepOf(kChunk);
  forLoop(b, index.constant(0), index.ceilDiv(all, stride), 1, [&](OpBuilder &b, Value part) {
    Index index(b, loc);
    Value from = index.mul(part, stride);
    forPanels(b, from, index.min(index.add(from, stride), all));
  });
}

void EntryTiler::touchAhead(OpBuilder &b, GemmTileOp tile, Value panels, const RowBlock &block) {
  UkernelAttr kernel = tile.getUkernel();
  if (!kernel.getAhead())
    return;
  WeightType weight = tile.getWeight().getType();
  // A block touches `ahead` lines for every 64 bytes of a packed row.
  int64_t columns = UkernelAttr::readsPairs(kernel.getProduct()) ? 32 : 16;
  int64_t touched = (weight.getCols() + columns - 1) / columns * 64 * kernel.getAhead();
  int64_t slices = std::max<int64_t>(1, (weight.panelBytes() + touched - 1) / touched);
  OpBuilder::InsertionGuard guard(b);
  b.setInsertionPoint(tile);
  Index index(b, loc);
  Value slice = index.part(index.constant(slices), block.number, block.blocks);
  Value distance = index.add(index.mul(panels, weight.panelBytes()), index.mul(slice, touched));
  tile.setAhead(distance);
}

Value EntryTiler::panelsToNextChunk(OpBuilder &b, WeightType weight, const Groups &groups, Value i,
                                    const Chunk &chunk) {
  Index index(b, loc);
  if (groups.singleRows)
    return index.constant(0);
  Value last = index.sub(chunkCount(b, groups), index.constant(1));
  Value next = index.min(index.add(i, index.constant(1)), last);
  // Experts of chunks ascend.
  return index.mul(index.sub(chunkAt(b, groups, next).expert, chunk.expert), weight.panelCount());
}

void EntryTiler::claimRows(OpBuilder &b, StageOp stage, Value rows, LoopBody body) {
  Value total = Index(b, loc).ceilDiv(rows, kElementwiseRows);
  claimTasks(b, stage, total, /*guided=*/false, {},
             [&](OpBuilder &b, Value task, ValueRange) -> SmallVector<Value> {
               Index index(b, loc);
               Value first = index.mul(task, kElementwiseRows);
               Value end = index.min(index.add(first, index.constant(kElementwiseRows)), rows);
               forLoop(b, first, end, 1, body);
               return {};
             });
}

Value EntryTiler::tailFrom(OpBuilder &b, Value buffer, Value offset) {
  Index index(b, loc);
  Value size = index.sub(b.createOrFold<memref::DimOp>(loc, buffer, 0), offset);
  return memref::SubViewOp::create(b, loc, buffer, ArrayRef<OpFoldResult>{offset},
                                   ArrayRef<OpFoldResult>{size},
                                   ArrayRef<OpFoldResult>{b.getIndexAttr(1)});
}

//===----------------------------------------------------------------------===//
// Panels of sums
//===----------------------------------------------------------------------===//

Value EntryTiler::panelsPerTask(OpBuilder &b, StageOp stage, int64_t panels, int64_t most,
                                int64_t step, int64_t sumRows, Value tokens) {
  Index index(b, loc);
  Value share = index.ceilDiv(index.constant(panels), index.mul(stage.getLanes(), 4));
  Value room = index.div(index.constant(sumRows), index.max(tokens, index.constant(1)));
  Value count = index.min(index.min(share, room), index.constant(most));
  if (step == 1)
    return index.max(count, index.constant(1));
  return index.max(index.mul(index.div(count, index.constant(step)), step), index.constant(step));
}

/// A lane's sums for the panels of a task: [panels, T, 32], as a vector because the number of
/// panels depends on T.
Value EntryTiler::panelScratch(OpBuilder &b, int64_t most, int64_t step, int64_t sumRows,
                               Value tokens) {
  Index index(b, loc);
  Value rows = index.min(index.mul(tokens, most),
                         index.max(index.constant(sumRows), index.mul(tokens, step)));
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
