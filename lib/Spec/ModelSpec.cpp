//===- ModelSpec.cpp - checks and comparisons of layers -------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/ModelSpec.h"

#include "Attributes.h"

#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FormatVariadic.h"

#include <cmath>
#include <set>

namespace moec {

#define MOE_NAME(E)                                                                                \
  llvm::StringRef name(E value) { return enumNames<E>()[static_cast<size_t>(value)]; }
MOE_NAME(LayerKind)
MOE_NAME(Format)
MOE_NAME(RouterInput)
MOE_NAME(Precision)
MOE_NAME(ModelArithmetic)
MOE_NAME(LogitTransform)
MOE_NAME(Score)
MOE_NAME(Order)
MOE_NAME(SelectionBias)
MOE_NAME(GroupReduce)
MOE_NAME(GroupFill)
MOE_NAME(Select)
MOE_NAME(Renormalize)
MOE_NAME(Scale)
MOE_NAME(ExtraRows)
MOE_NAME(Capacity)
MOE_NAME(Form)
MOE_NAME(Activation)
MOE_NAME(Clamp)
MOE_NAME(ActDtype)
MOE_NAME(Apply)
MOE_NAME(Accumulate)
MOE_NAME(Shared)
MOE_NAME(SharedGate)
MOE_NAME(Join)
MOE_NAME(OutputOp)
MOE_NAME(Arrangement)
MOE_NAME(Encoding)
#undef MOE_NAME

//===----------------------------------------------------------------------===//
// Weights and parameters
//===----------------------------------------------------------------------===//

llvm::ArrayRef<llvm::StringLiteral> weightRoles() {
  static constexpr llvm::StringLiteral roles[] = {
      "router",       "gate_up",        "up",           "down",
      "router_bias",  "selection_bias", "router_scale", "per_expert_scale",
      "gate_up_bias", "up_bias",        "down_bias",    "shared_gate_up",
      "shared_up",    "shared_down",    "shared_gate"};
  return roles;
}

bool isVector(llvm::StringRef role) {
  return role.ends_with("_bias") || role == "router_scale" || role == "per_expert_scale";
}

bool isRouted(llvm::StringRef role) {
  role.consume_back("_bias");
  return role == "gate_up" || role == "up" || role == "down";
}

std::vector<WeightSpec> weightsOf(const LayerSpec &layer) {
  std::vector<WeightSpec> out;
  auto add = [&](llvm::StringRef role, int64_t experts, int64_t parts, int64_t rows, int64_t cols) {
    WeightSpec weight;
    weight.role = role.str();
    weight.experts = experts;
    weight.parts = parts;
    weight.rows = rows;
    weight.cols = cols;
    weight.format = isVector(role) ? Format::F32 : layer.format;
    out.push_back(std::move(weight));
  };
  const RouterSpec &router = layer.router;
  bool moe = layer.kind == LayerKind::MoE, glu = layer.expert.form == Form::GLU;
  int64_t H = layer.H, F = layer.F, E = layer.E, parts = glu ? 2 : 1;
  if (moe)
    add("router", 1, 1, E + router.extraRowCount, H);
  add(glu ? "gate_up" : "up", E, parts, F, H);
  add("down", E, 1, H, F);
  if (moe && router.logitBias)
    add("router_bias", 1, 1, E + router.extraRowCount, 1);
  if (moe && router.selectionBias != SelectionBias::None)
    add("selection_bias", 1, 1, E, 1);
  if (moe && router.input == RouterInput::RMSNorm)
    add("router_scale", 1, 1, H, 1);
  if (moe && router.scale == Scale::PerExpert)
    add("per_expert_scale", 1, 1, E, 1);
  if (layer.expert.bias) {
    add(glu ? "gate_up_bias" : "up_bias", E, parts, F, 1);
    add("down_bias", E, 1, H, 1);
  }
  if (moe && layer.combine.shared == Shared::MLP) {
    add(glu ? "shared_gate_up" : "shared_up", 1, parts, layer.combine.sharedWidth, H);
    add("shared_down", 1, 1, H, layer.combine.sharedWidth);
    if (layer.combine.sharedGate == SharedGate::Sigmoid)
      add("shared_gate", 1, 1, 1, H);
  }
  return out;
}

const WeightSpec *LayerSpec::weight(llvm::StringRef role) const {
  for (const WeightSpec &weight : weights)
    if (weight.role == role)
      return &weight;
  return nullptr;
}

int64_t LayerSpec::totalParameters() const {
  int64_t sum = 0;
  for (const WeightSpec &weight : weights)
    sum += weight.elements();
  return sum;
}

int64_t LayerSpec::activeParameters() const {
  int64_t sum = 0;
  for (const WeightSpec &weight : weights)
    sum += isRouted(weight.role) ? weight.elements() / E * K : weight.elements();
  return sum;
}

//===----------------------------------------------------------------------===//
// Checks
//===----------------------------------------------------------------------===//

namespace {

std::string originOf(const LayerSpec &layer, llvm::StringRef attribute) {
  auto it = layer.origins.find(attribute.str());
  return it == layer.origins.end() ? "" : " (" + it->second + ")";
}

class LayerCheck {
public:
  explicit LayerCheck(const LayerSpec &layer) : layer(layer) {}

