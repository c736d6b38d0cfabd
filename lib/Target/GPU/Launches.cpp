//===- Launches.cpp - the launches of an entry, in their order ------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "EntryEmitter.h"
#include "TensorMap.h"
#include "moe/Target/GPU/Arch.h"

#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/Dialect/SCF/IR/SCF.h"

using namespace mlir;
using namespace mlir::moe;

/// One kernel per tile; the number of rows says which is launched.
LogicalResult EntryEmitter::launchMatmul(StringRef name, GroupedMatmulOp op, const MatmulRows &from,
                                         Value result, bool add) {
  OpBuilder::InsertionGuard guard(b);
  WeightType type = op.getWeightType();
  SmallVector<Value> args = {from.rows,    scratch[Pair],          slots,
                             from.offsets, weight(op.getWeight()), result};
  if (op.getBias())
    args.push_back(weight(op.getBias()));
  if (add)
    args.append({weights, scale});
  auto tiles = op->getAttrOfType<ArrayAttr>(kGPUTilesAttrName);
  int64_t processors = findGPUArch(layer.level())->processors;
  Value packed = args[4];
  for (auto [i, each] : llvm::enumerate(tiles.getAsRange<GPUTileAttr>())) {
    GPUTileAttr attr = each;
    GemmKernel spec{attr,
                    type,
                    from.rowWidth,
                    Layer::width(op),
                    from.gather,
                    op.hasEpilogue() ? &op.getEpilogue() : nullptr,
                    bool(op.getBias()),
                    add,
                    op.getUnweighted()};
    bool last = i + 1 == tiles.size();
    if (!last) {
      Value fits =
          arith::CmpIOp::create(b, loc, arith::CmpIPredicate::sle, from.count, c32(attr.getUpTo()));
      auto choice = scf::IfOp::create(b, loc, fits, /*withElse=*/true);
      b.setInsertionPointToStart(choice.thenBlock());
    }
    // Rows of an expert end in at most one tile that is not full: no more tiles than this exist.
    Value full = arith::DivUIOp::create(b, loc, from.count, c32(attr.getRows()));
    Value partial = arith::MinUIOp::create(b, loc, from.count, c32(type.getExperts()));
    Value grid = arith::MulIOp::create(b, loc, arith::AddIOp::create(b, loc, full, partial),
                                       c32(spec.colBlocks()));
    if (attr.isWgmma()) {
      // Blocks that stay: as many as there are processors.
      grid = arith::MinUIOp::create(b, loc, grid, c32(processors));
      args[4] = createWeightMap(b, loc, frame, packed, type, attr);
    }
    if (failed(launch((name + "_" + Twine(i)).str(), grid, c32(1), attr.getThreads(),
                      attr.getSharedBytes(), args, [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                        if (attr.isWgmma()) {
                          setMapArgument(kernel, 4);
                          kernel->setAttr(NVVM::NVVMDialect::getMaxnregAttrName(),
                                          inner.getI32IntegerAttr(GPUTileAttr::kStartRegisters));
                        }
                        return emitGemm(inner, kernel, spec);
                      })))
      return failure();
    if (!last) {
      auto choice = cast<scf::IfOp>(b.getInsertionBlock()->getParentOp());
      b.setInsertionPointToStart(choice.elseBlock());
    }
  }
  return success();
}

/// x into rows, and what the router reads into logits, experts and sorted rows.
LogicalResult EntryEmitter::launchStage() {
  Type i64 = b.getI64Type();
  StageKernel stage{layer.xType, layer.hidden(), layer.rowWidth(), {}};
  stage.sums = layer.isAtomic();
  stage.group = bool(layer.groupUp);
  SmallVector<Value> args = {framePointer(offsetof(moec_frame, x)),
                             field(i64, offsetof(moec_frame, x_stride)), tokens, scratch[Rows]};
  if (stage.sums)
    args.push_back(scratch[Sums]);
  if (stage.group)
    args.append({scratch[GroupOffsets], groupCount});
  if (!layer.router || (layer.routerX && layer.up)) {
    if (failed(launchLogits("stage", stage, args)))
      return failure();
    if (!layer.router)
      return success();
  }
  if (layer.routerX) {
    stage.rows = stage.sums = stage.group = false;
    args = {framePointer(offsetof(moec_frame, router_x)),
            field(i64, offsetof(moec_frame, router_x_stride)), tokens};
  }
  stage.router = layer.routerWeight();
  stage.normalize = bool(layer.vectors.inputScale);
  stage.rounds = layer.routerAttr.roundsLogits();
  if (stage.normalize) {
    NormKernel norm{layer.xType, layer.hidden(), layer.routerAttr.getInputEpsilon()};
    if (failed(launchPlain(
            "norm", blocks(tokens, kNormWarps), c32(1), 32 * kNormWarps, 0,
            {args[0], args[1], tokens, scratch[Factors]},
            [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) { emitNorm(inner, kernel, norm); })))
      return failure();
  }
  args.append({weight(layer.routerWeightValue()), scratch[Partial]});
  if (stage.normalize)
    args.append({scratch[Factors], weight(layer.vectors.inputScale)});
  return launchRouter(stage, args);
}

