//===- Weights.cpp - packing weights into files ---------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Weights.h"

#include "moe/Export/Output.h"
#include "moe/Spec/Safetensors.h"
#include "moe/Support/Files.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/MathExtras.h"

#include <cmath>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace moec {

WeightReader::~WeightReader() = default;

static int32_t dtypeNumber(Format format) {
  return format == Format::F32 ? MOEC_DT_F32 : MOEC_DT_BF16;
}
static size_t itemBytes(Format format) { return format == Format::F32 ? 4 : 2; }

//===----------------------------------------------------------------------===//
// Where a part of a weight lies
//===----------------------------------------------------------------------===//

TensorSlice locate(const LayerSpec &layer, const WeightSpec &weight, int64_t expert, int64_t part) {
  TensorSlice slice;
  WeightSource whole;
  whole.tensor = layer.name + "." + weight.role;
  whole.arrangement = Arrangement::Stacked;
  whole.partCount = weight.parts;
  const WeightSource *source = &whole;
  for (const WeightSource &s : weight.sources)
    if (part >= s.firstPart && part < s.firstPart + s.partCount)
      source = &s;

  llvm::StringRef pattern = source->tensor;
  size_t brace =
      source->arrangement == Arrangement::PerExpert ? pattern.find("{e}") : llvm::StringRef::npos;
  slice.tensor =
      brace == llvm::StringRef::npos
          ? pattern.str()
          : (pattern.take_front(brace) + llvm::Twine(expert) + pattern.drop_front(brace + 3)).str();
  int64_t count = source->partCount, within = part - source->firstPart;
  int64_t rows = weight.rows, cols = weight.cols, all = count * rows;
  int64_t rowStep = source->interleaved ? count : 1;
  int64_t firstRow = source->interleaved ? within : within * rows;
  if (source->transposed) {
    slice.shape = {cols, all};
    slice.rowStride = rowStep;
    slice.colStride = all;
    slice.first = firstRow;
  } else {
    slice.shape = {all, cols};
    slice.rowStride = rowStep * cols;
    slice.colStride = 1;
    slice.first = firstRow * cols;
  }
  if (source->arrangement == Arrangement::Stacked &&
      (weight.role != "router" || weight.sources.empty())) {
    slice.shape.insert(slice.shape.begin(), weight.experts);
    slice.first += expert * all * cols;
  }
  return slice;
}

//===----------------------------------------------------------------------===//
// Random weights
//===----------------------------------------------------------------------===//

namespace {
constexpr uint64_t golden = 0x9E3779B97F4A7C15;

inline uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9;
  x ^= x >> 27;
  x *= 0x94D049BB133111EB;
  x ^= x >> 31;
  return x;
}

inline double unit(uint64_t z) { return static_cast<double>(z >> 40) * 0x1p-24; }

uint64_t fnv1a(llvm::StringRef text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (unsigned char c : text)
    hash = (hash ^ c) * 0x100000001b3;
  return hash;
}

class RandomWeights : public WeightReader {
public:
  explicit RandomWeights(uint64_t seed) : seed(seed) {}

  llvm::Expected<WeightRows> read(const LayerSpec &layer, const WeightSpec &weight, int64_t expert,
                                  int64_t part, int64_t row0, int64_t row1) override {
    TensorSlice slice = locate(layer, weight, expert, part);
    uint64_t key = mix(seed + golden * (1 + fnv1a(slice.tensor)));
    double scale = std::sqrt(3.0 / static_cast<double>(weight.cols));
    double middle = llvm::StringRef(weight.role).ends_with("_scale") ? 1.0 : 0.0;
    int64_t cols = weight.cols;
    size_t item = itemBytes(weight.format);
    bytes.resize(static_cast<size_t>(row1 - row0) * cols * item);
    for (int64_t row = row0; row < row1; ++row) {
      double factor = scale;
      if (isVector(weight.role))
        factor = 0.25;
      else if (weight.role == "router")
        factor *= 0.5 + 1.5 * unit(mix(key ^ ((row + 1) * 0xD1B54A32D192ED03)));
      uint64_t z = key + (slice.first + row * slice.rowStride + 1) * golden;
      uint64_t step = slice.colStride * golden;
      char *out = bytes.data() + static_cast<size_t>(row - row0) * cols * item;
      if (weight.format == Format::F32)
        for (int64_t col = 0; col < cols; ++col)
          reinterpret_cast<float *>(out)[col] =
              static_cast<float>(middle + (2 * unit(mix(z + col * step)) - 1) * factor);
      else
        for (int64_t col = 0; col < cols; ++col) {
          float value = static_cast<float>((2 * unit(mix(z + col * step)) - 1) * factor);
          uint32_t bits;
          memcpy(&bits, &value, 4);
          reinterpret_cast<uint16_t *>(out)[col] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        }
    }
    WeightRows rows;
    rows.tensor = slice.tensor;
    rows.source.dtype = dtypeNumber(weight.format);
    rows.source.row_stride = cols;
    rows.source.col_stride = 1;
    rows.source.data = reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(bytes.data()) -
                                                      static_cast<size_t>(row0) * cols * item);
    return rows;
  }

