//===- Arch.cpp - GPU architectures ---------------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Target/GPU/Arch.h"

using namespace mlir::moe;

// A100 SXM: 108 processors, 1.41 GHz, 312 TFLOP/s bf16, 1.56 TB/s memory. H100 SXM: 132
// processors, 1.83 GHz, 3.35 TB/s. 64 bytes from L2 per processor and cycle are the width of the
// path; what is reached is nearer 40.
static const GPUArch archs[] = {
    {"sm_80", 80, true, "", 108, 164 * 1024, 1024, 40, 10.2, 800},
    {"sm_90a", 90, true, "", 132, 228 * 1024, 2048, 40, 13.9, 1000},
};

llvm::ArrayRef<GPUArch> mlir::moe::gpuArchs() { return archs; }

const GPUArch *mlir::moe::findGPUArch(llvm::StringRef name) {
  for (const GPUArch &arch : archs)
    if (arch.name == name)
      return &arch;
  return nullptr;
}

std::string mlir::moe::implementedArchNames() {
  std::string names;
  for (const GPUArch &arch : archs)
    if (arch.implemented)
      names += (names.empty() ? "`" : ", `") + arch.name.str() + "`";
  return names;
}

llvm::ArrayRef<llvm::StringRef> mlir::moe::assembledArchNames() {
  static const llvm::StringRef names[] = {"sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a"};
  return names;
}

llvm::StringRef mlir::moe::gpuLevelOf(llvm::StringRef assembled) {
  return assembled == "sm_90a" ? "sm_90a" : "sm_80";
}
