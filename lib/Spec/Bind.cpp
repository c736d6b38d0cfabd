//===- Bind.cpp - where a layer's weights lie in a checkpoint -------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Bind.h"

#include <algorithm>

namespace moec {

/// Where the text model's modules lie in checkpoints.
static const char *const roots[] = {"model.", "", "model.language_model.", "language_model.model.",
                                    "language_model."};

bool startsAny(const std::vector<std::string> &names, const std::string &prefix) {
  auto it = std::lower_bound(names.begin(), names.end(), prefix);
  return it != names.end() && llvm::StringRef(*it).starts_with(prefix);
}

static std::string withExpert(std::string text, int64_t expert) {
  for (size_t at = text.find("{e}"); at != std::string::npos; at = text.find("{e}", at))
    text.replace(at, 3, std::to_string(expert));
  return text;
}

llvm::Error bindSources(RowReader::Layer &layer, const Checkpoint &checkpoint,
                        const std::vector<std::string> &names, Encoding encoding) {
  std::string prefix;
  for (const char *root : roots)
    for (const std::string &candidate : layer.prefixes)
      if (prefix.empty() && startsAny(names, root + candidate + "."))
        prefix = root + candidate + ".";
  bool none = prefix.empty();
  if (none)
    prefix = roots[0] + layer.prefixes.front() + ".";
  for (WeightSpec &weight : layer.spec.weights) {
    const std::vector<WeightSource> *chosen = nullptr;
    for (const std::vector<WeightSource> &form : layer.forms[weight.role]) {
      bool any = false;
      for (const WeightSource &source : form)
        for (int64_t e = 0; e < weight.experts && !any; ++e)
          any = checkpoint.has(withExpert(prefix + source.tensor, e));
      if (any) {
        chosen = &form;
        break;
      }
    }
    if (!chosen)
      return checkpoint.missing(
          withExpert(prefix + layer.forms[weight.role].front().front().tensor, 0));
    for (WeightSource source : *chosen) {
      source.tensor = prefix + source.tensor;
      const TensorInfo *info = checkpoint.find(withExpert(source.tensor, 0));
      if (source.encoding != Encoding::Plain) {
        source.scales = prefix + source.scales;
      } else if (encoding == Encoding::FP8 && info && info->dtype == Dtype::F8_E4M3) {
        // Every matrix may be stored so; its scales are beside it.
        source.encoding = Encoding::FP8;
        source.scales = source.tensor + "_scale_inv";
      }
      // More experts in the files than the configuration says would be dropped without a word.
      if (source.tensor.find("{e}") != std::string::npos &&
          checkpoint.has(withExpert(source.tensor, weight.experts)))
        return makeError(ErrorCode::TENSOR, checkpoint.path(),
                         llvm::Twine(weight.experts) + " experts, as " + layer.spec.origins["E"] +
                             " says",
                         "tensor `" + withExpert(source.tensor, weight.experts) + "` as well");
      weight.sources.push_back(std::move(source));
    }
  }
  return llvm::Error::success();
}

/// The dtype of a weight's tensors: f32 when any is wider than bf16.
static Format storedFormat(const WeightSpec &weight, const Checkpoint &checkpoint, bool &half) {
  Format out = Format::BF16;
  for (const WeightSource &source : weight.sources) {
    if (source.encoding != Encoding::Plain)
      continue; // decoded to bf16
    int64_t count = source.arrangement == Arrangement::Stacked ? 1 : weight.experts;
    for (int64_t e = 0; e < count; ++e) {
      const TensorInfo *info = checkpoint.find(withExpert(source.tensor, e));
      if (!info || info->dtype != Dtype::BF16)
        out = Format::F32;
      half |= info && info->dtype == Dtype::F16;
    }
  }
  return out;
}

void noteConversions(ModelSpec &spec, const Checkpoint &checkpoint) {
  std::set<std::string> notes;
  for (const LayerSpec &layer : spec.layers)
    for (const WeightSpec &weight : layer.weights) {
      for (const WeightSource &source : weight.sources)
        if (source.encoding != Encoding::Plain)
          notes.insert(name(source.encoding).str() + " weights of the checkpoint are decoded to " +
                       name(weight.format).str());
      bool half = false;
      Format stored = storedFormat(weight, checkpoint, half);
      if (half && !isVector(weight.role))
        notes.insert("the checkpoint holds f16 tensors: they are converted to " +
                     name(weight.format).str());
      else if (stored == Format::F32 && weight.format == Format::BF16)
        notes.insert("f32 weights of the checkpoint are rounded to bf16");
      else if (stored == Format::BF16 && weight.format == Format::F32 && !isVector(weight.role))
        notes.insert("bf16 weights of the checkpoint are widened to f32");
    }
  spec.notes.insert(spec.notes.end(), notes.begin(), notes.end());
}

llvm::Error bindFormats(ModelSpec &spec, const Checkpoint &checkpoint, const LoadOptions &options,
                        const ConfigDtype &stated) {
  bool half = false;
  for (LayerSpec &layer : spec.layers) {
    Format experts = Format::BF16;
    for (WeightSpec &weight : layer.weights) {
      std::string demand = weight.role == "router" ? "E and H" : "E, F and H";
      if (layer.kind == LayerKind::Dense)
        demand = "F and H";
      std::string sizes;
      for (const char *letter : {"E", "F", "H"}) {
        auto it = layer.origins.find(letter);
        if (llvm::StringRef(demand).contains(letter) && it != layer.origins.end())
          sizes += (sizes.empty() ? "" : ", ") + std::string(letter) + " from " + it->second;
      }
      if (llvm::Error error = checkpoint.checkWeight(
              weight, "the model (" + (sizes.empty() ? demand : sizes) + ")"))
        return error;
      if (isVector(weight.role))
        continue;
      weight.format = storedFormat(weight, checkpoint, half);
      if (weight.role != "router" && weight.format == Format::F32)
        experts = Format::F32;
    }
    Format chosen = options.dtype.value_or(experts);
    std::string origin = options.dtype ? "command line" : "checkpoint";
    for (WeightSpec &weight : layer.weights) {
      if (isVector(weight.role))
        continue;
      if (weight.role != "router" || chosen == Format::F32)
        weight.format = chosen; // an f32 router stays f32 beside bf16 experts
      layer.origins["weights." + weight.role + ".format"] =
          weight.role == "router" && chosen == Format::BF16 ? "checkpoint" : origin;
    }
    layer.format = layer.compute = chosen;
    layer.origins["format"] = layer.origins["compute"] = origin;
  }
  spec.dtype = spec.layers.front().compute;
  noteConversions(spec, checkpoint);
  if (!options.dtype && stated.format && *stated.format != spec.dtype)
    spec.notes.push_back(stated.origin + " says " + name(*stated.format).str() +
                         ", but the tensors are not: the layers compute in " +
                         name(spec.dtype).str());
  return llvm::Error::success();
}

} // namespace moec
