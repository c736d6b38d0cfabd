//===- WeightReaders.cpp - where packed weights come from -----------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Weights.h"
#include "moe/Spec/Safetensors.h"

#include <cmath>
#include <cstring>

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

} // namespace moec
