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
  // What no target computes, and what only others do.
  if (failed(checkParameters(router, routerAttr,
                             {"score", "order", "top_k", "renormalize", "epsilon", "norm_p",
                              "scale", "input", "logit_transform", "select", "selection_bias",
                              "groups", "input_epsilon", "jitter", "precision", "model_arithmetic",
                              "weight_dtype"})))
    return failure();
  if (std::string refused = routerAttr.getUnimplemented(); !refused.empty())
    return router->emitOpError("expected a router with GPU code, but got ") << refused;
  vectors = isa<RouterOp>(router) ? cast<RouterOp>(router).getVectors()
                                  : cast<RouteDispatchOp>(router).getVectors();
  auto compute = router->getAttrOfType<TypeAttr>("compute");
  if (!(compute ? compute.getValue() : xType).isBF16())
    return router->emitOpError("expected x that is rounded to bf16, but got ")
           << xType << " without compute = bf16";
  if (experts() > 1024)
    return router->emitOpError("expected at most 1024 experts, but got ") << experts();
  return success();
}

bool mlir::moe::isGate(GroupedMatmulOp op) {
  WeightType weight = op.getWeightType();
  return weight.getExperts() == 1 && weight.getRows() == 1 && weight.getParts() == 1 &&
         !op.hasCombine() && !op.getBias() &&
         cast<ShapedType>(op.getOut().getType()).getElementType().isF32();
}

/// The clauses of a matmul that are operands.
static int64_t countOperands(GroupedMatmulOp op) {
  return 3 + (op.getViaPair() ? 2 : 0) + (op.getRowWeights() ? 1 : 0) + (op.getBias() ? 1 : 0) +
         (op.getCombinePair() ? 3 : 0) + (op.getGate() ? 1 : 0) + (op.getScale() ? 1 : 0) +
         (op.getAccumulate() ? 1 : 0) + (op.getStart() ? 1 : 0) + 1;
}

/// Tiles by rising number of rows, the last without a limit.
static LogicalResult checkTiles(GroupedMatmulOp op) {
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
    if (tile.getUnit() != cast<GPUTileAttr>(tiles[0]).getUnit())
      return op.emitOpError("expected tiles with one unit, since units round sums differently, but "
                            "got ")
             << stringifyGPUUnit(tile.getUnit()) << " in place " << i;
    auto target =
        op->getParentOfType<func::FuncOp>()->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
    if (tile.isWgmma() && target.getLevel() != "sm_90a")
      return op.emitOpError("expected level sm_90a with unit = wgmma, but got ")
             << target.getLevel();
  }
  return success();
}

LogicalResult Layer::readMatmul(GroupedMatmulOp op) {
  if (failed(checkAttributes(op, {"row_type", "combine_type", "strategy", "unweighted",
                                  kGPUTilesAttrName, kGPUCombineAttrName})))
    return failure();
  if (op->getNumOperands() != countOperands(op))
    return op.emitOpError("expected ")
           << countOperands(op) << " operands with GPU code, but got " << op->getNumOperands();
  WeightType weight = op.getWeightType();
  bool inGroup = groups.contains(op.getOffsets());
  auto rows = cast<ShapedType>(op.getRows().getType()).getElementType();
  if (!(op.getRowType() ? *op.getRowType() : rows).isBF16())
    return op.emitOpError("expected rows that are rounded to bf16, but got ")
           << rows << "; run moe-gpu-attach-target";
  if (weight.getLayout().getLayoutName() != "panel32-1")
    return op.emitOpError("expected a weight in layout panel32, but got ") << weight;
  if (inGroup && isGate(op)) {
    if (gate)
      return op.emitOpError("expected one gate, but got a second");
    gate = op;
    return success();
  }
  if (!weight.getFormat().getStorageType().isBF16())
    return op.emitOpError("expected a weight in bf16, but got ") << weight;
  if (weight.getExperts() > 1024)
    return op.emitOpError("expected at most 1024 experts, but got ") << weight.getExperts();
  if (failed(checkTiles(op)))
    return failure();
  if (auto combine = op->getAttrOfType<StringAttr>(kGPUCombineAttrName);
      combine && combine != "ordered" && combine != "atomic")
    return op.emitOpError("expected gpu_combine ordered or atomic, but got ") << combine;
  GroupedMatmulOp &place =
      op.hasCombine() ? (inGroup ? groupDown : down) : (inGroup ? groupUp : up);
  if (place)
    return op.emitOpError("expected one matmul ")
           << (op.hasCombine() ? "with" : "without") << " combine for "
           << (inGroup ? "one group" : "the experts")
           << ", but got a second; all fuse passes must run for a GPU";
  if (op.hasCombine()) {
    if (op.hasVia() || op.hasEpilogue())
      return op.emitOpError("expected combine without gather and region, but got both");
    if (!op.getCombineType()->isBF16())
      return op.emitOpError("expected combine as bf16, but got ") << *op.getCombineType();
  } else if (weight.getParts() > 1 && !op.hasEpilogue()) {
    return op.emitOpError("expected a region on the parts, but got none; all fuse passes must run "
                          "for a GPU");
  }
  place = op;
  return success();
}

