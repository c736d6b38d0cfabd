//===- MoEAttrs.td - attributes of the moe dialect ---------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEATTRS_TD
#define MOE_DIALECT_MOE_IR_MOEATTRS_TD

include "moe/Dialect/MoE/IR/MoEDialect.td"
include "moe/Dialect/MoE/IR/MoEInterfaces.td"
include "mlir/IR/AttrTypeBase.td"
include "mlir/IR/EnumAttr.td"

class MoE_Attr<string name, string mnem, list<Trait> traits = []>
    : AttrDef<MoE_Dialect, name, traits> {
  let mnemonic = mnem;
}

class MoE_I32Enum<string name, string summary, list<I32EnumAttrCase> cases>
    : I32EnumAttr<name, summary, cases> {
  let cppNamespace = "::mlir::moe";
  let genSpecializedAttr = 0;
}

/// A real constant, printed so that reading it gives the same bits.
class MoE_Real<string description> : AttrOrTypeParameter<"::mlir::moe::Real", description> {
  let parser = "::mlir::moe::parseReal($_parser)";
  let printer = "::mlir::moe::printReal($_printer, $_self)";
}
class MoE_DefaultReal<string value, string description> : MoE_Real<description> {
  let defaultValue = "::mlir::moe::Real(" # value # ")";
}

//===----------------------------------------------------------------------===//
// Weight format and layout
//===----------------------------------------------------------------------===//

def MoE_PlainFormat : MoE_I32Enum<"PlainFormat", "a format without scales", [
  I32EnumAttrCase<"F32", 0, "f32">,
  I32EnumAttrCase<"BF16", 1, "bf16">,
]>;

def MoE_FormatAttr : MoE_Attr<"Format", "format", [
    DeclareAttrInterfaceMethods<MoE_WeightFormatInterface>]> {
  let summary = "weight elements stored as plain floating point numbers";
  let description = [{
    `#moe.format<f32>` or `#moe.format<bf16>`; inside `!moe.weight` the name alone is written.
    A bf16 element is widened exactly to f32 in registers.
  }];
  let parameters = (ins EnumParameter<MoE_PlainFormat>:$value);
  let assemblyFormat = "`<` $value `>`";
}

def MoE_PanelLayout : MoE_I32Enum<"PanelLayout", "a packed layout", [
  I32EnumAttrCase<"Panel32", 0, "panel32">,
  I32EnumAttrCase<"Vector32", 1, "vector32">,
]>;

def MoE_LayoutAttr : MoE_Attr<"Layout", "layout", [
    DeclareAttrInterfaceMethods<MoE_WeightLayoutInterface>]> {
  let summary = "packed panels";
  let description = [{
    `panel32` is the layout `panel32-1`. A panel is 32 columns wide and as long as the reduction
    dimension rounded up to 32; it is stored row by row, so that one row is 32 elements that a
    kernel loads with aligned vectors.

    ```
    parts = 1:  lane 0 … 31                = columns 32p … 32p+31
    parts = 2:  lane 0 … 15  | 16 … 31     = gate columns 16p … 16p+15 | up columns 16p … 16p+15

    f32:   element (k, lane) at (k·32 + lane)·4 bytes
    bf16:  pairs of rows:  (k/2)·128 + lane·4 + (k mod 2)·2 bytes
    ```
    Padding is zero. The panels of an expert follow each other, and so do the experts.

    `vector32` is the layout `vector32-1`, for weights that are added to or multiplied with a row
    instead of with a matrix (one column, f32): a panel is the 32 lanes of one such row, in the
    order that a `panel32` of as many parts has them. With one part it is a plain vector, padded
    with zeros to a multiple of 32.
  }];
  let parameters = (ins EnumParameter<MoE_PanelLayout>:$value);
  let assemblyFormat = "`<` $value `>`";
}

//===----------------------------------------------------------------------===//
// Router
//===----------------------------------------------------------------------===//

