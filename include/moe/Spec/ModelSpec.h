//===- ModelSpec.h - what a model's FFN and MoE layers are ------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The model-free description every input is brought to: a Hugging Face
// checkpoint, a bare config.json, a *.moe.json file or moe IR. Attributes cover
// all known models; what this build can compile is a subset, held in one place
// (checkImplemented). Every attribute knows where its value came from.
//
// Letters: T tokens, H hidden size, F expert width, E experts, K experts chosen
// per token, N = T*K rows.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SPEC_MODELSPEC_H
#define MOE_SPEC_MODELSPEC_H

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"
#include "llvm/Support/Error.h"
#include "llvm/Support/JSON.h"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace moec {

//===----------------------------------------------------------------------===//
// Enumerations. name(value) gives the spelling used in *.moe.json and in errors.
//===----------------------------------------------------------------------===//

enum class LayerKind { MoE, Dense };

/// Element type of a weight as it is packed, and of computation.
enum class Format { F32, BF16 };

enum class RouterInput {
  Plain,   ///< x itself
  RMSNorm, ///< rmsnorm(x) * vector * H^-1/2
  MLP      ///< a small MLP that also carries state from layer to layer
};
/// How the router's own arithmetic is rounded.
enum class Precision {
  F32,  ///< logits, score and weights in f32 whatever the model's dtype is
  Model ///< as the model's own code rounds it (RouterSpec::modelArithmetic, weightDtype)
};
/// What Precision::Model would reproduce.
enum class ModelArithmetic {
  CastInputs,   ///< x and W cast to f32 before the product
  UpcastLogits, ///< product in the model's dtype, f32 afterwards
  ModelDtype    ///< the model's dtype throughout
};
enum class LogitTransform { None, Scale, Softcap };
enum class Score { Softmax, Sigmoid, SqrtSoftplus };
enum class Order {
  ScoreThenSelect, ///< score all E, then choose K ("pre")
  SelectThenScore  ///< choose K logits, then score those ("post")
};
enum class SelectionBias { None, Score, Logit };
enum class GroupReduce { Max, SumTop2 };
enum class GroupFill { Zero, NegInf };
enum class Select { TopK, Table, Sparsemixer, ProductKeys, Given };
enum class Renormalize { None, Sum, ClampSum, LpNorm, Joint };
enum class Scale { Constant, Learned, PerExpert };
enum class ExtraRows { None, Identity, Skip, Shared };
enum class Capacity { None, PerSequence, AllTokens };
enum class Form { GLU, MLP };
enum class Activation { SiLU, GELU, GELUTanh, ReLU, ReLU2 };
enum class Clamp { None, Pre, OAI, Post, Tanh };
enum class ActDtype { Model, F32 };
enum class Apply { Output, Input };
enum class Accumulate { Hidden, F32 };
enum class Shared { None, MLP, Separate };
enum class SharedGate { None, Sigmoid };
enum class Join { Add, Average };
enum class OutputOp { None, Bias, RMSNorm };
enum class Arrangement { PerExpert, Stacked };
/// How the elements of a checkpoint tensor are encoded. The encoded ones are decoded to bf16 (to
/// f32 where f32 is packed) while they are packed.
enum class Encoding {
  Plain, ///< f32, bf16 or f16
  FP8,   ///< e4m3, a scale for each block of 128 x 128
  MXFP4  ///< e2m1, two to a byte, low nibble first; a power of two for each 32 of a row
};

llvm::StringRef name(LayerKind);
llvm::StringRef name(Format);
llvm::StringRef name(RouterInput);
llvm::StringRef name(Precision);
llvm::StringRef name(ModelArithmetic);
llvm::StringRef name(LogitTransform);
llvm::StringRef name(Score);
llvm::StringRef name(Order);
llvm::StringRef name(SelectionBias);
llvm::StringRef name(GroupReduce);
llvm::StringRef name(GroupFill);
llvm::StringRef name(Select);
llvm::StringRef name(Renormalize);
llvm::StringRef name(Scale);
llvm::StringRef name(ExtraRows);
llvm::StringRef name(Capacity);
llvm::StringRef name(Form);
llvm::StringRef name(Activation);
llvm::StringRef name(Clamp);
llvm::StringRef name(ActDtype);
llvm::StringRef name(Apply);
llvm::StringRef name(Accumulate);
llvm::StringRef name(Shared);
llvm::StringRef name(SharedGate);
llvm::StringRef name(Join);
llvm::StringRef name(OutputOp);
llvm::StringRef name(Arrangement);
llvm::StringRef name(Encoding);

//===----------------------------------------------------------------------===//
// One layer
//===----------------------------------------------------------------------===//

