//===- Kernels.h - kernels of a layer ---------------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Each function fills an empty kernel: an llvm.func of a gpu.module whose arguments are listed in
// its comment, in order. Pointers are in global memory. Every buffer of the workspace is 256-byte
// aligned; x, y and the arrays of routing are aligned to their elements.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_KERNELS_KERNELS_H
#define MOE_LIB_TARGET_GPU_KERNELS_KERNELS_H

#include "moe/Dialect/MoE/IR/MoEOps.h"

#include "mlir/Dialect/GPU/IR/GPUDialect.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"

namespace mlir::moe {

/// Dynamic shared memory of every kernel of a gpu.module.
inline constexpr llvm::StringLiteral kSharedName = "shared";

/// An empty kernel of blocks of `threads`, without its entry block.
LLVM::LLVMFuncOp createKernel(OpBuilder &b, Location loc, StringRef name, ArrayRef<Type> types,
                              int64_t threads, int64_t sharedBytes);
/// Declares `kSharedName` in a gpu.module.
void declareShared(gpu::GPUModuleOp kernels);

/// Length of one partial sum of the `logits` kernel.
inline constexpr int64_t kLogitsSlice = 256;
/// Tokens that a block works on: few, and many on tensor cores.
inline constexpr int64_t kFewTokens = 8, kManyTokens = 32;
/// So many blocks of many tokens are enough for a GPU.
inline constexpr int64_t kWholeBlocks = 128;
/// Warps, and so tokens, of a block of the `select` kernel.
inline constexpr int64_t kSelectWarps = 4;
inline constexpr int64_t kSortThreads = 256, kCombineThreads = 128, kWeighThreads = 128;
/// Warps, and so tokens, of a block of the `norm` kernel.
inline constexpr int64_t kNormWarps = 4;
/// Warps of a block of the `gate` kernel, and tokens of a warp.
inline constexpr int64_t kGateWarps = 4, kGateTokens = 4;

/// stage(x, x_stride i64, tokens i32[, rows][, sums][, offsets, count i32]
///       [, router weight, partial sums[, factors, input scale]]): rows [T, width] are x rounded to
/// bf16 and padded with zeros. sums [T, width] are set to zero, offsets to [0, count]. With a
/// router weight the partial sums of the logits, f32 [slices, T, 32 · panels]: slice s is the sum
/// over 256 of the reduction, in order; with factors [T] of x · factor · scale · H^-½. Block (i, s)
/// has the i-th tokens and slice s; with `whole` all of them, and writes their sum as slice 0.
/// Products of bf16 weights are those of mma.sync, 16 steps of the reduction each, from zero in
/// every slice.
struct StageKernel {
  Type x;                 ///< element type of x
  int64_t H, width;       ///< columns of x, of the rows
  WeightType router;      ///< null: no logits
  bool rows = true;       ///< whether rows are written
  bool sums = false;      ///< whether sums are cleared
  bool group = false;     ///< whether offsets are written
  bool normalize = false; ///< of the router: with factors
  bool rounds = false;    ///< each of those products is rounded to bf16
  int64_t blockTokens = kFewTokens;
  bool whole = false;
  static constexpr int64_t kThreads = 256, kWarps = 8;
  /// Up to here the sums of all experts stay in registers.
  static constexpr int64_t kWholePanels = 2 * kWarps;
  bool onTensorCores() const {
    return router && !normalize && !router.getFormat().getStorageType().isF32();
  }
  int64_t slices() const { return llvm::divideCeil(width, kLogitsSlice); }
  int64_t sharedBytes() const {
    return router ? blockTokens * kLogitsSlice * (onTensorCores() ? 2 : 4) : 0;
  }
};
void emitStage(OpBuilder &b, LLVM::LLVMFuncOp kernel, const StageKernel &spec);

/// norm(x, x_stride i64, tokens i32, factors): factors[t] = 1 / √(mean of x² + epsilon), x rounded
/// to bf16. A warp has a token; a lane sums every 32nd square, and the lanes' sums meet in a tree.
struct NormKernel {
  Type x;
  int64_t H;
  double epsilon;
};
void emitNorm(OpBuilder &b, LLVM::LLVMFuncOp kernel, const NormKernel &spec);

/// select(partial sums, tokens i32, slices i32, weights, experts[, logits, logits_stride i64]
/// [, bias][, selection bias][, expert scale]): what `moe.router` computes after the matmul.
/// Vectors are f32 [E].
struct SelectKernel {
  RouterAttr router;
  int64_t E, panels, slices;
  bool logits, bias, selectionBias, expertScale;
};
void emitSelect(OpBuilder &b, LLVM::LLVMFuncOp kernel, const SelectKernel &spec);

/// route(what logits takes, ticket, what select takes from weights on[, offsets, pair, order]):
/// logits, select and sort of at most kFewTokens tokens. Blocks (0, s); the one that takes the last
/// ticket selects, a token per warp, and sorts.
struct RouteKernel {
  StageKernel stage;
  SelectKernel select;
  bool sort;
  static constexpr int64_t kThreads = StageKernel::kThreads, kMostIds = 1024;
  static bool fits(int64_t K) { return kFewTokens * K <= kMostIds; }
  /// Rows of a slice, then the ticket, then the ids.
  int64_t sharedBytes() const {
    return std::max(stage.sharedBytes(), kFewTokens * select.router.getTopK() * 4);
  }
};
void emitRoute(OpBuilder &b, LLVM::LLVMFuncOp kernel, const RouteKernel &spec);

/// weigh(rows, weights, pair, slots i32, offsets, result): row n of the result is
/// rows[pair[n] / slots] times weights[pair[n]], rounded. Block n has row n.
struct WeighKernel {
  int64_t E, width;
};
void emitWeigh(OpBuilder &b, LLVM::LLVMFuncOp kernel, const WeighKernel &spec);

/// gate(rows, tokens i32, weight, result): result[t] = the region of Σ rows[t, i] · weight[i], f32.
/// A lane sums every 32nd pair of the reduction, upwards, and the lanes' sums meet in a tree.
struct GateKernel {
  WeightType weight; ///< one column
  int64_t width;     ///< columns of the rows
  Region *epilogue;  ///< null: none
};
LogicalResult emitGate(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GateKernel &spec);

/// sort(ids, count i32, slots i32, offsets, pair, order): block e writes the rows of expert e:
/// offsets[e], pair[n] = position in ids of sorted row n; order[t · slots + i] = the i-th sorted
/// row of token t.
void emitSort(OpBuilder &b, LLVM::LLVMFuncOp kernel, int64_t E);

/// gemm(rows, pair, slots i32, offsets, weight, result[, bias][, weights, scale f32]): one tile.
/// `pair` is read with `gather` and with `add`.
struct GemmKernel {
  GPUTileAttr tile;
  WeightType weight;
  int64_t rowWidth;          ///< columns of the rows in memory, a multiple of 32
  int64_t resultWidth;       ///< columns of the result in memory, a multiple of 32
  bool gather;               ///< row n is rows[pair[n] / slots]
  Region *epilogue;          ///< null: none
  bool bias;                 ///< panels of 32 f32, as those of the weight
  bool add = false;          ///< the atomic combine: the result are sums f32 [T, resultWidth], to
                             ///< which w · row is added in whatever order blocks come
  bool unweighted = false;   ///< of the atomic combine: w is scale alone
  int64_t colBlocks() const; ///< tiles side by side
};
LogicalResult emitGemm(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GemmKernel &spec);

/// The same for a tile with wgmma: the block takes one tile after another, and `weight` is a tensor
/// map of the packed weight, whose boxes are one stage of the ring (createWeightMap).
LogicalResult emitWgmmaGemm(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GemmKernel &spec);

/// combine(y, y_stride i64, accumulate i32
///         [, rows[, ids, slots i32, pair, order[, weights], scale f32]]
///         [, shared rows, shared count i32[, gate], shared scale f32]):
/// block t writes token t: the old y or 0; the rows of the token in the order of `order`, each
/// times weight · scale; row t of the shared ones times gate[t] · scale where t < count. `rows` are
/// bf16, or f32 sums that are added as they are.
struct CombineKernel {
  Type y;
  int64_t H, rowWidth, E;
  enum class Rows { None, Routed, Sums } rows;
  bool unweighted = false; ///< weights are 1
  bool shared = false, gate = false;
};
void emitCombine(OpBuilder &b, LLVM::LLVMFuncOp kernel, const CombineKernel &spec);

/// Adds `call_in`, `call_out` and `call_counts` to a gpu.module: see CallKernels.cpp.
void emitCallKernels(gpu::GPUModuleOp kernels);

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_KERNELS_KERNELS_H
