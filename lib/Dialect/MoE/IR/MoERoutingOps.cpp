//===- MoERoutingOps.cpp - symbols, router, dispatch ----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "OpHelpers.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/Dialect/Tensor/IR/Tensor.h"

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::opimpl;

//===----------------------------------------------------------------------===//
// Shared helpers
//===----------------------------------------------------------------------===//

void opimpl::getDpsEffects(DestinationStyleOpInterface op, bool readsOuts, Effects &effects) {
  for (OpOperand &operand : op->getOpOperands()) {
    if (!isa<MemRefType>(operand.get().getType()))
      continue;
    bool isOut = op.isDpsInit(&operand);
    if (!isOut || readsOuts)
      effects.emplace_back(MemoryEffects::Read::get(), &operand,
                           SideEffects::DefaultResource::get());
    if (isOut)
      effects.emplace_back(MemoryEffects::Write::get(), &operand,
                           SideEffects::DefaultResource::get());
  }
}

LogicalResult opimpl::reifyFromOuts(DestinationStyleOpInterface op, OpBuilder &builder,
                                    ReifiedRankedShapedTypeDims &shapes) {
  for (Value out : op.getDpsInits()) {
    auto type = dyn_cast<RankedTensorType>(out.getType());
    if (!type)
      return failure();
    shapes.push_back(tensor::getMixedSizes(builder, op.getLoc(), out));
  }
  return success();
}

void opimpl::addResultTypes(OperationState &state, ValueRange outs) {
  for (Type type : outs.getTypes())
    if (isa<RankedTensorType>(type))
      state.addTypes(type);
}

LogicalResult opimpl::verifyOneSemantics(DestinationStyleOpInterface op) {
  bool tensors = false, memrefs = false;
  for (Type type : op->getOperandTypes()) {
    tensors |= isa<TensorType>(type);
    memrefs |= isa<MemRefType>(type);
  }
  if (tensors && memrefs)
    return op->emitOpError("expected operands to be all tensors or all memrefs, but got both");
  return success();
}

LogicalResult opimpl::verifyDim(Operation *op, Value value, int64_t dim, int64_t expected,
                                const Twine &what) {
  int64_t got = getDim(value, dim);
  if (ShapedType::isDynamic(got) || ShapedType::isDynamic(expected) || got == expected)
    return success();
  return op->emitOpError() << "expected " << what << " = " << expected << ", but got " << got;
}

LogicalResult opimpl::verifySameDim(Operation *op, Value a, int64_t aDim, Value b, int64_t bDim,
                                    const Twine &what) {
  return verifyDim(op, a, aDim, getDim(b, bDim), what);
}

LogicalResult opimpl::verifyEpilogue(Operation *op, Region &region, int64_t parts) {
  Block &block = region.front();
  if (static_cast<int64_t>(block.getNumArguments()) != parts)
    return op->emitOpError() << "expected a region of " << parts << " arguments, one per part, "
                             << "but got " << block.getNumArguments();
  for (BlockArgument argument : block.getArguments())
    if (!argument.getType().isF32())
      return op->emitOpError() << "expected region arguments of type f32, but got "
                               << argument.getType();
  auto yield = dyn_cast<YieldOp>(block.getTerminator());
  if (!yield || yield.getNumOperands() != 1 || !yield.getOperand(0).getType().isF32())
    return op->emitOpError("expected the region to yield one f32");
  for (Operation &nested : block.without_terminator())
    if (!isMemoryEffectFree(&nested))
      return op->emitOpError("expected a region without side effects").attachNote(nested.getLoc())
             << "see '" << nested.getName() << "'";
  return success();
}

//===----------------------------------------------------------------------===//
// Symbols
//===----------------------------------------------------------------------===//

LogicalResult WeightOp::verify() {
  auto weight = cast<WeightType>(getType());
  // weight_c1
  for (auto source : getSources().getAsRange<SourceAttr>())
    if (source.getPart() >= weight.getParts())
      return emitOpError() << "expected part of source \"" << source.getPattern() << "\" below "
                           << weight.getParts() << ", but got " << source.getPart();
  // weight_c2
  if (getRole().empty() || getRole().contains(' '))
    return emitOpError() << "expected role to be one word, but got \"" << getRole() << "\"";
  return success();
}

