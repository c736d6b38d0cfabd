//===- Import.cpp - from a ModelSpec to moe IR ----------------------------===//
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
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/Dialect/Tensor/IR/Tensor.h"
#include "mlir/IR/Diagnostics.h"
#include "mlir/IR/ImplicitLocOpBuilder.h"
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
  bool model = r.precision == Precision::Model;
  // norm_p is the dialect's default where it has no meaning, so that it is not printed.
  double power = r.renormalize == Renormalize::LpNorm ? r.normPower : 2.0;
  return ir::RouterAttr::get(
      &context, same<ir::ScoreFunction>(r.score, ir::symbolizeScoreFunction),
      same<ir::RouterOrder>(r.order, ir::symbolizeRouterOrder), layer.K,
      same<ir::Renormalize>(r.renormalize, ir::symbolizeRenormalize), r.epsilon, power,
      r.scaleValue, same<ir::RouterPrecision>(r.precision, ir::symbolizeRouterPrecision),
      same<ir::RouterInput>(r.input, ir::symbolizeRouterInput), transform,
      same<ir::Selection>(r.select, ir::symbolizeSelection),
      same<ir::SelectionBias>(r.selectionBias, ir::symbolizeSelectionBias), groups, r.extraRowCount,
      r.input == RouterInput::RMSNorm ? r.inputEpsilon : 0.0,
      r.select == Select::Sparsemixer ? r.sparsemixerJitter : 0.0,
      // As norm_p: the dialect's defaults where they have no meaning.
      model ? same<ir::RouterArithmetic>(r.modelArithmetic, ir::symbolizeRouterArithmetic)
            : ir::RouterArithmetic::UpcastLogits,
      model ? same<ir::RouterPrecision>(r.weightDtype, ir::symbolizeRouterPrecision)
            : ir::RouterPrecision::Model);
}

ir::ExpertAttr expertAttr(mlir::MLIRContext &context, const ExpertSpec &e) {
  ir::ClampAttr clamp;
  if (e.clamp != Clamp::None)
    clamp = ir::ClampAttr::get(&context, same<ir::ClampKind>(e.clamp, ir::symbolizeClampKind),
                               e.clampLimit, e.clamp == Clamp::OAI ? e.clampAlpha : 1.0,
                               e.clamp == Clamp::Tanh ? e.clampUpLimit : 0.0);
  return ir::ExpertAttr::get(&context, same<ir::ExpertForm>(e.form, ir::symbolizeExpertForm),
                             same<ir::Activation>(e.activation, ir::symbolizeActivation), clamp,
                             e.bias, e.expertNorm, e.latent);
}

ir::WeightType weightType(mlir::MLIRContext &context, const WeightSpec &weight) {
  if (isVector(weight.role))
    return ir::WeightType::getVector(&context, weight.experts, weight.parts, weight.rows);
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
  /// The arguments of the function that is being built, by role; weights by their own role.
  using Values = llvm::StringMap<mlir::Value>;

  mlir::Type matrix(int64_t width, mlir::Type element) {
    return mlir::RankedTensorType::get({mlir::ShapedType::kDynamic, width}, element);
  }
  mlir::FlatSymbolRefAttr begin(const std::string &symbol, llvm::StringRef entry,
                                const LayerSpec &layer, llvm::SmallVector<Argument> arguments,
                                llvm::function_ref<bool(llvm::StringRef)> wanted,
                                mlir::TypeRange results);
  void end(mlir::ValueRange results);
  mlir::Value constant(int64_t value) { return mlir::arith::ConstantIndexOp::create(b, value); }
  mlir::Value emptyTensor(llvm::ArrayRef<int64_t> shape, mlir::Type element,
                          mlir::ValueRange sizes) {
    return mlir::tensor::EmptyOp::create(b, shape, element, sizes);
  }

  Functions functionsOf(const LayerSpec &layer);
  void buildMoE(const LayerSpec &layer, Functions &functions, const std::string &number);
  void buildDense(const LayerSpec &layer, Functions &functions, const std::string &number);
  ir::RouterOp route(const LayerSpec &layer, mlir::ValueRange outs);
  mlir::Value expertSum(const LayerSpec &layer, mlir::Value weights, mlir::Value ids,
                        mlir::Value slots);
  mlir::Value addShared(const LayerSpec &layer, mlir::Value sums);
  /// `usual`, or `only` in calls that want the routed sum alone.
  mlir::Value unlessRoutedOnly(mlir::Value usual, mlir::Value only) {
    return mlir::arith::SelectOp::create(b, values.lookup("routed_only"), only, usual);
  }
  mlir::Value real(double value) {
    return mlir::arith::ConstantOp::create(b, b.getF32FloatAttr(static_cast<float>(value)));
  }

  const ModelSpec &spec;
  mlir::MLIRContext &context;
  mlir::ImplicitLocOpBuilder b;
  mlir::Type compute, f32, i32;
  Values values;
  std::map<std::string, Functions> shared;
  mlir::ModuleOp module;
};

