//===- Codegen.cpp - LLVM dialect to machine code -------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Target/CPU/Codegen.h"
#include "moe/Support/Error.h"

#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/Target/LLVMIR/Dialect/Builtin/BuiltinToLLVMIRTranslation.h"
#include "mlir/Target/LLVMIR/Dialect/LLVMIR/LLVMToLLVMIRTranslation.h"
#include "mlir/Target/LLVMIR/Export.h"
#include "llvm/ADT/StringSet.h"
#include "llvm/Bitcode/BitcodeReader.h"
#include "llvm/Bitcode/BitcodeWriter.h"
#include "llvm/CodeGen/TargetSubtargetInfo.h"
#include "llvm/IR/InstIterator.h"
#include "llvm/IR/IntrinsicInst.h"
#include "llvm/IR/LegacyPassManager.h"
#include "llvm/IR/Module.h"
#include "llvm/MC/MCSubtargetInfo.h"
#include "llvm/MC/TargetRegistry.h"
#include "llvm/Object/ELFObjectFile.h"
#include "llvm/Passes/PassBuilder.h"
#include "llvm/Support/TargetSelect.h"
#include "llvm/Support/ThreadPool.h"
#include "llvm/Target/TargetMachine.h"
#include "llvm/Transforms/Utils/SplitModule.h"

using namespace mlir;
using namespace mlir::moe;
using moec::ErrorCode;
using moec::makeError;

static constexpr llvm::StringLiteral kTriple = "x86_64-unknown-linux-gnu";

llvm::Expected<std::unique_ptr<llvm::TargetMachine>> mlir::moe::createCPUTargetMachine() {
  static const bool initialized = [] {
    LLVMInitializeX86TargetInfo();
    LLVMInitializeX86Target();
    LLVMInitializeX86TargetMC();
    LLVMInitializeX86AsmPrinter();
    return true;
  }();
  (void)initialized;
  llvm::Triple triple(kTriple);
  std::string error;
  const llvm::Target *target = llvm::TargetRegistry::lookupTarget(triple, error);
  if (!target)
    return makeError(ErrorCode::TARGET, "codegen", "an LLVM with the x86 target", error);
  llvm::TargetOptions options;
  // Fusing is the compiler's decision, spelled in the IR as vector.fma, which becomes llvm.fmuladd.
  // Standard fuses that and nothing else; Strict would split it into a product and a sum.
  options.AllowFPOpFusion = llvm::FPOpFusion::Standard;
  std::unique_ptr<llvm::TargetMachine> machine(
      target->createTargetMachine(triple, "x86-64", "", options, llvm::Reloc::PIC_,
                                  llvm::CodeModel::Small, llvm::CodeGenOptLevel::Aggressive));
  if (!machine)
    return makeError(ErrorCode::TARGET, "codegen", "a target machine for " + kTriple, "none");
  return std::move(machine);
}

llvm::Expected<std::unique_ptr<llvm::Module>>
mlir::moe::translateToLLVM(ModuleOp module, llvm::LLVMContext &context,
                           llvm::TargetMachine &machine, const CodeTable *table) {
  registerBuiltinDialectTranslation(*module.getContext());
  registerLLVMDialectTranslation(*module.getContext());
  OwningOpRef<ModuleOp> copy(module.clone());
  for (Operation &op : llvm::make_early_inc_range(*copy->getBody()))
    if (op.getDialect() && (op.getDialect()->getNamespace() == "moe" ||
                            op.getName().getStringRef() == "gpu.binary")) // in the table's images
      op.erase();
  for (Operation &op : *copy->getBody())
    if (!isa<LLVM::LLVMDialect>(op.getDialect()))
      return makeError(ErrorCode::INTERNAL, "codegen", "a module in the LLVM dialect",
                       "an operation `" + op.getName().getStringRef() + "`",
                       "run the phases up to `outline` first");
  // Attributes of the moe dialect on the module itself mean nothing to LLVM.
  for (NamedAttribute attr : llvm::to_vector(copy->getOperation()->getDiscardableAttrs()))
    copy->getOperation()->removeDiscardableAttr(attr.getName());
  std::unique_ptr<llvm::Module> result = translateModuleToLLVMIR(*copy, context, "moec");
  if (!result)
    return makeError(ErrorCode::INTERNAL, "codegen", "a module that translates to LLVM IR",
                     "a translation failure");
  result->setTargetTriple(machine.getTargetTriple());
  result->setDataLayout(machine.createDataLayout());
  result->setPICLevel(llvm::PICLevel::BigPIC);
  for (llvm::Function &function : *result) {
    if (function.isDeclaration())
      continue;
    // Nothing throws and nothing unwinds through generated code: no unwind tables.
    function.setDoesNotThrow();
    function.addFnAttr("frame-pointer", "none");
    function.addFnAttr("no-trapping-math", "true");
  }
  if (table)
    if (llvm::Error error = emitModuleTable(*result, *table))
      return std::move(error);
  return std::move(result);
}

