//===- KernelTest.cpp - Builds and runs every CPU kernel ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// moe-kernel-test --level=x86-64-v3|x86-64-v4|avx512-bf16|amx-bf16 [--asm FILE] [--ir FILE]
//                 [--no-run] [--emulate] [--exhaustive] [--only TEXT] [--bench DEPTH]
//
// Emits every tile of the level's register budget in every weight format and form, compiles them
// with the passes of the compiler and checks them in this process. Products must equal a loop of
// std::fma bit for bit (which is what makes the bits independent of the tile), and a float64 loop
// within f32 accuracy; activations are compared with float64. Every output starts as NaN and has
// guard bytes on both sides that must survive. --asm writes the assembly for asm_loops.py.
//
// avx512-bf16 builds what that level has beyond x86-64-v4, the products of bf16 pairs; their loop
// is a software model of vdpbf16ps (see Operands::chain in GemmTest.cpp). amx-bf16 has the products
// of tiles; with --emulate their instructions are executed in software where the machine has none.
//
//===----------------------------------------------------------------------===//

#include "KernelTest.h"

#include "../../../tools/AmxEmulator.h"
#include "moe/Dialect/MoE/IR/MoEDialect.h"
#include "moe/Target/CPU/Codegen.h"
#include "moe/Target/CPU/VectorMath.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/IR/MLIRContext.h"
#include "mlir/InitAllDialects.h"
#include "mlir/InitAllExtensions.h"
#include "mlir/InitAllPasses.h"
#include "mlir/Parser/Parser.h"
#include "mlir/Pass/PassManager.h"
#include "mlir/Pass/PassRegistry.h"
#include "mlir/Target/LLVMIR/Dialect/All.h"
#include "mlir/Target/LLVMIR/Export.h"

#include "llvm/ADT/StringSet.h"
#include "llvm/ExecutionEngine/Orc/LLJIT.h"
#include "llvm/IR/LegacyPassManager.h"
#include "llvm/IR/Module.h"
#include "llvm/MC/TargetRegistry.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/InitLLVM.h"
#include "llvm/Support/TargetSelect.h"
#include "llvm/Target/TargetMachine.h"
#include "llvm/TargetParser/Host.h"
#include "llvm/Transforms/Utils/Cloning.h"

#include <limits>

static llvm::cl::opt<std::string>
    levelName("level", llvm::cl::desc("x86-64-v3, x86-64-v4, avx512-bf16, amx-bf16"),
              llvm::cl::Required);
static llvm::cl::opt<std::string> asmFile("asm", llvm::cl::desc("write the assembly here"));
static llvm::cl::opt<std::string> irFile("ir", llvm::cl::desc("write the optimized LLVM IR here"));
static llvm::cl::opt<int64_t> bench("bench", llvm::cl::desc("time products of this depth"));
static llvm::cl::opt<bool> noRun("no-run", llvm::cl::desc("compile only"));
static llvm::cl::opt<bool> emulate("emulate", llvm::cl::desc("AMX in software"));
llvm::cl::opt<bool> exhaustive("exhaustive", llvm::cl::desc("math on every float"));
static llvm::cl::opt<std::string> only("only", llvm::cl::desc("kernels whose name contains this"));

bool dotLevel = false, tileLevel = false;
int failures = 0;

