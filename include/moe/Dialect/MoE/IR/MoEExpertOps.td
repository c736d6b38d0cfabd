//===- MoEExpertOps.td - experts, import and fused level ---*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEEXPERTOPS_TD
#define MOE_DIALECT_MOE_IR_MOEEXPERTOPS_TD

include "moe/Dialect/MoE/IR/MoEOpBase.td"

//===----------------------------------------------------------------------===//
// Import level
//===----------------------------------------------------------------------===//

def MoE_ExpertsOp : MoE_DpsOp<"experts", [AttrSizedOperandSegments]> {
  let summary = "run every sorted row through its expert";
  let description = [{
    Row n of the result is expert e's formula applied to token pair[n] / k, where
    offsets[e] ≤ n < offsets[e + 1]; sums are f32, the result is rounded once. Rows at and beyond
    offsets[E] are undefined. With `row_weights` the formula is applied to
    x · row_weights[pair[n] / k, pair[n] mod k].

    Constraints: (C1) x is [T, H] with H the reduction of the first weight; (C2) the first weight
    has the parts of the form, F rows; (C3) the second weight has one part, H rows and reduction F;
    (C4) both have E experts and offsets E + 1 elements; (C5) the result is [N, H] with the N of
    pair; (C6) biases are there exactly when the expert's `bias` says so, with the experts, parts
    and rows of their weight; (C7) row_weights are [T, k].

    Example:

    ```mlir
    %r = moe.experts ins(%x, %off, %pair, %w1, %w2 : tensor<?x2048xbf16>, tensor<65xi32>,
        tensor<?xi32>, !moe.weight<64x2x1024x2048xbf16, panel32>,
        !moe.weight<64x1x2048x1024xbf16, panel32>) slots %k outs(%r0 : tensor<?x2048xbf16>)
        #moe.expert<form = glu, activation = silu> -> tensor<?x2048xbf16>
    ```
  }];
  let arguments = (ins
    Arg<MoE_Rows, "x: activations [T, H]">:$x,
    Arg<MoE_Offsets, "first row of each expert [E + 1]">:$offsets,
    Arg<MoE_Pairs, "pair of each sorted row [N]">:$pair,
    Arg<MoE_Weight, "gate and up, or up [E, parts, F, H]">:$up,
    Arg<MoE_Weight, "down [E, 1, H, F]">:$down,
    Arg<Index, "slots per token k">:$slots,
    Arg<Optional<MoE_VectorWeight>, "bias of gate and up, or of up [E, parts, F]">:$up_bias,
    Arg<Optional<MoE_VectorWeight>, "bias of down [E, 1, H]">:$down_bias,
    Arg<Optional<MoE_Weights>, "factors of the rows that experts read [T, k]">:$row_weights,
    Arg<MoE_Rows, "result rows [N, H]">:$out,
    MoE_ExpertAttr:$expert);
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `ins` `(` $x `,` $offsets `,` $pair `,` $up `,` $down `:`
    type($x) `,` type($offsets) `,` type($pair) `,` qualified(type($up)) `,` qualified(type($down)) `)` `slots` $slots
    (`bias` `(` $up_bias^ `,` $down_bias `:` qualified(type($up_bias)) `,` qualified(type($down_bias)) `)`)?
    (`row_weights` `(` $row_weights^ `:` type($row_weights) `)`)?
    `outs` `(` $out `:` type($out) `)` qualified($expert) attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$x, "Value":$offsets, "Value":$pair, "Value":$up,
                                 "Value":$down, "Value":$slots, "Value":$upBias, "Value":$downBias,
                                 "Value":$rowWeights, "Value":$out, "ExpertAttr":$expert)>];
}