static unsigned vectorBits(llvm::Type *type) {
  if (auto *vector = llvm::dyn_cast<llvm::FixedVectorType>(type))
    return vector->getPrimitiveSizeInBits().getFixedValue();
  return 0;
}

llvm::Error mlir::moe::checkFunctionAttributes(llvm::Module &module, llvm::TargetMachine &machine) {
  // Intrinsics whose absence from the features ends in an abort of instruction selection.
  static const std::pair<llvm::StringLiteral, llvm::StringLiteral> needs[] = {
      {"llvm.x86.tdpbf16ps", "+amx-bf16"}, {"llvm.x86.tile", "+amx-tile"},
      {"llvm.x86.ldtilecfg", "+amx-tile"}, {"llvm.x86.avx512bf16.", "+avx512bf16"},
      {"llvm.x86.avx512.", "+avx512f"},    {"llvm.x86.avx2.", "+avx2"},
      {"llvm.x86.fma.", "+fma"},
  };
  for (llvm::Function &function : module) {
    if (function.isDeclaration())
      continue;
    auto refuse = [&](const llvm::Twine &what, llvm::StringRef feature) {
      return makeError(ErrorCode::INTERNAL, "function `" + function.getName() + "`",
                       "CPU attributes with `" + feature.drop_front() + "` for " + what,
                       "target-cpu `" + function.getFnAttribute("target-cpu").getValueAsString() +
                           "`, target-features `" +
                           function.getFnAttribute("target-features").getValueAsString() + "`");
    };
    const llvm::MCSubtargetInfo *subtarget = nullptr;
    auto has = [&](llvm::StringRef feature) {
      if (!subtarget)
        subtarget = machine.getSubtargetImpl(function);
      return subtarget->checkFeatures(feature);
    };
    for (llvm::Instruction &instruction : llvm::instructions(function)) {
      if (auto *call = llvm::dyn_cast<llvm::CallBase>(&instruction)) {
        llvm::Function *callee = call->getCalledFunction();
        if (callee && callee->isIntrinsic())
          for (auto [prefix, feature] : needs)
            if (callee->getName().starts_with(prefix) && !has(feature))
              return refuse("`" + callee->getName() + "`", feature);
      }
      // A product of 512 bits in 256-bit code would be split and spill; plain moves may be wide.
      auto *call = llvm::dyn_cast<llvm::IntrinsicInst>(&instruction);
      if (call && call->getIntrinsicID() == llvm::Intrinsic::fma &&
          vectorBits(call->getType()) > 256 && !has("+avx512f"))
        return refuse("fma on 512-bit vectors", "+avx512f");
    }
  }
  return llvm::Error::success();
}

/// Code arrives vectorized, tiled and inlined as far as it should be, so what is left is scalar:
/// addresses, loop forms, invariants. O3 takes five times as long for layers that are no faster.
static constexpr llvm::StringLiteral kPasses =
    "function(sroa,early-cse<memssa>,simplifycfg,instcombine<no-verify-fixpoint>,"
    "loop-mssa(loop-rotate,licm),loop(indvars,loop-deletion),simplifycfg,early-cse<memssa>)";

void mlir::moe::optimizeModule(llvm::Module &module, llvm::TargetMachine &machine) {
  llvm::LoopAnalysisManager loops;
  llvm::FunctionAnalysisManager functions;
  llvm::CGSCCAnalysisManager sccs;
  llvm::ModuleAnalysisManager modules;
  llvm::PassBuilder builder(&machine);
  builder.registerModuleAnalyses(modules);
  builder.registerCGSCCAnalyses(sccs);
  builder.registerFunctionAnalyses(functions);
  builder.registerLoopAnalyses(loops);
  builder.crossRegisterProxies(loops, functions, sccs, modules);
  llvm::ModulePassManager passes;
  llvm::cantFail(builder.parsePassPipeline(passes, kPasses), "a pipeline of known passes");
  passes.run(module, modules);
}

llvm::Error mlir::moe::emitCode(llvm::Module &module, llvm::TargetMachine &machine,
                                CodeFormat format, llvm::SmallVectorImpl<char> &out) {
  llvm::raw_svector_ostream os(out);
  if (format == CodeFormat::LLVM) {
    module.print(os, nullptr);
    return llvm::Error::success();
  }
  llvm::legacy::PassManager passes;
  auto type = format == CodeFormat::Object ? llvm::CodeGenFileType::ObjectFile
                                           : llvm::CodeGenFileType::AssemblyFile;
  if (machine.addPassesToEmitFile(passes, os, nullptr, type))
    return makeError(ErrorCode::INTERNAL, "codegen", "a target that can emit this file type",
                     "none");
  passes.run(module);
  return llvm::Error::success();
}

