//===- MergeKernels.cpp - one gpu.module for all entries ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Kernels/Kernels.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/SymbolTable.h"
#include "llvm/ADT/StringMap.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOEGPUEMITCALLKERNELS
#define GEN_PASS_DEF_MOEGPUMERGEKERNELS
#include "moe/Target/GPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

static constexpr llvm::StringLiteral kModuleName = "kernels";

/// The kernel as text without its name: equal texts are equal kernels.
static std::string textOf(LLVM::LLVMFuncOp kernel) {
  StringAttr name = kernel.getSymNameAttr();
  kernel.setSymName("kernel");
  std::string text;
  llvm::raw_string_ostream os(text);
  kernel->print(os, OpPrintingFlags().useLocalScope());
  kernel.setSymNameAttr(name);
  return text;
}

namespace {

struct EmitCallKernelsPass
    : public mlir::moe::impl::MoEGPUEmitCallKernelsBase<EmitCallKernelsPass> {
  void runOnOperation() override {
    ModuleOp module = getOperation();
    if (module.getOps<gpu::GPUModuleOp>().empty())
      return;
    OpBuilder b = OpBuilder::atBlockEnd(module.getBody());
    auto kernels = gpu::GPUModuleOp::create(b, module.getLoc(), "call_kernels");
    declareShared(kernels);
    emitCallKernels(kernels);
  }
};

struct MergeKernelsPass : public mlir::moe::impl::MoEGPUMergeKernelsBase<MergeKernelsPass> {
  void runOnOperation() override {
    ModuleOp module = getOperation();
    auto parts = llvm::to_vector(module.getOps<gpu::GPUModuleOp>());
    if (parts.empty())
      return;
    OpBuilder b(parts.front());
    auto merged = gpu::GPUModuleOp::create(b, module.getLoc(), kModuleName);
    declareShared(merged);
    llvm::StringMap<StringAttr> known; // by text: the name of the kernel that is kept
    DenseMap<SymbolRefAttr, SymbolRefAttr> places;
    auto place = [&](gpu::GPUModuleOp part, StringAttr kernel) {
      return SymbolRefAttr::get(part.getSymNameAttr(), {FlatSymbolRefAttr::get(kernel)});
    };
    for (gpu::GPUModuleOp part : parts) {
      StringRef prefix = part.getName();
      prefix.consume_back("_kernels");
      for (auto kernel : llvm::to_vector(part.getOps<LLVM::LLVMFuncOp>())) {
        SymbolRefAttr before = place(part, kernel.getSymNameAttr());
        auto [kept, isNew] = known.try_emplace(textOf(kernel));
        if (isNew) {
          kept->second = b.getStringAttr(prefix + "_" + kernel.getSymName());
          kernel->remove();
          merged.getBody()->push_back(kernel);
          kernel.setSymNameAttr(kept->second);
        }
        places[before] = place(merged, kept->second);
      }
    }
    module.walk(
        [&](gpu::LaunchFuncOp launch) { launch.setKernelAttr(places.lookup(launch.getKernel())); });
    for (gpu::GPUModuleOp part : parts)
      part.erase();
  }
};

} // namespace
