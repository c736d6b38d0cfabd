//===- MoEAttrs.h - attributes of the moe dialect ---------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOEATTRS_H
#define MOE_DIALECT_MOE_IR_MOEATTRS_H

#include "mlir/IR/Attributes.h"
#include "mlir/IR/BuiltinAttributes.h"
#include "mlir/IR/DialectImplementation.h"
#include "mlir/IR/OpImplementation.h"
#include "llvm/ADT/bit.h"

#include <string>

namespace mlir::moe {

/// A double inside an attribute: equal when the bits are.
struct Real {
  double value = 0.0;

  Real() = default;
  Real(double value) : value(value) {}
  operator double() const { return value; }
  uint64_t bits() const { return llvm::bit_cast<uint64_t>(value); }
  friend bool operator==(Real a, Real b) { return a.bits() == b.bits(); }
  friend bool operator!=(Real a, Real b) { return a.bits() != b.bits(); }
};
inline llvm::hash_code hash_value(Real real) { return llvm::hash_value(real.bits()); }

/// Reads a floating point literal, with an optional minus sign.
FailureOr<Real> parseReal(AsmParser &parser);
/// Prints `real` so that parseReal gives the same bits.
void printReal(AsmPrinter &printer, Real real);

/// Names of the CPU levels. All but the last have code.
inline constexpr llvm::StringLiteral kLevelV3 = "x86-64-v3";
inline constexpr llvm::StringLiteral kLevelV4 = "x86-64-v4";
inline constexpr llvm::StringLiteral kLevelAvx512Bf16 = "avx512-bf16";
inline constexpr llvm::StringLiteral kLevelAmxBf16 = "amx-bf16";
/// Whether `level` is one of the names above.
bool isKnownLevel(llvm::StringRef level);

} // namespace mlir::moe

#include "moe/Dialect/MoE/IR/MoEEnums.h.inc"
#include "moe/Dialect/MoE/IR/MoEInterfaces.h.inc"

#define GET_ATTRDEF_CLASSES
#include "moe/Dialect/MoE/IR/MoEAttrs.h.inc"

#endif // MOE_DIALECT_MOE_IR_MOEATTRS_H
