//===- BenchCode.cpp - code for moec bench --------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Bench.h"
#include "Commands.h"
#include "CompileModule.h"

#include "moe/Export/Link.h"
#include "moe/Export/Module.h"
#include "moe/Export/Output.h"
#include "moe/Target/CPU/Level.h"

#include "llvm/Support/FileSystem.h"

namespace moec::tool {

llvm::Error compileInto(const ModelSpec &spec, const std::string &level,
                        llvm::ArrayRef<std::string> gpus, const std::string &folder,
                        const std::string &scratch) {
  noteForCrash("phase.txt", "compiling for the benchmark\n");
  if (llvm::Error error = checkModel(spec))
    return error;
  ModuleCompiler compiler;
  if (llvm::Error error = compiler.import(spec))
    return error;
  noteForCrash("input.mlir", compiler.text());
  PipelineChoice choice;
  if (gpus.empty())
    choice.levels = {level};
  else
    choice.gpus = gpus;
  if (llvm::Error error = compiler.runPhases(choice))
    return error;
  auto table = compiler.table(spec, /*needCode=*/true);
  if (!table)
    return table.takeError();
  if (!gpus.empty())
    if (llvm::Error error = compiler.addImages(*table, choice.gpus, scratch))
      return error;
  auto code = compiler.code(*table, mlir::moe::CodeFormat::Object);
  if (!code)
    return code.takeError();
  if (std::error_code error = llvm::sys::fs::create_directory(folder))
    return osError(folder, "a folder that can be created", error.value());
  std::string object = scratch + "/bench.o", library = "lib" + spec.name + ".so";
  if (llvm::Error error = writeFile(object, llvm::StringRef(code->data(), code->size())))
    return error;
  if (llvm::Error error =
          linkShared({object}, folder + "/" + library, library, table->symbol(), scratch))
    return error;
  llvm::sys::fs::remove(object);
  ManifestInput manifest{
      spec, *table, compiler.strategies(), compiler.reasons(), library, spec.name + ".h", 0};
  return writeFile(folder + "/manifest.json", manifestText(manifest));
}

llvm::Expected<std::string> chooseLevel(const std::string &cap) {
  const mlir::moe::CPULevel *highest = nullptr, *limit = nullptr;
  if (!cap.empty()) {
    // For its errors: unknown names, levels that are not built.
    if (auto known = parseLevels(cap); !known)
      return known.takeError();
    limit = mlir::moe::findCPULevel(cap);
  }
  const char *missing = "";
  for (const mlir::moe::CPULevel &level : mlir::moe::cpuLevels()) {
    if (!level.implemented || (limit && level.rank > limit->rank))
      continue;
    const char *lacks = missingFeature(level);
    if (!lacks)
      highest = &level;
    else if (!*missing)
      missing = lacks;
  }
  if (!highest)
    return makeError(ErrorCode::ISA, "moec bench", "a CPU that runs code of this moec",
                     std::string("one that lacks ") + missing);
  return highest->name.str();
}

llvm::Expected<std::optional<LayerSpec>> denseTwin(const LayerSpec &layer) {
  if (layer.kind == LayerKind::Dense)
    return std::nullopt;
  ModelSpec model;
  model.name = "dense";
  model.dtype = layer.compute;
  LayerSpec twin;
  twin.name = "dense";
  twin.kind = LayerKind::Dense;
  twin.H = layer.H;
  twin.F = layer.K * layer.F + layer.combine.sharedWidth;
  twin.expert.form = layer.expert.form;
  twin.expert.activation = layer.expert.activation;
  twin.compute = layer.compute;
  twin.format = layer.format;
  model.layers.push_back(std::move(twin));
  // Through its text form, which derives the weights.
  auto read = fromJSON(toJSON(model), "the dense FFN");
  if (!read)
    return read.takeError();
  return std::optional<LayerSpec>(std::move(read->layers.front()));
}

} // namespace moec::tool
