//===- MoEGPUAttrs.cpp - decisions for GPUs -------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEAttrs.h"

using namespace mlir;
using namespace mlir::moe;

static int64_t sharedBytes(int64_t cols, int64_t rows, int64_t k, int64_t stages) {
  int64_t ring = stages * (cols + rows) * k * 2;
  // The result tile takes the place of the ring; one part is the larger case.
  int64_t result = rows * (cols + 8) * 2;
  return std::max(ring, result);
}

static int64_t registers(int64_t colTiles, int64_t rowTiles) {
  return colTiles * rowTiles * 4 + colTiles * 4 + rowTiles * 2 + 40;
}

/// Of wgmma: where the barriers of the ring are, behind it and 64 rows of both halves of a result.
static int64_t barrierOffset(int64_t cols, int64_t rows, int64_t k, int64_t stages) {
  return stages * (cols + rows) * k * 2 + 2 * 64 * (cols / 2 + 8) * 2;
}

int64_t GPUTileAttr::getBarrierOffset() const {
  return barrierOffset(getCols(), getRows(), getK(), getStages());
}

int64_t GPUTileAttr::getSharedBytes() const {
  if (isWgmma())
    return getBarrierOffset() + getStages() * 16;
  return sharedBytes(getCols(), getRows(), getK(), getStages());
}

int64_t GPUTileAttr::getRegisters() const { return registers(getColTiles(), getRowTiles()); }

LogicalResult GPUTileAttr::verify(function_ref<InFlightDiagnostic()> emitError, int64_t cols,
                                  int64_t rows, int64_t k, int64_t stages, int64_t warpsCols,
                                  int64_t warpsRows, GPURaster, int64_t upTo, GPUUnit unit) {
  if (upTo < 0)
    return emitError() << "expected up_to not to be negative, but got " << upTo << " (C8)";
  if (stages < 2 || stages > 8)
    return emitError() << "expected 2 to 8 stages, but got " << stages << " (C4)";
  if (unit == GPUUnit::Wgmma) {
    if (cols != 128 || k != 64 || warpsCols != 8 || warpsRows != 1)
      return emitError() << "expected cols = 128, k = 64, warps_cols = 8 and warps_rows = 1 with "
                            "wgmma, but got "
                         << cols << ", " << k << ", " << warpsCols << " and " << warpsRows
                         << " (C9)";
    if (rows < 8 || rows > 256 || rows % 8)
      return emitError() << "expected rows to be a multiple of 8 up to 256 with wgmma, but got "
                         << rows << " (C9)";
    if (int64_t bytes = barrierOffset(cols, rows, k, stages) + stages * 16; bytes > 227 * 1024)
      return emitError() << "expected at most 232448 bytes of shared memory, but got " << bytes
                         << " (C9)";
    return success();
  }
  if (warpsCols < 1 || warpsRows < 1 || warpsCols * warpsRows > 8)
    return emitError() << "expected 1 to 8 warps, but got " << warpsCols << " x " << warpsRows
                       << " (C5)";
  if (cols < 32 || cols % (32 * warpsCols))
    return emitError() << "expected cols to be a multiple of " << 32 * warpsCols << ", but got "
                       << cols << " (C1)";
  if (rows < 8 || rows % (8 * warpsRows) || (rows / warpsRows != 8 && rows % (16 * warpsRows) != 0))
    return emitError() << "expected rows to be " << 8 * warpsRows << " or a multiple of "
                       << 16 * warpsRows << ", but got " << rows << " (C2)";
  if (k != 32 && k != 64)
    return emitError() << "expected k to be 32 or 64, but got " << k << " (C3)";
  if (int64_t bytes = sharedBytes(cols, rows, k, stages); bytes > 160 * 1024)
    return emitError() << "expected at most 163840 bytes of shared memory, but got " << bytes
                       << " (C6)";
  int64_t colTiles = cols / (16 * warpsCols), rowTiles = rows / (8 * warpsRows);
  int64_t threads = 32 * warpsCols * warpsRows, needed = registers(colTiles, rowTiles);
  if (needed > 255 || needed * threads > 65536)
    return emitError() << "expected at most " << std::min<int64_t>(255, 65536 / threads)
                       << " registers a thread, but got at least " << needed << " (C7)";
  return success();
}
