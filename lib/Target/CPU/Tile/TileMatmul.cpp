//===- TileMatmul.cpp - grouped matmuls ---------------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "ClaimPanels.h"
#include "EntryTiler.h"

#include "mlir/IR/IRMapping.h"
#include "mlir/IR/Matchers.h"

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::tile;

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
  PackRowsOp::create(b, loc, source, op.getViaPair(), op.getViaSlots(),
                     flatten(b, op.getRowWeights()), first, rows, into, TypeAttr::get(element));
}

void EntryTiler::packChunk(OpBuilder &b, GroupedMatmulOp op, const Chunk &chunk, Value into,
                           int64_t stride) {
  forBlocks(b, chunk.rows, op.getStrategyAttr().getUkernel(),
            [&](OpBuilder &b, const RowBlock &block) {
              Index index(b, loc);
              packBlock(b, op, index.add(chunk.first, block.begin), block.rows,
                        tailFrom(b, into, index.mul(block.begin, stride)));
            });
}

LogicalResult EntryTiler::tile(GroupedMatmulOp op) {
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
  if (!op.hasCombine())
    return tileMatmulToBuffer(op, **groups);
  // The sums of a chain are made in one go, where it ends.
  return continuation(op) ? success() : tileMatmulCombine(op);
}

/// Elements between rows of a matrix of row blocks: whole panels, however many columns a panel of
/// its writer has.
static int64_t blockedStride(int64_t cols) { return roundUp(cols, kPanelWidth); }

/// Element type of the row blocks that a kernel reads, and elements per row of K columns that it
/// packs itself.
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

/// Tasks are (chunk, group of panels); the product goes to row blocks or to a row-major matrix.
LogicalResult EntryTiler::tileMatmulToBuffer(GroupedMatmulOp op, const Groups &groups) {
  StrategyAttr strategy = op.getStrategyAttr();
  UkernelAttr kernel = strategy.getUkernel();
  WeightType weight = op.getWeightType();
  bool blockedSource = strategy.getSource() == RowSource::Blocked;
  auto [element, packedStride] = blockOf(kernel, weight.getCols());
  int64_t padded = blockedSource ? blockedStride(weight.getCols()) : packedStride;
  int64_t width = weight.panelCount() * weight.panelCols();
  bool blockedResult = strategy.getResult() == ResultForm::Blocked;
  auto outType = cast<MemRefType>(op.getOut().getType());
  Index index(b, loc);
  Value rows = rowCount(op.getOut());

  Value out;
  int64_t blockStride = blockedStride(weight.getRows());
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
    // Numbers that weigh tokens are read one by one; anything else is read panel by panel.
    bool isGate = llvm::any_of(op.getOut().getUsers(), [&](Operation *user) {
      auto matmul = dyn_cast<GroupedMatmulOp>(user);
      auto combine = dyn_cast<CombineOp>(user);
      return (matmul && matmul.getGate() == op.getOut()) ||
             (combine && combine.getGate() == op.getOut());
    });
    out = alloc(b, {ShapedType::kDynamic, isGate ? weight.getRows() : width},
                outType.getElementType(), rows);
  }
  buffers[op.getOut()] = out;

  StageOp stage =
      stageFor(op.getOperation(), weight.getParts() > 1 || op.hasEpilogue() ? "up" : "down");
  OpBuilder body = atEnd(stage.getBody());
  Index bodyIndex(body, loc);
  Value packed = physical(op.getRows());
  if (!blockedSource) {
    Value most = bodyIndex.min(rows, bodyIndex.constant(strategy.getChunkRows()));
    packed =
        alloc(body, {ShapedType::kDynamic}, element,
              bodyIndex.add(bodyIndex.mul(most, padded), bodyIndex.constant(blockSlack(kernel))));
  }
  Value sums = sumsOf(body, strategy, weight);
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
          packChunk(inner, op, chunk, packed, padded);
        }
        Value firstPanel = index.mul(group, groupPanels);
        Value endPanel =
            index.min(index.add(firstPanel, index.constant(groupPanels)), index.constant(panels));
        // The next task has the panels that follow, of the next expert at the end.
        Value later = index.constant(groupPanels);
        forTiles(b, chunk, strategy, weight, firstPanel, endPanel, later, sums,
                 [&](OpBuilder &b, const RowBlock &block, Value panel, UkernelAttr kernel) {
                   Index index(b, loc);
                   Value row = index.add(chunk.first, block.begin);
                   Value a =
                       tailFrom(b, packed, index.mul(blockedSource ? row : block.begin, padded));
                   Value into = blockedResult ? tailFrom(b, out, index.mul(row, blockStride)) : out;
                   auto tile = GemmTileOp::create(
                       b, loc, block.rows, a, op.getWeight(), chunk.expert, panel, into,
                       blockedResult ? Value() : row,
                       blockedResult ? ResultForm::Blocked : ResultForm::Rows, kernel);
                   tile.setBias(op.getBias());
                   IRMapping mapping;
                   op.getEpilogue().cloneInto(&tile.getEpilogue(), mapping);
                   return tile;
                 });
        return {chunkIndex};
      });
  return success();
}