llvm::Error mlir::moe::checkObjectSymbols(llvm::ArrayRef<llvm::ArrayRef<char>> objects) {
  llvm::StringSet<> allowed = {"memset", "memcpy", "memmove", "_GLOBAL_OFFSET_TABLE_"};
  std::vector<std::string> needed;
  for (llvm::ArrayRef<char> object : objects) {
    llvm::MemoryBufferRef buffer(llvm::StringRef(object.data(), object.size()), "moec object");
    auto file = llvm::object::ObjectFile::createObjectFile(buffer);
    if (!file)
      return file.takeError();
    for (const llvm::object::SymbolRef &symbol : (*file)->symbols()) {
      auto flags = symbol.getFlags();
      if (!flags)
        return flags.takeError();
      auto name = symbol.getName();
      if (!name)
        return name.takeError();
      if (*flags & llvm::object::SymbolRef::SF_Undefined)
        needed.push_back(name->str());
      else if (*flags & llvm::object::SymbolRef::SF_Global)
        allowed.insert(*name);
    }
  }
  for (const std::string &name : needed)
    if (!name.empty() && !allowed.contains(name))
      return makeError(ErrorCode::INTERNAL, "generated code",
                       "calls to memset, memcpy and memmove alone", "a call to `" + name + "`");
  return llvm::Error::success();
}

/// Optimized code of a module that nothing is wrong with.
static llvm::Error finishCode(llvm::Module &module, llvm::TargetMachine &machine, CodeFormat format,
                              llvm::SmallVectorImpl<char> &out) {
  optimizeModule(module, machine);
  return emitCode(module, machine, format, out);
}

llvm::Expected<llvm::SmallVector<char, 0>>
mlir::moe::generateCode(ModuleOp module, const CodeTable *table, CodeFormat format) {
  auto machine = createCPUTargetMachine();
  if (!machine)
    return machine.takeError();
  llvm::LLVMContext context;
  auto code = translateToLLVM(module, context, **machine, table);
  if (!code)
    return code.takeError();
  if (llvm::Error error = checkFunctionAttributes(**code, **machine))
    return std::move(error);
  llvm::SmallVector<char, 0> out;
  if (llvm::Error error = finishCode(**code, **machine, format, out))
    return std::move(error);
  if (format == CodeFormat::Object)
    if (llvm::Error error = checkObjectSymbols(llvm::ArrayRef<char>(out)))
      return std::move(error);
  return std::move(out);
}

/// Objects of one library, and functions below which a module stays one: a part costs 10 ms.
static constexpr unsigned kParts = 4;
static constexpr size_t kFewFunctions = 48;

llvm::Expected<std::vector<llvm::SmallVector<char, 0>>>
mlir::moe::generateObjects(ModuleOp module, const CodeTable *table) {
  auto machine = createCPUTargetMachine();
  if (!machine)
    return machine.takeError();
  llvm::LLVMContext context;
  auto code = translateToLLVM(module, context, **machine, table);
  if (!code)
    return code.takeError();
  if (llvm::Error error = checkFunctionAttributes(**code, **machine))
    return std::move(error);
  std::vector<llvm::SmallVector<char, 0>> parts;
  if ((*code)->size() <= kFewFunctions) {
    if (llvm::Error error = finishCode(**code, **machine, CodeFormat::Object, parts.emplace_back()))
      return std::move(error);
  } else {
    // A context belongs to one thread, so parts travel as bitcode.
    llvm::SplitModule(
        **code, kParts,
        [&](std::unique_ptr<llvm::Module> part) {
          llvm::raw_svector_ostream os(parts.emplace_back());
          llvm::WriteBitcodeToFile(*part, os);
        },
        /*PreserveLocals=*/false);
    std::vector<std::string> errors(parts.size());
    llvm::DefaultThreadPool pool(llvm::heavyweight_hardware_concurrency(parts.size()));
    for (size_t i = 0; i < parts.size(); ++i)
      pool.async([&, i] {
        auto run = [&]() -> llvm::Error {
          auto own = createCPUTargetMachine();
          if (!own)
            return own.takeError();
          llvm::LLVMContext context;
          llvm::StringRef bitcode(parts[i].data(), parts[i].size());
          auto part = llvm::parseBitcodeFile(llvm::MemoryBufferRef(bitcode, "part"), context);
          if (!part)
            return part.takeError();
          llvm::SmallVector<char, 0> object;
          if (llvm::Error error = finishCode(**part, **own, CodeFormat::Object, object))
            return error;
          parts[i] = std::move(object);
          return llvm::Error::success();
        };
        if (llvm::Error error = run())
          errors[i] = llvm::toString(std::move(error));
      });
    pool.wait();
    for (const std::string &error : errors)
      if (!error.empty())
        return makeError(ErrorCode::INTERNAL, "codegen", "parts that become objects", error);
  }
  std::vector<llvm::ArrayRef<char>> views(parts.begin(), parts.end());
  if (llvm::Error error = checkObjectSymbols(views))
    return std::move(error);
  return std::move(parts);
}
