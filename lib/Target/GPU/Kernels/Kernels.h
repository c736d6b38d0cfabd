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

/// Tokens that a block of the `logits` kernel works on, and length of one partial sum.
inline constexpr int64_t kLogitsTokens = 8, kLogitsSlice = 256;
/// Warps, and so tokens, of a block of the `select` kernel.
inline constexpr int64_t kSelectWarps = 4;
inline constexpr int64_t kSortThreads = 256, kCombineThreads = 128;

/// stage(x, x_stride i64, tokens i32, rows[, router weight, partial sums][, offsets]): rows
/// [T, width] are x rounded to bf16 and padded with zeros. With a router weight also the partial
/// sums of the logits, f32 [slices, T, 32 · panels]: slice s is the sum over 256 of the reduction,
/// in order. `dense` writes [0, T] to offsets.
struct StageKernel {
  Type x;            ///< element type of x
  int64_t H, width;  ///< columns of x, of the rows
  WeightType router; ///< null: no logits
  bool dense;        ///< one group of all rows
  int64_t slices() const { return llvm::divideCeil(width, kLogitsSlice); }
  int64_t threads() const { return router ? 32 * std::min<int64_t>(8, router.panelCount()) : 256; }
  int64_t sharedBytes() const { return router ? kLogitsTokens * kLogitsSlice * 4 : 0; }
};
void emitStage(OpBuilder &b, LLVM::LLVMFuncOp kernel, const StageKernel &spec);

/// select(partial sums, tokens i32, weights, experts[, logits, logits_stride i64][, bias]
/// [, selection bias]): what `moe.router` computes after the matmul. Biases are f32 [E].
struct SelectKernel {
  RouterAttr router;
  int64_t E, panels, slices;
  bool logits, bias, selectionBias;
};
void emitSelect(OpBuilder &b, LLVM::LLVMFuncOp kernel, const SelectKernel &spec);

/// sort(ids, count i32, slots i32, offsets, pair, order): block e writes the rows of expert e:
/// offsets[e], pair[n] = position in ids of sorted row n; order[t · slots + i] = the i-th sorted
/// row of token t.
void emitSort(OpBuilder &b, LLVM::LLVMFuncOp kernel, int64_t E);

/// gemm(rows, pair, slots i32, offsets, weight, result[, bias]): one tile. `pair` is read with
/// `gather`.
struct GemmKernel {
  GPUTileAttr tile;
  WeightType weight;
  int64_t rowWidth;          ///< columns of the rows in memory, a multiple of 32
  int64_t resultWidth;       ///< columns of the result in memory, a multiple of 32
  bool gather;               ///< row n is rows[pair[n] / slots]
  Region *epilogue;          ///< null: none
  bool bias;                 ///< panels of 32 f32, as those of the weight
  int64_t colBlocks() const; ///< tiles side by side
};
LogicalResult emitGemm(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GemmKernel &spec);

/// combine(rows, y, y_stride i64, accumulate i32[, ids, slots i32, pair, order, weights]): block t
/// sums the rows of token t in the order of `order`; without ids the row of token t is row t.
struct CombineKernel {
  Type y;
  int64_t H, rowWidth, E;
  bool routed;
};
void emitCombine(OpBuilder &b, LLVM::LLVMFuncOp kernel, const CombineKernel &spec);

/// Adds `call_in`, `call_out` and `call_counts` to a gpu.module: see CallKernels.cpp.
void emitCallKernels(gpu::GPUModuleOp kernels);

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_KERNELS_KERNELS_H
