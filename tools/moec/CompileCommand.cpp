//===- CompileCommand.cpp - moec compile ----------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "CompileModule.h"
#include "Log.h"
#include "Model.h"

#include "moe/Export/Link.h"
#include "moe/Export/Manifest.h"
#include "moe/Export/Module.h"
#include "moe/Export/Output.h"
#include "moe/Export/Ptxas.h"

#include "llvm/Support/FileSystem.h"
#include "llvm/Support/raw_ostream.h"

#include <cerrno>
#include <chrono>
#include <sys/stat.h>

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string>
    model(cl::Positional, cl::Required,
          cl::desc("MODEL (checkpoint folder, config.json, *.moe.json, *.mlir)"),
          cl::sub(compileParser()));
static cl::opt<std::string> output("o", cl::desc("What to make: a folder, or a file (- is stdout)"),
                                   cl::value_desc("DIR"), cl::cat(category()),
                                   cl::sub(compileParser()));
static cl::opt<std::string> layersOption("layers", cl::init("all"),
                                         cl::desc("Decoder layers to compile (default all)"),
                                         cl::value_desc("all|0,3-5"), cl::cat(category()),
                                         cl::sub(compileParser()));
static cl::opt<std::string> dtypeOption("dtype", cl::init("auto"),
                                        cl::desc("Format of weights and computation (default auto: "
                                                 "as in the checkpoint)"),
                                        cl::value_desc("auto|f32|bf16"), cl::cat(category()),
                                        cl::sub(compileParser()));
static cl::opt<std::string>
    routerOption("router",
                 cl::desc("How routers round: f32, or as the model's own code does (default: as "
                          "MODEL says, f32 for checkpoints)"),
                 cl::value_desc("f32|model"), cl::cat(category()), cl::sub(compileParser()));
static cl::opt<std::string> targetOption("target", cl::init("cpu"),
                                         cl::desc("Target (default cpu)"),
                                         cl::value_desc("cpu|cuda"), cl::cat(category()),
                                         cl::sub(compileParser()));
static cl::opt<std::string>
    cpuOption("cpu", cl::init("multi"),
              cl::desc("CPU levels (default multi: every level in one library, chosen at load)"),
              cl::value_desc("native|x86-64-v3|x86-64-v4|avx512-bf16|amx-bf16|multi"),
              cl::cat(category()), cl::sub(compileParser()));
static cl::opt<std::string> gpuOption(
    "gpu", cl::init("sm_80,sm_90a"),
    cl::desc("GPUs to make machine code for (default sm_80,sm_90a). sm_90a has kernels of its own, "
             "the others run those of sm_80; with one of them there is PTX for everything newer"),
    cl::value_desc("sm_80,sm_86,sm_87,sm_89,sm_90,sm_90a"), cl::cat(category()),
    cl::sub(compileParser()));
static cl::opt<std::string> checkpointOption("checkpoint",
                                             cl::desc("Where weights come from, if not from MODEL"),
                                             cl::value_desc("PATH|random:SEED|none"),
                                             cl::cat(category()), cl::sub(compileParser()));
static cl::opt<std::string> emitOption("emit", cl::init("lib"),
                                       cl::desc("What to make (default lib)"),
                                       cl::value_desc("lib|archive|obj|asm|llvm|mlir|header"),
                                       cl::cat(category()), cl::sub(compileParser()));
static cl::opt<std::string>
    fromOption("compile-from", cl::desc("Start after PHASE (MODEL is a .mlir of that phase)"),
               cl::value_desc("PHASE"), cl::cat(category()), cl::sub(compileParser()));
static cl::opt<std::string> toOption("compile-to", cl::desc("Stop after PHASE and write its IR"),
                                     cl::value_desc("PHASE"), cl::cat(category()),
                                     cl::sub(compileParser()));
static cl::opt<std::string> dumpOption("dump-phases",
                                       cl::desc("Write the IR after every phase into folder D"),
                                       cl::value_desc("D"), cl::cat(category()),
                                       cl::sub(compileParser()));
static cl::opt<bool> printPipelineOption("print-pipeline",
                                         cl::desc("Print the moe-opt command of each phase"),
                                         cl::cat(category()), cl::sub(compileParser()));
static cl::opt<std::string>
    strategyOption("strategy", cl::desc("Use this schedule (the strategy section of a manifest)"),
                   cl::value_desc("FILE"), cl::cat(category()), cl::sub(compileParser()));
