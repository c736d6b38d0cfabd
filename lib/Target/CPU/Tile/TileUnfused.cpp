//===- TileUnfused.cpp - gather, activate, combine on their own ---------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "ClaimPanels.h"
#include "EntryTiler.h"

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::tile;

LogicalResult EntryTiler::tile(GatherOp op) {
  FailureOr<Groups *> groups = groupsOf(op, op.getOffsets());
  if (failed(groups))
    return failure();
  auto type = cast<MemRefType>(op.getOut().getType());
  int64_t cols = type.getDimSize(1), lanes = lanesOf(), whole = cols / lanes * lanes;
  Value out = alloc(b, type.getShape(), type.getElementType(), rowCount(op.getOut()));
  buffers[op.getOut()] = out;
  StageOp stage = stageFor(op.getOperation(), "gather");
  OpBuilder body = atEnd(stage.getBody());
  Value rowWeights = flatten(body, op.getRowWeights());
  claimRows(body, stage, usedRows(body, **groups), [&](OpBuilder &b, Value n) {
    Index index(b, loc);
    Value pair = index.load(op.getPair(), n);
    Value token = index.div(pair, op.getSlots()), factor;
    if (rowWeights)
      factor = memref::LoadOp::create(b, loc, rowWeights, pair);
    auto copy = [&](OpBuilder &b, Value c, int64_t width) {
      storeF32(b, loadF32(b, op.getX(), {token, c}, width), out, {n, c});
      if (!factor)
        return;
      // The product is of what x was rounded to, and rounded again.
      Value rounded = loadF32(b, out, {n, c}, width), broadcast = factor;
      if (width > 1)
        broadcast = vector::BroadcastOp::create(b, loc, rounded.getType(), factor);
      storeF32(b, arith::MulFOp::create(b, loc, rounded, broadcast), out, {n, c});
    };
    forLoop(b, index.constant(0), index.constant(whole), lanes,
            [&](OpBuilder &b, Value c) { copy(b, c, lanes); });
    forLoop(b, index.constant(whole), index.constant(cols), 1,
            [&](OpBuilder &b, Value c) { copy(b, c, 1); });
  });
  return success();
}

LogicalResult EntryTiler::tile(ActivateOp op) {
  Value in = physical(op.getParts());
  auto inType = cast<MemRefType>(in.getType());
  auto outType = cast<MemRefType>(op.getOut().getType());
  int64_t width = inType.getShape().back(), lanes = lanesOf();
  if (width % 16)
    return op.emitOpError("expected parts padded to whole panels, but got a width of ") << width;
  Value rows = rowCount(op.getOut());
  Value out = alloc(b, {ShapedType::kDynamic, width}, outType.getElementType(), rows);
  buffers[op.getOut()] = out;
  StageOp stage = stageFor(op.getOperation(), "activate");
  OpBuilder body = atEnd(stage.getBody());
  // Only rows that exist are worth the work; the rest of the matrix is undefined.
  Value used = rows;
  for (Operation *user : op.getParts().getUsers())
    if (auto producer = dyn_cast<GroupedMatmulOp>(user))
      if (producer.getOut() == op.getParts()) {
        FailureOr<Groups *> groups = groupsOf(producer, producer.getOffsets());
        if (failed(groups))
          return failure();
        used = usedRows(body, **groups);
      }
  auto vector = VectorType::get(lanes, body.getF32Type());
  claimRows(body, stage, used, [&](OpBuilder &b, Value n) {
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
  return success();
}

LogicalResult EntryTiler::tile(CombineOp op) {
  FailureOr<Groups *> groups = groupsOf(op, op.getOffsets());
  if (failed(groups))
    return failure();
  Value in = physical(op.getRows());
  auto inType = cast<MemRefType>(in.getType());
  int64_t width = inType.getDimSize(1), panels = width / kPanelWidth, lanes = lanesOf();
  if (width % kPanelWidth)
    return op.emitOpError("expected rows padded to whole panels, but got a width of ") << width;
  StageOp stage = stageFor(op.getOperation(), "combine");
  OpBuilder body = atEnd(stage.getBody());
  Value weights = flatten(body, op.getWeights());
  Value gate = flatten(body, op.getGate() ? physical(op.getGate()) : Value());
  Value used = usedRows(body, **groups);
  auto vector = VectorType::get(lanes, body.getF32Type());
  claimPanels(body, stage, op, op.getOut(), panels, /*most=*/8, /*step=*/1, /*sumRows=*/4096,
              [&](OpBuilder &b, Value firstPanel, Value endPanel,
                  llvm::function_ref<Value(OpBuilder &, Value)> view) {
                forLoop(b, Index(b, loc).constant(0), used, 1, [&](OpBuilder &b, Value n) {
                  Index index(b, loc);
                  Value token = n, weight;
                  if (op.getPair()) {
                    Value pair = index.load(op.getPair(), n);
                    token = index.div(pair, op.getSlots());
                    if (!op.getUnweighted())
                      weight = memref::LoadOp::create(b, loc, weights, pair);
                  } else if (gate) {
                    weight = memref::LoadOp::create(b, loc, gate, n);
                  }
                  if (!weight)
                    weight = arith::ConstantOp::create(b, loc, b.getF32FloatAttr(1.0f));
                  if (op.getScale())
                    weight = arith::MulFOp::create(b, loc, weight, op.getScale());
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
              });
  return success();
}
