//===- MoETaskOps.td - what one thread does ----------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOETASKOPS_TD
#define MOE_DIALECT_MOE_IR_MOETASKOPS_TD

include "moe/Dialect/MoE/IR/MoEOpBase.td"

class MoE_BufferOf<list<Type> elements, list<int> ranks, string summary>
    : AnyTypeOf<[StridedMemRefRankOf<elements, ranks>], summary, "::mlir::MemRefType">;

def MoE_RowsBuffer : MoE_BufferOf<[F32, BF16], [2], "strided matrix buffer of f32 or bf16">;
def MoE_AnyRowsBuffer : MoE_BufferOf<[F32, BF16], [1, 2, 3], "strided buffer of f32 or bf16">;
def MoE_F32Vector : MoE_BufferOf<[F32], [1], "vector buffer of f32">;
def MoE_F32Matrix : MoE_BufferOf<[F32], [2], "matrix buffer of f32">;
def MoE_F32Scratch : MoE_BufferOf<[F32], [1, 2, 3], "scratch buffer of f32">;
def MoE_BlockVector : MoE_BufferOf<[F32, BF16], [1], "vector buffer of f32 or bf16">;
def MoE_I32Vector : MoE_BufferOf<[I32], [1], "vector buffer of i32">;
def MoE_I32Matrix : MoE_BufferOf<[I32], [2], "matrix buffer of i32">;

def MoE_StageOp : MoE_Op<"stage", [
    SingleBlockImplicitTerminator<"YieldOp">, RecursiveMemoryEffects, RecursivelySpeculatable]> {
  let summary = "work of all lanes between two fences";
  let description = [{
    `body` runs once on every lane, with its number and how many lanes there are; lanes may run at
    the same time or one after another, so a lane never waits for another. `tail` runs once, on the
    last lane to finish the body, and sees what every lane wrote. Between two stages there is a
    fence. Values of pure operations above may be used; they are computed anew in each stage.

    Constraints: (C1) body has two index arguments, tail has none; (C2) stages are not nested.

    Example:

    ```mlir
    moe.stage "up" body(%lane, %lanes) {
      %c1 = arith.constant 1 : index
      %task = moe.claim counter(3) count(%c1) : index
    } tail {
    }
    ```
  }];
  let arguments = (ins StrAttr:$label);
  let regions = (region SizedRegion<1>:$body, MaxSizedRegion<1>:$tail);
  let hasCustomAssemblyFormat = 1;
  let hasVerifier = 1;
  let skipDefaultBuilders = 1;
  let builders = [OpBuilder<(ins "StringRef":$label, CArg<"bool", "false">:$withTail)>];
  let extraClassDeclaration = [{
    ::mlir::BlockArgument getLane() { return getBody().getArgument(0); }
    ::mlir::BlockArgument getLanes() { return getBody().getArgument(1); }
  }];
}

def MoE_ClaimOp : MoE_Op<"claim", [
    MemoryEffects<[MemRead, MemWrite]>]> {
  let summary = "claim the next tasks of a stage";
  let description = [{
    Atomically adds `count` to a counter of the frame and gives its value before: the number of the
    first task that is now this lane's. The caller compares it with the number of tasks. Counters
    are zero when the entry starts and are not reset between stages.

    Constraints: (C1) the counter's number is in [0, 16).

    Example:

    ```mlir
    %i = moe.claim counter(3) count(%n) : index
    ```
  }];
  let arguments = (ins I64Attr:$counter, Arg<Index, "how many tasks">:$count);
  let results = (outs Index:$result);
  let assemblyFormat = [{
    `counter` `(` $counter `)` `count` `(` $count `)` attr-dict `:` type($result)
  }];
  let hasVerifier = 1;
}