def MoE_RouterInput : MoE_I32Enum<"RouterInput", "what happens to x before the router's matmul", [
  I32EnumAttrCase<"Plain", 0, "plain">,
  I32EnumAttrCase<"RmsNorm", 1, "rms_norm">,
  I32EnumAttrCase<"Mlp", 2, "mlp">,
]>;
def MoE_ScoreFunction : MoE_I32Enum<"ScoreFunction", "what makes a score of a logit", [
  I32EnumAttrCase<"Softmax", 0, "softmax">,
  I32EnumAttrCase<"Sigmoid", 1, "sigmoid">,
  I32EnumAttrCase<"SqrtSoftplus", 2, "sqrt_softplus">,
]>;
def MoE_RouterOrder : MoE_I32Enum<"RouterOrder", "whether scores are taken before the selection", [
  I32EnumAttrCase<"ScoreThenSelect", 0, "score_then_select">,
  I32EnumAttrCase<"SelectThenScore", 1, "select_then_score">,
]>;
def MoE_Renormalize : MoE_I32Enum<"Renormalize", "how the K weights are normalised", [
  I32EnumAttrCase<"None", 0, "none">,
  I32EnumAttrCase<"Sum", 1, "sum">,
  I32EnumAttrCase<"ClampSum", 2, "clamp_sum">,
  I32EnumAttrCase<"LpNorm", 3, "lp_norm">,
  I32EnumAttrCase<"JointShared", 4, "joint_shared">,
]>;
def MoE_SelectionBias : MoE_I32Enum<"SelectionBias", "what the selection bias is added to", [
  I32EnumAttrCase<"None", 0, "none">,
  I32EnumAttrCase<"Score", 1, "score">,
  I32EnumAttrCase<"Logit", 2, "logit">,
]>;
def MoE_Selection : MoE_I32Enum<"Selection", "how experts are selected", [
  I32EnumAttrCase<"TopK", 0, "top_k">,
  I32EnumAttrCase<"Table", 1, "table">,
  I32EnumAttrCase<"SparseMixer", 2, "sparse_mixer">,
  I32EnumAttrCase<"ProductKeys", 3, "product_keys">,
]>;
def MoE_RouterPrecision : MoE_I32Enum<"RouterPrecision", "arithmetic of the router", [
  I32EnumAttrCase<"F32", 0, "f32">,
  I32EnumAttrCase<"Model", 1, "model">,
]>;
def MoE_RouterArithmetic : MoE_I32Enum<"RouterArithmetic", "where a model rounds in its router", [
  I32EnumAttrCase<"CastInputs", 0, "cast_inputs">,
  I32EnumAttrCase<"UpcastLogits", 1, "upcast_logits">,
  I32EnumAttrCase<"ModelDtype", 2, "model_dtype">,
]>;
def MoE_LogitTransformKind : MoE_I32Enum<"LogitTransformKind", "a function applied to every logit", [
  I32EnumAttrCase<"Scale", 0, "scale">,
  I32EnumAttrCase<"Softcap", 1, "softcap">,
]>;
def MoE_GroupScore : MoE_I32Enum<"GroupScore", "what makes one score of a group's scores", [
  I32EnumAttrCase<"Max", 0, "max">,
  I32EnumAttrCase<"SumTop2", 1, "sum_top2">,
]>;
def MoE_GroupFill : MoE_I32Enum<"GroupFill", "score of experts in groups that were not kept", [
  I32EnumAttrCase<"Zero", 0, "zero">,
  I32EnumAttrCase<"NegInf", 1, "neg_inf">,
]>;

def MoE_LogitTransformAttr : MoE_Attr<"LogitTransform", "logit_transform"> {
  let summary = "a function applied to every logit before its score";
  let description = "`scale`: value·z. `softcap`: value·tanh(z / value).";
  let parameters = (ins EnumParameter<MoE_LogitTransformKind>:$kind, MoE_Real<"c">:$value);
  let assemblyFormat = "`<` $kind `,` $value `>`";
}

def MoE_GroupsAttr : MoE_Attr<"Groups", "groups"> {
  let summary = "group-limited selection";
  let description = [{
    The E experts form `count` groups of equal size. A group's score is the `max` of its scores or
    the sum of its two best (`sum_top2`); only experts of the `keep` best groups can be selected,
    the others have score 0 (`zero`) or −∞ (`neg_inf`).
  }];
  let parameters = (ins "int64_t":$count, "int64_t":$keep, EnumParameter<MoE_GroupScore>:$reduce,
                        EnumParameter<MoE_GroupFill>:$fill);
  let assemblyFormat = "`<` struct(params) `>`";
  let genVerifyDecl = 1;
}