static cl::list<std::string> disableOption("disable-pass", cl::desc("Leave a pass out"),
                                           cl::value_desc("P"), cl::CommaSeparated,
                                           cl::cat(category()), cl::sub(compileParser()));
static cl::opt<bool> remarksOption("remarks", cl::desc("Print why each schedule was chosen"),
                                   cl::cat(category()), cl::sub(compileParser()));
static cl::opt<bool> dryRunOption("dry-run",
                                  cl::desc("Print what would be made: sizes, time, memory"),
                                  cl::cat(category()), cl::sub(compileParser()));
static cl::opt<bool> forceOption("force", cl::desc("Replace an existing DIR that moec wrote"),
                                 cl::cat(category()), cl::sub(compileParser()));
static cl::opt<std::string> nameOption("name", cl::desc("Name of the library, a C identifier"),
                                       cl::value_desc("NAME"), cl::cat(category()),
                                       cl::sub(compileParser()));

static cl::opt<std::string>
    machineOption("machine", cl::desc("Compile for the machine of this file (moec doctor --save)"),
                  cl::value_desc("FILE"), cl::cat(category()), cl::sub(compileParser()));
static cl::opt<int64_t> threadsOption(
    "threads", cl::init(0),
    cl::desc("Threads that pack weights (default 0: one for every CPU that may be used)"),
    cl::value_desc("N"), cl::cat(category()), cl::sub(compileParser()));

namespace {
enum class Emit { Lib, Archive, Obj, Asm, LLVM, MLIR, Header };

/// The options, understood.
struct Request {
  Emit emit = Emit::Lib;
  bool toStdout = false;
  std::optional<Format> dtype;
  std::optional<Precision> router;
  WeightsChoice weights;
  std::optional<std::vector<int64_t>> layers;
  PipelineChoice pipeline;
  unsigned threads = 1;
  bool isMLIR = false;

  bool makesFolder() const { return emit == Emit::Lib || emit == Emit::Archive; }
};
} // namespace

