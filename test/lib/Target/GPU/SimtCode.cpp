//===- SimtCode.cpp - machine code for the SIMT executor ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "SimtCode.h"

#include "moe/Target/GPU/Simt.h"

#include "mlir/ExecutionEngine/OptUtils.h"
#include "mlir/Target/LLVMIR/Export.h"
#include "llvm/IR/LLVMContext.h"
#include "llvm/IR/Module.h"
#include "llvm/Support/TargetSelect.h"

using namespace mlir;
using namespace mlir::moe;

llvm::Expected<void *> SimtCode::find(const std::string &name) {
  auto symbol = jit->lookup(name);
  if (!symbol)
    return symbol.takeError();
  return symbol->toPtr<void *>();
}

llvm::Expected<SimtCode> mlir::moe::compileForSimt(ModuleOp module) {
  // What names functions for the module's table has no code.
  for (Operation &op : llvm::make_early_inc_range(*module.getBody()))
    if (op.getDialect() && op.getDialect()->getNamespace() == "moe")
      op.erase();
  llvm::InitializeNativeTarget();
  llvm::InitializeNativeTargetAsmPrinter();
  auto context = std::make_unique<llvm::LLVMContext>();
  auto ir = translateModuleToLLVMIR(module, *context);
  if (!ir)
    return llvm::createStringError("expected LLVM IR, but got none");
  auto host = llvm::orc::JITTargetMachineBuilder::detectHost();
  if (!host)
    return host.takeError();
  auto machine = host->createTargetMachine();
  if (!machine)
    return machine.takeError();
  ir->setDataLayout((*machine)->createDataLayout());
  ir->setTargetTriple((*machine)->getTargetTriple());
  if (auto error = makeOptimizingTransformer(1, 0, machine->get())(ir.get()))
    return std::move(error);
  SimtCode code;
  auto jit = llvm::orc::LLJITBuilder().setJITTargetMachineBuilder(std::move(*host)).create();
  if (!jit)
    return jit.takeError();
  code.jit = std::move(*jit);
  llvm::orc::SymbolMap symbols;
  for (auto [name, address] : simt::simtSymbols())
    symbols[code.jit->mangleAndIntern(name)] = {llvm::orc::ExecutorAddr::fromPtr(address),
                                                llvm::JITSymbolFlags::Exported};
  if (auto error = code.jit->getMainJITDylib().define(llvm::orc::absoluteSymbols(symbols)))
    return std::move(error);
  if (auto error =
          code.jit->addIRModule(llvm::orc::ThreadSafeModule(std::move(ir), std::move(context))))
    return std::move(error);
  return std::move(code);
}