def MoE_CombineOp : MoE_DpsOp<"combine", [AttrSizedOperandSegments]> {
  let summary = "sum the weighted rows of every token";
  let description = [{
    y[t] = (accumulate ? start[t] : 0), then y[t] = fma(w, row, y[t]) for the token's rows in
    ascending order of expert, all in f32, rounded once. Sorted row n belongs to token pair[n] / k
    and has w = weights[pair[n] / k, pair[n] mod k], or 1 where they are `unweighted`. Without
    `pair` (a dense layer, a shared expert) row n belongs to token n and has w = gate[n], or 1
    without `gate`. With `scale`, w is multiplied by it (in f32) before it is used.

    start is y, or the operand after `from`: the sums that a combine before this one left, so that a
    shared expert continues the chain of the routed ones. Without `accumulate` nothing is read.

    Constraints: (C1) rows are [N, H], the result and `from` [T, H]; (C2) pair has N elements,
    weights are [T, k]; (C3) pair, weights and slots come together; (C4) offsets is a vector of at
    least two; (C5) `gate` is [T, 1] and comes without pairs, `unweighted` with them; (C6) `from`
    comes with accumulate.

    Example:

    ```mlir
    %z = moe.combine ins(%r, %off : tensor<?x2048xbf16>, tensor<65xi32>)
        via(%pair, %w slots %k : tensor<?xi32>, tensor<?x8xf32>) accumulate %acc
        outs(%y : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
    ```
  }];
  let arguments = (ins
    Arg<MoE_Rows, "expert rows [N, H]">:$rows,
    Arg<MoE_Offsets, "first row of each expert [E + 1]">:$offsets,
    Arg<Optional<MoE_Pairs>, "pair of each sorted row [N]">:$pair,
    Arg<Optional<MoE_Weights>, "weights [T, k]">:$weights,
    Arg<Optional<Index>, "slots per token k">:$slots,
    Arg<Optional<MoE_Weights>, "weight of each token's row [T, 1]">:$gate,
    Arg<Optional<F32>, "factor of the weights">:$scale,
    Arg<Optional<I1>, "whether something is added to">:$accumulate,
    Arg<Optional<MoE_Rows>, "what is added to, if not the result [T, H]">:$start,
    Arg<MoE_Rows, "y [T, H]">:$out,
    UnitAttr:$unweighted);
  let hasCanonicalizeMethod = 1;
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `ins` `(` $rows `,` $offsets `:` type($rows) `,` type($offsets) `)`
    (`via` `(` $pair^ `,` $weights `slots` $slots `:` type($pair) `,` type($weights) `)`)?
    (`unweighted` $unweighted^)? (`gate` `(` $gate^ `:` type($gate) `)`)? (`scale` $scale^)?
    (`accumulate` $accumulate^)? (`from` $start^ `:` type($start))?
    `outs` `(` $out `:` type($out) `)` attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$rows, "Value":$offsets, "Value":$out)>];
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() { return getOutMutable(); }
    /// Whether the old content of the result is read.
    bool readsOut() { return getAccumulate() && !getStart(); }
  }];
}