/// Begins a function whose arguments are `arguments` and those weights of the layer whose role is
/// `wanted`.
mlir::FlatSymbolRefAttr Importer::begin(const std::string &symbol, llvm::StringRef entry,
                                        const LayerSpec &layer,
                                        llvm::SmallVector<Argument> arguments,
                                        llvm::function_ref<bool(llvm::StringRef)> wanted,
                                        mlir::TypeRange results) {
  for (auto [i, weight] : llvm::enumerate(layer.weights))
    if (wanted(weight.role))
      arguments.push_back({weight.role, weightType(context, weight), static_cast<int64_t>(i)});
  llvm::SmallVector<mlir::Type> types;
  for (const Argument &argument : arguments)
    types.push_back(argument.type);
  auto func = mlir::func::FuncOp::create(b, symbol, b.getFunctionType(types, results));
  func->setAttr("moe.entry", b.getStringAttr(entry));
  func->setAttr("moe.compute", mlir::TypeAttr::get(compute));
  mlir::Block *block = func.addEntryBlock();
  values.clear();
  for (auto [i, argument] : llvm::enumerate(arguments)) {
    bool isWeight = argument.weight >= 0;
    func.setArgAttr(i, "moe.arg", b.getStringAttr(isWeight ? "weight" : argument.role));
    if (isWeight)
      func.setArgAttr(i, "moe.weight_index", b.getI64IntegerAttr(argument.weight));
    values[argument.role] = block->getArgument(i);
  }
  b.setInsertionPointToStart(block);
  return mlir::FlatSymbolRefAttr::get(func.getSymNameAttr());
}

void Importer::end(mlir::ValueRange results) {
  mlir::func::ReturnOp::create(b, results);
  b.setInsertionPointToEnd(module.getBody());
}

/// Whether a weight belongs to the router: what `route` needs and `experts` does not.
bool isRouterRole(llvm::StringRef role) {
  return role == "router" || role == "router_bias" || role == "selection_bias" ||
         role == "router_scale" || role == "per_expert_scale";
}

/// The factor of the routed sum that the join with the shared expert makes of `sum_scale`.
double routedFactor(const CombineSpec &combine) {
  return combine.join == Join::Average ? 0.5 * combine.sumScale : combine.sumScale;
}

/// Whether a call for the routed sum alone differs from the whole.
bool hasRoutedOnly(const LayerSpec &layer) {
  return layer.combine.shared == Shared::MLP || routedFactor(layer.combine) != 1.0;
}

ir::RouterOp Importer::route(const LayerSpec &layer, mlir::ValueRange outs) {
  ir::RouterVectors vectors{values.lookup("router_bias"), values.lookup("selection_bias"),
                            values.lookup("per_expert_scale"), values.lookup("router_scale")};
  return ir::RouterOp::create(b, values.lookup(layer.router.routerX ? "router_x" : "x"),
                              values.lookup("router"), vectors, outs, routerAttr(context, layer),
                              mlir::TypeAttr::get(compute));
}

