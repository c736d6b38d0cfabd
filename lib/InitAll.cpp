//===- InitAll.cpp - every dialect and pass of moec -----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/InitAll.h"
#include "moe/Conversion/MoEToLoops/MoEToLoops.h"
#include "moe/Dialect/MoE/IR/MoEDialect.h"
#include "moe/Dialect/MoE/Transforms/BufferizableOpInterfaceImpl.h"
#include "moe/Dialect/MoE/Transforms/Passes.h"
#include "moe/Target/CPU/Passes.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/IR/DialectRegistry.h"
#include "mlir/InitAllDialects.h"
#include "mlir/InitAllExtensions.h"
#include "mlir/InitAllPasses.h"
#include "mlir/Target/LLVMIR/Dialect/All.h"

void mlir::moe::registerAllDialects(DialectRegistry &registry) {
  ::mlir::registerAllDialects(registry);
  ::mlir::registerAllExtensions(registry);
  ::mlir::registerAllToLLVMIRTranslations(registry);
  registry.insert<MoEDialect>();
  registerBufferizableOpInterfaceExternalModels(registry);
}

void mlir::moe::registerAllPasses() {
  ::mlir::registerAllPasses();
  registerMoEPasses();
  registerMoECPUPasses();
  registerMoEGPUPasses();
  registerMoEGPUPipelines();
  registerMoEToLoopsPasses();
}
