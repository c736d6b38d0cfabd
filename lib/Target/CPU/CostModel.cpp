//===- CostModel.cpp - what a schedule takes on a core --------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Target/CPU/CostModel.h"

#include <cmath>

using namespace mlir;
using namespace mlir::moe;

/// Times that overlap in part: between the largest of them (p = infinity) and their sum (p = 1).
/// The exponent is that of layers measured on a machine with AMX, within 6 % for 64 to 256 rows.
static double overlapped(std::initializer_list<double> times) {
  constexpr double p = 1.7;
  double sum = 0;
  for (double time : times)
    sum += std::pow(time, p);
  return std::pow(sum, 1 / p);
}

/// Ratios that hold for the processors of all levels, near enough for a choice.
static constexpr double kBroadcast = 0.5; ///< loads that one element in all lanes takes
static constexpr double kWiden = 1.5;     ///< loads that a vector of bf16 as f32 takes
static constexpr double kL2 = 4; ///< vectors of multiply-adds in the time of 128 bytes of L2
static constexpr double kL3 = 3; ///< bytes of L3 in the time of one of memory
static constexpr double kLatency = 50e-9; ///< seconds that a core waits for a line in the end

CoreConstants CoreConstants::of(StringRef level, const CoreConstants &machine) {
  // x86-64-v3: 32 products a cycle at 3.6 GHz. The others: a Zen 4 (whose 512 bits are two halves);
  // amx-bf16: a Granite Rapids.
  CoreConstants out{115e9, 115e9, 230e9, 2900e9, 18e9, 32 << 10, 1 << 20};
  if (level == "amx-bf16") {
    out.fma512 = 235e9;
    out.dot = 120e9;
    out.l1Bytes = 48 << 10;
    out.l2Bytes = 2 << 20;
  }
  auto take = [](auto &value, auto given) {
    if (given > 0)
      value = given;
  };
  take(out.fma256, machine.fma256);
  take(out.fma512, machine.fma512);
  take(out.dot, machine.dot);
  take(out.tile, machine.tile);
  take(out.read, machine.read);
  take(out.l1Bytes, machine.l1Bytes);
  take(out.l2Bytes, machine.l2Bytes);
  return out;
}

double CoreConstants::peak(KernelProduct product, int64_t lanes) const {
  switch (product) {
  case KernelProduct::Fma:
    return lanes == 8 ? fma256 : fma512;
  case KernelProduct::FmaF64:
    return (lanes == 8 ? fma256 : fma512) / 2;
  case KernelProduct::DotBF16:
    return dot;
  case KernelProduct::TileBF16:
    return tile;
  }
  llvm_unreachable("all products are handled");
}

CostModel::CostModel(StringRef level, KernelProduct product, WeightType weight,
                     const CoreConstants &core)
    : level(level), product(product), weight(weight), constants(CoreConstants::of(level, core)),
      weightBytes(static_cast<double>(weight.panelCount() * weight.panelBytes())) {}

/// One block by one tile of panels.
double CostModel::block(int64_t rows, int64_t panels) const {
  int64_t lanes = UkernelAttr::getRegisterFile(level).second;
  double flops = 2.0 * weight.getCols() * 32 * panels;
  double peak = constants.peak(product, lanes);
  if (product == KernelProduct::TileBF16) {
    // A step of 32 k: a product of tiles takes as long as two loads of tiles from the first cache;
    // the last tile of rows is computed whole.
    int64_t tiles = (rows + 15) / 16;
    double products = flops * 16 * tiles / peak;
    return overlapped({products, products * (tiles + 2 * panels) / (2 * 2 * tiles * panels)});
  }
  int64_t vectors = UkernelAttr::getVectorsPerRow(level, panels, product);
  double products = flops * rows / peak, one = products / (rows * vectors);
  auto format = dyn_cast<FormatAttr>(weight.getFormat());
  bool widened = product == KernelProduct::Fma && format && format.getValue() == PlainFormat::BF16;
  double loads = one * (vectors * (widened ? kWiden : 1) + rows * kBroadcast);
  double fromL2 = one * kL2 * panels * (widened ? 0.5 : 1);
  return overlapped({products, loads, fromL2});
}

double CostModel::compute(int64_t rows, int64_t panels) const {
  // Blocks are of nearly equal size, but for tiles.
  int64_t blocks = (kRows + rows - 1) / rows;
  double tasks = std::ceil(double(weight.panelCount()) / double(panels));
  double time = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    int64_t size = kRows * (i + 1) / blocks - kRows * i / blocks;
    time += block(product == KernelProduct::TileBF16 ? rows : size, panels);
  }
  return time * tasks;
}

double CostModel::total(int64_t rows, int64_t panels, int64_t chunkRows, int64_t kChunk,
                        int64_t panelsPerTask) const {
  double chunks = std::max(1.0, double(kRows) / double(chunkRows));
  double rowBytes = double(groups()) * 64, fits = double(constants.l2Bytes);
  double bytes = chunks * weightBytes / constants.read; // of weights, from memory, for every chunk
  // What is used again and is not in L2 comes from L3. In panels, and in them blocks, that is the
  // rows, for every panel; in blocks, and in them panels, the rows once for every task, and the
  // weights of the task for every block.
  bool blocksInside = kChunk || product == KernelProduct::TileBF16;
  double held = double(kChunk ? kChunk * 64 : rowBytes) * double(chunkRows);
  double passes = std::ceil(double(weight.panelCount()) / double(panelsPerTask));
  if (blocksInside && held > fits)
    passes *= double(panelsPerTask);
  double again = rowBytes * double(chunkRows) > fits ? passes * double(kRows) * rowBytes : 0;
  if (!blocksInside && double(panelsPerTask * weight.panelBytes()) > fits)
    again += double(kRows) / double(rows) * weightBytes;
  again /= kL3 * constants.read;
  // Sums that wait between chunks of k are stored and loaded.
  double parts = kChunk ? std::ceil(double(groups()) / double(kChunk)) : 1;
  double sums = (parts - 1) * 2 * double(kRows * weight.panelCount()) * 128 / (8 * constants.read);
  return overlapped({compute(rows, panels) + sums, bytes + again});
}

double CostModel::balance() const {
  int64_t lanes = UkernelAttr::getRegisterFile(level).second;
  double flops = 2.0 * weight.getCols() * 32 * double(weight.panelCount());
  return (weightBytes / constants.read) / (flops / constants.peak(product, lanes));
}

int64_t CostModel::prefetch() const {
  return std::max<int64_t>(256, std::llround(constants.read * kLatency / 256) * 256);
}