def MoE_PackRowsOp : MoE_Op<"pack_rows", [AttrSizedOperandSegments]> {
  let summary = "pack one block of rows for a micro-kernel";
  let description = [{
    Writes R = count rows, from row `first` on, as one block, rounded to `compute`: a rows16 block of
    f32 (widened again) or, where `into` is bf16, a rows32 block. With G = 16 or 32

    ```
    into[(c / G)·R·G + r·G + c mod G] = rows[source(first + r), c]     0 ≤ c < roundup(K, G)
    ```
    with zeros for c ≥ K. source(n) is n, or pair[n] / k with `via`. With `row_weights` each
    rounded row is multiplied by row_weights[pair[n]] and rounded again.

    Constraints: (C1) via: pair and slots come together; (C2) a block of bf16 has compute = bf16;
    (C3) row_weights come with via.

    Example:

    ```mlir
    moe.pack_rows rows(%x : memref<?x2048xbf16, strided<[?, 1]>>) via(%pair, %k : memref<?xi32>)
        range(%first, %count) compute = bf16 into(%a : memref<?xf32>)
    ```
  }];
  let arguments = (ins
    Arg<MoE_RowsBuffer, "rows", [MemRead]>:$rows,
    Arg<Optional<MoE_I32Vector>, "pair of each sorted row", [MemRead]>:$pair,
    Arg<Optional<Index>, "slots per token">:$slots,
    Arg<Optional<MoE_F32Vector>, "factor of each pair's row", [MemRead]>:$row_weights,
    Arg<Index, "first row">:$first,
    Arg<Index, "number of rows">:$count,
    Arg<MoE_BlockVector, "packed block", [MemWrite]>:$out,
    TypeAttrOf<MoE_Float>:$compute);
  let assemblyFormat = [{
    `rows` `(` $rows `:` type($rows) `)` (`via` `(` $pair^ `,` $slots `:` type($pair) `)`)?
    (`row_weights` `(` $row_weights^ `:` type($row_weights) `)`)?
    `range` `(` $first `,` $count `)` `compute` `=` $compute `into` `(` $out `:` type($out) `)`
    attr-dict
  }];
  let hasVerifier = 1;
}

def MoE_NormalizeRowsOp : MoE_Op<"normalize_rows"> {
  let summary = "normalise the rows of a packed block in place";
  let description = [{
    Every row r of the `count` rows of the rows16 block `a`, K = rows of `scale`, becomes
    a[r, c] · f(r) · scale[c] · K^-½ with f(r) = 1 / √(Σ a[r, c]² / K + epsilon), all in f32;
    `rounded`: every product is rounded to bf16.

    Example:

    ```mlir
    moe.normalize_rows count(%mr) a(%a : memref<?xf32>)
        scale(%s : !moe.weight<1x1x2048x1xf32, vector32>) epsilon = 1.0e-6
    ```
  }];
  let arguments = (ins
    Arg<Index, "rows of the block">:$count,
    Arg<MoE_F32Vector, "packed block", [MemRead, MemWrite]>:$a,
    Arg<MoE_VectorWeight, "factor of each column">:$scale,
    F64Attr:$epsilon,
    UnitAttr:$rounded);
  let assemblyFormat = [{
    `count` `(` $count `)` `a` `(` $a `:` type($a) `)`
    `scale` `(` $scale `:` qualified(type($scale)) `)` `epsilon` `=` $epsilon
    (`rounded` $rounded^)? attr-dict
  }];
}