/// The activations, as functions.
static const char *epilogues = R"(
func.func private @silu(%g: f32, %u: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %n = arith.negf %g : f32
  %e = math.exp %n : f32
  %d = arith.addf %e, %one : f32
  %s = arith.divf %g, %d : f32
  %m = arith.mulf %s, %u : f32
  return %m : f32
}
func.func private @gelu(%g: f32, %u: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %half = arith.constant 0.5 : f32
  %r = arith.constant 0.707106781 : f32
  %a = arith.mulf %g, %r : f32
  %e = math.erf %a : f32
  %p = arith.addf %e, %one : f32
  %h = arith.mulf %g, %half : f32
  %s = arith.mulf %h, %p : f32
  %m = arith.mulf %s, %u : f32
  return %m : f32
}
func.func private @gelu_tanh(%g: f32, %u: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %half = arith.constant 0.5 : f32
  %c = arith.constant 0.797884583 : f32
  %k = arith.constant 0.044715 : f32
  %g2 = arith.mulf %g, %g : f32
  %g3 = arith.mulf %g2, %g : f32
  %kg = arith.mulf %g3, %k : f32
  %in = arith.addf %g, %kg : f32
  %a = arith.mulf %in, %c : f32
  %t = math.tanh %a : f32
  %p = arith.addf %t, %one : f32
  %h = arith.mulf %g, %half : f32
  %s = arith.mulf %h, %p : f32
  %m = arith.mulf %s, %u : f32
  return %m : f32
}
func.func private @relu(%g: f32, %u: f32) -> f32 {
  %zero = arith.constant 0.0 : f32
  %r = arith.maximumf %g, %zero : f32
  %m = arith.mulf %r, %u : f32
  return %m : f32
}
func.func private @silu1(%g: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %n = arith.negf %g : f32
  %e = math.exp %n : f32
  %d = arith.addf %e, %one : f32
  %s = arith.divf %g, %d : f32
  return %s : f32
}
)";