def MoE_FfnOp : MoE_DpsOp<"ffn", [AttrSizedOperandSegments]> {
  let summary = "run every token through one feed-forward network";
  let description = [{
    The dense layer: y[t] = (accumulate ? start[t] : 0) + w · formula(x[t]), the formula's sums in
    f32, its result rounded to the compute type before it is weighted. w is gate[t] · scale, each 1
    where it is not given; start is y, or the operand after `from`, as in `moe.combine`. With `rows`
    only that many tokens, from the first, have a row; the others are start alone.

    Constraints: (C1)–(C3) and (C6) of `moe.experts` with N = T; (C4) both weights have one expert;
    (C5) `gate` is [T, 1], `from` is [T, H] and comes with accumulate.

    Example:

    ```mlir
    %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x2048xbf16>,
        !moe.weight<1x2x1024x2048xbf16, panel32>, !moe.weight<1x1x2048x1024xbf16, panel32>)
        accumulate %acc outs(%y : tensor<?x2048xbf16>)
        #moe.expert<form = glu, activation = silu> -> tensor<?x2048xbf16>
    ```
  }];
  let arguments = (ins
    Arg<MoE_Rows, "x: activations [T, H]">:$x,
    Arg<MoE_Weight, "gate and up, or up [1, parts, F, H]">:$up,
    Arg<MoE_Weight, "down [1, 1, H, F]">:$down,
    Arg<Optional<MoE_VectorWeight>, "bias of gate and up, or of up [1, parts, F]">:$up_bias,
    Arg<Optional<MoE_VectorWeight>, "bias of down [1, 1, H]">:$down_bias,
    Arg<Optional<Index>, "how many tokens have a row">:$rows,
    Arg<Optional<MoE_Weights>, "weight of each token's row [T, 1]">:$gate,
    Arg<Optional<F32>, "factor of the weights">:$scale,
    Arg<Optional<I1>, "whether something is added to">:$accumulate,
    Arg<Optional<MoE_Rows>, "what is added to, if not the result [T, H]">:$start,
    Arg<MoE_Rows, "y [T, H]">:$out,
    MoE_ExpertAttr:$expert);
  let hasCanonicalizeMethod = 1;
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `ins` `(` $x `,` $up `,` $down `:` type($x) `,` qualified(type($up)) `,` qualified(type($down)) `)`
    (`bias` `(` $up_bias^ `,` $down_bias `:` qualified(type($up_bias)) `,` qualified(type($down_bias)) `)`)?
    (`rows` $rows^)? (`gate` `(` $gate^ `:` type($gate) `)`)? (`scale` $scale^)?
    (`accumulate` $accumulate^)? (`from` $start^ `:` type($start))?
    `outs` `(` $out `:` type($out) `)` qualified($expert) attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$x, "Value":$up, "Value":$down, "Value":$out,
                                 "ExpertAttr":$expert)>];
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() { return getOutMutable(); }
    /// Whether the old content of the result is read.
    bool readsOut() { return getAccumulate() && !getStart(); }
  }];
}

//===----------------------------------------------------------------------===//
// Fused level
//===----------------------------------------------------------------------===//

