//===- TileSearch.h - which tile of a grouped matmul is it ------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Experts have ceil(rows / tile rows) · column blocks tiles each, numbered expert by expert. How
// many there are is known on the device alone, from the offsets of the experts' rows.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_KERNELS_TILESEARCH_H
#define MOE_LIB_TARGET_GPU_KERNELS_TILESEARCH_H

#include "GPUBuilder.h"

namespace mlir::moe {

/// Emits the search. Every lane of the warp takes part in it.
class TileSearch {
public:
  TileSearch(GPUBuilder &g, const GemmKernel &spec, Value offsets, Value lane)
      : g(g), spec(spec), offsets(offsets), lane(lane) {}

  /// Where a tile was found. `next` and `nextBefore` are where a search for a later tile begins:
  /// the first of the 32 experts among which this one is, and the number of tiles before it.
  struct Found {
    Value next, nextBefore;
    Value found;                    ///< i1: is there such a tile?
    Value expert, before, rowTiles; ///< its expert, the tiles before that, its tiles of rows
  };
  /// The tile `number`, looked for from expert `first` on, which has `before` tiles before it.
  Found find(Value number, Value first, Value before);

  /// What a tile that was found works on.
  struct Place {
    Value colBlock, firstRow, rowCount;
  };
  Place place(Value number, Value expert, Value before, Value rowTiles);

private:
  GPUBuilder &g;
  const GemmKernel &spec;
  Value offsets, lane;
};

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_KERNELS_TILESEARCH_H
