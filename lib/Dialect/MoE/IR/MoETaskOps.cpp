//===- MoETaskOps.cpp - what one thread does ------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "OpHelpers.h"

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::opimpl;

//===----------------------------------------------------------------------===//
// StageOp
//===----------------------------------------------------------------------===//

void StageOp::build(OpBuilder &builder, OperationState &state, StringRef label, bool withTail) {
  OpBuilder::InsertionGuard guard(builder);
  state.getOrAddProperties<Properties>().label = builder.getStringAttr(label);
  Region *body = state.addRegion();
  Type index = builder.getIndexType();
  builder.createBlock(body, body->end(), {index, index}, {state.location, state.location});
  ensureTerminator(*body, builder, state.location);
  Region *tail = state.addRegion();
  if (withTail) {
    builder.createBlock(tail);
    ensureTerminator(*tail, builder, state.location);
  }
}

// moe.stage "up" body(%lane, %lanes) { … } [tail { … }] [attributes {…}]
ParseResult StageOp::parse(OpAsmParser &parser, OperationState &state) {
  OpAsmParser::Argument lane, lanes;
  Type index = parser.getBuilder().getIndexType();
  lane.type = lanes.type = index;
  StringAttr label;
  Region *body = state.addRegion(), *tail = state.addRegion();
  if (parser.parseAttribute(label) || parser.parseKeyword("body") || parser.parseLParen() ||
      parser.parseArgument(lane) || parser.parseComma() || parser.parseArgument(lanes) ||
      parser.parseRParen() || parser.parseRegion(*body, {lane, lanes}))
    return failure();
  ensureTerminator(*body, parser.getBuilder(), state.location);
  if (succeeded(parser.parseOptionalKeyword("tail"))) {
    if (parser.parseRegion(*tail))
      return failure();
    ensureTerminator(*tail, parser.getBuilder(), state.location);
  }
  state.getOrAddProperties<Properties>().label = label;
  return parser.parseOptionalAttrDictWithKeyword(state.attributes);
}

void StageOp::print(OpAsmPrinter &printer) {
  printer << " " << getLabelAttr() << " body(" << getLane() << ", " << getLanes() << ") ";
  printer.printRegion(getBody(), /*printEntryBlockArgs=*/false,
                      /*printBlockTerminators=*/false);
  if (!getTail().empty()) {
    printer << " tail ";
    printer.printRegion(getTail(), /*printEntryBlockArgs=*/false,
                        /*printBlockTerminators=*/false);
  }
  printer.printOptionalAttrDictWithKeyword((*this)->getAttrs(), {getLabelAttrName()});
}

LogicalResult StageOp::verify() {
  // stage_c1
  if (getBody().getNumArguments() != 2 || !getBody().getArgument(0).getType().isIndex() ||
      !getBody().getArgument(1).getType().isIndex())
    return emitOpError("expected a body with two index arguments (lane, lanes)");
  if (!getTail().empty() && getTail().getNumArguments())
    return emitOpError() << "expected a tail without arguments, but got "
                         << getTail().getNumArguments();
  // stage_c2
  if ((*this)->getParentOfType<StageOp>())
    return emitOpError("expected a stage outside other stages");
  return success();
}

//===----------------------------------------------------------------------===//
// Tasks
//===----------------------------------------------------------------------===//

LogicalResult ClaimOp::verify() {
  // claim_c1
  int64_t counter = getCounter();
  if (counter < 0 || counter >= 16)
    return emitOpError() << "expected counter in [0, 16), but got " << counter;
  return success();
}

LogicalResult PackRowsOp::verify() {
  // pack_rows_c1
  if (bool(getPair()) != bool(getSlots()))
    return emitOpError("expected via(%pair, %k), but got one of them");
  // pack_rows_c2
  if (cast<MemRefType>(getOut().getType()).getElementType().isBF16() && !getCompute().isBF16())
    return emitOpError() << "expected compute = bf16 for a block of bf16, but got " << getCompute();
  // pack_rows_c3
  if (getRowWeights() && !getPair())
    return emitOpError("expected via with row_weights, but got row_weights alone");
  return success();
}

