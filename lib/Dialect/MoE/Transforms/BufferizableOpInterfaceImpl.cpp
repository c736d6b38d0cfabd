//===- BufferizableOpInterfaceImpl.cpp - moe on buffers -------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/Transforms/BufferizableOpInterfaceImpl.h"
#include "moe/Dialect/MoE/IR/MoEOps.h"

#include "mlir/Dialect/Bufferization/IR/BufferizableOpInterface.h"
#include "mlir/Dialect/Bufferization/IR/DstBufferizableOpInterfaceImpl.h"
#include "mlir/Dialect/Utils/StructuredOpsUtils.h"

using namespace mlir;
using namespace mlir::bufferization;
using namespace mlir::moe;

namespace {

template <typename OpTy> bool readsOuts(OpTy) { return false; }
template <> bool readsOuts(CombineOp op) { return op.readsOut(); }
template <> bool readsOuts(FfnOp op) { return op.readsOut(); }
template <> bool readsOuts(GroupedMatmulOp op) { return op.readsOut(); }

template <typename OpTy> struct Model : DstBufferizableOpInterfaceExternalModel<Model<OpTy>, OpTy> {
  bool bufferizesToMemoryRead(Operation *op, OpOperand &operand, const AnalysisState &) const {
    return !cast<DestinationStyleOpInterface>(op).isDpsInit(&operand) || readsOuts(cast<OpTy>(op));
  }

  LogicalResult bufferize(Operation *op, RewriterBase &rewriter,
                          const BufferizationOptions &options, BufferizationState &state) const {
    auto dpsOp = cast<DestinationStyleOpInterface>(op);
    if (dpsOp.hasPureBufferSemantics())
      return success();
    rewriter.setInsertionPoint(op);
    SmallVector<Value> operands, outs;
    for (OpOperand &operand : op->getOpOperands()) {
      Value value = operand.get();
      if (isa<TensorType>(value.getType())) {
        FailureOr<Value> buffer = getBuffer(rewriter, value, options, state);
        if (failed(buffer))
          return failure();
        value = *buffer;
        if (dpsOp.isDpsInit(&operand))
          outs.push_back(value);
      }
      operands.push_back(value);
    }
    Operation *bufferized = cloneWithoutRegions(rewriter, op, TypeRange(), operands);
    for (auto [from, to] : llvm::zip_equal(op->getRegions(), bufferized->getRegions()))
      rewriter.inlineRegionBefore(from, to, to.begin());
    replaceOpWithBufferizedValues(rewriter, op, outs);
    return success();
  }
};

template <typename... OpTys> void attach(MLIRContext *context) {
  (OpTys::template attachInterface<Model<OpTys>>(*context), ...);
}

} // namespace

void moe::registerBufferizableOpInterfaceExternalModels(DialectRegistry &registry) {
  registry.addExtension(+[](MLIRContext *context, MoEDialect *) {
    attach<RouterOp, DispatchOp, RouteDispatchOp, SingleGroupOp, ExpertsOp, CombineOp, FfnOp,
           GatherOp, GroupedMatmulOp, ActivateOp>(context);
  });
}
