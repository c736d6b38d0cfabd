//===- MoEToLoops.h - moe to loops ------------------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_CONVERSION_MOETOLOOPS_MOETOLOOPS_H
#define MOE_CONVERSION_MOETOLOOPS_MOETOLOOPS_H

#include "mlir/Pass/Pass.h"

namespace mlir {
class RewritePatternSet;
class TypeConverter;
} // namespace mlir

namespace mlir::moe {

#define GEN_PASS_DECL
#include "moe/Conversion/MoEToLoops/Passes.h.inc"

#define GEN_PASS_REGISTRATION
#include "moe/Conversion/MoEToLoops/Passes.h.inc"

/// `!moe.weight` → 1-D memref of its packed elements; every other type stays.
void addWeightConversion(TypeConverter &converter);

/// Patterns from operations on memrefs to loops.
void populateMoEToLoopsPatterns(const TypeConverter &converter, RewritePatternSet &patterns);

} // namespace mlir::moe

#endif // MOE_CONVERSION_MOETOLOOPS_MOETOLOOPS_H