private:
  uint64_t seed;
  std::vector<char> bytes;
};
} // namespace

std::unique_ptr<WeightReader> randomWeights(uint64_t seed) {
  return std::make_unique<RandomWeights>(seed);
}

//===----------------------------------------------------------------------===//
// Weights of a checkpoint
//===----------------------------------------------------------------------===//

namespace {
class CheckpointWeights : public WeightReader {
public:
  explicit CheckpointWeights(const Checkpoint &checkpoint) : checkpoint(checkpoint) {}

  llvm::Expected<WeightRows> read(const LayerSpec &, const WeightSpec &weight, int64_t expert,
                                  int64_t part, int64_t row0, int64_t row1) override {
    auto located = checkpoint.locate(weight, expert, part);
    if (!located)
      return located.takeError();
    MatrixExtent extent = *located;
    WeightRows out;
    out.tensor = extent.tensor;
    if (extent.encoding != Encoding::Plain) {
      if (llvm::Error error = checkpoint.decode(extent, row0, row1, weight.format, bytes, decoded))
        return std::move(error);
      out.source.dtype = dtypeNumber(weight.format);
      out.source.row_stride = extent.cols;
      out.source.col_stride = 1;
      out.source.data = behind(decoded, -row0 * extent.cols * int64_t(itemBytes(weight.format)));
      return out;
    }
    int64_t item = bitsOf(extent.dtype) / 8;
    out.source.dtype = extent.dtype == Dtype::F32    ? MOEC_DT_F32
                       : extent.dtype == Dtype::BF16 ? MOEC_DT_BF16
                                                     : MOEC_DT_F16;
    out.source.row_stride = extent.rowStride;
    out.source.col_stride = extent.colStride;
    uint64_t first = extent.offset + (extent.start + row0 * extent.rowStride) * item;
    if (extent.colStride == 1) {
      // Rows lie one behind another: only these.
      extent.offset = first;
      extent.bytes = ((row1 - row0 - 1) * extent.rowStride + extent.cols) * item;
      if (llvm::Error error = checkpoint.read(extent, bytes))
        return std::move(error);
    } else {
      // Transposed: these rows are a strip of every line, and an expert may be larger than the
      // memory that packing may take.
      int64_t wide = (row1 - row0 - 1) * extent.rowStride + 1;
      bytes.resize(wide * extent.cols * item);
      for (int64_t col = 0; col < extent.cols; ++col)
        if (llvm::Error error = extent.file->file().readAt(
                first + col * extent.colStride * item,
                llvm::MutableArrayRef<char>(bytes.data() + col * wide * item, wide * item)))
          return std::move(error);
      out.source.col_stride = wide;
    }
    out.source.data = behind(bytes, -row0 * extent.rowStride * item);
    return out;
  }

private:
  /// An address before or behind the buffer's own, as moec_pack wants it.
  static const void *behind(const std::vector<char> &buffer, int64_t bytes) {
    return reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(buffer.data()) + bytes);
  }

  const Checkpoint &checkpoint;
  std::vector<char> bytes, decoded;
};
} // namespace

std::unique_ptr<WeightReader> checkpointWeights(const Checkpoint &checkpoint) {
  return std::make_unique<CheckpointWeights>(checkpoint);
}

