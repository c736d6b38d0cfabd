//===- ReadBack.cpp - from moe IR to a ModelSpec --------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Import/Import.h"

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Support/Error.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/IR/Matchers.h"
#include "mlir/IR/SymbolTable.h"
#include "llvm/Support/FormatVariadic.h"

namespace moec {

namespace ir = mlir::moe;

namespace {

/// The spec's enumeration value with the dialect's spelling.
template <typename SpecEnum, typename IREnum>
SpecEnum sameBack(IREnum value, llvm::StringRef (*stringify)(IREnum), SpecEnum last) {
  for (int i = 0; i <= static_cast<int>(last); ++i)
    if (name(static_cast<SpecEnum>(i)) == stringify(value))
      return static_cast<SpecEnum>(i);
  llvm::report_fatal_error(llvm::Twine("a spec lacks `") + stringify(value) + "`");
}

void readRouterAttr(ir::RouterAttr attr, RouterSpec &r) {
  r.score = sameBack(attr.getScore(), ir::stringifyScoreFunction, Score::SqrtSoftplus);
  r.order = sameBack(attr.getOrder(), ir::stringifyRouterOrder, Order::SelectThenScore);
  r.renormalize = sameBack(attr.getRenormalize(), ir::stringifyRenormalize, Renormalize::Joint);
  r.epsilon = attr.getEpsilon();
  if (r.renormalize == Renormalize::LpNorm)
    r.normPower = attr.getNormP();
  r.scaleValue = attr.getScale();
  r.precision = sameBack(attr.getPrecision(), ir::stringifyRouterPrecision, Precision::Model);
  r.modelArithmetic = sameBack(attr.getModelArithmetic(), ir::stringifyRouterArithmetic,
                               ModelArithmetic::ModelDtype);
  r.weightDtype = sameBack(attr.getWeightDtype(), ir::stringifyRouterPrecision, Precision::Model);
  r.input = sameBack(attr.getInput(), ir::stringifyRouterInput, RouterInput::MLP);
  if (ir::LogitTransformAttr t = attr.getLogitTransform()) {
    r.logitTransform =
        sameBack(t.getKind(), ir::stringifyLogitTransformKind, LogitTransform::Softcap);
    r.logitConstant = t.getValue();
  }
  r.select = sameBack(attr.getSelect(), ir::stringifySelection, Select::Given);
  r.selectionBias =
      sameBack(attr.getSelectionBias(), ir::stringifySelectionBias, SelectionBias::Logit);
  if (ir::GroupsAttr g = attr.getGroups()) {
    r.groups = g.getCount();
    r.groupsKept = g.getKeep();
    r.groupReduce = sameBack(g.getReduce(), ir::stringifyGroupScore, GroupReduce::SumTop2);
    r.groupFill = sameBack(g.getFill(), ir::stringifyGroupFill, GroupFill::NegInf);
  }
  r.extraRowCount = attr.getExtraRows();
  if (r.extraRowCount)
    r.extraRows = ExtraRows::Identity;
  if (r.input == RouterInput::RMSNorm)
    r.inputEpsilon = attr.getInputEpsilon();
  r.sparsemixerJitter = attr.getJitter();
}

/// What the operands of a router say.
void readRouterOperands(ir::RouterOp op, RouterSpec &r) {
  r.logitBias = bool(op.getBias());
  r.scale = op.getExpertScale() ? Scale::PerExpert : Scale::Constant;
}

void readExpertAttr(ir::ExpertAttr attr, ExpertSpec &e) {
  e.form = sameBack(attr.getForm(), ir::stringifyExpertForm, Form::MLP);
  e.activation = sameBack(attr.getActivation(), ir::stringifyActivation, Activation::ReLU2);
  if (ir::ClampAttr clamp = attr.getClamp()) {
    e.clamp = sameBack(clamp.getKind(), ir::stringifyClampKind, Clamp::Tanh);
    e.clampLimit = clamp.getLimit();
    if (e.clamp == Clamp::OAI)
      e.clampAlpha = clamp.getAlpha();
    if (e.clamp == Clamp::Tanh)
      e.clampUpLimit = clamp.getUpLimit();
  }
  e.bias = attr.getBias();
  e.expertNorm = attr.getNorm();
  e.latent = attr.getLatent();
}

/// The factor of a combine in calls of the whole layer: select %routed_only, 1, factor.
double factorOf(mlir::Value scale) {
  if (!scale)
    return 1.0;
  if (auto select = scale.getDefiningOp<mlir::arith::SelectOp>())
    scale = select.getFalseValue();
  llvm::APFloat value(1.0f);
  if (mlir::matchPattern(scale, mlir::m_ConstantFloat(&value)))
    return value.convertToFloat();
  return 1.0;
}

/// A routed sum, and the shared expert that continues it, if there is one.
void readCombine(ir::CombineOp combine, ir::FfnOp shared, CombineSpec &c) {
  c.apply = combine.getUnweighted() ? Apply::Input : Apply::Output;
  c.sumScale = factorOf(combine.getScale());
  if (!shared)
    return;
  c.shared = Shared::MLP;
  c.sharedCount = 1;
  c.sharedWidth = mlir::cast<ir::WeightType>(shared.getUp().getType()).getRows();
  c.sharedGate = shared.getGate() ? SharedGate::Sigmoid : SharedGate::None;
  if (factorOf(shared.getScale()) == 0.5) {
    c.join = Join::Average;
    c.sumScale *= 2.0;
  }
}

Format formatOf(mlir::Type type) {
  return mlir::isa<mlir::BFloat16Type>(type) ? Format::BF16 : Format::F32;
}

/// A weight and its sources; neighbours that name consecutive parts of one tensor become one.
llvm::Expected<WeightSpec> readWeight(ir::WeightOp op) {
  WeightSpec out;
  ir::WeightType type = op.getType();
  out.role = op.getRole().str();
  out.experts = type.getExperts();
  out.parts = type.getParts();
  out.rows = type.getRows();
  out.cols = type.getCols();
  auto format = mlir::dyn_cast<ir::FormatAttr>(type.getFormat());
  if (!format)
    return makeError(ErrorCode::UNSUPPORTED, op.getSymName(), "format f32 or bf16",
                     "another format of weights");
  out.format = format.getValue() == ir::PlainFormat::BF16 ? Format::BF16 : Format::F32;
  for (auto attr : op.getSources().getAsRange<ir::SourceAttr>()) {
    WeightSource source;
    source.tensor = attr.getPattern().str();
    source.arrangement =
        sameBack(attr.getArrangement(), ir::stringifyArrangement, Arrangement::Stacked);
    source.firstPart = attr.getPart();
    source.transposed = attr.getTransposed();
    source.interleaved = attr.getInterleaved();
    WeightSource *last = out.sources.empty() ? nullptr : &out.sources.back();
    bool continues = last && last->tensor == source.tensor &&
                     last->firstPart + last->partCount == source.firstPart;
    int64_t part = continues ? last->partCount : 0;
    llvm::ArrayRef<int64_t> rows = attr.getRows();
    if (!rows.empty() && (rows[0] != part * out.rows || rows[1] != (part + 1) * out.rows))
      return makeError(
          ErrorCode::UNSUPPORTED, op.getSymName(),
          llvm::formatv("rows = [{0}, {1}]", part * out.rows, (part + 1) * out.rows).str(),
          llvm::formatv("[{0}, {1}]", rows[0], rows[1]).str(),
          "the parts of a tensor follow each other");
    if (continues)
      ++last->partCount;
    else
      out.sources.push_back(std::move(source));
  }
  return out;
}

} // namespace

llvm::Expected<ModelSpec> readModel(mlir::ModuleOp module) {
  ModelSpec out;
  out.name = identifierFor(module.getSymName().value_or("model"));
  mlir::SymbolTable symbols(module);
  for (ir::LayerOp op : module.getOps<ir::LayerOp>()) {
    LayerSpec layer;
    layer.name = op.getLayerName().str();
    layer.index = static_cast<int64_t>(op.getIndex());
    layer.kind = op.getKind() == ir::LayerKind::MoE ? LayerKind::MoE : LayerKind::Dense;
    ir::DimsAttr dims = op.getDims();
    layer.H = dims.getH();
    layer.F = dims.getF();
    layer.E = dims.getE();
    layer.K = dims.getK();
    layer.compute = formatOf(op.getCompute());
    layer.router.routerX = op.getRouterX();
    auto forward = op.getForward() ? symbols.lookup<mlir::func::FuncOp>(*op.getForward())
                                   : mlir::func::FuncOp();
    unsigned formulas = 0, routers = 0;
    int64_t chosen = layer.K;
    ir::CombineOp routed;
    ir::FfnOp shared;
    if (forward)
      forward.walk([&](mlir::Operation *inner) {
        if (auto router = mlir::dyn_cast<ir::RouterOp>(inner)) {
          readRouterAttr(router.getRouter(), layer.router);
          readRouterOperands(router, layer.router);
          chosen = router.getRouter().getTopK();
          ++routers;
        } else if (auto experts = mlir::dyn_cast<ir::ExpertsOp>(inner)) {
          readExpertAttr(experts.getExpert(), layer.expert);
          ++formulas;
        } else if (auto ffn = mlir::dyn_cast<ir::FfnOp>(inner)) {
          if (layer.kind == LayerKind::MoE) {
            shared = ffn;
            return;
          }
          readExpertAttr(ffn.getExpert(), layer.expert);
          ++formulas;
        } else if (auto combine = mlir::dyn_cast<ir::CombineOp>(inner)) {
          routed = combine;
        }
      });
    if (routed)
      readCombine(routed, shared, layer.combine);
    if (formulas != 1 || routers != (layer.kind == LayerKind::MoE ? 1u : 0u))
      return makeError(ErrorCode::CONFIG, layer.name,
                       layer.kind == LayerKind::MoE
                           ? "a forward function with one moe.router and one moe.experts"
                           : "a forward function with one moe.ffn",
                       forward ? "another one" : "none",
                       "a module is read before it is lowered, or carries its spec");
    if (chosen != layer.K)
      return makeError(ErrorCode::CONFIG, layer.name + ": K",
                       llvm::formatv("top_k = {0} in its forward function", layer.K).str(),
                       std::to_string(chosen));
    for (auto ref : op.getWeights().getAsRange<mlir::FlatSymbolRefAttr>()) {
      auto weightOp = symbols.lookup<ir::WeightOp>(ref.getValue());
      if (!weightOp)
        return makeError(ErrorCode::CONFIG, layer.name, "a moe.weight `@" + ref.getValue() + "`",
                         "none");
      llvm::Expected<WeightSpec> weight = readWeight(weightOp);
      if (!weight)
        return weight.takeError();
      if (weight->role == "down")
        layer.format = weight->format;
      layer.weights.push_back(std::move(*weight));
    }
    for (const char *attribute :
         {"kind", "H", "F", "E", "K", "compute", "format", "router", "expert", "combine"})
      layer.origins[attribute] = "moe IR";
    if (llvm::Error error = checkConsistent(layer))
      return error;
    out.layers.push_back(std::move(layer));
  }
  if (out.layers.empty())
    return makeError(ErrorCode::CONFIG, out.name, "a module with at least one moe.layer", "none");
  out.dtype = out.layers.front().compute;
  return out;
}

} // namespace moec