int main(int argc, char **argv) {
  llvm::InitLLVM init(argc, argv);
  llvm::cl::ParseCommandLineOptions(argc, argv, "builds and runs every CPU kernel\n");
  std::optional<KernelLevel> level = parseKernelLevel(levelName);
  if (!level) {
    llvm::errs() << "expected a level with kernels, but got " << levelName << "\n";
    return 2;
  }
  tileLevel = levelName == "amx-bf16";
  dotLevel = tileLevel || levelName == "avx512-bf16";
  llvm::InitializeNativeTarget();
  llvm::InitializeNativeTargetAsmPrinter();
  llvm::InitializeNativeTargetAsmParser();

  DialectRegistry registry;
  registerAllDialects(registry);
  registerAllExtensions(registry);
  registerAllToLLVMIRTranslations(registry);
  registerAllPasses();
  registry.insert<MoEDialect>();
  MLIRContext context(registry);
  context.loadDialect<MoEDialect>();
  context.loadAllAvailableDialects();
  OwningOpRef<ModuleOp> functions = parseSourceString<ModuleOp>(epilogues, &context);
  if (!functions)
    return 1;

  Location loc = UnknownLoc::get(&context);
  OwningOpRef<ModuleOp> module = ModuleOp::create(loc);
  OpBuilder b(&context);
  b.setInsertionPointToStart(module->getBody());

  auto wanted = [&](StringRef name) { return only.empty() || name.contains(only); };
  std::vector<GemmCase> gemms;
  for (GemmCase &test : makeGemmCases(*level, *functions))
    if (wanted(test.name))
      gemms.push_back(test);
  llvm::StringSet<> emitted;
  for (const GemmCase &test : gemms)
    if (emitted.insert(test.name).second && failed(emitGemmKernel(b, loc, test.spec)))
      return 1;
  if (tileLevel)
    for (bool begin : {true, false})
      emitTileFrame(b, loc, begin);
  std::vector<PackKernelSpec> packs;
  for (int i = 0; i < 8; ++i)
    if (!dotLevel || !(i & 2))
      packs.push_back({*level, bool(i & 1), bool(i & 2), dotLevel, bool(i & 4)});
  std::vector<PanelKernelSpec> panels;
  for (int i = 0; i < 4; ++i)
    panels.push_back({*level, bool(i & 1), bool(i & 2)});
  std::vector<SelectKernelSpec> selects;
  struct Sizes {
    int64_t experts, chosen;
  };
  int variant = 0;
  for (Sizes s : {Sizes{1, 1},
                  {2, 1},
                  {2, 2},
                  {5, 3},
                  {8, 2},
                  {16, 16},
                  {17, 8},
                  {33, 17},
                  {64, 8},
                  {128, 8},
                  {257, 8},
                  {512, 64},
                  {1024, 64}})
    for (bool scoreFirst : {false, true})
      for (bool renormalize : {false, true}) {
        ++variant;
        auto router = RouterAttr::get(
            &context, ScoreFunction::Softmax,
            scoreFirst ? RouterOrder::ScoreThenSelect : RouterOrder::SelectThenScore, s.chosen,
            renormalize ? Renormalize::Sum : Renormalize::None,
            renormalize && variant % 3 ? 1e-20 : 0.0, /*norm_p=*/2.0, variant % 5 ? 1.0 : 2.5,
            RouterPrecision::F32, RouterInput::Plain, LogitTransformAttr(), Selection::TopK,
            SelectionBias::None, GroupsAttr(), /*extra_rows=*/0, /*input_epsilon=*/0.0,
            /*jitter=*/0.0, RouterArithmetic::UpcastLogits, RouterPrecision::Model);
        SelectKernelSpec spec{*level, s.experts, router};
        spec.copyLogits = variant % 2;
        selects.push_back(spec);
      }
  // As models round in bf16.
  for (RouterArithmetic arithmetic :
       {RouterArithmetic::CastInputs, RouterArithmetic::UpcastLogits, RouterArithmetic::ModelDtype})
    for (RouterOrder order : {RouterOrder::ScoreThenSelect, RouterOrder::SelectThenScore})
      for (RouterPrecision weights : {RouterPrecision::F32, RouterPrecision::Model}) {
        auto router = RouterAttr::get(
            &context, ScoreFunction::Softmax, order, /*top_k=*/6,
            order == RouterOrder::ScoreThenSelect ? Renormalize::Sum : Renormalize::None,
            /*epsilon=*/0.0, /*norm_p=*/2.0, /*scale=*/1.5, RouterPrecision::Model,
            RouterInput::Plain, LogitTransformAttr(), Selection::TopK, SelectionBias::None,
            GroupsAttr(), /*extra_rows=*/0, /*input_epsilon=*/0.0, /*jitter=*/0.0, arithmetic,
            weights);
        selects.push_back({*level, /*experts=*/40, router, /*expertScale=*/false,
                           /*copyLogits=*/true});
      }
  llvm::erase_if(packs, [&](const PackKernelSpec &s) { return !wanted(s.getName()); });
  // Rounding what is bf16 already is the same function.
  llvm::erase_if(packs, [](const PackKernelSpec &s) { return s.bf16Source && s.bf16Compute; });
  if (dotLevel) { // The rest is the code of x86-64-v4.
    panels.clear();
    selects.clear();
  }
  llvm::erase_if(panels, [&](const PanelKernelSpec &s) { return !wanted(s.getName()); });
  llvm::erase_if(selects, [&](const SelectKernelSpec &s) { return !wanted(s.getName()); });
  for (const PackKernelSpec &spec : packs)
    emitPackKernel(b, loc, spec);
  for (const PanelKernelSpec &spec : panels)
    emitPanelKernel(b, loc, spec);
  for (const SelectKernelSpec &spec : selects)
    emitSelectKernel(b, loc, spec);
  bool math = wanted("math") && !dotLevel;
  if (math) {
    emitMath(b, loc, *level, "exp", emitExp);
    emitMath(b, loc, *level, "erf", emitErf);
    emitMath(b, loc, *level, "tanh", emitTanh);
    emitMath(b, loc, *level, "round", emitRoundToBF16);
  }

  PassManager pm(&context);
  if (failed(parsePassPipeline("convert-scf-to-cf,convert-vector-to-llvm,convert-to-llvm,"
                               "reconcile-unrealized-casts,canonicalize,cse",
                               pm)) ||
      failed(pm.run(*module)))
    return 1;
  auto llvmContext = std::make_unique<llvm::LLVMContext>();
  std::unique_ptr<llvm::Module> code = translateModuleToLLVMIR(*module, *llvmContext);
  if (!code)
    return 1;
  for (llvm::Function &f : *code)
    if (!f.isDeclaration())
      f.setLinkage(llvm::GlobalValue::ExternalLinkage);

  auto builder = llvm::cantFail(llvm::orc::JITTargetMachineBuilder::detectHost());
  builder.setCPU("x86-64"); // what the functions' attributes do not say is the baseline
  builder.getFeatures() = llvm::SubtargetFeatures();
  builder.setCodeGenOptLevel(llvm::CodeGenOptLevel::Aggressive);
  builder.setRelocationModel(llvm::Reloc::PIC_);
  std::unique_ptr<llvm::TargetMachine> machine = llvm::cantFail(builder.createTargetMachine());
  code->setTargetTriple(machine->getTargetTriple());
  code->setDataLayout(machine->createDataLayout());

  optimizeModule(*code, *machine);

  if (!irFile.empty()) {
    std::error_code error;
    llvm::raw_fd_ostream os(irFile, error);
    code->print(os, nullptr);
  }
  if (!asmFile.empty()) {
    std::error_code error;
    llvm::raw_fd_ostream os(asmFile, error);
    machine->Options.MCOptions.AsmVerbose = true;
    llvm::legacy::PassManager emit;
    std::unique_ptr<llvm::Module> copy = llvm::CloneModule(*code);
    if (error ||
        machine->addPassesToEmitFile(emit, os, nullptr, llvm::CodeGenFileType::AssemblyFile)) {
      llvm::errs() << "expected to write " << asmFile << ", but could not\n";
      return 1;
    }
    emit.run(*copy);
  }
  if (noRun)
    return 0;

  auto jit = llvm::cantFail(llvm::orc::LLJITBuilder().setJITTargetMachineBuilder(builder).create());
  llvm::cantFail(
      jit->addIRModule(llvm::orc::ThreadSafeModule(std::move(code), std::move(llvmContext))));
  auto address = [&](const std::string &name) {
    return llvm::cantFail(jit->lookup(name)).toPtr<void *>();
  };

  if (emulate)
    amx_emulate();
  if (tileLevel)
    reinterpret_cast<void (*)()>(address(getTileFrameName(/*begin=*/true).str()))();
  std::mt19937 random(7);
  if (bench) {
    for (const GemmCase &test : gemms)
      benchGemm(test, address(test.name), bench, random);
    return 0;
  }
  for (const GemmCase &test : gemms) {
    for (int64_t depth : {1, 16, 33, 130})
      checkGemm(test, address(test.name), depth, random);
    checkGemmNaN(test, address(test.name), random);
  }
  for (const PackKernelSpec &spec : packs)
    checkPack(spec, address(spec.getName()), random);
  for (const PanelKernelSpec &spec : panels)
    checkPanels(spec, address(spec.getName()), random);
  for (const SelectKernelSpec &spec : selects)
    checkSelect(spec, address(spec.getName()), random);
  if (math) {
    float smallest = std::numeric_limits<float>::min();
    checkMath("exp", address("math_exp"), [](double v) { return std::exp(v); }, 2.0, 0, smallest);
    checkMath("erf", address("math_erf"), [](double v) { return std::erf(v); }, 0, 1e-7, smallest);
    checkMath(
        "tanh", address("math_tanh"), [](double v) { return std::tanh(v); }, 4.0, 0, smallest);
    checkRound(address("math_round"));
  }
  if (tileLevel)
    reinterpret_cast<void (*)()>(address(getTileFrameName(/*begin=*/false).str()))();
  if (emulate && !amx_products)
    fail("expected instructions of AMX in software, but got none");
  llvm::outs() << llvm::formatv(
      "{0}: {1} products, {2} packs, {3} panels, {4} selections: ", levelName, gemms.size(),
      packs.size(), panels.size(), selects.size());
  if (failures) {
    llvm::outs() << failures << " failures\n";
    return 1;
  }
  llvm::outs() << "passed\n";
  return 0;
}
