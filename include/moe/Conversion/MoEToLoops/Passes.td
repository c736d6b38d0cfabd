//===- Passes.td - moe to loops ----------------------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_CONVERSION_MOETOLOOPS_PASSES_TD
#define MOE_CONVERSION_MOETOLOOPS_PASSES_TD

include "mlir/Pass/PassBase.td"

def ConvertMoEToLoopsPass : Pass<"convert-moe-to-loops", "::mlir::ModuleOp"> {
  let summary = "Lower moe operations on memrefs to scalar loops, the reference for tests";
  let description = [{
    Before: routing and fused-level operations on memrefs, after `moe-decompose-experts` and
    bufferization. After: no operation of the moe dialect but its symbols; `scf`, `memref`, `arith`
    and `math` in the order that the operations define: sums run upwards with one fused multiply-add
    a term, a token's rows are added in ascending order of expert.

    A weight becomes a memref of its packed bytes, `memref<n x f32>` or `memref<n x bf16>` with
    n = packed bytes / size of an element, read where the layout puts each element.

    This is the text of the dialect's semantics in executable form. It is slow, and no compiler
    pipeline uses it: `moec compile` never falls back to it.

    Refused with an error: operations on tensors, `moe.experts` and `moe.ffn` (decompose them
    first), task-level operations, and router attributes that need more operands than there are
    (selection bias, tables, other inputs, groups) or the model's own rounding.
  }];
  let dependentDialects = ["::mlir::arith::ArithDialect", "::mlir::math::MathDialect",
                           "::mlir::memref::MemRefDialect", "::mlir::scf::SCFDialect"];
}

#endif // MOE_CONVERSION_MOETOLOOPS_PASSES_TD
