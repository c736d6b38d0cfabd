//===- Passes.h - passes of the CPU target ----------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_PASSES_H
#define MOE_TARGET_CPU_PASSES_H

#include "mlir/Pass/Pass.h"

#include <memory>

namespace mlir {
class OpPassManager;
namespace moe {

#define GEN_PASS_DECL
#include "moe/Target/CPU/Passes.h.inc"

#define GEN_PASS_REGISTRATION
#include "moe/Target/CPU/Passes.h.inc"

/// Appends the lowering of outlined stages (scf, vector, memref, arith, func, LLVM) to the LLVM
/// dialect.
void buildLowerToLLVM(OpPassManager &pm);

} // namespace moe
} // namespace mlir

#endif // MOE_TARGET_CPU_PASSES_H