void GemmTileOp::build(OpBuilder &builder, OperationState &state, Value count, Value a,
                       Value weight, Value expert, Value panel, Value out, Value row,
                       ResultForm form, UkernelAttr ukernel) {
  build(builder, state, count, a, weight, /*bias=*/Value(), expert, panel, out, row,
        /*pair=*/Value(), /*weights=*/Value(), /*slots=*/Value(), /*gate=*/Value(),
        /*scale=*/Value(), /*ahead=*/Value(), /*first_step=*/Value(), /*end_step=*/Value(),
        /*sums=*/Value(), /*number=*/Value(), /*blocks=*/Value(), /*unweighted=*/UnitAttr(),
        ResultFormAttr::get(builder.getContext(), form), /*compute=*/TypeAttr(), ukernel);
}

static void assignIf(MutableOperandRange operand, Value value) {
  if (value)
    operand.assign(value);
}

void GemmTileOp::setBias(Value bias) { assignIf(getBiasMutable(), bias); }

void GemmTileOp::setAhead(Value ahead) { assignIf(getAheadMutable(), ahead); }

void GemmTileOp::setSteps(Value first, Value end, Value sums) {
  assignIf(getFirstStepMutable(), first);
  assignIf(getEndStepMutable(), end);
  assignIf(getSumsMutable(), sums);
}

void GemmTileOp::setAfter(Value number, Value blocks) {
  assignIf(getNumberMutable(), number);
  assignIf(getBlocksMutable(), blocks);
}

void GemmTileOp::setCombine(Value pair, Value weights, Value slots, Value gate, Value scale,
                            bool unweighted, TypeAttr compute) {
  assignIf(getPairMutable(), pair);
  assignIf(getWeightsMutable(), weights);
  assignIf(getSlotsMutable(), slots);
  assignIf(getGateMutable(), gate);
  assignIf(getScaleMutable(), scale);
  setUnweighted(unweighted);
  setComputeAttr(compute);
}

LogicalResult GemmTileOp::verify() {
  WeightType weight = opimpl::getWeightType(getWeight());
  bool hasRegion = !getEpilogue().empty();
  bool combine = getForm() == ResultForm::Combine;
  // gemm_tile_c2
  if (hasRegion && failed(verifyEpilogue(*this, getEpilogue(), weight.getParts())))
    return failure();
  // gemm_tile_c3
  if (bool(getPair()) != bool(getWeights()) || bool(getPair()) != bool(getSlots()))
    return emitOpError("expected pair, weights and slots together, but got some of them");
  if (!combine && (getPair() || getGate() || getScale() || getUnweighted() || getComputeAttr()))
    return emitOpError("expected via, gate, scale and compute with into combine only");
  if (getGate() && getPair())
    return emitOpError("expected gate without pairs, but got both");
  if (getUnweighted() && !getPair())
    return emitOpError("expected unweighted with pairs only, but got no pairs");
  // gemm_tile_c6
  if (getBias()) {
    WeightType bias = opimpl::getWeightType(getBias());
    if (bias.getExperts() != weight.getExperts() || bias.getParts() != weight.getParts() ||
        bias.getRows() != weight.getRows())
      return emitOpError() << "expected a bias of " << weight.getExperts() << "x"
                           << weight.getParts() << "x" << weight.getRows() << "x1, but got "
                           << bias;
  }
  if (combine && !getComputeAttr())
    return emitOpError("expected compute with into combine, but got none");
  if (combine && !hasRegion && weight.getParts() != 1)
    return emitOpError() << "expected one part or a region with into combine, but got "
                         << weight.getParts() << " parts";
  // gemm_tile_c4
  if ((getForm() != ResultForm::Blocked) != bool(getRow()))
    return emitOpError() << "expected row with into rows and into combine, and only there";
  // gemm_tile_c5
  if (getForm() == ResultForm::Blocked && !hasRegion && weight.getParts() != 1)
    return emitOpError() << "expected one part or a region with into blocked, but got "
                         << weight.getParts() << " parts";
  int64_t rank = getForm() == ResultForm::Blocked ? 1 : combine ? 3 : 0;
  if (getForm() == ResultForm::Rows)
    rank = weight.getParts() > 1 && !hasRegion ? 3 : 2;
  if (getRank(getOut()) != rank)
    return emitOpError() << "expected a result of rank " << rank << " into "
                         << stringifyResultForm(getForm()) << ", but got " << getRank(getOut());
  // gemm_tile_c8
  if (bool(getAhead()) != (getUkernel().getAhead() != 0))
    return emitOpError() << "expected ahead exactly with a micro-kernel that has lines of it, but "
                            "got ahead = "
                         << getUkernel().getAhead() << " and " << (getAhead() ? "a" : "no")
                         << " distance";
  // gemm_tile_c9
  for (Value value : {Value(getFirstStep()), Value(getEndStep()), Value(getSums())})
    if (bool(value) != (getUkernel().getKBlock() != 0))
      return emitOpError() << "expected the clause k exactly with a k_block, but got k_block = "
                           << getUkernel().getKBlock() << " and " << (value ? "" : "no ")
                           << "steps";
  // gemm_tile_c10
  for (Value value : {getNumber(), getBlocks()})
    if (bool(value) != (getUkernel().getDefer() != 0))
      return emitOpError() << "expected the clause after exactly with defer, but got defer = "
                           << getUkernel().getDefer() << " and " << (value ? "a" : "no")
                           << " number";
  // gemm_tile_c6
  bool dot = UkernelAttr::readsPairs(getUkernel().getProduct());
  if (cast<MemRefType>(getA().getType()).getElementType().isBF16() != dot)
    return emitOpError() << "expected a block of " << (dot ? "bf16" : "f32")
                         << " for product = " << stringifyKernelProduct(getUkernel().getProduct())
                         << ", but got " << getA().getType();
  auto format = dyn_cast<FormatAttr>(weight.getFormat());
  if (dot && (!format || format.getValue() != PlainFormat::BF16))
    return emitOpError() << "expected a weight of bf16 for product = "
                         << stringifyKernelProduct(getUkernel().getProduct()) << ", but got "
                         << weight;
  bool f32 = cast<MemRefType>(getOut().getType()).getElementType().isF32();
  if (!f32 && (combine || (getForm() == ResultForm::Blocked && !dot)))
    return emitOpError() << "expected a result of f32 into " << stringifyResultForm(getForm())
                         << ", but got " << getOut().getType();
  if (combine &&
      (failed(verifyDim(*this, getOut(), 0, getUkernel().getPanels(), "panels of the scratch")) ||
       failed(verifyDim(*this, getOut(), 2, 32, "columns of the scratch"))))
    return failure();
  return success();
}

