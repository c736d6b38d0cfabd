//===- MoEExpertOps.cpp - experts, matmuls, activations -------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "OpHelpers.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::opimpl;

//===----------------------------------------------------------------------===//
// Import level
//===----------------------------------------------------------------------===//

/// A bias of the experts, parts and rows of its weight; null is fine.
static LogicalResult verifyBias(Operation *op, Value bias, WeightType weight) {
  if (!bias)
    return success();
  WeightType type = getWeightType(bias);
  if (type.getExperts() == weight.getExperts() && type.getParts() == weight.getParts() &&
      type.getRows() == weight.getRows())
    return success();
  return op->emitOpError() << "expected a bias of " << weight.getExperts() << "x"
                           << weight.getParts() << "x" << weight.getRows() << "x1, but got "
                           << type.getExperts() << "x" << type.getParts() << "x" << type.getRows()
                           << "x1";
}

LogicalResult opimpl::verifyRowWeights(Operation *op, Value rowWeights, Value x) {
  if (!rowWeights)
    return success();
  return verifySameDim(op, rowWeights, 0, x, 0, "tokens T of row_weights");
}

/// (C1)–(C4), (C6) of moe.experts: the weights of an expert against x and the width of the result.
template <typename OpTy> static LogicalResult verifyExpertWeights(OpTy op) {
  if (failed(verifyOneSemantics(op)))
    return failure();
  WeightType up = getWeightType(op.getUp()), down = getWeightType(op.getDown());
  ExpertAttr expert = op.getExpert();
  // experts_c1
  if (failed(verifyDim(op, op.getX(), 1, up.getCols(), "hidden size H of x")))
    return failure();
  // experts_c2
  if (up.getParts() != expert.getParts())
    return op.emitOpError() << "expected a first weight of " << expert.getParts()
                            << " parts for form = " << stringifyExpertForm(expert.getForm())
                            << ", but got " << up.getParts();
  // experts_c3
  if (down.getParts() != 1)
    return op.emitOpError() << "expected a second weight of 1 part, but got " << down.getParts();
  if (down.getCols() != up.getRows())
    return op.emitOpError() << "expected a second weight with columns F = " << up.getRows()
                            << ", but got " << down.getCols();
  if (down.getRows() != up.getCols())
    return op.emitOpError() << "expected a second weight with rows H = " << up.getCols()
                            << ", but got " << down.getRows();
  if (failed(verifyDim(op, op.getOut(), 1, down.getRows(), "hidden size H of the result")))
    return failure();
  // experts_c4
  if (down.getExperts() != up.getExperts())
    return op.emitOpError() << "expected a second weight of E = " << up.getExperts()
                            << " experts, but got " << down.getExperts();
  // experts_c6
  for (auto [bias, weight] : {std::pair(op.getUpBias(), up), std::pair(op.getDownBias(), down)}) {
    if (bool(bias) != expert.getBias())
      return op.emitOpError() << "expected biases exactly with bias = true, but got "
                              << (bias ? "some" : "none");
    if (failed(verifyBias(op, bias, weight)))
      return failure();
  }
  return success();
}

/// Adds the operands that there are, in order, and says so in the segments.
template <typename OpTy>
static void addOperands(OperationState &state, std::initializer_list<Value> operands) {
  auto &sizes = state.getOrAddProperties<typename OpTy::Properties>().operandSegmentSizes;
  assert(operands.size() == sizes.size() && "one value or null for each operand");
  for (auto [size, operand] : llvm::zip_equal(sizes, operands)) {
    size = operand ? 1 : 0;
    if (operand)
      state.addOperands(operand);
  }
}

void ExpertsOp::build(OpBuilder &, OperationState &state, Value x, Value offsets, Value pair,
                      Value up, Value down, Value slots, Value upBias, Value downBias,
                      Value rowWeights, Value out, ExpertAttr expert) {
  addOperands<ExpertsOp>(state,
                         {x, offsets, pair, up, down, slots, upBias, downBias, rowWeights, out});
  addResultTypes(state, out);
  state.getOrAddProperties<Properties>().expert = expert;
}

