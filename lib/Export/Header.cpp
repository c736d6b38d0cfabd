//===- Header.cpp - the C header of a compiled module ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The header is C99 and C++17 and clean under -Wall -Wextra -Werror -pedantic.
// Everything in it is static inline over moec.h, so it adds no symbol and works
// with any runtime of the same ABI major number.
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Module.h"
#include "moe/Target/CPU/ModuleTable.h"

#include "moec.h"
#include "moec/module.h"
#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/raw_ostream.h"

#include <map>

namespace moec {

namespace {
/// Replaces @name@, @NAME@, @type@ … of a template.
std::string expand(llvm::StringRef text, const std::map<std::string, std::string> &values) {
  std::string out;
  while (!text.empty()) {
    auto [before, rest] = text.split('@');
    out += before;
    if (before.size() == text.size())
      break;
    auto [key, after] = rest.split('@');
    out += values.at(key.str());
    text = after;
  }
  return out;
}

constexpr llvm::StringLiteral top =
    R"(/* @name@.h: the layers of @name@, compiled by moec @version@. C99 and C++17.
   Made from the model; edits are lost.

   Link with the runtime (-lmoec). The generated library is opened at run time:

       moec_model *model = NULL;
       moec_context *context = NULL;
       moec_error error;
       if (moec_open("@name@.moec", NULL, &model, &error) ||
           moec_context_create(model, NULL, &context, &error))
         ... error.message ...
       if (@name@_forward(context, 0, x, T, y, &error))
         ... error.message ...