/// How experts and their weights are chosen for a token, in the order of the fields.
struct RouterSpec {
  RouterInput input = RouterInput::Plain;
  bool routerX = false;       ///< the router reads another tensor than the experts (router_x)
  double inputEpsilon = 1e-6; ///< of the mean square in RouterInput::RMSNorm
  bool logitBias = false;     ///< logits = W·x + bias[E]
  Precision precision = Precision::F32; ///< compile attribute, not the model's
  ModelArithmetic modelArithmetic = ModelArithmetic::UpcastLogits;
  Precision weightDtype = Precision::Model; ///< dtype of the model's own routing weights
  LogitTransform logitTransform = LogitTransform::None;
  double logitConstant = 1.0; ///< c of z*c or c*tanh(z/c)
  Score score = Score::Softmax;
  Order order = Order::ScoreThenSelect;
  SelectionBias selectionBias = SelectionBias::None;
  int64_t groups = 1; ///< G router groups
  int64_t groupsKept = 1;
  GroupReduce groupReduce = GroupReduce::Max;
  GroupFill groupFill = GroupFill::NegInf;
  Select select = Select::TopK;
  double sparsemixerJitter = 0.0; ///< threshold of Select::Sparsemixer
  Renormalize renormalize = Renormalize::None;
  double epsilon = 0.0;   ///< Sum: added to the sum; ClampSum: its minimum
  double normPower = 1.0; ///< p of LpNorm
  Scale scale = Scale::Constant;
  double scaleValue = 1.0; ///< factor after renormalisation (Scale::Constant)
  ExtraRows extraRows = ExtraRows::None;
  int64_t extraRowCount = 0; ///< rows of W beyond E
  Capacity capacity = Capacity::None;
  int64_t capacityTokens = 0; ///< tokens an expert takes before it drops
};

/// What one expert (or a dense FFN) computes.
struct ExpertSpec {
  Form form = Form::GLU; ///< glu: down(act(gate)*up); mlp: down(act(up))
  Activation activation = Activation::SiLU;
  Clamp clamp = Clamp::None;
  double clampLimit = 0.0;   ///< L of the clamps
  double clampUpLimit = 0.0; ///< second limit of Clamp::Tanh
  double clampAlpha = 0.0;   ///< alpha of Clamp::OAI
  bool bias = false;         ///< bias on gate, up and down
  ActDtype actDtype = ActDtype::Model;
  int64_t latent = 0; ///< D: experts work on a projection of width D; 0: on H
  bool latentNorm = false;
  bool expertNorm = false; ///< norm on each expert's output before its weight
};

/// How expert outputs become y.
struct CombineSpec {
  Apply apply = Apply::Output; ///< output: w*f(x); input: f(w*x)
  Accumulate accumulate = Accumulate::Hidden;
  double sumScale = 1.0; ///< factor on the routed sum
  Shared shared = Shared::None;
  int64_t sharedCount = 0;
  int64_t sharedWidth = 0; ///< S
  SharedGate sharedGate = SharedGate::None;
  Join join = Join::Add;
  OutputOp output = OutputOp::None;
  int64_t pools = 1; ///< expert pools chosen by token type
};

/// Where a part of a weight lies in a checkpoint.
struct WeightSource {
  /// Tensor name. "{e}" stands for the expert's number (Arrangement::PerExpert only).
  std::string tensor;
  Arrangement arrangement = Arrangement::PerExpert;
  /// PerExpert: one tensor [parts*Nout, Kin] for each expert. Stacked: one tensor
  /// [E, parts*Nout, Kin]. `parts` counts firstPart … firstPart+partCount-1, in order.
  int64_t firstPart = 0, partCount = 1;
  bool transposed = false;  ///< the last two dimensions are swapped: [Kin, parts*Nout]
  bool interleaved = false; ///< rows of the parts alternate (gate 0, up 0, gate 1, …)
  /// FP8: F8_E4M3 of the shape above; `scales` [E, ceil(rows/128), ceil(cols/128)].
  /// MXFP4: U8 [E, rows, Kin/32, 16]; `scales` U8 [E, rows, Kin/32], exponents with bias 127.
  /// Not transposed.
  Encoding encoding = Encoding::Plain;
  std::string scales; ///< name of the tensor, as `tensor`
};

/// One logical weight [E][parts][rows][cols] of a layer; rows = Nout, cols = Kin. In this order,
/// each where the layer's attributes ask for it (S the width of the shared expert, X extra rows):
///
///   router           [1][1][E+X][H]
///   gate_up          [E][2][F][H]    part 0 gate, part 1 up; in an mlp "up" [E][1][F][H]
///   down             [E][1][H][F]
///   router_bias      [1][1][E+X][1]  router.logit_bias
///   selection_bias   [1][1][E][1]    router.selection_bias
///   router_scale     [1][1][H][1]    router.input = rms_norm: its vector
///   per_expert_scale [1][1][E][1]    router.scale = per_expert
///   gate_up_bias     [E][2][F][1]    expert.bias; in an mlp "up_bias" [E][1][F][1]
///   down_bias        [E][1][H][1]    expert.bias
///   shared_gate_up   [1][2][S][H]    combine.shared = mlp; in an mlp "shared_up"
///   shared_down      [1][1][H][S]
///   shared_gate      [1][1][1][H]    combine.shared_gate = sigmoid
///
/// Those with one column by their role are vectors (isVector); their format is always f32.
struct WeightSpec {
  std::string role;
  int64_t experts = 1, parts = 1, rows = 0, cols = 0;
  /// How it is packed.
  Format format = Format::F32;
  /// Empty: the input has shapes only (bare config.json).
  std::vector<WeightSource> sources;

