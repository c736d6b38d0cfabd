//===- Safetensors.cpp - weights in safetensors files ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Safetensors.h"

#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/CheckedArithmetic.h"
#include "llvm/Support/Endian.h"
#include "llvm/Support/FormatVariadic.h"

#include <algorithm>
#include <cstring>

namespace moec {

namespace {

struct DtypeRow {
  llvm::StringLiteral name;
  unsigned bits;
};
constexpr DtypeRow dtypes[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64}};

constexpr uint64_t headerLimit = 100'000'000;

std::string shapeText(llvm::ArrayRef<int64_t> shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    out += (i ? "," : "") + std::to_string(shape[i]);
  return out + "]";
}

} // namespace

llvm::StringRef name(Dtype dtype) { return dtypes[static_cast<size_t>(dtype)].name; }
unsigned bitsOf(Dtype dtype) { return dtypes[static_cast<size_t>(dtype)].bits; }

std::string describe(const TensorInfo &tensor) {
  return (name(tensor.dtype) + " " + shapeText(tensor.shape)).str();
}

//===----------------------------------------------------------------------===//
// One file
//===----------------------------------------------------------------------===//

namespace {

/// Reads one entry of the header. Offsets are made absolute by adding `dataStart`, and end inside
/// the file of `fileSize` bytes.
TensorInfo readTensor(JSONDocument &doc, const std::string &tensor, const llvm::json::Value &value,
                      uint64_t dataStart, uint64_t fileSize) {
  TensorInfo out;
  std::string at = "tensor `" + llvm::json::fixUTF8(llvm::StringRef(tensor).take_front(200)) + "`";
  JSONReader reader(doc, &value, at);

  std::string dtype = reader.string("dtype");
  if (doc.failed())
    return out;
  auto row = llvm::find_if(dtypes, [&](const DtypeRow &r) { return r.name == dtype; });
  if (row == std::end(dtypes)) {
    std::vector<std::string> all;
    for (const DtypeRow &r : dtypes)
      all.push_back(r.name.str());
    doc.fail(at + ".dtype", "a dtype of the format",
             "\"" + llvm::json::fixUTF8(llvm::StringRef(dtype).take_front(40)) + "\"",
             "they are " + quoteList(all));
    return out;
  }
  out.dtype = static_cast<Dtype>(row - std::begin(dtypes));

  const llvm::json::Value *shape = reader.get("shape");
  const llvm::json::Array *dims = shape ? shape->getAsArray() : nullptr;
  if (!dims) {
    doc.fail(at + ".shape", "an array", describeJSON(shape));
    return out;
  }
  // Every product is checked before the next factor is used.
  uint64_t elements = 1;
  for (size_t i = 0; i < dims->size(); ++i) {
    std::optional<uint64_t> d = (*dims)[i].getAsUINT64();
    if (!d || *d > uint64_t(INT64_MAX)) {
      doc.fail(at + ".shape[" + llvm::Twine(i) + "]", "an integer from 0 to 2^63-1",
               describeJSON(&(*dims)[i]));
      return out;
    }
    std::optional<uint64_t> product = llvm::checkedMulUnsigned<uint64_t>(elements, *d);
    if (!product) {
      doc.fail(at + ".shape", "fewer than 2^64 elements", "more");
      return out;
    }
    elements = *product;
    out.shape.push_back(static_cast<int64_t>(*d));
  }
  std::optional<uint64_t> bits = llvm::checkedMulUnsigned<uint64_t>(elements, bitsOf(out.dtype));
  if (!bits || *bits % 8) {
    doc.fail(at + ".shape", bits ? "a whole number of bytes" : "fewer than 2^61 bytes",
             describe(out));
    return out;
  }

  const llvm::json::Value *offsets = reader.get("data_offsets");
  const llvm::json::Array *pair = offsets ? offsets->getAsArray() : nullptr;
  if (!pair || pair->size() != 2) {
    doc.fail(at + ".data_offsets", "an array of 2", describeJSON(offsets));
    return out;
  }
  std::optional<uint64_t> begin = (*pair)[0].getAsUINT64(), end = (*pair)[1].getAsUINT64();
  uint64_t room = fileSize - dataStart;
  if (!begin || !end || *begin > *end || *end > room) {
    doc.fail(at + ".data_offsets",
             "begin and end from 0 to " + llvm::Twine(room) + ", in this order",
             begin && end ? "[" + llvm::Twine(*begin) + "," + llvm::Twine(*end) + "]"
                          : llvm::Twine("something else"));
    return out;
  }
  if (*end - *begin != *bits / 8) {
    doc.fail(at + ".data_offsets", llvm::Twine(*bits / 8) + " bytes for " + describe(out),
             llvm::Twine(*end - *begin));
    return out;
  }
  out.offset = dataStart + *begin;
  out.bytes = *end - *begin;
  return out;
}

} // namespace