def MoE_GemmTileOp : MoE_Op<"gemm_tile", [AttrSizedOperandSegments, IsolatedFromAbove, SingleBlock]> {
  let summary = "multiply one packed row block with panels of one expert";
  let description = [{
    Multiplies the `count` rows of the block `a` (rows16, or rows32 for products of bf16) with
    `ukernel.panels` consecutive panels of expert %e, from panel %panel on, and leaves the products
    in one of three forms:

    * `blocked`: region applied to the parts, written to columns panelCols·panel … of the rows16
      block of f32 or the rows32 block of bf16 that starts at `into`.
    * `rows`: written to rows `row` … of a row-major matrix; [N, parts, columns] for several parts
      without a region. A scratch matrix is padded to whole panels; a matrix that is exactly Nout
      wide gets the real columns alone. Rounded to the matrix's element type.
    * `combine`: every product is rounded to `compute`, then
      scratch[panel][token][lane] = fma(w, product, scratch[…]) with token pair[row + r] / k and
      w = weights[pair[row + r]], or 1 if `unweighted`; without pair: token row + r,
      w = gate[row + r], or 1 without gate. `scale` multiplies w. The scratch is [panels, T, 32].

    `bias` is added to the products before anything else: lanes of panel `panel` of expert %e.
    `ahead`: bytes from the tile's first panel to the weights that it touches for the next tile.
    `k(first to end, sums)`: only groups of k first to end - 1 (of 32 k for products of bf16, else 16);
    the sums of the block wait in the first of the 1024 places of `sums` until the call that makes
    the last step, which leaves the result. `after(n of blocks)`: this is block n of a chunk, whose
    blocks follow each other in memory, in `sums` and in the result. The call that makes the last
    step leaves the result of block n - 1, of ukernel.rows rows, while it computes, and its own only
    if it is the chunk's last.

    Constraints: (C1) count ≤ ukernel.rows at run time; (C2) the region takes one f32 per part and
    yields one f32; (C3) pair, weights and slots come together; they, `gate`, `scale` and `compute`
    with `combine` only, `unweighted` with pair, `gate` without; (C4) `row` with `rows` and
    `combine`; (C5) `blocked` has several parts only with a region; (C6) `a` is bf16, and the weight,
    where the product is `dot_bf16`, and f32 elsewhere; a blocked result of bf16 comes from such
    products only; (C7) bias has the experts, parts and rows of the weight; (C8) `ahead` is given
    exactly where the micro-kernel has `ahead` lines; (C9) the clause k, where it has a `k_block`;
    (C10) the clause after, where it has `defer`.

    Example:

    ```mlir
    moe.gemm_tile count(%mr) a(%a : memref<?xf32>)
        weight(%w1[%e, %panel] : !moe.weight<64x2x1024x2048xbf16, panel32>)
        into blocked(%h : memref<?xf32>)
        ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1> {
    ^bb0(%gate: f32, %up: f32):
      %m = arith.mulf %gate, %up : f32
      moe.yield %m : f32
    }
    moe.gemm_tile count(%mr) a(%a : memref<?xf32>)
        weight(%w2[%e, %panel] : !moe.weight<64x1x2048x1024xbf16, panel32>)
        into combine(%scratch row %first : memref<1x?x32xf32>)
        via(%pair, %w slots %k : memref<?xi32>, memref<?xf32>) compute = bf16
        ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
    ```
  }];
  let arguments = (ins
    Arg<Index, "rows of the block">:$count,
    Arg<MoE_BlockVector, "packed block", [MemRead]>:$a,
    Arg<MoE_Weight, "weight">:$weight,
    Arg<Optional<MoE_VectorWeight>, "bias">:$bias,
    Arg<Index, "expert">:$expert,
    Arg<Index, "first panel">:$panel,
    Arg<MoE_AnyRowsBuffer, "result", [MemRead, MemWrite]>:$out,
    Arg<Optional<Index>, "first row of the block in the result, or its sorted row">:$row,
    Arg<Optional<MoE_I32Vector>, "pair of each sorted row", [MemRead]>:$pair,
    Arg<Optional<MoE_F32Vector>, "weight of each pair", [MemRead]>:$weights,
    Arg<Optional<Index>, "slots per token">:$slots,
    Arg<Optional<MoE_F32Vector>, "weight of each token", [MemRead]>:$gate,
    Arg<Optional<F32>, "factor of the weights">:$scale,
    Arg<Optional<Index>, "distance of the weights that are touched ahead">:$ahead,
    Arg<Optional<Index>, "first step of 32 k">:$first_step,
    Arg<Optional<Index>, "step after the last">:$end_step,
    Arg<Optional<MoE_F32Vector>, "sums between steps", [MemRead, MemWrite]>:$sums,
    Arg<Optional<Index>, "number of the block in its chunk">:$number,
    Arg<Optional<Index>, "blocks of the chunk">:$blocks,
    UnitAttr:$unweighted,
    MoE_ResultFormAttr:$form,
    OptionalAttr<TypeAttrOf<MoE_Float>>:$compute,
    MoE_UkernelAttr:$ukernel);
  let regions = (region AnyRegion:$epilogue);
  let builders = [OpBuilder<(ins "Value":$count, "Value":$a, "Value":$weight, "Value":$expert,
                                 "Value":$panel, "Value":$out, "Value":$row, "ResultForm":$form,
                                 "UkernelAttr":$ukernel)>];
  let extraClassDeclaration = [{
    /// Null is no bias.
    void setBias(Value bias);
    void setAhead(Value ahead);
    void setSteps(Value first, Value end, Value sums);
    void setAfter(Value number, Value blocks);
    /// The clauses of the form `combine`; null values are clauses that are not there.
    void setCombine(Value pair, Value weights, Value slots, Value gate, Value scale,
                    bool unweighted, TypeAttr compute);
  }];
  let assemblyFormat = [{
    `count` `(` $count `)` `a` `(` $a `:` type($a) `)`
    `weight` `(` $weight `[` $expert `,` $panel `]` `:` qualified(type($weight)) `)`
    (`bias` `(` $bias^ `:` qualified(type($bias)) `)`)? (`ahead` `(` $ahead^ `)`)?
    (`k` `(` $first_step^ `to` $end_step `,` $sums `:` type($sums) `)`)?
    (`after` `(` $number^ `of` $blocks `)`)?
    `into` $form `(` $out (`row` $row^)? `:` type($out) `)`
    (`via` `(` $pair^ `,` $weights `slots` $slots `:` type($pair) `,` type($weights) `)`)?
    (`unweighted` $unweighted^)? (`gate` `(` $gate^ `:` type($gate) `)`)? (`scale` $scale^)?
    (`compute` `=` $compute^)? `ukernel` `=` qualified($ukernel)
    attr-dict-with-keyword ($epilogue^)?
  }];
  let hasVerifier = 1;
}

