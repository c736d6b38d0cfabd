//===- MoEDialect.cpp - the moe dialect -----------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEDialect.h"
#include "moe/Dialect/MoE/IR/MoEOps.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Interfaces/FunctionInterfaces.h"

using namespace mlir;
using namespace mlir::moe;

#include "moe/Dialect/MoE/IR/MoEDialect.cpp.inc"

void MoEDialect::initialize() {
  registerAttributes();
  registerTypes();
  addOperations<
#define GET_OP_LIST
#include "moe/Dialect/MoE/IR/MoEOps.cpp.inc"
      >();
}

LogicalResult MoEDialect::verifyOperationAttribute(Operation *op, NamedAttribute attribute) {
  StringRef name = attribute.getName();
  // A module carries what phases hand on: targets, and the driver's description of the model.
  if (isa<ModuleOp>(op))
    return success();
  if (!isa<FunctionOpInterface>(op))
    return op->emitError() << "expected attribute '" << name << "' on a function, but got it on '"
                           << op->getName() << "'";
  if (name == kEntryAttrName) {
    auto kind = dyn_cast<StringAttr>(attribute.getValue());
    if (!kind || !symbolizeEntryKind(kind.getValue()))
      return op->emitError() << "expected 'moe.entry' to be \"forward\", \"route\" or "
                                "\"experts\", but got "
                             << attribute.getValue();
    return success();
  }
  if (name == kComputeAttrName) {
    auto type = dyn_cast<TypeAttr>(attribute.getValue());
    if (!type || !(type.getValue().isF32() || type.getValue().isBF16()))
      return op->emitError() << "expected 'moe.compute' to be f32 or bf16, but got "
                             << attribute.getValue();
    return success();
  }
  if (name == kTargetAttrName) {
    if (!isa<TargetAttr>(attribute.getValue()))
      return op->emitError() << "expected 'moe.target' to be a #moe.target, but got "
                             << attribute.getValue();
    return success();
  }
  if (name == kWorkspaceAttrName) {
    if (!isa<FlatSymbolRefAttr>(attribute.getValue()))
      return op->emitError() << "expected 'moe.workspace' to be a symbol, but got "
                             << attribute.getValue();
    return success();
  }
  return op->emitError() << "expected moe.entry, moe.compute, moe.target or moe.workspace on a "
                            "function, but got '"
                         << name << "'";
}

LogicalResult MoEDialect::verifyRegionArgAttribute(Operation *op, unsigned regionIndex,
                                                   unsigned argIndex, NamedAttribute attribute) {
  StringRef name = attribute.getName();
  auto where = [&] { return op->emitError() << "argument " << argIndex << ": "; };
  if (name == kArgAttrName) {
    static constexpr StringLiteral kRoles[] = {
        "x",           "router_x", "y",       "weights", "experts",   "logits", "accumulate",
        "routed_only", "weight",   "offsets", "lanes",   "workspace", "tokens", "slots"};
    auto role = dyn_cast<StringAttr>(attribute.getValue());
    if (!role || !llvm::is_contained(kRoles, role.getValue()))
      return where() << "expected 'moe.arg' to be one of x, router_x, y, weights, experts, "
                        "logits, accumulate, routed_only, weight, offsets, lanes, workspace, "
                        "tokens, slots, but got "
                     << attribute.getValue();
    return success();
  }
  if (name == kWeightIndexAttrName) {
    auto index = dyn_cast<IntegerAttr>(attribute.getValue());
    if (!index || !index.getType().isSignlessInteger(64) || index.getInt() < 0)
      return where() << "expected 'moe.weight_index' to be a non-negative i64, but got "
                     << attribute.getValue();
    return success();
  }
  return where() << "expected moe.arg or moe.weight_index, but got '" << name << "'";
}
