//===- Kernels.h - Emission of the CPU micro-kernels ------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The one place that writes vector code for the CPU. A kernel is a private function of pointers
// and i64 values whose spec says everything that decides its code; the name is the spec, so equal
// specs share one function.
//
// Data forms (lengths in bytes):
//   rows16   a block of `count` rows: float [ceil(K/16)][count][16]; element (r, k) at
//            (k/16)*count*64 + r*64 + (k%16)*4; columns K... are zero.
//   rows32   a block of rows for products of bf16: bf16 [ceil(K/32)][count][32]; element (r, k) at
//            (k/32)*count*64 + r*64 + (k%32)*2; columns K... are zero. 16 rows are an AMX tile;
//            tiles are loaded whole, so that up to 960 bytes after the block must be readable.
//   panel32  a weight panel of 32 columns: rows of 128 bytes, one k each in f32 (lane l at 4*l);
//            two k each in bf16 (lane l: even k at 4*l, odd k at 4*l+2). With two parts lanes 0-15
//            are 16 gate columns and lanes 16-31 the same 16 up columns.
//
// Bits: an output element is one chain of products with k ascending, in every kernel whatever its
// count, panels, order, prefetch and form. With fused multiply-adds (KernelProduct::Fma) the bits
// are those of every level and format; with products of bf16 pairs (DotBF16: acc = fma(a[2i+1],
// b[2i+1], acc), then fma(a[2i], b[2i], acc), subnormal operands and results as zero) they are
// those of all such kernels, and with products of tiles (TileBF16: 32 k at a time, the sum of the
// even and that of the odd k) those of all such kernels; with FmaF64 the chain is
// one of f64, rounded to f32 at its end. There are no fast-math flags.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_KERNELS_H
#define MOE_TARGET_CPU_KERNELS_H

#include "moe/Dialect/MoE/IR/MoEAttrs.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/IR/Builders.h"
#include "mlir/Support/LLVM.h"

#include <optional>
#include <string>

namespace mlir {
namespace moe {

/// Vector levels that have kernels.
enum class KernelLevel { V3, V4 };

/// The kernels that code of a level ("x86-64-v3", "x86-64-v4", "avx512-bf16") uses, or nothing.
std::optional<KernelLevel> parseKernelLevel(StringRef level);
/// The LLVM CPU name of a level's kernels.
StringRef getLevelName(KernelLevel level);
/// f32 lanes of one register: 8 or 16.
int64_t getLevelLanes(KernelLevel level);
/// Architectural vector registers: 16 or 32.
int64_t getLevelRegisters(KernelLevel level);

/// Which operand is loaded first in a step of k. Both orders give equal bits; the register
/// allocator follows the order, so the wrong one spills. Automatic takes BFirst where rows >=
/// vectors.
enum class LoadOrder { Automatic, BFirst, AFirst };

/// Where a kernel's result goes.
///   Blocked  after the region: rows16 block of the same rows, or with a bf16 result (rounded to
///            nearest even) rows32 block; columns at or beyond `columns` are written as zero.
///   Rows     row-major, f32 or bf16 (rounded to nearest even); the parts of a panel go to
///            separate matrices `part_bytes` apart unless a region merges them.
///   Combine  each row is rounded to the compute type and added to its token's row of a panel
///            scratch: Y[pair/k] = fma(w, row, Y[pair/k]).
enum class KernelForm { Blocked, Rows, Combine };

/// Everything that decides the code of one GEMM kernel.
struct GemmKernelSpec {
  KernelLevel level = KernelLevel::V4;
  /// Exact rows of the tile, >= 1.
  int64_t rows = 1;
  /// Panels of 32 columns, >= 1.
  int64_t panels = 1;
  LoadOrder order = LoadOrder::Automatic;
  /// Distance in bytes at which the weights are prefetched; 0 for none.
  int64_t prefetch = 0;
  /// Lines of later weights touched for every group of columns of `a`; 0 for none. One panel only.
  int64_t ahead = 0;
  /// Calls make some of the groups of k, with the sums in memory between them. Not FmaF64.
  bool steps = false;
  /// TileBF16 with steps: the call that makes the last step leaves the result of the block before,
  /// this many rows at each step; 0: its own, after them.
  int64_t defer = 0;
  /// TileBF16: rows are loaded as what the first cache should keep, too.
  bool nearRows = false;
  /// Weights in bf16 (with Fma widened exactly in registers) instead of f32.
  bool bf16Weights = false;
  /// DotBF16: rows32 block times weights in bf16 by vdpbf16ps; V4 only. TileBF16: by tdpbf16ps;
  /// rows is 16 or 32, the tiles that it has, and the kernel's argument says how many of them are
  /// real. FmaF64: sums in f64, rounded once to f32; weights in f32 and the form Rows
  /// without a region only.
  KernelProduct product = KernelProduct::Fma;
  /// 1, or 2 for gate and up in one panel.
  int64_t parts = 1;
  KernelForm form = KernelForm::Rows;
  /// Combine: rows go to their pair's token. False: row r is token r.
  bool indexed = true;
  /// Combine: rows have weights, by pair or, without pairs, by row. False: weight 1.
  bool weighted = true;
  /// Combine: weights are multiplied by an argument before they are used.
  bool scaled = false;
  /// A bias is added to the products before the region, the rounding and the weight.
  bool bias = false;
  /// Rows, Blocked: the stored type. Combine: the type a row is rounded to. False is f32.
  bool bf16Result = false;
  /// Optional: one block of `parts` f32 arguments that yields one f32. Blocked and Rows only.
  Region *epilogue = nullptr;
  /// Short word for the epilogue in the kernel's name; a hash of the region is added.
  std::string epilogueName;

