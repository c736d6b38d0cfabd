//===- MoERoutingOps.td - routing, import and fused level --*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEROUTINGOPS_TD
#define MOE_DIALECT_MOE_IR_MOEROUTINGOPS_TD

include "moe/Dialect/MoE/IR/MoEOpBase.td"

//===----------------------------------------------------------------------===//
// Symbols
//===----------------------------------------------------------------------===//

def MoE_WeightOp : MoE_Op<"weight", [Symbol]> {
  let summary = "name a packed weight and the checkpoint tensors that it is made of";
  let description = [{
    Constraints: (C1) every source's part is below the weight's parts; (C2) the role is one word.
    Not promised: that the tensors exist.

    Example:

    ```mlir
    moe.weight @L3.gate_up : !moe.weight<64x2x1024x2048xbf16, panel32> role "gate_up" from
        [#moe.source<"model.layers.3.mlp.experts.{e}.gate_proj.weight">,
         #moe.source<"model.layers.3.mlp.experts.{e}.up_proj.weight", part = 1>]
    ```
  }];
  let arguments = (ins
    SymbolNameAttr:$sym_name,
    TypeAttrOf<MoE_Weight>:$type,
    StrAttr:$role,
    TypedArrayAttrBase<MoE_SourceAttr, "checkpoint tensors">:$sources);
  let assemblyFormat = [{
    $sym_name `:` qualified($type) `role` $role `from` $sources attr-dict
  }];
  let hasVerifier = 1;
}

def MoE_LayerOp : MoE_Op<"layer", [Symbol, DeclareOpInterfaceMethods<SymbolUserOpInterface>]> {
  let summary = "name the functions, weights and dimensions of one layer";
  let description = [{
    Equal layers name the same functions. `weights` are in the order of the generated module's
    weight table: router first (absent in a dense layer), then gate_up, down, then what else the
    layer's attributes ask for. `entries` appears when
    functions have been cloned per level and type; it then replaces `forward`, `route` and
    `experts`. `router_x`: a call brings a second input, which the router reads.

    Constraints: (C1) a `moe` layer has forward, route and experts, a `dense` one forward alone, or
    either has entries; (C2) every function is a `func.func` of the module, or what an entry has
    become (`moe.code` or a function of another dialect); (C3) every weight is a `moe.weight` of the
    module; (C4) index is not negative.

    Example:

    ```mlir
    moe.layer @L3 "model.layers.3.mlp" kind = moe index = 3 compute = bf16
        dims = <H = 2048, F = 1024, E = 64, K = 8> forward = @f0 route = @r0 experts = @e0
        weights(@L3.router, @L3.gate_up, @L3.down)
    ```
  }];
  let arguments = (ins
    SymbolNameAttr:$sym_name,
    StrAttr:$layer_name,
    MoE_LayerKindAttr:$kind,
    I64Attr:$index,
    TypeAttrOf<MoE_Float>:$compute,
    MoE_DimsAttr:$dims,
    UnitAttr:$router_x,
    OptionalAttr<FlatSymbolRefAttr>:$forward,
    OptionalAttr<FlatSymbolRefAttr>:$route,
    OptionalAttr<FlatSymbolRefAttr>:$experts,
    OptionalAttr<TypedArrayAttrBase<MoE_EntryAttr, "entries">>:$entries,
    TypedArrayAttrBase<FlatSymbolRefAttr, "weights">:$weights);
  let assemblyFormat = [{
    $sym_name $layer_name `kind` `=` $kind `index` `=` $index `compute` `=` $compute
    `dims` `=` $dims (`router_x` $router_x^)? (`forward` `=` $forward^)? (`route` `=` $route^)? (`experts` `=` $experts^)?
    (`entries` $entries^)? custom<SymbolList>($weights)
    attr-dict-with-keyword
  }];
  let hasVerifier = 1;
}

def MoE_CodeOp : MoE_Op<"code", [Symbol, DeclareOpInterfaceMethods<SymbolUserOpInterface>]> {
  let summary = "name the functions that an entry has become";
  let description = [{
    Written when an entry is outlined: its stages in the order in which they run, and the function
    that computes its workspace. Entries may share functions.

    Constraints: (C1) there is a stage; (C2) every function exists.

    Example:

    ```mlir
    moe.code @f0_v4_bf16_f32 stages = [@f0_v4_bf16_f32_stage0, @f0_v4_f32_f32_stage1]
        workspace = @f0_v4_f32_f32_workspace_bytes
    ```
  }];
  let arguments = (ins
    SymbolNameAttr:$sym_name,
    TypedArrayAttrBase<FlatSymbolRefAttr, "functions of the stages">:$stages,
    FlatSymbolRefAttr:$workspace);
  let assemblyFormat = [{
    $sym_name `stages` `=` $stages `workspace` `=` $workspace attr-dict-with-keyword
  }];
  let hasVerifier = 1;
}

//===----------------------------------------------------------------------===//
// Router and dispatch
//===----------------------------------------------------------------------===//

