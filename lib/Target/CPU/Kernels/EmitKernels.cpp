//===- EmitKernels.cpp - Task operations to calls of vector kernels -------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelEmitter.h"

#include "moe/Dialect/MoE/IR/MoEDialect.h"
#include "moe/Target/CPU/Passes.h"

#include "mlir/IR/PatternMatch.h"
#include "mlir/Transforms/WalkPatternRewriteDriver.h"
#include "llvm/ADT/TypeSwitch.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOECPUEMITKERNELS
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

FailureOr<KernelLevel> KernelEmitter::getLevel(Operation *op) {
  auto function = op->getParentOfType<func::FuncOp>();
  auto target =
      function ? function->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName) : TargetAttr();
  if (!target)
    return op->emitOpError("expected a function with ")
           << MoEDialect::kTargetAttrName << " around it, but got none";
  std::optional<KernelLevel> level = parseKernelLevel(target.getLevel());
  if (!level)
    return op->emitOpError("expected a level with kernels (x86-64-v3, x86-64-v4, avx512-bf16, "
                           "amx-bf16), but got ")
           << target.getLevel();
  return *level;
}

FailureOr<func::FuncOp>
KernelEmitter::get(StringRef name, function_ref<FailureOr<func::FuncOp>(OpBuilder &)> emit) {
  if (auto function = symbols.lookup<func::FuncOp>(name))
    return function;
  OpBuilder b = OpBuilder::atBlockEnd(module.getBody());
  FailureOr<func::FuncOp> function = emit(b);
  if (succeeded(function))
    symbols.insert(*function);
  return function;
}

FailureOr<Buffer> KernelEmitter::getBuffer(KernelBuilder &k, Operation *op, Value memref) {
  auto type = cast<MemRefType>(memref.getType());
  SmallVector<int64_t> strides;
  int64_t offset;
  if (failed(type.getStridesAndOffset(strides, offset)) ||
      (!strides.empty() && strides.back() != 1))
    return op->emitOpError("expected buffers whose elements are next to each other, but got ")
           << type;
  Buffer buffer;
  buffer.elementBytes = type.getElementTypeBitWidth() / 8;
  OpBuilder &b = k.b;
  auto metadata = memref::ExtractStridedMetadataOp::create(b, k.loc, memref);
  Value base = memref::ExtractAlignedPointerAsIndexOp::create(b, k.loc, memref);
  buffer.pointer = LLVM::IntToPtrOp::create(b, k.loc, k.ptr(), toI64(k, base));
  if (offset == ShapedType::kDynamic)
    buffer.pointer =
        k.at(buffer.pointer, k.mul(toI64(k, metadata.getOffset()), buffer.elementBytes));
  else if (offset)
    buffer.pointer = k.at(buffer.pointer, k.index(offset * buffer.elementBytes));
  for (auto [dim, stride] : llvm::enumerate(strides))
    buffer.strideBytes.push_back(
        stride == ShapedType::kDynamic
            ? k.mul(toI64(k, metadata.getStrides()[dim]), buffer.elementBytes)
            : k.index(stride * buffer.elementBytes));
  return buffer;
}