LogicalResult Layer::readGroup(SingleGroupOp op) {
  if (groupRows && groupRows != op.getRows())
    return op.emitOpError("expected the same tokens as in the other group, but got others");
  groupRows = op.getRows();
  groups.insert(op.getOut());
  return success();
}

LogicalResult Layer::readArguments() {
  for (BlockArgument argument : func.getArguments()) {
    auto role =
        func.getArgAttrOfType<StringAttr>(argument.getArgNumber(), MoEDialect::kArgAttrName);
    if (!role)
      return func.emitOpError("expected moe.arg on argument ") << argument.getArgNumber();
    static constexpr StringRef known[] = {"x",        "y",          "weights",    "experts",
                                          "logits",   "weight",     "accumulate", "offsets",
                                          "router_x", "routed_only"};
    if (!llvm::is_contained(known, role.getValue()))
      return func.emitOpError("expected arguments with GPU code, but got ") << role;
    routerX |= role == "router_x";
    if (role != "x" && role != "y")
      continue;
    auto type = dyn_cast<MemRefType>(argument.getType());
    if (!type)
      return func.emitOpError("expected a buffer for ") << role << "; run moe-bufferize";
    (role == "x" ? xType : yType) = type.getElementType();
  }
  if (!xType || ((up || groupUp) && !yType))
    return func.emitOpError("expected arguments x and y, but got none");
  return success();
}

/// That the matmuls read what the ones before them wrote, and add up in the order of the kernels.
LogicalResult Layer::checkChain() {
  for (auto [first, second] : {std::pair(up, down), std::pair(groupUp, groupDown)})
    if (first && second.getRows() != first.getOut())
      return second.emitOpError("expected the rows of the matmul before it, but got others");
  if (up && !up.hasVia())
    return up.emitOpError("expected rows via pairs, or one group, but got neither");
  if (groupUp && groupUp.hasVia())
    return groupUp.emitOpError("expected rows via pairs, or one group, but got both");
  if (groupDown && bool(groupDown.getGate()) != bool(gate))
    return groupDown.emitOpError("expected a gate that is computed here, but got another");
  if (gate && groupDown.getGate() != gate.getOut())
    return groupDown.emitOpError("expected the gate of this layer, but got another");
  if (up && groupUp && groupDown.getStart() != down.getOut())
    return groupDown.emitOpError("expected to go on from the sum of the experts, but got another "
                                 "operand after `from`");
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
    } else if (auto group = dyn_cast<SingleGroupOp>(op)) {
      result = readGroup(group);
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
  if (bool(up) != bool(down) || bool(groupUp) != bool(groupDown) || (up && !dispatched) ||
      (!up && !groupUp && !router) || (router && groupUp && !up))
    return func.emitOpError("expected a router, a dispatch and two matmuls, but got less");
  if (failed(checkChain()) || failed(readArguments()))
    return failure();
  return router ? checkRouter() : success();
}

bool Layer::isAtomic() const {
  auto combine =
      down ? GroupedMatmulOp(down)->getAttrOfType<StringAttr>(kGPUCombineAttrName) : StringAttr();
  return combine && combine == "atomic";
}

Value Layer::routerWeightValue() const {
  if (auto route = dyn_cast<RouterOp>(router))
    return route.getWeight();
  return cast<RouteDispatchOp>(router).getWeight();
}

int64_t Layer::experts() const {
  return router ? routerWeight().getRows() : GroupedMatmulOp(up).getWeightType().getExperts();
}

int64_t Layer::hidden() const {
  GroupedMatmulOp first = up ? up : groupUp;
  return first ? first.getWeightType().getCols() : routerWeight().getCols();
}

int64_t Layer::weightIndex(Value weight) const {
  auto argument = cast<BlockArgument>(weight);
  auto index = func::FuncOp(func).getArgAttrOfType<IntegerAttr>(argument.getArgNumber(),
                                                                MoEDialect::kWeightIndexAttrName);
  return index.getInt();
}