static llvm::Expected<Request> understand() {
  Request out;
  auto wrong = [](const char *option, const llvm::Twine &expected, llvm::StringRef got,
                  const llvm::Twine &hint = "") {
    return makeError(ErrorCode::ARGUMENT, option, expected,
                     got.empty() ? llvm::Twine("nothing") : "`" + got + "`", hint);
  };
  const std::pair<const char *, Emit> emits[] = {
      {"lib", Emit::Lib},   {"archive", Emit::Archive}, {"obj", Emit::Obj},      {"asm", Emit::Asm},
      {"llvm", Emit::LLVM}, {"mlir", Emit::MLIR},       {"header", Emit::Header}};
  bool known = false;
  for (auto [name, emit] : emits)
    if (emitOption == name) {
      out.emit = emit;
      known = true;
    }
  if (!known)
    return wrong("--emit", "`lib`, `archive`, `obj`, `asm`, `llvm`, `mlir` or `header`",
                 emitOption);
  if (!toOption.empty()) {
    if (emitOption.getNumOccurrences() && out.emit != Emit::MLIR)
      return wrong("--emit", "`mlir` with --compile-to", emitOption);
    out.emit = Emit::MLIR;
  }
  if (dtypeOption == "f32")
    out.dtype = Format::F32;
  else if (dtypeOption == "bf16")
    out.dtype = Format::BF16;
  else if (dtypeOption != "auto")
    return wrong("--dtype", "`auto`, `f32` or `bf16`", dtypeOption);
  if (routerOption == "f32")
    out.router = Precision::F32;
  else if (routerOption == "model")
    out.router = Precision::Model;
  else if (routerOption.getNumOccurrences())
    return wrong("--router", "`f32` or `model`", routerOption);
  bool cuda = targetOption == "cuda";
  if (!cuda && targetOption != "cpu")
    return makeError(ErrorCode::TARGET, "--target", "`cpu` or `cuda`", "`" + targetOption + "`");
  if (!cuda && gpuOption.getNumOccurrences())
    return wrong("--gpu", "no GPU with --target cpu", gpuOption, "add --target cuda");
  if (cuda && cpuOption.getNumOccurrences())
    return wrong("--cpu", "no CPU level with --target cuda", cpuOption);
  if (cuda && machineOption.getNumOccurrences())
    return wrong("--machine", "no file with --target cuda", machineOption);
  if (cuda) {
    auto gpus = parseGPUs(gpuOption);
    if (!gpus)
      return gpus.takeError();
    out.pipeline.gpus = std::move(*gpus);
  }
  auto threads = parseThreads(threadsOption);
  if (!threads)
    return threads.takeError();
  out.threads = *threads;
  std::optional<MachineConstants> machine;
  if (!machineOption.empty()) {
    auto read = readMachine(machineOption);
    if (!read)
      return read.takeError();
    machine = std::move(*read);
    auto one = [&](const std::map<std::string, Rate> &rates, llvm::StringRef name) {
      auto found = rates.find(name.str());
      return found == rates.end() ? int64_t(0) : static_cast<int64_t>(found->second.one);
    };
    int64_t readOne = 0;
    for (const auto &[name, rate] : machine->read)
      readOne = std::max(readOne, static_cast<int64_t>(rate.one));
    out.pipeline.core = {{"l1-bytes", machine->l1d},
                         {"l2-bytes", machine->l2},
                         {"read", readOne},
                         {"fma-256", one(machine->flops, "fma_f32_256")},
                         {"fma-512", one(machine->flops, "fma_f32_512")},
                         {"dot", one(machine->flops, "dpbf16_512")},
                         {"tile", one(machine->flops, "amx_bf16")}};
  }
  auto levels = parseLevels(cpuOption, machine ? &*machine : nullptr);
  if (!levels)
    return levels.takeError();
  out.pipeline.levels = std::move(*levels);
  out.pipeline.from = fromOption;
  out.pipeline.to = toOption;
  out.pipeline.dumpFolder = dumpOption;
  out.pipeline.strategyFile = strategyOption;
  out.pipeline.disabledPasses = disableOption;
  out.pipeline.remarks = remarksOption;
  if (llvm::Error error = checkPipelineChoice(out.pipeline))
    return std::move(error);
  auto weights = parseWeightsChoice(checkpointOption);
  if (!weights)
    return weights.takeError();
  out.weights = std::move(*weights);
  if (layersOption != "all") {
    auto numbers = parseNumberList(layersOption, "--layers");
    if (!numbers)
      return numbers.takeError();
    out.layers = std::move(*numbers);
  }
  if (nameOption.getNumOccurrences()) {
    llvm::StringRef name = nameOption;
    bool good =
        !name.empty() && name.size() <= 100 && !isdigit(static_cast<unsigned char>(name[0]));
    for (unsigned char c : name)
      good &= isalnum(c) || c == '_';
    if (!good)
      return wrong("--name", "a C identifier of at most 100 characters", name);
  }
  out.isMLIR = llvm::StringRef(model).ends_with(".mlir");
  if (!out.isMLIR && !fromOption.empty() && fromOption != "import")
    return wrong("--compile-from", "a MODEL that is a .mlir file", model);
  if (out.isMLIR && out.dtype)
    return wrong("--dtype", "no format, as the .mlir file has decided it", dtypeOption);
  if (out.isMLIR && out.router)
    return wrong("--router", "nothing, as the .mlir file has decided it", routerOption);
  if (out.isMLIR && out.layers)
    return wrong("--layers", "`all` for a .mlir file", layersOption);
  bool needsOutput = !dryRunOption && !printPipelineOption;
  if (needsOutput && output.empty()) {
    if (out.makesFolder())
      return wrong("-o", "the folder to make", "");
    output = "-";
  }
  out.toStdout = output == "-";
  if (needsOutput && out.toStdout && out.makesFolder())
    return wrong("-o", "a folder", "-");
  return out;
}

//===----------------------------------------------------------------------===//
// The work, in the child
//===----------------------------------------------------------------------===//

static llvm::Error deliver(const Request &request, llvm::StringRef bytes) {
  if (request.toStdout) {
    llvm::outs() << bytes;
    return llvm::Error::success();
  }
  return writeFile(stageFolder + "/output", bytes, output);
}

static llvm::Error selectLayers(ModelSpec &spec, const std::vector<int64_t> &wanted) {
  for (int64_t number : wanted)
    if (llvm::none_of(spec.layers, [&](const LayerSpec &l) { return l.index == number; }))
      return noSuchLayer(spec, number);
  llvm::erase_if(spec.layers,
                 [&](const LayerSpec &l) { return !llvm::is_contained(wanted, l.index); });
  return llvm::Error::success();
}

