//===- InitAll.h - every dialect and pass of moec ---------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// For tools over the whole registry (moe-opt, moe-reduce, moe-lsp-server). Passes and libraries
// list what they depend on and never include this.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_INITALL_H
#define MOE_INITALL_H

namespace mlir {
class DialectRegistry;
} // namespace mlir

namespace mlir::moe {

/// Adds the moe dialect, every upstream dialect that any phase may print, and the external models
/// (bufferization, translation to LLVM IR) that the pipelines need.
void registerAllDialects(DialectRegistry &registry);

/// Registers the passes and pipelines of moec and the upstream passes that the printed pipelines
/// name. Call once, before the command line is parsed.
void registerAllPasses();

} // namespace mlir::moe

#endif // MOE_INITALL_H
