//===- Load.cpp - from a model on disk to a ModelSpec ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Load.h"

#include "Bind.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/Path.h"

namespace moec {

namespace {

/// "Mixtral-8x7B-v0.1" of a folder path, also inside a Hugging Face cache.
std::string modelNameOf(llvm::StringRef folder, llvm::StringRef fallback) {
  llvm::SmallString<256> path(folder);
  if (std::error_code error = llvm::sys::fs::real_path(folder, path))
    path = folder;
  llvm::StringRef base = llvm::sys::path::filename(path);
  for (llvm::StringRef part : llvm::split(path, '/'))
    if (part.consume_front("models--"))
      base = part.rsplit("--").second.empty() ? part : part.rsplit("--").second;
  std::string out = base.empty() || base == "." || base == "/" ? "" : identifierFor(base);
  return out.empty() || out == "model" ? identifierFor(fallback) : out;
}

llvm::Expected<std::unique_ptr<Checkpoint>> openCheckpoint(llvm::StringRef path, bool followLinks) {
  if (llvm::sys::fs::is_directory(path))
    return Checkpoint::open(path, followLinks);
  return Checkpoint::openFile(path);
}

bool hasWeights(const InputFolder &folder) {
  for (const std::string &member : folder.members())
    for (llvm::StringRef suffix : {".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth",
                                   ".gguf", ".ckpt", ".h5"})
      if (llvm::StringRef(member).ends_with(suffix))
        return true;
  return false;
}

/// Puts the file in front of errors about a layer.
llvm::Error checkLayers(const ModelSpec &spec, const std::string &file) {
  for (const LayerSpec &layer : spec.layers)
    if (llvm::Error error = checkConsistent(layer)) {
      Error first = takeErrors(std::move(error)).front();
      first.where = file + ": " + first.where;
      return llvm::make_error<Error>(std::move(first));
    }
  return llvm::Error::success();
}

/// Whether a row tells where encoded tensors lie.
bool hasEncodedForm(const std::vector<RowReader::Layer> &layers) {
  for (const RowReader::Layer &layer : layers)
    for (const auto &[role, forms] : layer.forms)
      for (const std::vector<WeightSource> &form : forms)
        for (const WeightSource &source : form)
          if (source.encoding != Encoding::Plain)
            return true;
  return false;
}

llvm::Expected<LoadedModel> loadConfig(const InputFile &file, const std::string &modelName,
                                       const std::string &checkpointPath, const ModelTable &table,
                                       const LoadOptions &options) {
  JSONLimits limits;
  limits.nonFiniteAsNull = true;
  llvm::Expected<llvm::json::Value> root = readJSON(file, ErrorCode::CONFIG, limits);
  if (!root)
    return root.takeError();
  auto found = findConfig(*root, file.path(), table);
  if (!found)
    return found.takeError();
  const Config &config = found->first;
  const ModelRow &row = *found->second;
  llvm::Expected<Encoding> encoding = configEncoding(config, file.path());
  if (!encoding)
    return encoding.takeError();
  llvm::Expected<ConfigDtype> stated = configDtype(config, file.path());
  if (!stated)
    return stated.takeError();
  RowReader reader(row, config, file.path());
  llvm::Expected<std::vector<RowReader::Layer>> layers = reader.run();
  if (!layers)
    return layers.takeError();

  LoadedModel out;
  out.spec.name = modelName.empty() ? identifierFor(row.modelType) : modelName;
  out.spec.modelType = row.modelType;
  for (const std::string &key : reader.unreadKeys())
    out.spec.notes.push_back("config key `" + config.path + key + "` is not read by row " +
                             row.modelType + " (as in transformers)");
  for (RowReader::Layer &layer : *layers)
    layer.spec.name = (config.composite() ? reader.compositeRoot() : "model.") + layer.module;
  if (*encoding == Encoding::MXFP4 && !hasEncodedForm(*layers))
    return makeError(ErrorCode::UNSUPPORTED, file.path() + ": quantization_config",
                     "weights in f32, bf16, f16 or `fp8` for a " + row.modelType, "`mxfp4`",
                     "the row has no form for its tensors");

  if (!checkpointPath.empty()) {
    // Consistency first: a product of absurd sizes must not reach the search for tensors.
    ModelSpec draft;
    for (const RowReader::Layer &layer : *layers)
      draft.layers.push_back(layer.spec);
    if (llvm::Error error = checkLayers(draft, file.path()))
      return error;
    llvm::Expected<std::unique_ptr<Checkpoint>> checkpoint =
        openCheckpoint(checkpointPath, options.followLinks);
    if (!checkpoint)
      return checkpoint.takeError();
    out.checkpoint = std::move(*checkpoint);
    std::vector<std::string> names = out.checkpoint->names();
    for (RowReader::Layer &layer : *layers) {
      if (llvm::Error error = bindSources(layer, *out.checkpoint, names, *encoding))
        return error;
      out.spec.layers.push_back(std::move(layer.spec));
    }
    // Layers that the configuration leaves out are legitimate (draft heads), but not silently so.
    const LayerSpec &last = out.spec.layers.back();
    std::string number = "." + std::to_string(last.index) + ".";
    std::string beyond = last.weights.front().sources.front().tensor;
    if (size_t at = beyond.find(number); at != std::string::npos) {
      beyond = beyond.substr(0, at) + "." + std::to_string(last.index + 1) + ".";
      if (startsAny(names, beyond))
        out.spec.notes.push_back("the checkpoint has tensors `" + beyond +
                                 "…`, but the config says " + std::to_string(last.index + 1) +
                                 " layers: they are left out");
    }
    if (llvm::Error error = bindFormats(out.spec, *out.checkpoint, options, *stated))
      return error;
  } else {
    out.spec.dtype = options.dtype.value_or(stated->format.value_or(Format::F32));
    std::string origin = options.dtype    ? "command line"
                         : stated->format ? stated->origin
                                          : "default of moec";
    if (!options.dtype && stated->half) {
      origin = stated->origin;
      out.spec.notes.push_back(
          stated->origin + " says float16: the layers compute in f32; --dtype bf16 halves that");
    } else if (!options.dtype && !stated->format) {
      out.spec.notes.push_back("the config states no dtype: f32 is taken; --dtype chooses");
    }
    for (RowReader::Layer &layer : *layers) {
      layer.spec.compute = layer.spec.format = out.spec.dtype;
      layer.spec.origins["compute"] = layer.spec.origins["format"] = origin;
      for (WeightSpec &weight : layer.spec.weights)
        if (!isVector(weight.role))
          weight.format = out.spec.dtype;
      out.spec.layers.push_back(std::move(layer.spec));
    }
  }
  if (llvm::Error error = checkLayers(out.spec, file.path()))
    return error;
  return out;
}

llvm::Expected<LoadedModel> loadSpec(llvm::StringRef path, const LoadOptions &options) {
  llvm::Expected<llvm::json::Value> root = readJSON(path, ErrorCode::CONFIG);
  if (!root)
    return root.takeError();
  llvm::Expected<ModelSpec> spec = fromJSON(*root, path);
  if (!spec)
    return spec.takeError();
  LoadedModel out;
  out.spec = std::move(*spec);
  if (!options.checkpoint.empty() && !options.shapesOnly) {
    for (const LayerSpec &layer : out.spec.layers)
      for (const WeightSpec &weight : layer.weights)
        if (weight.sources.empty())
          return makeError(ErrorCode::CONFIG, path + ": " + layer.name + ": weights." + weight.role,
                           "`from`, the tensors of this weight", "nothing");
    llvm::Expected<std::unique_ptr<Checkpoint>> checkpoint =
        openCheckpoint(options.checkpoint, options.followLinks);
    if (!checkpoint)
      return checkpoint.takeError();
    out.checkpoint = std::move(*checkpoint);
    for (const LayerSpec &layer : out.spec.layers)
      for (const WeightSpec &weight : layer.weights)
        if (llvm::Error error = out.checkpoint->checkWeight(weight, "the spec"))
          return error;
  }
  if (options.dtype) {
    out.spec.dtype = *options.dtype;
    for (LayerSpec &layer : out.spec.layers) {
      layer.compute = layer.format = *options.dtype;
      layer.origins["compute"] = layer.origins["format"] = "command line";
      for (WeightSpec &weight : layer.weights)
        if (!isVector(weight.role) && (weight.role != "router" || *options.dtype == Format::F32))
          weight.format = *options.dtype;
    }
  }
  if (out.checkpoint)
    noteConversions(out.spec, *out.checkpoint);
  return out;
}

} // namespace

llvm::Expected<LoadedModel> loadModel(llvm::StringRef path, const ModelTable &table,
                                      const LoadOptions &options) {
  std::string elsewhere = options.shapesOnly ? "" : options.checkpoint;
  if (!llvm::sys::fs::exists(path))
    return makeError(ErrorCode::CONFIG, path, "a model folder or file", "nothing there");
  if (llvm::sys::fs::is_directory(path)) {
    llvm::Expected<std::unique_ptr<InputFolder>> folder =
        InputFolder::open(path, options.followLinks);
    if (!folder)
      return folder.takeError();
    const std::string &name = (*folder)->path();
    if (!(*folder)->has("config.json"))
      return makeError(ErrorCode::CONFIG, name, "a model folder with config.json", "none in it",
                       (*folder)->has("manifest.json") ? "this is a folder that moec wrote"
                                                       : (*folder)->snapshotHint());
    for (const char *quantized : {"hf_quant_config.json", "quantize_config.json"})
      if ((*folder)->has(quantized))
        return makeError(ErrorCode::UNSUPPORTED, name + "/" + quantized,
                         "weights in f32, bf16 or f16", "a quantized checkpoint", saveInBF16);
    llvm::Expected<std::unique_ptr<InputFile>> file = (*folder)->openMember("config.json");
    if (!file)
      return file.takeError();
    if (elsewhere.empty() && !options.shapesOnly && hasWeights(**folder))
      elsewhere = name;
    return loadConfig(**file, modelNameOf(name, ""), elsewhere, table, options);
  }
  if (path.ends_with(".moe.json"))
    return loadSpec(path, options);
  if (!path.ends_with(".json"))
    return makeError(ErrorCode::ARGUMENT, path,
                     "a checkpoint folder, a config.json, a *.moe.json or a .mlir file",
                     "another kind of file");
  llvm::Expected<std::unique_ptr<InputFile>> file = InputFile::open(path);
  if (!file)
    return file.takeError();
  llvm::StringRef stem = llvm::sys::path::stem(path);
  llvm::StringRef parent = llvm::sys::path::parent_path(path);
  std::string name = stem != "config" ? identifierFor(stem)
                     : parent.empty() ? ""
                                      : modelNameOf(parent, "");
  return loadConfig(**file, name == "model" ? "" : name, elsewhere, table, options);
}

} // namespace moec
