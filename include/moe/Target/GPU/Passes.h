//===- Passes.h - passes of the GPU target ----------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_GPU_PASSES_H
#define MOE_TARGET_GPU_PASSES_H

#include "mlir/Pass/Pass.h"
#include "llvm/ADT/StringRef.h"

#include <memory>
#include <string>

namespace mlir {
class OpPassManager;
namespace moe {

#define GEN_PASS_DECL
#include "moe/Target/GPU/Passes.h.inc"

#define GEN_PASS_REGISTRATION
#include "moe/Target/GPU/Passes.h.inc"

/// On a module after moe-gpu-lower-host: its kernels, [{name, level, threads, shared}, ...], those
/// of a level one after another.
inline constexpr llvm::StringLiteral kKernelsAttrName = "moe.gpu_kernels";
/// The gpu.module with all kernels of a level: "kernels_sm_80".
inline std::string kernelsModuleName(llvm::StringRef level) { return ("kernels_" + level).str(); }
/// On a kernel: dynamic shared memory of a block, in bytes.
inline constexpr llvm::StringLiteral kSharedBytesAttrName = "shared_bytes";

/// Appends the lowering of the kernels (scf, vector, arith in gpu.module) to the LLVM dialect;
/// NVVM operations stay.
void buildLowerGPUKernels(OpPassManager &pm);

/// Registers `moe-gpu-lower-kernels`, the pipeline above.
void registerMoEGPUPipelines();

} // namespace moe
} // namespace mlir

#endif // MOE_TARGET_GPU_PASSES_H