  int64_t elements() const { return experts * parts * rows * cols; }
};

/// All roles, in the order of the list above.
llvm::ArrayRef<llvm::StringLiteral> weightRoles();
/// Whether weights of this role are vectors: biases and scales.
bool isVector(llvm::StringRef role);
/// Whether weights of this role belong to the routed experts, of which a token uses K of E.
bool isRouted(llvm::StringRef role);

/// One FFN or MoE block of a decoder layer.
struct LayerSpec {
  std::string name;  ///< module name in transformers' tree, "model.layers.3.mlp"
  int64_t index = 0; ///< decoder layer
  LayerKind kind = LayerKind::MoE;
  int64_t H = 0, F = 0;
  int64_t E = 1, K = 1; ///< 1 and 1 for a dense FFN
  RouterSpec router;    ///< meaningless for a dense FFN
  ExpertSpec expert;
  CombineSpec combine;             ///< meaningless for a dense FFN
  Format compute = Format::F32;    ///< x is rounded to this when read, expert rows before weighting
  Format format = Format::F32;     ///< of the matrices; a router may stay f32 beside bf16 experts
  std::vector<WeightSpec> weights; ///< as listed at WeightSpec (dense: no router, nothing shared)
  /// Attribute path ("K", "router.renormalize") to a phrase: "config key `num_experts_per_tok`",
  /// "class default of OlmoeConfig", "checkpoint", "rule of row olmoe", "command line".
  std::map<std::string, std::string> origins;

  const WeightSpec *weight(llvm::StringRef role) const;
  /// Parameters that exist, and those a token uses (routed experts count K of E).
  int64_t totalParameters() const;
  int64_t activeParameters() const;
};

/// A model: its layers in model order.
struct ModelSpec {
  std::string name;           ///< [A-Za-z_][A-Za-z0-9_]*: becomes lib<name>.so
  std::string modelType;      ///< "mixtral"
  Format dtype = Format::F32; ///< the model's compute dtype
  std::vector<LayerSpec> layers;
  /// Things done on the user's behalf that must be said aloud, one sentence each.
  std::vector<std::string> notes;
};

//===----------------------------------------------------------------------===//
// Checks and comparisons
//===----------------------------------------------------------------------===//

/// Ranges and consistency of one layer, whether implemented or not: sizes positive and below the
/// limits, K <= E, K a multiple of nothing in particular. E-CONFIG.
llvm::Error checkConsistent(const LayerSpec &layer);

/// E-UNSUPPORTED for the first attribute whose value this build cannot compile, naming attribute,
/// value and origin. The only place that knows what is implemented.
llvm::Error checkImplemented(const LayerSpec &layer);

/// Both, for every layer.
llvm::Error checkModel(const ModelSpec &spec);

/// Everything that decides the generated code and the packed bytes, as JSON: no name, index,
/// origin or source. Equal layers share code; its text is what a layer's id is made from.
llvm::json::Object semantics(const LayerSpec &layer);

/// One differing attribute of two layers.
struct Difference {
  std::string attribute, left, right; ///< "router.epsilon", "0", "1e-20"
};
std::vector<Difference> compare(const LayerSpec &left, const LayerSpec &right);

/// `name` made usable as a C identifier ("Mixtral-8x7B" to "mixtral_8x7b"). Never empty.
std::string identifierFor(llvm::StringRef name);

/// Largest sizes accepted anywhere. They keep every product below 2^63 bytes.
struct Limits {
  static constexpr int64_t hidden = int64_t(1) << 20;
  static constexpr int64_t width = int64_t(1) << 20;
  static constexpr int64_t experts = 65536;
  static constexpr int64_t chosen = 1024;
  static constexpr int64_t layers = 10000;
};

//===----------------------------------------------------------------------===//
// *.moe.json (share/moec/moe-spec.schema.json)
//===----------------------------------------------------------------------===//

/// The highest "schema" number this build reads; written by toJSON.
constexpr int64_t specSchema = 1;

/// Writes a spec. Runs of equal layers become one entry with `"index": "0-31"` and "{i}" in names.
/// `origins`: add the origin of every attribute.
llvm::json::Value toJSON(const ModelSpec &spec, bool origins = false);

/// Reads a spec. `where` is the file, for errors (E-CONFIG with the JSON path).
llvm::Expected<ModelSpec> fromJSON(const llvm::json::Value &value, llvm::StringRef where);

} // namespace moec

#endif // MOE_SPEC_MODELSPEC_H
