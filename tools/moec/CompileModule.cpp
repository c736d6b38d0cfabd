//===- CompileModule.cpp - from a spec or moe IR to code ------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "CompileModule.h"

#include "Commands.h"
#include "Log.h"

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Export/Module.h"
#include "moe/Export/Output.h"
#include "moe/Export/Ptxas.h"
#include "moe/Import/Import.h"
#include "moe/InitAll.h"
#include "moe/Pipelines/Phases.h"
#include "moe/Support/Files.h"
#include "moe/Support/JSON.h"
#include "moe/Target/GPU/Arch.h"
#include "moe/Target/GPU/Passes.h"
#include "moec/module.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/GPU/IR/GPUDialect.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/Diagnostics.h"
#include "mlir/Parser/Parser.h"
#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/raw_ostream.h"

namespace moec::tool {

namespace moe = mlir::moe;

static constexpr llvm::StringLiteral strategiesAttribute = "moe.strategies",
                                     reasonsAttribute = "moe.reasons";

//===----------------------------------------------------------------------===//
// The module
//===----------------------------------------------------------------------===//

struct ModuleCompiler::Impl {
  std::unique_ptr<mlir::MLIRContext> context;
  mlir::OwningOpRef<mlir::ModuleOp> module;
  std::string phase = "import"; ///< the last one that has run
};

ModuleCompiler::ModuleCompiler() : impl(std::make_unique<Impl>()) {
  mlir::DialectRegistry registry;
  moe::registerAllDialects(registry);
  // One thread: the output must not depend on the order in which functions are compiled.
  impl->context =
      std::make_unique<mlir::MLIRContext>(registry, mlir::MLIRContext::Threading::DISABLED);
}

ModuleCompiler::~ModuleCompiler() = default;

llvm::Error ModuleCompiler::import(const ModelSpec &spec) {
  noteForCrash("phase.txt", "import\n");
  auto module = importModel(spec, *impl->context);
  if (!module)
    return module.takeError();
  impl->module = std::move(*module);
  (*impl->module)
      ->setAttr(specAttribute,
                mlir::StringAttr::get(impl->context.get(),
                                      canonicalText(toJSON(spec, /*origins=*/true))));
  return llvm::Error::success();
}

llvm::Error ModuleCompiler::parse(llvm::StringRef path, std::string &from) {
  auto file = InputFile::open(path);
  if (!file)
    return file.takeError();
  auto text = (*file)->readAll(uint64_t(1) << 30);
  if (!text)
    return text.takeError();
  noteForCrash("original.mlir", *text);
  // "// moec 0.1.0, after phase tile"
  llvm::StringRef line = llvm::StringRef(*text).split('\n').first.rtrim();
  std::string written;
  if (line.consume_front("// moec ")) {
    auto [version, rest] = line.split(", after phase ");
    if (version != versionString())
      Log::get().warning(path + " was written by moec " + version + ", this is " + versionString() +
                         ": IR text is not promised to be compatible");
    written = rest.str();
  }
  if (!written.empty() && !from.empty() && written != from)
    return makeError(ErrorCode::ARGUMENT, "--compile-from",
                     "`" + written + "`, as " + path + " says", "`" + from + "`");
  if (from.empty())
    from = written.empty() ? "import" : written;
  if (!moe::findPhase(from) || moe::findPhase(from) > lastIRPhase())
    return makeError(ErrorCode::CONFIG, path, "IR after a known phase", "`" + from + "`");

  std::string diagnostics;
  mlir::ScopedDiagnosticHandler handler(impl->context.get(), [&](mlir::Diagnostic &diagnostic) {
    if (diagnostic.getSeverity() != mlir::DiagnosticSeverity::Error || !diagnostics.empty())
      return mlir::success();
    llvm::raw_string_ostream os(diagnostics);
    if (auto at = mlir::dyn_cast<mlir::FileLineColLoc>(diagnostic.getLocation()))
      os << "line " << at.getLine() << ": ";
    os << diagnostic;
    return mlir::success();
  });
  impl->module =
      mlir::parseSourceString<mlir::ModuleOp>(*text, mlir::ParserConfig(impl->context.get()), path);
  if (!impl->module)
    return makeError(ErrorCode::CONFIG, path, "moe IR that can be read", diagnostics);
  for (llvm::StringRef name : {strategiesAttribute, reasonsAttribute})
    if (auto text = (*impl->module)->getAttrOfType<mlir::StringAttr>(name))
      if (auto value = parseJSON(text.getValue(), name, ErrorCode::CONFIG); !value)
        return value.takeError();
  impl->phase = from;
  return llvm::Error::success();
}

llvm::Expected<ModelSpec> ModuleCompiler::spec() {
  if (auto text = (*impl->module)->getAttrOfType<mlir::StringAttr>(specAttribute)) {
    auto value = parseJSON(text.getValue(), specAttribute, ErrorCode::CONFIG);
    if (!value)
      return value.takeError();
    auto spec = fromJSON(*value, specAttribute);
    if (!spec)
      return spec;
    // Both can be edited by hand.
    size_t number = 0;
    for (moe::LayerOp layer : (*impl->module).getOps<moe::LayerOp>()) {
      std::string known = number < spec->layers.size() ? spec->layers[number].name : "no layer";
      if (layer.getLayerName() != known)
        return makeError(ErrorCode::CONFIG, specAttribute, "layer `" + layer.getLayerName() + "`",
                         "`" + known + "`",
                         "the attribute describes the module; edit both, or remove it");
      ++number;
    }
    if (number != spec->layers.size())
      return makeError(ErrorCode::CONFIG, specAttribute,
                       llvm::Twine(number) + " layers as in the module",
                       llvm::Twine(spec->layers.size()),
                       "the attribute describes the module; edit both, or remove it");
    return spec;
  }
  auto spec = readModel(*impl->module);
  if (spec)
    (*impl->module)
        ->setAttr(specAttribute,
                  mlir::StringAttr::get(impl->context.get(),
                                        canonicalText(toJSON(*spec, /*origins=*/true))));
  return spec;
}

//===----------------------------------------------------------------------===//
// Phases
//===----------------------------------------------------------------------===//

/// Calls `use` for every operation with its name as moe-select-strategy knows it.
static void forEachMatmul(
    mlir::ModuleOp module,
    llvm::function_ref<void(mlir::func::FuncOp, const std::string &, mlir::Operation *)> use) {
  for (auto function : module.getOps<mlir::func::FuncOp>()) {
    unsigned number = 0;
    function.walk([&](mlir::Operation *op) {
      std::string key = "router";
      if (mlir::isa<moe::GroupedMatmulOp>(op))
        key = "grouped_matmul." + std::to_string(number++);
      use(function, key, op);
    });
  }
}

/// What a person can change of a chosen schedule; null where there is none.
static llvm::json::Value fieldsOf(mlir::Operation *op) {
  if (auto tiles = op->getAttrOfType<mlir::ArrayAttr>("gpu_tiles")) {
    llvm::json::Array list;
    for (mlir::Attribute tile : tiles) {
      std::string text;
      llvm::raw_string_ostream(text) << tile;
      list.push_back(std::move(text));
    }
    llvm::json::Object out{{"gpu_tiles", std::move(list)}};
    // Only where there is a choice.
    auto matmul = mlir::dyn_cast<moe::GroupedMatmulOp>(op);
    if (matmul && matmul.getCombinePair()) {
      auto combine = op->getAttrOfType<mlir::StringAttr>("gpu_combine");
      out["gpu_combine"] = combine ? combine.getValue() : llvm::StringRef("ordered");
    }
    return std::move(out);
  }
  auto strategy = op->getAttrOfType<moe::StrategyAttr>("strategy");
  if (!strategy)
    return nullptr;
  moe::UkernelAttr kernel = strategy.getUkernel();
  return llvm::json::Object{{"rows", kernel.getRows()},
                            {"panels", kernel.getPanels()},
                            {"order", moe::stringifyKernelOrder(kernel.getOrder())},
                            {"prefetch", kernel.getPrefetch()},
                            {"ahead", kernel.getAhead()},
                            {"k_block", kernel.getKBlock()},
                            {"hint", moe::stringifyLoadHint(kernel.getHint())},
                            {"defer", kernel.getDefer()},
                            {"chunk_rows", strategy.getChunkRows()},
                            {"panels_per_task", strategy.getPanelsPerTask()},
                            {"sum_rows", strategy.getSumRows()},
                            {"k_chunk", strategy.getKChunk()}};
}

/// What the tiles of a GPU take of a processor, and when each is launched.
static std::string tileReasons(mlir::ArrayAttr tiles) {
  std::string text;
  llvm::raw_string_ostream os(text);
  for (auto tile : tiles.getAsRange<moe::GPUTileAttr>()) {
    os << (text.empty() ? "" : "; ");
    if (tile.getUpTo())
      os << "up to T*K = " << tile.getUpTo() << ": ";
    else
      os << (tiles.size() > 1 ? "beyond: " : "");
    os << tile.getRows() << " rows x " << tile.getCols() << " columns, "
       << sizeText(tile.getSharedBytes()) << " of shared memory and at least "
       << tile.getRegisters() << " registers for each of " << tile.getThreads() << " threads";
  }
  return text;
}

/// What speaks for a schedule, in numbers; null where there is none.
static llvm::json::Value reasonOf(mlir::Operation *op) {
  if (auto tiles = op->getAttrOfType<mlir::ArrayAttr>("gpu_tiles"))
    return tileReasons(tiles);
  auto strategy = op->getAttrOfType<moe::StrategyAttr>("strategy");
  if (!strategy)
    return nullptr;
  moe::UkernelAttr kernel = strategy.getUkernel();
  std::string text;
  llvm::raw_string_ostream os(text);
  auto [registers, lanes] = moe::UkernelAttr::getRegisterFile(kernel.getLevel());
  if (kernel.getProduct() == moe::KernelProduct::TileBF16)
    os << kernel.getRows() << " rows x 32 columns are " << kernel.getRows() / 16 * 2
       << " tiles of sums";
  else
    os << kernel.getRows() << " rows x " << kernel.getPanels() << " panel(s) use "
       << moe::UkernelAttr::getRegistersNeeded(kernel.getRows(), kernel.getVectorsPerRow(),
                                               kernel.getOrder())
       << " of " << registers << " registers of " << lanes << " floats";
  os << ", products by " << moe::stringifyKernelProduct(kernel.getProduct());
  if (auto matmul = mlir::dyn_cast<moe::GroupedMatmulOp>(op)) {
    moe::KernelProduct product = kernel.getProduct();
    bool pairs = product == moe::KernelProduct::DotBF16 || product == moe::KernelProduct::TileBF16;
    uint64_t element = pairs ? 2 : 4;
    os << "; a chunk of " << strategy.getChunkRows() << " rows takes "
       << sizeText(element * strategy.getChunkRows() * matmul.getWeightType().getCols())
       << " of L2, and " << strategy.getPanelsPerTask() << " of "
       << matmul.getWeightType().panelCount() << " panels share a pass over it; rows from "
       << moe::stringifyRowSource(strategy.getSource()) << ", result as "
       << moe::stringifyResultForm(strategy.getResult());
    uint64_t group = 64 / element;
    if (strategy.getKChunk())
      os << "; all panels of a task take " << group * strategy.getKChunk()
         << " of k before the next, so "
         << sizeText(strategy.getChunkRows() * strategy.getKChunk() * 64) << " of them wait in L2";
    if (kernel.getKBlock() && kernel.getKBlock() != strategy.getKChunk())
      os << "; " << sizeText(kernel.getKBlock() * 64 * 32)
         << " of a panel at a time stay in L1 for all blocks";
    if (kernel.getAhead())
      os << "; blocks touch " << kernel.getAhead()
         << " lines of later weights a step, which memory delivers slower than tiles compute";
    if (kernel.getDefer())
      os << "; a block's result is made while the next one multiplies";
    if (matmul.hasCombine())
      os << "; the sums of " << strategy.getPanelsPerTask()
         << " panels up to T = " << strategy.getSumRows() / strategy.getPanelsPerTask() << " take "
         << sizeText(strategy.getSumRows() * 128) << ", with more tokens those of fewer panels";
  }
  return text;
}

/// Functions, of matmuls, of what `value` says about them (null: nothing).
static std::string collect(mlir::ModuleOp module,
                           llvm::function_ref<llvm::json::Value(mlir::Operation *)> value) {
  llvm::json::Object functions;
  forEachMatmul(module,
                [&](mlir::func::FuncOp function, const std::string &key, mlir::Operation *op) {
                  llvm::json::Value said = value(op);
                  if (said.getAsNull())
                    return;
                  llvm::json::Value &ops = functions[function.getSymName()];
                  if (!ops.getAsObject())
                    ops = llvm::json::Object{};
                  (*ops.getAsObject())[key] = std::move(said);
                });
  return canonicalText(std::move(functions));
}

/// A module that was read may have its targets already: they have to be those that are wanted.
static llvm::Error checkTargets(mlir::ModuleOp module, const moe::PipelineOptions &options,
                                llvm::ArrayRef<std::string> gpus) {
  std::vector<std::string> made;
  if (auto targets = module->getAttrOfType<mlir::ArrayAttr>("moe.targets"))
    for (auto target : targets.getAsRange<moe::TargetAttr>())
      if (target.getDevice() == moe::Device::CUDA)
        made.push_back(target.getLevel().str());
  if (made.empty() || made == options.gpuLevels)
    return llvm::Error::success();
  if (!options.isGPU())
    return makeError(ErrorCode::TARGET, "--target", "`cuda`, for which the module was made",
                     "`cpu`");
  return makeError(ErrorCode::TARGET, "--gpu",
                   "names for the levels that the module has, " + quoteList(made, "and"),
                   "`" + llvm::join(gpus, ",") + "`");
}

llvm::Error ModuleCompiler::runPhases(const PipelineChoice &choice) {
  auto options = pipelineOptions(choice);
  if (!options)
    return options.takeError();
  mlir::ModuleOp module = *impl->module;
  if (llvm::Error error = checkTargets(module, *options, choice.gpus))
    return error;
  if (!choice.dumpFolder.empty()) {
    if (std::error_code error = llvm::sys::fs::create_directories(choice.dumpFolder))
      return osError(choice.dumpFolder, "a folder that can be created", error.value());
  }
  auto dump = [&](llvm::StringRef phase) -> llvm::Error {
    if (choice.dumpFolder.empty())
      return llvm::Error::success();
    size_t number = moe::findPhase(phase) - moe::phases().begin();
    std::string name = (number < 10 ? "0" : "") + std::to_string(number) + "-" + phase.str();
    return replaceFile(choice.dumpFolder + "/" + name + ".mlir", text());
  };
  const moe::Phase *first = moe::findPhase(impl->phase) + 1;
  const moe::Phase *last = choice.to.empty() ? lastIRPhase() : moe::findPhase(choice.to);
  if (impl->phase == "import")
    if (llvm::Error error = dump("import"))
      return error;
  options->afterPhase = [&](llvm::StringRef phase, mlir::ModuleOp after) -> llvm::Error {
    impl->phase = phase.str();
    if (phase == "strategy") {
      mlir::Builder builder(after.getContext());
      after->setAttr(strategiesAttribute, builder.getStringAttr(collect(after, fieldsOf)));
      after->setAttr(reasonsAttribute, builder.getStringAttr(collect(after, reasonOf)));
      if (choice.remarks)
        forEachMatmul(after,
                      [](mlir::func::FuncOp function, const std::string &key, mlir::Operation *op) {
                        llvm::json::Value said = reasonOf(op);
                        if (auto reason = said.getAsString())
                          llvm::errs() << "remark: " << function.getSymName() << ": " << key << ": "
                                       << *reason << "\n";
                      });
    }
    if (const moe::Phase *next = moe::findPhase(phase) + 1; next <= lastIRPhase())
      noteForCrash("phase.txt", (next->name + "\n").str());
    return dump(phase);
  };
  if (first > last)
    return llvm::Error::success();
  noteForCrash("phase.txt", (first->name + "\n").str());
  return moe::runPhases(module, first->name, last->name, *options);
}

std::string ModuleCompiler::text() const {
  std::string out = ("// moec " + versionString() + ", after phase " + impl->phase + "\n").str();
  llvm::raw_string_ostream os(out);
  impl->module->print(os);
  os << "\n";
  return out;
}

llvm::Expected<moe::CodeTable> ModuleCompiler::table(const ModelSpec &spec, bool needCode) {
  auto table = moe::buildCodeTable(*impl->module, spec.name, versionString(), needCode);
  if (!table)
    return table.takeError();
  if (table->layers.size() != spec.layers.size())
    return makeError(ErrorCode::INTERNAL, "module",
                     llvm::Twine(spec.layers.size()) + " layers, as its spec says",
                     llvm::Twine(table->layers.size()));
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (table->layers[i].name != spec.layers[i].name)
      return makeError(ErrorCode::INTERNAL, "module", "layer `" + spec.layers[i].name + "`",
                       "`" + table->layers[i].name + "`");
    table->layers[i].id = layerId(spec.layers[i]);
  }
  return table;
}