def MoE_GatherOp : MoE_DpsOp<"gather"> {
  let summary = "copy the rows of x into sorted order";
  let description = [{
    Row n of the result is x[pair[n] / k], rounded to the result's element type, for
    n < offsets[E]; the rows beyond are undefined. With `row_weights` it is
    round(round(x) · row_weights[pair[n] / k, pair[n] mod k]).

    Constraints: (C1) x is [T, H], the result [N, H]; (C2) pair has N elements; (C3) row_weights
    are [T, k].

    Example:

    ```mlir
    %g = moe.gather ins(%x, %off, %pair : tensor<?x2048xbf16>, tensor<65xi32>, tensor<?xi32>)
        slots %k outs(%g0 : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
    ```
  }];
  let arguments = (ins
    Arg<MoE_Rows, "x: activations [T, H]">:$x,
    Arg<MoE_Offsets, "first row of each expert [E + 1]">:$offsets,
    Arg<MoE_Pairs, "pair of each sorted row [N]">:$pair,
    Arg<Index, "slots per token k">:$slots,
    Arg<Optional<MoE_Weights>, "factors of the rows [T, k]">:$row_weights,
    Arg<MoE_Rows, "rows [N, H]">:$out);
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let assemblyFormat = [{
    `ins` `(` $x `,` $offsets `,` $pair `:` type($x) `,` type($offsets) `,` type($pair) `)`
    `slots` $slots (`row_weights` `(` $row_weights^ `:` type($row_weights) `)`)?
    `outs` `(` $out `:` type($out) `)` attr-dict (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$x, "Value":$offsets, "Value":$pair, "Value":$slots,
                                 "Value":$rowWeights, "Value":$out)>];
}

def MoE_GroupedMatmulOp : MoE_DpsOp<"grouped_matmul",
    [AttrSizedOperandSegments, IsolatedFromAbove, SingleBlock]> {
  let summary = "multiply every group of rows with its expert's weight";
  let description = [{
    For every expert e and offsets[e] ≤ n < offsets[e + 1]:
    product[n, p, j] = Σ rows[n, i] · weight[e, p, j, i], f32, i ascending, one fused multiply-add
    a term. Rows at and beyond offsets[E] are undefined. Clauses say what is fused:

    * `via %pair slots %k`: row n is read from rows[pair[n] / k]. `as T` rounds rows to T when they
      are read. `row_weights` multiplies them as `moe.gather` does.
    * `bias`: bias[e, p, j] is added to the sum.
    * a region on the parts of one column: its scalar result replaces the parts.
    * `combine as T`: the product is rounded to T, then out[t] = fma(w, product, out[t]) as in
      `moe.combine`, with the pairs and weights in parentheses, or row n to token n; `unweighted`,
      `gate`, `scale`, `accumulate` and `from` as there.

    Without `combine` the result is [N, Nout], or [N, parts, Nout] when there are several parts and
    no region, rounded to its element type.

    Constraints: (C1) the width of rows is the weight's reduction; (C2) offsets has E + 1 elements;
    (C3) via: pair has N elements and slots is given; (C4) the region takes one f32 per part and
    yields one f32, and its operations are free of side effects; (C5) the result has the shape
    above; (C6) combine: one part or a region; pair, weights and slots together; the result is
    [T, Nout], and (C5), (C6) of `moe.combine`; (C7) its clauses come with combine only; (C8) the
    strategy's result is `combine` if and only if there is a combine clause; (C9) bias has the
    experts, parts and rows of the weight; (C10) row_weights come with via and are [T, k].

    Example:

    ```mlir
    %h = moe.grouped_matmul rows(%x via %pair slots %k : tensor<?x2048xbf16>, tensor<?xi32>)
        groups(%off : tensor<65xi32>) weights(%w1 : !moe.weight<64x2x1024x2048xbf16, panel32>)
        outs(%h0 : tensor<?x1024xf32>) {
    ^bb0(%gate: f32, %up: f32):
      %m = arith.mulf %gate, %up : f32
      moe.yield %m : f32
    } -> tensor<?x1024xf32>
    %z = moe.grouped_matmul rows(%h : tensor<?x1024xf32>) groups(%off : tensor<65xi32>)
        weights(%w2 : !moe.weight<64x1x2048x1024xbf16, panel32>)
        combine as bf16 (%pair, %w slots %k : tensor<?xi32>, tensor<?x8xf32>) accumulate %acc
        outs(%y : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
    ```
  }];
  let arguments = (ins
    Arg<MoE_Rows, "rows [N, Kin], or [T, Kin] with via">:$rows,
    Arg<Optional<MoE_Pairs>, "pair of each sorted row [N]">:$via_pair,
    Arg<Optional<Index>, "slots per token k">:$via_slots,
    Arg<Optional<MoE_Weights>, "factors of the rows [T, k]">:$row_weights,
    Arg<MoE_Offsets, "first row of each expert [E + 1]">:$offsets,
    Arg<MoE_Weight, "weight [E, parts, Nout, Kin]">:$weight,
    Arg<Optional<MoE_VectorWeight>, "bias [E, parts, Nout]">:$bias,
    Arg<Optional<MoE_Pairs>, "pair of each sorted row [N]">:$combine_pair,
    Arg<Optional<MoE_Weights>, "weights [T, k]">:$combine_weights,
    Arg<Optional<Index>, "slots per token k">:$combine_slots,
    Arg<Optional<MoE_Weights>, "weight of each token's row [T, 1]">:$gate,
    Arg<Optional<F32>, "factor of the weights">:$scale,
    Arg<Optional<I1>, "whether something is added to">:$accumulate,
    Arg<Optional<MoE_Rows>, "what is added to, if not the result [T, H]">:$start,
    Arg<MoE_Products, "result">:$out,
    UnitAttr:$unweighted,
    OptionalAttr<TypeAttrOf<MoE_Float>>:$row_type,
    OptionalAttr<TypeAttrOf<MoE_Float>>:$combine_type,
    OptionalAttr<MoE_StrategyAttr>:$strategy);
  let hasCanonicalizeMethod = 1;
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let regions = (region AnyRegion:$epilogue);
  let assemblyFormat = [{
    `rows` `(` $rows (`via` $via_pair^ `slots` $via_slots)? (`as` $row_type^)? `:` type($rows)
    (`,` type($via_pair)^)? `)` (`row_weights` `(` $row_weights^ `:` type($row_weights) `)`)?
    `groups` `(` $offsets `:` type($offsets) `)` `weights` `(` $weight `:` qualified(type($weight)) `)`
    (`bias` `(` $bias^ `:` qualified(type($bias)) `)`)?
    (`combine` `as` $combine_type^)?
    (`(` $combine_pair^ `,` $combine_weights `slots` $combine_slots `:`
    type($combine_pair) `,` type($combine_weights) `)`)? (`unweighted` $unweighted^)?
    (`gate` `(` $gate^ `:` type($gate) `)`)? (`scale` $scale^)?
    (`accumulate` $accumulate^)? (`from` $start^ `:` type($start))?
    `outs` `(` $out `:` type($out) `)` (`strategy` `=` qualified($strategy)^)?
    attr-dict-with-keyword ($epilogue^)? (`->` type($results)^)?
  }];
  let builders = [
    OpBuilder<(ins "Value":$rows, "Value":$offsets, "Value":$weight, "Value":$out)>,
  ];
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() { return getOutMutable(); }
    /// Whether a clause is there.
    bool hasVia() { return bool(getViaPair()); }
    bool hasEpilogue() { return !getEpilogue().empty(); }
    bool hasCombine() { return bool(getCombineTypeAttr()); }
    /// Whether the old content of the result is read.
    bool readsOut() { return getAccumulate() && !getStart(); }
    /// Takes over what `from` says about reading its rows: via, row_weights, the row type.
    void copyRowClauses(GroupedMatmulOp from);
    /// The type of the weight operand.
    WeightType getWeightType();
    /// Columns of one part, Nout.
    int64_t getNumCols() { return getWeightType().getRows(); }
  }];
}

