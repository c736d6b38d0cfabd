//===- Passes.td - passes on the moe dialect ---------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_TRANSFORMS_PASSES_TD
#define MOE_DIALECT_MOE_TRANSFORMS_PASSES_TD

include "mlir/Pass/PassBase.td"

/// Shared by the passes that can leave an operation as it is.
def RemarksOption : Option<"remarks", "remarks", "bool", /*default=*/"false",
    "Emit a remark with the reason at every operation that was left as it is">;

def DecomposeExpertsPass : Pass<"moe-decompose-experts", "::mlir::func::FuncOp"> {
  let summary = "Write experts and dense layers as matmuls and an activation";
  let description = [{
    Before: `moe.experts` and `moe.ffn` on tensors. After: neither is left; there are `moe.gather`
    (or `moe.single_group` for a dense layer), two `moe.grouped_matmul` around one `moe.activate`,
    and for a dense layer a `moe.combine` without pairs. Sums stay in f32 up to the activation's
    result, which is f32 too; the second matmul rounds to the compute type, which is the function's
    `moe.compute`, or the element type of the result where there is none.

    Biases go to their matmuls, `gate`, `scale`, `accumulate` and `from` of a `moe.ffn` to its
    combine.

    Declines operations on memrefs and expert attributes without a formula (norms, latent
    projections): they stay as they are, and the target refuses them by name.

    ```mlir
    %r = moe.experts ins(%x, %off, %pair, %w1, %w2 : …) slots %k outs(%r0 : …)
        #moe.expert<form = glu, activation = silu> -> tensor<?x2048xbf16>
    // becomes
    %g = moe.gather ins(%x, %off, %pair : …) slots %k outs(%g0 : …) -> tensor<?x2048xbf16>
    %gu = moe.grouped_matmul rows(%g : …) groups(%off : …) weights(%w1 : …) outs(%gu0 : …)
        -> tensor<?x2x1024xf32>
    %h = moe.activate ins(%gu : …) outs(%h0 : …) { … } -> tensor<?x1024xf32>
    %r = moe.grouped_matmul rows(%h : …) groups(%off : …) weights(%w2 : …) outs(%r0 : …)
        -> tensor<?x2048xbf16>
    ```
  }];
  let dependentDialects = ["::mlir::arith::ArithDialect", "::mlir::math::MathDialect",
                           "::mlir::moe::MoEDialect", "::mlir::tensor::TensorDialect"];
  let options = [RemarksOption];
  let statistics = [
    Statistic<"numDecomposed", "num-decomposed", "Operations decomposed">,
    Statistic<"numDeclined", "num-declined", "Operations that were left as they are">,
  ];
}

def FuseRouterDispatchPass : Pass<"moe-fuse-router-dispatch", "::mlir::func::FuncOp"> {
  let summary = "Fuse the sort of pairs into the router";
  let description = [{
    Before: `moe.dispatch` of the ids that a `moe.router` chose. After: one `moe.route_dispatch`.

    Declines a dispatch whose ids do not come from a router, a router that gives its logits, a
    router whose results are used before the dispatch, and operations on memrefs.
  }];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
  let options = [RemarksOption];
  let statistics = [
    Statistic<"numFused", "num-fused", "Dispatches fused into their router">,
    Statistic<"numDeclined", "num-declined", "Dispatches that were left as they are">,
  ];
}

def FuseGatherPass : Pass<"moe-fuse-gather", "::mlir::func::FuncOp"> {
  let summary = "Read rows through the pairs instead of copying them";
  let description = [{
    Before: `moe.grouped_matmul` on the rows that a `moe.gather` copied. After: its `via` clause
    reads them where they are, rounded `as` the gather rounded them.

    A gather with several users is fused into all of them. Declines a gather with a user that is not
    a matmul on its rows, that has a `via` clause or other groups, and operations on memrefs.
  }];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
  let options = [RemarksOption];
  let statistics = [
    Statistic<"numFused", "num-fused", "Gathers that disappeared">,
    Statistic<"numDeclined", "num-declined", "Gathers that were left as they are">,
  ];
}

def FuseActivationPass : Pass<"moe-fuse-activation", "::mlir::func::FuncOp"> {
  let summary = "Apply the activation to the products of a matmul while they are in registers";
  let description = [{
    Before: `moe.activate` on the result of a `moe.grouped_matmul`. After: one `moe.grouped_matmul`
    with the activation's region.

    Declines a matmul whose result is used elsewhere, is not f32 (it would no longer be rounded), or
    that has a region or a combine clause, and operations on memrefs.
  }];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
  let options = [RemarksOption];
  let statistics = [
    Statistic<"numFused", "num-fused", "Activations fused into their matmul">,
    Statistic<"numDeclined", "num-declined", "Activations that were left as they are">,
  ];
}

def FuseCombinePass : Pass<"moe-fuse-combine", "::mlir::func::FuncOp"> {
  let summary = "Add the products of a matmul to their tokens without storing them";
  let description = [{
    Before: `moe.combine` of the rows that a `moe.grouped_matmul` wrote. After: one
    `moe.grouped_matmul` with a combine clause, which rounds products `as` the rows were rounded.

    Declines rows that are used elsewhere, rows of other groups, a matmul that has a combine clause,
    and operations on memrefs.
  }];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
  let options = [RemarksOption];
  let statistics = [
    Statistic<"numFused", "num-fused", "Combines fused into their matmul">,
    Statistic<"numDeclined", "num-declined", "Combines that were left as they are">,
  ];
}

def MergeEqualFunctionsPass : Pass<"moe-merge-equal-functions", "::mlir::ModuleOp"> {
  let summary = "Let equal layers and equal entries share their functions";
  let description = [{
    Before: functions with `moe.entry`, or named by a `moe.code`, that may be equal but for their
    name. After: one function for each set of equal ones, the first; `moe.layer`, `moe.code` and all
    other symbol uses name it. Equal are the type, all attributes and argument attributes but the
    name, and the body; locations do not count.

    Declines other functions.
  }];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
  let statistics = [
    Statistic<"numMerged", "num-merged", "Functions replaced by an equal one">,
    Statistic<"numKept", "num-kept", "Functions kept">,
  ];
}

#endif // MOE_DIALECT_MOE_TRANSFORMS_PASSES_TD