def MoE_SelectExpertsOp : MoE_Op<"select_experts", [AttrSizedOperandSegments]> {
  let summary = "make weights and experts of rows of logits";
  let description = [{
    Rows 0 … count−1 of the logits scratch belong to tokens first … first + count − 1. Computes what
    `moe.router` computes after the matmul and writes rows first … of the outs; when a third out is
    given, the E real columns of the logits are copied to it. The scratch is used up. What a router
    of `precision` = model rounds is rounded to bf16.

    Constraints: (C1) outs are weights f32[T, K] and experts i32[T, K] with K = `top_k`; (C2) the
    scratch is at least E wide; (C3) E is given when the scratch is padded; (C4) selection_bias and
    expert_scale have E elements, selection_bias is there when the router has one.

    Example:

    ```mlir
    moe.select_experts logits(%l : memref<?x64xf32>) experts = 64 range(%first, %count)
        outs(%w, %e : memref<?x8xf32>, memref<?x8xi32>)
        #moe.router<score = softmax, order = score_then_select, top_k = 8>
    ```
  }];
  let arguments = (ins
    Arg<MoE_F32Matrix, "logits scratch", [MemRead, MemWrite]>:$logits,
    Arg<Index, "first token">:$first,
    Arg<Index, "number of tokens">:$count,
    Arg<Optional<MoE_VectorWeight>, "added for the choice alone [E]">:$selection_bias,
    Arg<Optional<MoE_VectorWeight>, "factor of each expert's weight [E]">:$expert_scale,
    Arg<MoE_F32Matrix, "weights [T, K]", [MemWrite]>:$out_weights,
    Arg<MoE_I32Matrix, "experts [T, K]", [MemWrite]>:$out_experts,
    Arg<Optional<MoE_F32Matrix>, "logits [T, E]", [MemWrite]>:$out_logits,
    I64Attr:$experts,
    MoE_RouterAttr:$router);
  let assemblyFormat = [{
    `logits` `(` $logits `:` type($logits) `)` `experts` `=` $experts
    `range` `(` $first `,` $count `)`
    (`selection_bias` `(` $selection_bias^ `:` qualified(type($selection_bias)) `)`)?
    (`expert_scale` `(` $expert_scale^ `:` qualified(type($expert_scale)) `)`)?
    `outs` `(` $out_weights `,` $out_experts (`,` $out_logits^)? `:`
    type($out_weights) `,` type($out_experts) (`,` type($out_logits)^)? `)`
    qualified($router) attr-dict
  }];
  let hasVerifier = 1;
}

def MoE_BeginPanelsOp : MoE_Op<"begin_panels"> {
  let summary = "start the sums of panels of the output";
  let description = [{
    scratch[p][t][lane] = accumulate ? y[t, 32·(first + p) + lane] : 0, for `panels` panels; zero in
    columns that y does not have.

    Example:

    ```mlir
    moe.begin_panels into(%scratch : memref<1x?x32xf32>) from(%y : memref<?x2048xbf16>)
        first(%panel) panels(1) accumulate(%acc)
    ```
  }];
  let arguments = (ins
    Arg<MoE_F32Scratch, "sums [panels, T, 32]", [MemWrite]>:$scratch,
    Arg<MoE_RowsBuffer, "y [T, H]", [MemRead]>:$y,
    Arg<Index, "first panel">:$first,
    Arg<I1, "whether y is added to">:$accumulate,
    I64Attr:$panels);
  let assemblyFormat = [{
    `into` `(` $scratch `:` type($scratch) `)` `from` `(` $y `:` type($y) `)`
    `first` `(` $first `)` `panels` `(` $panels `)` `accumulate` `(` $accumulate `)` attr-dict
  }];
  let hasVerifier = 1;
}

def MoE_EndPanelsOp : MoE_Op<"end_panels"> {
  let summary = "round the sums of panels and store them in the output";
  let description = [{
    y[t, 32·(first + p) + lane] = round(scratch[p][t][lane]) for the columns that y has.

    Example:

    ```mlir
    moe.end_panels from(%scratch : memref<1x?x32xf32>) into(%y : memref<?x2048xbf16>)
        first(%panel) panels(1)
    ```
  }];
  let arguments = (ins
    Arg<MoE_F32Scratch, "sums [panels, T, 32]", [MemRead]>:$scratch,
    Arg<MoE_RowsBuffer, "y [T, H]", [MemWrite]>:$y,
    Arg<Index, "first panel">:$first,
    I64Attr:$panels);
  let assemblyFormat = [{
    `from` `(` $scratch `:` type($scratch) `)` `into` `(` $y `:` type($y) `)`
    `first` `(` $first `)` `panels` `(` $panels `)` attr-dict
  }];
  let hasVerifier = 1;
}

#endif // MOE_DIALECT_MOE_IR_MOETASKOPS_TD
