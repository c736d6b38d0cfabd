//===- MoEOps.h - operations of the moe dialect -----------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEOPS_H
#define MOE_DIALECT_MOE_IR_MOEOPS_H

#include "moe/Dialect/MoE/IR/MoEDialect.h"
#include "moe/Dialect/MoE/IR/MoETypes.h"

#include "mlir/Bytecode/BytecodeOpInterface.h"
#include "mlir/IR/BuiltinTypes.h"
#include "mlir/IR/OpDefinition.h"
#include "mlir/IR/OpImplementation.h"
#include "mlir/IR/PatternMatch.h"
#include "mlir/IR/SymbolTable.h"
#include "mlir/Interfaces/DestinationStyleOpInterface.h"
#include "mlir/Interfaces/InferTypeOpInterface.h"
#include "mlir/Interfaces/SideEffectInterfaces.h"

namespace mlir::moe {
/// The vectors of a router; null where it has none.
struct RouterVectors {
  Value bias, selectionBias, expertScale, inputScale;
};
} // namespace mlir::moe

#define GET_OP_CLASSES
#include "moe/Dialect/MoE/IR/MoEOps.h.inc"

namespace mlir::moe {

/// Builds in `region` the block of an expert's scalar formula: one f32 argument per part (gate and
/// up for glu, up alone for mlp), ended by a yield of the f32 result. Exact to the definition of
/// `#moe.expert`: exp, erf and tanh are `math` operations, division is `arith.divf`, no fast-math
/// flags. `expert.getUnimplemented()` must be empty.
void buildExpertEpilogue(OpBuilder &builder, Location loc, Region &region, ExpertAttr expert);

/// Builds in `region` the block of 1 / (1 + exp(−v)), in the same terms.
void buildSigmoid(OpBuilder &builder, Location loc, Region &region);

} // namespace mlir::moe

#endif // MOE_DIALECT_MOE_IR_MOEOPS_H
