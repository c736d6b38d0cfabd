//===- BenchCommand.cpp - moec bench --------------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Bench.h"
#include "Commands.h"
#include "CompileModule.h"
#include "Log.h"
#include "Measure.h"
#include "Model.h"

#include "moe/Support/JSON.h"
#include "moe/Target/GPU/Arch.h"

#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string> subject(cl::Positional, cl::Required, cl::desc("DIR|MODEL"),
                                    cl::value_desc("DIR|MODEL"), cl::sub(benchParser()));
static cl::list<int64_t> tokensOption("tokens",
                                      cl::desc("Tokens of a call (default 1,8,64,512,2048)"),
                                      cl::value_desc("T,T"), cl::CommaSeparated,
                                      cl::cat(category()), cl::sub(benchParser()));
static cl::list<std::string>
    routingOption("routing",
                  cl::desc("How tokens choose experts (default uniform); recorded: as moec run "
                           "--trace wrote; model: the layer's own router on random tokens"),
                  cl::value_desc("uniform|zipf|one-expert|recorded:FILE|model"), cl::CommaSeparated,
                  cl::cat(category()), cl::sub(benchParser()));
static cl::opt<std::string> formatOption("o", cl::init("md"), cl::desc("Form of the rows"),
                                         cl::value_desc("md|csv|json|jsonl"), cl::cat(category()),
                                         cl::sub(benchParser()));
static cl::opt<double> spreadOption(
    "spread",
    cl::desc("Fail (exit 7) if the quartiles of a row are further apart than P percent "
             "of its median"),
    cl::value_desc("P"), cl::init(0), cl::cat(category()), cl::sub(benchParser()));
static cl::opt<std::string> layersOption("layers", cl::init("all"),
                                         cl::desc("Decoder layers to measure (default all: one of "
                                                  "each kind)"),
                                         cl::value_desc("all|0,3-5"), cl::cat(category()),
                                         cl::sub(benchParser()));
static cl::opt<std::string> dtypeOption("dtype", cl::init("auto"),
                                        cl::desc("Format of weights and computation of a MODEL"),
                                        cl::value_desc("auto|f32|bf16"), cl::cat(category()),
                                        cl::sub(benchParser()));
static cl::opt<std::string> cpuOption("cpu", cl::desc("Highest CPU level to use, as x86-64-v3"),
                                      cl::value_desc("LEVEL"), cl::cat(category()),
                                      cl::sub(benchParser()));
static cl::opt<std::string> gpuOption("gpu", cl::desc("GPU level to use, as sm_80 (default: best)"),
                                      cl::value_desc("LEVEL"), cl::cat(category()),
                                      cl::sub(benchParser()));
static cl::opt<std::string> deviceOption("device", cl::init("cpu"),
                                         cl::desc("Where to measure (default cpu)"),
                                         cl::value_desc("cpu|cuda|cuda:N"), cl::cat(category()),
                                         cl::sub(benchParser()));
static cl::opt<int> threadsOption("threads",
                                  cl::desc("Threads (default: those this process may use)"),
                                  cl::value_desc("N"), cl::init(0), cl::cat(category()),
                                  cl::sub(benchParser()));
static cl::opt<int64_t> banksOption("banks",
                                    cl::desc("Sets of weights to rotate over (default: until they "
                                             "exceed twice the last-level cache)"),
                                    cl::value_desc("N"), cl::init(0), cl::cat(category()),
                                    cl::sub(benchParser()));
static cl::opt<int64_t> blocksOption("blocks",
                                     cl::desc("Blocks of calls a test (default 15, fewer where "
                                              "calls are long)"),
                                     cl::value_desc("N"), cl::init(0), cl::cat(category()),
                                     cl::sub(benchParser()));
static cl::opt<uint64_t> seedOption("seed", cl::desc("Seed of inputs and routing (default 0)"),
                                    cl::value_desc("S"), cl::init(0), cl::cat(category()),
                                    cl::sub(benchParser()));
static cl::opt<bool> noDenseOption("no-dense",
                                   cl::desc("Leave out the dense FFN of equal active parameters"),
                                   cl::cat(category()), cl::sub(benchParser()));