def MoE_RouterAttr : MoE_Attr<"Router", "router"> {
  let summary = "how a router chooses experts and weighs them";
  let description = [{
    For every token: logits z = W·x in the given `precision`; `logit_transform`; then the `top_k`
    best in the given `order`:

    * `score_then_select`: s = score(z) over all E experts, then the `top_k` largest s.
    * `select_then_score`: the `top_k` largest z, then s = score(z) over these `top_k` alone.

    The score is `softmax`, `sigmoid` or `sqrt_softplus`. Experts are listed by falling score; equal
    scores by rising id; NaN scores are largest. The weights are s, then `renormalize`: `none`;
    `sum`: s / (Σs + epsilon); `clamp_sum`: s / max(Σs, epsilon); `lp_norm`: s / (Σ|s|^p)^(1/p) with
    p = `norm_p`; `joint_shared`: with the scores of shared experts in the sum. Last, weights are
    multiplied by `scale`, and by the operation's vector `expert_scale` where it has one.

    `selection_bias` is added, to the `score` or to the `logit`, for the choice only; weights come
    from the score without it. `groups` limits the choice.

    `input` = `rms_norm`: W is multiplied with x / rms(x) · input_scale · H^-½, where rms(x) is
    the root of the mean of x² plus `input_epsilon`.

    `precision` = `f32`: nothing is rounded to less than f32. `model`: numbers are rounded to the
    format x is rounded to where the model's own code rounds them. `model_arithmetic` says where:
    `cast_inputs` nowhere; `upcast_logits` the factors of `rms_norm` and the logits; `model_dtype`
    the result of every step, but for the sum with the selection bias, which models keep in f32.
    `weight_dtype` = `model`: also the weights at the very end.

    `select` = `sparse_mixer` chooses two experts: the best, and the best of the others. The weight
    of each is its softmax over those z that are left after leaving out, for the second, the first
    choice, and every z with (m − z) / max(|z|, m) > 2·`jitter`, m being the chosen logit.

    What `getUnimplemented` names has no lowering yet and is refused by the target.

    Example:

    ```mlir
    #moe.router<score = softmax, order = score_then_select, top_k = 8, renormalize = sum>
    ```
  }];
  let parameters = (ins
    EnumParameter<MoE_ScoreFunction>:$score,
    EnumParameter<MoE_RouterOrder>:$order,
    "int64_t":$top_k,
    DefaultValuedParameter<"Renormalize", "Renormalize::None">:$renormalize,
    MoE_DefaultReal<"0.0", "added to the sum, or its lower bound">:$epsilon,
    MoE_DefaultReal<"2.0", "p of lp_norm">:$norm_p,
    MoE_DefaultReal<"1.0", "factor of every weight">:$scale,
    DefaultValuedParameter<"RouterPrecision", "RouterPrecision::F32">:$precision,
    DefaultValuedParameter<"RouterInput", "RouterInput::Plain">:$input,
    OptionalParameter<"LogitTransformAttr">:$logit_transform,
    DefaultValuedParameter<"Selection", "Selection::TopK">:$select,
    DefaultValuedParameter<"SelectionBias", "SelectionBias::None">:$selection_bias,
    OptionalParameter<"GroupsAttr">:$groups,
    DefaultValuedParameter<"int64_t", "0">:$extra_rows,
    MoE_DefaultReal<"0.0", "added to the mean square of rms_norm">:$input_epsilon,
    MoE_DefaultReal<"0.0", "threshold of sparse_mixer">:$jitter,
    DefaultValuedParameter<"RouterArithmetic", "RouterArithmetic::UpcastLogits">:$model_arithmetic,
    DefaultValuedParameter<"RouterPrecision", "RouterPrecision::Model">:$weight_dtype);
  let assemblyFormat = "`<` struct(params) `>`";
  let genVerifyDecl = 1;
  let extraClassDeclaration = [{
    /// What `precision` = model rounds to the format of x.
    bool roundsLogits() const {
      return getPrecision() == RouterPrecision::Model &&
             getModelArithmetic() != RouterArithmetic::CastInputs;
    }
    bool roundsSteps() const {
      return getPrecision() == RouterPrecision::Model &&
             getModelArithmetic() == RouterArithmetic::ModelDtype;
    }
    bool roundsWeights() const {
      return getPrecision() == RouterPrecision::Model &&
             getWeightDtype() == RouterPrecision::Model;
    }
    /// The same with another precision.
    RouterAttr withPrecision(RouterPrecision precision) const;
    /// The name of the first attribute value that has no lowering on any target, as
    /// "selection_bias = score", or an empty string.
    std::string getUnimplemented() const;
  }];
}