LogicalResult KernelEmitter::lower(PackRowsOp op) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  auto rowsType = cast<MemRefType>(op.getRows().getType());
  PackKernelSpec spec;
  spec.level = *level;
  spec.bf16Source = rowsType.getElementType().isBF16();
  spec.bf16Block = cast<MemRefType>(op.getOut().getType()).getElementType().isBF16();
  spec.bf16Compute =
      !spec.bf16Block && op.getCompute().isBF16() && (!spec.bf16Source || op.getRowWeights());
  spec.gather = static_cast<bool>(op.getPair());
  spec.weighted = static_cast<bool>(op.getRowWeights());
  FailureOr<func::FuncOp> kernel =
      get(spec.getName(), [&](OpBuilder &at) { return emitPackKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> rows = getBuffer(k, op, op.getRows());
  FailureOr<Buffer> out = getBuffer(k, op, op.getOut());
  if (failed(kernel) || failed(rows) || failed(out))
    return failure();
  Value first = toI64(k, op.getFirst());
  SmallVector<Value> args;
  if (spec.gather) {
    FailureOr<Buffer> pair = getBuffer(k, op, op.getPair());
    if (failed(pair))
      return failure();
    args = {rows->pointer, rows->strideBytes[0], k.at(pair->pointer, k.mul(first, 4)),
            toI64(k, op.getSlots())};
    if (spec.weighted) {
      FailureOr<Buffer> w = getBuffer(k, op, op.getRowWeights());
      if (failed(w))
        return failure();
      args.push_back(w->pointer);
    }
  } else {
    args = {k.at(rows->pointer, k.mul(first, rows->strideBytes[0])), rows->strideBytes[0]};
  }
  Value width = rowsType.isDynamicDim(1)
                    ? toI64(k, memref::DimOp::create(b, k.loc, op.getRows(), 1))
                    : k.index(rowsType.getDimSize(1));
  args.append({toI64(k, op.getCount()), width, out->pointer});
  call(k, *kernel, args);
  op.erase();
  return success();
}

LogicalResult KernelEmitter::lower(NormalizeRowsOp op) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  int64_t columns = op.getScale().getType().getRows();
  float epsilon = static_cast<float>(op.getEpsilon().convertToDouble());
  NormalizeKernelSpec spec{*level, columns, epsilon, op.getRounded()};
  FailureOr<func::FuncOp> kernel = get(
      spec.getName(), [&](OpBuilder &at) { return emitNormalizeKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> a = getBuffer(k, op, op.getA());
  if (failed(kernel) || failed(a))
    return failure();
  call(k, *kernel, {a->pointer, toI64(k, op.getCount()), toPointer(k, op.getScale())});
  op.erase();
  return success();
}

LogicalResult KernelEmitter::lower(SelectExpertsOp op) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  RouterAttr router = op.getRouter();
  std::string unsupported = router.getUnimplemented();
  if (!unsupported.empty())
    return op.emitOpError("expected a router that the CPU target has code for, but got ")
           << unsupported;
  SelectKernelSpec spec;
  spec.level = *level;
  spec.experts = op.getExperts();
  spec.router = router;
  spec.expertScale = static_cast<bool>(op.getExpertScale());
  spec.copyLogits = static_cast<bool>(op.getOutLogits());
  int64_t topK = router.getTopK();
  if (topK > spec.experts)
    return op.emitOpError("expected top_k <= experts, but got ") << topK << " of " << spec.experts;
  auto isCompact = [&](Value memref) {
    auto type = cast<MemRefType>(memref.getType());
    SmallVector<int64_t> strides;
    int64_t offset;
    return succeeded(type.getStridesAndOffset(strides, offset)) && strides[0] == topK;
  };
  if (!isCompact(op.getOutWeights()) || !isCompact(op.getOutExperts()))
    return op.emitOpError("expected weights and experts of rows of top_k elements next to each "
                          "other, but got ")
           << op.getOutWeights().getType() << " and " << op.getOutExperts().getType();
  FailureOr<func::FuncOp> kernel =
      get(spec.getName(), [&](OpBuilder &at) { return emitSelectKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> logits = getBuffer(k, op, op.getLogits());
  FailureOr<Buffer> weights = getBuffer(k, op, op.getOutWeights());
  FailureOr<Buffer> ids = getBuffer(k, op, op.getOutExperts());
  if (failed(kernel) || failed(logits) || failed(weights) || failed(ids))
    return failure();
  Value first = toI64(k, op.getFirst());
  Value skip = k.mul(first, topK * 4);
  SmallVector<Value> args = {logits->pointer, logits->strideBytes[0], toI64(k, op.getCount()),
                             k.at(weights->pointer, skip), k.at(ids->pointer, skip)};
  for (Value vector : {op.getSelectionBias(), op.getExpertScale()})
    if (vector)
      args.push_back(toPointer(k, vector));
  if (spec.copyLogits) {
    FailureOr<Buffer> copy = getBuffer(k, op, op.getOutLogits());
    if (failed(copy))
      return failure();
    args.append({k.at(copy->pointer, k.mul(first, copy->strideBytes[0])), copy->strideBytes[0]});
  }
  call(k, *kernel, args);
  op.erase();
  return success();
}

template <typename PanelsOp>
LogicalResult KernelEmitter::lowerPanels(PanelsOp op, Value accumulate) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  auto yType = cast<MemRefType>(op.getY().getType());
  auto scratchType = cast<MemRefType>(op.getScratch().getType());
  SmallVector<int64_t> strides;
  int64_t offset;
  if (scratchType.getRank() != 3 || failed(scratchType.getStridesAndOffset(strides, offset)) ||
      strides[1] != 32)
    return op.emitOpError("expected a scratch of [panels, T, 32] with rows of 32 elements, but "
                          "got ")
           << scratchType;
  PanelKernelSpec spec;
  spec.level = *level;
  spec.bf16Y = yType.getElementType().isBF16();
  spec.begin = static_cast<bool>(accumulate);
  FailureOr<func::FuncOp> kernel =
      get(spec.getName(), [&](OpBuilder &at) { return emitPanelKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> scratch = getBuffer(k, op, op.getScratch());
  FailureOr<Buffer> y = getBuffer(k, op, op.getY());
  if (failed(kernel) || failed(scratch) || failed(y))
    return failure();
  auto dim = [&](Value memref, int64_t d) -> Value {
    auto type = cast<MemRefType>(memref.getType());
    if (!type.isDynamicDim(d))
      return k.index(type.getDimSize(d));
    return toI64(k, memref::DimOp::create(b, k.loc, memref, d));
  };
  SmallVector<Value> args = {
      scratch->pointer,        scratch->strideBytes[0], y->pointer,
      y->strideBytes[0],       dim(op.getY(), 0),       k.mul(toI64(k, op.getFirst()), 32),
      k.index(op.getPanels()), dim(op.getY(), 1)};
  if (accumulate)
    args.push_back(arith::ExtUIOp::create(b, k.loc, k.i64(), accumulate));
  call(k, *kernel, args);
  op.erase();
  return success();
}

LogicalResult KernelEmitter::lower(BeginPanelsOp op) { return lowerPanels(op, op.getAccumulate()); }

LogicalResult KernelEmitter::lower(EndPanelsOp op) { return lowerPanels(op, Value()); }

LogicalResult KernelEmitter::run() {
  // All task operations first: lowering erases them and adds functions.
  SmallVector<Operation *> tasks;
  module.walk([&](Operation *op) {
    if (isa<GemmTileOp, PackRowsOp, NormalizeRowsOp, SelectExpertsOp, BeginPanelsOp, EndPanelsOp>(
            op))
      tasks.push_back(op);
  });
  LogicalResult result = success();
  for (Operation *task : tasks) {
    LogicalResult lowered =
        llvm::TypeSwitch<Operation *, LogicalResult>(task)
            .Case<GemmTileOp, PackRowsOp, NormalizeRowsOp, SelectExpertsOp, BeginPanelsOp,
                  EndPanelsOp>([&](auto op) { return lower(op); });
    if (failed(lowered))
      result = failure(); // go on: report everything at once
  }
  return result;
}

namespace {
struct EmitKernelsPass : moe::impl::MoECPUEmitKernelsBase<EmitKernelsPass> {
  void runOnOperation() override {
    if (failed(KernelEmitter(getOperation()).run()))
      return signalPassFailure();
    RewritePatternSet patterns(&getContext());
    populateVectorMathPatterns(patterns);
    walkAndApplyPatterns(getOperation(), std::move(patterns));
  }
};
} // namespace
