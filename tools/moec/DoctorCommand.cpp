//===- DoctorCommand.cpp - moec doctor ------------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// One page that answers "why is it slow here" and "why does it not run here".
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "GPU.h"
#include "Log.h"
#include "Measure.h"
#include "Model.h"

#include "moe/Export/Module.h"
#include "moe/Export/Output.h"
#include "moe/Export/Ptxas.h"
#include "moe/Runtime/Machine.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/GPU/Arch.h"
#include "moec.h"

#include "llvm/ADT/ScopeExit.h"
#include "llvm/Config/llvm-config.h"
#include "llvm/Support/Format.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"

#include <fstream>
#include <gnu/libc-version.h>
#include <sys/utsname.h>

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string>
    saveOption("save",
               cl::desc("Write the measured constants as JSON (for compile and bench --machine; - "
                        "is stdout instead of the page)"),
               cl::value_desc("FILE"), cl::cat(category()), cl::sub(doctorParser()));
static cl::opt<int> threadsOption("threads",
                                  cl::desc("Threads to measure with (default: those this process "
                                           "may use)"),
                                  cl::value_desc("N"), cl::init(0), cl::cat(category()),
                                  cl::sub(doctorParser()));
static cl::opt<bool> noMeasureOption("no-measure", cl::desc("Only look, measure nothing"),
                                     cl::cat(category()), cl::sub(doctorParser()));

static std::string textOf(double value, const char *unit) {
  return llvm::formatv("{0} {1}", llvm::format(value < 99.95 ? "%.1f" : "%.0f", value), unit);
}

