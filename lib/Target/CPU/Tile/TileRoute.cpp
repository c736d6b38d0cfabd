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

/// Tokens of a call whose router's weight is shared among lanes instead of the tokens.
static constexpr int64_t kFewTokens = 4;

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
  // A router's products are made in one go and have nothing to touch ahead.
  UkernelAttr chosen = strategy.getUkernel();
  auto kernel =
      UkernelAttr::get(chosen.getContext(), chosen.getLevel(), chosen.getRows(), chosen.getPanels(),
                       chosen.getOrder(), chosen.getPrefetch(), chosen.getProduct(), /*ahead=*/0,
                       /*k_block=*/0, LoadHint::Near, /*defer=*/0);
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
  StageOp stage = stageFor(op.getOperation(), "route", /*withTail=*/true);
  // Few tokens: lanes share the experts, and with them the weight, which is what takes time; the
  // last lane selects. Many: they share the tokens.
  int64_t fewest = std::min(kernel.getRows(), kFewTokens), width = type.panelCount() * kPanelWidth;
  Value few = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ule, tokens,
                                    Index(b, loc).constant(fewest));
  Value shared = alloc(b, {fewest, width}, b.getF32Type());
  OpBuilder body = atEnd(stage.getBody());
  Value a = alloc(body, {kernel.getRows() * roundUp(type.getCols(), 16)}, body.getF32Type());
  Value logits = alloc(body, {kernel.getRows(), width}, body.getF32Type());
  Index at(body, loc);
  Value blocks = at.ceilDiv(tokens, kernel.getRows()), panels = at.constant(type.panelCount());
  blocks = at.max(at.max(blocks, at.min(tokens, stage.getLanes())), at.constant(1));
  Value share = at.ceilDiv(panels, at.mul(stage.getLanes(), 2));
  if (kernel.getPanels() > 1)
    share = at.mul(at.ceilDiv(share, kernel.getPanels()), kernel.getPanels());
  Value tasks = arith::SelectOp::create(body, loc, few, at.ceilDiv(panels, share), blocks);
  auto emitSelect = [&](OpBuilder &b, Value logits, Value first, Value count) {
    SelectExpertsOp::create(b, loc, logits, first, count, vectors.selectionBias,
                            vectors.expertScale, op.getOutWeights(), op.getOutExperts(), outLogits,
                            b.getI64IntegerAttr(experts), router);
  };
  // The first token whose rows lie in this lane's scratch; none at first.
  Value none = at.constant(-1);
  claimTasks(body, stage, tasks, /*guided=*/false, none,
             [&](OpBuilder &b, Value task, ValueRange state) -> SmallVector<Value> {
               Index index(b, loc);
               Value zero = index.constant(0), next = index.add(task, index.constant(1));
               auto choose = [&](Value ifFew, Value ifMany) -> Value {
                 return arith::SelectOp::create(b, loc, few, ifFew, ifMany);
               };
               Value first = choose(zero, index.part(tokens, task, blocks));
               Value end = choose(tokens, index.part(tokens, next, blocks));
               Value count = index.sub(end, first);
               Value other =
                   arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ne, first, state[0]);
               auto guard = scf::IfOp::create(b, loc, other, /*withElseRegion=*/false);
               OpBuilder pack = OpBuilder::atBlockTerminator(guard.thenBlock());
               PackRowsOp::create(pack, loc, x, Value(), Value(), Value(), first, count, a,
                                  TypeAttr::get(element));
               if (vectors.inputScale)
                 NormalizeRowsOp::create(pack, loc, count, a, vectors.inputScale,
                                         b.getF64FloatAttr(router.getInputEpsilon()),
                                         router.roundsLogits() ? b.getUnitAttr() : UnitAttr());
               auto multiply = [&](OpBuilder &b, Value from, Value to, Value into) {
                 forLoop(b, from, to, kernel.getPanels(), [&](OpBuilder &b, Value panel) {
                   GemmTileOp::create(b, loc, count, a, op.getWeight(), zero, panel, into, zero,
                                      ResultForm::Rows, kernel)
                       .setBias(vectors.bias);
                 });
               };
               auto choice = scf::IfOp::create(b, loc, few, /*withElseRegion=*/true);
               OpBuilder inner = OpBuilder::atBlockTerminator(choice.thenBlock());
               Value from = Index(inner, loc).mul(task, share);
               multiply(inner, from,
                        Index(inner, loc).min(Index(inner, loc).add(from, share), panels), shared);
               inner = OpBuilder::atBlockTerminator(choice.elseBlock());
               multiply(inner, zero, panels, logits);
               emitSelect(inner, logits, first, count);
               return {first};
             });
  OpBuilder tail = atEnd(stage.getTail());
  auto choice = scf::IfOp::create(tail, loc, few, /*withElseRegion=*/false);
  OpBuilder inner = OpBuilder::atBlockTerminator(choice.thenBlock());
  emitSelect(inner, shared, Index(inner, loc).constant(0), tokens);
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
