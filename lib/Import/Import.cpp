//===- Import.cpp - from a ModelSpec to moe IR and back -------------------===//
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
#include "mlir/Dialect/Tensor/IR/Tensor.h"
#include "mlir/IR/Diagnostics.h"
#include "mlir/IR/ImplicitLocOpBuilder.h"
#include "mlir/IR/SymbolTable.h"
#include "mlir/IR/Verifier.h"
#include "llvm/Support/FormatVariadic.h"

#include <map>
#include <set>

namespace moec {

namespace {

namespace ir = mlir::moe;

/// The dialect's enumeration with the same spelling. Spellings are one vocabulary: a value that the
/// dialect lacks is a bug of this file or of the dialect, not of the input.
template <typename IREnum, typename SpecEnum>
IREnum same(SpecEnum value, std::optional<IREnum> (*symbolize)(llvm::StringRef)) {
  std::optional<IREnum> out = symbolize(name(value));
  if (!out)
    llvm::report_fatal_error(llvm::Twine("the moe dialect lacks `") + name(value) + "`");
  return *out;
}

ir::RouterAttr routerAttr(mlir::MLIRContext &context, const LayerSpec &layer) {
  const RouterSpec &r = layer.router;
  ir::LogitTransformAttr transform;
  if (r.logitTransform != LogitTransform::None)
    transform = ir::LogitTransformAttr::get(
        &context, same<ir::LogitTransformKind>(r.logitTransform, ir::symbolizeLogitTransformKind),
        r.logitConstant);
  ir::GroupsAttr groups;
  if (r.groups > 1)
    groups = ir::GroupsAttr::get(&context, r.groups, r.groupsKept,
                                 same<ir::GroupScore>(r.groupReduce, ir::symbolizeGroupScore),
                                 same<ir::GroupFill>(r.groupFill, ir::symbolizeGroupFill));
  // norm_p is the dialect's default where it has no meaning, so that it is not printed.
  double power = r.renormalize == Renormalize::LpNorm ? r.normPower : 2.0;
  return ir::RouterAttr::get(&context, same<ir::ScoreFunction>(r.score, ir::symbolizeScoreFunction),
                             same<ir::RouterOrder>(r.order, ir::symbolizeRouterOrder), layer.K,
                             same<ir::Renormalize>(r.renormalize, ir::symbolizeRenormalize),
                             r.epsilon, power, r.scaleValue,
                             same<ir::RouterPrecision>(r.precision, ir::symbolizeRouterPrecision),
                             same<ir::RouterInput>(r.input, ir::symbolizeRouterInput), transform,
                             same<ir::Selection>(r.select, ir::symbolizeSelection),
                             same<ir::SelectionBias>(r.selectionBias, ir::symbolizeSelectionBias),
                             groups, r.extraRowCount);
}

ir::ExpertAttr expertAttr(mlir::MLIRContext &context, const ExpertSpec &e) {
  ir::ClampAttr clamp;
  if (e.clamp != Clamp::None)
    clamp = ir::ClampAttr::get(&context, same<ir::ClampKind>(e.clamp, ir::symbolizeClampKind),
                               e.clampLimit, e.clampAlpha);
  return ir::ExpertAttr::get(&context, same<ir::ExpertForm>(e.form, ir::symbolizeExpertForm),
                             same<ir::Activation>(e.activation, ir::symbolizeActivation), clamp,
                             e.bias, e.expertNorm, e.latent);
}

ir::CombineAttr combineAttr(mlir::MLIRContext &context, const CombineSpec &c) {
  return ir::CombineAttr::get(&context, same<ir::CombineApply>(c.apply, ir::symbolizeCombineApply),
                              c.sumScale, c.sharedWidth,
                              same<ir::SharedGate>(c.sharedGate, ir::symbolizeSharedGate),
                              same<ir::CombineJoin>(c.join, ir::symbolizeCombineJoin),
                              c.output == OutputOp::RMSNorm, c.output == OutputOp::Bias);
}

ir::WeightType weightType(mlir::MLIRContext &context, const WeightSpec &weight) {
  return ir::WeightType::get(&context, weight.experts, weight.parts, weight.rows, weight.cols,
                             same<ir::PlainFormat>(weight.format, ir::symbolizePlainFormat));
}

mlir::Type elementType(mlir::MLIRContext &context, Format format) {
  if (format == Format::BF16)
    return mlir::BFloat16Type::get(&context);
  return mlir::Float32Type::get(&context);
}

/// The sources of a weight; a tensor with several parts is named once for each of them.
mlir::ArrayAttr sourcesAttr(mlir::MLIRContext &context, const WeightSpec &weight) {
  llvm::SmallVector<mlir::Attribute> out;
  for (const WeightSource &source : weight.sources)
    for (int64_t p = 0; p < source.partCount; ++p) {
      llvm::SmallVector<int64_t> rows;
      if (source.partCount > 1 && !source.interleaved)
        rows = {p * weight.rows, (p + 1) * weight.rows};
      out.push_back(
          ir::SourceAttr::get(&context, source.tensor, source.firstPart + p,
                              same<ir::Arrangement>(source.arrangement, ir::symbolizeArrangement),
                              source.transposed, source.interleaved, rows));
    }
  return mlir::ArrayAttr::get(&context, out);
}

//===----------------------------------------------------------------------===//
// Import
//===----------------------------------------------------------------------===//

/// The functions of layers with equal semantics.
struct Functions {
  mlir::FlatSymbolRefAttr forward, route, experts;
};

class Importer {
public:
  Importer(const ModelSpec &spec, mlir::MLIRContext &context)
      : spec(spec), context(context), b(mlir::UnknownLoc::get(&context), &context) {}

