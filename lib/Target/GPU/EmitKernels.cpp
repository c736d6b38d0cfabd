//===- EmitKernels.cpp - an entry becomes kernels and their launches ------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "EntryEmitter.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/Dialect/Vector/IR/VectorOps.h"
#include "mlir/IR/IRMapping.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOEGPUEMITKERNELS
#include "moe/Target/GPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

static constexpr int64_t kAlignment = 256;

std::array<EntryEmitter::Size, ScratchCount> EntryEmitter::sizes() const {
  std::array<Size, ScratchCount> size;
  int64_t width = layer.rowWidth(), slices = StageKernel{layer.xType, 0, width, {}}.slices();
  if (layer.up || layer.groupUp || !layer.routerX)
    size[Rows].perToken = width * 2;
  if (layer.router) {
    size[Partial].perToken = slices * layer.routerWeight().panelCount() * 32 * 4;
    size[Factors].perToken = layer.vectors.inputScale ? 4 : 0;
  }
  if (layer.up) {
    size[Pair].perRow = size[Order].perRow = 4;
    size[Weighed].perRow = layer.isOnInput() ? width * 2 : 0;
    size[Hidden].perRow = Layer::width(layer.up) * 2;
    size[Products].perRow = layer.isAtomic() ? 0 : width * 2;
    size[Sums].perToken = layer.isAtomic() ? width * 4 : 0;
  }
  if (layer.groupUp) {
    size[GroupOffsets].fixed = 8;
    size[GroupHidden].perToken = Layer::width(layer.groupUp) * 2;
    size[GroupProducts].perToken = width * 2;
    size[Gate].perToken = layer.gate ? 4 : 0;
  }
  return size;
}

/// The size of the workspace; where `offsets` is not empty, also where each buffer begins.
Value EntryEmitter::total(OpBuilder &b, Value tokens, Value rows, MutableArrayRef<Value> offsets) {
  auto c64 = [&](int64_t v) { return arith::ConstantIntOp::create(b, loc, v, 64).getResult(); };
  Value end = c64(0);
  for (auto [i, size] : llvm::enumerate(sizes())) {
    if (!offsets.empty())
      offsets[i] = end;
    Value bytes = c64(size.fixed + kAlignment - 1);
    bytes = b.createOrFold<arith::AddIOp>(
        loc, bytes, b.createOrFold<arith::MulIOp>(loc, tokens, c64(size.perToken)));
    bytes = b.createOrFold<arith::AddIOp>(
        loc, bytes, b.createOrFold<arith::MulIOp>(loc, rows, c64(size.perRow)));
    bytes = b.createOrFold<arith::AndIOp>(loc, bytes, c64(-kAlignment));
    end = b.createOrFold<arith::AddIOp>(loc, end, bytes);
  }
  return end;
}

void EntryEmitter::makeBytesFunction() {
  Type i64 = b.getI64Type();
  b.setInsertionPoint(func);
  auto bytes = func::FuncOp::create(b, loc, (func.getSymName() + "_workspace_bytes").str(),
                                    b.getFunctionType({i64, i64, i64}, i64));
  Block *block = bytes.addEntryBlock();
  OpBuilder inner = OpBuilder::atBlockBegin(block);
  Value rows = layer.isDense()
                   ? Value(block->getArgument(0))
                   : arith::MulIOp::create(inner, loc, block->getArgument(0), block->getArgument(1))
                         .getResult();
  Value end = total(inner, block->getArgument(0), rows, {});
  func::ReturnOp::create(inner, loc, end);
}

LLVM::LLVMFuncOp EntryEmitter::makeKernel(StringRef name, ArrayRef<Type> types, int64_t threads,
                                          int64_t sharedBytes) {
  OpBuilder inner = OpBuilder::atBlockEnd(kernels.getBody());
  return createKernel(inner, loc, name, types, threads, sharedBytes);
}

LogicalResult
EntryEmitter::launch(StringRef name, Value gridX, Value gridY, int64_t threads, int64_t sharedBytes,
                     ArrayRef<Value> args,
                     function_ref<LogicalResult(OpBuilder &, LLVM::LLVMFuncOp)> fill) {
  SmallVector<Type> types = llvm::map_to_vector(args, [](Value v) { return v.getType(); });
  LLVM::LLVMFuncOp kernel = makeKernel(name, types, threads, sharedBytes);
  Block *block = kernel.addEntryBlock(b);
  OpBuilder inner = OpBuilder::atBlockBegin(block);
  if (failed(fill(inner, kernel)))
    return failure();
  inner.setInsertionPointToEnd(block);
  LLVM::ReturnOp::create(inner, loc, ValueRange());
  auto symbol = SymbolRefAttr::get(kernels.getSymNameAttr(),
                                   {FlatSymbolRefAttr::get(kernel.getSymNameAttr())});
  Value one = c32(1);
  gpu::LaunchFuncOp::create(b, loc, symbol, gpu::KernelDim3{gridX, gridY, one},
                            gpu::KernelDim3{c32(threads), one, one}, c32(sharedBytes), args);
  return success();
}

Value EntryEmitter::field(Type type, int64_t offset) {
  Value place = LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), frame,
                                    ArrayRef<LLVM::GEPArg>{int32_t(offset)});
  return LLVM::LoadOp::create(b, loc, type, place);
}

Value EntryEmitter::weight(Value argument) {
  Value list = field(ptr(), offsetof(moec_frame, weights));
  Value place =
      LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), list,
                          ArrayRef<LLVM::GEPArg>{int32_t(layer.weightIndex(argument) * 8)});
  return global(LLVM::LoadOp::create(b, loc, ptr(), place));
}