  void size(llvm::StringRef attribute, int64_t value, int64_t limit) {
    if (value < 1 || value > limit)
      fail(ErrorCode::CONFIG, attribute, llvm::formatv("from 1 to {0}", limit).str(),
           std::to_string(value));
  }
  void require(bool ok, llvm::StringRef attribute, const llvm::Twine &expected,
               const llvm::Twine &got) {
    if (!ok)
      fail(ErrorCode::CONFIG, attribute, expected.str(), got.str());
  }
  /// The attribute must have one of the values that are implemented.
  template <typename E>
  void implemented(llvm::StringRef attribute, E value, std::initializer_list<E> values) {
    std::vector<std::string> names;
    for (E v : values) {
      if (v == value)
        return;
      names.push_back(name(v).str());
    }
    fail(ErrorCode::UNSUPPORTED, attribute, quoteList(names, "or"), "`" + name(value).str() + "`",
         true);
  }
  void implemented(llvm::StringRef attribute, bool ok, const llvm::Twine &expected,
                   const llvm::Twine &got) {
    if (!ok)
      fail(ErrorCode::UNSUPPORTED, attribute, expected.str(), got.str(), true);
  }
  llvm::Error take() { return error ? llvm::make_error<Error>(*error) : llvm::Error::success(); }

private:
  void fail(ErrorCode code, llvm::StringRef attribute, const std::string &expected,
            const std::string &got, bool unsupported = false) {
    if (error)
      return;
    error.emplace(code, layer.name + ": " + attribute.str(), expected,
                  got + originOf(layer, attribute),
                  unsupported ? "this value is known but not implemented yet" : "");
  }

