//===- PackCommand.cpp - moec pack ----------------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "Log.h"
#include "Model.h"

#include "moe/Export/Manifest.h"
#include "moe/Export/Output.h"

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string> source(cl::Positional, cl::Required,
                                   cl::desc("CHECKPOINT (or random:SEED)"), cl::sub(packParser()));
static cl::opt<std::string> folder("for", cl::Required,
                                   cl::desc("The compiled DIR whose code will use the weights"),
                                   cl::value_desc("DIR"), cl::cat(category()),
                                   cl::sub(packParser()));
static cl::opt<std::string> output("o", cl::Required, cl::desc("Folder of packed weights to make"),
                                   cl::value_desc("WEIGHTS"), cl::cat(category()),
                                   cl::sub(packParser()));
static cl::opt<bool> force("force", cl::desc("Replace an existing folder of packed weights"),
                           cl::cat(category()), cl::sub(packParser()));
static cl::opt<int64_t> threadsOption(
    "threads", cl::init(0),
    cl::desc("Threads that pack weights (default 0: one for every CPU that may be used)"),
    cl::value_desc("N"), cl::cat(category()), cl::sub(packParser()));

/// The layers of `manifest`, found by name in the checkpoint's own spec and compared with it.
static llvm::Expected<ModelSpec> matchLayers(const Manifest &manifest, const ModelSpec &spec) {
  ModelSpec out = spec;
  out.layers.clear();
  for (auto [i, wanted] : llvm::enumerate(manifest.spec.layers)) {
    const LayerSpec *found = nullptr;
    std::vector<std::string> names;
    for (const LayerSpec &layer : spec.layers) {
      names.push_back(layer.name);
      if (layer.name == wanted.name)
        found = &layer;
    }
    if (!found) {
      std::vector<std::string> near = nearestNames(wanted.name, names);
      return makeError(ErrorCode::WEIGHTS, source, "layer `" + wanted.name + "`",
                       near.empty() ? "none of that name" : "only " + quoteList(near));
    }
    // How the router rounds is the code's choice, no property of the checkpoint.
    LayerSpec same = *found;
    same.router.precision = wanted.router.precision;
    std::vector<Difference> differences = compare(wanted, same);
    if (!differences.empty())
      return makeError(ErrorCode::WEIGHTS, source + ": " + wanted.name,
                       differences[0].attribute + " = " + differences[0].left + " as `" + folder +
                           "` was compiled for",
                       differences[0].right, "compile this checkpoint instead");
    out.layers.push_back(std::move(same));
  }
  return out;
}

static llvm::Error work() {
  auto threads = parseThreads(threadsOption);
  if (!threads)
    return threads.takeError();
  auto manifest = readManifest(folder);
  if (!manifest)
    return manifest.takeError();
  std::vector<std::array<uint8_t, 32>> ids;
  for (const Manifest::Layer &layer : manifest->layers)
    ids.push_back(layer.id);
  std::function<std::unique_ptr<WeightReader>()> makeReader;
  ModelSpec spec;
  std::unique_ptr<Checkpoint> checkpoint;
  llvm::StringRef text = source;
  if (text == "random" || text.starts_with("random:")) {
    auto choice = parseWeightsChoice(text);
    if (!choice)
      return choice.takeError();
    spec = manifest->spec;
    makeReader = [seed = choice->seed] { return randomWeights(seed); };
  } else {
    // The code's formats decide, not the checkpoint's: a bf16 checkpoint can serve f32 code.
    auto loaded = loadModelWith(source, WeightsChoice(), manifest->spec.dtype);
    if (!loaded)
      return loaded.takeError();
    if (!loaded->checkpoint)
      return makeError(ErrorCode::TENSOR, source, "a checkpoint with weights",
                       "a description of shapes alone");
    auto matched = matchLayers(*manifest, loaded->spec);
    if (!matched)
      return matched.takeError();
    spec = std::move(*matched);
    checkpoint = std::move(loaded->checkpoint);
    makeReader = [&] { return checkpointWeights(*checkpoint); };
  }
  return packModel(spec, ids, makeReader, stageFolder + "/output", *threads);
}

static int run() {
  if (!stageFolder.empty())
    return Log::get().report(work());
  return runInChild(output, /*isFile=*/false, /*isWeights=*/true, force);
}

const Command packCommand = {"pack", "CHECKPOINT --for DIR -o WEIGHTS",
                             "Pack the weights of a checkpoint for code that exists.", packParser,
                             run};

} // namespace moec::tool