static ParseResult parseSymbolList(OpAsmParser &parser, ArrayAttr &symbols) {
  SmallVector<Attribute> values;
  auto parseOne = [&]() -> ParseResult {
    FlatSymbolRefAttr symbol;
    if (parser.parseAttribute(symbol))
      return failure();
    values.push_back(symbol);
    return success();
  };
  if (parser.parseKeyword("weights") ||
      parser.parseCommaSeparatedList(AsmParser::Delimiter::Paren, parseOne))
    return failure();
  symbols = parser.getBuilder().getArrayAttr(values);
  return success();
}

static void printSymbolList(OpAsmPrinter &printer, Operation *, ArrayAttr symbols) {
  printer << "weights(";
  llvm::interleaveComma(symbols, printer);
  printer << ")";
}

LogicalResult LayerOp::verify() {
  // layer_c1
  if (getEntriesAttr()) {
    if (getForwardAttr() || getRouteAttr() || getExpertsAttr())
      return emitOpError("expected entries, or forward, route and experts, but got both");
  } else {
    if (!getForwardAttr())
      return emitOpError("expected forward = @function, but got none");
    bool moe = getKind() == LayerKind::MoE;
    for (auto [name, symbol] : {std::pair<StringRef, Attribute>("route", getRouteAttr()),
                                {"experts", getExpertsAttr()}}) {
      if (moe && !symbol)
        return emitOpError() << "expected " << name << " = @function in a moe layer, but got none";
      if (!moe && symbol)
        return emitOpError() << "expected a dense layer without " << name << ", but got " << symbol;
    }
  }
  // layer_c4
  if (static_cast<int64_t>(getIndex()) < 0)
    return emitOpError() << "expected index to be at least 0, but got "
                         << static_cast<int64_t>(getIndex());
  return success();
}

LogicalResult LayerOp::verifySymbolUses(SymbolTableCollection &tables) {
  auto checkFunction = [&](FlatSymbolRefAttr symbol) -> LogicalResult {
    // layer_c2
    if (symbol && !tables.lookupNearestSymbolFrom<func::FuncOp>(*this, symbol))
      return emitOpError() << "expected " << symbol << " to be a func.func of this module";
    return success();
  };
  if (failed(checkFunction(getForwardAttr())) || failed(checkFunction(getRouteAttr())) ||
      failed(checkFunction(getExpertsAttr())))
    return failure();
  if (ArrayAttr entries = getEntriesAttr())
    for (auto entry : entries.getAsRange<EntryAttr>())
      // Later phases leave a moe.code (CPU) or a host function in another dialect (GPU).
      if (!isa_and_nonnull<CodeOp, FunctionOpInterface>(
              tables.lookupNearestSymbolFrom(*this, entry.getFunction())) &&
          failed(checkFunction(entry.getFunction())))
        return failure();
  // layer_c3
  for (auto symbol : getWeights().getAsRange<FlatSymbolRefAttr>())
    if (!tables.lookupNearestSymbolFrom<WeightOp>(*this, symbol))
      return emitOpError() << "expected " << symbol << " to be a moe.weight of this module";
  return success();
}

LogicalResult CodeOp::verify() {
  if (getStages().empty())
    return emitOpError("expected at least one stage, but got none"); // code_c1
  return success();
}

LogicalResult CodeOp::verifySymbolUses(SymbolTableCollection &tables) {
  // code_c2
  SmallVector<Attribute> functions(getStages().getValue());
  functions.push_back(getWorkspaceAttr());
  for (auto function : functions)
    if (!tables.lookupNearestSymbolFrom<FunctionOpInterface>(*this,
                                                             cast<FlatSymbolRefAttr>(function)))
      return emitOpError() << "expected " << function << " to be a function of this module";
  return success();
}

//===----------------------------------------------------------------------===//
// Router and dispatch
//===----------------------------------------------------------------------===//

/// Fills the state of either router.
template <typename OpTy>
static void buildRouter(OperationState &state, Value x, Value weight, const RouterVectors &vectors,
                        ValueRange outs, RouterAttr router, TypeAttr compute) {
  SmallVector<Value> inputs = {
      x, weight, vectors.bias, vectors.selectionBias, vectors.expertScale, vectors.inputScale};
  auto &properties = state.getOrAddProperties<typename OpTy::Properties>();
  properties.router = router;
  properties.compute = compute;
  llvm::fill(properties.operandSegmentSizes, 0);
  for (auto [i, input] : llvm::enumerate(inputs)) {
    properties.operandSegmentSizes[i] = input ? 1 : 0;
    if (input)
      state.addOperands(input);
  }
  for (size_t i = 0; i < outs.size(); ++i)
    properties.operandSegmentSizes[inputs.size() + i] = 1;
  state.addOperands(outs);
  addResultTypes(state, outs);
}

