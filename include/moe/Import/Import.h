//===- Import.h - from a ModelSpec to moe IR and back -----------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_IMPORT_IMPORT_H
#define MOE_IMPORT_IMPORT_H

#include "moe/Spec/ModelSpec.h"

#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/MLIRContext.h"
#include "mlir/IR/OwningOpRef.h"

namespace moec {

/// Builds the module of a model: a `moe.weight` for every weight and a `moe.layer` for every layer,
/// in model order, and the functions that layers name. Layers with equal semantics() name the same
/// functions: `@f<n>` forward, `@r<n>` route, `@e<n>` experts. Loads the dialects it needs.
/// Fails as checkModel does, so that nothing is imported that cannot be compiled.
llvm::Expected<mlir::OwningOpRef<mlir::ModuleOp>> importModel(const ModelSpec &spec,
                                                              mlir::MLIRContext &context);

/// Reads a model back from a module whose layers still name their imported functions, for .mlir
/// files written by hand. Attributes that IR does not hold (why a value was chosen, model_type) are
/// absent, origins say "moe IR". E-CONFIG when a layer has been lowered already or its functions
/// contradict it.
llvm::Expected<ModelSpec> readModel(mlir::ModuleOp module);

} // namespace moec

#endif // MOE_IMPORT_IMPORT_H