//===----------------------------------------------------------------------===//
// Experts
//===----------------------------------------------------------------------===//

def MoE_ExpertForm : MoE_I32Enum<"ExpertForm", "formula of one expert", [
  I32EnumAttrCase<"Glu", 0, "glu">,
  I32EnumAttrCase<"Mlp", 1, "mlp">,
]>;
def MoE_Activation : MoE_I32Enum<"Activation", "activation function", [
  I32EnumAttrCase<"Silu", 0, "silu">,
  I32EnumAttrCase<"Gelu", 1, "gelu">,
  I32EnumAttrCase<"GeluTanh", 2, "gelu_tanh">,
  I32EnumAttrCase<"Relu", 3, "relu">,
  I32EnumAttrCase<"Relu2", 4, "relu2">,
]>;
def MoE_ClampKind : MoE_I32Enum<"ClampKind", "where gate and up are clamped", [
  I32EnumAttrCase<"Pre", 0, "pre">,
  I32EnumAttrCase<"Oai", 1, "oai">,
  I32EnumAttrCase<"Post", 2, "post">,
  I32EnumAttrCase<"Tanh", 3, "tanh">,
]>;

def MoE_ClampAttr : MoE_Attr<"Clamp", "clamp"> {
  let summary = "limits on gate and up";
  let description = [{
    `pre`: gate ≤ L and |up| ≤ L before the activation. `oai`: pre, then
    (up + 1)·gate·σ(alpha·gate). `post`: act(gate) ≤ L and |up| ≤ L. `tanh`:
    softcap(gate, L)·σ(gate)·softcap(up, `up_limit`) with softcap(v, c) = c·tanh(v / c). `oai` and
    `tanh` have no other activation; the attribute's own is not used.
  }];
  let parameters = (ins EnumParameter<MoE_ClampKind>:$kind, MoE_Real<"L">:$limit,
                        MoE_DefaultReal<"1.0", "factor inside σ of `oai`">:$alpha,
                        MoE_DefaultReal<"0.0", "limit of up in `tanh`">:$up_limit);
  let assemblyFormat = "`<` struct(params) `>`";
  let genVerifyDecl = 1;
}

def MoE_ExpertAttr : MoE_Attr<"Expert", "expert"> {
  let summary = "what one expert computes";
  let description = [{
    `glu`: down·(act(gate·x) ⊙ (up·x)), weights gate_up with two parts. `mlp`: down·act(up·x),
    weights with one part. Activations: `silu` v·σ(v); `gelu` v·Φ(v); `gelu_tanh` the tanh form;
    `relu` max(v, 0); `relu2` relu squared. NaN stays NaN in all of them.

    `clamp` needs the form `glu`. `bias`: both matmuls have one, the operands `bias` of the
    operation; it is added to the f32 sum, before clamp, activation and rounding. `norm` (each
    expert's output is normalised) and `latent` (experts work on a projection of this size; 0 =
    none) have no lowering yet and are refused by the target by name.
  }];
  let parameters = (ins
    EnumParameter<MoE_ExpertForm>:$form,
    EnumParameter<MoE_Activation>:$activation,
    OptionalParameter<"ClampAttr">:$clamp,
    DefaultValuedParameter<"bool", "false">:$bias,
    DefaultValuedParameter<"bool", "false">:$norm,
    DefaultValuedParameter<"int64_t", "0">:$latent);
  let assemblyFormat = "`<` struct(params) `>`";
  let genVerifyDecl = 1;
  let extraClassDeclaration = [{
    /// Parts of the first weight: 2 for glu, 1 for mlp.
    int64_t getParts() const { return getForm() == ExpertForm::Glu ? 2 : 1; }
    /// As RouterAttr::getUnimplemented.
    std::string getUnimplemented() const;
  }];
}

//===----------------------------------------------------------------------===//
// Symbols
//===----------------------------------------------------------------------===//

