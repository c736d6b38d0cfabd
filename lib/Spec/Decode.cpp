//===- Decode.cpp - fp8 and mxfp4 weights ---------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Safetensors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace moec {

namespace {

/// The 256 values of e4m3: no infinities, NaN where all bits below the sign are set.
std::array<float, 256> makeE4M3() {
  std::array<float, 256> out;
  for (int code = 0; code < 256; ++code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float value =
        exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    if ((code & 127) == 127)
      value = std::numeric_limits<float>::quiet_NaN();
    out[code] = code & 128 ? -value : value;
  }
  return out;
}

constexpr float e2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                            -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/// 2^(code - 127); 255 is NaN.
float e8m0(uint8_t code) {
  return code == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, code - 127);
}

/// A value as it is packed. Every NaN is the same one: which of two factors a product's sign and
/// payload come from is the compiler's choice.
template <typename Out> Out rounded(float value);
template <> float rounded(float value) {
  return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value;
}
template <> uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value))
    return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/// One row of e4m3, a scale for each 128 columns.
template <typename Out>
void decodeFP8(const uint8_t *from, const float *scale, int64_t cols, char *out) {
  static const std::array<float, 256> e4m3 = makeE4M3();
  auto *to = reinterpret_cast<Out *>(out);
  for (int64_t begin = 0; begin < cols; begin += 128) {
    float s = scale[begin / 128];
    for (int64_t c = begin, end = std::min(begin + 128, cols); c < end; ++c)
      to[c] = rounded<Out>(e4m3[from[c]] * s);
  }
}

/// One row of e2m1, a scale for each 32 columns: what a nibble is worth is the same for all 32.
template <typename Out>
void decodeMXFP4(const uint8_t *from, const float *scale, int64_t cols, char *out) {
  auto *to = reinterpret_cast<Out *>(out);
  for (int64_t group = 0; group < cols / 32; ++group) {
    Out worth[16];
    for (int code = 0; code < 16; ++code)
      worth[code] = rounded<Out>(e2m1[code] * scale[group]);
    for (int i = 0; i < 16; ++i) {
      uint8_t two = from[16 * group + i];
      to[32 * group + 2 * i] = worth[two & 15];
      to[32 * group + 2 * i + 1] = worth[two >> 4];
    }
  }
}

} // namespace

llvm::Error Checkpoint::decode(const MatrixExtent &extent, int64_t row0, int64_t row1,
                               Format format, std::vector<char> &buffer,
                               std::vector<char> &out) const {
  bool fp8 = extent.encoding == Encoding::FP8;
  int64_t cols = extent.cols, rowBytes = fp8 ? cols : cols / 2;
  int64_t first = extent.firstRow + row0 * extent.rowStep;
  int64_t last = extent.firstRow + (row1 - 1) * extent.rowStep;
  auto read = [&](const SafetensorsFile *file, uint64_t offset, std::vector<char> &bytes) {
    return file->file().readAt(offset, bytes);
  };
  buffer.resize((last - first + 1) * rowBytes);
  if (llvm::Error error = read(extent.file, extent.offset + first * rowBytes, buffer))
    return error;
  // Scales of the rows read; an fp8 block is 128 rows high.
  int64_t high = fp8 ? 128 : 1;
  int64_t firstBlock = first / high;
  size_t item = bitsOf(extent.scalesDtype) / 8;
  std::vector<char> bytes((last / high - firstBlock + 1) * extent.scalesCols * item);
  if (llvm::Error error = read(extent.scalesFile,
                               extent.scalesOffset + firstBlock * extent.scalesCols * item, bytes))
    return error;
  std::vector<float> scales(bytes.size() / item);
  if (fp8)
    toFloat(extent.scalesDtype, bytes.data(), scales.size(), scales.data());
  else
    for (size_t i = 0; i < scales.size(); ++i)
      scales[i] = e8m0(static_cast<uint8_t>(bytes[i]));

  size_t outItem = format == Format::F32 ? 4 : 2;
  out.resize((row1 - row0) * cols * outItem);
  auto *decodeRow = fp8 ? format == Format::F32 ? decodeFP8<float> : decodeFP8<uint16_t>
                    : format == Format::F32 ? decodeMXFP4<float>
                                            : decodeMXFP4<uint16_t>;
  char *to = out.data();
  for (int64_t stored = first; stored <= last; stored += extent.rowStep, to += cols * outItem)
    decodeRow(reinterpret_cast<const uint8_t *>(buffer.data() + (stored - first) * rowBytes),
              scales.data() + (stored / high - firstBlock) * extent.scalesCols, cols, to);
  return llvm::Error::success();
}

} // namespace moec