llvm::Expected<std::unique_ptr<SafetensorsFile>>
SafetensorsFile::open(std::unique_ptr<InputFile> file) {
  const std::string path = file->path();
  auto malformed = [&](const llvm::Twine &expected, const llvm::Twine &got) {
    return makeError(ErrorCode::FILE_FORMAT, path, expected, got);
  };
  uint64_t fileSize = file->size();
  if (fileSize < 8)
    return malformed("a safetensors file, at least 8 bytes", llvm::Twine(fileSize));
  char lengthBytes[8];
  if (llvm::Error error = file->readAt(0, lengthBytes))
    return error;
  uint64_t headerSize = llvm::support::endian::read64le(lengthBytes);
  if (headerSize > headerLimit)
    return malformed("a safetensors header of at most " + llvm::Twine(headerLimit) + " bytes",
                     llvm::Twine(headerSize));
  if (headerSize > fileSize - 8)
    return malformed("a safetensors header inside the file of " + llvm::Twine(fileSize) + " bytes",
                     "one of " + llvm::Twine(headerSize));
  std::string text(headerSize, '\0');
  if (llvm::Error error = file->readAt(8, llvm::MutableArrayRef<char>(text.data(), text.size())))
    return error;

  JSONLimits limits;
  limits.textBytes = headerLimit;
  llvm::Expected<llvm::json::Value> header =
      parseJSON(text, path + " header", ErrorCode::FILE_FORMAT, limits);
  if (!header)
    return header.takeError();
  text = std::string();
  const llvm::json::Object *object = header->getAsObject();
  if (!object)
    return malformed("a header that is an object", describeJSON(&*header));

  auto out = std::make_unique<SafetensorsFile>();
  JSONDocument doc(path, ErrorCode::FILE_FORMAT);
  uint64_t dataStart = 8 + headerSize;
  for (const auto &member : *object) {
    std::string key = llvm::StringRef(member.first).str();
    if (key != "__metadata__") {
      out->table.emplace(key, readTensor(doc, key, member.second, dataStart, fileSize));
      continue;
    }
    if (member.second.getAsNull())
      continue;
    const llvm::json::Object *meta = member.second.getAsObject();
    if (!meta) {
      doc.fail(key, "an object of strings", describeJSON(&member.second));
      continue;
    }
    for (const auto &entry : *meta) {
      if (std::optional<llvm::StringRef> value = entry.second.getAsString())
        out->meta.emplace(llvm::StringRef(entry.first).str(), value->str());
      else
        doc.fail(key + "." + llvm::StringRef(entry.first).take_front(60).str(), "a string",
                 describeJSON(&entry.second));
    }
  }
  if (llvm::Error error = doc.take())
    return error;

  // Tensors must cover the data: each starts where the one before it ends.
  std::vector<std::pair<std::pair<uint64_t, uint64_t>, const std::string *>> order;
  for (const auto &[key, info] : out->table)
    order.push_back({{info.offset, info.offset + info.bytes}, &key});
  std::sort(order.begin(), order.end());
  uint64_t covered = dataStart;
  for (const auto &[extent, key] : order) {
    if (extent.first != covered)
      return malformed("tensor `" + *key + "` at data offset " + llvm::Twine(covered - dataStart) +
                           ", where the one before it ends",
                       llvm::Twine(extent.first - dataStart) +
                           (extent.first < covered ? " (they overlap)" : " (there is a hole)"));
    covered = extent.second;
  }
  if (covered != fileSize)
    return malformed("tensors that end with the file, at byte " + llvm::Twine(fileSize),
                     "the last one ends at byte " + llvm::Twine(covered));
  out->input = std::move(file);
  return out;
}