//===----------------------------------------------------------------------===//
// Packing
//===----------------------------------------------------------------------===//

/// How a weight lies in a packed file.
static int32_t layoutOf(const WeightSpec &weight) {
  return isVector(weight.role) ? MOEC_VECTOR32 : MOEC_PANEL32;
}

/// Bytes of one panel.
static uint64_t panelBytes(const WeightSpec &weight) {
  return moec_pack_expert_bytes(layoutOf(weight), dtypeNumber(weight.format), 1, 1, weight.cols);
}

int64_t rowsPerBlock(const WeightSpec &weight, uint64_t bytes) {
  int64_t lanes = moec_pack_panel_rows(static_cast<int32_t>(weight.parts));
  uint64_t panel = panelBytes(weight);
  int64_t panels = static_cast<int64_t>(std::max<uint64_t>(1, bytes / panel));
  return std::min<int64_t>(panels * lanes, llvm::alignTo(weight.rows, lanes));
}

/// The JSON head of a packed file, padded so that data begins at byte 4096 (or a later multiple).
static std::string packedHead(const LayerSpec &layer, const std::vector<PackedWeight> &weights,
                              uint64_t &dataBegin) {
  auto entry = [](llvm::StringRef dtype, uint64_t items, uint64_t begin, uint64_t end) {
    return ("{\"dtype\":\"" + dtype + "\",\"shape\":[" + llvm::Twine(items) +
            "],\"data_offsets\":[" + llvm::Twine(begin) + "," + llvm::Twine(end) + "]}")
        .str();
  };
  std::string json = "{\"__metadata__\":{\"format\":\"moec\",\"layout\":\"" + packedLayout.str() +
                     "\",\"name\":" + canonicalText(llvm::json::Value(layer.name)) +
                     "},\"moec.id\":" + entry("U8", 4096, 0, 4096);
  uint64_t offset = 4096;
  for (const PackedWeight &w : weights) {
    bool f32 = w.format == "f32";
    json += ",\"" + w.role +
            "\":" + entry(f32 ? "F32" : "BF16", w.bytes / (f32 ? 4 : 2), offset, offset + w.bytes);
    offset += w.bytes;
  }
  json += "}";
  dataBegin = llvm::alignTo(json.size() + 8, 4096);
  json.append(dataBegin - 8 - json.size(), ' ');
  uint64_t length = json.size();
  std::string head(8, '\0');
  for (int i = 0; i < 8; ++i)
    head[i] = static_cast<char>(length >> (8 * i));
  return head + json;
}

uint64_t packedFileBytes(const LayerSpec &layer) {
  std::vector<PackedWeight> weights = packedWeights(layer);
  uint64_t bytes = 0;
  (void)packedHead(layer, weights, bytes);
  bytes += 4096;
  for (const PackedWeight &w : weights)
    bytes += w.bytes;
  return bytes;
}

uint64_t packingBytes(const LayerSpec &layer, uint64_t blockBytes) {
  uint64_t most = 0;
  for (const WeightSpec &weight : layer.weights) {
    uint64_t rows = rowsPerBlock(weight, blockBytes);
    int64_t lanes = moec_pack_panel_rows(static_cast<int32_t>(weight.parts));
    uint64_t block = rows / lanes * panelBytes(weight);
    // Rows as they are stored, of at most 4 bytes an element, and the same decoded.
    most = std::max(most, block + 2 * rows * weight.cols * sizeof(float));
  }
  return most;
}