/// Operands of the routers: x, W, and vectors that attributes or the model ask for.
defvar routerInputs = (ins
    Arg<MoE_Rows, "x: activations [T, H]">:$x,
    Arg<MoE_Weight, "router weight [1, 1, E, H]">:$weight,
    Arg<Optional<MoE_VectorWeight>, "added to the logits [E]">:$bias,
    Arg<Optional<MoE_VectorWeight>, "added for the choice alone [E]">:$selection_bias,
    Arg<Optional<MoE_VectorWeight>, "factor of each expert's weight [E]">:$expert_scale,
    Arg<Optional<MoE_VectorWeight>, "factor of a normalised x [H]">:$input_scale);

def MoE_RouterOp : MoE_DpsOp<"router", [AttrSizedOperandSegments,
    DeclareOpInterfaceMethods<OpAsmOpInterface, ["getAsmResultNames"]>]> {
  let summary = "choose K experts per token and their weights";
  let description = [{
    Results, in this order: weights f32[T, K], experts i32[T, K], and, when a third out is given,
    logits f32[T, E] with `bias`, before `logit_transform`. `compute` is the type that x is rounded
    to when it is read; without it x is used as it is. `bias`, `selection_bias`, `expert_scale` and
    `input_scale` are vectors, see `#moe.router`.

    Constraints: (C1) x is [T, H] with H the weight's reduction; (C2) the router weight has one
    expert and one part, and its rows are the E experts plus `extra_rows`; (C3) weights and experts
    are [T, K] with K = `top_k` ≤ E; (C4) logits are [T, E]; (C5) groups divide E, have two
    experts for `sum_top2`, and with fill −∞ those that are kept hold K; (C6) `bias`, `selection_bias` and `expert_scale` have E
    elements, `input_scale` has H; (C7) `selection_bias` and `input_scale` are there exactly when
    the attributes `selection_bias` and `input` = `rms_norm` ask for them; (C8) `sparse_mixer`
    comes with `softmax`, without groups, `selection_bias` and renormalisation.

    Not promised: anything about the order of equal scores but that lower ids come first.

    Example:

    ```mlir
    %w, %e = moe.router ins(%x, %wg : tensor<?x2048xbf16>, !moe.weight<1x1x64x2048xbf16, panel32>)
        outs(%w0, %e0 : tensor<?x8xf32>, tensor<?x8xi32>)
        #moe.router<score = softmax, order = score_then_select, top_k = 8, renormalize = sum>
        -> tensor<?x8xf32>, tensor<?x8xi32>
    ```
  }];
  let arguments = !con(routerInputs, (ins
    Arg<MoE_Weights, "weights of the chosen experts [T, K]">:$out_weights,
    Arg<MoE_Ids, "ids of the chosen experts [T, K]">:$out_experts,
    Arg<Optional<MoE_Weights>, "logits [T, E]">:$out_logits,
    MoE_RouterAttr:$router,
    OptionalAttr<TypeAttrOf<MoE_Float>>:$compute,
    OptionalAttr<MoE_StrategyAttr>:$strategy));
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `ins` `(` $x `,` $weight `:` type($x) `,` qualified(type($weight)) `)`
    (`bias` `(` $bias^ `:` qualified(type($bias)) `)`)?
    (`selection_bias` `(` $selection_bias^ `:` qualified(type($selection_bias)) `)`)?
    (`expert_scale` `(` $expert_scale^ `:` qualified(type($expert_scale)) `)`)?
    (`input_scale` `(` $input_scale^ `:` qualified(type($input_scale)) `)`)?
    `outs` `(` $out_weights `,` $out_experts (`,` $out_logits^)? `:`
    type($out_weights) `,` type($out_experts) (`,` type($out_logits)^)? `)`
    qualified($router) (`compute` `=` $compute^)? (`strategy` `=` qualified($strategy)^)?
    attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$x, "Value":$weight, "const RouterVectors &":$vectors,
                                 "ValueRange":$outs, "RouterAttr":$router,
                                 CArg<"TypeAttr", "{}">:$compute)>];
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() {
      unsigned first = getODSOperandIndexAndLength(6).first;
      return ::mlir::MutableOperandRange(getOperation(), first, getNumOperands() - first);
    }
    RouterVectors getVectors() {
      return {getBias(), getSelectionBias(), getExpertScale(), getInputScale()};
    }
    /// E: rows of the weight without `extra_rows`.
    int64_t getNumExperts() {
      return getWeight().getType().getRows() - getRouter().getExtraRows();
    }
  }];
  let hasCanonicalizeMethod = 1;
}