  const LayerSpec &layer;
  std::optional<Error> error;
};

std::string number(double value) { return numberText(value); }

bool isFileStem(llvm::StringRef text) {
  if (text.empty() || text.size() > 200 || text.front() == '.')
    return false;
  return llvm::all_of(text,
                      [](char c) { return llvm::isAlnum(c) || c == '.' || c == '_' || c == '-'; });
}

} // namespace

llvm::Error checkConsistent(const LayerSpec &layer) {
  LayerCheck check(layer);
  check.require(isFileStem(layer.name), "name",
                "at most 200 letters, digits, `.`, `_` and `-`, not starting with `.`",
                layer.name.size() > 200 ? std::to_string(layer.name.size()) + " characters"
                                        : "`" + llvm::json::fixUTF8(layer.name) + "`");
  check.require(layer.index >= 0 && layer.index < Limits::layers, "index",
                llvm::formatv("from 0 to {0}", Limits::layers - 1).str(),
                std::to_string(layer.index));
  check.size("H", layer.H, Limits::hidden);
  check.size("F", layer.F, Limits::width);
  check.size("E", layer.E, Limits::experts);
  check.size("K", layer.K, Limits::chosen);
  const ExpertSpec &e = layer.expert;
  check.require(e.clamp == Clamp::None || (std::isfinite(e.clampLimit) && e.clampLimit > 0),
                "expert.clamp_limit", "a positive number", number(e.clampLimit));
  check.require(e.clamp != Clamp::Tanh || (std::isfinite(e.clampUpLimit) && e.clampUpLimit > 0),
                "expert.clamp_up_limit", "a positive number", number(e.clampUpLimit));
  check.require(std::isfinite(e.clampAlpha), "expert.clamp_alpha", "a finite number",
                number(e.clampAlpha));
  check.require(layer.K <= layer.E, "K", llvm::formatv("at most E = {0}", layer.E).str(),
                std::to_string(layer.K));
  if (layer.kind == LayerKind::Dense) {
    check.require(layer.E == 1 && layer.K == 1, "E", "1 in a dense layer", std::to_string(layer.E));
  } else {
    const RouterSpec &r = layer.router;
    check.require(std::isfinite(r.epsilon) && r.epsilon >= 0, "router.epsilon",
                  "a number that is not negative", number(r.epsilon));
    check.require(std::isfinite(r.scaleValue), "router.scale_value", "a finite number",
                  number(r.scaleValue));
    check.require(std::isfinite(r.inputEpsilon) && r.inputEpsilon >= 0, "router.input_epsilon",
                  "a number that is not negative", number(r.inputEpsilon));
    check.require(std::isfinite(r.sparsemixerJitter) && r.sparsemixerJitter >= 0,
                  "router.sparse_mixer_jitter", "a number that is not negative",
                  number(r.sparsemixerJitter));
    check.require(std::isfinite(r.logitConstant) &&
                      (r.logitConstant != 0 || r.logitTransform != LogitTransform::Softcap),
                  "router.logit_constant", "a finite number, for softcap not 0",
                  number(r.logitConstant));
    check.require(r.renormalize != Renormalize::LpNorm ||
                      (std::isfinite(r.normPower) && r.normPower > 0),
                  "router.norm_power", "a positive number", number(r.normPower));
    check.size("router.groups", r.groups, layer.E);
    check.size("router.groups_kept", r.groupsKept, r.groups);
    check.require(r.groups < 1 || layer.E % r.groups == 0, "router.groups",
                  llvm::formatv("a divisor of E = {0}", layer.E).str(), std::to_string(r.groups));
    check.require(r.groups > 1 || r.groupsKept == 1, "router.groups_kept", "1 of 1 group",
                  std::to_string(r.groupsKept));
    check.require(r.groups <= 1 || r.groupFill == GroupFill::Zero ||
                      layer.K <= layer.E / std::max<int64_t>(r.groups, 1) * r.groupsKept,
                  "K", "at most the experts of the groups kept", std::to_string(layer.K));
    check.require(r.groups <= 1 || r.groupReduce == GroupReduce::Max || layer.E / r.groups >= 2,
                  "router.groups", "groups of at least 2 experts", std::to_string(r.groups));
    const CombineSpec &c = layer.combine;
    check.require(std::isfinite(c.sumScale), "combine.sum_scale", "a finite number",
                  number(c.sumScale));
    if (c.shared == Shared::MLP)
      check.size("combine.shared_width", c.sharedWidth, Limits::width);
    else
      check.require(c.sharedGate == SharedGate::None, "combine.shared_gate",
                    "`none` without a shared expert", "`" + name(c.sharedGate) + "`");
  }
  if (llvm::Error error = check.take())
    return error; // sizes first: weights are made of them
  std::vector<WeightSpec> wanted = weightsOf(layer);
  check.require(wanted.size() == layer.weights.size(), "weights",
                llvm::formatv("{0} of them", wanted.size()).str(),
                std::to_string(layer.weights.size()));
  for (size_t i = 0; i < wanted.size() && i < layer.weights.size(); ++i) {
    const WeightSpec &w = wanted[i], &g = layer.weights[i];
    auto shape = [](const WeightSpec &s) {
      return llvm::formatv("{0} [{1},{2},{3},{4}]", s.role, s.experts, s.parts, s.rows, s.cols)
          .str();
    };
    check.require(shape(w) == shape(g), "weights", shape(w), shape(g));
  }
  return check.take();
}

llvm::Error checkImplemented(const LayerSpec &layer) {
  LayerCheck check(layer);
  const ExpertSpec &e = layer.expert;
  check.implemented("expert.form", e.form == Form::GLU || e.clamp == Clamp::None,
                    "`glu` with a clamp", "`" + name(e.form) + "`");
  check.implemented("expert.act_dtype", e.actDtype, {ActDtype::Model});
  check.implemented("expert.latent", e.latent == 0, "0", llvm::Twine(e.latent));
  check.implemented("expert.latent_norm", !e.latentNorm, "`false`", "`true`");
  check.implemented("expert.expert_norm", !e.expertNorm, "`false`", "`true`");
  if (layer.kind == LayerKind::Dense)
    return check.take();

  const RouterSpec &r = layer.router;
  check.implemented("router.input", r.input, {RouterInput::Plain, RouterInput::RMSNorm});
  check.implemented("router.score", r.score, {Score::Softmax, Score::Sigmoid});
  check.implemented("router.order",
                    r.order == Order::ScoreThenSelect || r.selectionBias != SelectionBias::Score,
                    "`score_then_select` with selection_bias = score", "`" + name(r.order) + "`");
  check.implemented("router.select", r.select, {Select::TopK, Select::Sparsemixer});
  if (r.select == Select::Sparsemixer) {
    check.implemented("K", layer.K == 2, "2 with select = sparse_mixer", llvm::Twine(layer.K));
    check.implemented("router.score", r.score, {Score::Softmax});
    check.implemented("router.selection_bias", r.selectionBias, {SelectionBias::None});
    check.implemented("router.groups", r.groups == 1, "1", llvm::Twine(r.groups));
    check.implemented("router.renormalize", r.renormalize, {Renormalize::None});
  }
  check.implemented(
      "router.renormalize", r.renormalize,
      {Renormalize::None, Renormalize::Sum, Renormalize::ClampSum, Renormalize::LpNorm});
  if (r.renormalize == Renormalize::LpNorm)
    check.implemented("router.norm_power", r.normPower == 1.0 || r.normPower == 2.0, "1 or 2",
                      number(r.normPower));
  check.implemented("router.scale", r.scale, {Scale::Constant, Scale::PerExpert});
  check.implemented("router.extra_rows", r.extraRows, {ExtraRows::None});
  check.implemented("router.capacity", r.capacity, {Capacity::None});

  const CombineSpec &c = layer.combine;
  check.implemented("combine.accumulate", c.accumulate, {Accumulate::Hidden});
  check.implemented("combine.shared", c.shared, {Shared::None, Shared::MLP});
  if (c.shared == Shared::MLP) {
    check.implemented("expert.clamp", e.clamp == Clamp::None, "`none` beside a shared expert",
                      "`" + name(e.clamp) + "`");
    check.implemented("expert.bias", !e.bias, "`false` beside a shared expert", "`true`");
  }
  check.implemented("combine.join", c.join == Join::Add || c.shared == Shared::MLP,
                    "`add` without a shared expert", "`" + name(c.join) + "`");
  check.implemented("combine.output", c.output, {OutputOp::None});
  check.implemented("combine.pools", c.pools == 1, "1", llvm::Twine(c.pools));
  return check.take();
}

llvm::Error checkModel(const ModelSpec &spec) {
  std::set<std::string> names;
  for (const LayerSpec &layer : spec.layers) {
    if (llvm::Error error = checkConsistent(layer))
      return error;
    if (llvm::Error error = checkImplemented(layer))
      return error;
    if (!names.insert(layer.name).second)
      return makeError(ErrorCode::CONFIG, spec.name, "every layer name once",
                       "`" + layer.name + "` twice");
  }
  return llvm::Error::success();
}

//===----------------------------------------------------------------------===//
// Semantics and comparison
//===----------------------------------------------------------------------===//

namespace {

/// Runs a visitor over two specs in step.
template <typename Spec, typename Visit, typename Do>
void visitBoth(const Spec &left, const Spec &right, Visit visit, Do act) {
  // Fields are addressed by their offset in the struct, so that one list serves both sides.
  visit(left, [&](const char *key, const auto &field, bool required) {
    using T = std::decay_t<decltype(field)>;
    size_t offset = reinterpret_cast<const char *>(&field) - reinterpret_cast<const char *>(&left);
    const T &other = *reinterpret_cast<const T *>(reinterpret_cast<const char *>(&right) + offset);
    act(key, field, other, required);
  });
}

/// Writes the attributes that differ from a default-made spec, and the required ones.
template <typename Spec, typename Visit> llvm::json::Object write(const Spec &spec, Visit visit) {
  llvm::json::Object out;
  Spec defaults;
  visitBoth(spec, defaults, visit,
            [&](const char *key, const auto &value, const auto &usual, bool required) {
              using T = std::decay_t<decltype(value)>;
              if (!required && value == usual)
                return;
              if constexpr (std::is_enum_v<T>)
                out[key] = name(value);
              else
                out[key] = value;
            });
  return out;
}

auto routerVisit = [](const RouterSpec &r, auto &&v) { visitRouter(r, v); };
auto expertVisit = [](const ExpertSpec &e, auto &&v) { visitExpert(e, v); };
auto combineVisit = [](const CombineSpec &c, auto &&v) { visitCombine(c, v); };

template <typename T> std::string text(const T &value) {
  if constexpr (std::is_enum_v<T>)
    return name(value).str();
  else if constexpr (std::is_same_v<T, bool>)
    return value ? "true" : "false";
  else if constexpr (std::is_floating_point_v<T>)
    return number(value);
  else if constexpr (std::is_integral_v<T>)
    return std::to_string(value);
  else
    return value;
}

} // namespace

llvm::json::Object routerJSON(const RouterSpec &router) { return write(router, routerVisit); }
llvm::json::Object expertJSON(const ExpertSpec &expert) { return write(expert, expertVisit); }
llvm::json::Object combineJSON(const CombineSpec &combine) { return write(combine, combineVisit); }

llvm::json::Object semantics(const LayerSpec &layer) {
  llvm::json::Object out{{"kind", name(layer.kind)},
                         {"H", layer.H},
                         {"F", layer.F},
                         {"E", layer.E},
                         {"K", layer.K},
                         {"compute", name(layer.compute)},
                         {"expert", expertJSON(layer.expert)}};
  if (layer.kind == LayerKind::MoE) {
    out["router"] = routerJSON(layer.router);
    out["combine"] = combineJSON(layer.combine);
  }
  llvm::json::Object weights;
  for (const WeightSpec &weight : layer.weights)
    weights[weight.role] = llvm::json::Object{{"experts", weight.experts},
                                              {"parts", weight.parts},
                                              {"rows", weight.rows},
                                              {"cols", weight.cols},
                                              {"format", name(weight.format)}};
  out["weights"] = std::move(weights);
  return out;
}

std::vector<Difference> compare(const LayerSpec &left, const LayerSpec &right) {
  std::vector<Difference> out;
  auto field = [&](const std::string &attribute, const auto &l, const auto &r) {
    if (!(l == r))
      out.push_back({attribute, text(l), text(r)});
  };
  field("kind", left.kind, right.kind);
  field("H", left.H, right.H);
  field("F", left.F, right.F);
  field("E", left.E, right.E);
  field("K", left.K, right.K);
  field("compute", left.compute, right.compute);
  auto group = [&](const std::string &prefix) {
    return [&field, prefix](const char *key, const auto &l, const auto &r, bool) {
      field(prefix + key, l, r);
    };
  };
  if (left.kind == LayerKind::MoE && right.kind == LayerKind::MoE) {
    visitBoth(left.router, right.router, routerVisit, group("router."));
    visitBoth(left.combine, right.combine, combineVisit, group("combine."));
  }
  visitBoth(left.expert, right.expert, expertVisit, group("expert."));
  for (const WeightSpec &weight : left.weights) {
    const WeightSpec *other = right.weight(weight.role);
    if (!other) {
      out.push_back({"weights." + weight.role, "present", "absent"});
      continue;
    }
    std::string prefix = "weights." + weight.role + ".";
    field(prefix + "experts", weight.experts, other->experts);
    field(prefix + "parts", weight.parts, other->parts);
    field(prefix + "rows", weight.rows, other->rows);
    field(prefix + "cols", weight.cols, other->cols);
    field(prefix + "format", weight.format, other->format);
  }
  for (const WeightSpec &weight : right.weights)
    if (!left.weight(weight.role))
      out.push_back({"weights." + weight.role, "absent", "present"});
  return out;
}

std::string identifierFor(llvm::StringRef text) {
  std::string out;
  for (char c : text.take_front(64))
    out += llvm::isAlnum(c) ? llvm::toLower(c) : '_';
  while (llvm::StringRef(out).ends_with("_"))
    out.pop_back();
  if (out.empty())
    return "model";
  if (llvm::isDigit(out[0]))
    out = "m" + out;
  return out;
}

} // namespace moec