GroupedMatmulOp EntryTiler::continuation(GroupedMatmulOp op) {
  GroupedMatmulOp next;
  for (Operation *user : op.getOut().getUsers()) {
    if (user == op)
      continue;
    auto matmul = dyn_cast<GroupedMatmulOp>(user);
    if (next || !matmul || matmul.getStart() != op.getOut() || matmul.getOut() == op.getOut() ||
        !matchPattern(matmul.getAccumulate(), m_One()))
      return nullptr;
    next = matmul;
  }
  return next;
}

/// Tasks are groups of panels of the output, each for all chunks in ascending order: a lane owns
/// its columns, so sums need no fence and have one order. `op` ends a chain of combines whose sums
/// nobody else reads.
LogicalResult EntryTiler::tileMatmulCombine(GroupedMatmulOp op) {
  SmallVector<Summand> chain;
  for (GroupedMatmulOp link = op; link;) {
    FailureOr<Groups *> groups = groupsOf(link, link.getOffsets());
    if (failed(groups))
      return failure();
    chain.push_back({link, *groups, nullptr, nullptr, nullptr, nullptr});
    GroupedMatmulOp before;
    if (link.getStart())
      for (Operation *user : link.getStart().getUsers())
        if (auto matmul = dyn_cast<GroupedMatmulOp>(user))
          if (matmul.getOut() == link.getStart() && continuation(matmul) == link)
            before = matmul;
    link = before;
  }
  std::reverse(chain.begin(), chain.end());

  StrategyAttr strategy = op.getStrategyAttr();
  int64_t panels = op.getWeightType().panelCount(), step = strategy.getUkernel().getPanels();
  int64_t most = strategy.getPanelsPerTask();
  SmallVector<Operation *> ops;
  for (Summand &summand : chain)
    ops.push_back(summand.op);
  StageOp stage = stageFor(ops, "down");
  OpBuilder body = atEnd(stage.getBody());
  Index bodyIndex(body, loc);
  for (Summand &summand : chain) {
    GroupedMatmulOp link = summand.op;
    StrategyAttr own = link.getStrategyAttr();
    if (link.hasEpilogue())
      return link.emitOpError("expected no region together with a combine clause, but got one");
    if (own.getUkernel().getPanels() != step || own.getPanelsPerTask() != most)
      return link.emitOpError("expected panels ")
             << step << " and panels_per_task " << most
             << " as in the combine that goes on with its sums, but got "
             << own.getUkernel().getPanels() << " and " << own.getPanelsPerTask();
    summand.packed = physical(link.getRows());
    if (!summand.isBlocked()) {
      Value rows = rowCount(link.getCombinePair() ? link.getCombinePair() : op.getOut());
      Value count = bodyIndex.min(rows, bodyIndex.constant(own.getChunkRows()));
      auto [element, padded] = blockOf(own.getUkernel(), link.getWeightType().getCols());
      Value size = bodyIndex.add(bodyIndex.mul(count, padded),
                                 bodyIndex.constant(blockSlack(own.getUkernel())));
      summand.packed = alloc(body, {ShapedType::kDynamic}, element, size);
    }
    summand.sums = sumsOf(body, own, link.getWeightType());
    summand.weights = flatten(body, link.getCombineWeights());
    summand.gate = flatten(body, link.getGate() ? physical(link.getGate()) : Value());
  }

  claimPanels(
      body, stage, chain.front().op, op.getOut(), panels, most, step, strategy.getSumRows(),
      [&](OpBuilder &b, Value firstPanel, Value endPanel,
          llvm::function_ref<Value(OpBuilder &, Value)> view) {
        for (Summand &summand : chain) {
          GroupedMatmulOp link = summand.op;
          WeightType weight = link.getWeightType();
          StrategyAttr own = link.getStrategyAttr();
          int64_t padded = summand.isBlocked() ? blockedStride(weight.getCols())
                                               : blockOf(own.getUkernel(), weight.getCols()).second;
          const Groups &groups = *summand.groups;
          Value zero = Index(b, loc).constant(0);
          forLoop(b, zero, chunkCount(b, groups), 1, [&](OpBuilder &b, Value i) {
            Chunk chunk = chunkAt(b, groups, i);
            if (!summand.isBlocked())
              packChunk(b, link, chunk, summand.packed, padded);
            forTiles(b, chunk, own, weight, firstPanel, endPanel,
                     panelsToNextChunk(b, weight, groups, i, chunk), summand.sums,
                     [&](OpBuilder &b, const RowBlock &block, Value panel, UkernelAttr kernel) {
                       Index index(b, loc);
                       Value row = index.add(chunk.first, block.begin);
                       Value place = summand.isBlocked() ? row : block.begin;
                       Value a = tailFrom(b, summand.packed, index.mul(place, padded));
                       auto tile = GemmTileOp::create(b, loc, block.rows, a, link.getWeight(),
                                                      chunk.expert, panel, view(b, panel), row,
                                                      ResultForm::Combine, kernel);
                       tile.setBias(link.getBias());
                       tile.setCombine(link.getCombinePair(), summand.weights,
                                       link.getCombineSlots(), summand.gate, link.getScale(),
                                       link.getUnweighted(), link.getCombineTypeAttr());
                       return tile;
                     });
          });
        }
      });
  return success();
}