def MoE_Arrangement : MoE_I32Enum<"Arrangement", "how a checkpoint holds the experts", [
  I32EnumAttrCase<"PerExpert", 0, "per_expert">,
  I32EnumAttrCase<"Stacked", 1, "stacked">,
]>;
def MoE_EntryKind : MoE_I32Enum<"EntryKind", "what a function computes", [
  I32EnumAttrCase<"Forward", 0, "forward">,
  I32EnumAttrCase<"Route", 1, "route">,
  I32EnumAttrCase<"Experts", 2, "experts">,
]>;
def MoE_LayerKind : MoE_I32Enum<"LayerKind", "kind of a layer", [
  I32EnumAttrCase<"MoE", 0, "moe">,
  I32EnumAttrCase<"Dense", 1, "dense">,
]>;
def MoE_LayerKindAttr : EnumAttr<MoE_Dialect, MoE_LayerKind, "layer_kind"> {
  let assemblyFormat = "$value";
}

def MoE_SourceAttr : MoE_Attr<"Source", "source"> {
  let summary = "one checkpoint tensor, or one per expert, that a weight is made of";
  let description = [{
    `{e}` in the pattern stands for the expert's number (arrangement `per_expert`); a `stacked`
    tensor has the experts as its first dimension. `part` is the part of the weight that it fills.
    `rows = [begin, end]` takes these rows of the tensor's row dimension alone; without it all.
    `transposed`: the tensor is [in, out]. `interleaved`: its rows alternate between the parts.

    Example:

    ```mlir
    #moe.source<"model.layers.3.mlp.experts.{e}.gate_proj.weight", part = 0>
    ```
  }];
  let parameters = (ins
    StringRefParameter<"tensor name pattern">:$pattern,
    DefaultValuedParameter<"int64_t", "0">:$part,
    DefaultValuedParameter<"Arrangement", "Arrangement::PerExpert">:$arrangement,
    DefaultValuedParameter<"bool", "false">:$transposed,
    DefaultValuedParameter<"bool", "false">:$interleaved,
    OptionalArrayRefParameter<"int64_t", "begin and end row">:$rows);
  let hasCustomAssemblyFormat = 1;
  let genVerifyDecl = 1;
}

def MoE_DimsAttr : MoE_Attr<"Dims", "dims"> {
  let summary = "the dimensions of a layer";
  let description = [{
    H hidden size, F expert width, E experts, K experts chosen per token (E = K = 1 for a dense
    layer), S width of the shared expert (0 = none).
  }];
  let parameters = (ins "int64_t":$H, "int64_t":$F, "int64_t":$E, "int64_t":$K,
                        DefaultValuedParameter<"int64_t", "0">:$S);
  let assemblyFormat = "`<` struct(params) `>`";
  let genVerifyDecl = 1;
}

def MoE_EntryAttr : MoE_Attr<"Entry", "entry"> {
  let summary = "one function of a layer, for one level and one pair of x and y types";
  let description = [{
    Example:

    ```mlir
    #moe.entry<kind = forward, level = "x86-64-v4", x = bf16, y = f32, function = @f0_v4_bf16_f32>
    ```
  }];
  let parameters = (ins
    EnumParameter<MoE_EntryKind>:$kind,
    StringRefParameter<"CPU level">:$level,
    "::mlir::Type":$x,
    "::mlir::Type":$y,
    "::mlir::FlatSymbolRefAttr":$function);
  let assemblyFormat = "`<` struct(params) `>`";
}

//===----------------------------------------------------------------------===//
// Decisions
//===----------------------------------------------------------------------===//

def MoE_Device : MoE_I32Enum<"Device", "kind of device", [
  I32EnumAttrCase<"CPU", 0, "cpu">,
  I32EnumAttrCase<"CUDA", 1, "cuda">,
]>;
def MoE_KernelOrder : MoE_I32Enum<"KernelOrder", "which operand a micro-kernel loads first", [
  I32EnumAttrCase<"BFirst", 0, "b_first">,
  I32EnumAttrCase<"AFirst", 1, "a_first">,
]>;
def MoE_KernelProduct : MoE_I32Enum<"KernelProduct", "the instruction of a micro-kernel's products", [
  I32EnumAttrCase<"Fma", 0, "fma">,
  I32EnumAttrCase<"DotBF16", 1, "dot_bf16">,
  I32EnumAttrCase<"TileBF16", 2, "tile_bf16">,
  I32EnumAttrCase<"FmaF64", 3, "fma_f64">,
]>;
def MoE_LoadHint : MoE_I32Enum<"LoadHint", "where a micro-kernel's rows are wanted", [
  I32EnumAttrCase<"Near", 0, "near">,
  I32EnumAttrCase<"Stream", 1, "stream">,
]>;
def MoE_RowSource : MoE_I32Enum<"RowSource", "where a grouped matmul finds its rows", [
  I32EnumAttrCase<"Gather", 0, "gather">,
  I32EnumAttrCase<"Rows", 1, "rows">,
  I32EnumAttrCase<"Blocked", 2, "blocked">,
]>;
def MoE_ResultForm : MoE_I32Enum<"ResultForm", "where a grouped matmul leaves its result", [
  I32EnumAttrCase<"Blocked", 0, "blocked">,
  I32EnumAttrCase<"Rows", 1, "rows">,
  I32EnumAttrCase<"Combine", 2, "combine">,
]>;
def MoE_ResultFormAttr : EnumAttr<MoE_Dialect, MoE_ResultForm, "result_form"> {
  let assemblyFormat = "$value";
}

