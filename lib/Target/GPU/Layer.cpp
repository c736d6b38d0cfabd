//===- Layer.cpp - what the GPU reads out of an entry ---------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Layer.h"

#include "llvm/ADT/StringExtras.h"

using namespace mlir;
using namespace mlir::moe;

/// Refuses attributes of an operation that are not in the list: one that is added for another
/// target must not be ignored here.
static LogicalResult checkAttributes(Operation *op, ArrayRef<StringRef> known) {
  for (NamedAttribute attr : op->getAttrs())
    if (!llvm::is_contained(known, attr.getName().getValue()) &&
        attr.getName() != "operandSegmentSizes")
      return op->emitOpError("expected attributes with GPU code, but got `")
             << attr.getName().getValue() << "`";
  return success();
}

/// The same for the parameters of a struct-like attribute, by its text: parameters at their default
/// are not printed.
static LogicalResult checkParameters(Operation *op, Attribute attr, ArrayRef<StringRef> known) {
  std::string text;
  llvm::raw_string_ostream(text) << attr;
  StringRef rest = text;
  rest = rest.drop_until([](char c) { return c == '<'; }).drop_front();
  int64_t depth = 0;
  for (size_t i = 0; i < rest.size(); ++i) {
    if (rest[i] == '<')
      ++depth;
    if (rest[i] == '>' && depth-- == 0)
      break;
    if (depth == 0 && rest[i] == '=') {
      StringRef name = rest.take_front(i).rtrim();
      name = name.substr(name.find_last_of(" ,") + 1);
      if (!llvm::is_contained(known, name)) {
        StringRef value = rest.drop_front(i + 1).ltrim();
        return op->emitOpError("expected attributes with GPU code, but got `")
               << name << " = " << value.take_until([](char c) { return c == ',' || c == '>'; })
               << "`";
      }
    }
  }
  return success();
}

LogicalResult Layer::checkRouter() {
  if (failed(checkAttributes(router, {"router", "compute", "strategy", "experts"})))
    return failure();
  if (failed(checkParameters(router, routerAttr,
                             {"score", "order", "top_k", "renormalize", "epsilon", "norm_p",
                              "scale", "selection_bias", "groups"})))
    return failure();
  vectors = isa<RouterOp>(router) ? cast<RouterOp>(router).getVectors()
                                  : cast<RouteDispatchOp>(router).getVectors();
  if (vectors.expertScale || vectors.inputScale)
    return router->emitOpError("expected a router with biases alone, but got ")
           << (vectors.expertScale ? "expert_scale" : "input_scale") << ": not built yet for GPUs";
  if (routerAttr.getSelectionBias() == SelectionBias::Logit)
    return router->emitOpError("expected selection_bias = score, but got logit: not built yet for "
                               "GPUs");
  if (routerAttr.getGroups() && routerAttr.getGroups().getCount() > 32)
    return router->emitOpError("expected at most 32 groups on a GPU, but got ")
           << routerAttr.getGroups().getCount();
  if ((routerAttr.getGroups() || vectors.selectionBias) &&
      routerAttr.getOrder() != RouterOrder::ScoreThenSelect)
    return router->emitOpError("expected order = score_then_select with groups or a selection "
                               "bias, but got the other: not built yet for GPUs");
  if (routerAttr.getScore() != ScoreFunction::Softmax &&
      routerAttr.getScore() != ScoreFunction::Sigmoid)
    return router->emitOpError("expected score softmax or sigmoid, but got ")
           << stringifyScoreFunction(routerAttr.getScore());
  if (routerAttr.getRenormalize() != Renormalize::None &&
      routerAttr.getRenormalize() != Renormalize::Sum)
    return router->emitOpError("expected renormalize none or sum, but got ")
           << stringifyRenormalize(routerAttr.getRenormalize());
  auto compute = router->getAttrOfType<TypeAttr>("compute");
  if (!(compute ? compute.getValue() : xType).isBF16())
    return router->emitOpError("expected x that is rounded to bf16, but got ")
           << xType << " without compute = bf16";
  if (experts() > 1024)
    return router->emitOpError("expected at most 1024 experts, but got ") << experts();
  return success();
}

