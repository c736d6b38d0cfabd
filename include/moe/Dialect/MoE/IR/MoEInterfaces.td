//===- MoEInterfaces.td - interfaces of the moe dialect ----*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEINTERFACES_TD
#define MOE_DIALECT_MOE_IR_MOEINTERFACES_TD

include "mlir/IR/OpBase.td"

def MoE_WeightFormatInterface : AttrInterface<"WeightFormatInterface"> {
  let cppNamespace = "::mlir::moe";
  let description = [{
    How the elements of a weight are stored and what they become in a register. A new format
    (fp8, int4 in groups, mxfp4) is a new attribute with this interface, never a new operation.
  }];
  let methods = [
    InterfaceMethod<"Name in manifests and file headers, as `bf16`.",
      "::llvm::StringRef", "getFormatName", (ins)>,
    InterfaceMethod<"Bits that one element takes in storage, shared scales not counted.",
      "unsigned", "getBitsPerElement", (ins)>,
    InterfaceMethod<"Elements along the reduction that share a scale; 1 where there is none.",
      "int64_t", "getGroupSize", (ins)>,
    InterfaceMethod<"Element type of the packed bytes in memory.",
      "::mlir::Type", "getStorageType", (ins)>,
    InterfaceMethod<"Element type in compute registers after loading.",
      "::mlir::Type", "getRegisterType", (ins)>,
  ];
}

def MoE_WeightLayoutInterface : AttrInterface<"WeightLayoutInterface"> {
  let cppNamespace = "::mlir::moe";
  let description = [{
    Where the elements of a weight lie in a packed file. A layout's name never changes its meaning.
  }];
  let methods = [
    InterfaceMethod<"Name in manifests and file headers, as `panel32-1`.",
      "::llvm::StringRef", "getLayoutName", (ins)>,
    InterfaceMethod<"Columns of the result (all parts together) that one panel holds.",
      "int64_t", "getPanelWidth", (ins)>,
    InterfaceMethod<"The reduction dimension is padded with zeros to a multiple of this.",
      "int64_t", "getReductionMultiple", (ins)>,
  ];
}

#endif // MOE_DIALECT_MOE_IR_MOEINTERFACES_TD