//===----------------------------------------------------------------------===//
// Checkpoints
//===----------------------------------------------------------------------===//

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
    llvm::Expected<std::string> text = (*input)->readAll(headerLimit);
    if (!text)
      return text.takeError();
    JSONLimits limits;
    limits.textBytes = headerLimit;
    llvm::Expected<llvm::json::Value> value =
        parseJSON(*text, indexPath, ErrorCode::FILE_FORMAT, limits);
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
                       : llvm::Twine(found.size()) + " safetensors files without an index");
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
                             : "this format of weights is not implemented yet");
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
                         name(s->info->dtype), "this format of scales is not implemented yet");
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

//===----------------------------------------------------------------------===//
// Values
//===----------------------------------------------------------------------===//

namespace {

/// Counts elements whose exponent bits are all ones. `Word` is the element as an integer.
template <typename Word>
void scan(const char *data, size_t count, Word mask, int64_t firstIndex, NonFinite &found) {
  constexpr size_t block = 4096;
  for (size_t begin = 0; begin < count; begin += block) {
    size_t end = std::min(count, begin + block);
    uint64_t bad = 0; // a loop without branches, so that it is vectorized
    for (size_t i = begin; i < end; ++i) {
      Word w;
      std::memcpy(&w, data + i * sizeof(Word), sizeof(Word));
      bad += (w & mask) == mask;
    }
    if (!bad)
      continue;
    for (size_t i = begin; i < end && found.first < 0; ++i) {
      Word w;
      std::memcpy(&w, data + i * sizeof(Word), sizeof(Word));
      if ((w & mask) == mask)
        found.first = firstIndex + static_cast<int64_t>(i);
    }
    found.count += bad;
  }
}

float halfToFloat(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31,
           mantissa = half & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    float value = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

} // namespace

void scanNonFinite(Dtype dtype, const char *data, size_t count, int64_t firstIndex,
                   NonFinite &found) {
  if (dtype == Dtype::F32)
    scan<uint32_t>(data, count, 0x7f800000u, firstIndex, found);
  else if (dtype == Dtype::BF16)
    scan<uint16_t>(data, count, 0x7f80, firstIndex, found);
  else if (dtype == Dtype::F16)
    scan<uint16_t>(data, count, 0x7c00, firstIndex, found);
}

llvm::Error checkFinite(const NonFinite &found, llvm::StringRef file, llvm::StringRef tensor) {
  if (!found.count)
    return llvm::Error::success();
  return makeError(ErrorCode::NONFINITE, file + ": tensor `" + tensor + "`", "finite values",
                   llvm::Twine(found.count) + " NaN or infinite, the first at index " +
                       llvm::Twine(found.first));
}

void toFloat(Dtype dtype, const char *data, size_t count, float *out) {
  if (dtype == Dtype::F32) {
    std::memcpy(out, data, count * sizeof(float));
    return;
  }
  for (size_t i = 0; i < count; ++i) {
    uint16_t w;
    std::memcpy(&w, data + 2 * i, sizeof w);
    if (dtype == Dtype::BF16) {
      uint32_t bits = uint32_t(w) << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    } else {
      out[i] = halfToFloat(w);
    }
  }
}

} // namespace moec
