//===- Checkpoint.cpp - the tensors of a model's weights -------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Safetensors.h"

#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FormatVariadic.h"

#include <algorithm>

namespace moec {

/// Of an index of shards, as of the header of a file.
static constexpr uint64_t indexLimit = 100'000'000;

llvm::Error Checkpoint::add(std::unique_ptr<SafetensorsFile> file) {
  for (const auto &[tensor, info] : file->tensors()) {
    auto [it, fresh] = index.try_emplace(tensor, Place{file.get(), &info});
    if (!fresh)
      return makeError(
          ErrorCode::TENSOR, file->file().path(), "every tensor in one file of the checkpoint",
          "`" + tensor + "`, which is in `" + it->second.file->file().path() + "` as well");
  }
  files.push_back(std::move(file));
  return llvm::Error::success();
}

llvm::Expected<std::unique_ptr<Checkpoint>> Checkpoint::openFile(llvm::StringRef path) {
  llvm::Expected<std::unique_ptr<InputFile>> input = InputFile::open(path);
  if (!input)
    return input.takeError();
  llvm::Expected<std::unique_ptr<SafetensorsFile>> file = SafetensorsFile::open(std::move(*input));
  if (!file)
    return file.takeError();
  auto out = std::make_unique<Checkpoint>();
  out->where = path.str();
  if (llvm::Error error = out->add(std::move(*file)))
    return error;
  return out;
}

llvm::Expected<std::unique_ptr<Checkpoint>> Checkpoint::open(llvm::StringRef path,
                                                             bool followLinks) {
  llvm::Expected<std::unique_ptr<InputFolder>> opened = InputFolder::open(path, followLinks);
  if (!opened)
    return opened.takeError();
  const InputFolder &folder = **opened;
  auto out = std::make_unique<Checkpoint>();
  out->where = folder.path();
  auto addMember = [&](llvm::StringRef member) -> llvm::Error {
    llvm::Expected<std::unique_ptr<InputFile>> input = folder.openMember(member);
    if (!input)
      return input.takeError();
    llvm::Expected<std::unique_ptr<SafetensorsFile>> file =
        SafetensorsFile::open(std::move(*input));
    if (!file)
      return file.takeError();
    return out->add(std::move(*file));
  };

  // The same order as transformers: the single file wins over an index.
  const char *single = "model.safetensors", *indexName = "model.safetensors.index.json";
  if (!folder.has(single) && folder.has(indexName)) {
    llvm::Expected<std::unique_ptr<InputFile>> input = folder.openMember(indexName);
    if (!input)
      return input.takeError();
    std::string indexPath = (*input)->path();
    JSONLimits limits;
    limits.textBytes = indexLimit;
    llvm::Expected<llvm::json::Value> value = readJSON(**input, ErrorCode::FILE_FORMAT, limits);
    if (!value)
      return value.takeError();
    const llvm::json::Object *root = value->getAsObject();
    const llvm::json::Object *map = root ? root->getObject("weight_map") : nullptr;
    if (!map)
      return makeError(ErrorCode::FILE_FORMAT, indexPath, "an object `weight_map`",
                       describeJSON(root ? root->get("weight_map") : &*value));
    std::map<std::string, std::vector<std::string>> shards;
    for (const auto &entry : *map) {
      std::string tensor = llvm::StringRef(entry.first).str();
      std::optional<llvm::StringRef> shard = entry.second.getAsString();
      if (!shard)
        return makeError(ErrorCode::FILE_FORMAT, indexPath + ": weight_map." + tensor,
                         "the name of a file", describeJSON(&entry.second));
      if (llvm::Error error = checkPlainName(*shard, indexPath + ": weight_map." + tensor))
        return error;
      shards[shard->str()].push_back(tensor);
    }
    for (const auto &[shard, tensors] : shards) {
      if (!folder.has(shard)) {
        std::vector<std::string> near = nearestNames(shard, folder.members());
        return makeError(ErrorCode::TENSOR, indexPath,
                         "file `" + shard + "` with " + llvm::Twine(tensors.size()) + " tensors",
                         "none of this name",
                         near.empty() ? "" : "the folder has " + quoteList(near));
      }
      if (llvm::Error error = addMember(shard))
        return error;
      for (const std::string &tensor : tensors)
        if (!out->files.back()->tensors().count(tensor))
          return makeError(ErrorCode::TENSOR, out->files.back()->file().path(),
                           "tensor `" + tensor + "`, which the index puts there", "none");
    }
    return out;
  }
  if (folder.has(single)) {
    if (llvm::Error error = addMember(single))
      return error;
    return out;
  }
  std::vector<std::string> found, foreign;
  for (const std::string &member : folder.members()) {
    llvm::StringRef ref = member;
    if (ref.ends_with(".safetensors"))
      found.push_back(member);
    else if (ref.ends_with(".bin") || ref.ends_with(".pt") || ref.ends_with(".pth") ||
             ref.ends_with(".gguf") || ref.ends_with(".ckpt") || ref.ends_with(".h5"))
      foreign.push_back(member);
  }
  if (found.size() == 1) {
    if (llvm::Error error = addMember(found[0]))
      return error;
    return out;
  }
  if (found.empty() && !foreign.empty())
    return makeError(ErrorCode::UNSUPPORTED, folder.path(), "weights in safetensors files",
                     "`" + foreign[0] + "`", "convert the checkpoint to safetensors");
  return makeError(ErrorCode::TENSOR, folder.path(),
                   "`" + llvm::Twine(single) + "` or `" + llvm::Twine(indexName) + "`",
                   found.empty()
                       ? llvm::Twine("no safetensors file")
                       : llvm::Twine(found.size()) + " safetensors files without an index",
                   folder.snapshotHint());
}

const Checkpoint::Place *Checkpoint::place(llvm::StringRef tensor) const {
  auto it = index.find(tensor.str());
  return it == index.end() ? nullptr : &it->second;
}

const TensorInfo *Checkpoint::find(llvm::StringRef tensor) const {
  const Place *p = place(tensor);
  return p ? p->info : nullptr;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> out;
  for (const auto &entry : index)
    out.push_back(entry.first);
  return out;
}

llvm::Error Checkpoint::missing(llvm::StringRef tensor) const {
  std::vector<std::string> near = nearestNames(tensor, names());
  return makeError(ErrorCode::TENSOR, where, "tensor `" + tensor + "`", "none of this name",
                   near.empty() ? std::string("the checkpoint has ") + std::to_string(size()) +
                                      " tensors, none with a similar name"
                                : "the checkpoint has " + quoteList(near));
}

namespace {

std::string numbered(std::string out, int64_t expert) {
  std::string number = std::to_string(expert);
  for (size_t at = out.find("{e}"); at != std::string::npos; at = out.find("{e}", at))
    out.replace(at, 3, number);
  return out;
}

std::string tensorName(const WeightSource &source, int64_t expert) {
  return numbered(source.tensor, expert);
}

const WeightSource *sourceOf(const WeightSpec &weight, int64_t part) {
  for (const WeightSource &source : weight.sources)
    if (part >= source.firstPart && part < source.firstPart + source.partCount)
      return &source;
  return nullptr;
}

std::vector<int64_t> shapeOf(const WeightSpec &weight, const WeightSource &source) {
  std::vector<int64_t> shape{source.partCount * weight.rows, weight.cols};
  if (source.transposed)
    std::swap(shape[0], shape[1]);
  if (source.encoding == Encoding::MXFP4)
    shape = {shape[0], shape[1] / 32, 16};
  if (source.arrangement == Arrangement::Stacked)
    shape.insert(shape.begin(), weight.experts);
  if (isVector(weight.role))
    llvm::erase(shape, 1);
  return shape;
}

/// Shape of the scales of an encoded source.
std::vector<int64_t> scalesShapeOf(const WeightSpec &weight, const WeightSource &source) {
  int64_t rows = source.partCount * weight.rows;
  std::vector<int64_t> shape{rows, weight.cols / 32};
  if (source.encoding == Encoding::FP8)
    shape = {(rows + 127) / 128, (weight.cols + 127) / 128};
  if (source.arrangement == Arrangement::Stacked)
    shape.insert(shape.begin(), weight.experts);
  return shape;
}

/// Whether a tensor of this dtype can hold values of the encoding, or its scales.
bool holdsValues(Encoding encoding, Dtype dtype) {
  if (encoding == Encoding::Plain)
    return dtype == Dtype::F32 || dtype == Dtype::BF16 || dtype == Dtype::F16;
  return dtype == (encoding == Encoding::FP8 ? Dtype::F8_E4M3 : Dtype::U8);
}
bool holdsScales(Encoding encoding, Dtype dtype) {
  if (encoding == Encoding::FP8)
    return dtype == Dtype::F32 || dtype == Dtype::BF16;
  return dtype == Dtype::U8 || dtype == Dtype::F8_E8M0;
}

/// Whether a tensor has the shape. Vectors are stored with and without dimensions of 1.
bool fits(const TensorInfo &tensor, const WeightSpec &weight, const WeightSource &source) {
  std::vector<int64_t> shape = tensor.shape;
  if (isVector(weight.role))
    llvm::erase(shape, 1);
  return shape == shapeOf(weight, source);
}

} // namespace

llvm::Error Checkpoint::checkWeight(const WeightSpec &weight, llvm::StringRef config) const {
  for (const WeightSource &source : weight.sources) {
    if (source.encoding == Encoding::MXFP4 && weight.cols % 32)
      return makeError(ErrorCode::TENSOR, where + ": tensor `" + source.tensor + "`",
                       "a multiple of 32 columns in mxfp4", llvm::Twine(weight.cols));
    std::vector<int64_t> shape = shapeOf(weight, source);
    int64_t tensors = source.arrangement == Arrangement::Stacked ? 1 : weight.experts;
    for (int64_t e = 0; e < tensors; ++e) {
      std::string tensor = tensorName(source, e);
      const Place *p = place(tensor);
      if (!p)
        return missing(tensor);
      std::string at = p->file->file().path() + ": tensor `" + tensor + "`";
      Dtype dtype = p->info->dtype;
      if (!holdsValues(source.encoding, dtype))
        return makeError(ErrorCode::UNSUPPORTED, at,
                         source.encoding == Encoding::Plain ? "dtype F32, BF16 or F16"
                         : source.encoding == Encoding::FP8 ? "dtype F8_E4M3"
                                                            : "dtype U8",
                         name(dtype),
                         dtype == Dtype::F8_E4M3
                             ? "fp8 is read where quantization_config says so, in 128x128 blocks"
                             : saveInBF16);
      if (!fits(*p->info, weight, source))
        return makeError(ErrorCode::TENSOR, at,
                         "shape " + shapeText(shape) + (config.empty() ? "" : ", as ") + config +
                             (config.empty() ? "" : " demands"),
                         shapeText(p->info->shape));
      if (source.encoding == Encoding::Plain)
        continue;
      std::string scales = numbered(source.scales, e);
      const Place *s = place(scales);
      if (!s)
        return missing(scales);
      at = s->file->file().path() + ": tensor `" + scales + "`";
      if (!holdsScales(source.encoding, s->info->dtype))
        return makeError(ErrorCode::UNSUPPORTED, at,
                         source.encoding == Encoding::FP8 ? "dtype F32 or BF16" : "dtype U8",
                         name(s->info->dtype), saveInBF16);
      if (s->info->shape != scalesShapeOf(weight, source))
        return makeError(ErrorCode::TENSOR, at,
                         "shape " + shapeText(scalesShapeOf(weight, source)) + ", the scales of `" +
                             tensor + "`",
                         shapeText(s->info->shape));
    }
  }
  return llvm::Error::success();
}

llvm::Expected<MatrixExtent> Checkpoint::locate(const WeightSpec &weight, int64_t expert,
                                                int64_t part) const {
  const WeightSource *source = sourceOf(weight, part);
  if (!source)
    return makeError(ErrorCode::TENSOR, where,
                     "a source for part " + llvm::Twine(part) + " of `" + weight.role + "`", "none",
                     "the input has shapes only");
  MatrixExtent out;
  out.tensor = tensorName(*source, expert);
  const Place *p = place(out.tensor);
  if (!p)
    return missing(out.tensor);
  if (!fits(*p->info, weight, *source) || !holdsValues(source->encoding, p->info->dtype))
    return makeError(ErrorCode::TENSOR, p->file->file().path() + ": tensor `" + out.tensor + "`",
                     "shape " + shapeText(shapeOf(weight, *source)), describe(*p->info));
  // Limits keep these products far below 2^63, and the shape above has been checked against the
  // file.
  int64_t q = part - source->firstPart, parts = source->partCount;
  int64_t storedRows = parts * weight.rows, cols = weight.cols;
  uint64_t elementBytes = bitsOf(p->info->dtype) / 8;
  int64_t first = source->arrangement == Arrangement::Stacked ? expert * storedRows * cols : 0;
  int64_t count = storedRows * cols;
  int64_t rowStep = source->interleaved ? parts : 1;
  int64_t firstRow = source->interleaved ? q : q * weight.rows;
  if (source->encoding != Encoding::Plain) {
    std::string scales = numbered(source->scales, expert);
    const Place *s = place(scales);
    if (!s)
      return missing(scales);
    std::vector<int64_t> shape = scalesShapeOf(weight, *source);
    if (s->info->shape != shape || !holdsScales(source->encoding, s->info->dtype))
      return makeError(ErrorCode::TENSOR, s->file->file().path() + ": tensor `" + scales + "`",
                       "shape " + shapeText(shape), describe(*s->info));
    bool stacked = source->arrangement == Arrangement::Stacked;
    int64_t index = stacked ? expert : 0, stored = stacked ? weight.experts : 1;
    out.file = p->file;
    out.dtype = p->info->dtype;
    out.bytes = p->info->bytes / stored;
    out.offset = p->info->offset + out.bytes * index;
    out.rows = weight.rows;
    out.cols = cols;
    out.encoding = source->encoding;
    out.firstRow = firstRow;
    out.rowStep = rowStep;
    out.scalesFile = s->file;
    out.scalesDtype = s->info->dtype;
    out.scalesOffset = s->info->offset + s->info->bytes / stored * index;
    out.scalesCols = shape.back();
    return out;
  }
  if (source->transposed) {
    out.start = firstRow;
    out.rowStride = rowStep;
    out.colStride = storedRows;
  } else if (source->interleaved) {
    out.start = firstRow * cols;
    out.rowStride = rowStep * cols;
    out.colStride = 1;
  } else { // the part's rows lie together: nothing else is read
    first += firstRow * cols;
    count = weight.rows * cols;
    out.rowStride = cols;
    out.colStride = 1;
  }
  out.file = p->file;
  out.dtype = p->info->dtype;
  out.offset = p->info->offset + uint64_t(first) * elementBytes;
  out.bytes = uint64_t(count) * elementBytes;
  out.rows = weight.rows;
  out.cols = cols;
  out.firstElement = first;
  return out;
}

llvm::Error Checkpoint::read(const MatrixExtent &extent, std::vector<char> &buffer) const {
  buffer.resize(extent.bytes);
  return extent.file->file().readAt(extent.offset, buffer);
}

} // namespace moec