llvm::Error ModuleCompiler::addImages(moe::CodeTable &table, llvm::ArrayRef<std::string> gpus,
                                      llvm::StringRef scratch) {
  auto kernels = (*impl->module)->getAttrOfType<mlir::ArrayAttr>(moe::kKernelsAttrName);
  auto binaries = llvm::to_vector(impl->module->getOps<mlir::gpu::BinaryOp>());
  if (!kernels || binaries.empty())
    return makeError(ErrorCode::INTERNAL, "codegen", "modules of kernels", "none",
                     "run the phases up to `codegen` for cuda first");
  for (mlir::gpu::BinaryOp binary : binaries) {
    // The pass keeps the order of the levels: by rising rank.
    std::string level = binary.getName().substr(moe::kernelsModuleName("").size()).str();
    moe::GPULevel &out = table.gpuLevels.emplace_back();
    out.level = level;
    out.rank = moe::findGPUArch(level)->rank;
    out.needs = level == "sm_90a" ? MOEC_GPU_MAPS : 0;
    out.firstKernel = static_cast<int32_t>(table.kernels.size());
    for (auto kernel : kernels.getAsRange<mlir::DictionaryAttr>())
      if (kernel.getAs<mlir::StringAttr>("level") == level)
        table.kernels.push_back(
            {kernel.getAs<mlir::StringAttr>("name").str(),
             static_cast<uint32_t>(kernel.getAs<mlir::IntegerAttr>("threads").getInt()),
             static_cast<uint32_t>(kernel.getAs<mlir::IntegerAttr>("shared").getInt())});
    out.kernelCount = static_cast<int32_t>(table.kernels.size()) - out.firstKernel;
    auto object = mlir::cast<mlir::gpu::ObjectAttr>(binary.getObjects()[0]);
    std::string ptx = object.getObject().getValue().rtrim('\0').str();
    out.firstImage = static_cast<int32_t>(table.images.size());
    for (const std::string &gpu : gpus) {
      if (moe::gpuLevelOf(gpu) != level)
        continue;
      auto cubin = assemble(ptx, gpu, scratch);
      if (!cubin)
        return cubin.takeError();
      llvm::StringRef number = llvm::StringRef(gpu).drop_front(3);
      int32_t kind = number.consume_back("a") ? MOEC_IMAGE_EXACT : MOEC_IMAGE_CUBIN, arch = 0;
      number.getAsInteger(10, arch);
      table.images.push_back({kind, arch, gpu, std::move(*cubin)});
    }
    // What is made of wgmma runs on no other architecture.
    if (level == "sm_80")
      table.images.push_back({MOEC_IMAGE_PTX, 80, "compute_80", ptx + '\0'});
    out.imageCount = static_cast<int32_t>(table.images.size()) - out.firstImage;
  }
  table.abi = 0x00010003u; // the runtime has to know levels
  return llvm::Error::success();
}

