//===- MoEGPUAttrs.td - decisions for GPUs -----------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEGPUATTRS_TD
#define MOE_DIALECT_MOE_IR_MOEGPUATTRS_TD

include "moe/Dialect/MoE/IR/MoEAttrs.td"

def MoE_GPURaster : MoE_I32Enum<"GPURaster", "which tiles of one expert run next to each other", [
  I32EnumAttrCase<"Rows", 0, "rows">,
  I32EnumAttrCase<"Columns", 1, "columns">,
]>;

def MoE_GPUUnit : MoE_I32Enum<"GPUUnit", "the instruction that multiplies", [
  I32EnumAttrCase<"Mma", 0, "mma">,
  I32EnumAttrCase<"Wgmma", 1, "wgmma">,
]>;

def MoE_GPUTileAttr : MoE_Attr<"GPUTile", "gpu_tile"> {
  let summary = "how thread blocks cover a grouped matmul on a GPU";
  let description = [{
    A thread block computes `cols` packed weight columns (whole panels of 32) for `rows` rows of one
    expert. The weight is the left operand of the tensor core instruction (16 columns), the rows are
    the right one (8 rows), so that a tile of 8 rows wastes nothing. `k` is the depth of one stage
    of the ring in shared memory, `stages` its length; `warps_cols` × `warps_rows` warps share the
    tile. `raster` is the order of the tiles of one expert. `up_to` is the largest number of sorted
    rows (T·K) that this tile is used for; 0 is no limit. All tiles of one matmul add the terms of
    a product in the same order: the choice among them changes no bit.

    Constraints: (C1) cols is a multiple of 32 · warps_cols; (C2) rows is 8 or a multiple of 16 for
    each row of warps; (C3) k is 32 or 64; (C4) 2 ≤ stages ≤ 8; (C5) at most 8 warps; (C6) the
    ring and the result tile fit 160 KiB of shared memory; (C7) accumulators and operands fit 255
    registers a thread and 65536 a block; (C8) up_to is not negative.

    With `unit = wgmma` (sm_90a) two warpgroups multiply 64 columns each and a third fills the ring;
    blocks are persistent. Then (C9) cols is 128, k is 64 and warps are 8 × 1; rows is a multiple of
    8 up to 256; the ring, the result and the barriers fit 227 KiB. All tiles of one matmul have the
    same unit (checked where kernels are emitted): units round sums differently.

    Example:

    ```mlir
    #moe.gpu_tile<cols = 128, rows = 64, k = 32, stages = 4, warps_cols = 4, warps_rows = 1>
    ```
  }];
  let parameters = (ins
    "int64_t":$cols, "int64_t":$rows, "int64_t":$k, "int64_t":$stages,
    "int64_t":$warps_cols, "int64_t":$warps_rows,
    DefaultValuedParameter<"GPURaster", "GPURaster::Rows">:$raster,
    DefaultValuedParameter<"int64_t", "0">:$up_to,
    DefaultValuedParameter<"GPUUnit", "GPUUnit::Mma">:$unit);
  let builders = [AttrBuilder<(ins "int64_t":$cols, "int64_t":$rows, "int64_t":$k,
      "int64_t":$stages, "int64_t":$warpsCols, "int64_t":$warpsRows, "GPURaster":$raster,
      "int64_t":$upTo), [{
    return $_get($_ctxt, cols, rows, k, stages, warpsCols, warpsRows, raster, upTo, GPUUnit::Mma);
  }]>];
  let assemblyFormat = "`<` struct(params) `>`";
  let genVerifyDecl = 1;
  let extraClassDeclaration = [{
    bool isWgmma() const { return getUnit() == GPUUnit::Wgmma; }
    int64_t getThreads() const {
      return 32 * (getWarpsCols() * getWarpsRows() + (isWgmma() ? 4 : 0));
    }
    /// Tensor core tiles of one warp: 16 columns by 8 rows each.
    int64_t getColTiles() const { return getCols() / (16 * getWarpsCols()); }
    int64_t getRowTiles() const { return getRows() / (8 * getWarpsRows()); }
    /// Bytes of shared memory of one stage of the ring, weight and rows.
    int64_t getWeightBytes() const { return getCols() * getK() * 2; }
    int64_t getRowBytes() const { return getRows() * getK() * 2; }
    /// Bytes between the rows of the result tile: padded, so that banks differ.
    int64_t getResultPitch(int64_t parts) const {
      return (getCols() / (isWgmma() ? 2 : 1) / parts + 8) * 2;
    }
    /// Of wgmma: where two pieces of the result and the barriers of the ring are in shared memory.
    int64_t getResultOffset() const { return getStages() * (getWeightBytes() + getRowBytes()); }
    int64_t getBarrierOffset() const;
    /// Of wgmma: registers at the start, and whether they then go from those that fill the ring to
    /// those that multiply.
    static constexpr int64_t kStartRegisters = 168, kFillRegisters = 72, kMultiplyRegisters = 216;
    bool movesRegisters() const { return isWgmma() && getRows() > 128; }
    /// Dynamic shared memory of a block.
    int64_t getSharedBytes() const;
    /// Registers that a thread needs at least: accumulators, operands, addresses.
    int64_t getRegisters() const;
  }];
}

#endif // MOE_DIALECT_MOE_IR_MOEGPUATTRS_TD
