//===- Attributes.h - one list of all attributes and their names *- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Writing, reading, comparing and hashing all walk the same list, so that an
// attribute cannot be forgotten in one of them. An attribute added later must
// have the old behaviour as its default: defaults are not written, which keeps
// the ids of packed weights.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_SPEC_ATTRIBUTES_H
#define MOE_LIB_SPEC_ATTRIBUTES_H

#include "moe/Spec/ModelSpec.h"

#include "llvm/ADT/ArrayRef.h"

#include <functional>
#include <string>

namespace moec {

/// The names of an enumeration's values, in order.
template <typename E> llvm::ArrayRef<llvm::StringLiteral> enumNames();

#define MOE_ENUM_NAMES(E, ...)                                                                     \
  template <> inline llvm::ArrayRef<llvm::StringLiteral> enumNames<E>() {                          \
    static constexpr llvm::StringLiteral names[] = {__VA_ARGS__};                                  \
    return names;                                                                                  \
  }
MOE_ENUM_NAMES(LayerKind, "moe", "dense")
MOE_ENUM_NAMES(Format, "f32", "bf16")
MOE_ENUM_NAMES(RouterInput, "plain", "rms_norm", "mlp")
MOE_ENUM_NAMES(Precision, "f32", "model")
MOE_ENUM_NAMES(ModelArithmetic, "cast_inputs", "upcast_logits", "model_dtype")
MOE_ENUM_NAMES(LogitTransform, "none", "scale", "softcap")
MOE_ENUM_NAMES(Score, "softmax", "sigmoid", "sqrt_softplus")
MOE_ENUM_NAMES(Order, "score_then_select", "select_then_score")
MOE_ENUM_NAMES(SelectionBias, "none", "score", "logit")
MOE_ENUM_NAMES(GroupReduce, "max", "sum_top2")
MOE_ENUM_NAMES(GroupFill, "zero", "neg_inf")
MOE_ENUM_NAMES(Select, "top_k", "table", "sparse_mixer", "product_keys", "given")
MOE_ENUM_NAMES(Renormalize, "none", "sum", "clamp_sum", "lp_norm", "joint_shared")
MOE_ENUM_NAMES(Scale, "constant", "learned", "per_expert")
MOE_ENUM_NAMES(ExtraRows, "none", "identity", "skip", "shared")
MOE_ENUM_NAMES(Capacity, "none", "per_sequence", "all_tokens")
MOE_ENUM_NAMES(Form, "glu", "mlp")
MOE_ENUM_NAMES(Activation, "silu", "gelu", "gelu_tanh", "relu", "relu2")
MOE_ENUM_NAMES(Clamp, "none", "pre", "oai", "post", "tanh")
MOE_ENUM_NAMES(ActDtype, "model", "f32")
MOE_ENUM_NAMES(Apply, "output", "input")
MOE_ENUM_NAMES(Accumulate, "hidden", "f32")
MOE_ENUM_NAMES(Shared, "none", "mlp", "separate")
MOE_ENUM_NAMES(SharedGate, "none", "sigmoid")
MOE_ENUM_NAMES(Join, "add", "average")
MOE_ENUM_NAMES(OutputOp, "none", "bias", "rms_norm")
MOE_ENUM_NAMES(Arrangement, "per_expert", "stacked")
MOE_ENUM_NAMES(Encoding, "plain", "fp8", "mxfp4")
#undef MOE_ENUM_NAMES

/// Calls v(key, field, required) for every attribute. `Spec` is const or not.
template <typename Spec, typename V> void visitRouter(Spec &r, V &&v) {
  v("input", r.input, false);
  v("router_x", r.routerX, false);
  v("input_epsilon", r.inputEpsilon, false);
  v("logit_bias", r.logitBias, false);
  v("precision", r.precision, false);
  v("model_arithmetic", r.modelArithmetic, false);
  v("weight_dtype", r.weightDtype, false);
  v("logit_transform", r.logitTransform, false);
  v("logit_constant", r.logitConstant, false);
  v("score", r.score, true);
  v("order", r.order, true);
  v("selection_bias", r.selectionBias, false);
  v("groups", r.groups, false);
  v("groups_kept", r.groupsKept, false);
  v("group_reduce", r.groupReduce, false);
  v("group_fill", r.groupFill, false);
  v("select", r.select, false);
  v("sparse_mixer_jitter", r.sparsemixerJitter, false);
  v("renormalize", r.renormalize, true);
  v("epsilon", r.epsilon, false);
  v("norm_power", r.normPower, false);
  v("scale", r.scale, false);
  v("scale_value", r.scaleValue, false);
  v("extra_rows", r.extraRows, false);
  v("extra_row_count", r.extraRowCount, false);
  v("capacity", r.capacity, false);
  v("capacity_tokens", r.capacityTokens, false);
}

template <typename Spec, typename V> void visitExpert(Spec &e, V &&v) {
  v("form", e.form, true);
  v("activation", e.activation, true);
  v("clamp", e.clamp, false);
  v("clamp_limit", e.clampLimit, false);
  v("clamp_up_limit", e.clampUpLimit, false);
  v("clamp_alpha", e.clampAlpha, false);
  v("bias", e.bias, false);
  v("act_dtype", e.actDtype, false);
  v("latent", e.latent, false);
  v("latent_norm", e.latentNorm, false);
  v("expert_norm", e.expertNorm, false);
}

template <typename Spec, typename V> void visitCombine(Spec &c, V &&v) {
  v("apply", c.apply, false);
  v("accumulate", c.accumulate, false);
  v("sum_scale", c.sumScale, false);
  v("shared", c.shared, false);
  v("shared_count", c.sharedCount, false);
  v("shared_width", c.sharedWidth, false);
  v("shared_gate", c.sharedGate, false);
  v("join", c.join, false);
  v("output", c.output, false);
  v("pools", c.pools, false);
}

/// The weights of a layer by its attributes, without sources: router, gate_up (mlp: "up"), down.
std::vector<WeightSpec> weightsOf(const LayerSpec &layer);

/// Writes one group of attributes; those at their default are left out unless required.
llvm::json::Object routerJSON(const RouterSpec &router);
llvm::json::Object expertJSON(const ExpertSpec &expert);
llvm::json::Object combineJSON(const CombineSpec &combine);

class JSONReader;
/// Reads how the tensor of a source holds the parts of `weight`: all but its name and its scales.
void readForm(JSONReader &reader, const WeightSpec &weight, WeightSource &source);
/// Reads attributes that are present; `layer` keeps the rest. `onRead(path)` is called for each.
using OnRead = std::function<void(const std::string &)>;
void readRouter(JSONReader &reader, RouterSpec &router, bool demandRequired,
                const OnRead &onRead = nullptr);
void readExpert(JSONReader &reader, ExpertSpec &expert, bool demandRequired,
                const OnRead &onRead = nullptr);
void readCombine(JSONReader &reader, CombineSpec &combine, const OnRead &onRead = nullptr);

} // namespace moec

#endif // MOE_LIB_SPEC_ATTRIBUTES_H