llvm::Expected<std::vector<PackedTensor>>
packLayer(const LayerSpec &layer, WeightReader &reader, llvm::StringRef folder,
          const std::array<uint8_t, 32> &id, const PackProgress &progress, uint64_t blockBytes) {
  std::string shown = layer.name + ".safetensors";
  auto created = StagedFile::create((folder + "/" + shown).str(), shown);
  if (!created)
    return created.takeError();
  StagedFile &file = **created;
  if (llvm::Error error = file.reserve(packedFileBytes(layer)))
    return std::move(error);

  std::vector<PackedWeight> packed = packedWeights(layer);
  uint64_t dataBegin = 0;
  std::string head = packedHead(layer, packed, dataBegin);
  if (dataBegin != 4096)
    return makeError(ErrorCode::INTERNAL, shown, "a header of at most 4096 bytes",
                     llvm::Twine(dataBegin) + " bytes");
  if (llvm::Error error = file.write(head.data(), head.size()))
    return std::move(error);
  moec_id_block block;
  memset(&block, 0, sizeof(block));
  if (packed.size() > std::size(block.tensors))
    return makeError(ErrorCode::INTERNAL, shown, "at most 16 tensors", llvm::Twine(packed.size()));
  if (llvm::Error error = file.write(&block, sizeof(block)))
    return std::move(error);

  std::vector<PackedTensor> tensors;
  std::vector<char> buffer;
  for (auto [number, weight] : llvm::enumerate(layer.weights)) {
    const PackedWeight &target = packed[number];
    PackedTensor tensor;
    tensor.role = weight.role;
    tensor.format = target.format;
    tensor.offset = file.size();
    tensor.bytes = target.bytes;
    int32_t dtype = dtypeNumber(weight.format);
    int32_t parts = static_cast<int32_t>(weight.parts);
    int64_t lanes = moec_pack_panel_rows(parts);
    uint64_t panel = panelBytes(weight);
    int32_t layout = layoutOf(weight);
    int64_t step = rowsPerBlock(weight, blockBytes);
    if (moec_pack_tensor_bytes(layout, dtype, weight.experts, parts, weight.rows, weight.cols) !=
        target.bytes)
      return makeError(ErrorCode::INTERNAL, shown, "the packer's size of `" + weight.role + "`",
                       llvm::Twine(target.bytes));
    buffer.resize(step / lanes * panel);
    XXH3_state_t hash;
    XXH3_64bits_reset(&hash);
    for (int64_t expert = 0; expert < weight.experts; ++expert)
      for (int64_t row0 = 0; row0 < weight.rows; row0 += step) {
        if (progress.stopped())
          return makeError(ErrorCode::IO, shown, "packing to go on", "a failure of another layer");
        int64_t row1 = std::min(weight.rows, row0 + step);
        uint64_t begin = row0 / lanes * panel;
        uint64_t size = (row1 - row0 + lanes - 1) / lanes * panel;
        // The packer is given where the expert's memory would begin.
        void *expertBase =
            reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(buffer.data()) - begin);
        for (int32_t part = 0; part < parts; ++part) {
          auto rows = reader.read(layer, weight, expert, part, row0, row1);
          if (!rows)
            return rows.takeError();
          int64_t bad = moec_pack(layout, expertBase, dtype, parts, part, weight.rows, weight.cols,
                                  row0, row1, &rows->source);
          if (bad >= 0)
            return makeError(ErrorCode::NONFINITE, layer.name + ": tensor `" + rows->tensor + "`",
                             "finite numbers",
                             "NaN or infinity at row " + llvm::Twine(bad / weight.cols) +
                                 ", column " + llvm::Twine(bad % weight.cols) + " of part " +
                                 llvm::Twine(part) + " of expert " + llvm::Twine(expert),
                             "the checkpoint is damaged, or overflowed in training");
        }
        XXH3_64bits_update(&hash, buffer.data(), size);
        if (llvm::Error error = file.write(buffer.data(), size))
          return std::move(error);
        progress.advance(size);
      }
    uint64_t written = file.size() - tensor.offset;
    if (uint64_t padding = target.bytes - written) {
      std::vector<char> zeros(padding);
      XXH3_64bits_update(&hash, zeros.data(), padding);
      if (llvm::Error error = file.write(zeros.data(), padding))
        return std::move(error);
      progress.advance(padding);
    }
    tensor.hash = XXH3_64bits_digest(&hash);
    tensors.push_back(tensor);
  }

  memcpy(block.magic, "MOECPACK", 8);
  block.schema = 1;
  block.tensor_count = static_cast<uint32_t>(tensors.size());
  memcpy(block.id, id.data(), 32);
  block.file_bytes = file.size();
  memcpy(block.layout, packedLayout.data(), packedLayout.size());
  for (auto [i, tensor] : llvm::enumerate(tensors)) {
    moec_id_tensor &row = block.tensors[i];
    memcpy(row.role, tensor.role.data(),
           std::min<size_t>(tensor.role.size(), sizeof(row.role) - 1));
    const char *dtype = tensor.format == "f32" ? "F32" : "BF16";
    memcpy(row.dtype, dtype, strlen(dtype));
    row.offset = tensor.offset;
    row.bytes = tensor.bytes;
    row.xxh3 = tensor.hash;
  }
  if (llvm::Error error = file.writeAt(&block, sizeof(block), dataBegin))
    return std::move(error);
  if (llvm::Error error = file.close())
    return std::move(error);
  return tensors;
}