   Every function returns 0 or the number of an error (moec_error_name gives its name); `error` may
   be NULL. `layer` counts the layers of this module from 0: see @name@_layer().
   Matrices are row-major and compact. Letters: T tokens, H hidden size, E experts, K experts chosen
   per token, k experts per token in a call. bf16 numbers are passed as uint16_t (the upper half of
   a float's bits); this model computes in @dtype@. */
#ifndef MOEC_GENERATED_@NAME@_H
#define MOEC_GENERATED_@NAME@_H

#include "moec.h"
#include "moec/module.h"

#if (MOEC_ABI >> 16) != @abimajor@u || MOEC_ABI < @abi@u
#error "expected moec.h of ABI @abitext@ or a later minor version"
#endif

#define @NAME@_LAYERS @layers@
)";

constexpr llvm::StringLiteral middle = R"(
#ifdef __cplusplus
extern "C" {
#endif

/* The generated code, for moec_open_module() when lib@name@.a (--emit archive) is linked into the
   program. moec_open() needs no declaration. */
extern const moec_module @name@_moec_module;

/* What is known about a layer when the model is compiled. moec_get_layer_info() tells the rest. */
typedef struct {
  const char *name; /* module name in the model */
  int32_t index;    /* decoder layer */
  int32_t kind;     /* 0 MoE, 1 dense FFN */
  int64_t H;        /* width of x and y */
  int64_t F;        /* width of one expert; of the whole block if dense */
  int64_t E, K;     /* experts, experts chosen per token; 1 and 1 if dense */
} @name@_layer_shape;

/* The row of `layer`, or NULL if there is no such layer. */
static inline const @name@_layer_shape *@name@_layer(int32_t layer) {
  static const @name@_layer_shape shapes[] = {
@table@  };
  return layer >= 0 && layer < @layers@ ? &shapes[layer] : (const @name@_layer_shape *)0;
}

/* A tensor on @devicetext@ whose last dimension is contiguous. `shape` must outlive it. */
static inline DLTensor @name@_tensor_(void *data, uint8_t code, uint8_t bits, int32_t ndim,
@pad@                                int64_t *shape) {
  DLTensor tensor;
  memset(&tensor, 0, sizeof(tensor));
  tensor.data = data;
  tensor.device.device_type = @device@;
  tensor.ndim = ndim;
  tensor.dtype.code = code;
  tensor.dtype.bits = bits;
  tensor.dtype.lanes = 1;
  tensor.shape = shape;
  return tensor;
}

static inline int @name@_no_layer_(int32_t layer, moec_error *error) {
  if (layer >= 0 && layer < @layers@)
    return 0;
  if (error) {
    error->code = MOEC_E_ARGUMENT;
    memcpy(error->message, "E-ARGUMENT: @name@: layer: expected 0 to @lastlayer@, but got another number",
           sizeof("E-ARGUMENT: @name@: layer: expected 0 to @lastlayer@, but got another number"));
  }
  return MOEC_E_ARGUMENT;
}
)";

constexpr llvm::StringLiteral functions = R"(
/* y[T,H] = layer(x[T,H]), x and y @what@. */
static inline int @name@_forward_@suffix@(moec_context *context, int32_t layer, const @type@ *x,
                                   int64_t T, @type@ *y, moec_error *error) {
  int64_t shape[2];
  DLTensor in, out;
  moec_call call;
  if (@name@_no_layer_(layer, error))
    return MOEC_E_ARGUMENT;
  shape[0] = T;
  shape[1] = @name@_layer(layer)->H;
  in = @name@_tensor_((void *)(uintptr_t)x, @code@, @bits@, 2, shape);
  out = @name@_tensor_(y, @code@, @bits@, 2, shape);
  MOEC_INIT(call);
  call.x = &in;
  call.y = &out;
  return moec_run(context, layer, &call, error);
}

/* Routing alone: experts[T,K], best first, and their weights[T,K]. logits[T,E] is what the router
   computed before its score function; NULL: not wanted. MoE layers only. */
static inline int @name@_route_@suffix@(moec_context *context, int32_t layer, const @type@ *x,
                                 int64_t T, int32_t *experts, float *weights, float *logits,
                                 moec_error *error) {
  int64_t wide[2], chosen[2], all[2];
  DLTensor in, ids, scores, before;
  moec_call call;
  if (@name@_no_layer_(layer, error))
    return MOEC_E_ARGUMENT;
  wide[0] = chosen[0] = all[0] = T;
  wide[1] = @name@_layer(layer)->H;
  chosen[1] = @name@_layer(layer)->K;
  all[1] = @name@_layer(layer)->E;
  in = @name@_tensor_((void *)(uintptr_t)x, @code@, @bits@, 2, wide);
  ids = @name@_tensor_(experts, kDLInt, 32, 2, chosen);
  scores = @name@_tensor_(weights, kDLFloat, 32, 2, chosen);
  before = @name@_tensor_(logits, kDLFloat, 32, 2, all);
  MOEC_INIT(call);
  call.x = &in;
  call.experts_out = &ids;
  call.weights_out = &scores;
  call.logits_out = logits ? &before : (DLTensor *)0;
  return moec_run(context, layer, &call, error);
}

/* The experts alone: y[t] = sum over j of weights[t][j] * expert experts[t][j] of x[t]. k need not
   be K; an id of -1 stands for no expert. MoE layers only. */
static inline int @name@_experts_@suffix@(moec_context *context, int32_t layer, const @type@ *x,
                                   int64_t T, const int32_t *experts, const float *weights,
                                   int64_t k, @type@ *y, moec_error *error) {
  int64_t wide[2], given[2];
  DLTensor in, ids, scores, out;
  moec_call call;
  if (@name@_no_layer_(layer, error))
    return MOEC_E_ARGUMENT;
  wide[0] = given[0] = T;
  wide[1] = @name@_layer(layer)->H;
  given[1] = k;
  in = @name@_tensor_((void *)(uintptr_t)x, @code@, @bits@, 2, wide);
  ids = @name@_tensor_((void *)(uintptr_t)experts, kDLInt, 32, 2, given);
  scores = @name@_tensor_((void *)(uintptr_t)weights, kDLFloat, 32, 2, given);
  out = @name@_tensor_(y, @code@, @bits@, 2, wide);
  MOEC_INIT(call);
  call.flags = MOEC_ROUTED_ONLY;
  call.x = &in;
  call.experts = &ids;
  call.weights = &scores;
  call.y = &out;
  return moec_run(context, layer, &call, error);
}
)";

constexpr llvm::StringLiteral plain = R"(
/* The same in the type the model computes in. */
static inline int @name@_forward(moec_context *context, int32_t layer, const @type@ *x, int64_t T,
                          @type@ *y, moec_error *error) {
  return @name@_forward_@suffix@(context, layer, x, T, y, error);
}
static inline int @name@_route(moec_context *context, int32_t layer, const @type@ *x, int64_t T,
                        int32_t *experts, float *weights, moec_error *error) {
  return @name@_route_@suffix@(context, layer, x, T, experts, weights, (float *)0, error);
}
static inline int @name@_experts(moec_context *context, int32_t layer, const @type@ *x, int64_t T,
                          const int32_t *experts, const float *weights, int64_t k, @type@ *y,
                          moec_error *error) {
  return @name@_experts_@suffix@(context, layer, x, T, experts, weights, k, y, error);
}

#ifdef __cplusplus
}
#endif
#endif /* MOEC_GENERATED_@NAME@_H */
)";

