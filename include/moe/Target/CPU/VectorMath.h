//===- VectorMath.h - Vector math as plain arithmetic -----------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Functions of f32 vectors emitted as arith and vector.fma operations: no calls, no fast-math
// flags, so that a lane's bits depend on its own input alone. Every function keeps NaN.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_VECTORMATH_H
#define MOE_TARGET_CPU_VECTORMATH_H

#include "mlir/IR/Builders.h"
#include "mlir/IR/Value.h"
#include "mlir/Support/LLVM.h"

namespace mlir {
class Region;
class RewritePatternSet;
namespace moe {

/// The vector<`lanes` x f32> (or i32) constant with `value` in every lane.
Value splatF32(OpBuilder &b, Location loc, int64_t lanes, float value);
Value splatI32(OpBuilder &b, Location loc, int64_t lanes, int32_t value);

/// e^x of vector<Nxf32>. Error <= 2 ulp for results >= 2^-126. Results below 2^-126 (x < -87.34)
/// are flushed to +0; x > 88.72 gives +inf; NaN gives NaN.
Value emitExp(OpBuilder &b, Location loc, Value x);

/// erf(x) of vector<Nxf32>. Absolute error <= 1e-7; odd, |erf| <= 1; NaN gives NaN.
Value emitErf(OpBuilder &b, Location loc, Value x);

/// tanh(x) of vector<Nxf32>. Error <= 4 ulp; never overflows; NaN gives NaN.
Value emitTanh(OpBuilder &b, Location loc, Value x);

/// Rounds vector<Nxf32> to bf16 (to nearest, ties to even, in integer operations: no bf16
/// instruction is needed). The result is vector<Nxi32> with the bf16 bits in the low half. NaN
/// stays NaN (made quiet), overflow goes to infinity.
Value emitRoundToBF16Bits(OpBuilder &b, Location loc, Value x);

/// As above, but widened back: vector<Nxf32> whose values are all bf16 values.
Value emitRoundToBF16(OpBuilder &b, Location loc, Value x);

/// Emits the body of `region` (one block of f32 arguments that ends in a terminator with f32
/// operands) lane by lane on vectors: argument i becomes args[i], all of one vector<Nxf32> type.
/// arith operations are cloned on vector types; math.exp, math.erf, math.tanh and math.absf become
/// the functions above. Constants may be defined outside the region. Returns the terminator's
/// operands, or emits an error on an operation it has no vector form for.
FailureOr<SmallVector<Value>> emitRegionOnVectors(OpBuilder &b, Region &region, ValueRange args);

/// Patterns that replace math.exp, math.erf and math.tanh on rank-1 vectors of f32 by the functions
/// above: the same bits as in a kernel's epilogue.
void populateVectorMathPatterns(RewritePatternSet &patterns);

} // namespace moe
} // namespace mlir

#endif // MOE_TARGET_CPU_VECTORMATH_H
