//===- CompileModule.h - from a spec or moe IR to code ----------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_COMPILEMODULE_H
#define MOEC_TOOL_COMPILEMODULE_H

#include "moe/Spec/ModelSpec.h"
#include "moe/Support/Machine.h"
#include "moe/Target/CPU/Codegen.h"
#include "moe/Target/CPU/ModuleTable.h"

#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/MLIRContext.h"
#include "mlir/IR/OwningOpRef.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace mlir::moe {
struct Phase;
struct PipelineOptions;
} // namespace mlir::moe

namespace moec::tool {

/// What the options say about the pipeline.
struct PipelineChoice {
  std::vector<std::string> levels; ///< "x86-64-v3", …: by rising rank
  std::vector<std::string> gpus;   ///< "sm_80", …: cubins to make; empty: code for CPUs
  std::string from, to;            ///< phases; empty: the first, the last
  std::string dumpFolder;          ///< --dump-phases
  std::string strategyFile;        ///< --strategy
  std::vector<std::pair<std::string, int64_t>> core; ///< of --machine, as PipelineOptions::core
  std::vector<std::string> disabledPasses;
  bool remarks = false;
};

/// E-ARGUMENT for an unknown phase or pass, E-TARGET for a level that cannot be emitted.
llvm::Error checkPipelineChoice(const PipelineChoice &choice);

/// --cpu: "native", "multi" or names of levels. "native" is the best level of `machine`, else of
/// this machine.
llvm::Expected<std::vector<std::string>> parseLevels(llvm::StringRef text,
                                                     const MachineConstants *machine = nullptr);

/// The levels of code for such names, by rising rank: `sm_90` runs that of `sm_80`.
std::vector<std::string> gpuLevels(llvm::ArrayRef<std::string> gpus);

/// --gpu of commands that open a library: a level, or empty; only where it is opened on a GPU.
llvm::Error checkGPULevel(llvm::StringRef level, bool cuda);

/// --gpu: names of architectures, by rising number.
llvm::Expected<std::vector<std::string>> parseGPUs(llvm::StringRef text);

/// The last phase that leaves IR behind: `export` is past all of it.
const mlir::moe::Phase *lastIRPhase();

/// The same as the pipeline takes it, with the schedule of `strategyFile`.
llvm::Expected<mlir::moe::PipelineOptions> pipelineOptions(const PipelineChoice &choice);

/// The `moe-opt` command of every phase.
llvm::Expected<std::string> pipelineText(const PipelineChoice &choice);

/// What --dry-run prints: layers, sizes, time, memory and disk of a compilation into `output`.
/// `tensors`: how many the checkpoint has.
std::string planText(const ModelSpec &spec, const PipelineChoice &pipeline, unsigned threads,
                     bool packs, uint64_t tensors, llvm::StringRef output);

/// A module and its way through the phases.
class ModuleCompiler {
public:
  ModuleCompiler();
  ~ModuleCompiler();

  /// Makes moe IR of a checked spec.
  llvm::Error import(const ModelSpec &spec);
  /// Reads moe IR. `from`: the phase after which it was printed ("" : what its first line says,
  /// else import).
  llvm::Error parse(llvm::StringRef path, std::string &from);
  /// The spec that the module carries, or the one that its operations say.
  llvm::Expected<ModelSpec> spec();
  /// Runs the phases that `choice` names.
  llvm::Error runPhases(const PipelineChoice &choice);
  /// The IR as text, with a first line that names version and phase.
  std::string text() const;
  /// The table of the code, ids filled in.
  llvm::Expected<mlir::moe::CodeTable> table(const ModelSpec &spec, bool needCode);
  /// After phase `codegen` for a GPU: adds the kernels to the table, as PTX and as a cubin for each
  /// of `gpus`. Files are made in folder `scratch`.
  llvm::Error addImages(mlir::moe::CodeTable &table, llvm::ArrayRef<std::string> gpus,
                        llvm::StringRef scratch);
  llvm::Expected<llvm::SmallVector<char, 0>> code(const mlir::moe::CodeTable &table,
                                                  mlir::moe::CodeFormat format);
  /// Objects that linked together are the code, made on several threads.
  llvm::Expected<std::vector<llvm::SmallVector<char, 0>>>
  objects(const mlir::moe::CodeTable &table);
  /// The strategies chosen, as the `strategy` section of a manifest.
  llvm::json::Value strategies() const;
  /// Why each of them was chosen: a sentence for every matmul of every function.
  llvm::json::Value reasons() const;

private:
  struct Impl;
  std::unique_ptr<Impl> impl;
};

} // namespace moec::tool

#endif // MOEC_TOOL_COMPILEMODULE_H