/// `generate`'s result, with what MLIR said where it failed.
template <typename Result>
static Result withDiagnostics(mlir::MLIRContext *context, llvm::function_ref<Result()> generate) {
  std::string diagnostics;
  mlir::ScopedDiagnosticHandler handler(context, [&](mlir::Diagnostic &diagnostic) {
    if (diagnostic.getSeverity() == mlir::DiagnosticSeverity::Error)
      diagnostics += (diagnostics.empty() ? "" : "; ") + diagnostic.str();
    return mlir::success();
  });
  Result result = generate();
  if (!result && !diagnostics.empty())
    return llvm::joinErrors(result.takeError(),
                            makeError(ErrorCode::INTERNAL, "codegen", "", diagnostics));
  return result;
}

llvm::Expected<llvm::SmallVector<char, 0>> ModuleCompiler::code(const moe::CodeTable &table,
                                                                moe::CodeFormat format) {
  return withDiagnostics<llvm::Expected<llvm::SmallVector<char, 0>>>(
      impl->context.get(), [&] { return moe::generateCode(*impl->module, &table, format); });
}

llvm::Expected<std::vector<llvm::SmallVector<char, 0>>>
ModuleCompiler::objects(const moe::CodeTable &table) {
  return withDiagnostics<llvm::Expected<std::vector<llvm::SmallVector<char, 0>>>>(
      impl->context.get(), [&] { return moe::generateObjects(*impl->module, &table); });
}

/// JSON text of an attribute of the module, which `parse` has seen if it came from outside.
static llvm::json::Value readAttribute(mlir::ModuleOp module, llvm::StringRef name) {
  if (auto text = module->getAttrOfType<mlir::StringAttr>(name))
    return llvm::cantFail(llvm::json::parse(text.getValue()), "checked by parse");
  return llvm::json::Object{};
}

llvm::json::Value ModuleCompiler::strategies() const {
  return readAttribute(*impl->module, strategiesAttribute);
}

llvm::json::Value ModuleCompiler::reasons() const {
  return readAttribute(*impl->module, reasonsAttribute);
}

} // namespace moec::tool