  mlir::OwningOpRef<mlir::ModuleOp> run();

private:
  /// One argument of a function: its role, its type, and its position among the layer's weights.
  struct Argument {
    llvm::StringRef role;
    mlir::Type type;
    int64_t weight = -1;
  };

  mlir::Type matrix(int64_t width, mlir::Type element) {
    return mlir::RankedTensorType::get({mlir::ShapedType::kDynamic, width}, element);
  }
  mlir::func::FuncOp begin(const std::string &symbol, llvm::StringRef entry,
                           llvm::ArrayRef<Argument> arguments, mlir::TypeRange results);
  void end(mlir::ValueRange results);
  mlir::Value constant(int64_t value) { return mlir::arith::ConstantIndexOp::create(b, value); }
  mlir::Value emptyTensor(llvm::ArrayRef<int64_t> shape, mlir::Type element,
                          mlir::ValueRange sizes) {
    return mlir::tensor::EmptyOp::create(b, shape, element, sizes);
  }

  Functions functionsOf(const LayerSpec &layer);
  void buildMoE(const LayerSpec &layer, Functions &functions, const std::string &number);
  void buildDense(const LayerSpec &layer, Functions &functions, const std::string &number);
  mlir::Value expertSum(const LayerSpec &layer, mlir::Value x, mlir::Value y, mlir::Value weights,
                        mlir::Value ids, mlir::Value accumulate, mlir::Value up, mlir::Value down,
                        mlir::Value slots);

