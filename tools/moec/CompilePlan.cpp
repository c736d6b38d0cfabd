//===- CompilePlan.cpp - what moec compile --dry-run says -----------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "CompileModule.h"
#include "Log.h"
#include "Model.h"

#include "moe/Export/Output.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/Path.h"
#include "llvm/Support/raw_ostream.h"

namespace moec::tool {

static const char *formatText(const LayerSpec &layer) {
  return layer.format == Format::F32 ? "f32" : "bf16";
}

std::string planText(const ModelSpec &spec, const PipelineChoice &pipeline, unsigned threads,
                     bool packs, uint64_t tensors, llvm::StringRef output) {
  std::vector<std::vector<std::string>> rows = {
      {"layers", "kind", "H", "F", "E", "K", "weights", "parameters", "active", "packed"}};
  uint64_t packed = 0;
  std::vector<std::string> codes;
  for (size_t i = 0; i < spec.layers.size();) {
    const LayerSpec &layer = spec.layers[i];
    std::string text = canonicalText(semantics(layer));
    if (!llvm::is_contained(codes, text))
      codes.push_back(text);
    size_t j = i;
    uint64_t bytes = 0;
    while (j < spec.layers.size() && canonicalText(semantics(spec.layers[j])) == text)
      bytes += packedFileBytes(spec.layers[j++]);
    packed += bytes;
    uint64_t count = j - i;
    std::string range = std::to_string(layer.index);
    if (count > 1)
      range += "-" + std::to_string(spec.layers[j - 1].index);
    rows.push_back({range, name(layer.kind).str(), std::to_string(layer.H), std::to_string(layer.F),
                    std::to_string(layer.E), std::to_string(layer.K), formatText(layer),
                    countText(layer.totalParameters() * count),
                    countText(layer.activeParameters() * count), sizeText(bytes)});
    i = j;
  }
  std::string out = tableText(rows);
  llvm::raw_string_ostream os(out);
  // The rates are those of a slow core and a plain disk: the plan should not be too rosy.
  bool gpu = !pipeline.gpus.empty();
  size_t levels = gpu ? gpuLevels(pipeline.gpus).size() : pipeline.levels.size();
  uint64_t parts = codes.size() * levels;
  PackPlan plan(spec.layers, threads);
  double compileSeconds = 1 + 1.0 * parts;
  double packSeconds = packs ? packed / std::min(0.6e9 * plan.workers, 1.5e9) : 0;
  // As measured: the process with LLVM in it, the code of one layer at one level, and what is kept
  // of a tensor's name and place. Code is finished before packing begins, but not given back.
  uint64_t memory = 140'000'000 + 12'000'000 * parts + 800 * tensors + (packs ? plan.memory : 0);
  os << "\ncode     " << codes.size() << " distinct layer" << (codes.size() == 1 ? "" : "s")
     << " for "
     << (gpu ? llvm::join(pipeline.gpus, ", ")
             : std::to_string(levels) + " CPU level" + (levels == 1 ? "" : "s"))
     << ", less than 4 MB\nweights  "
     << (packs ? sizeText(packed) + " packed" : std::string("none")) << "\ntime     about "
     << timeText(std::max(1.0, compileSeconds + packSeconds)) << "\nmemory   about "
     << sizeText(memory) << "\n";
  if (packs) {
    llvm::StringRef parent = llvm::sys::path::parent_path(output);
    if (auto room = freeSpace(parent.empty() ? llvm::StringRef(".") : parent))
      os << "disk     " << sizeText(*room) << " free" << (*room < packed ? ": NOT ENOUGH" : "")
         << "\n";
  }
  return out;
}

} // namespace moec::tool