  bool isDot() const { return product == KernelProduct::DotBF16; }
  bool isTile() const { return product == KernelProduct::TileBF16; }
  bool isWide() const { return product == KernelProduct::FmaF64; }
  /// Columns of `a` in one group of 64 bytes a row: a rows32 or a rows16 block.
  int64_t getGroupColumns() const { return UkernelAttr::readsPairs(product) ? 32 : 16; }
  /// Instructions beyond the level's.
  StringRef getFeatures() const {
    return isTile() ? "+amx-tile,+amx-bf16" : isDot() ? "+avx512bf16" : "";
  }
  /// A tile of few rows waits for its weights: a prefetch into L2 leaves the few buffers of misses
  /// of the first cache to the loads. A tall one computes while the lines come, and wants them
  /// near.
  bool prefetchesL2() const { return rows <= 8; }
  /// A tile of few rows waits for its own weights already.
  bool touchesAhead() const {
    return ahead && rows > (isTile() ? 16 : level == KernelLevel::V3 ? 2 : 8);
  }
  /// Tall tiles whose rows are added to the sums of their tokens, one panel at a time, touch those
  /// before they multiply.
  bool touchesSums() const {
    return form == KernelForm::Combine && indexed && !isTile() && panels == 1 && rows > 8;
  }
  /// Elements of an accumulator's register.
  int64_t getLanes() const { return getLevelLanes(level) / (isWide() ? 2 : 1); }
  /// Vector registers per panel.
  int64_t getVectorsPerPanel() const { return 32 / getLanes(); }
  /// More panels would run out of address registers, or of vector registers for widened weights.
  static int64_t getMaxPanels(KernelLevel level) {
    return UkernelAttr::getMaxPanels(getLevelName(level));
  }
  /// The order that is emitted.
  bool isBFirst() const;
  /// Vector registers of a step: the accumulators, the operand that is held whole, and one for the
  /// other.
  int64_t getRegisters() const;
  bool fitsRegisters() const { return isTile() || getRegisters() <= getLevelRegisters(level); }
  /// The function name, for example
  /// "moe_gemm_v4_r14_p1_bf16_pf1024_blocked2_silu_0123456789abcdef".
  std::string getName() const;
  /// Emits on `loc` what is wrong with the spec.
  LogicalResult verify(Location loc) const;
};

/// Emits the kernel of `spec` at the builder's insertion point (a module body) under
/// spec.getName(). Arguments:
///   (ptr a, ptr b, i64 groups, i64 panel_bytes, ptr out, [i64 rows,] [ptr bias,] form...,
///    [i64 first, i64 end, ptr sums, [ptr before, i64 last]])
///     first, end   with `steps`: the groups that this call is for, of `groups`; up to 1024 sums of
///                  f32 wait at `sums`, and the call whose end is `groups` leaves the result
///     before, last with `defer`: that call leaves the result of the 32 rows before this block,
///                  unless `before` is null: their `out` (Combine if indexed: their `pair`), their
///                  sums end at `sums`; and its own only if `last` is not 0
///     a            rows16 block of spec.rows rows; rows32 for DotBF16 and TileBF16
///     bias         vector32 of the first panel: 32 floats a panel, lanes as in b
///     b            first panel; the others follow `panel_bytes` apart. With `ahead`: what is
///     touched
///                  ahead begins `panel_bytes` after b
///     groups       columns of a in groups: ceil(K/16); for DotBF16 and TileBF16 ceil(K/32)
///     rows         TileBF16 alone: rows of the block, 1 to spec.rows. Such a kernel runs between
///     the
///                  two functions of emitTileFrame
///   Blocked: out = the block's address of the first panel's columns, i64 columns = real output
///            columns from there on (may be larger than the tile); with a bf16 result of one panel
///            of 16 columns, i64 fill: not 0 if the other half of the group, after this one, is to
///            be zeroed, because it has no panel
///   Rows:    out, i64 row_bytes, i64 part_bytes, i64 columns = real columns of a part from there
///            on; no others are written
///   Combine: out = scratch f32 [panels][tokens][32], i64 scratch_bytes from panel to panel; if
///            indexed ptr pair (i32, of the first row), otherwise out is the scratch row of the
///            first row; if weighted ptr w (f32, by pair or of the first row); if indexed i64 k; if
///            scaled f32
/// No pointer needs more than element alignment.
FailureOr<func::FuncOp> emitGemmKernel(OpBuilder &b, Location loc, const GemmKernelSpec &spec);

/// The functions that give a thread the tiles of TileBF16 kernels (`begin`) and return them: all of
/// eight tiles 16 rows of 64 bytes. No arguments. The name of one:
StringRef getTileFrameName(bool begin);
func::FuncOp emitTileFrame(OpBuilder &b, Location loc, bool begin);

/// Spec of a function that gathers rows into a rows16 or rows32 block.
struct PackKernelSpec {
  KernelLevel level = KernelLevel::V4;
  bool bf16Source = false;
  /// Round f32 sources to bf16 values.
  bool bf16Compute = false;
  /// A rows32 block; the values are bf16, so f32 sources are rounded.
  bool bf16Block = false;
  /// Rows are taken through pair[i] / k.
  bool gather = false;
  /// With gather: rows are multiplied by w[pair[i]] and rounded again.
  bool weighted = false;
  std::string getName() const;
};

/// Arguments: (ptr x, i64 row_bytes, [ptr pair, i64 k, [ptr w,]] i64 rows, i64 columns, ptr out).
/// Row i is x row i, or pair[i] / k (pair points at the first row's entry).
func::FuncOp emitPackKernel(OpBuilder &b, Location loc, const PackKernelSpec &spec);

/// The function that normalises rows of a rows16 block in place, as moe.normalize_rows says.
struct NormalizeKernelSpec {
  KernelLevel level = KernelLevel::V4;
  int64_t columns = 1; ///< that are real
  float epsilon = 0.0f;
  bool rounded = false;
  std::string getName() const;
};

/// Arguments: (ptr block, i64 rows, ptr scale).
func::FuncOp emitNormalizeKernel(OpBuilder &b, Location loc, const NormalizeKernelSpec &spec);

/// Spec of the functions that open and close a panel scratch f32 [panels][tokens][32].
struct PanelKernelSpec {
  KernelLevel level = KernelLevel::V4;
  bool bf16Y = false;
  /// True: y -> scratch (or zero). False: scratch -> y, rounded once.
  bool begin = true;
  std::string getName() const;
};

/// Arguments: (ptr scratch, i64 scratch_bytes from panel to panel, ptr y, i64 row_bytes,
/// i64 tokens, i64 first_column, i64 panels, i64 columns of y [, begin only: i64 accumulate]).
/// Columns beyond y are zero in the scratch and never stored.
func::FuncOp emitPanelKernel(OpBuilder &b, Location loc, const PanelKernelSpec &spec);

/// Spec of the function that turns rows of router logits into expert ids and weights.
struct SelectKernelSpec {
  KernelLevel level = KernelLevel::V4;
  int64_t experts = 1;
  /// What is computed, but for the vectors; attributes without code are refused before.
  RouterAttr router;
  /// expert_scale is an argument.
  bool expertScale = false;
  /// Also copy the logits.
  bool copyLogits = false;
  bool hasSelectionBias() const;
  std::string getName() const;
};

/// Arguments: (ptr logits f32, i64 row_bytes, i64 tokens, ptr weights f32 [tokens][topK],
/// ptr ids i32 [tokens][topK] [, ptr selection_bias] [, ptr expert_scale]
/// [, ptr logits_out f32, i64 logits_out_bytes]). The vectors are padded to whole vectors.
/// The logits are scratch: they may be overwritten.
/// Where neither a selection bias nor groups decide, ids descend by logit (every score function is
/// increasing, so this is the order of exact scores), equal logits by ascending id; NaN counts as
/// the largest, so that it reaches the weights. Ids are always distinct and in range.
func::FuncOp emitSelectKernel(OpBuilder &b, Location loc, const SelectKernelSpec &spec);

} // namespace moe
} // namespace mlir

#endif // MOE_TARGET_CPU_KERNELS_H
