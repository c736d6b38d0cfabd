//===- moe-import-dump.cpp - prints imported IR, and specs read from IR ---===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A test tool over lib/Import. MODEL is printed as moe IR; a .mlir file as the
// spec that is read from it; with --back a MODEL goes to IR and back.
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Import/Import.h"
#include "moe/Spec/Load.h"
#include "moe/Support/Error.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/Dialect/Tensor/IR/Tensor.h"
#include "mlir/Parser/Parser.h"
#include "llvm/Support/CommandLine.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"

using namespace moec;
namespace cl = llvm::cl;

static cl::opt<std::string> input(cl::Positional, cl::desc("MODEL or .mlir"), cl::Required);
static cl::opt<bool> back("back", cl::desc("print the spec after IR instead of the IR"));

static llvm::Error printSpec(mlir::ModuleOp module) {
  llvm::Expected<ModelSpec> spec = readModel(module);
  if (!spec)
    return spec.takeError();
  llvm::outs() << llvm::formatv("{0:2}", toJSON(*spec)) << "\n";
  return llvm::Error::success();
}

static llvm::Error run(const char *argv0) {
  mlir::MLIRContext context;
  if (llvm::StringRef(input).ends_with(".mlir")) {
    context.loadDialect<mlir::moe::MoEDialect, mlir::arith::ArithDialect, mlir::func::FuncDialect,
                        mlir::math::MathDialect, mlir::tensor::TensorDialect>();
    auto module = mlir::parseSourceFile<mlir::ModuleOp>(input, &context);
    if (!module)
      return makeError(ErrorCode::CONFIG, input, "moe IR", "text that does not parse");
    return printSpec(*module);
  }
  llvm::Expected<ModelTable> table =
      ModelTable::load(shippedModelRows(argv0, reinterpret_cast<void *>(&printSpec)));
  if (!table)
    return table.takeError();
  llvm::Expected<LoadedModel> model = loadModel(input, *table);
  if (!model)
    return model.takeError();
  llvm::Expected<mlir::OwningOpRef<mlir::ModuleOp>> module = importModel(model->spec, context);
  if (!module)
    return module.takeError();
  if (back)
    return printSpec(**module);
  (*module)->print(llvm::outs());
  return llvm::Error::success();
}

int main(int argc, char **argv) {
  cl::ParseCommandLineOptions(argc, argv, "prints imported IR, and specs read from IR\n");
  llvm::Error error = run(argv[0]);
  if (!error)
    return 0;
  Error first = takeErrors(std::move(error)).front();
  llvm::errs() << llvm::json::Value(first.toJSON()) << "\n";
  return exitCode(first.code);
}