static std::string word(const char *path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

/// "always [madvise] never" to "madvise".
static std::string chosen(const std::string &text) {
  llvm::StringRef rest = llvm::StringRef(text).split('[').second;
  return rest.empty() ? text : rest.split(']').first.str();
}

static void printLevels(llvm::raw_ostream &os) {
  std::vector<std::vector<std::string>> rows = {{"level", "runs here", "this moec makes it"}};
  for (const mlir::moe::CPULevel &level : mlir::moe::cpuLevels()) {
    const char *missing = missingFeature(level);
    rows.push_back({level.name.str(), missing ? std::string("no: lacks ") + missing : "yes",
                    level.implemented ? "yes" : "no: " + level.refusal.str()});
  }
  os << tableText(rows);
  if (const char *cap = ::getenv("MOEC_CPU"))
    os << "MOEC_CPU=" << cap << " caps the level that libraries choose\n";
}

static const char *instructionText(llvm::StringRef name) {
  return llvm::StringSwitch<const char *>(name)
      .Case("fma_f32_128", "FMA f32, 128 bits")
      .Case("fma_f32_256", "FMA f32, 256 bits")
      .Case("fma_f32_512", "FMA f32, 512 bits")
      .Case("dpbf16_256", "vdpbf16ps, 256 bits")
      .Case("dpbf16_512", "vdpbf16ps, 512 bits")
      .Case("amx_bf16", "AMX bf16 tiles")
      .Case("plain", "pages of 4 KB")
      .Case("prefetch", "pages of 4 KB, prefetch 1 KB ahead")
      .Case("huge", "pages of 2 MB")
      .Case("huge_prefetch", "pages of 2 MB, prefetch 1 KB ahead")
      .Default("?");
}

static void printMeasured(llvm::raw_ostream &os, const MachineConstants &machine) {
  std::string all =
      std::to_string(machine.threads) + (machine.threads == 1 ? " thread" : " threads");
  std::vector<std::vector<std::string>> rows = {{"arithmetic", all, "1 thread"}};
  for (const auto &[name, rate] : machine.flops)
    rows.push_back({instructionText(name), textOf(rate.all / 1e9, "GFLOP/s"),
                    textOf(rate.one / 1e9, "GFLOP/s")});
  os << "\n" << tableText(rows);
  rows = {{"reading memory", all, "1 thread"}};
  for (const auto &[name, rate] : machine.read)
    rows.push_back(
        {instructionText(name), textOf(rate.all / 1e9, "GB/s"), textOf(rate.one / 1e9, "GB/s")});
  os << "\n" << tableText(rows);
  os << "\nparallel region of " << all << ", doing nothing: " << textOf(machine.forkNs / 1e3, "us")
     << "\n";
}

static llvm::Error work() {
  if (noMeasureOption && !saveOption.empty())
    return makeError(ErrorCode::ARGUMENT, "--save", "measurements", "--no-measure");
  if (threadsOption < 0 || threadsOption > 4095)
    return makeError(ErrorCode::ARGUMENT, "--threads", "0 to 4095", llvm::Twine(threadsOption));
  MachineConstants machine = describeMachine();
  std::string page;
  llvm::raw_string_ostream os(page);

  CPUs cpus = affinity();
  int32_t allowed = moec_cpus_allowed();
  utsname system = {};
  ::uname(&system);
  auto sizes = [](int64_t bytes) {
    return bytes ? std::to_string(bytes >> (bytes >= 1 << 20 ? 20 : 10)) +
                       (bytes >= 1 << 20 ? " MB" : " KB")
                 : std::string("unknown");
  };
  os << "cpu       " << machine.cpu << "\n"
     << "threads   " << allowed << " (" << cpus.cpus << " CPUs in the affinity mask, " << cpus.cores
     << (cpus.cores == 1 ? " core" : " cores");
  if (allowed < cpus.cpus)
    os << "; the control group's quota allows " << allowed;
  os << ")\n"
     << "caches    L1d " << sizes(machine.l1d) << ", L2 " << sizes(machine.l2) << " a core; L3 "
     << sizes(machine.l3Total) << "\n"
     << "memory    " << sizeText(availableMemory()) << " available; transparent huge pages: ";
  std::string pages = chosen(word("/sys/kernel/mm/transparent_hugepage/enabled"));
  os << (pages.empty() ? "none" : pages) << "\n";
  GPUReport gpu = findGPUs();
  auto ptxas = findPtxas();
  if (!ptxas)
    llvm::consumeError(ptxas.takeError());
  os << "gpu       ";
  if (!gpu.absent.empty())
    os << gpu.absent << "\n";
  for (auto [i, device] : llvm::enumerate(gpu.devices))
    os << (i ? "          " : "") << device.name << ", " << device.architecture << ", "
       << sizeText(device.memory) << (i ? "" : "; driver for CUDA " + gpu.version)
       << (device.refused.empty() ? "" : "; refused: " + device.refused) << "\n";
  os << "versions  moec " << versionString() << ", ABI " << (MOEC_ABI >> 16) << "."
     << (MOEC_ABI & 0xffff) << ", weight layout " << packedLayout << ", LLVM "
     << LLVM_VERSION_STRING << ", glibc " << ::gnu_get_libc_version() << ", " << system.sysname
     << " " << system.release << "\n"
     << "targets   cpu: " << mlir::moe::implementedLevelNames()
     << "; cuda: " << mlir::moe::implementedArchNames() << ", "
     << (ptxas ? "assembled by " + *ptxas : std::string("but there is no ptxas here")) << "\n"
     << "\n";
  printLevels(os);

  if (!noMeasureOption) {
    moec_pool_options options;
    MOEC_INIT(options);
    options.threads = threadsOption;
    moec_executor *pool = nullptr;
    moec_error error;
    if (moec_pool_create(&options, &pool, &error))
      return runtimeError(error);
    llvm::scope_exit close([&] { moec_pool_destroy(pool); });
    if (llvm::Error failed = measureMachine(machine, pool))
      return failed;
    printMeasured(os, machine);
  }
  std::string json;
  if (!saveOption.empty())
    json = llvm::formatv("{0:2}\n", toJSON(machine)).str();
  if (saveOption == "-") {
    llvm::outs() << json;
    return llvm::Error::success();
  }
  llvm::outs() << page;
  if (saveOption.empty())
    return llvm::Error::success();
  return replaceFile(saveOption, json);
}

const Command doctorCommand = {"doctor", "[--save FILE]",
                               "Show what this machine can run, and how fast at most.",
                               doctorParser, [] { return Log::get().report(work()); }};

} // namespace moec::tool
