//===- Passes.h - passes on the moe dialect ---------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_TRANSFORMS_PASSES_H
#define MOE_DIALECT_MOE_TRANSFORMS_PASSES_H

#include "moe/Dialect/MoE/IR/MoEDialect.h"

#include "mlir/Pass/Pass.h"

namespace mlir {
class ModuleOp;
class RewritePatternSet;
namespace func {
class FuncOp;
} // namespace func
} // namespace mlir

namespace mlir::moe {

#define GEN_PASS_DECL
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"

#define GEN_PASS_REGISTRATION
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"

/// moe.experts and moe.ffn → gather or single_group, grouped_matmul, activate, grouped_matmul.
void populateDecomposeExpertsPatterns(RewritePatternSet &patterns);
/// moe.router + moe.dispatch → moe.route_dispatch.
void populateFuseRouterDispatchPatterns(RewritePatternSet &patterns);
/// moe.gather + moe.grouped_matmul → the `via` clause.
void populateFuseGatherPatterns(RewritePatternSet &patterns);
/// moe.grouped_matmul + moe.activate → the region.
void populateFuseActivationPatterns(RewritePatternSet &patterns);
/// moe.grouped_matmul + moe.combine → the `combine` clause.
void populateFuseCombinePatterns(RewritePatternSet &patterns);

} // namespace mlir::moe

#endif // MOE_DIALECT_MOE_TRANSFORMS_PASSES_H