LogicalResult SelectExpertsOp::verify() {
  int64_t topK = getRouter().getTopK(), experts = getExperts();
  if (experts < 1)
    return emitOpError() << "expected experts to be positive, but got " << experts;
  if (topK > experts)
    return emitOpError() << "expected top_k at most experts E = " << experts << ", but got "
                         << topK;
  // select_experts_c1
  if (failed(verifyDim(*this, getOutWeights(), 1, topK, "chosen experts K of the weights")) ||
      failed(verifyDim(*this, getOutExperts(), 1, topK, "chosen experts K of the experts")))
    return failure();
  // select_experts_c4
  if (bool(getSelectionBias()) != (getRouter().getSelectionBias() != SelectionBias::None))
    return emitOpError() << "expected selection_bias exactly where the router has one, but got "
                         << (getSelectionBias() ? "a vector" : "none");
  for (Value vector : {getSelectionBias(), getExpertScale()})
    if (vector && opimpl::getWeightType(vector).getRows() != experts)
      return emitOpError() << "expected vectors of E = " << experts << " elements, but got "
                           << opimpl::getWeightType(vector).getRows();
  // select_experts_c2, select_experts_c3
  int64_t width = getDim(getLogits(), 1);
  if (!ShapedType::isDynamic(width) && width < experts)
    return emitOpError() << "expected logits at least E = " << experts << " wide, but got "
                         << width;
  if (getOutLogits())
    return verifyDim(*this, getOutLogits(), 1, experts, "experts E of the logits");
  return success();
}

/// The scratch of panels: [panels, T, 32].
static LogicalResult verifyScratch(Operation *op, Value scratch, int64_t panels) {
  if (panels < 1)
    return op->emitOpError() << "expected panels to be positive, but got " << panels;
  if (getRank(scratch) != 3)
    return op->emitOpError() << "expected a scratch of rank 3 [panels, T, 32], but got "
                             << scratch.getType();
  if (failed(verifyDim(op, scratch, 0, panels, "panels of the scratch")))
    return failure();
  return verifyDim(op, scratch, 2, 32, "columns of the scratch");
}

LogicalResult BeginPanelsOp::verify() { return verifyScratch(*this, getScratch(), getPanels()); }
LogicalResult EndPanelsOp::verify() { return verifyScratch(*this, getScratch(), getPanels()); }