/// dispatch, experts, combine, shared expert: what `forward` and `experts` have in common.
mlir::Value Importer::expertSum(const LayerSpec &layer, mlir::Value weights, mlir::Value ids,
                                mlir::Value slots) {
  mlir::Value x = values.lookup("x"), y = values.lookup("y");
  mlir::Value tokens = mlir::tensor::DimOp::create(b, x, 0);
  mlir::Value pairs = mlir::arith::MulIOp::create(b, tokens, slots);
  mlir::Value offsetsOut = emptyTensor({layer.E + 1}, i32, {});
  mlir::Value pairOut = emptyTensor({mlir::ShapedType::kDynamic}, i32, pairs);
  auto dispatch = ir::DispatchOp::create(b, ids, layer.E, mlir::ValueRange{offsetsOut, pairOut});
  mlir::Value offsets = dispatch->getResult(0), pair = dispatch->getResult(1);
  mlir::Value rowsOut = emptyTensor({mlir::ShapedType::kDynamic, layer.H}, compute, pairs);
  bool onInput = layer.combine.apply == Apply::Input, glu = layer.expert.form == Form::GLU;
  auto experts = ir::ExpertsOp::create(
      b, x, offsets, pair, values.lookup(glu ? "gate_up" : "up"), values.lookup("down"), slots,
      values.lookup(glu ? "gate_up_bias" : "up_bias"), values.lookup("down_bias"),
      onInput ? weights : mlir::Value(), rowsOut, expertAttr(context, layer.expert));
  bool shared = layer.combine.shared == Shared::MLP;
  // A shared expert goes on where this sum ends, so it stays f32.
  mlir::Value out = shared ? emptyTensor({mlir::ShapedType::kDynamic, layer.H}, f32, tokens) : y;
  mlir::Value scale;
  if (double factor = routedFactor(layer.combine); factor != 1.0)
    scale = unlessRoutedOnly(real(factor), real(1.0));
  auto combine = ir::CombineOp::create(b, experts->getResult(0), offsets, out);
  combine.getPairMutable().assign(pair);
  combine.getWeightsMutable().assign(weights);
  combine.getSlotsMutable().assign(slots);
  combine.getAccumulateMutable().assign(values.lookup("accumulate"));
  combine.setUnweighted(onInput);
  if (shared)
    combine.getStartMutable().assign(y);
  if (scale)
    combine.getScaleMutable().assign(scale);
  mlir::Value sums = combine->getResult(0);
  return shared ? addShared(layer, sums) : sums;
}

/// The shared expert's rows, weighted by its gate, on top of the f32 sums of the routed ones.
mlir::Value Importer::addShared(const LayerSpec &layer, mlir::Value sums) {
  mlir::Value x = values.lookup("x");
  // No rows where the routed sum alone is wanted.
  mlir::Value tokens = mlir::tensor::DimOp::create(b, x, 0);
  mlir::Value rows = unlessRoutedOnly(tokens, constant(0));
  bool glu = layer.expert.form == Form::GLU;
  auto ffn = ir::FfnOp::create(b, x, values.lookup(glu ? "shared_gate_up" : "shared_up"),
                               values.lookup("shared_down"), values.lookup("y"),
                               expertAttr(context, layer.expert));
  b.setInsertionPoint(ffn);
  if (layer.combine.sharedGate == SharedGate::Sigmoid) {
    mlir::Value offsets =
        ir::SingleGroupOp::create(b, rows, emptyTensor({2}, i32, {}))->getResult(0);
    auto gate =
        ir::GroupedMatmulOp::create(b, x, offsets, values.lookup("shared_gate"),
                                    emptyTensor({mlir::ShapedType::kDynamic, 1}, f32, tokens));
    gate.setRowTypeAttr(mlir::TypeAttr::get(compute));
    ir::buildSigmoid(b, b.getLoc(), gate.getEpilogue());
    ffn.getGateMutable().assign(gate->getResult(0));
  }
  if (layer.combine.join == Join::Average)
    ffn.getScaleMutable().assign(real(0.5));
  mlir::Value yes = mlir::arith::ConstantOp::create(b, b.getBoolAttr(true));
  b.setInsertionPointAfter(ffn);
  ffn.getRowsMutable().assign(rows);
  ffn.getAccumulateMutable().assign(yes);
  ffn.getStartMutable().assign(sums);
  return ffn->getResult(0);
}

