//===- MoEOpBase.td - what operations share ----------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEOPBASE_TD
#define MOE_DIALECT_MOE_IR_MOEOPBASE_TD

include "moe/Dialect/MoE/IR/MoETypes.td"
include "mlir/IR/OpAsmInterface.td"
include "mlir/IR/OpBase.td"
include "mlir/IR/SymbolInterfaces.td"
include "mlir/Interfaces/DestinationStyleOpInterface.td"
include "mlir/Interfaces/InferTypeOpInterface.td"
include "mlir/Interfaces/SideEffectInterfaces.td"

class MoE_Op<string mnemonic, list<Trait> traits = []> : Op<MoE_Dialect, mnemonic, traits>;

/// An operation that writes its outs: results are tied to tensor outs, memref outs have none.
class MoE_DpsOp<string mnemonic, list<Trait> traits = []>
    : MoE_Op<mnemonic, !listconcat(traits, [
        DestinationStyleOpInterface,
        DeclareOpInterfaceMethods<MemoryEffectsOpInterface>,
        DeclareOpInterfaceMethods<ReifyRankedShapedTypeOpInterface, ["reifyResultShapes"]>])> {
  let hasVerifier = 1;
  let extraClassDeclaration = [{
    ::mlir::MutableOperandRange getDpsInitsMutable() { return getOutMutable(); }
  }];
}

def MoE_YieldOp : MoE_Op<"yield", [Pure, Terminator]> {
  let summary = "yield from a region of a moe operation";
  let description = [{
    Ends the scalar region of `moe.activate`, `moe.grouped_matmul` and `moe.gemm_tile` with one
    value, and the regions of `moe.stage` with none.

    Example:

    ```mlir
    moe.yield %m : f32
    ```
  }];
  let arguments = (ins Variadic<AnyType>:$values);
  let builders = [OpBuilder<(ins), [{ build($_builder, $_state, ValueRange()); }]>];
  let assemblyFormat = "attr-dict ($values^ `:` type($values))?";
}

#endif // MOE_DIALECT_MOE_IR_MOEOPBASE_TD
