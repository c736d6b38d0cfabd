//===- OpHelpers.h - what the op definitions share --------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_DIALECT_MOE_IR_OPHELPERS_H
#define MOE_LIB_DIALECT_MOE_IR_OPHELPERS_H

#include "moe/Dialect/MoE/IR/MoEOps.h"

namespace mlir::moe::opimpl {

using Effects = SmallVectorImpl<SideEffects::EffectInstance<MemoryEffects::Effect>>;

/// Effects of a destination-style op on its buffers: inputs are read; outs are written, and read
/// too where `readsOuts`.
void getDpsEffects(DestinationStyleOpInterface op, bool readsOuts, Effects &effects);

/// Result shapes are the shapes of the outs.
LogicalResult reifyFromOuts(DestinationStyleOpInterface op, OpBuilder &builder,
                            ReifiedRankedShapedTypeDims &shapes);

/// Appends the tensor types among the outs, which are the result types.
void addResultTypes(OperationState &state, ValueRange outs);

/// Whether all shaped operands are tensors, or all are memrefs.
LogicalResult verifyOneSemantics(DestinationStyleOpInterface op);

/// Checks a dimension: equal, or either is dynamic.
LogicalResult verifyDim(Operation *op, Value value, int64_t dim, int64_t expected,
                        const Twine &what);

/// Checks that two dimensions can be equal.
LogicalResult verifySameDim(Operation *op, Value a, int64_t aDim, Value b, int64_t bDim,
                            const Twine &what);

/// Checks the tokens of row_weights against those of x; null is fine.
LogicalResult verifyRowWeights(Operation *op, Value rowWeights, Value x);

/// Checks the region of an epilogue: one f32 argument per part, one f32 yielded, no side effects.
LogicalResult verifyEpilogue(Operation *op, Region &region, int64_t parts);

inline int64_t getDim(Value value, int64_t dim) {
  return cast<ShapedType>(value.getType()).getDimSize(dim);
}
inline int64_t getRank(Value value) { return cast<ShapedType>(value.getType()).getRank(); }
inline WeightType getWeightType(Value value) { return cast<WeightType>(value.getType()); }

} // namespace mlir::moe::opimpl

#endif // MOE_LIB_DIALECT_MOE_IR_OPHELPERS_H