static cl::opt<std::string> machineOption("machine",
                                          cl::desc("Take peaks from a file of moec doctor --save "
                                                   "instead of measuring them in this run"),
                                          cl::value_desc("FILE"), cl::cat(category()),
                                          cl::sub(benchParser()));

namespace {
/// The options, understood. Read before anything links: LLD resets all options of the process.
struct Request {
  BenchSetup setup;
  BenchOptions options;
  std::vector<int64_t> tokens;
  std::vector<Routing> routings;
  std::string format;
  double spread = 0;
  int32_t threads = 0;
  std::optional<MachineConstants> machine;
};
} // namespace

static llvm::Expected<Request> understand() {
  Request out;
  auto wrong = [](const char *option, const llvm::Twine &expected, const llvm::Twine &got) {
    return makeError(ErrorCode::ARGUMENT, option, expected, "`" + got + "`");
  };
  out.setup.path = llvm::StringRef(subject).rtrim('/').str();
  out.tokens.assign(tokensOption.begin(), tokensOption.end());
  if (out.tokens.empty())
    out.tokens = {1, 8, 64, 512, 2048};
  for (int64_t tokens : out.tokens)
    if (tokens < 1 || tokens > 1 << 20)
      return wrong("--tokens", "numbers from 1 to 1048576", llvm::Twine(tokens));
  out.setup.maxTokens = *llvm::max_element(out.tokens);
  std::vector<std::string> routings(routingOption.begin(), routingOption.end());
  if (routings.empty())
    routings = {"uniform"};
  for (const std::string &text : routings) {
    auto routing = parseRouting(text);
    if (!routing)
      return routing.takeError();
    out.routings.push_back(std::move(*routing));
  }
  if (!llvm::is_contained({"md", "csv", "json", "jsonl"}, llvm::StringRef(formatOption)))
    return wrong("-o", "`md`, `csv`, `json` or `jsonl`", formatOption);
  out.format = formatOption;
  if (!(spreadOption >= 0))
    return wrong("--spread", "a percentage", numberText(spreadOption));
  out.spread = spreadOption;
  if (layersOption != "all") {
    auto layers = parseNumberList(layersOption, "--layers");
    if (!layers)
      return layers.takeError();
    out.setup.layers = std::move(*layers);
  }
  if (dtypeOption == "f32")
    out.setup.dtype = Format::F32;
  else if (dtypeOption == "bf16")
    out.setup.dtype = Format::BF16;
  else if (dtypeOption != "auto")
    return wrong("--dtype", "`auto`, `f32` or `bf16`", dtypeOption);
  out.setup.level = cpuOption;
  if (!cpuOption.empty())
    if (auto levels = parseLevels(cpuOption); !levels)
      return levels.takeError();
  auto device = parseDevice(deviceOption);
  if (!device)
    return device.takeError();
  out.setup.device = *device;
  if (llvm::Error error = checkGPULevel(gpuOption, device->device_type == kDLCUDA))
    return std::move(error);
  if (!gpuOption.empty())
    out.setup.level = gpuOption;
  if (device->device_type == kDLCUDA)
    for (const auto &[option, given] : {std::pair("--cpu", cpuOption.getNumOccurrences()),
                                        std::pair("--threads", threadsOption.getNumOccurrences()),
                                        std::pair("--machine", machineOption.getNumOccurrences())})
      if (given)
        return makeError(ErrorCode::ARGUMENT, option, "none with --device cuda", "one");
  if (threadsOption < 0 || threadsOption > 4095)
    return wrong("--threads", "0 to 4095", llvm::Twine(threadsOption));
  out.threads = threadsOption;
  if (banksOption < 0 || banksOption > 512)
    return wrong("--banks", "0 to 512", llvm::Twine(banksOption));
  out.setup.banks = banksOption;
  if (blocksOption < 0 || blocksOption > 100000)
    return wrong("--blocks", "0 to 100000", llvm::Twine(blocksOption));
  out.options.blocks = blocksOption;
  out.options.seed = seedOption;
  out.setup.dense = !noDenseOption;
  if (!machineOption.empty()) {
    auto machine = readMachine(machineOption);
    if (!machine)
      return machine.takeError();
    out.machine = std::move(*machine);
  }
  return out;
}

