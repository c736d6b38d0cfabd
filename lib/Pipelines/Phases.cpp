//===- Phases.cpp - the phases of the compiler ----------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Pipelines/Phases.h"
#include "moe/Dialect/MoE/Transforms/Passes.h"
#include "moe/Support/Error.h"
#include "moe/Target/CPU/Passes.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/Conversion/Passes.h"
#include "mlir/Dialect/GPU/Transforms/Passes.h"
#include "mlir/Dialect/MemRef/Transforms/Passes.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/Diagnostics.h"
#include "mlir/Pass/PassInstrumentation.h"
#include "mlir/Pass/PassManager.h"
#include "mlir/Pass/PassRegistry.h"
#include "mlir/Transforms/Passes.h"
#include "llvm/ADT/StringExtras.h"

using namespace mlir;
using namespace mlir::moe;
using moec::ErrorCode;
using moec::makeError;

static std::string listOption(StringRef name, const std::vector<std::string> &values) {
  if (values.empty())
    return "";
  return ("{" + name + "=" + llvm::join(values, ",") + "}").str();
}

//===----------------------------------------------------------------------===//
// The table
//===----------------------------------------------------------------------===//

static std::string none(const PipelineOptions &) { return ""; }

static std::string canonical(const PipelineOptions &) {
  return "canonicalize,cse,moe-merge-equal-functions,func.func(moe-decompose-experts),canonicalize,"
         "cse";
}

static constexpr StringRef fusePasses[] = {"moe-fuse-router-dispatch", "moe-fuse-gather",
                                           "moe-fuse-activation", "moe-fuse-combine"};

static std::string fuse(const PipelineOptions &options) {
  std::string text;
  for (StringRef pass : fusePasses)
    if (!llvm::is_contained(options.disabledPasses, pass.str()))
      text += ("func.func(" + pass + "),").str();
  return text + "canonicalize,cse";
}

static std::string target(const PipelineOptions &options) {
  if (options.isGPU())
    return "moe-gpu-attach-target" + listOption("levels", options.gpuLevels) +
           ",moe-clone-variants" + listOption("types", options.types);
  return "moe-attach-target" + listOption("levels", options.levels) + ",moe-clone-variants" +
         listOption("types", options.types);
}

static std::string strategy(const PipelineOptions &options) {
  std::string text = options.isGPU() ? "moe-gpu-select-strategy" : "moe-select-strategy";
  std::vector<std::string> values;
  for (const auto &[name, value] : options.core)
    if (value > 0 && !options.isGPU())
      values.push_back(name + "=" + std::to_string(value));
  // One line, so that the text of the pipeline can be pasted into a shell.
  if (!options.strategyText.empty()) {
    if (auto value = llvm::json::parse(options.strategyText)) {
      std::string compact;
      llvm::raw_string_ostream(compact) << *value;
      values.push_back("overrides=" + compact);
    } else {
      llvm::consumeError(value.takeError());
      values.push_back("overrides=" + options.strategyText); // the pass says what is wrong
    }
  }
  if (!values.empty())
    text += "{" + llvm::join(values, " ") + "}";
  return text;
}

static std::string bufferize(const PipelineOptions &) { return "moe-bufferize,canonicalize,cse"; }

static std::string tile(const PipelineOptions &options) {
  // Blocks of a GPU find their tile themselves.
  return options.isGPU() ? "" : "moe-cpu-tile-tasks,canonicalize,cse";
}

static std::string kernels(const PipelineOptions &options) {
  if (options.isGPU())
    return "moe-gpu-emit-kernels,moe-gpu-emit-call-kernels,moe-gpu-merge-kernels";
  return "moe-cpu-emit-kernels,canonicalize,cse";
}

static std::string outline(const PipelineOptions &options) {
  if (options.isGPU())
    return "moe-gpu-lower-host,canonicalize,cse,moe-merge-equal-functions";
  return "moe-cpu-plan-workspace,moe-cpu-outline-stages,canonicalize,cse,moe-merge-equal-functions";
}

static std::string codegen(const PipelineOptions &options) {
  std::string text;
  if (options.isGPU()) {
    text = "moe-gpu-lower-kernels,";
    for (const std::string &level : options.gpuLevels)
      text += "nvvm-attach-target{O=3 chip=" + level + " module=" + kernelsModuleName(level) + "},";
    text += "gpu.module(convert-nvvm-to-llvm),gpu-module-to-binary{format=isa},";
  }
  llvm::raw_string_ostream os(text);
  OpPassManager pm(ModuleOp::getOperationName());
  buildLowerToLLVM(pm);
  llvm::interleaveComma(pm.getPasses(), os, [&](Pass &pass) { pass.printAsTextualPipeline(os); });
  // The printer puts a space after a comma nowhere; interleaveComma does.
  std::string packed;
  for (char c : text)
    if (c != ' ' || (!packed.empty() && packed.back() != ','))
      packed += c;
  return packed;
}

