//===- EmitKernels.cpp - an entry becomes kernels and their launches ------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Kernels/Kernels.h"
#include "Layer.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/Dialect/Vector/IR/VectorOps.h"

#include <cstddef>

#include "moec/module.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOEGPUEMITKERNELS
#include "moe/Target/GPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

constexpr int64_t kAlignment = 256;

/// Buffers of the workspace, in their order there.
enum Scratch { Rows, Partial, Offsets, Pair, Order, Hidden, Products, ScratchCount };

class EntryEmitter {
public:
  EntryEmitter(func::FuncOp func, const Layer &layer) : func(func), layer(layer), b(func) {}
  LogicalResult emit();

private:
  /// Bytes of every buffer for one token and for one sorted row, and what both do not count.
  struct Size {
    int64_t perToken = 0, perRow = 0, fixed = 0;
  };
  std::array<Size, ScratchCount> sizes() const;
  Value total(OpBuilder &b, Value tokens, Value rows, MutableArrayRef<Value> offsets);
  void makeBytesFunction();
  LLVM::LLVMFuncOp makeKernel(StringRef name, ArrayRef<Type> types, int64_t threads,
                              int64_t sharedBytes);
  /// Makes a kernel, fills it by `fill` and launches it.
  LogicalResult launch(StringRef name, Value gridX, Value gridY, int64_t threads,
                       int64_t sharedBytes, ArrayRef<Value> args,
                       function_ref<LogicalResult(OpBuilder &, LLVM::LLVMFuncOp)> fill);
  LogicalResult launchMatmul(StringRef name, GroupedMatmulOp op, bool gather, int64_t rowWidth,
                             int64_t resultWidth, Value rows, Value result);
  LogicalResult makeHost();

  Value c32(int64_t v) { return arith::ConstantIntOp::create(b, loc, v, 32); }
  Value c64(int64_t v) { return arith::ConstantIntOp::create(b, loc, v, 64); }
  Type ptr(unsigned space = 0) { return LLVM::LLVMPointerType::get(b.getContext(), space); }
  Value field(Type type, int64_t offset);
  Value global(Value pointer) { return LLVM::AddrSpaceCastOp::create(b, loc, ptr(1), pointer); }
  Value weight(int64_t index);

  func::FuncOp func;
  const Layer &layer;
  OpBuilder b;
  Location loc = func.getLoc();
  gpu::GPUModuleOp kernels;
  Value frame, tokens, slots, count;
  std::array<Value, ScratchCount> scratch;
};

} // namespace

std::array<EntryEmitter::Size, ScratchCount> EntryEmitter::sizes() const {
  std::array<Size, ScratchCount> size;
  size[Rows].perToken = layer.rowWidth() * 2;
  if (layer.router)
    size[Partial].perToken = layer.stage().slices() * layer.routerWeight().panelCount() * 32 * 4;
  if (layer.up) {
    if (layer.dense)
      size[Offsets].fixed = 8;
    size[Pair].perRow = size[Order].perRow = layer.dense ? 0 : 4;
    size[Hidden].perRow = layer.hiddenWidth() * 2;
    size[Products].perRow = layer.productWidth() * 2;
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
  Value rows = layer.dense
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

Value EntryEmitter::weight(int64_t index) {
  Value list = field(ptr(), offsetof(moec_frame, weights));
  Value place = LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), list,
                                    ArrayRef<LLVM::GEPArg>{int32_t(index * 8)});
  return global(LLVM::LoadOp::create(b, loc, ptr(), place));
}