static std::string headText(const BenchHeader &header, const BenchModel &model, bool gpu) {
  std::string out;
  llvm::raw_string_ostream os(out);
  const MachineConstants &machine = header.machine;
  auto peak = [&](bool bf16) {
    auto [name, rate] = machine.bestFlops(bf16);
    return llvm::formatv("{0} {1:f0} GFLOP/s", name, rate / 1e9).str();
  };
  if (gpu) {
    os << machine.cpu << ", " << machine.threads << " processors; " << peak(true)
       << " by its clock; copies "
       << llvm::formatv("{0:f0} GB/s", machine.read.at("copy").all / 1e9);
    if (auto nominal = machine.read.find("nominal"); nominal != machine.read.end())
      os << " of " << llvm::formatv("{0:f0}", nominal->second.all / 1e9)
         << " by the memory's clock";
    os << "; " << sizeText(machine.l3Total) << " of L2 are overwritten before every call\n";
  } else {
    os << machine.cpu << ", " << machine.threads << " thread" << (machine.threads == 1 ? "" : "s")
       << "; peak f32 " << peak(false) << ", bf16 " << peak(true) << "; read "
       << llvm::formatv("{0:f1} GB/s", machine.bestRead() / 1e9) << "\n";
  }
  for (const auto &[subject, dense] : model.subjects) {
    os << subject.name << ": " << subject.banks.size() << " bank"
       << (subject.banks.size() == 1 ? "" : "s") << " of " << sizeText(subject.bankBytes)
       << (gpu ? "" : " take turns; last-level cache " + sizeText(machine.l3Total));
    if (dense)
      os << "; dense FFN of width " << dense->spec.F << ": " << sizeText(dense->bankBytes) << " x "
         << dense->banks.size();
    os << "\n";
  }
  return out;
}

/// Runs every test; rows are printed as they come where the format is one line a row.
static llvm::Expected<std::vector<BenchRow>>
runTests(const Request &request, const BenchHeader &header, const BenchModel &model,
         llvm::function_ref<llvm::Expected<BenchRow>(const Subject &, const Subject *, int64_t,
                                                     const Routing &)>
             test) {
  std::vector<BenchRow> rows;
  Progress progress(
      "bench", model.subjects.size() * request.routings.size() * request.tokens.size(), "tests");
  noteForCrash("phase.txt", "running the benchmark\n");
  for (const auto &[subject, dense] : model.subjects)
    for (const Routing &routing : request.routings)
      for (int64_t tokens : request.tokens) {
        progress.label("T=" + std::to_string(tokens) + " " + routing.text);
        auto row = test(subject, dense ? &*dense : nullptr, tokens, routing);
        if (!row)
          return row.takeError();
        // One line as soon as it is known: a long run that is cut short has given something.
        if (request.format == "jsonl") {
          llvm::outs() << llvm::json::Value(benchRecord(header, *row)) << "\n";
          llvm::outs().flush();
        }
        rows.push_back(std::move(*row));
        progress.advance(1);
      }
  return std::move(rows);
}

/// The table, and E-SPREAD.
static llvm::Error finish(const Request &request, const BenchHeader &header,
                          const std::vector<BenchRow> &rows) {
  if (request.format == "md") {
    llvm::outs() << benchMarkdown(header, rows);
  } else if (request.format == "csv") {
    llvm::outs() << benchCSV(header, rows);
  } else if (request.format == "json") {
    llvm::json::Array records;
    for (const BenchRow &row : rows)
      records.push_back(benchRecord(header, row));
    llvm::outs() << llvm::formatv("{0:2}\n", llvm::json::Value(std::move(records)));
  }
  if (request.spread > 0)
    for (const BenchRow &row : rows)
      if (row.layer.spread() * 100 > request.spread)
        return makeError(ErrorCode::SPREAD,
                         row.subject->name + ", T = " + std::to_string(row.tokens) + ", " +
                             row.routing,
                         "quartiles within " + llvm::formatv("{0:f1} %", request.spread).str() +
                             " of the median",
                         llvm::formatv("{0:f1} %", row.layer.spread() * 100).str(),
                         "close other programs, or run more blocks");
  return llvm::Error::success();
}