LogicalResult EntryEmitter::launchLogits(StringRef name, const StageKernel &stage,
                                         ArrayRef<Value> args) {
  return launchPlain(
      name, blocks(tokens, stage.blockTokens), c32(stage.whole ? 1 : stage.slices()),
      stage.kThreads, stage.sharedBytes(), args,
      [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) { emitStage(inner, kernel, stage); });
}

/// Logits, experts and their weights, and the rows of each expert: in one launch of few tokens.
LogicalResult EntryEmitter::launchRouter(StageKernel stage, ArrayRef<Value> stageArgs) {
  const RouterVectors &vectors = layer.vectors;
  SelectKernel select{layer.routerAttr,
                      layer.experts(),
                      layer.routerWeight().panelCount(),
                      stage.slices(),
                      layer.logits,
                      bool(vectors.bias),
                      bool(vectors.selectionBias),
                      bool(vectors.expertScale)};
  SmallVector<Value> args = {weights, ids};
  if (layer.logits)
    args.append({framePointer(offsetof(moec_frame, logits)),
                 field(b.getI64Type(), offsetof(moec_frame, logits_stride))});
  for (Value vector : {vectors.bias, vectors.selectionBias, vectors.expertScale})
    if (vector)
      args.push_back(weight(vector));
  auto with = [](ArrayRef<Value> first, ArrayRef<Value> rest) {
    SmallVector<Value> all(first);
    llvm::append_range(all, rest);
    return all;
  };
  /// `then` where there are at most `most` tokens, else what comes after.
  auto choose = [&](int64_t most) {
    Value few = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::sle, tokens, c32(most));
    return scf::IfOp::create(b, loc, few, /*withElse=*/true);
  };
  OpBuilder::InsertionGuard guard(b);
  if (RouteKernel route{stage, select, bool(layer.up)}; route.fits(layer.routerAttr.getTopK())) {
    auto few = choose(kFewTokens);
    b.setInsertionPointToStart(few.thenBlock());
    SmallVector<Value> all = with(stageArgs, {framePointer(offsetof(moec_frame, ticket))});
    all = with(all, args);
    if (route.sort)
      all = with(all, {scratch[Offsets], scratch[Pair], scratch[Order]});
    if (failed(launchPlain(
            "route", c32(1), c32(stage.slices()), route.kThreads, route.sharedBytes(), all,
            [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) { emitRoute(inner, kernel, route); })))
      return failure();
    b.setInsertionPointToStart(few.elseBlock());
  }
  Value slices = c32(stage.slices());
  if (stage.onTensorCores())
    stage.blockTokens = kManyTokens;
  if (stage.onTensorCores() && stage.slices() > 1 && select.panels <= stage.kWholePanels) {
    // Enough blocks without slices: their sums need not be written and read again.
    Value some = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::slt, tokens,
                                       c32(kManyTokens * kWholeBlocks));
    slices = arith::SelectOp::create(b, loc, some, slices, c32(1));
    auto choice = scf::IfOp::create(b, loc, some, /*withElse=*/true);
    {
      OpBuilder::InsertionGuard inside(b);
      b.setInsertionPointToStart(choice.elseBlock());
      StageKernel whole = stage;
      whole.whole = true;
      if (failed(launchLogits("logits_whole", whole, stageArgs)))
        return failure();
      b.setInsertionPointToStart(choice.thenBlock());
      if (failed(launchLogits("logits", stage, stageArgs)))
        return failure();
    }
    b.setInsertionPointAfter(choice);
  } else if (failed(launchLogits("logits", stage, stageArgs))) {
    return failure();
  }
  if (failed(launchPlain(
          "select", blocks(tokens, kSelectWarps), c32(1), 32 * kSelectWarps, 0,
          with({scratch[Partial], tokens, slices}, args),
          [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) { emitSelect(inner, kernel, select); })))
    return failure();
  return layer.up ? launchSort() : success();
}

