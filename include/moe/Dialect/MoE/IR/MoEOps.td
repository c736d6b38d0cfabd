//===- MoEOps.td - all operations of the moe dialect -------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEOPS_TD
#define MOE_DIALECT_MOE_IR_MOEOPS_TD

include "moe/Dialect/MoE/IR/MoEGPUAttrs.td"
include "moe/Dialect/MoE/IR/MoERoutingOps.td"
include "moe/Dialect/MoE/IR/MoEExpertOps.td"
include "moe/Dialect/MoE/IR/MoETaskOps.td"

#endif // MOE_DIALECT_MOE_IR_MOEOPS_TD