static llvm::Error work(Request request) {
  auto begin = std::chrono::steady_clock::now();
  if (printPipelineOption) {
    auto text = pipelineText(request.pipeline);
    if (!text)
      return text.takeError();
    llvm::outs() << *text;
    return llvm::Error::success();
  }

  ModuleCompiler compiler;
  ModelSpec spec;
  std::unique_ptr<Checkpoint> checkpoint;
  noteForCrash("phase.txt", "reading " + model + "\n");
  if (request.isMLIR) {
    if (llvm::Error error = compiler.parse(model, request.pipeline.from))
      return error;
    auto found = compiler.spec();
    if (!found)
      return found.takeError();
    spec = std::move(*found);
    if (request.weights.kind == WeightsChoice::Path) {
      llvm::sys::fs::file_status status;
      bool isFolder = !llvm::sys::fs::status(request.weights.path, status) &&
                      llvm::sys::fs::is_directory(status);
      auto opened = isFolder ? Checkpoint::open(request.weights.path, followLinks())
                             : Checkpoint::openFile(request.weights.path);
      if (!opened)
        return opened.takeError();
      for (const LayerSpec &layer : spec.layers)
        for (const WeightSpec &weight : layer.weights)
          if (llvm::Error error = (*opened)->checkWeight(weight, model))
            return error;
      checkpoint = std::move(*opened);
    }
  } else {
    auto loaded = loadModelWith(model, request.weights, request.dtype);
    if (!loaded)
      return loaded.takeError();
    // A folder is a checkpoint; a config.json or a spec describes shapes.
    if (request.makesFolder() && request.weights.kind == WeightsChoice::Own &&
        !loaded->checkpoint && llvm::sys::fs::is_directory(model))
      return makeError(ErrorCode::TENSOR, model, "a checkpoint folder with weights (*.safetensors)",
                       "none in it",
                       "say where they come from: --checkpoint none (code alone), random:SEED, or "
                       "the PATH of a folder");
    spec = std::move(loaded->spec);
    checkpoint = std::move(loaded->checkpoint);
  }
  if (nameOption.getNumOccurrences())
    spec.name = nameOption;
  if (request.layers)
    if (llvm::Error error = selectLayers(spec, *request.layers))
      return error;
  if (spec.layers.empty())
    return makeError(ErrorCode::CONFIG, model, "at least one layer", "none");
  for (const LayerSpec &layer : spec.layers)
    if (!request.pipeline.gpus.empty() && layer.compute != Format::BF16)
      return makeError(ErrorCode::UNSUPPORTED, "--target cuda: " + layer.name,
                       "a layer that computes in bf16", name(layer.compute),
                       "--dtype bf16 converts the weights");
  // Before minutes of work: the assembler that its end needs.
  if (!request.pipeline.gpus.empty() && request.pipeline.to.empty() && !dryRunOption)
    if (auto ptxas = findPtxas(); !ptxas)
      return ptxas.takeError();
  if (request.router)
    for (LayerSpec &layer : spec.layers)
      if (layer.kind == LayerKind::MoE)
        layer.router.precision = *request.router;
  if (llvm::Error error = checkModel(spec))
    return error;

  bool packs =
      request.makesFolder() && (checkpoint || request.weights.kind == WeightsChoice::Random);
  if (dryRunOption) {
    llvm::outs() << planText(spec, request.pipeline, request.threads, packs,
                             checkpoint ? checkpoint->size() : 0, output);
    return llvm::Error::success();
  }
  if (!request.isMLIR)
    if (llvm::Error error = compiler.import(spec))
      return error;
  noteForCrash("input.mlir", compiler.text());
  if (request.emit == Emit::Header) {
    auto table = compiler.table(spec, /*needCode=*/false);
    if (!table)
      return table.takeError();
    return deliver(request, headerText(*table));
  }
  if (llvm::Error error = compiler.runPhases(request.pipeline))
    return error;
  if (request.emit == Emit::MLIR)
    return deliver(request, compiler.text());

  noteForCrash("phase.txt", "codegen\n");
  auto table = compiler.table(spec, /*needCode=*/true);
  if (!table)
    return table.takeError();
  if (!request.pipeline.gpus.empty())
    if (llvm::Error error = compiler.addImages(*table, request.pipeline.gpus, stageFolder))
      return error;
  auto format = request.emit == Emit::Asm    ? mlir::moe::CodeFormat::Assembly
                : request.emit == Emit::LLVM ? mlir::moe::CodeFormat::LLVM
                                             : mlir::moe::CodeFormat::Object;
  // An archive holds one object, whose functions are its own: two of them go into one program.
  bool archive = request.emit == Emit::Archive, single = archive || !request.makesFolder();
  std::vector<llvm::SmallVector<char, 0>> code;
  if (single) {
    auto one = compiler.code(*table, format);
    if (!one)
      return one.takeError();
    code.push_back(std::move(*one));
  } else {
    auto several = compiler.objects(*table);
    if (!several)
      return several.takeError();
    code = std::move(*several);
  }
  if (!request.makesFolder())
    return deliver(request, llvm::StringRef(code.front().data(), code.front().size()));

  // The folder. LLD resets every option of this process, so they are read before it runs.
  std::string target = output;
  noteForCrash("phase.txt", "export\n");
  std::string folder = stageFolder + "/output";
  std::string library = "lib" + spec.name + (archive ? ".a" : ".so");
  std::vector<std::string> objects;
  for (const auto &bytes : code) {
    std::string name = spec.name + (single ? "" : "." + std::to_string(objects.size())) + ".o";
    objects.push_back(stageFolder + "/" + name);
    if (llvm::Error error =
            writeFile(objects.back(), llvm::StringRef(bytes.data(), bytes.size()), name))
      return error;
  }
  if (archive) {
    if (llvm::Error error = writeArchive(objects.front(), folder + "/" + library, spec.name + ".o"))
      return error;
  } else if (llvm::Error error = linkShared(objects, folder + "/" + library, library,
                                            table->symbol(), stageFolder)) {
    return error;
  }
  for (const std::string &object : objects)
    llvm::sys::fs::remove(object);
  if (llvm::Error error = writeFile(folder + "/" + spec.name + ".h", headerText(*table)))
    return error;
  ManifestInput manifest{
      spec, *table, compiler.strategies(), compiler.reasons(), library, spec.name + ".h", 0};
  uint64_t libraryBytes = 0;
  llvm::sys::fs::file_size(folder + "/" + library, libraryBytes);
  manifest.libraryBytes = libraryBytes;
  if (llvm::Error error = writeFile(folder + "/manifest.json", manifestText(manifest)))
    return error;
  double codeSeconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  uint64_t packed = 0;
  if (packs) {
    noteForCrash("phase.txt", "pack\n");
    std::string weights = folder + "/weights";
    if (::mkdir(weights.c_str(), 0777))
      return osError("weights", "a folder that can be created", errno);
    std::vector<std::array<uint8_t, 32>> ids;
    for (const mlir::moe::LayerEntry &layer : table->layers)
      ids.push_back(layer.id);
    if (llvm::Error error = packModel(
            spec, ids,
            [&] {
              return checkpoint ? checkpointWeights(*checkpoint)
                                : randomWeights(request.weights.seed);
            },
            weights, request.threads))
      return error;
    for (const LayerSpec &layer : spec.layers)
      packed += packedFileBytes(layer);
  }
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  Log::get().note(
      llvm::Twine(target) + ": " + llvm::Twine(spec.layers.size()) + " layer" +
      (spec.layers.size() == 1 ? "" : "s") + ", " + llvm::Twine(table->codes.size()) +
      " distinct; " + library + " " + sizeText(libraryBytes) + " in " + timeText(codeSeconds) +
      (packs ? "; weights " + sizeText(packed) + " in " + timeText(seconds - codeSeconds)
             : std::string("; no weights (moec pack makes them)")));
  return llvm::Error::success();
}

static int run() {
  auto request = understand();
  if (!request)
    return Log::get().report(request.takeError());
  if (!stageFolder.empty())
    return Log::get().report(work(std::move(*request)));
  if (dryRunOption || printPipelineOption || request->toStdout)
    return runInChildWithoutOutput();
  return runInChild(output, /*isFile=*/!request->makesFolder(), /*isWeights=*/false, forceOption);
}

const Command compileCommand = {"compile", "MODEL -o DIR",
                                "Compile a model's MoE and FFN layers into a library.",
                                compileParser, run};

} // namespace moec::tool
