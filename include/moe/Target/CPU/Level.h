//===- Level.h - CPU feature levels -----------------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A level is a named CPU feature set for which all code of an entry is cloned. The best level that
// the machine can run is chosen when a library is opened.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_LEVEL_H
#define MOE_TARGET_CPU_LEVEL_H

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"

#include <cstdint>
#include <string>

namespace mlir {
class Operation;
namespace moe {

/// One CPU feature set.
struct CPULevel {
  llvm::StringRef name;      ///< "x86-64-v4"
  llvm::StringRef suffix;    ///< "v4": ends of symbol names
  int32_t rank;              ///< higher is better
  llvm::StringRef targetCPU; ///< LLVM's name of a CPU with just these features
  llvm::StringRef features;  ///< features beyond it, "+avx512bf16"
  unsigned vectorBits;       ///< width of the registers that kernels use
  unsigned vectorRegisters;  ///< how many there are
  bool implemented;          ///< false: the name is known, `refusal` says why it is not emitted
  llvm::StringRef refusal;   ///< one sentence; empty where implemented
  bool bf16Products;         ///< rows of bf16 times weights of bf16 are products of bf16 pairs
  bool tiles = false;        ///< ... on tiles (AMX), where not by vector instructions

  /// f32 elements of one register: 8 or 16.
  unsigned lanes() const { return vectorBits / 32; }
};

/// Every known level, by rising rank.
llvm::ArrayRef<CPULevel> cpuLevels();

/// The level of that name, or null.
const CPULevel *findCPULevel(llvm::StringRef name);

/// "`x86-64-v3`, `x86-64-v4`, `avx512-bf16`": the implemented ones, for messages.
std::string implementedLevelNames();

/// Writes the attributes on a func.func or llvm.func that make LLVM emit code for `level`
/// (`target_cpu`, `target_features`, `prefer_vector_width`). Functions that call each other must
/// have equal levels.
void setTargetAttributes(Operation *func, const CPULevel &level);

} // namespace moe
} // namespace mlir

#endif // MOE_TARGET_CPU_LEVEL_H