/// Rows by expert.
LogicalResult EntryEmitter::launchSort() {
  int64_t E = layer.experts();
  return launchPlain(
      "sort", c32(E), c32(1), kSortThreads, kSortThreads / 32 * 8,
      {ids, count, slots, scratch[Offsets], scratch[Pair], scratch[Order]},
      [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) { emitSort(inner, kernel, E); });
}

/// The matmuls of the experts.
LogicalResult EntryEmitter::launchExperts() {
  int64_t E = layer.experts();
  if (!layer.router && failed(launchSort()))
    return failure();
  MatmulRows from{scratch[Rows], scratch[Offsets], count, layer.rowWidth(), /*gather=*/true};
  if (layer.isOnInput()) {
    WeighKernel weigh{E, layer.rowWidth()};
    if (failed(launchPlain(
            "weigh", count, c32(1), kWeighThreads, 0,
            {scratch[Rows], weights, scratch[Pair], slots, scratch[Offsets], scratch[Weighed]},
            [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) { emitWeigh(inner, kernel, weigh); })))
      return failure();
    from.rows = scratch[Weighed];
    from.gather = false;
  }
  if (failed(launchMatmul("up", layer.up, from, scratch[Hidden])))
    return failure();
  from = {scratch[Hidden], scratch[Offsets], count, Layer::width(layer.up), /*gather=*/false};
  bool atomic = layer.isAtomic();
  return launchMatmul("down", layer.down, from, scratch[atomic ? Sums : Products], atomic);
}

/// The matmuls of a dense layer or a shared expert, and its gate. A call may be without.
LogicalResult EntryEmitter::launchGroup() {
  OpBuilder::InsertionGuard guard(b);
  StringRef up = "up", down = "down";
  if (!layer.isDense()) {
    Value any = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::sgt, groupCount, c32(0));
    b.setInsertionPointToStart(scf::IfOp::create(b, loc, any, /*withElse=*/false).thenBlock());
    up = "shared_up";
    down = "shared_down";
  }
  if (layer.gate) {
    GroupedMatmulOp op = layer.gate;
    GateKernel gate{op.getWeightType(), layer.rowWidth(),
                    op.hasEpilogue() ? &op.getEpilogue() : nullptr};
    if (failed(launch("gate", blocks(groupCount, kGateWarps * kGateTokens), c32(1), 32 * kGateWarps,
                      0, {scratch[Rows], groupCount, weight(op.getWeight()), scratch[Gate]},
                      [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                        return emitGate(inner, kernel, gate);
                      })))
      return failure();
  }
  MatmulRows from{scratch[Rows], scratch[GroupOffsets], groupCount, layer.rowWidth(), false};
  if (failed(launchMatmul(up, layer.groupUp, from, scratch[GroupHidden])))
    return failure();
  from.rows = scratch[GroupHidden];
  from.rowWidth = Layer::width(layer.groupUp);
  return launchMatmul(down, layer.groupDown, from, scratch[GroupProducts]);
}

/// Rows become tokens.
LogicalResult EntryEmitter::launchCombine() {
  CombineKernel combine{layer.yType, layer.hidden(), layer.rowWidth(),
                        layer.up ? layer.experts() : 1, CombineKernel::Rows::None};
  // Where both add up, the experts begin.
  GroupedMatmulOp first = layer.up ? layer.down : layer.groupDown;
  Value accumulate = c32(0);
  if (first.getAccumulate())
    accumulate = arith::TruncIOp::create(b, loc, b.getI32Type(),
                                         field(b.getI64Type(), offsetof(moec_frame, accumulate)));
  SmallVector<Value> args = {framePointer(offsetof(moec_frame, y)),
                             field(b.getI64Type(), offsetof(moec_frame, y_stride)), accumulate};
  if (layer.up && layer.isAtomic()) {
    combine.rows = CombineKernel::Rows::Sums;
    args.push_back(scratch[Sums]);
  } else if (layer.up) {
    combine.rows = CombineKernel::Rows::Routed;
    combine.unweighted = GroupedMatmulOp(layer.down).getUnweighted();
    args.append({scratch[Products], ids, slots, scratch[Pair], scratch[Order]});
    if (!combine.unweighted)
      args.push_back(weights);
    args.push_back(scale);
  }
  if (layer.groupUp) {
    combine.shared = true;
    combine.gate = bool(layer.gate);
    args.append({scratch[GroupProducts], groupCount});
    if (combine.gate)
      args.push_back(scratch[Gate]);
    args.push_back(groupScale);
  }
  return launchPlain(
      "combine", tokens, c32(1), kCombineThreads, 0, args,
      [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) { emitCombine(inner, kernel, combine); });
}