/// `text` as a C string literal. Octal escapes end after three digits, whatever follows; "??" would
/// be a trigraph in C99.
std::string literal(llvm::StringRef text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    if (c >= 0x20 && c < 0x7f && c != '"' && c != '\\' && c != '?')
      out += c;
    else
      for (unsigned shift : {9u, 6u, 3u, 0u})
        out += shift == 9 ? '\\' : static_cast<char>('0' + ((c >> shift) & 7));
  }
  return out + "\"";
}
} // namespace

using mlir::moe::LayerCode;
using mlir::moe::LayerEntry;

std::string headerText(const mlir::moe::CodeTable &table) {
  std::map<std::string, std::string> values;
  values["name"] = table.name;
  values["NAME"] = llvm::StringRef(table.name).upper();
  values["version"] = versionString().str();
  values["layers"] = std::to_string(table.layers.size());
  values["lastlayer"] = std::to_string(table.layers.size() - 1);
  values["pad"] = std::string(table.name.size(), ' ');
  // Other devices and streams: fill a moec_call.
  bool cuda = !table.images.empty();
  values["device"] = cuda ? "kDLCUDA" : "kDLCPU";
  values["devicetext"] = cuda ? "CUDA device 0 (calls below use its default stream)" : "the CPU";
  values["abi"] = "0x" + llvm::utohexstr(MOEC_ABI, /*LowerCase=*/true, /*Width=*/8);
  values["abimajor"] = std::to_string(MOEC_ABI >> 16);
  values["abitext"] = std::to_string(MOEC_ABI >> 16) + "." + std::to_string(MOEC_ABI & 0xffff);

  bool bf16 = false;
  for (const LayerCode &code : table.codes)
    bf16 |= code.compute == MOEC_DT_BF16;
  values["dtype"] = bf16 ? "bf16" : "f32";

  std::string out = expand(top, values);
  llvm::raw_string_ostream os(out);
  // A constant for each number that all layers agree on; else only the table tells it.
  const std::pair<const char *, int64_t LayerCode::*> constants[] = {
      {"H", &LayerCode::H}, {"F", &LayerCode::F}, {"E", &LayerCode::E}, {"K", &LayerCode::K}};
  const char *meanings[] = {"width of x and y", "width of one expert", "experts",
                            "experts chosen per token"};
  for (auto [i, constant] : llvm::enumerate(constants)) {
    bool same = true;
    for (const LayerCode &code : table.codes)
      same &= code.*(constant.second) == table.codes.front().*(constant.second);
    if (same && !table.codes.empty())
      os << "#define " << values["NAME"] << "_" << constant.first << " "
         << table.codes.front().*(constant.second) << " /* " << meanings[i] << " */\n";
    else
      os << "/* " << values["NAME"] << "_" << constant.first << " (" << meanings[i]
         << ") differs between layers: see " << table.name << "_layer(). */\n";
  }
  std::string rows;
  llvm::raw_string_ostream rowStream(rows);
  for (const LayerEntry &layer : table.layers) {
    const LayerCode &code = table.codes[layer.code];
    rowStream << "      {" << literal(layer.name) << ", " << layer.index << ", " << code.kind
              << ", " << code.H << ", " << code.F << ", " << code.E << ", " << code.K << "},\n";
  }
  values["table"] = rows;
  os << expand(middle, values);
  auto setType = [&](bool isBF16) {
    values["type"] = isBF16 ? "uint16_t" : "float";
    values["suffix"] = isBF16 ? "bf16" : "f32";
    values["what"] = isBF16 ? "bf16" : "float";
    values["code"] = isBF16 ? "kDLBfloat" : "kDLFloat";
    values["bits"] = isBF16 ? "16" : "32";
  };
  for (bool isBF16 : {bf16, !bf16}) {
    setType(isBF16);
    os << expand(functions, values);
  }
  setType(bf16);
  os << expand(plain, values);
  return out;
}

} // namespace moec
