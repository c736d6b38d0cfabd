//===- CompileOptions.cpp - what the options of compile ask for -----------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "CompileModule.h"

#include "Commands.h"

#include "moe/Export/Module.h"
#include "moe/Pipelines/Phases.h"
#include "moe/Runtime/Machine.h"
#include "moe/Support/Error.h"
#include "moe/Support/JSON.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/GPU/Arch.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/TargetParser/Host.h"

namespace moec::tool {

namespace moe = mlir::moe;

static std::vector<std::string> phaseNames() {
  std::vector<std::string> names;
  for (const moe::Phase &phase : moe::phases())
    names.push_back(phase.name.str());
  return names;
}

const moe::Phase *lastIRPhase() { return moe::findPhase("codegen"); }

llvm::Error checkPipelineChoice(const PipelineChoice &choice) {
  auto known = [&](const char *option, const std::string &name) -> llvm::Error {
    if (name.empty() || (moe::findPhase(name) && moe::findPhase(name) <= lastIRPhase()))
      return llvm::Error::success();
    std::vector<std::string> names = phaseNames();
    names.pop_back();
    std::vector<std::string> near = nearestNames(name, names);
    return makeError(ErrorCode::ARGUMENT, option, "one of the phases " + quoteList(names, "and"),
                     "`" + name + "`",
                     near.empty() ? "" : "did you mean " + quoteList(near, "or") + "?");
  };
  if (llvm::Error error = known("--compile-from", choice.from))
    return error;
  if (llvm::Error error = known("--compile-to", choice.to))
    return error;
  if (!choice.from.empty() && !choice.to.empty() &&
      moe::findPhase(choice.from) > moe::findPhase(choice.to))
    return makeError(ErrorCode::ARGUMENT, "--compile-to", "a phase after `" + choice.from + "`",
                     "`" + choice.to + "`");
  std::vector<std::string> optional;
  for (llvm::StringRef pass : moe::optionalPasses())
    optional.push_back(pass.str());
  for (const std::string &pass : choice.disabledPasses)
    if (!llvm::is_contained(optional, pass)) {
      std::vector<std::string> near = nearestNames(pass, optional);
      return makeError(ErrorCode::ARGUMENT, "--disable-pass",
                       "a pass that can be left out (" + quoteList(optional, "or") + ")",
                       "`" + pass + "`",
                       near.empty() ? "" : "did you mean " + quoteList(near, "or") + "?");
    }
  return llvm::Error::success();
}

/// Whether code of `level` runs and is faster than that of the level below: as the runtime decides
/// for this machine, or as a machine file says.
static bool suits(const moe::CPULevel &level, const MachineConstants *machine) {
  if (!machine) {
    const moec_level_info *info = moec_find_level(level.name.str().c_str());
    return info && !moec_missing_feature(info) && !moec_slow_feature(info);
  }
  auto rate = [&](const char *instruction) {
    auto found = machine->flops.find(instruction);
    return found == machine->flops.end() ? 0.0 : found->second.all;
  };
  return llvm::is_contained(machine->levels, level.name) &&
         (!level.bf16Products ||
          rate(level.tiles ? "amx_bf16" : "dpbf16_512") > rate("fma_f32_512"));
}

static llvm::Expected<std::string> nativeLevel(const MachineConstants *machine) {
  const moe::CPULevel *best = nullptr;
  for (const moe::CPULevel &level : moe::cpuLevels())
    if (level.implemented && suits(level, machine) && (!best || level.rank > best->rank))
      best = &level;
  if (!best)
    return makeError(ErrorCode::ISA, "--cpu native",
                     "a CPU that runs " + moe::implementedLevelNames(),
                     machine ? machine->cpu : llvm::sys::getHostCPUName().str(),
                     "name a level to compile for another machine");
  return best->name.str();
}

llvm::Expected<std::vector<std::string>> parseLevels(llvm::StringRef text,
                                                     const MachineConstants *machine) {
  std::vector<std::string> out;
  if (text == "multi") {
    for (const moe::CPULevel &level : moe::cpuLevels())
      if (level.implemented)
        out.push_back(level.name.str());
    return out;
  }
  if (text == "native") {
    auto level = nativeLevel(machine);
    if (!level)
      return level.takeError();
    return std::vector<std::string>{*level};
  }
  llvm::SmallVector<llvm::StringRef> pieces;
  text.split(pieces, ',');
  for (llvm::StringRef piece : pieces) {
    const moe::CPULevel *level = moe::findCPULevel(piece);
    if (!level) {
      std::vector<std::string> names = {"native", "multi"};
      for (const moe::CPULevel &known : moe::cpuLevels())
        names.push_back(known.name.str());
      std::vector<std::string> near = nearestNames(piece, names);
      return makeError(ErrorCode::TARGET, "--cpu",
                       "`native`, `multi`, " + moe::implementedLevelNames(), "`" + piece + "`",
                       near.empty() ? "" : "did you mean " + quoteList(near, "or") + "?");
    }
    if (!level->implemented)
      return makeError(ErrorCode::TARGET, "--cpu", moe::implementedLevelNames(), "`" + piece + "`",
                       level->refusal);
    if (!llvm::is_contained(out, level->name))
      out.push_back(level->name.str());
  }
  llvm::sort(out, [](const std::string &a, const std::string &b) {
    return moe::findCPULevel(a)->rank < moe::findCPULevel(b)->rank;
  });
  return out;
}

llvm::Expected<std::vector<std::string>> parseGPUs(llvm::StringRef text) {
  std::vector<std::string> known, out;
  for (llvm::StringRef name : moe::assembledArchNames())
    known.push_back(name.str());
  llvm::SmallVector<llvm::StringRef> pieces;
  text.split(pieces, ',');
  for (llvm::StringRef piece : pieces) {
    if (!llvm::is_contained(known, piece)) {
      const moe::GPUArch *arch = moe::findGPUArch(piece);
      std::vector<std::string> near = nearestNames(piece, known);
      return makeError(ErrorCode::TARGET, "--gpu", quoteList(known, "or"), "`" + piece + "`",
                       arch           ? arch->refusal.str()
                       : near.empty() ? ""
                                      : "did you mean " + quoteList(near, "or") + "?");
    }
    if (!llvm::is_contained(out, piece))
      out.push_back(piece.str());
  }
  llvm::sort(out);
  return out;
}

std::vector<std::string> gpuLevels(llvm::ArrayRef<std::string> gpus) {
  std::vector<std::string> levels;
  for (const moe::GPUArch &arch : moe::gpuArchs())
    if (llvm::any_of(gpus, [&](llvm::StringRef gpu) { return moe::gpuLevelOf(gpu) == arch.name; }))
      levels.push_back(arch.name.str());
  return levels;
}

llvm::Error checkGPULevel(llvm::StringRef level, bool cuda) {
  if (level.empty())
    return llvm::Error::success();
  if (!cuda)
    return makeError(ErrorCode::ARGUMENT, "--gpu", "none with --device cpu", "`" + level + "`");
  if (!moe::findGPUArch(level))
    return makeError(ErrorCode::TARGET, "--gpu", moe::implementedArchNames(), "`" + level + "`");
  return llvm::Error::success();
}

/// Keys and values that the text of a pass pipeline can carry: its reader counts braces.
static bool isPlain(llvm::StringRef text) {
  return llvm::all_of(
      text, [](char c) { return llvm::isAlnum(c) || llvm::StringRef("_.*-").contains(c); });
}

/// Whether `section` holds functions, of matmuls, of fields; what the fields may be is the pass's
/// to say.
static bool isStrategy(const llvm::json::Value &section) {
  const llvm::json::Object *functions = section.getAsObject();
  if (!functions)
    return false;
  for (const auto &[function, matmulsValue] : *functions) {
    const llvm::json::Object *matmuls = matmulsValue.getAsObject();
    if (!matmuls || !isPlain(function))
      return false;
    for (const auto &[matmul, fieldsValue] : *matmuls) {
      const llvm::json::Object *fields = fieldsValue.getAsObject();
      if (!fields || !isPlain(matmul))
        return false;
      for (const auto &[field, value] : *fields)
        if (!isPlain(field) || !isPlain(value.getAsString().value_or("")))
          return false;
    }
  }
  return true;
}

/// The strategy section of a manifest: the section alone, or a whole manifest.
static llvm::Expected<std::string> readStrategy(const std::string &path) {
  if (path.empty())
    return std::string();
  auto value = readJSON(path, ErrorCode::FILE_FORMAT);
  if (!value)
    return value.takeError();
  const llvm::json::Value *section = &*value;
  if (const llvm::json::Object *manifest = value->getAsObject())
    if (const llvm::json::Value *inner = manifest->get("strategy"))
      section = inner;
  if (!isStrategy(*section))
    return makeError(ErrorCode::ARGUMENT, "--strategy: " + path,
                     "an object of functions, of matmuls, of fields, named with letters, digits, "
                     "`_`, `.`, `-` and `*`",
                     "another JSON value", "start from the strategy section of a manifest.json");
  return canonicalText(*section);
}

llvm::Expected<moe::PipelineOptions> pipelineOptions(const PipelineChoice &choice) {
  moe::PipelineOptions options;
  options.levels = choice.levels;
  options.gpuLevels = gpuLevels(choice.gpus);
  options.disabledPasses = choice.disabledPasses;
  auto strategy = readStrategy(choice.strategyFile);
  if (!strategy)
    return strategy.takeError();
  options.strategyText = std::move(*strategy);
  options.core = choice.core;
  return options;
}

llvm::Expected<std::string> pipelineText(const PipelineChoice &choice) {
  auto options = pipelineOptions(choice);
  if (!options)
    return options.takeError();
  std::string out;
  llvm::raw_string_ostream os(out);
  std::string before;
  for (const moe::Phase &phase : moe::phases()) {
    os << "# " << phase.name << ": " << phase.sentence << "\n";
    std::string pipeline = moe::phasePipeline(phase, *options);
    if (phase.name == "import")
      os << "moec compile MODEL --compile-to import -o import.mlir\n";
    else if (phase.name == "export")
      os << "moec compile " << before << ".mlir --compile-from " << before
         << (options->isGPU() ? " --target cuda --gpu " + llvm::join(choice.gpus, ",") : "")
         << " -o DIR\n";
    else if (pipeline.empty())
      continue;
    else
      os << "moe-opt " << before << ".mlir --pass-pipeline='" << pipeline << "' -o " << phase.name
         << ".mlir\n";
    before = phase.name.str();
  }
  return out;
}

} // namespace moec::tool
