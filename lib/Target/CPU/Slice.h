//===- Slice.h - compute a value again elsewhere ----------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_CPU_SLICE_H
#define MOE_LIB_TARGET_CPU_SLICE_H

#include "mlir/IR/Builders.h"
#include "mlir/IR/IRMapping.h"
#include "mlir/Interfaces/SideEffectInterfaces.h"
#include "llvm/ADT/STLFunctionalExtras.h"

namespace mlir::moe {

/// Clones the pure operations that `value` is computed from to the insertion point of `b` and
/// returns the new value. `leaf` gives values that end the recursion (or null); `mapping` remembers
/// what exists. Fails with an error on the operation where one is not pure.
inline FailureOr<Value> cloneSlice(OpBuilder &b, Value value, IRMapping &mapping,
                                   llvm::function_ref<Value(Value)> leaf) {
  if (Value known = mapping.lookupOrNull(value))
    return known;
  if (Value found = leaf(value)) {
    mapping.map(value, found);
    return found;
  }
  Operation *op = value.getDefiningOp();
  if (!op || !isPure(op) || op->getNumRegions())
    return emitError(value.getLoc(), "expected a value computed by pure operations from the "
                                     "arguments of the entry, but got another one");
  for (Value operand : op->getOperands())
    if (failed(cloneSlice(b, operand, mapping, leaf)))
      return failure();
  b.clone(*op, mapping);
  return mapping.lookup(value);
}

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_CPU_SLICE_H
