//===- MergeKernels.cpp - one gpu.module for all entries ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Layer.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/SymbolTable.h"
#include "llvm/ADT/MapVector.h"
#include "llvm/ADT/StringMap.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOEGPUEMITCALLKERNELS
#define GEN_PASS_DEF_MOEGPUMERGEKERNELS
#include "moe/Target/GPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

/// The levels of the kernels of a module, in their order, with the gpu.modules of each.
static llvm::MapVector<StringAttr, SmallVector<gpu::GPUModuleOp>> partsByLevel(ModuleOp module) {
  llvm::MapVector<StringAttr, SmallVector<gpu::GPUModuleOp>> levels;
  for (auto part : module.getOps<gpu::GPUModuleOp>())
    if (auto level = part->getAttrOfType<StringAttr>(kLevelAttrName))
      levels[level].push_back(part);
  return levels;
}

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
    OpBuilder b = OpBuilder::atBlockEnd(module.getBody());
    for (auto &[level, parts] : partsByLevel(module)) {
      auto kernels =
          gpu::GPUModuleOp::create(b, module.getLoc(), ("call_kernels_" + level.getValue()).str());
      kernels->setAttr(kLevelAttrName, level);
      declareShared(kernels);
      emitCallKernels(kernels);
    }
  }
};

struct MergeKernelsPass : public mlir::moe::impl::MoEGPUMergeKernelsBase<MergeKernelsPass> {
  void runOnOperation() override {
    DenseMap<SymbolRefAttr, SymbolRefAttr> places;
    auto levels = partsByLevel(getOperation());
    for (auto &[level, parts] : levels)
      merge(level, parts, places);
    getOperation().walk(
        [&](gpu::LaunchFuncOp launch) { launch.setKernelAttr(places.lookup(launch.getKernel())); });
    for (auto &[level, parts] : levels)
      for (gpu::GPUModuleOp part : parts)
        part.erase();
  }

private:
  /// `places` is where kernels were, and where they are now.
  void merge(StringAttr level, ArrayRef<gpu::GPUModuleOp> parts,
             DenseMap<SymbolRefAttr, SymbolRefAttr> &places) {
    OpBuilder b(parts.front());
    auto merged = gpu::GPUModuleOp::create(b, getOperation().getLoc(), kernelsModuleName(level));
    merged->setAttr(kLevelAttrName, level);
    declareShared(merged);
    llvm::StringMap<StringAttr> known; // by text: the name of the kernel that is kept
    auto place = [&](gpu::GPUModuleOp part, StringAttr kernel) {
      return SymbolRefAttr::get(part.getSymNameAttr(), {FlatSymbolRefAttr::get(kernel)});
    };
    for (gpu::GPUModuleOp part : parts) {
      StringRef prefix = part.getName().rsplit("_kernels").first;
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
  }
};

} // namespace