//===----------------------------------------------------------------------===//
// Reading packed files back
//===----------------------------------------------------------------------===//

static std::string boundedText(const char *text, size_t most) {
  return std::string(text, strnlen(text, most));
}

llvm::Expected<PackedFile> readPackedHeader(llvm::StringRef path) {
  auto opened = InputFile::open(path);
  if (!opened)
    return opened.takeError();
  InputFile &in = **opened;
  auto broken = [&](const llvm::Twine &expected, const llvm::Twine &got) {
    return makeError(ErrorCode::FILE_FORMAT, path, expected, got, "pack the weights again");
  };
  if (in.size() < 8192)
    return broken("a packed weight file of at least 8192 bytes", llvm::Twine(in.size()) + " bytes");
  moec_id_block block;
  if (llvm::Error error = in.readAt(
          4096, llvm::MutableArrayRef<char>(reinterpret_cast<char *>(&block), sizeof(block))))
    return std::move(error);
  if (memcmp(block.magic, "MOECPACK", 8))
    return broken("weights packed by moec", "another file");
  if (block.schema > 1)
    return makeError(ErrorCode::ABI, path, "schema 1", "schema " + llvm::Twine(block.schema),
                     "a newer moec packed it");
  if (block.tensor_count > std::size(block.tensors))
    return broken("at most 16 tensors", llvm::Twine(block.tensor_count));
  if (block.file_bytes != in.size())
    return broken(llvm::Twine(block.file_bytes) + " bytes", llvm::Twine(in.size()) + " bytes");
  PackedFile file;
  memcpy(file.id.data(), block.id, 32);
  file.layout = boundedText(block.layout, sizeof(block.layout));
  file.bytes = in.size();
  for (uint32_t i = 0; i < block.tensor_count; ++i) {
    const moec_id_tensor &row = block.tensors[i];
    PackedTensor tensor{boundedText(row.role, sizeof(row.role)),
                        boundedText(row.dtype, sizeof(row.dtype)), row.offset, row.bytes, row.xxh3};
    if (tensor.offset % 4096 || tensor.bytes % 4096 || tensor.offset < 8192 ||
        tensor.offset > in.size() || tensor.bytes > in.size() - tensor.offset)
      return broken("tensor `" + tensor.role + "` on whole pages within the file",
                    "bytes " + llvm::Twine(tensor.offset) + " + " + llvm::Twine(tensor.bytes));
    file.tensors.push_back(std::move(tensor));
  }
  return file;
}

llvm::Error checkPackedBytes(llvm::StringRef path, const PackedFile &file,
                             const PackProgress &progress) {
  auto opened = InputFile::open(path);
  if (!opened)
    return opened.takeError();
  std::vector<char> buffer(4u << 20);
  for (const PackedTensor &tensor : file.tensors) {
    XXH3_state_t hash;
    XXH3_64bits_reset(&hash);
    for (uint64_t done = 0; done < tensor.bytes;) {
      size_t size = std::min<uint64_t>(buffer.size(), tensor.bytes - done);
      if (llvm::Error error = (*opened)->readAt(tensor.offset + done,
                                                llvm::MutableArrayRef<char>(buffer.data(), size)))
        return error;
      XXH3_64bits_update(&hash, buffer.data(), size);
      done += size;
      progress.advance(size);
    }
    uint64_t found = XXH3_64bits_digest(&hash);
    if (found != tensor.hash)
      return makeError(ErrorCode::HASH, path.str() + ": tensor `" + tensor.role + "`",
                       "XXH3 " + llvm::utohexstr(tensor.hash, true, 16),
                       llvm::utohexstr(found, true, 16),
                       "the file was damaged or changed; pack the weights again");
  }
  return llvm::Error::success();
}

} // namespace moec
