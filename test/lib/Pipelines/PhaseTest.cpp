//===- PhaseTest.cpp - run phases and generate code -----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The doors of the compiler without the driver: enter at a phase, leave at a phase, print a phase's
// pipeline, write code.
//
//===----------------------------------------------------------------------===//

#include "moe/InitAll.h"
#include "moe/Pipelines/Phases.h"
#include "moe/Support/Error.h"
#include "moe/Target/CPU/Codegen.h"
#include "moe/Target/CPU/ModuleTable.h"

#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/MLIRContext.h"
#include "mlir/Parser/Parser.h"
#include "llvm/Support/CommandLine.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/ToolOutputFile.h"

using namespace mlir;
using namespace mlir::moe;
namespace cl = llvm::cl;

static cl::opt<std::string> input(cl::Positional, cl::desc("<input .mlir>"), cl::init("-"));
static cl::opt<std::string> output("o", cl::desc("output file"), cl::init("-"));
static cl::opt<std::string> from("from", cl::desc("first phase"), cl::init("canonical"));
static cl::opt<std::string> to("to", cl::desc("last phase; empty: none"), cl::init("codegen"));
static cl::opt<std::string> emit("emit", cl::desc("mlir, obj, asm or llvm"), cl::init("mlir"));
static cl::list<std::string> levels("levels", cl::CommaSeparated, cl::desc("CPU levels"));
static cl::list<std::string> types("types", cl::CommaSeparated, cl::desc("types of x and y"));
static cl::list<std::string> disabled("disable-pass", cl::CommaSeparated, cl::desc("passes"));
static cl::opt<std::string> strategy("strategy", cl::desc("JSON of strategy overrides"));
static cl::opt<bool> list("list", cl::desc("print names and sentences of all phases"));
static cl::opt<std::string> printPipeline("print-pipeline", cl::desc("print a phase's pipeline"));

static int fail(llvm::Error error) {
  llvm::errs() << llvm::toString(std::move(error)) << "\n";
  return 1;
}

int main(int argc, char **argv) {
  cl::ParseCommandLineOptions(argc, argv, "runs phases of moec\n");
  PipelineOptions options;
  options.levels.assign(levels.begin(), levels.end());
  options.types.assign(types.begin(), types.end());
  options.disabledPasses.assign(disabled.begin(), disabled.end());
  options.strategyText = strategy;
  if (list) {
    for (const Phase &phase : phases())
      llvm::outs() << phase.name << ": " << phase.sentence << "\n";
    return 0;
  }
  if (!printPipeline.empty()) {
    const Phase *phase = findPhase(printPipeline);
    if (!phase)
      return 1;
    llvm::outs() << phasePipeline(*phase, options) << "\n";
    return 0;
  }
  DialectRegistry registry;
  mlir::moe::registerAllDialects(registry);
  MLIRContext context(registry, MLIRContext::Threading::DISABLED);
  OwningOpRef<ModuleOp> module = parseSourceFile<ModuleOp>(input, &context);
  if (!module)
    return 1;
  if (!to.empty())
    if (llvm::Error error = runPhases(*module, from, to, options))
      return fail(std::move(error));
  std::error_code ec;
  llvm::ToolOutputFile file(output, ec, llvm::sys::fs::OF_None);
  if (ec)
    return 1;
  if (emit == "mlir") {
    module->print(file.os());
  } else {
    llvm::Expected<CodeTable> table = buildCodeTable(*module, "test", "0");
    if (!table)
      return fail(table.takeError());
    CodeFormat format = emit == "obj"   ? CodeFormat::Object
                        : emit == "asm" ? CodeFormat::Assembly
                                        : CodeFormat::LLVM;
    auto bytes = generateCode(*module, &*table, format);
    if (!bytes)
      return fail(bytes.takeError());
    file.os().write(bytes->data(), bytes->size());
  }
  file.keep();
  return 0;
}
