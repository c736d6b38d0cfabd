//===- Phases.h - the phases of the compiler --------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A phase is a named stretch of the pipeline. Between two phases the IR is verified, can be printed
// and can be read again: every phase is a door to enter or leave by.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_PIPELINES_PHASES_H
#define MOE_PIPELINES_PHASES_H

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"
#include "llvm/Support/Error.h"

#include <functional>
#include <string>
#include <vector>

namespace mlir {
class ModuleOp;
class OpPassManager;
namespace moe {

/// Choices that phases read.
struct PipelineOptions {
  std::vector<std::string> levels;         ///< CPU levels; empty: every level that is built
  std::vector<std::string> gpuLevels;      ///< "sm_80": code for GPUs; empty: for CPUs
  std::vector<std::string> types;          ///< types of x and y; empty: f32 and bf16
  std::vector<std::string> disabledPasses; ///< names of optional passes that are left out
  std::string strategyText;                ///< JSON of moe-select-strategy; empty: none
  /// Options of moe-select-strategy that describe a core ("l2-bytes"); those that are not there,
  /// the level assumes.
  std::vector<std::pair<std::string, int64_t>> core;
  bool verifyEach = true; ///< verify after every pass
  bool isGPU() const { return !gpuLevels.empty(); }
  /// Called with the name of every phase that has run and the module after it.
  std::function<llvm::Error(llvm::StringRef phase, ModuleOp module)> afterPhase;
};

/// One phase. `import` and `export` have no passes: they are the driver's.
struct Phase {
  llvm::StringRef name;     ///< "fuse"
  llvm::StringRef sentence; ///< what is true after it
  /// The passes as text, without the enclosing builtin.module(...).
  std::string (*passes)(const PipelineOptions &options);
};

/// All phases in their order: import, canonical, fuse, target, strategy, bufferize, tile, kernels,
/// outline, codegen, export.
llvm::ArrayRef<Phase> phases();

/// The phase of that name, or null.
const Phase *findPhase(llvm::StringRef name);

/// Passes that can be left out: the results are the same numbers from other code.
llvm::ArrayRef<llvm::StringRef> optionalPasses();

/// The text for `moe-opt --pass-pipeline=`: "builtin.module(...)". Empty for a phase without
/// passes.
std::string phasePipeline(const Phase &phase, const PipelineOptions &options);

/// Registers every pass that phases use. May be called more than once.
void registerPhasePasses();

/// Runs the phases `from` to `to`, both included. Errors: E-ARGUMENT for an unknown phase, an order
/// that runs backwards, or a pass that cannot be left out; else the failing phase and pass with its
/// diagnostics (E-TARGET in `target`, E-ARGUMENT in `strategy`, E-INTERNAL elsewhere).
llvm::Error runPhases(ModuleOp module, llvm::StringRef from, llvm::StringRef to,
                      const PipelineOptions &options);

} // namespace moe
} // namespace mlir

#endif // MOE_PIPELINES_PHASES_H