def MoE_ActivateOp : MoE_DpsOp<"activate", [IsolatedFromAbove, SingleBlock]> {
  let summary = "apply a scalar function to the parts of every element";
  let description = [{
    out[n, j] = region(ins[n, 0, j], ins[n, 1, j], …), computed in f32 and rounded to the result's
    element type. Undefined rows stay undefined.

    Constraints: (C1) ins is [N, parts, F] (or [N, F] for one part), the result [N, F]; (C2) the
    region takes one f32 per part and yields one f32, and its operations are free of side effects.

    Example:

    ```mlir
    %h = moe.activate ins(%gu : tensor<?x2x1024xf32>) outs(%h0 : tensor<?x1024xf32>) {
    ^bb0(%gate: f32, %up: f32):
      %m = arith.mulf %gate, %up : f32
      moe.yield %m : f32
    } -> tensor<?x1024xf32>
    ```
  }];
  let arguments = (ins
    Arg<MoE_Products, "parts [N, parts, F]">:$parts,
    Arg<MoE_Rows, "result [N, F]">:$out);
  let results = (outs Variadic<AnyRankedTensor>:$results);
  let regions = (region AnyRegion:$epilogue);
  let assemblyFormat = [{
    `ins` `(` $parts `:` type($parts) `)` `outs` `(` $out `:` type($out) `)`
    attr-dict-with-keyword $epilogue (`->` type($results)^)?
  }];
  let builders = [OpBuilder<(ins "Value":$parts, "Value":$out)>];
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() { return getOutMutable(); }
    /// Size of the parts dimension, 1 where there is none.
    int64_t getNumParts();
  }];
}

#endif // MOE_DIALECT_MOE_IR_MOEEXPERTOPS_TD
