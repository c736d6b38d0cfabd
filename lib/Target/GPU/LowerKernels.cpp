//===- LowerKernels.cpp - kernels and launches to the LLVM dialect --------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Layer.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/Conversion/Passes.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/GPU/IR/GPUDialect.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/IR/SymbolTable.h"
#include "mlir/Pass/PassManager.h"
#include "mlir/Pass/PassRegistry.h"
#include "mlir/Transforms/Passes.h"

#include <cstddef>

#include "moec/module.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOEGPULOWERHOST
#include "moe/Target/GPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

static_assert(offsetof(moec_gpu_launch, kernel) == 8 &&
              offsetof(moec_gpu_launch, shared_bytes) == 12 &&
              offsetof(moec_gpu_launch, grid) == 16 && offsetof(moec_gpu_launch, block) == 28 &&
              offsetof(moec_gpu_launch, arguments) == 40 && sizeof(moec_gpu_launch) == 48 &&
              offsetof(moec_gpu_launcher, launch) == 8);

void mlir::moe::buildLowerGPUKernels(OpPassManager &pm) {
  auto &kernels = pm.nest<gpu::GPUModuleOp>();
  kernels.addPass(createCanonicalizerPass());
  kernels.addPass(createCSEPass());
  kernels.addPass(createSCFToControlFlowPass());
  ConvertToLLVMPassOptions options;
  options.filterDialects = {"arith", "cf", "ub", "vector"};
  kernels.addPass(createConvertToLLVMPass(options));
  kernels.addPass(createReconcileUnrealizedCastsPass());
  kernels.addPass(createCanonicalizerPass());
  kernels.addPass(createCSEPass());
}

void mlir::moe::registerMoEGPUPipelines() {
  PassPipelineRegistration<>("moe-gpu-lower-kernels",
                             "Lower GPU kernels to the LLVM dialect; NVVM operations stay",
                             [](OpPassManager &pm) { buildLowerGPUKernels(pm); });
}

namespace {

class HostLowering {
public:
  HostLowering(func::FuncOp func, ModuleOp module)
      : func(func), module(module), b(func), loc(func.getLoc()) {}
  LogicalResult run();

private:
  LogicalResult lower(gpu::LaunchFuncOp launch);
  Value c32(int64_t v) { return arith::ConstantIntOp::create(b, loc, v, 32); }
  Type ptr() { return LLVM::LLVMPointerType::get(b.getContext()); }
  Value at(Value base, int64_t offset) {
    return LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), base,
                               ArrayRef<LLVM::GEPArg>{int32_t(offset)});
  }
  /// A stack slot that is made once, however often the launch is.
  Value slot(Type type, int64_t count) {
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(&func.getBody().front());
    return LLVM::AllocaOp::create(b, loc, ptr(), type, c32(count), /*alignment=*/8);
  }
  Value name(StringRef text);

  func::FuncOp func;
  ModuleOp module;
  OpBuilder b;
  Location loc;
  Value frame;
};

} // namespace

/// The address of a string that ends in a zero.
Value HostLowering::name(StringRef text) {
  std::string symbol = ("moe_gpu_name_" + text).str();
  auto global = module.lookupSymbol<LLVM::GlobalOp>(symbol);
  if (!global) {
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(module.getBody());
    std::string bytes = text.str() + '\0';
    global = LLVM::GlobalOp::create(b, loc, LLVM::LLVMArrayType::get(b.getI8Type(), bytes.size()),
                                    /*isConstant=*/true, LLVM::Linkage::Internal, symbol,
                                    b.getStringAttr(bytes));
  }
  return LLVM::AddressOfOp::create(b, loc, global);
}

