//===- Bufferize.cpp - entries on memrefs with out-parameters -------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Passes.h"

#include "mlir/Dialect/Bufferization/IR/BufferizableOpInterface.h"
#include "mlir/Dialect/Bufferization/IR/Bufferization.h"
#include "mlir/Dialect/Bufferization/Transforms/OneShotAnalysis.h"
#include "mlir/Dialect/Bufferization/Transforms/OneShotModuleBufferize.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/Dialect/Tensor/IR/Tensor.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOEBUFFERIZE
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

/// The memref of a tensor argument: activations and logits may have padding between rows, the
/// arrays of routing are compact.
static MemRefType argumentType(RankedTensorType type, StringRef role) {
  MemRefLayoutAttrInterface layout;
  if (role == "x" || role == "router_x" || role == "y" || role == "logits")
    layout = StridedLayoutAttr::get(type.getContext(), 0, {ShapedType::kDynamic, 1});
  return MemRefType::get(type.getShape(), type.getElementType(), layout);
}

/// The argument whose buffer a result is: results of an entry are its destinations.
static BlockArgument destinationOf(Value value) {
  while (auto result = dyn_cast<OpResult>(value)) {
    auto dps = dyn_cast<DestinationStyleOpInterface>(result.getOwner());
    if (!dps)
      return nullptr;
    value = dps.getTiedOpOperand(result)->get();
  }
  return dyn_cast<BlockArgument>(value);
}

static LogicalResult convertBoundary(func::FuncOp func) {
  Block &block = func.getBody().front();
  Operation *terminator = block.getTerminator();
  // Before the arguments change their types: find where every result goes.
  SmallVector<std::pair<Value, unsigned>> results;
  for (Value operand : terminator->getOperands()) {
    BlockArgument argument = destinationOf(operand);
    if (!argument)
      return func.emitOpError(
          "expected every result to be written into an argument, but got one that is not");
    if (operand != argument)
      results.push_back({operand, argument.getArgNumber()});
  }
  OpBuilder b = OpBuilder::atBlockBegin(&block);
  SmallVector<Type> inputs;
  for (BlockArgument argument : block.getArguments()) {
    auto type = dyn_cast<RankedTensorType>(argument.getType());
    if (!type) {
      inputs.push_back(argument.getType());
      continue;
    }
    auto role =
        func.getArgAttrOfType<StringAttr>(argument.getArgNumber(), MoEDialect::kArgAttrName);
    if (!role)
      return func.emitOpError("expected moe.arg on argument ") << argument.getArgNumber();
    MemRefType buffer = argumentType(type, role.getValue());
    bool written = llvm::any_of(
        results, [&](auto &result) { return result.second == argument.getArgNumber(); });
    argument.setType(buffer);
    inputs.push_back(buffer);
    auto tensor = bufferization::ToTensorOp::create(b, func.getLoc(), type, argument,
                                                    /*restrict=*/true, /*writable=*/written);
    argument.replaceAllUsesExcept(tensor.getResult(), tensor);
  }
  b.setInsertionPoint(terminator);
  for (auto [value, argument] : results) {
    auto copy = bufferization::MaterializeInDestinationOp::create(b, func.getLoc(), value,
                                                                  block.getArgument(argument));
    copy.setRestrict(true);
    copy.setWritable(true);
  }
  func::ReturnOp::create(b, terminator->getLoc());
  terminator->erase();
  func.setFunctionType(FunctionType::get(func.getContext(), inputs, {}));
  return success();
}

/// Gives every destination a buffer of its own. Equal empty tensors are one value by now, and on
/// tensors it makes no difference; but a buffer that two operations write ties their order, and the
/// stages of tasks have another one (a shared expert's first matmul runs beside the routed one).
static void splitEmptyTensors(func::FuncOp func) {
  func.walk([](tensor::EmptyOp empty) {
    for (OpOperand &use : llvm::make_early_inc_range(llvm::drop_begin(empty->getUses()))) {
      OpBuilder b(empty);
      use.set(b.clone(*empty)->getResult(0));
    }
  });
}

namespace {
struct BufferizePass : public mlir::moe::impl::MoEBufferizeBase<BufferizePass> {
  void runOnOperation() override {
    ModuleOp module = getOperation();
    bufferization::OneShotBufferizationOptions options;
    options.bufferizeFunctionBoundaries = false;
    options.allowUnknownOps = false;
    options.bufferAlignment = 64;
    options.opFilter.allowOperation([](Operation *op) {
      return !isa<ModuleOp>(op) && !isa<LayerOp, WeightOp, func::FuncOp>(op);
    });
    options.setFunctionBoundaryTypeConversion(bufferization::LayoutMapOption::IdentityLayoutMap);
    for (auto func : module.getOps<func::FuncOp>()) {
      if (!func->hasAttr(MoEDialect::kTargetAttrName))
        continue;
      splitEmptyTensors(func);
      if (failed(convertBoundary(func)))
        return signalPassFailure();
      bufferization::BufferizationState state;
      if (failed(bufferization::runOneShotBufferize(func, options, state)))
        return signalPassFailure();
      // What is left of the boundary are copies of a buffer onto itself.
      for (auto copy : llvm::make_early_inc_range(func.getOps<memref::CopyOp>()))
        if (copy.getSource() == copy.getTarget())
          copy.erase();
      WalkResult walk = func.walk([](memref::CopyOp copy) {
        copy.emitOpError("expected an entry that computes in place, but got a copy of a buffer");
        return WalkResult::interrupt();
      });
      if (walk.wasInterrupted())
        return signalPassFailure();
    }
  }
};
} // namespace
