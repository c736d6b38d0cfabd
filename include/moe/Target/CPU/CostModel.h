//===- CostModel.h - what a schedule takes on a core ------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The formulas by which moe-select-strategy chooses (docs/kernels.md, "Selection"). They know a
// core by seven numbers: those of `moec doctor --save`, or the level's defaults.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_COSTMODEL_H
#define MOE_TARGET_CPU_COSTMODEL_H

#include "moe/Dialect/MoE/IR/MoEOps.h"

namespace mlir::moe {

/// One core. What is 0 in the description of a machine is what the level assumes.
struct CoreConstants {
  double fma256 = 0, fma512 = 0, dot = 0, tile = 0; ///< FLOP/s by instruction
  double read = 0;                                  ///< bytes/s from memory
  int64_t l1Bytes = 0, l2Bytes = 0;

  /// The constants of a level where `machine` does not say.
  static CoreConstants of(StringRef level, const CoreConstants &machine);
  /// FLOP/s of a product's instruction on registers of `lanes` f32.
  double peak(KernelProduct product, int64_t lanes) const;
};

/// What one matmul takes, by its shape and the numbers of a core.
class CostModel {
public:
  CostModel(StringRef level, KernelProduct product, WeightType weight, const CoreConstants &core);

  /// Rows of an expert that the choices are made for: many, because few have kernels of their own.
  static constexpr int64_t kRows = 256;

  /// Seconds for `kRows` rows by blocks of at most `rows` and tiles of `panels`, with the weights
  /// in L2: instructions of the product, loads, and the weights once for each block.
  double compute(int64_t rows, int64_t panels) const;
  /// Seconds of the whole: that, and what comes from memory and L3. `kChunk` groups of k at a time
  /// (0: all).
  double total(int64_t rows, int64_t panels, int64_t chunkRows, int64_t kChunk,
               int64_t panelsPerTask) const;
  /// Rows of an expert at which products take as long as reading its weights does.
  double balance() const;
  /// Bytes to read ahead so that memory is kept busy.
  int64_t prefetch() const;
  /// Bytes of an element of a packed row, and k of 64 bytes of it.
  int64_t elementBytes() const { return UkernelAttr::readsPairs(product) ? 2 : 4; }
  int64_t groupColumns() const { return 64 / elementBytes(); }
  int64_t groups() const { return (weight.getCols() + groupColumns() - 1) / groupColumns(); }
  const CoreConstants &core() const { return constants; }

private:
  double block(int64_t rows, int64_t panels) const;

  StringRef level;
  KernelProduct product;
  WeightType weight;
  CoreConstants constants;
  double weightBytes;
};

} // namespace mlir::moe

#endif // MOE_TARGET_CPU_COSTMODEL_H
