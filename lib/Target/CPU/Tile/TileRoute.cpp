//===- TileRoute.cpp - routers, dispatch, groups ------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "EntryTiler.h"

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::tile;

//===----------------------------------------------------------------------===//
// Groups
//===----------------------------------------------------------------------===//

/// Cuts the rows of `offsets` into chunks as the matmuls that use them say.
FailureOr<Groups> EntryTiler::makeGroups(Value offsets, Value rows, int64_t experts) {
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
             << groups.chunkRows << " as the other matmul of these groups has, but got "
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
  return groups;
}

FailureOr<Groups *> EntryTiler::groupsOf(Operation *op, Value offsets) {
  auto it = groupings.find(offsets);
  if (it == groupings.end())
    return op->emitOpError("expected offsets of a dispatch or single_group of this function, but "
                           "got another value");
  return &it->second;
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
  auto forKnownIds = [&](llvm::function_ref<void(OpBuilder &, Value, Value)> body) {
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

//===----------------------------------------------------------------------===//
// Router and dispatch
//===----------------------------------------------------------------------===//

template <typename OpTy>
LogicalResult EntryTiler::tileRouter(OpTy op, Value outLogits,
                                     std::optional<std::pair<Value, Value>> dispatch) {
  StrategyAttr strategy = op.getStrategyAttr();
  if (!strategy)
    return op.emitOpError("expected a strategy, but got none; run moe-select-strategy");
  RouterAttr router = op.getRouter();
  std::string unimplemented = router.getUnimplemented();
  if (!unimplemented.empty())
    return op.emitOpError("expected a router that the CPU target implements, but got ")
           << unimplemented;
  Value x = op.getX();
  WeightType type = op.getWeight().getType();
  UkernelAttr kernel = strategy.getUkernel();
  Type element =
      op.getCompute() ? *op.getCompute() : cast<MemRefType>(x.getType()).getElementType();
  // In f32 a model's own rounding is ours.
  if (!element.isBF16())
    router = router.withPrecision(RouterPrecision::F32);
  int64_t experts = op.getNumExperts();
  RouterVectors vectors = op.getVectors();
  Value tokens = rowCount(x);
  FailureOr<Groups> groups = failure();
  Value cursor;
  if (dispatch) {
    groups = makeGroups(dispatch->first, Index(b, loc).mul(tokens, router.getTopK()), experts);
    if (failed(groups))
      return failure();
    cursor = alloc(b, {experts}, b.getI32Type());
  }
  StageOp stage = stageFor(op.getOperation(), "route", /*withTail=*/bool(dispatch));
  OpBuilder body = atEnd(stage.getBody());
  Value a = alloc(body, {kernel.getRows() * roundUp(type.getCols(), 16)}, body.getF32Type());
  Value logits =
      alloc(body, {kernel.getRows(), type.panelCount() * kPanelWidth}, body.getF32Type());
  // Few tokens are shared among the lanes, although each lane then reads all of the weight: with
  // one block the others would wait.
  Value blocks = Index(body, loc).ceilDiv(tokens, kernel.getRows());
  blocks = Index(body, loc).max(blocks, Index(body, loc).min(tokens, stage.getLanes()));
  claimTasks(body, stage, blocks, /*guided=*/false, {},
             [&](OpBuilder &b, Value block, ValueRange) -> SmallVector<Value> {
               Index index(b, loc);
               Value first = index.part(tokens, block, blocks);
               Value end = index.part(tokens, index.add(block, index.constant(1)), blocks);
               Value count = index.sub(end, first);
               PackRowsOp::create(b, loc, x, Value(), Value(), Value(), first, count, a,
                                  TypeAttr::get(element));
               if (vectors.inputScale)
                 NormalizeRowsOp::create(b, loc, count, a, vectors.inputScale,
                                         b.getF64FloatAttr(router.getInputEpsilon()),
                                         router.roundsLogits() ? b.getUnitAttr() : UnitAttr());
               Value zero = index.constant(0);
               forLoop(b, zero, index.constant(type.panelCount()), kernel.getPanels(),
                       [&](OpBuilder &b, Value panel) {
                         GemmTileOp::create(b, loc, count, a, op.getWeight(), zero, panel, logits,
                                            zero, ResultForm::Rows, kernel)
                             .setBias(vectors.bias);
                       });
               SelectExpertsOp::create(b, loc, logits, first, count, vectors.selectionBias,
                                       vectors.expertScale, op.getOutWeights(), op.getOutExperts(),
                                       outLogits, b.getI64IntegerAttr(experts), router);
               return {};
             });
  if (dispatch) {
    OpBuilder tail = atEnd(stage.getTail());
    sortPairs(tail, op.getOutExperts(), *groups, dispatch->second, cursor);
  }
  return success();
}

LogicalResult EntryTiler::tile(RouterOp op) {
  return tileRouter(op, op.getOutLogits(), std::nullopt);
}

LogicalResult EntryTiler::tile(RouteDispatchOp op) {
  return tileRouter(op, Value(), std::make_pair(op.getOutOffsets(), op.getOutPair()));
}

LogicalResult EntryTiler::tile(DispatchOp op) {
  Value ids = op.getIds();
  Index index(b, loc);
  Value rows = index.mul(rowCount(ids), b.createOrFold<memref::DimOp>(loc, ids, 1));
  FailureOr<Groups> groups = makeGroups(op.getOutOffsets(), rows, op.getExperts());
  if (failed(groups))
    return failure();
  Value cursor = alloc(b, {int64_t(op.getExperts())}, b.getI32Type());
  OpBuilder tail = atEnd(stageFor(op.getOperation(), "dispatch", /*withTail=*/true).getTail());
  sortPairs(tail, ids, *groups, op.getOutPair(), cursor);
  return success();
}

LogicalResult EntryTiler::tile(SingleGroupOp op) {
  // One group needs no list: its chunks are computed where they are used.
  FailureOr<Groups> groups = makeGroups(op.getOut(), op.getRows(), 1);
  if (failed(groups))
    return failure();
  Groups &entry = groupings[op.getOut()];
  entry.plan.getDefiningOp()->erase();
  entry.count.getDefiningOp()->erase();
  entry.plan = entry.count = nullptr;
  entry.singleRows = op.getRows();
  return success();
}