/// A number of the entry that follows from the call alone, computed here.
FailureOr<Value> EntryEmitter::onHost(Value v) {
  if (auto argument = dyn_cast<BlockArgument>(v)) {
    auto role =
        cast<func::FuncOp>(argument.getOwner()->getParentOp())
            .getArgAttrOfType<StringAttr>(argument.getArgNumber(), MoEDialect::kArgAttrName);
    int64_t place = role && role == "routed_only"  ? offsetof(moec_frame, routed_only)
                    : role && role == "accumulate" ? offsetof(moec_frame, accumulate)
                                                   : 0;
    if (place)
      return arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ne, field(b.getI64Type(), place),
                                   c64(0))
          .getResult();
  } else if (Operation *op = v.getDefiningOp()) {
    if (auto dim = dyn_cast<memref::DimOp>(op);
        dim && isa<BlockArgument>(dim.getSource()) && dim.getConstantIndex() == 0)
      return arith::IndexCastOp::create(b, loc, b.getIndexType(), tokens).getResult();
    if (isa<arith::SelectOp, arith::ConstantOp>(op)) {
      IRMapping map;
      for (Value operand : op->getOperands()) {
        FailureOr<Value> here = onHost(operand);
        if (failed(here))
          return failure();
        map.map(operand, *here);
      }
      return b.clone(*op, map)->getResult(0);
    }
  }
  return emitError(v.getLoc(), "expected a number that follows from the call, but got another: ")
         << v;
}

/// Where the buffers of the workspace are, and those that the caller gave.
void EntryEmitter::readFrame() {
  Value tokens64 = arith::ExtUIOp::create(b, loc, b.getI64Type(), tokens);
  Value count64 = arith::ExtUIOp::create(b, loc, b.getI64Type(), count);
  SmallVector<Value> offsets(ScratchCount);
  total(b, tokens64, count64, offsets);
  Value workspace = field(ptr(), offsetof(moec_frame, workspace));
  for (auto [place, offset] : llvm::zip_equal(scratch, offsets))
    place = global(LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), workspace,
                                       ArrayRef<LLVM::GEPArg>{offset}));
  if (layer.isDense())
    return;
  if (layer.up)
    scratch[Offsets] = framePointer(offsetof(moec_frame, offsets));
  ids = framePointer(offsetof(moec_frame, experts));
  weights = framePointer(offsetof(moec_frame, expert_weights));
}

LogicalResult EntryEmitter::makeHost() {
  Type i64 = b.getI64Type(), i32 = b.getI32Type();
  b.setInsertionPoint(func);
  auto host = func::FuncOp::create(b, loc, func.getSymName(), b.getFunctionType({ptr()}, {}));
  for (StringRef name :
       {MoEDialect::kTargetAttrName, MoEDialect::kEntryAttrName, MoEDialect::kComputeAttrName})
    if (Attribute attr = func->getAttr(name))
      host->setAttr(name, attr);
  frame = host.addEntryBlock()->getArgument(0);
  b.setInsertionPointToStart(&host.getBody().front());
  Value tokens64 = field(i64, offsetof(moec_frame, tokens));
  Value any = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::sgt, tokens64, c64(0));
  auto work = scf::IfOp::create(b, loc, any, /*withElse=*/false);
  func::ReturnOp::create(b, loc);
  b.setInsertionPointToStart(work.thenBlock());
  tokens = arith::TruncIOp::create(b, loc, i32, tokens64);
  slots = layer.isDense()
              ? c32(1)
              : arith::TruncIOp::create(b, loc, i32, field(i64, offsetof(moec_frame, slots)))
                    .getResult();
  count = arith::MulIOp::create(b, loc, tokens, slots);
  readFrame();
  auto number = [&](Value v, Value &here) {
    here = arith::ConstantOp::create(b, loc, b.getF32FloatAttr(1));
    if (!v)
      return success();
    FailureOr<Value> made = onHost(v);
    if (failed(made))
      return failure();
    here = *made;
    if (here.getType().isIndex())
      here = arith::IndexCastOp::create(b, loc, i32, here);
    return success();
  };
  if (failed(number(layer.down ? layer.down.getScale() : Value(), scale)) ||
      failed(number(layer.groupDown ? layer.groupDown.getScale() : Value(), groupScale)) ||
      failed(number(layer.groupRows, groupCount)))
    return failure();

  if (failed(launchStage()))
    return failure();
  if (!layer.up && !layer.groupUp)
    return success();
  if ((layer.up && failed(launchExperts())) || (layer.groupUp && failed(launchGroup())))
    return failure();
  return launchCombine();
}

LogicalResult EntryEmitter::emit() {
  makeBytesFunction();
  b.setInsertionPoint(func);
  kernels = gpu::GPUModuleOp::create(b, loc, (func.getSymName() + "_kernels").str());
  kernels->setAttr(kLevelAttrName, b.getStringAttr(layer.level()));
  declareShared(kernels);
  if (failed(makeHost()))
    return failure();
  func.erase();
  return success();
}

namespace {
struct EmitKernelsPass : public mlir::moe::impl::MoEGPUEmitKernelsBase<EmitKernelsPass> {
  void runOnOperation() override {
    ModuleOp module = getOperation();
    for (auto func : llvm::to_vector(module.getOps<func::FuncOp>())) {
      auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
      if (!target || target.getDevice() != Device::CUDA)
        continue;
      Layer layer;
      if (failed(layer.read(func)) || failed(EntryEmitter(func, layer).emit()))
        return signalPassFailure();
    }
    if (module.getOps<gpu::GPUModuleOp>().empty())
      return;
    module->setAttr(gpu::GPUDialect::getContainerModuleAttrName(), UnitAttr::get(&getContext()));
  }
};
} // namespace
