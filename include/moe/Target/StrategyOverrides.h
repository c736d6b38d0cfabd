//===- StrategyOverrides.h - schedules that a person changed ----*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The `strategy` section of a manifest, edited: functions, of matmuls, of fields. `*` in a name
// stands for any characters; patterns apply first, from the shortest, then the exact name.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_STRATEGYOVERRIDES_H
#define MOE_TARGET_STRATEGYOVERRIDES_H

#include "mlir/IR/Operation.h"
#include "llvm/ADT/StringSet.h"
#include "llvm/Support/JSON.h"

namespace mlir::moe {

class StrategyOverrides {
public:
  /// Reads JSON text; empty text changes nothing. Errors are reported at `at`.
  LogicalResult read(Operation *at, StringRef text);
  /// Calls `apply` with the fields of every entry for this matmul of this function.
  LogicalResult visit(Operation *op, StringRef function, StringRef name,
                      function_ref<LogicalResult(const llvm::json::Object &)> apply);
  /// An entry that matched nothing is a slip of the pen.
  LogicalResult checkAllUsed(Operation *at) const;

private:
  llvm::json::Value changes = nullptr;
  llvm::StringSet<> used;
};

} // namespace mlir::moe

#endif // MOE_TARGET_STRATEGYOVERRIDES_H
