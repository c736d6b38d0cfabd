//===- MoECanonicalize.cpp - canonicalizations of the moe dialect ---------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"

#include "mlir/IR/PatternMatch.h"

using namespace mlir;
using namespace mlir::moe;

void RouterOp::getCanonicalizationPatterns(RewritePatternSet &, MLIRContext *) {}
void RouteDispatchOp::getCanonicalizationPatterns(RewritePatternSet &, MLIRContext *) {}