def MoE_TargetAttr : MoE_Attr<"Target", "target"> {
  let summary = "what a function is compiled for";
  let description = [{
    Levels of `cpu`: `x86-64-v3` (AVX2 and FMA), `x86-64-v4` (AVX-512), `avx512-bf16` (products of
    bf16 by `vdpbf16ps`), `amx-bf16` (products of bf16 on tiles of 16 rows by `tdpbf16ps`).

    Example:

    ```mlir
    #moe.target<cpu, level = "x86-64-v4">
    ```
  }];
  let parameters = (ins EnumParameter<MoE_Device>:$device, StringRefParameter<"level">:$level);
  let assemblyFormat = "`<` $device `,` `level` `=` $level `>`";
  let genVerifyDecl = 1;
}

def MoE_UkernelAttr : MoE_Attr<"Ukernel", "ukernel"> {
  let summary = "a micro-kernel";
  let description = [{
    A kernel computes `rows` × (32 · `panels`) products: every accumulator stays in a register, the
    reduction runs upwards. `order` is the operand that is loaded first, `prefetch` the distance in
    bytes of the prefetch of the panel (0 = none; into L2 in kernels of at most 8 rows, else L1).
    `ahead`, in kernels of more than 8 rows and one panel: lines of the weights that come after this
    task's own, touched for every 64 bytes of a row of the block; each line is the next one of a run
    of its own (one page each for rows of 4 KB), so that the hardware's streams follow. The blocks of
    a chunk touch 32 / `ahead` slices of a panel. 0 = none. `k_block`, with one panel and but for `fma_f64`: groups of 64
    bytes of a packed row (32 k of bf16, 16 of f32) that a call takes where a chunk has several
    blocks, so that this part of the panel stays near for all of them; sums wait in memory meanwhile
    and go on where they stopped, which changes no bit. 0 = all. With `tile_bf16` alone: `hint` =
    `stream` loads the rows as what is read once (`tileloaddt1`), not as what the first cache should
    keep; `defer`, together with `k_block`: what becomes of a finished block's sums (activation, store,
    combine) is done in the next block's last call, this many rows at each step of it, where a chunk
    has several blocks; 0 = at once. `product` is the instruction of every term:

    * `fma`: fused multiply-add of f32, one k at a time; bf16 weights are widened exactly.
    * `dot_bf16`: `vdpbf16ps` on rows and weights of bf16, two k at a time (fma with the odd one,
      then with the even one; subnormal operands and results count as zero). Levels `avx512-bf16`
      and up.
    * `fma_f64`: fused multiply-add of f64 on operands of f32; the sum is rounded to f32 once. For
      router logits: an error of a logit is a relative error of a weight.
    * `tile_bf16`: `tdpbf16ps` on tiles of 16 rows and 16 columns, 32 k at a time: the sum of the even
      and that of the odd products of 32 k, each a chain of fma, are added to one another and then to
      the result (subnormal numbers count as zero). Level `amx-bf16`. `rows` is 16 or 32 and `panels`
      is 1: one or two tiles of rows by two of columns. A block has any number of rows up to `rows`;
      what the last tile computes beyond them is not stored.

    Register budget of the others, with NV vectors per row (x86-64-v4: 2 · panels of 512 bits; x86-64-v3:
    4 · panels of 256 bits; twice as many for `fma_f64`):

    ```
    rows · NV  +  NV (b_first) or rows (a_first)  +  1  ≤  32 (x86-64-v4 and up) | 16 (x86-64-v3)
    accumulators  operands                           one to spare
    ```
    A kernel outside the budget is not a slower kernel: it is refused. `panels` is at most 4
    (x86-64-v3: 2): more would run out of address registers.

    Example:

    ```mlir
    #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1, order = b_first, prefetch = 1024>
    ```
  }];
  let parameters = (ins
    StringRefParameter<"level">:$level,
    "int64_t":$rows,
    "int64_t":$panels,
    DefaultValuedParameter<"KernelOrder", "KernelOrder::BFirst">:$order,
    DefaultValuedParameter<"int64_t", "0">:$prefetch,
    DefaultValuedParameter<"KernelProduct", "KernelProduct::Fma">:$product,
    DefaultValuedParameter<"int64_t", "0">:$ahead,
    DefaultValuedParameter<"int64_t", "0">:$k_block,
    DefaultValuedParameter<"LoadHint", "LoadHint::Near">:$hint,
    DefaultValuedParameter<"int64_t", "0">:$defer);
  let assemblyFormat = "`<` struct(params) `>`";
  let genVerifyDecl = 1;
  let extraClassDeclaration = [{
    /// Vector registers of a level, and f32 elements in one; {0, 0} for a level without code.
    static std::pair<int64_t, int64_t> getRegisterFile(StringRef level);
    static int64_t getMaxPanels(StringRef level);
    /// Registers that a kernel needs: rows·NV, the operand that is loaded first, and one.
    static int64_t getRegistersNeeded(int64_t rows, int64_t vectors, KernelOrder order);
    /// Whether products read rows of bf16 in pairs.
    static bool readsPairs(KernelProduct product) {
      return product == KernelProduct::DotBF16 || product == KernelProduct::TileBF16;
    }
    /// NV: vectors of accumulators that hold one row of all panels.
    int64_t getVectorsPerRow() const;
    static int64_t getVectorsPerRow(StringRef level, int64_t panels, KernelProduct product);
  }];
}

