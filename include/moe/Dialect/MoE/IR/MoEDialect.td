//===- MoEDialect.td - the moe dialect ---------------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEDIALECT_TD
#define MOE_DIALECT_MOE_IR_MOEDIALECT_TD

include "mlir/IR/OpBase.td"

def MoE_Dialect : Dialect {
  let name = "moe";
  let cppNamespace = "::mlir::moe";
  let summary = "Mixture-of-Experts layers, from the model's formula to tasks of a thread";
  let description = [{
    Three levels of operations share this dialect.

    * **Import level**: `moe.router`, `moe.dispatch`, `moe.experts`, `moe.combine` and `moe.ffn` say
      what a layer computes.
    * **Fused level**: `moe.gather`, `moe.grouped_matmul`, `moe.activate`, `moe.route_dispatch` say
      which of these run together.
    * **Task level**: `moe.stage`, `moe.claim`, `moe.pack_rows`, `moe.gemm_tile` and the rest say
      what one thread does between two fences.

    Letters: T tokens, H hidden size, F expert width, E experts, K experts chosen per token, k slots
    per token of a call (k = K unless the caller gives the experts), N = T·k rows after dispatch.

    Code is `func.func`, data is symbols: `moe.weight` names a packed weight and where it comes from,
    `moe.layer` names the functions and weights of one layer, so equal layers share their functions.

    Import and fused operations are in destination style and take tensors or memrefs. Decisions are
    attributes: `#moe.target`, `#moe.strategy`, `#moe.ukernel`.

    Attributes of functions: `moe.entry` (`"forward"`, `"route"`, `"experts"`), `moe.compute` (the
    type that activations are rounded to), `moe.target`, `moe.workspace` (the function that computes
    the size of its workspace). Attributes of function arguments: `moe.arg` (`"x"`, `"router_x"`,
    `"y"`, `"weights"`, `"experts"`, `"logits"`, `"accumulate"`, `"routed_only"`, `"weight"`; made by
    passes: `"offsets"`, `"lanes"`, `"workspace"`, `"tokens"`, `"slots"`) and `moe.weight_index`
    (position in the layer's weights, with `moe.arg = "weight"`).
  }];
  let dependentDialects = ["arith::ArithDialect"];
  let useDefaultTypePrinterParser = 1;
  let useDefaultAttributePrinterParser = 1;
  let hasOperationAttrVerify = 1;
  let hasRegionArgAttrVerify = 1;
  let extraClassDeclaration = [{
    /// Names of the discardable attributes of functions and their arguments.
    static constexpr StringLiteral kEntryAttrName = "moe.entry";
    static constexpr StringLiteral kComputeAttrName = "moe.compute";
    static constexpr StringLiteral kTargetAttrName = "moe.target";
    static constexpr StringLiteral kWorkspaceAttrName = "moe.workspace";
    static constexpr StringLiteral kArgAttrName = "moe.arg";
    static constexpr StringLiteral kWeightIndexAttrName = "moe.weight_index";

    void registerAttributes();
    void registerTypes();
  }];
}

#endif // MOE_DIALECT_MOE_IR_MOEDIALECT_TD