LogicalResult ExpertsOp::verify() {
  if (failed(verifyExpertWeights(*this)))
    return failure();
  // experts_c4
  if (failed(verifyDim(*this, getOffsets(), 0, getWeightType(getUp()).getExperts() + 1,
                       "elements E + 1 of offsets")))
    return failure();
  // experts_c7
  if (failed(verifyRowWeights(*this, getRowWeights(), getX())))
    return failure();
  // experts_c5
  return verifySameDim(*this, getOut(), 0, getPair(), 0, "rows N of the result");
}

void ExpertsOp::getEffects(Effects &effects) { getDpsEffects(*this, false, effects); }
LogicalResult ExpertsOp::reifyResultShapes(OpBuilder &builder,
                                           ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

void CombineOp::build(OpBuilder &, OperationState &state, Value rows, Value offsets, Value out) {
  addOperands<CombineOp>(state, {rows, offsets, {}, {}, {}, {}, {}, {}, {}, out});
  addResultTypes(state, out);
}

/// pair, weights and slots come together; weights are [T, k].
static LogicalResult verifyPairs(Operation *op, Value pair, Value weights, Value slots, Value out) {
  if (bool(pair) != bool(weights) || bool(pair) != bool(slots))
    return op->emitOpError("expected pair, weights and slots together, but got some of them");
  if (weights && failed(verifySameDim(op, weights, 0, out, 0, "tokens T of the weights")))
    return failure();
  return success();
}

/// (C5), (C6) of moe.combine, which moe.ffn and moe.grouped_matmul share.
template <typename OpTy> static LogicalResult verifySum(OpTy op, Value pair, bool unweighted) {
  if (Value gate = op.getGate()) {
    if (pair)
      return op.emitOpError("expected gate without pairs, but got both");
    if (failed(verifySameDim(op, gate, 0, op.getOut(), 0, "tokens T of gate")) ||
        failed(verifyDim(op, gate, 1, 1, "width of gate")))
      return failure();
  }
  if (unweighted && !pair)
    return op.emitOpError("expected unweighted with pairs only, but got no pairs");
  if (Value start = op.getStart()) {
    if (!op.getAccumulate())
      return op.emitOpError("expected accumulate with from, but got from alone");
    for (int64_t dim : {0, 1})
      if (failed(verifySameDim(op, start, dim, op.getOut(), dim,
                               dim ? "width H of from" : "tokens T of from")))
        return failure();
  }
  return success();
}

LogicalResult CombineOp::verify() {
  if (failed(verifyOneSemantics(*this)))
    return failure();
  // combine_c1
  if (failed(verifySameDim(*this, getRows(), 1, getOut(), 1, "width H of rows")))
    return failure();
  // combine_c2, combine_c3
  if (failed(verifyPairs(*this, getPair(), getWeights(), getSlots(), getOut())))
    return failure();
  if (getPair() && failed(verifySameDim(*this, getPair(), 0, getRows(), 0, "elements N of pair")))
    return failure();
  if (!getPair() && failed(verifySameDim(*this, getRows(), 0, getOut(), 0, "rows T without pairs")))
    return failure();
  // combine_c4
  int64_t offsets = getDim(getOffsets(), 0);
  if (!ShapedType::isDynamic(offsets) && offsets < 2)
    return emitOpError() << "expected offsets of at least 2 elements, but got " << offsets;
  // combine_c5, combine_c6
  return verifySum(*this, getPair(), getUnweighted());
}

void CombineOp::getEffects(Effects &effects) { getDpsEffects(*this, readsOut(), effects); }
LogicalResult CombineOp::reifyResultShapes(OpBuilder &builder,
                                           ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

void FfnOp::build(OpBuilder &, OperationState &state, Value x, Value up, Value down, Value out,
                  ExpertAttr expert) {
  addOperands<FfnOp>(state, {x, up, down, {}, {}, {}, {}, {}, {}, {}, out});
  addResultTypes(state, out);
  state.getOrAddProperties<Properties>().expert = expert;
}

LogicalResult FfnOp::verify() {
  if (failed(verifyExpertWeights(*this)))
    return failure();
  // ffn_c4
  if (getWeightType(getUp()).getExperts() != 1)
    return emitOpError() << "expected weights of 1 expert, but got "
                         << getWeightType(getUp()).getExperts();
  // ffn_c5
  if (failed(verifySum(*this, /*pair=*/Value(), /*unweighted=*/false)))
    return failure();
  return verifySameDim(*this, getOut(), 0, getX(), 0, "tokens T of the result");
}

void FfnOp::getEffects(Effects &effects) { getDpsEffects(*this, readsOut(), effects); }
LogicalResult FfnOp::reifyResultShapes(OpBuilder &builder, ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

//===----------------------------------------------------------------------===//
// Fused level
//===----------------------------------------------------------------------===//

void GatherOp::build(OpBuilder &, OperationState &state, Value x, Value offsets, Value pair,
                     Value slots, Value rowWeights, Value out) {
  state.addOperands({x, offsets, pair, slots});
  if (rowWeights)
    state.addOperands(rowWeights);
  state.addOperands(out);
  addResultTypes(state, out);
}

LogicalResult GatherOp::verify() {
  if (failed(verifyOneSemantics(*this)))
    return failure();
  // gather_c1
  if (failed(verifySameDim(*this, getOut(), 1, getX(), 1, "width H of the result")))
    return failure();
  // gather_c3
  if (failed(verifyRowWeights(*this, getRowWeights(), getX())))
    return failure();
  // gather_c2
  return verifySameDim(*this, getOut(), 0, getPair(), 0, "rows N of the result");
}

void GatherOp::getEffects(Effects &effects) { getDpsEffects(*this, false, effects); }
LogicalResult GatherOp::reifyResultShapes(OpBuilder &builder, ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

void GroupedMatmulOp::build(OpBuilder &, OperationState &state, Value rows, Value offsets,
                            Value weight, Value out) {
  addOperands<GroupedMatmulOp>(
      state, {rows, {}, {}, {}, offsets, weight, {}, {}, {}, {}, {}, {}, {}, {}, out});
  addResultTypes(state, out);
  state.addRegion();
}

void GroupedMatmulOp::copyRowClauses(GroupedMatmulOp from) {
  if (from.hasVia()) {
    getViaPairMutable().assign(from.getViaPair());
    getViaSlotsMutable().assign(from.getViaSlots());
  }
  if (from.getRowWeights())
    getRowWeightsMutable().assign(from.getRowWeights());
  if (from.getBias())
    getBiasMutable().assign(from.getBias());
  setRowTypeAttr(from.getRowTypeAttr());
}

WeightType GroupedMatmulOp::getWeightType() { return cast<WeightType>(getWeight().getType()); }

LogicalResult GroupedMatmulOp::verify() {
  if (failed(verifyOneSemantics(*this)))
    return failure();
  WeightType weight = getWeightType();
  // grouped_matmul_c1
  if (failed(verifyDim(*this, getRows(), 1, weight.getCols(), "width of rows")))
    return failure();
  // grouped_matmul_c2
  if (failed(
          verifyDim(*this, getOffsets(), 0, weight.getExperts() + 1, "elements E + 1 of offsets")))
    return failure();
  // grouped_matmul_c3
  if (bool(getViaPair()) != bool(getViaSlots()))
    return emitOpError("expected via %pair slots %k, but got one of them");
  // grouped_matmul_c4
  if (hasEpilogue() && failed(verifyEpilogue(*this, getEpilogue(), weight.getParts())))
    return failure();
  bool hasParts = weight.getParts() > 1 && !hasEpilogue();
  if (hasCombine()) {
    // grouped_matmul_c6
    if (hasParts)
      return emitOpError("expected one part or a region with combine, but got a weight of ")
             << weight.getParts() << " parts and no region";
    if (failed(
            verifyPairs(*this, getCombinePair(), getCombineWeights(), getCombineSlots(), getOut())))
      return failure();
    if (failed(verifySum(*this, getCombinePair(), getUnweighted())))
      return failure();
  } else if (getCombinePair() || getCombineWeights() || getCombineSlots() || getGate() ||
             getScale() || getUnweighted() || getAccumulate() || getStart()) {
    // grouped_matmul_c7
    return emitOpError("expected pairs, weights and accumulate with combine only");
  }
  // grouped_matmul_c9
  if (failed(verifyBias(*this, getBias(), weight)))
    return failure();
  // grouped_matmul_c10
  if (getRowWeights() && !getViaPair())
    return emitOpError("expected via with row_weights, but got row_weights alone");
  if (failed(verifyRowWeights(*this, getRowWeights(), getRows())))
    return failure();
  // grouped_matmul_c5
  int64_t rank = hasParts ? 3 : 2;
  if (getRank(getOut()) != rank)
    return emitOpError() << "expected a result of rank " << rank << ", but got "
                         << getRank(getOut());
  if (hasParts && failed(verifyDim(*this, getOut(), 1, weight.getParts(), "parts of the result")))
    return failure();
  if (failed(verifyDim(*this, getOut(), rank - 1, weight.getRows(), "width of the result")))
    return failure();
  if (!hasCombine() &&
      failed(verifySameDim(*this, getOut(), 0, getViaPair() ? getViaPair() : getRows(), 0,
                           "rows N of the result")))
    return failure();
  // grouped_matmul_c8
  if (StrategyAttr strategy = getStrategyAttr()) {
    if ((strategy.getResult() == ResultForm::Combine) != hasCombine())
      return emitOpError() << "expected a strategy with result "
                           << (hasCombine() ? "= combine" : "blocked or rows") << ", but got "
                           << stringifyResultForm(strategy.getResult());
    UkernelAttr kernel = strategy.getUkernel();
    if (strategy.getResult() == ResultForm::Blocked && weight.getParts() == 2 &&
        kernel.getProduct() == KernelProduct::DotBF16 && kernel.getPanels() > 1 &&
        kernel.getPanels() % 2)
      return emitOpError() << "expected 1 or an even number of panels where pairs of them share "
                              "blocks of bf16, but got "
                           << kernel.getPanels();
  }
  return success();
}

void GroupedMatmulOp::getEffects(Effects &effects) { getDpsEffects(*this, readsOut(), effects); }
LogicalResult GroupedMatmulOp::reifyResultShapes(OpBuilder &builder,
                                                 ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

void ActivateOp::build(OpBuilder &, OperationState &state, Value parts, Value out) {
  state.addOperands({parts, out});
  addResultTypes(state, out);
  state.addRegion();
}

int64_t ActivateOp::getNumParts() { return getRank(getParts()) == 3 ? getDim(getParts(), 1) : 1; }

LogicalResult ActivateOp::verify() {
  if (failed(verifyOneSemantics(*this)))
    return failure();
  // activate_c1
  if (failed(verifySameDim(*this, getOut(), 0, getParts(), 0, "rows N of the result")) ||
      failed(verifySameDim(*this, getOut(), 1, getParts(), getRank(getParts()) - 1,
                           "width F of the result")))
    return failure();
  if (ShapedType::isDynamic(getNumParts()))
    return emitOpError("expected a static number of parts, but got ?");
  // activate_c2
  if (getEpilogue().empty())
    return emitOpError("expected a region, but got none");
  return verifyEpilogue(*this, getEpilogue(), getNumParts());
}

void ActivateOp::getEffects(Effects &effects) { getDpsEffects(*this, false, effects); }
LogicalResult ActivateOp::reifyResultShapes(OpBuilder &builder,
                                            ReifiedRankedShapedTypeDims &shapes) {
  return reifyFromOuts(*this, builder, shapes);
}

//===----------------------------------------------------------------------===//
// The scalar formula of an expert
//===----------------------------------------------------------------------===//

namespace {
/// Writes f32 arithmetic.
struct Formula {
  OpBuilder &builder;
  Location loc;

  Value constant(double value) {
    return arith::ConstantOp::create(builder, loc, builder.getF32FloatAttr(value));
  }
  Value add(Value a, Value b) { return arith::AddFOp::create(builder, loc, a, b); }
  Value sub(Value a, Value b) { return arith::SubFOp::create(builder, loc, a, b); }
  Value mul(Value a, Value b) { return arith::MulFOp::create(builder, loc, a, b); }
  Value div(Value a, Value b) { return arith::DivFOp::create(builder, loc, a, b); }
  Value neg(Value a) { return arith::NegFOp::create(builder, loc, a); }
  Value exp(Value a) { return math::ExpOp::create(builder, loc, a); }
  Value tanh(Value a) { return math::TanhOp::create(builder, loc, a); }
  Value erf(Value a) { return math::ErfOp::create(builder, loc, a); }
  // arith.maximumf and minimumf keep NaN, as torch's relu and clamp do.
  Value max(Value a, Value b) { return arith::MaximumFOp::create(builder, loc, a, b); }
  Value min(Value a, Value b) { return arith::MinimumFOp::create(builder, loc, a, b); }
  Value clamp(Value v, double limit) { return max(min(v, constant(limit)), constant(-limit)); }
  Value softcap(Value v, double c) { return mul(constant(c), tanh(div(v, constant(c)))); }

  /// v / (1 + exp(−v)): −∞ gives −0·…, large negative v gives −0, never NaN but for ±NaN and −∞.
  Value sigmoid(Value v) { return div(constant(1.0), add(constant(1.0), exp(neg(v)))); }
  Value silu(Value v) { return div(v, add(constant(1.0), exp(neg(v)))); }
  Value gelu(Value v) {
    Value inner = erf(mul(v, constant(0.70710678118654752)));
    return mul(mul(constant(0.5), v), add(constant(1.0), inner));
  }
  Value geluTanh(Value v) {
    Value cube = mul(mul(v, v), v);
    Value inner = mul(constant(0.79788456080286536), add(v, mul(constant(0.044715), cube)));
    return mul(mul(constant(0.5), v), add(constant(1.0), tanh(inner)));
  }
  Value activation(Activation kind, Value v) {
    switch (kind) {
    case Activation::Silu:
      return silu(v);
    case Activation::Gelu:
      return gelu(v);
    case Activation::GeluTanh:
      return geluTanh(v);
    case Activation::Relu:
      return max(v, constant(0.0));
    case Activation::Relu2: {
      Value relu = max(v, constant(0.0));
      return mul(relu, relu);
    }
    }
    llvm_unreachable("unknown activation");
  }
  Value glu(ExpertAttr expert, Value gate, Value up) {
    ClampAttr limits = expert.getClamp();
    if (!limits)
      return mul(activation(expert.getActivation(), gate), up);
    double limit = limits.getLimit(), alpha = limits.getAlpha();
    switch (limits.getKind()) {
    case ClampKind::Pre:
      return mul(activation(expert.getActivation(), min(gate, constant(limit))), clamp(up, limit));
    case ClampKind::Oai: {
      gate = min(gate, constant(limit));
      up = add(clamp(up, limit), constant(1.0));
      // gate · σ(alpha · gate), as one quotient.
      Value power = exp(neg(mul(constant(alpha), gate)));
      return mul(up, div(gate, add(constant(1.0), power)));
    }
    case ClampKind::Post:
      return mul(min(activation(expert.getActivation(), gate), constant(limit)), clamp(up, limit));
    case ClampKind::Tanh:
      return mul(mul(softcap(gate, limit), sigmoid(gate)), softcap(up, limits.getUpLimit()));
    }
    llvm_unreachable("unknown clamp");
  }
};
} // namespace

void moe::buildExpertEpilogue(OpBuilder &builder, Location loc, Region &region, ExpertAttr expert) {
  OpBuilder::InsertionGuard guard(builder);
  Type f32 = builder.getF32Type();
  SmallVector<Type> types(expert.getParts(), f32);
  SmallVector<Location> locs(types.size(), loc);
  Block *block = builder.createBlock(&region, region.end(), types, locs);
  Formula f{builder, loc};
  Value result;
  if (expert.getForm() == ExpertForm::Glu)
    result = f.glu(expert, block->getArgument(0), block->getArgument(1));
  else
    result = f.activation(expert.getActivation(), block->getArgument(0));
  YieldOp::create(builder, loc, result);
}

void moe::buildSigmoid(OpBuilder &builder, Location loc, Region &region) {
  OpBuilder::InsertionGuard guard(builder);
  Block *block = builder.createBlock(&region, region.end(), {builder.getF32Type()}, {loc});
  Formula f{builder, loc};
  YieldOp::create(builder, loc, f.sigmoid(block->getArgument(0)));
}