def MoE_StrategyAttr : MoE_Attr<"Strategy", "strategy"> {
  let summary = "the schedule of one matmul";
  let description = [{
    * `chunk_rows`: a task covers at most this many rows of one expert.
    * `panels_per_task`: panels of the weight that a task covers, a multiple of the micro-kernel's.
    * `source`: `gather` (rows of x through pair, packed on the way), `rows` (a row-major matrix),
      `blocked` (row blocks that an earlier kernel wrote).
    * `result`: `blocked` (row blocks for a later kernel), `rows` (a row-major matrix), `combine`
      (weighted and added into the output; the task owns its columns for all experts).
    * `sum_rows`, of `combine`: a task holds the sums of at most this many rows of 32 columns, and
      so the fewer panels the more tokens there are: `panels_per_task` up to T = `sum_rows` /
      `panels_per_task`, then `sum_rows` / T, at least the micro-kernel's.
    * `k_chunk`, together with `k_block`: groups of k, as there, that all panels of a task take before
      the next ones, where a chunk has several blocks: rows too long for L2 are then read from memory
      once for a task and not once for a panel. The sums of all panels of the task wait. 0 = all.

    Example:

    ```mlir
    #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>,
                  chunk_rows = 256, panels_per_task = 4, source = gather, result = blocked>
    ```
  }];
  let parameters = (ins
    "UkernelAttr":$ukernel,
    "int64_t":$chunk_rows,
    "int64_t":$panels_per_task,
    EnumParameter<MoE_RowSource>:$source,
    EnumParameter<MoE_ResultForm>:$result,
    DefaultValuedParameter<"int64_t", "4096">:$sum_rows,
    DefaultValuedParameter<"int64_t", "0">:$k_chunk);
  let assemblyFormat = [{
    `<` `ukernel` `=` qualified($ukernel) `,` `chunk_rows` `=` $chunk_rows
    (`by` `k_chunk` `=` $k_chunk^)? `,` `panels_per_task` `=` $panels_per_task `,`
    `source` `=` $source `,` `result` `=` $result (`,` `sum_rows` `=` $sum_rows^)? `>`
  }];
  let genVerifyDecl = 1;
}

#endif // MOE_DIALECT_MOE_IR_MOEATTRS_TD
