//===- BenchModel.cpp - weights and banks for moec bench ------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A bank is a set of weights. A bare model is compiled with one layer for each
// bank: equal layers share their code. A compiled folder offers its own layers
// as banks, and is opened again where they are too few.
//
//===----------------------------------------------------------------------===//

#include "Bench.h"
#include "Commands.h"
#include "Log.h"
#include "Measure.h"
#include "Model.h"

#include "moe/Export/Weights.h"
#include "moe/Target/GPU/Arch.h"

#include "llvm/Support/FileSystem.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <sys/stat.h>

namespace moec::tool {

//===----------------------------------------------------------------------===//
// StageClock, OpenedModel, Subject
//===----------------------------------------------------------------------===//

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

StageClock::StageClock(moec_executor *pool) : pool(pool) {
  MOEC_INIT(clock);
  clock.self = this;
  clock.lanes = pool->lanes;
  clock.gang = 0;
  clock.run = run;
}

void StageClock::run(void *self, int32_t n, void (*task)(void *, int32_t), void *arg) {
  StageClock &clock = *static_cast<StageClock *>(self);
  struct alignas(64) Lane {
    double busy = 0;
  };
  struct Job {
    void (*task)(void *, int32_t);
    void *arg;
    std::vector<Lane> lanes;
  } job = {task, arg, std::vector<Lane>(n)};
  double begin = now();
  clock.pool->run(
      clock.pool->self, n,
      [](void *arg, int32_t lane) {
        Job &job = *static_cast<Job *>(arg);
        double begin = now();
        job.task(job.arg, lane);
        job.lanes[lane].busy = now() - begin;
      },
      &job);
  Run run;
  run.seconds = now() - begin;
  for (const Lane &lane : job.lanes) {
    run.busiest = std::max(run.busiest, lane.busy);
    run.mean += lane.busy / n;
  }
  clock.runs.push_back(run);
}

OpenedModel::~OpenedModel() {
  moec_context_destroy(stages);
  moec_context_destroy(context);
  if (model)
    moec_close(model);
}

static uint64_t bytesOf(const WeightSpec &weight) {
  return static_cast<uint64_t>(weight.elements()) * (weight.format == Format::F32 ? 4 : 2);
}

uint64_t Subject::bytesRead(int64_t experts) const {
  uint64_t bytes = 0;
  for (const WeightSpec &weight : spec.weights)
    bytes += weight.experts > 1 ? bytesOf(weight) / weight.experts * experts : bytesOf(weight);
  return bytes;
}

//===----------------------------------------------------------------------===//
// Weights
//===----------------------------------------------------------------------===//

/// Fills every weight of a layer with random values of variance 1 / k. Speed does not depend on
/// values, so all experts share one block of them, each from another place.
static llvm::Error fillWeights(moec_model *model, int32_t layer, const LayerSpec &spec,
                               Progress &progress) {
  uint32_t state = 0x9E3779B9u + static_cast<uint32_t>(layer);
  for (const WeightSpec &weight : spec.weights) {
    bool byRow = weight.role == "router";
    int64_t rows = weight.parts * weight.rows, elements = rows * weight.cols;
    constexpr int64_t shift = 4096;
    std::vector<uint16_t> values(elements + shift);
    float scale = std::sqrt(3.0f / static_cast<float>(weight.cols));
    for (uint16_t &value : values) {
      state ^= state << 13;
      state ^= state >> 17;
      state ^= state << 5;
      float number = (static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f) * scale;
      uint32_t bits;
      memcpy(&bits, &number, 4);
      value = static_cast<uint16_t>(bits >> 16); // bfloat16
    }
    int64_t shape[2] = {rows, weight.cols};
    for (int64_t e = 0; e < weight.experts; ++e) {
      DLTensor tensor;
      memset(&tensor, 0, sizeof(tensor));
      tensor.data = values.data() + e * 97 % shift;
      tensor.device = {kDLCPU, 0};
      tensor.ndim = 2;
      tensor.dtype = {kDLBfloat, 16, 1};
      tensor.shape = shape;
      moec_error error;
      if (moec_set_weight(model, layer, weight.role.c_str(), byRow || weight.experts == 1 ? -1 : e,
                          &tensor, 0, &error))
        return runtimeError(error);
      progress.advance(bytesOf(weight) / weight.experts);
    }
  }
  return llvm::Error::success();
}

//===----------------------------------------------------------------------===//
// Opening
//===----------------------------------------------------------------------===//

static llvm::Expected<std::unique_ptr<OpenedModel>>
openFolder(const std::string &folder, int32_t load, const BenchSetup &setup, moec_executor *pool,
           StageClock *clock) {
  auto out = std::make_unique<OpenedModel>();
  moec_error error;
  moec_open_options options;
  MOEC_INIT(options);
  options.load = load;
  options.device = setup.device;
  options.cpu_level = setup.level.empty() ? nullptr : setup.level.c_str();
  if (moec_open(folder.c_str(), &options, &out->model, &error))
    return runtimeError(error);
  moec_context_options contextOptions;
  MOEC_INIT(contextOptions);
  contextOptions.max_tokens = setup.maxTokens;
  contextOptions.executor = pool;
  if (moec_context_create(out->model, &contextOptions, &out->context, &error))
    return runtimeError(error);
  if (clock) {
    contextOptions.executor = clock->executor();
    if (moec_context_create(out->model, &contextOptions, &out->stages, &error))
      return runtimeError(error);
  }
  return std::move(out);
}

/// Labels of the stages of the entries that bench calls, from a manifest's `code`.
static void readLabels(const Manifest &manifest, int64_t code, Subject &subject) {
  const llvm::json::Array *codes = manifest.json.getAsObject()->getArray("code");
  const llvm::json::Object *record = codes && code >= 0 && static_cast<size_t>(code) < codes->size()
                                         ? (*codes)[code].getAsObject()
                                         : nullptr;
  const llvm::json::Array *levels = record ? record->getArray("levels") : nullptr;
  if (!levels)
    return;
  std::string type = subject.spec.compute == Format::F32 ? "f32" : "bf16";
  for (const llvm::json::Value &levelValue : *levels) {
    const llvm::json::Object *level = levelValue.getAsObject();
    if (!level || level->getString("level") != llvm::StringRef(subject.level))
      continue;
    const llvm::json::Array *entries = level->getArray("entries");
    for (const llvm::json::Value &entryValue : entries ? *entries : llvm::json::Array()) {
      const llvm::json::Object *entry = entryValue.getAsObject();
      const llvm::json::Array *stages = entry ? entry->getArray("stages") : nullptr;
      if (!stages || entry->getString("x") != llvm::StringRef(type) ||
          (entry->get("y") && entry->getString("y") != llvm::StringRef(type)))
        continue;
      std::vector<std::string> &labels =
          subject.labels[entry->getString("kind").value_or("").str()];
      for (const llvm::json::Value &stage : *stages) {
        const llvm::json::Object *object = stage.getAsObject();
        labels.push_back(object ? object->getString("label").value_or("stage").str() : "stage");
      }
    }
  }
}

static llvm::Error describe(Subject &subject) {
  moec_layer_info info;
  MOEC_INIT(info);
  moec_error error;
  const Bank &bank = subject.banks.front();
  if (moec_get_layer_info(bank.in->model, bank.layer, &info, &error))
    return runtimeError(error);
  subject.level = info.level;
  subject.activeFlops = info.active_flops;
  return llvm::Error::success();
}

/// How many banks make twice the cache, if memory allows.
static int64_t banksFor(uint64_t bytes, const BenchSetup &setup, std::vector<std::string> &notes) {
  int64_t wanted = setup.banks;
  // The cache of a GPU is overwritten between calls instead.
  if (setup.device.device_type == kDLCUDA)
    return std::max<int64_t>(wanted, 1);
  if (!wanted)
    wanted = std::max<int64_t>(
        1, static_cast<int64_t>((2 * setup.cacheBytes + bytes) / std::max<uint64_t>(bytes, 1)));
  constexpr int64_t most = 1024;
  int64_t fit = most;
  if (uint64_t room = availableMemory())
    fit =
        std::clamp<int64_t>(static_cast<int64_t>(room / 2 / std::max<uint64_t>(bytes, 1)), 1, most);
  if (wanted > fit)
    notes.push_back("banks of " + sizeText(bytes) + ": " + std::to_string(fit) + " instead of " +
                    std::to_string(wanted) + ": weights may come from the cache");
  return std::min(wanted, fit);
}

static std::string keyOf(const LayerSpec &layer) { return canonicalText(semantics(layer)); }

/// The layers to measure: those asked for, else one of each kind with experts, else one dense.
static llvm::Expected<std::vector<size_t>> chooseLayers(const ModelSpec &spec,
                                                        const std::vector<int64_t> &wanted) {
  std::vector<size_t> out;
  if (!wanted.empty()) {
    for (int64_t index : wanted) {
      auto it = llvm::find_if(spec.layers, [&](const LayerSpec &l) { return l.index == index; });
      if (it == spec.layers.end())
        return noSuchLayer(spec, index);
      out.push_back(it - spec.layers.begin());
    }
    return out;
  }
  for (LayerKind kind : {LayerKind::MoE, LayerKind::Dense}) {
    std::vector<std::string> seen;
    for (auto [i, layer] : llvm::enumerate(spec.layers)) {
      std::string key = keyOf(layer);
      if (layer.kind != kind || llvm::is_contained(seen, key))
        continue;
      seen.push_back(key);
      out.push_back(i);
    }
    if (!out.empty())
      break;
  }
  return out;
}

namespace {
/// A library being put together: every subject is a run of equal layers in it.
struct Library {
  ModelSpec spec;
  struct Part {
    Subject *subject;
    size_t first, count;
  };
  std::vector<Part> parts;