def MoE_DispatchOp : MoE_DpsOp<"dispatch",
    [DeclareOpInterfaceMethods<OpAsmOpInterface, ["getAsmResultNames"]>]> {
  let summary = "sort (token, slot) pairs by expert, stably";
  let description = [{
    Writes offsets i32[E + 1], the first sorted row of each expert with the number of rows last, and
    pair i32[N], where pair[n] = t·k + slot of sorted row n. Rows of one expert are in ascending
    order of pair. Ids outside [0, E) have no row; entries of pair at and beyond offsets[E] are
    undefined.

    Constraints: (C1) ids are [T, k]; (C2) offsets has `experts` + 1 elements; (C3) pair has T·k
    elements; (C4) `experts` is positive.

    Example:

    ```mlir
    %off, %pair = moe.dispatch ins(%e : tensor<?x8xi32>) experts = 64
        outs(%off0, %pair0 : tensor<65xi32>, tensor<?xi32>) -> tensor<65xi32>, tensor<?xi32>
    ```
  }];
  let arguments = (ins
    Arg<MoE_Ids, "ids of the chosen experts [T, k]">:$ids,
    Arg<MoE_Offsets, "first row of each expert [E + 1]">:$out_offsets,
    Arg<MoE_Pairs, "pair of each sorted row [N]">:$out_pair,
    I64Attr:$experts);
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `ins` `(` $ids `:` type($ids) `)` `experts` `=` $experts
    `outs` `(` $out_offsets `,` $out_pair `:` type($out_offsets) `,` type($out_pair) `)`
    attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$ids, "int64_t":$experts, "ValueRange":$outs)>];
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() {
      return ::mlir::MutableOperandRange(getOperation(), 1, getNumOperands() - 1);
    }
  }];
}

def MoE_RouteDispatchOp : MoE_DpsOp<"route_dispatch", [AttrSizedOperandSegments,
    DeclareOpInterfaceMethods<OpAsmOpInterface, ["getAsmResultNames"]>]> {
  let summary = "choose K experts per token and sort the pairs by expert";
  let description = [{
    `moe.router` followed by `moe.dispatch` of its ids; constraints are those of both: (C1)–(C3)
    and (C5)–(C8) of `moe.router`, (C9) offsets has E + 1 elements, (C10) pair has T·K elements.

    Example:

    ```mlir
    %w, %e, %off, %pair = moe.route_dispatch
        ins(%x, %wg : tensor<?x2048xbf16>, !moe.weight<1x1x64x2048xbf16, panel32>)
        outs(%w0, %e0, %off0, %pair0 :
             tensor<?x8xf32>, tensor<?x8xi32>, tensor<65xi32>, tensor<?xi32>)
        #moe.router<score = softmax, order = score_then_select, top_k = 8>
        -> tensor<?x8xf32>, tensor<?x8xi32>, tensor<65xi32>, tensor<?xi32>
    ```
  }];
  let arguments = !con(routerInputs, (ins
    Arg<MoE_Weights, "weights of the chosen experts [T, K]">:$out_weights,
    Arg<MoE_Ids, "ids of the chosen experts [T, K]">:$out_experts,
    Arg<MoE_Offsets, "first row of each expert [E + 1]">:$out_offsets,
    Arg<MoE_Pairs, "pair of each sorted row [N]">:$out_pair,
    MoE_RouterAttr:$router,
    OptionalAttr<TypeAttrOf<MoE_Float>>:$compute,
    OptionalAttr<MoE_StrategyAttr>:$strategy));
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `ins` `(` $x `,` $weight `:` type($x) `,` qualified(type($weight)) `)`
    (`bias` `(` $bias^ `:` qualified(type($bias)) `)`)?
    (`selection_bias` `(` $selection_bias^ `:` qualified(type($selection_bias)) `)`)?
    (`expert_scale` `(` $expert_scale^ `:` qualified(type($expert_scale)) `)`)?
    (`input_scale` `(` $input_scale^ `:` qualified(type($input_scale)) `)`)?
    `outs` `(` $out_weights `,` $out_experts `,` $out_offsets `,` $out_pair `:`
    type($out_weights) `,` type($out_experts) `,` type($out_offsets) `,` type($out_pair) `)`
    qualified($router) (`compute` `=` $compute^)? (`strategy` `=` qualified($strategy)^)?
    attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$x, "Value":$weight, "const RouterVectors &":$vectors,
                                 "ValueRange":$outs, "RouterAttr":$router,
                                 CArg<"TypeAttr", "{}">:$compute)>];
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() {
      unsigned first = getODSOperandIndexAndLength(6).first;
      return ::mlir::MutableOperandRange(getOperation(), first, getNumOperands() - first);
    }
    RouterVectors getVectors() {
      return {getBias(), getSelectionBias(), getExpertScale(), getInputScale()};
    }
    /// E: rows of the weight without `extra_rows`.
    int64_t getNumExperts() {
      return getWeight().getType().getRows() - getRouter().getExtraRows();
    }
  }];
  let hasCanonicalizeMethod = 1;
}

def MoE_SingleGroupOp : MoE_DpsOp<"single_group"> {
  let summary = "make the offsets of one group that holds every row";
  let description = [{
    Writes [0, rows] into offsets: the dispatch of a dense layer.

    Constraints: (C1) offsets has two elements.

    Example:

    ```mlir
    %off = moe.single_group rows(%t) outs(%off0 : tensor<2xi32>) -> tensor<2xi32>
    ```
  }];
  let arguments = (ins
    Arg<Index, "number of rows">:$rows,
    Arg<MoE_Offsets, "offsets [2]">:$out);
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `rows` `(` $rows `)` `outs` `(` $out `:` type($out) `)` attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$rows, "Value":$out)>];
}

#endif // MOE_DIALECT_MOE_IR_MOEROUTINGOPS_TD