static const Phase table[] = {
    {"import", "A model becomes functions and symbols of the moe dialect.", none},
    {"canonical", "Experts are matmuls on sorted rows.", canonical},
    {"fuse", "Gather, activation, dispatch and combine are clauses of their neighbours.", fuse},
    {"target", "Every entry exists once per CPU level, type of x and type of y.", target},
    {"strategy", "Every matmul carries its schedule and its micro-kernel.", strategy},
    {"bufferize", "Tensors are buffers and results are arguments.", bufferize},
    {"tile", "Entries are stages of tasks on row blocks and weight panels.", tile},
    {"kernels", "Tasks are vector code.", kernels},
    {"outline", "Stages are functions of the frame, scratch is one workspace.", outline},
    {"codegen", "Everything is in the LLVM dialect.", codegen},
    {"export", "Machine code, module table, header, manifest and weights are written.", none},
};

ArrayRef<Phase> mlir::moe::phases() { return table; }

const Phase *mlir::moe::findPhase(StringRef name) {
  for (const Phase &phase : table)
    if (phase.name == name)
      return &phase;
  return nullptr;
}

ArrayRef<StringRef> mlir::moe::optionalPasses() { return fusePasses; }

std::string mlir::moe::phasePipeline(const Phase &phase, const PipelineOptions &options) {
  std::string passes = phase.passes(options);
  return passes.empty() ? "" : "builtin.module(" + passes + ")";
}

void mlir::moe::registerPhasePasses() {
  registerMoEPasses();
  registerMoECPUPasses();
  registerMoEGPUPasses();
  registerMoEGPUPipelines();
  registerGPUPasses();
  registerTransformsPasses();
  registerConversionPasses();
  memref::registerMemRefPasses();
}

//===----------------------------------------------------------------------===//
// Running
//===----------------------------------------------------------------------===//

namespace {
/// Remembers the pass that failed.
class LastPass : public PassInstrumentation {
public:
  explicit LastPass(std::string &name) : name(name) {}
  void runAfterPassFailed(Pass *pass, Operation *) override {
    // The innermost pass reports first; adaptors around it have no argument.
    if (name.empty() && !pass->getArgument().empty())
      name = pass->getArgument().str();
  }

private:
  std::string &name;
};
} // namespace

static llvm::Error runPhase(ModuleOp module, const Phase &phase, const PipelineOptions &options) {
  std::string text = phasePipeline(phase, options);
  if (text.empty())
    return llvm::Error::success();
  MLIRContext *context = module.getContext();
  std::string diagnostics, pass;
  ErrorCode code = phase.name == "target"     ? ErrorCode::TARGET
                   : phase.name == "strategy" ? ErrorCode::ARGUMENT
                                              : ErrorCode::INTERNAL;
  ScopedDiagnosticHandler handler(context, [&](Diagnostic &diagnostic) {
    if (diagnostic.getSeverity() != DiagnosticSeverity::Error)
      return failure();
    if (!diagnostics.empty())
      diagnostics += "; ";
    diagnostics += diagnostic.str();
    return success();
  });
  PassManager pm(context, ModuleOp::getOperationName());
  pm.enableVerifier(options.verifyEach);
  pm.addInstrumentation(std::make_unique<LastPass>(pass));
  StringRef inner = StringRef(text);
  inner.consume_front("builtin.module(");
  inner.consume_back(")");
  std::string parseErrors;
  llvm::raw_string_ostream parseStream(parseErrors);
  if (failed(parsePassPipeline(inner, pm, parseStream)))
    return makeError(ErrorCode::INTERNAL, "phase `" + phase.name + "`",
                     "a pipeline that can be read", parseErrors);
  bool ran = succeeded(pm.run(module));
  if (!ran && options.isGPU() && (phase.name == "target" || phase.name == "kernels"))
    return makeError(ErrorCode::UNSUPPORTED, "--target cuda", "a model with GPU code",
                     diagnostics.empty() ? "a failure" : diagnostics,
                     phase.name == "target" ? "--dtype bf16 converts the weights" : "");
  if (!ran)
    return makeError(code,
                     "phase `" + phase.name + "`" + (pass.empty() ? "" : ", pass `" + pass + "`"),
                     "a pass that succeeds", diagnostics.empty() ? "a failure" : diagnostics);
  return llvm::Error::success();
}

llvm::Error mlir::moe::runPhases(ModuleOp module, StringRef from, StringRef to,
                                 const PipelineOptions &options) {
  static const bool registered = (registerPhasePasses(), true);
  (void)registered;
  std::vector<std::string> names;
  for (const Phase &phase : table)
    names.push_back(phase.name.str());
  for (StringRef name : {from, to})
    if (!findPhase(name))
      return makeError(ErrorCode::ARGUMENT, "phase", "one of " + moec::quoteList(names, "or"),
                       "`" + name + "`");
  if (findPhase(from) > findPhase(to))
    return makeError(ErrorCode::ARGUMENT, "phases", "`" + from + "` before `" + to + "`",
                     "the other order");
  for (const std::string &name : options.disabledPasses) {
    std::vector<std::string> optional;
    for (StringRef pass : optionalPasses())
      optional.push_back(pass.str());
    if (!llvm::is_contained(optional, name))
      return makeError(ErrorCode::ARGUMENT, "--disable-pass",
                       "one of " + moec::quoteList(optional, "or"), "`" + name + "`");
  }
  for (const Phase *phase = findPhase(from); phase <= findPhase(to); ++phase) {
    if (llvm::Error error = runPhase(module, *phase, options))
      return error;
    if (options.afterPhase)
      if (llvm::Error error = options.afterPhase(phase->name, module))
        return error;
  }
  return llvm::Error::success();
}