/// Names the results in the order of `names`; an op on buffers has none.
static void nameResults(Operation *op, OpAsmSetValueNameFn setName, ArrayRef<StringRef> names) {
  for (auto [result, name] : llvm::zip(op->getResults(), names))
    setName(result, name);
}

/// The constraints that moe.router and moe.route_dispatch share. Sets `experts` to E.
template <typename OpTy> static LogicalResult verifyRouter(OpTy op, int64_t &experts) {
  if (failed(verifyOneSemantics(op)))
    return failure();
  WeightType weight = getWeightType(op.getWeight());
  RouterAttr router = op.getRouter();
  // router_c1
  if (failed(verifyDim(op, op.getX(), 1, weight.getCols(), "hidden size H of x")))
    return failure();
  // router_c2
  if (weight.getExperts() != 1 || weight.getParts() != 1)
    return op.emitOpError() << "expected a router weight of 1 expert and 1 part, but got "
                            << weight.getExperts() << " and " << weight.getParts();
  experts = weight.getRows() - router.getExtraRows();
  if (experts < 1)
    return op.emitOpError() << "expected extra_rows below the weight's rows = " << weight.getRows()
                            << ", but got " << router.getExtraRows();
  // router_c3
  if (router.getTopK() > experts)
    return op.emitOpError() << "expected top_k at most experts E = " << experts << ", but got "
                            << router.getTopK();
  for (Value out : {op.getOutWeights(), op.getOutExperts()})
    if (failed(verifyDim(op, out, 1, router.getTopK(), "chosen experts K of the outs")) ||
        failed(verifySameDim(op, out, 0, op.getX(), 0, "tokens T of the outs")))
      return failure();
  // router_c5
  if (GroupsAttr groups = router.getGroups()) {
    if (groups.getReduce() == GroupScore::SumTop2 && experts / groups.getCount() < 2)
      return op.emitOpError() << "expected groups of at least 2 experts for sum_top2, but got "
                              << experts / groups.getCount();
    if (experts % groups.getCount())
      return op.emitOpError() << "expected a count of groups that divides E = " << experts
                              << ", but got " << groups.getCount();
    if (groups.getFill() == GroupFill::NegInf &&
        experts / groups.getCount() * groups.getKeep() < router.getTopK())
      return op.emitOpError() << "expected kept groups of at least top_k = " << router.getTopK()
                              << " experts, but got "
                              << experts / groups.getCount() * groups.getKeep();
  }
  // router_c6
  RouterVectors vectors = op.getVectors();
  std::tuple<StringRef, Value, int64_t> sizes[] = {
      {"bias", vectors.bias, experts},
      {"selection_bias", vectors.selectionBias, experts},
      {"expert_scale", vectors.expertScale, experts},
      {"input_scale", vectors.inputScale, weight.getCols()}};
  for (auto [name, vector, size] : sizes) {
    if (!vector)
      continue;
    WeightType type = getWeightType(vector);
    if (type.getExperts() != 1 || type.getParts() != 1 || type.getRows() != size)
      return op.emitOpError() << "expected " << name << " of 1x1x" << size << "x1, but got "
                              << type.getExperts() << "x" << type.getParts() << "x"
                              << type.getRows() << "x1";
  }
  // router_c7
  if (bool(vectors.selectionBias) != (router.getSelectionBias() != SelectionBias::None))
    return op.emitOpError() << "expected selection_bias exactly where the router has one, but got "
                            << (vectors.selectionBias ? "a vector" : "none");
  if (bool(vectors.inputScale) != (router.getInput() == RouterInput::RmsNorm))
    return op.emitOpError() << "expected input_scale exactly with input = rms_norm, but got "
                            << (vectors.inputScale ? "a vector" : "none");
  // router_c8
  if (router.getSelect() == Selection::SparseMixer &&
      (router.getScore() != ScoreFunction::Softmax || router.getGroups() || vectors.selectionBias ||
       router.getRenormalize() != Renormalize::None))
    return op.emitOpError("expected softmax without groups, selection bias and renormalisation "
                          "with select = sparse_mixer, but got another router");
  return success();
}

