//===- SimtCode.h - machine code for the SIMT executor ----------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TEST_GPU_SIMTCODE_H
#define MOE_TEST_GPU_SIMTCODE_H

#include "mlir/IR/BuiltinOps.h"
#include "llvm/ExecutionEngine/Orc/LLJIT.h"
#include "llvm/Support/Error.h"

#include <memory>
#include <string>

namespace mlir::moe {

/// Functions that were compiled for this process.
struct SimtCode {
  std::unique_ptr<llvm::orc::LLJIT> jit;
  llvm::Expected<void *> find(const std::string &name);
};

/// Compiles a module in the LLVM dialect whose kernels went through moe-gpu-to-simt.
llvm::Expected<SimtCode> compileForSimt(ModuleOp module);

} // namespace mlir::moe

#endif // MOE_TEST_GPU_SIMTCODE_H
