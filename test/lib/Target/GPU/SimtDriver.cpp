//===- SimtDriver.cpp - the SIMT executor behind the driver's stub --------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A library that runs what is launched through the stub of the CUDA driver (test/Runtime), so that
// a compiled model runs through the C interface as on a GPU. Kernels come from the IR that
// `moec compile --target cuda --dump-phases` writes after the phase `kernels`.
//
//===----------------------------------------------------------------------===//

#include "SimtCode.h"

#include "../../../Runtime/cuda_stub.h"
#include "moe/InitAll.h"
#include "moe/Target/GPU/Passes.h"
#include "moe/Target/GPU/Simt.h"

#include "mlir/Dialect/GPU/IR/GPUDialect.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Parser/Parser.h"
#include "mlir/Pass/PassManager.h"

#include <map>
#include <optional>

using namespace mlir;
using namespace mlir::moe;

namespace {
struct Driver {
  std::optional<SimtCode> code;
  std::map<std::string, std::vector<uint32_t>> sizes; ///< of the arguments of kernels
  std::map<std::string, std::string> modules;         ///< of kernels; call kernels are in several
  std::map<uint64_t, size_t> memory;
  std::unique_ptr<simt::Machine> machine; ///< null: memory has changed
  simt::Options options;
  std::string error;
  uint64_t launches = 0;
};
} // namespace

static Driver &driver() {
  static Driver *only = new Driver; // never destroyed: code of it may run until the end
  return *only;
}

static void changeMemory(uint64_t begin, size_t bytes) {
  if (bytes)
    driver().memory[begin] = bytes;
  else
    driver().memory.erase(begin);
  driver().machine.reset();
}

static int launchKernel(const char *kernel, const uint32_t grid[3], const uint32_t block[3],
                        uint32_t shared, void *const *arguments) {
  constexpr int launchFailed = 719;
  Driver &d = driver();
  if (!d.code || !d.error.empty())
    return launchFailed;
  if (!d.machine) {
    d.options.maxShared = 232448; // the stub knows what its device has
    d.machine = std::make_unique<simt::Machine>(d.options);
    // What is written where is not followed here: the stub fills new memory with NaN.
    for (auto [begin, bytes] : d.memory)
      d.machine->addRegion(reinterpret_cast<const void *>(begin), bytes, "device memory", true,
                           false);
  }
  auto function = d.code->find(d.modules[kernel] + "_" + kernel + "_simt");
  if (!function) {
    d.error = llvm::toString(function.takeError());
    return launchFailed;
  }
  moec_gpu_launch launch = {
      kernel, 0, shared, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, arguments};
  ++d.launches;
  if (d.machine->launch(reinterpret_cast<void (*)(void *const *)>(*function), launch))
    return 0;
  d.error = d.machine->error();
  return launchFailed;
}

static const uint32_t *argumentSizes(const char *kernel, uint32_t *count) {
  auto found = driver().sizes.find(kernel);
  *count = found == driver().sizes.end() ? 0 : uint32_t(found->second.size());
  return *count ? found->second.data() : nullptr;
}

static int makeMap(const moec_gpu_map *view, void *map) {
  constexpr int invalidValue = 1;
  std::string error = simt::encodeTensorMap(*view, map);
  if (!error.empty() && driver().error.empty())
    driver().error = error;
  return error.empty() ? 0 : invalidValue;
}

#define API extern "C" __attribute__((visibility("default")))

/// Compiles the kernels in the file. False: moe_simt_error() says why.
API bool moe_simt_load(const char *path) {
  DialectRegistry registry;
  moe::registerAllDialects(registry);
  MLIRContext context(registry);
  auto module = parseSourceFile<ModuleOp>(path, &context);
  if (!module) {
    driver().error = std::string("expected IR in ") + path;
    return false;
  }
  for (Operation &op : llvm::make_early_inc_range(*module->getBody()))
    if (!isa<gpu::GPUModuleOp>(op))
      op.erase();
  module->walk([](LLVM::LLVMFuncOp kernel) {
    std::vector<uint32_t> &sizes = driver().sizes[kernel.getSymName().str()];
    sizes.clear();
    driver().modules[kernel.getSymName().str()] =
        kernel->getParentOfType<gpu::GPUModuleOp>().getName().str();
    for (auto [i, type] : llvm::enumerate(kernel.getArgumentTypes())) {
      bool map = bool(kernel.getArgAttr(i, LLVM::LLVMDialect::getByValAttrName()));
      sizes.push_back(map                                ? 128
                      : isa<LLVM::LLVMPointerType>(type) ? 8
                                                         : type.getIntOrFloatBitWidth() / 8);
    }
  });
  // Not by name: the registry of passes may be that of a compiler in this process.
  PassManager pm(&context);
  buildLowerGPUKernels(pm);
  pm.addPass(createMoEGPUToSimt());
  if (failed(pm.run(*module))) {
    driver().error = "expected kernels that can be lowered";
    return false;
  }
  auto code = compileForSimt(*module);
  if (!code) {
    driver().error = llvm::toString(code.takeError());
    return false;
  }
  driver().code.emplace(std::move(*code));
  return true;
}

/// order: 0 forward, 1 reverse, 2 shuffled by `seed`.
API void moe_simt_order(int order, uint64_t seed, bool earlyCopies) {
  driver().options.order = static_cast<simt::Order>(order);
  driver().options.seed = seed;
  driver().options.earlyCopies = earlyCopies;
  driver().machine.reset();
}

API const stub_hooks *moe_simt_hooks() {
  static const stub_hooks hooks = {changeMemory, launchKernel, argumentSizes, makeMap};
  return &hooks;
}

/// Empty, or what went wrong first.
API const char *moe_simt_error() { return driver().error.c_str(); }
API uint64_t moe_simt_launches() { return driver().launches; }