static void introduce(BenchHeader &header, const BenchModel &model, bool gpu) {
  header.model = model.name;
  header.totalParameters = model.totalParameters;
  for (const std::string &note : model.notes)
    Log::get().note(note);
  Log::get().note(llvm::StringRef(headText(header, model, gpu)).rtrim().str());
}

/// In the child, on a GPU.
static llvm::Error workOnDevice(Request request) {
  auto device = Device::open(request.setup.device.device_id);
  if (!device)
    return device.takeError();
  // Machine code of this very device where it can be made, else PTX for all.
  constexpr int capabilityMajor = 75, capabilityMinor = 76;
  std::string arch = "sm_" + std::to_string((*device)->attribute(capabilityMajor)) +
                     std::to_string((*device)->attribute(capabilityMinor));
  for (const std::string &name : {arch, arch + "a"})
    if (llvm::is_contained(mlir::moe::assembledArchNames(), name))
      request.setup.gpus.push_back(name);
  if (request.setup.gpus.empty())
    request.setup.gpus = {"sm_80"};
  request.setup.scratch = stageFolder;
  auto model = prepareBench(request.setup, nullptr, nullptr);
  if (!model)
    return model.takeError();
  BenchHeader header;
  auto machine = measureDevice(**device);
  if (!machine)
    return machine.takeError();
  header.machine = std::move(*machine);
  introduce(header, *model, /*gpu=*/true);
  auto rows = runTests(
      request, header, *model,
      [&](const Subject &subject, const Subject *dense, int64_t tokens, const Routing &routing) {
        return runTestOnDevice(subject, dense, tokens, routing, request.options, **device,
                               header.machine);
      });
  return rows ? finish(request, header, *rows) : rows.takeError();
}

/// In the child.
static llvm::Error work(Request request) {
  if (request.setup.device.device_type == kDLCUDA)
    return workOnDevice(std::move(request));
  moec_pool_options poolOptions;
  MOEC_INIT(poolOptions);
  poolOptions.threads = request.threads;
  moec_executor *pool = nullptr;
  moec_error error;
  if (moec_pool_create(&poolOptions, &pool, &error))
    return runtimeError(error);
  llvm::scope_exit closePool([&] { moec_pool_destroy(pool); });
  BenchHeader header;
  header.machine = describeMachine();
  request.setup.cacheBytes =
      static_cast<uint64_t>(header.machine.l3Total ? header.machine.l3Total : header.machine.l2);
  request.setup.scratch = stageFolder;
  StageClock clock(pool);
  auto model = prepareBench(request.setup, pool, &clock);
  if (!model)
    return model.takeError();
  if (request.machine) {
    int32_t threads = pool->lanes;
    if (request.machine->threads != threads)
      return makeError(
          ErrorCode::ARGUMENT, "--machine", "constants of " + llvm::Twine(threads) + " threads",
          llvm::Twine(request.machine->threads), "moec doctor --threads measures them");
    header.machine = *request.machine;
  } else if (llvm::Error failed = measureMachine(header.machine, pool)) {
    return failed;
  }
  introduce(header, *model, /*gpu=*/false);
  ReadProbe probe(header.machine, pool);
  auto rows = runTests(
      request, header, *model,
      [&](const Subject &subject, const Subject *dense, int64_t tokens, const Routing &routing) {
        return runTest(subject, dense, tokens, routing, request.options, clock, probe);
      });
  return rows ? finish(request, header, *rows) : rows.takeError();
}

static int run() {
  auto request = understand();
  if (!request)
    return Log::get().report(request.takeError());
  if (!stageFolder.empty())
    return Log::get().report(work(std::move(*request)));
  return runInChildWithoutOutput();
}

const Command benchCommand = {
    "bench", "DIR|MODEL", "Measure layers against the machine and a dense FFN.", benchParser, run};

} // namespace moec::tool