/// One kernel per tile; the number of rows says which is launched.
LogicalResult EntryEmitter::launchMatmul(StringRef name, GroupedMatmulOp op, bool gather,
                                         int64_t rowWidth, int64_t resultWidth, Value rows,
                                         Value result) {
  OpBuilder::InsertionGuard guard(b);
  WeightType type = op.getWeightType();
  Value packed = weight(layer.weightIndex(op.getWeight()));
  SmallVector<Value> args = {rows, scratch[Pair], slots, scratch[Offsets], packed, result};
  if (op.getBias())
    args.push_back(weight(layer.weightIndex(op.getBias())));
  auto tiles = op->getAttrOfType<ArrayAttr>(kGPUTilesAttrName);
  for (auto [i, attr] : llvm::enumerate(tiles.getAsRange<GPUTileAttr>())) {
    GemmKernel spec{attr,
                    type,
                    rowWidth,
                    resultWidth,
                    gather,
                    op.hasEpilogue() ? &op.getEpilogue() : nullptr,
                    bool(op.getBias())};
    bool last = i + 1 == tiles.size();
    if (!last) {
      Value fits =
          arith::CmpIOp::create(b, loc, arith::CmpIPredicate::sle, count, c32(attr.getUpTo()));
      auto choice = scf::IfOp::create(b, loc, fits, /*withElse=*/true);
      b.setInsertionPointToStart(choice.thenBlock());
    }
    // Rows of an expert end in at most one tile that is not full: no more tiles than this exist.
    Value full = arith::DivUIOp::create(b, loc, count, c32(attr.getRows()));
    Value partial = arith::MinUIOp::create(b, loc, count, c32(type.getExperts()));
    Value grid = arith::MulIOp::create(b, loc, arith::AddIOp::create(b, loc, full, partial),
                                       c32(spec.colBlocks()));
    if (failed(launch((name + "_" + Twine(i)).str(), grid, c32(1), attr.getThreads(),
                      attr.getSharedBytes(), args, [&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                        return emitGemm(inner, kernel, spec);
                      })))
      return failure();
    if (!last) {
      auto choice = cast<scf::IfOp>(b.getInsertionBlock()->getParentOp());
      b.setInsertionPointToStart(choice.elseBlock());
    }
  }
  return success();
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
  Value slots64 = layer.dense ? c64(1) : field(i64, offsetof(moec_frame, slots));
  Value any = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::sgt, tokens64, c64(0));
  auto work = scf::IfOp::create(b, loc, any, /*withElse=*/false);
  func::ReturnOp::create(b, loc);
  b.setInsertionPointToStart(work.thenBlock());
  tokens = arith::TruncIOp::create(b, loc, i32, tokens64);
  slots = arith::TruncIOp::create(b, loc, i32, slots64);
  count = arith::MulIOp::create(b, loc, tokens, slots);
  SmallVector<Value> offsets(ScratchCount);
  total(b, tokens64, arith::MulIOp::create(b, loc, tokens64, slots64), offsets);
  Value workspace = field(ptr(), offsetof(moec_frame, workspace));
  for (auto [place, offset] : llvm::zip_equal(scratch, offsets))
    place = global(LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), workspace,
                                       ArrayRef<LLVM::GEPArg>{offset}));
  if (!layer.dense && layer.up)
    scratch[Offsets] = global(field(ptr(), offsetof(moec_frame, offsets)));
  Value ids, weights;
  if (!layer.dense) {
    ids = global(field(ptr(), offsetof(moec_frame, experts)));
    weights = global(field(ptr(), offsetof(moec_frame, expert_weights)));
  }

  // 1. x into rows; with a router also the logits.
  StageKernel stage = layer.stage();
  SmallVector<Value> args = {global(field(ptr(), offsetof(moec_frame, x))),
                             field(i64, offsetof(moec_frame, x_stride)), tokens, scratch[Rows]};
  if (layer.router)
    args.append({weight(layer.weightIndex(layer.routerWeightValue())), scratch[Partial]});
  if (layer.dense)
    args.push_back(scratch[Offsets]);
  auto blocks = [&](Value n, int64_t size) -> Value {
    return arith::DivUIOp::create(b, loc, arith::AddIOp::create(b, loc, n, c32(size - 1)),
                                  c32(size));
  };
  auto fill = [](auto emitter) {
    return [emitter](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
      emitter(inner, kernel);
      return success();
    };
  };
  if (failed(launch(layer.router ? "logits" : "stage", blocks(tokens, kLogitsTokens),
                    c32(stage.slices()), stage.threads(), stage.sharedBytes(), args,
                    fill([&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                      emitStage(inner, kernel, stage);
                    }))))
    return failure();

  // 2. Experts and their weights.
  if (layer.router) {
    SelectKernel select{layer.routerAttr,
                        layer.experts(),
                        layer.routerWeight().panelCount(),
                        stage.slices(),
                        layer.logits,
                        bool(layer.vectors.bias),
                        bool(layer.vectors.selectionBias)};
    SmallVector<Value> args = {scratch[Partial], tokens, weights, ids};
    if (layer.logits)
      args.append({global(field(ptr(), offsetof(moec_frame, logits))),
                   field(i64, offsetof(moec_frame, logits_stride))});
    for (Value vector : {layer.vectors.bias, layer.vectors.selectionBias})
      if (vector)
        args.push_back(weight(layer.weightIndex(vector)));
    if (failed(launch("select", blocks(tokens, kSelectWarps), c32(1), 32 * kSelectWarps, 0, args,
                      fill([&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                        emitSelect(inner, kernel, select);
                      }))))
      return failure();
  }
  if (!layer.up)
    return success();

  // 3. Rows by expert.
  if (!layer.dense &&
      failed(launch("sort", c32(layer.experts()), c32(1), kSortThreads, kSortThreads / 32 * 8,
                    {ids, count, slots, scratch[Offsets], scratch[Pair], scratch[Order]},
                    fill([&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                      emitSort(inner, kernel, layer.experts());
                    }))))
    return failure();

  // 4. and 5. The matmuls.
  if (failed(launchMatmul("up", layer.up, !layer.dense, layer.rowWidth(), layer.hiddenWidth(),
                          scratch[Rows], scratch[Hidden])) ||
      failed(launchMatmul("down", layer.down, false, layer.hiddenWidth(), layer.productWidth(),
                          scratch[Hidden], scratch[Products])))
    return failure();

  // 6. Rows become tokens.
  CombineKernel combine{layer.yType, GroupedMatmulOp(layer.down).getNumCols(), layer.productWidth(),
                        layer.experts(), !layer.dense};
  Value accumulate = c32(0);
  if (GroupedMatmulOp(layer.down).getAccumulate())
    accumulate = arith::TruncIOp::create(b, loc, i32, field(i64, offsetof(moec_frame, accumulate)));
  SmallVector<Value> combineArgs = {scratch[Products],
                                    global(field(ptr(), offsetof(moec_frame, y))),
                                    field(i64, offsetof(moec_frame, y_stride)), accumulate};
  if (!layer.dense)
    combineArgs.append({ids, slots, scratch[Pair], scratch[Order], weights});
  return launch("combine", tokens, c32(1), kCombineThreads, 0, combineArgs,
                fill([&](OpBuilder &inner, LLVM::LLVMFuncOp kernel) {
                  emitCombine(inner, kernel, combine);
                }));
}

LogicalResult EntryEmitter::emit() {
  makeBytesFunction();
  b.setInsertionPoint(func);
  kernels = gpu::GPUModuleOp::create(b, loc, (func.getSymName() + "_kernels").str());
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