LogicalResult HostLowering::lower(gpu::LaunchFuncOp launch) {
  int64_t number = 0, found = -1;
  LLVM::LLVMFuncOp callee;
  for (auto kernels : module.getOps<gpu::GPUModuleOp>())
    for (auto kernel : kernels.getOps<LLVM::LLVMFuncOp>()) {
      if (kernels.getSymNameAttr() == launch.getKernelModuleName() &&
          kernel.getSymNameAttr() == launch.getKernelName()) {
        found = number;
        callee = kernel;
      }
      ++number;
    }
  if (found < 0)
    return launch.emitOpError("expected a kernel of its module, but got ") << launch.getKernel();
  b.setInsertionPoint(launch);
  auto operands = launch.getKernelOperands();
  Value list = slot(ptr(), operands.size());
  for (auto [i, operand] : llvm::enumerate(operands)) {
    // What is passed by value is where it is.
    Value place = operand;
    if (!callee.getArgAttr(i, LLVM::LLVMDialect::getByValAttrName())) {
      place = slot(operand.getType(), 1);
      LLVM::StoreOp::create(b, loc, operand, place);
    }
    LLVM::StoreOp::create(b, loc, place, at(list, i * 8));
  }
  Value record = slot(b.getI8Type(), sizeof(moec_gpu_launch));
  auto put = [&](Value v, int64_t offset) { LLVM::StoreOp::create(b, loc, v, at(record, offset)); };
  put(name(launch.getKernelName().getValue()), offsetof(moec_gpu_launch, name));
  put(c32(found), offsetof(moec_gpu_launch, kernel));
  put(launch.getDynamicSharedMemorySize(), offsetof(moec_gpu_launch, shared_bytes));
  gpu::KernelDim3 grid = launch.getGridSizeOperandValues();
  gpu::KernelDim3 block = launch.getBlockSizeOperandValues();
  for (auto [i, v] : llvm::enumerate(ArrayRef<Value>{grid.x, grid.y, grid.z}))
    put(v, offsetof(moec_gpu_launch, grid) + i * 4);
  for (auto [i, v] : llvm::enumerate(ArrayRef<Value>{block.x, block.y, block.z}))
    put(v, offsetof(moec_gpu_launch, block) + i * 4);
  put(list, offsetof(moec_gpu_launch, arguments));
  Value launcher = LLVM::LoadOp::create(b, loc, ptr(), at(frame, offsetof(moec_frame, launcher)));
  Value self = LLVM::LoadOp::create(b, loc, ptr(), launcher);
  Value function =
      LLVM::LoadOp::create(b, loc, ptr(), at(launcher, offsetof(moec_gpu_launcher, launch)));
  auto type = LLVM::LLVMFunctionType::get(LLVM::LLVMVoidType::get(b.getContext()), {ptr(), ptr()});
  LLVM::CallOp::create(b, loc, type, ValueRange{function, self, record});
  launch.erase();
  return success();
}

LogicalResult HostLowering::run() {
  // A stage as those of the CPU: (frame, lane, lanes). One lane enqueues everything.
  for (Type type : {b.getI32Type(), b.getI32Type()})
    if (failed(func.insertArgument(func.getNumArguments(), type, DictionaryAttr(), loc)))
      return failure();
  frame = func.getArgument(0);
  StringAttr entry = func.getSymNameAttr();
  func.setSymName((entry.getValue() + "_stage0").str());
  CodeOp::create(b, loc, entry, b.getArrayAttr({FlatSymbolRefAttr::get(func)}),
                 FlatSymbolRefAttr::get(b.getStringAttr(entry.getValue() + "_workspace_bytes")));
  func->setAttr("stage", b.getStringAttr("launch"));
  SmallVector<gpu::LaunchFuncOp> launches;
  func.walk([&](gpu::LaunchFuncOp launch) { launches.push_back(launch); });
  for (gpu::LaunchFuncOp launch : launches)
    if (failed(lower(launch)))
      return failure();
  return success();
}

/// Appends the kernels of a gpu.module in their order, with what every launch of them has in
/// common.
static void listKernels(gpu::GPUModuleOp kernels, SmallVector<Attribute> &list) {
  Builder b(kernels.getContext());
  for (auto kernel : kernels.getOps<LLVM::LLVMFuncOp>()) {
    auto threads =
        kernel->getAttrOfType<DenseI32ArrayAttr>(NVVM::NVVMDialect::getReqntidAttrName());
    auto shared = kernel->getAttrOfType<IntegerAttr>(kSharedBytesAttrName);
    list.push_back(b.getDictionaryAttr(
        {b.getNamedAttr("name", kernel.getSymNameAttr()),
         b.getNamedAttr("level", kernels->getAttr(kLevelAttrName)),
         b.getNamedAttr("threads", b.getI64IntegerAttr(threads[0])),
         b.getNamedAttr("shared", b.getI64IntegerAttr(shared ? shared.getInt() : 0))}));
  }
}

namespace {
struct LowerHostPass : public mlir::moe::impl::MoEGPULowerHostBase<LowerHostPass> {
  void runOnOperation() override {
    for (auto func : llvm::to_vector(getOperation().getOps<func::FuncOp>())) {
      auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
      if (target && target.getDevice() == Device::CUDA &&
          failed(HostLowering(func, getOperation()).run()))
        return signalPassFailure();
    }
    SmallVector<Attribute> list;
    for (auto kernels : getOperation().getOps<gpu::GPUModuleOp>())
      if (kernels->hasAttr(kLevelAttrName))
        listKernels(kernels, list);
    if (!list.empty())
      getOperation()->setAttr(kKernelsAttrName, ArrayAttr::get(&getContext(), list));
  }
};
} // namespace