void Importer::buildMoE(const LayerSpec &layer, Functions &functions, const std::string &number) {
  mlir::Type rows = matrix(layer.H, compute);
  mlir::Type w = matrix(layer.K, f32), e = matrix(layer.K, i32), l = matrix(layer.E, f32);
  mlir::Type flag = b.getI1Type();
  /// What a call may say or bring beyond the usual arguments.
  auto withExtras = [&](llvm::SmallVector<Argument> arguments, bool routes, bool sums) {
    if (sums && hasRoutedOnly(layer))
      arguments.push_back({"routed_only", flag});
    if (routes && layer.router.routerX)
      arguments.push_back({"router_x", rows});
    return arguments;
  };

  functions.forward = begin(
      "f" + number, "forward", layer,
      withExtras({{"x", rows}, {"y", rows}, {"weights", w}, {"experts", e}, {"accumulate", flag}},
                 /*routes=*/true, /*sums=*/true),
      [](llvm::StringRef) { return true; }, {rows, w, e});
  mlir::Value slots = constant(layer.K);
  auto router = route(layer, {values.lookup("weights"), values.lookup("experts")});
  mlir::Value z = expertSum(layer, router->getResult(0), router->getResult(1), slots);
  end({z, router->getResult(0), router->getResult(1)});

  functions.route = begin("r" + number, "route", layer,
                          withExtras({{"x", rows}, {"weights", w}, {"experts", e}, {"logits", l}},
                                     /*routes=*/true, /*sums=*/false),
                          isRouterRole, {w, e, l});
  router =
      route(layer, {values.lookup("weights"), values.lookup("experts"), values.lookup("logits")});
  end(router->getResults());

  mlir::Type anyW = matrix(mlir::ShapedType::kDynamic, f32);
  mlir::Type anyE = matrix(mlir::ShapedType::kDynamic, i32);
  functions.experts = begin(
      "e" + number, "experts", layer,
      withExtras(
          {{"x", rows}, {"y", rows}, {"weights", anyW}, {"experts", anyE}, {"accumulate", flag}},
          /*routes=*/false, /*sums=*/true),
      [](llvm::StringRef role) { return !isRouterRole(role); }, {rows});
  slots = mlir::tensor::DimOp::create(b, values.lookup("experts"), 1);
  end(expertSum(layer, values.lookup("weights"), values.lookup("experts"), slots));
}

void Importer::buildDense(const LayerSpec &layer, Functions &functions, const std::string &number) {
  mlir::Type rows = matrix(layer.H, compute);
  functions.forward = begin("f" + number, "forward", layer,
                            {{"x", rows}, {"y", rows}, {"accumulate", b.getI1Type()}},
                            [](llvm::StringRef) { return true; }, {rows});
  bool glu = layer.expert.form == Form::GLU;
  auto ffn = ir::FfnOp::create(b, values.lookup("x"), values.lookup(glu ? "gate_up" : "up"),
                               values.lookup("down"), values.lookup("y"),
                               expertAttr(context, layer.expert));
  ffn.getAccumulateMutable().assign(values.lookup("accumulate"));
  if (layer.expert.bias) {
    ffn.getUpBiasMutable().assign(values.lookup(glu ? "gate_up_bias" : "up_bias"));
    ffn.getDownBiasMutable().assign(values.lookup("down_bias"));
  }
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
        layer.kind == LayerKind::MoE && layer.router.routerX, functions.forward, functions.route,
        functions.experts, mlir::ArrayAttr(), b.getArrayAttr(weights));
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
                      mlir::math::MathDialect, mlir::tensor::TensorDialect>();
  mlir::OwningOpRef<mlir::ModuleOp> module = Importer(spec, context).run();
  if (llvm::Error error = verified(*module, spec.name, ErrorCode::INTERNAL))
    return error;
  return module;
}

} // namespace moec