  const ModelSpec &spec;
  mlir::MLIRContext &context;
  mlir::ImplicitLocOpBuilder b;
  mlir::Type compute, f32, i32;
  std::map<std::string, Functions> shared;
  mlir::ModuleOp module;
};

mlir::func::FuncOp Importer::begin(const std::string &symbol, llvm::StringRef entry,
                                   llvm::ArrayRef<Argument> arguments, mlir::TypeRange results) {
  llvm::SmallVector<mlir::Type> types;
  for (const Argument &argument : arguments)
    types.push_back(argument.type);
  auto func = mlir::func::FuncOp::create(b, symbol, b.getFunctionType(types, results));
  func->setAttr("moe.entry", b.getStringAttr(entry));
  func->setAttr("moe.compute", mlir::TypeAttr::get(compute));
  for (auto [i, argument] : llvm::enumerate(arguments)) {
    func.setArgAttr(i, "moe.arg", b.getStringAttr(argument.role));
    if (argument.weight >= 0)
      func.setArgAttr(i, "moe.weight_index", b.getI64IntegerAttr(argument.weight));
  }
  b.setInsertionPointToStart(func.addEntryBlock());
  return func;
}

void Importer::end(mlir::ValueRange results) {
  mlir::func::ReturnOp::create(b, results);
  b.setInsertionPointToEnd(module.getBody());
}

/// dispatch, experts, combine: what `forward` and `experts` have in common.
mlir::Value Importer::expertSum(const LayerSpec &layer, mlir::Value x, mlir::Value y,
                                mlir::Value weights, mlir::Value ids, mlir::Value accumulate,
                                mlir::Value up, mlir::Value down, mlir::Value slots) {
  mlir::Value tokens = mlir::tensor::DimOp::create(b, x, 0);
  mlir::Value pairs = mlir::arith::MulIOp::create(b, tokens, slots);
  mlir::Value offsetsOut = emptyTensor({layer.E + 1}, i32, {});
  mlir::Value pairOut = emptyTensor({mlir::ShapedType::kDynamic}, i32, pairs);
  auto dispatch = ir::DispatchOp::create(b, ids, layer.E, mlir::ValueRange{offsetsOut, pairOut});
  mlir::Value offsets = dispatch->getResult(0), pair = dispatch->getResult(1);
  mlir::Value rowsOut = emptyTensor({mlir::ShapedType::kDynamic, layer.H}, compute, pairs);
  auto experts = ir::ExpertsOp::create(b, x, offsets, pair, up, down, slots, rowsOut,
                                       expertAttr(context, layer.expert));
  auto combine = ir::CombineOp::create(b, experts->getResult(0), offsets, pair, weights, slots,
                                       accumulate, y, combineAttr(context, layer.combine));
  return combine->getResult(0);
}

void Importer::buildMoE(const LayerSpec &layer, Functions &functions, const std::string &number) {
  mlir::Type rows = matrix(layer.H, compute);
  mlir::Type w = matrix(layer.K, f32), e = matrix(layer.K, i32), l = matrix(layer.E, f32);
  llvm::SmallVector<mlir::Type> types;
  for (const WeightSpec &weight : layer.weights)
    types.push_back(weightType(context, weight));
  mlir::Type flag = b.getI1Type();
  ir::RouterAttr router = routerAttr(context, layer);

  {
    mlir::func::FuncOp f = begin("f" + number, "forward",
                                 {{"x", rows},
                                  {"y", rows},
                                  {"weights", w},
                                  {"experts", e},
                                  {"accumulate", flag},
                                  {"weight", types[0], 0},
                                  {"weight", types[1], 1},
                                  {"weight", types[2], 2}},
                                 {rows, w, e});
    functions.forward = mlir::FlatSymbolRefAttr::get(f.getSymNameAttr());
    auto a = f.getArguments();
    mlir::Value slots = constant(layer.K);
    auto route = ir::RouterOp::create(b, a[0], a[5], mlir::ValueRange{a[2], a[3]}, router,
                                      mlir::TypeAttr::get(compute));
    mlir::Value z = expertSum(layer, a[0], a[1], route->getResult(0), route->getResult(1), a[4],
                              a[6], a[7], slots);
    end({z, route->getResult(0), route->getResult(1)});
  }
  {
    mlir::func::FuncOp f =
        begin("r" + number, "route",
              {{"x", rows}, {"weights", w}, {"experts", e}, {"logits", l}, {"weight", types[0], 0}},
              {w, e, l});
    functions.route = mlir::FlatSymbolRefAttr::get(f.getSymNameAttr());
    auto a = f.getArguments();
    auto route = ir::RouterOp::create(b, a[0], a[4], mlir::ValueRange{a[1], a[2], a[3]}, router,
                                      mlir::TypeAttr::get(compute));
    end(route->getResults());
  }
  {
    mlir::Type anyW = matrix(mlir::ShapedType::kDynamic, f32);
    mlir::Type anyE = matrix(mlir::ShapedType::kDynamic, i32);
    mlir::func::FuncOp f = begin("e" + number, "experts",
                                 {{"x", rows},
                                  {"y", rows},
                                  {"weights", anyW},
                                  {"experts", anyE},
                                  {"accumulate", flag},
                                  {"weight", types[1], 1},
                                  {"weight", types[2], 2}},
                                 {rows});
    functions.experts = mlir::FlatSymbolRefAttr::get(f.getSymNameAttr());
    auto a = f.getArguments();
    mlir::Value slots = mlir::tensor::DimOp::create(b, a[3], 1);
    mlir::Value z = expertSum(layer, a[0], a[1], a[2], a[3], a[4], a[5], a[6], slots);
    end(z);
  }
}

void Importer::buildDense(const LayerSpec &layer, Functions &functions, const std::string &number) {
  mlir::Type rows = matrix(layer.H, compute);
  mlir::func::FuncOp f = begin("f" + number, "forward",
                               {{"x", rows},
                                {"y", rows},
                                {"accumulate", b.getI1Type()},
                                {"weight", weightType(context, layer.weights[0]), 0},
                                {"weight", weightType(context, layer.weights[1]), 1}},
                               {rows});
  functions.forward = mlir::FlatSymbolRefAttr::get(f.getSymNameAttr());
  auto a = f.getArguments();
  auto ffn = ir::FfnOp::create(b, a[0], a[3], a[4], a[2], a[1], expertAttr(context, layer.expert));
  end(ffn->getResults());
}

Functions Importer::functionsOf(const LayerSpec &layer) {
  std::string key = llvm::formatv("{0}", llvm::json::Value(semantics(layer))).str();
  auto [it, fresh] = shared.try_emplace(key);
  if (fresh) {
    std::string number = std::to_string(shared.size() - 1);
    compute = elementType(context, layer.compute);
    if (layer.kind == LayerKind::MoE)
      buildMoE(layer, it->second, number);
    else
      buildDense(layer, it->second, number);
  }
  return it->second;
}

mlir::OwningOpRef<mlir::ModuleOp> Importer::run() {
  f32 = b.getF32Type();
  i32 = b.getI32Type();
  module = mlir::ModuleOp::create(b.getLoc(), llvm::StringRef(spec.name));
  mlir::OwningOpRef<mlir::ModuleOp> owner(module);
  b.setInsertionPointToEnd(module.getBody());
  std::set<std::string> used;
  for (const LayerSpec &layer : spec.layers) {
    std::string symbol = "L" + std::to_string(layer.index);
    for (int i = 1; !used.insert(symbol).second; ++i)
      symbol = "L" + std::to_string(layer.index) + "_" + std::to_string(i);
    b.setLoc(mlir::NameLoc::get(b.getStringAttr(layer.name)));
    Functions functions = functionsOf(layer);
    llvm::SmallVector<mlir::Attribute> weights;
    for (const WeightSpec &weight : layer.weights) {
      std::string name = symbol + "." + weight.role;
      ir::WeightOp::create(b, name, weightType(context, weight), weight.role,
                           sourcesAttr(context, weight));
      weights.push_back(mlir::FlatSymbolRefAttr::get(&context, name));
    }
    ir::LayerOp::create(
        b, symbol, layer.name,
        layer.kind == LayerKind::MoE ? ir::LayerKind::MoE : ir::LayerKind::Dense,
        uint64_t(layer.index), elementType(context, layer.compute),
        ir::DimsAttr::get(&context, layer.H, layer.F, layer.E, layer.K, layer.combine.sharedWidth),
        functions.forward, functions.route, functions.experts, mlir::ArrayAttr(),
        b.getArrayAttr(weights));
  }
  return owner;
}

/// Runs the verifier and turns what it says into one error.
llvm::Error verified(mlir::ModuleOp module, const std::string &where, ErrorCode code) {
  std::string text;
  mlir::ScopedDiagnosticHandler handler(module.getContext(), [&](mlir::Diagnostic &diagnostic) {
    text += (text.empty() ? "" : "; ") + diagnostic.str();
    return mlir::success();
  });
  if (mlir::succeeded(mlir::verify(module)))
    return llvm::Error::success();
  return makeError(code, where, "moe IR that the verifier accepts", text);
}

} // namespace

llvm::Expected<mlir::OwningOpRef<mlir::ModuleOp>> importModel(const ModelSpec &spec,
                                                              mlir::MLIRContext &context) {
  if (llvm::Error error = checkModel(spec))
    return error;
  context.loadDialect<ir::MoEDialect, mlir::arith::ArithDialect, mlir::func::FuncDialect,
                      mlir::tensor::TensorDialect>();
  mlir::OwningOpRef<mlir::ModuleOp> module = Importer(spec, context).run();
  if (llvm::Error error = verified(*module, spec.name, ErrorCode::INTERNAL))
    return error;
  return module;
}

//===----------------------------------------------------------------------===//
// Reading back
//===----------------------------------------------------------------------===//

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
}

