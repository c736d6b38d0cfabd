//===- Codegen.h - LLVM dialect to machine code -----------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// In-process code generation for x86-64: one TargetMachine for all levels, the CPU features are
// attributes of every function. The same input gives the same bytes.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_CODEGEN_H
#define MOE_TARGET_CPU_CODEGEN_H

#include "moe/Target/CPU/ModuleTable.h"

#include "llvm/ADT/SmallVector.h"
#include "llvm/Support/Error.h"

#include <memory>
#include <vector>

namespace llvm {
class LLVMContext;
class Module;
class TargetMachine;
} // namespace llvm

namespace mlir {
class ModuleOp;
namespace moe {

/// What `generateCode` writes.
enum class CodeFormat {
  Object,   ///< ELF relocatable, position independent
  Assembly, ///< text for the GNU assembler
  LLVM,     ///< optimized LLVM IR as text
};

/// The target machine of the output: x86_64-unknown-linux-gnu, PIC, O3, no CPU of its own.
llvm::Expected<std::unique_ptr<llvm::TargetMachine>> createCPUTargetMachine();

/// Translates a module in the LLVM dialect (symbols of the moe dialect may remain and are left out)
/// to LLVM IR with triple and data layout set. With a table, adds `<name>_moec_module` and makes
/// everything else internal.
llvm::Expected<std::unique_ptr<llvm::Module>> translateToLLVM(ModuleOp module,
                                                              llvm::LLVMContext &context,
                                                              llvm::TargetMachine &machine,
                                                              const CodeTable *table);

/// Refuses a function whose CPU attributes do not suffice for what it contains: LLVM would abort
/// the process (AMX without the feature) or silently split registers (512-bit vectors on
/// x86-64-v3).
llvm::Error checkFunctionAttributes(llvm::Module &module, llvm::TargetMachine &machine);

/// Cleans up scalar code: no vectorizer, no unrolling, no inlining.
void optimizeModule(llvm::Module &module, llvm::TargetMachine &machine);

/// Writes object code or assembly. Changes the module.
llvm::Error emitCode(llvm::Module &module, llvm::TargetMachine &machine, CodeFormat format,
                     llvm::SmallVectorImpl<char> &out);

/// Refuses objects that need symbols other than each other's, memset, memcpy and memmove.
llvm::Error checkObjectSymbols(llvm::ArrayRef<llvm::ArrayRef<char>> objects);

/// All of the above: module in the LLVM dialect to bytes.
llvm::Expected<llvm::SmallVector<char, 0>> generateCode(ModuleOp module, const CodeTable *table,
                                                        CodeFormat format);

/// The same as several objects to be linked together, made on as many threads. Functions of one are
/// hidden symbols of the others. How many there are does not depend on the machine.
llvm::Expected<std::vector<llvm::SmallVector<char, 0>>> generateObjects(ModuleOp module,
                                                                        const CodeTable *table);

} // namespace moe
} // namespace mlir

#endif // MOE_TARGET_CPU_CODEGEN_H