LogicalResult Layer::readMatmul(GroupedMatmulOp op) {
  if (failed(checkAttributes(op, {"row_type", "combine_type", "strategy", kGPUTilesAttrName})))
    return failure();
  int64_t operands = 4 + (op.getViaPair() ? 2 : 0) + (op.getCombinePair() ? 3 : 0) +
                     (op.getAccumulate() ? 1 : 0) + (op.getBias() ? 1 : 0);
  if (op->getNumOperands() != operands)
    return op.emitOpError("expected ")
           << operands << " operands with GPU code, but got " << op->getNumOperands();
  WeightType weight = op.getWeightType();
  if (!weight.getFormat().getStorageType().isBF16())
    return op.emitOpError("expected a weight in bf16, but got ") << weight;
  if (weight.getLayout().getLayoutName() != "panel32-1")
    return op.emitOpError("expected a weight in layout panel32, but got ") << weight;
  if (weight.getExperts() > 1024)
    return op.emitOpError("expected at most 1024 experts, but got ") << weight.getExperts();
  auto rows = cast<ShapedType>(op.getRows().getType()).getElementType();
  if (!(op.getRowType() ? *op.getRowType() : rows).isBF16())
    return op.emitOpError("expected rows that are rounded to bf16, but got ")
           << rows << "; run moe-gpu-attach-target";
  auto tiles = op->getAttrOfType<ArrayAttr>(kGPUTilesAttrName);
  if (!tiles || tiles.empty() ||
      !llvm::all_of(tiles, [](Attribute tile) { return isa<GPUTileAttr>(tile); }))
    return op.emitOpError("expected gpu_tiles, but got none; run moe-gpu-select-strategy");
  int64_t before = 0;
  for (auto [i, tile] : llvm::enumerate(tiles.getAsRange<GPUTileAttr>())) {
    bool last = i + 1 == tiles.size();
    if (last ? tile.getUpTo() != 0 : tile.getUpTo() <= before)
      return op.emitOpError("expected tiles by rising up_to, the last with 0, but got ")
             << tile.getUpTo() << " in place " << i;
    before = tile.getUpTo();
  }
  if (op.hasCombine()) {
    if (down)
      return op.emitOpError("expected one matmul with combine, but got a second");
    if (op.hasVia() || op.hasEpilogue())
      return op.emitOpError("expected combine without gather and region, but got both");
    if (!op.getCombineType()->isBF16())
      return op.emitOpError("expected combine as bf16, but got ") << *op.getCombineType();
    down = op;
    return success();
  }
  if (up)
    return op.emitOpError("expected one matmul without combine, but got a second; all fuse passes "
                          "must run for a GPU");
  if (weight.getParts() > 1 && !op.hasEpilogue())
    return op.emitOpError("expected a region on the parts, but got none; all fuse passes must run "
                          "for a GPU");
  up = op;
  return success();
}

LogicalResult Layer::read(func::FuncOp function) {
  func = function;
  bool dispatched = false;
  WalkResult walk = func.walk([&](Operation *op) {
    LogicalResult result = success();
    if (auto route = dyn_cast<RouterOp>(op)) {
      router = op;
      routerAttr = route.getRouter();
      logits = bool(route.getOutLogits());
    } else if (auto route = dyn_cast<RouteDispatchOp>(op)) {
      router = op;
      routerAttr = route.getRouter();
      dispatched = true;
    } else if (isa<DispatchOp>(op)) {
      dispatched = true;
    } else if (isa<SingleGroupOp>(op)) {
      dense = true;
    } else if (auto matmul = dyn_cast<GroupedMatmulOp>(op)) {
      result = readMatmul(matmul);
    } else if (isa_and_nonnull<MoEDialect>(op->getDialect()) && !isa<moe::YieldOp>(op)) {
      result = op->emitOpError("expected an operation with GPU code, but got one without; all fuse "
                               "passes must run for a GPU");
    }
    return failed(result) ? WalkResult::interrupt() : WalkResult::advance();
  });
  if (walk.wasInterrupted())
    return failure();
  if (bool(up) != bool(down) || (up && !dense && !dispatched) || (!up && !router))
    return func.emitOpError("expected a router, a dispatch and two matmuls, but got less");
  if (up) {
    if (down.getRows() != up.getOut())
      return down.emitOpError("expected the rows of the matmul before it, but got others");
    if (bool(up.getViaPair()) == dense)
      return up.emitOpError("expected rows via pairs, or one group, but got ")
             << (dense ? "both" : "neither");
  }
  for (BlockArgument argument : func.getArguments()) {
    auto role =
        func.getArgAttrOfType<StringAttr>(argument.getArgNumber(), MoEDialect::kArgAttrName);
    if (!role)
      return func.emitOpError("expected moe.arg on argument ") << argument.getArgNumber();
    static constexpr StringRef known[] = {"x",      "y",      "weights",    "experts",
                                          "logits", "weight", "accumulate", "offsets"};
    if (!llvm::is_contained(known, role.getValue()))
      return func.emitOpError("expected arguments with GPU code, but got ") << role;
    if (role != "x" && role != "y")
      continue;
    auto type = dyn_cast<MemRefType>(argument.getType());
    if (!type)
      return func.emitOpError("expected a buffer for ") << role << "; run moe-bufferize";
    (role == "x" ? xType : yType) = type.getElementType();
  }
  if (!xType || (up && !yType))
    return func.emitOpError("expected arguments x and y, but got none");
  return router ? checkRouter() : success();
}

Value Layer::routerWeightValue() const {
  if (auto route = dyn_cast<RouterOp>(router))
    return route.getWeight();
  return cast<RouteDispatchOp>(router).getWeight();
}

int64_t Layer::experts() const {
  return router ? routerWeight().getRows() : GroupedMatmulOp(up).getWeightType().getExperts();
}

int64_t Layer::rowWidth() const {
  return up ? GroupedMatmulOp(up).getWeightType().paddedCols() : routerWeight().paddedCols();
}

StageKernel Layer::stage() const {
  int64_t H = up ? GroupedMatmulOp(up).getWeightType().getCols() : routerWeight().getCols();
  return {xType, H, rowWidth(), router ? routerWeight() : WeightType(), dense};
}

int64_t Layer::weightIndex(Value weight) const {
  auto argument = cast<BlockArgument>(weight);
  auto index = func::FuncOp(func).getArgAttrOfType<IntegerAttr>(argument.getArgNumber(),
                                                                MoEDialect::kWeightIndexAttrName);
  return index.getInt();
}
