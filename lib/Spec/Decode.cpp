//===- Decode.cpp - fp8 and mxfp4 weights ---------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Safetensors.h"

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

uint16_t roundToBF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>(bits >> 16 | 0x40); // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

void store(float value, Format format, char *out) {
  if (format == Format::F32) {
    std::memcpy(out, &value, sizeof value);
  } else {
    uint16_t half = roundToBF16(value);
    std::memcpy(out, &half, sizeof half);
  }
}

} // namespace

llvm::Error Checkpoint::decode(const MatrixExtent &extent, int64_t row0, int64_t row1,
                               Format format, std::vector<char> &buffer,
                               std::vector<char> &out) const {
  static const std::array<float, 256> e4m3 = makeE4M3();
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
  int64_t high = fp8 ? 128 : 1, wide = fp8 ? 128 : 32;
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
  char *to = out.data();
  for (int64_t stored = first; stored <= last; stored += extent.rowStep) {
    const auto *from =
        reinterpret_cast<const uint8_t *>(buffer.data() + (stored - first) * rowBytes);
    const float *scale = scales.data() + (stored / high - firstBlock) * extent.scalesCols;
    for (int64_t c = 0; c < cols; ++c, to += outItem)
      store((fp8 ? e4m3[from[c]] : e2m1[from[c / 2] >> 4 * (c & 1) & 15]) * scale[c / wide], format,
            to);
  }
  return llvm::Error::success();
}

} // namespace moec