  void add(Subject &subject, int64_t banks) {
    parts.push_back({&subject, spec.layers.size(), static_cast<size_t>(banks)});
    for (int64_t i = 0; i < banks; ++i) {
      LayerSpec layer = subject.spec;
      layer.index = static_cast<int64_t>(spec.layers.size());
      layer.name = "bench." + std::to_string(layer.index);
      for (WeightSpec &weight : layer.weights)
        weight.sources.clear(); // nothing is read
      spec.layers.push_back(std::move(layer));
    }
  }
};
} // namespace

llvm::Expected<BenchModel> prepareBench(const BenchSetup &setup, moec_executor *pool,
                                        StageClock *clock) {
  BenchModel out;
  bool gpu = setup.device.device_type == kDLCUDA;
  bool compiled = llvm::sys::fs::exists(setup.path + "/manifest.json");
  std::optional<Manifest> manifest;
  ModelSpec spec;
  if (compiled) {
    if (setup.dtype)
      return makeError(ErrorCode::ARGUMENT, "--dtype", "no format for a compiled DIR", "one");
    auto read = readManifest(setup.path);
    if (!read)
      return read.takeError();
    manifest = std::move(*read);
    spec = manifest->spec;
  } else {
    WeightsChoice none;
    none.kind = WeightsChoice::None;
    auto loaded = loadModelWith(setup.path, none, setup.dtype);
    if (!loaded)
      return loaded.takeError();
    spec = std::move(loaded->spec);
  }
  out.name = spec.name;
  for (const LayerSpec &layer : spec.layers)
    out.totalParameters += layer.totalParameters();
  auto chosen = chooseLayers(spec, setup.layers);
  if (!chosen)
    return chosen.takeError();
  if (chosen->empty())
    return makeError(ErrorCode::CONFIG, setup.path, "at least one layer", "none");

  Library library;
  library.spec.name = "bench";
  library.spec.dtype = spec.dtype;
  out.subjects.resize(chosen->size());
  for (auto [i, position] : llvm::enumerate(*chosen)) {
    auto &[subject, twin] = out.subjects[i];
    subject.spec = spec.layers[position];
    subject.name = subject.spec.name;
    subject.bankBytes = subject.bytesRead(subject.spec.E);
    if (!compiled)
      library.add(subject, banksFor(subject.bankBytes, setup, out.notes));
    if (!setup.dense)
      continue;
    auto dense = denseTwin(subject.spec);
    if (!dense)
      return dense.takeError();
    if (!*dense)
      continue;
    twin.emplace();
    twin->spec = std::move(**dense);
    twin->name = "dense";
    twin->bankBytes = twin->bytesRead(1);
    library.add(*twin, banksFor(twin->bankBytes, setup, out.notes));
  }

  std::string level = setup.level;
  if (compiled) {
    llvm::sys::fs::file_status status;
    bool hasWeights = !llvm::sys::fs::status(setup.path + "/weights", status) &&
                      llvm::sys::fs::is_directory(status);
    uint64_t bytes = 0;
    for (const Manifest::Layer &layer : manifest->layers)
      bytes += layer.bytes;
    int32_t load = MOEC_NONE;
    if (hasWeights) {
      load = bytes < availableMemory() / 2 ? MOEC_COPY : MOEC_MAP;
      if (load == MOEC_MAP)
        out.notes.push_back("weights: mapped from files, as they exceed half of the memory");
    } else {
      out.notes.push_back("weights: random, as " + setup.path + " has none");
    }
    // Bank number n of a subject: layer n % count of copy n / count.
    size_t copies = 1;
    std::vector<std::vector<int32_t>> equal(out.subjects.size());
    std::vector<size_t> wanted(out.subjects.size());
    for (auto [i, pair] : llvm::enumerate(out.subjects)) {
      std::string key = keyOf(pair.first.spec);
      for (auto [j, layer] : llvm::enumerate(spec.layers))
        if (keyOf(layer) == key)
          equal[i].push_back(static_cast<int32_t>(j));
      // The layer that was asked for comes first.
      auto self = llvm::find(equal[i], static_cast<int32_t>((*chosen)[i]));
      std::rotate(equal[i].begin(), self, equal[i].end());
      wanted[i] = static_cast<size_t>(banksFor(pair.first.bankBytes, setup, out.notes));
      if (load != MOEC_MAP)
        copies = std::max(copies, (wanted[i] + equal[i].size() - 1) / equal[i].size());
    }
    std::vector<const OpenedModel *> models;
    for (size_t i = 0; i < copies; ++i) {
      auto opened = openFolder(setup.path, load, setup, pool, clock);
      if (!opened)
        return opened.takeError();
      models.push_back(opened->get());
      out.opened.push_back(std::move(*opened));
    }
    for (auto [i, pair] : llvm::enumerate(out.subjects)) {
      Subject &subject = pair.first;
      size_t count = std::min(wanted[i], equal[i].size() * copies);
      Progress progress("weights", load == MOEC_NONE ? count * subject.bankBytes : 0, "bytes");
      for (size_t n = 0; n < count; ++n) {
        subject.banks.push_back({models[n / equal[i].size()], equal[i][n % equal[i].size()]});
        if (load == MOEC_NONE)
          if (llvm::Error error = fillWeights(subject.banks.back().in->model,
                                              subject.banks.back().layer, subject.spec, progress))
            return std::move(error);
      }
      if (llvm::Error error = describe(subject))
        return std::move(error);
      readLabels(*manifest, manifest->layers[(*chosen)[i]].code, subject);
      level = subject.level; // the dense FFN is compared at the same level
    }
  } else if (!gpu) {
    auto best = chooseLevel(setup.level);
    if (!best)
      return best.takeError();
    level = *best;
  }

  if (!library.spec.layers.empty()) {
    std::string folder = setup.scratch + "/bench.moec";
    std::vector<std::string> gpus;
    for (const std::string &name : setup.gpus)
      if (level.empty() || mlir::moe::gpuLevelOf(name) == level)
        gpus.push_back(name);
    if (gpu && gpus.empty())
      return makeError(ErrorCode::ARCH, "--gpu", "a level that this device runs", level);
    if (llvm::Error error = compileInto(library.spec, level, gpus, folder, setup.scratch))
      return std::move(error);
    auto made = readManifest(folder);
    if (!made)
      return made.takeError();
    BenchSetup same = setup;
    same.level.clear();
    auto opened = openFolder(folder, MOEC_NONE, same, pool, clock);
    if (!opened)
      return opened.takeError();
    uint64_t bytes = 0;
    for (const Library::Part &part : library.parts)
      bytes += part.count * part.subject->bankBytes;
    Progress progress("weights", bytes, "bytes");
    for (const Library::Part &part : library.parts) {
      progress.label(part.subject->name);
      for (size_t i = 0; i < part.count; ++i) {
        Bank bank{opened->get(), static_cast<int32_t>(part.first + i)};
        part.subject->banks.push_back(bank);
        if (llvm::Error error =
                fillWeights(bank.in->model, bank.layer, part.subject->spec, progress))
          return std::move(error);
      }
      if (llvm::Error error = describe(*part.subject))
        return std::move(error);
      readLabels(*made, made->layers[part.first].code, *part.subject);
    }
    out.opened.push_back(std::move(*opened));
  }
  return out;
}

} // namespace moec::tool