void RouterOp::build(OpBuilder &, OperationState &state, Value x, Value weight,
                     const RouterVectors &vectors, ValueRange outs, RouterAttr router,
                     TypeAttr compute) {
  buildRouter<RouterOp>(state, x, weight, vectors, outs, router, compute);
}

LogicalResult RouterOp::verify() {
  int64_t experts;
  if (failed(verifyRouter(*this, experts)))
    return failure();
  // router_c4
  if (Value logits = getOutLogits())
    if (failed(verifyDim(*this, logits, 1, experts, "experts E of the logits")) ||
        failed(verifySameDim(*this, logits, 0, getX(), 0, "tokens T of the logits")))
      return failure();
  return success();
}

void RouterOp::getAsmResultNames(OpAsmSetValueNameFn setName) {
  nameResults(*this, setName, {"weights", "experts", "logits"});
}
void RouterOp::getEffects(Effects &effects) { getDpsEffects(*this, false, effects); }
LogicalResult RouterOp::reifyResultShapes(OpBuilder &builder, ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

void DispatchOp::build(OpBuilder &builder, OperationState &state, Value ids, int64_t experts,
                       ValueRange outs) {
  state.addOperands(ids);
  state.addOperands(outs);
  addResultTypes(state, outs);
  state.getOrAddProperties<Properties>().experts = builder.getI64IntegerAttr(experts);
}

/// offsets has E + 1 elements, pair T·k.
template <typename OpTy>
static LogicalResult verifyDispatchOuts(OpTy op, Value ids, int64_t experts) {
  if (failed(verifyDim(op, op.getOutOffsets(), 0, experts + 1, "elements E + 1 of offsets")))
    return failure();
  int64_t tokens = getDim(ids, 0), slots = getDim(ids, 1);
  if (ShapedType::isDynamic(tokens) || ShapedType::isDynamic(slots))
    return success();
  return verifyDim(op, op.getOutPair(), 0, tokens * slots, "elements T*k of pair");
}

LogicalResult DispatchOp::verify() {
  if (failed(verifyOneSemantics(*this)))
    return failure();
  // dispatch_c4
  if (static_cast<int64_t>(getExperts()) < 1)
    return emitOpError() << "expected experts to be positive, but got "
                         << static_cast<int64_t>(getExperts());
  // dispatch_c2, dispatch_c3
  return verifyDispatchOuts(*this, getIds(), getExperts());
}

void DispatchOp::getAsmResultNames(OpAsmSetValueNameFn setName) {
  nameResults(*this, setName, {"offsets", "pair"});
}
void DispatchOp::getEffects(Effects &effects) { getDpsEffects(*this, false, effects); }
LogicalResult DispatchOp::reifyResultShapes(OpBuilder &builder,
                                            ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

void RouteDispatchOp::build(OpBuilder &, OperationState &state, Value x, Value weight,
                            const RouterVectors &vectors, ValueRange outs, RouterAttr router,
                            TypeAttr compute) {
  buildRouter<RouteDispatchOp>(state, x, weight, vectors, outs, router, compute);
}

LogicalResult RouteDispatchOp::verify() {
  int64_t experts;
  // route_dispatch_c9, route_dispatch_c10
  if (failed(verifyRouter(*this, experts)))
    return failure();
  return verifyDispatchOuts(*this, getOutExperts(), experts);
}

void RouteDispatchOp::getAsmResultNames(OpAsmSetValueNameFn setName) {
  nameResults(*this, setName, {"weights", "experts", "offsets", "pair"});
}
void RouteDispatchOp::getEffects(Effects &effects) { getDpsEffects(*this, false, effects); }
LogicalResult RouteDispatchOp::reifyResultShapes(OpBuilder &builder,
                                                 ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

void SingleGroupOp::build(OpBuilder &, OperationState &state, Value rows, Value out) {
  state.addOperands({rows, out});
  addResultTypes(state, out);
}

LogicalResult SingleGroupOp::verify() {
  // single_group_c1
  return verifyDim(*this, getOut(), 0, 2, "elements of offsets");
}

void SingleGroupOp::getEffects(Effects &effects) { getDpsEffects(*this, false, effects); }
LogicalResult SingleGroupOp::reifyResultShapes(OpBuilder &builder,
                                               ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

#define GET_OP_CLASSES
#include "moe/Dialect/MoE/IR/MoEOps.cpp.inc"
