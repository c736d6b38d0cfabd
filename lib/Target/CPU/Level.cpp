//===- Level.cpp - CPU feature levels -------------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Target/CPU/Level.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "llvm/ADT/STLExtras.h"

using namespace mlir;
using namespace mlir::moe;

// The features of a level are those of its CPU name and the named ones. The two last levels differ
// from x86-64-v4 in the products of bf16 rows with bf16 weights alone.
static const CPULevel levels[] = {
    {"x86-64-v3", "v3", 30, "x86-64-v3", "", 256, 16, true, "", false},
    {"x86-64-v4", "v4", 40, "x86-64-v4", "", 512, 32, true, "", false},
    {"avx512-bf16", "bf16", 50, "x86-64-v4", "+avx512bf16", 512, 32, true, "", true},
    {"amx-bf16", "amx", 60, "x86-64-v4", "+avx512bf16,+amx-tile,+amx-bf16", 512, 32, true, "", true,
     true},
};

ArrayRef<CPULevel> mlir::moe::cpuLevels() { return levels; }

const CPULevel *mlir::moe::findCPULevel(StringRef name) {
  for (const CPULevel &level : levels)
    if (level.name == name)
      return &level;
  return nullptr;
}

std::string mlir::moe::implementedLevelNames() {
  std::string names;
  for (const CPULevel &level : levels) {
    if (!level.implemented)
      continue;
    if (!names.empty())
      names += ", ";
    names += "`" + level.name.str() + "`";
  }
  return names;
}

void mlir::moe::setTargetAttributes(Operation *func, const CPULevel &level) {
  MLIRContext *context = func->getContext();
  func->setAttr("target_cpu", StringAttr::get(context, level.targetCPU));
  if (!level.features.empty()) {
    SmallVector<StringRef> features;
    level.features.split(features, ',');
    func->setAttr("target_features", LLVM::TargetFeaturesAttr::get(context, features));
  }
  // Without it LLVM may split 512-bit vectors on CPUs that it believes prefer 256 bits.
  func->setAttr("prefer_vector_width", StringAttr::get(context, std::to_string(level.vectorBits)));
}
