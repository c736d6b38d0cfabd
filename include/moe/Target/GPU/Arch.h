//===- Arch.h - GPU architectures -------------------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_GPU_ARCH_H
#define MOE_TARGET_GPU_ARCH_H

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"

#include <cstdint>
#include <string>

namespace mlir::moe {

/// One GPU architecture, with the numbers that the cost model reads. They describe the first chip
/// of the architecture and only rank tiles against each other.
struct GPUArch {
  llvm::StringRef name;       ///< "sm_80"
  int32_t rank;               ///< higher is newer
  bool implemented;           ///< false: the name is known, `refusal` says why it is not emitted
  llvm::StringRef refusal;    ///< one sentence; empty where implemented
  int64_t processors;         ///< streaming multiprocessors
  int64_t sharedPerProcessor; ///< bytes of shared memory of one processor
  double mmaPerCycle;         ///< bf16 multiply-adds per processor and cycle
  double l2PerCycle;          ///< bytes from L2 per processor and cycle
  double memoryPerCycle;      ///< bytes from memory per processor and cycle
  double latency;             ///< cycles from asking memory to having it, while others ask too
};

/// Every known architecture, by rising rank.
llvm::ArrayRef<GPUArch> gpuArchs();

/// The architecture of that name, or null.
const GPUArch *findGPUArch(llvm::StringRef name);

/// "`sm_80`": the implemented ones, for messages.
std::string implementedArchNames();

/// "sm_80", "sm_86", ..., "sm_90a": what machine code can be assembled for.
llvm::ArrayRef<llvm::StringRef> assembledArchNames();

/// The architecture whose kernels are assembled for such a name, the level of its code: `sm_90a`
/// has its own, the others run those of `sm_80`.
llvm::StringRef gpuLevelOf(llvm::StringRef assembled);

} // namespace mlir::moe

#endif // MOE_TARGET_GPU_ARCH_H