void readExpertAttr(ir::ExpertAttr attr, ExpertSpec &e) {
  e.form = sameBack(attr.getForm(), ir::stringifyExpertForm, Form::MLP);
  e.activation = sameBack(attr.getActivation(), ir::stringifyActivation, Activation::ReLU2);
  if (ir::ClampAttr clamp = attr.getClamp()) {
    e.clamp = sameBack(clamp.getKind(), ir::stringifyClampKind, Clamp::Tanh);
    e.clampLimit = clamp.getLimit();
    e.clampAlpha = clamp.getAlpha();
  }
  e.bias = attr.getBias();
  e.expertNorm = attr.getNorm();
  e.latent = attr.getLatent();
}

void readCombineAttr(ir::CombineAttr attr, CombineSpec &c) {
  c.apply = sameBack(attr.getApply(), ir::stringifyCombineApply, Apply::Input);
  c.sumScale = attr.getSumScale();
  c.sharedWidth = attr.getSharedWidth();
  if (c.sharedWidth) {
    c.shared = Shared::MLP;
    c.sharedCount = 1;
  }
  c.sharedGate = sameBack(attr.getSharedGate(), ir::stringifySharedGate, SharedGate::Sigmoid);
  c.join = sameBack(attr.getJoin(), ir::stringifyCombineJoin, Join::Average);
  c.output = attr.getNorm() ? OutputOp::RMSNorm : attr.getBias() ? OutputOp::Bias : OutputOp::None;
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
    auto forward = op.getForward() ? symbols.lookup<mlir::func::FuncOp>(*op.getForward())
                                   : mlir::func::FuncOp();
    unsigned formulas = 0, routers = 0;
    int64_t chosen = layer.K;
    if (forward)
      forward.walk([&](mlir::Operation *inner) {
        if (auto router = mlir::dyn_cast<ir::RouterOp>(inner)) {
          readRouterAttr(router.getRouter(), layer.router);
          chosen = router.getRouter().getTopK();
          ++routers;
        } else if (auto experts = mlir::dyn_cast<ir::ExpertsOp>(inner)) {
          readExpertAttr(experts.getExpert(), layer.expert);
          ++formulas;
        } else if (auto ffn = mlir::dyn_cast<ir::FfnOp>(inner)) {
          readExpertAttr(ffn.getExpert(), layer.expert);
          ++formulas;
        } else if (auto combine = mlir::dyn_cast<ir::CombineOp>(inner)) {
          readCombineAttr(combine.getCombine(), layer.combine);
        }
      });
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
      if (weight->role != "router")
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
