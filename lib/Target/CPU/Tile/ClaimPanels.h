//===- ClaimPanels.h - tasks that own panels of sums -------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_CPU_TILE_CLAIMPANELS_H
#define MOE_LIB_TARGET_CPU_TILE_CLAIMPANELS_H

#include "EntryTiler.h"

namespace mlir::moe::tile {

template <typename OpTy>
void EntryTiler::claimPanels(OpBuilder &b, StageOp stage, OpTy first, Value y, int64_t panels,
                             int64_t most, int64_t step, int64_t sumRows,
                             llvm::function_ref<void(OpBuilder &, Value, Value,
                                                     llvm::function_ref<Value(OpBuilder &, Value)>)>
                                 body) {
  Value tokens = rowCount(y);
  Value scratch = panelScratch(b, most, step, sumRows, tokens);
  Value start = first.getStart() ? physical(first.getStart()) : y;
  Value accumulate = first.getAccumulate();
  if (!accumulate)
    accumulate = arith::ConstantIntOp::create(b, loc, 0, 1);
  Value perTask = panelsPerTask(b, stage, panels, most, step, sumRows, tokens);
  Value total = Index(b, loc).ceilDiv(Index(b, loc).constant(panels), perTask);
  claimTasks(b, stage, total, /*guided=*/false, {},
             [&](OpBuilder &b, Value task, ValueRange) -> SmallVector<Value> {
               Index index(b, loc);
               Value firstPanel = index.mul(task, perTask);
               Value endPanel = index.min(index.add(firstPanel, perTask), index.constant(panels));
               auto view = [&](OpBuilder &b, Value panel) {
                 Value number = Index(b, loc).sub(panel, firstPanel);
                 return panelView(b, scratch, number, step, tokens);
               };
               forLoop(b, firstPanel, endPanel, step, [&](OpBuilder &b, Value panel) {
                 BeginPanelsOp::create(b, loc, view(b, panel), start, panel, accumulate,
                                       b.getI64IntegerAttr(step));
               });
               body(b, firstPanel, endPanel, view);
               forLoop(b, firstPanel, endPanel, step, [&](OpBuilder &b, Value panel) {
                 EndPanelsOp::create(b, loc, view(b, panel), y, panel, b.getI64IntegerAttr(step));
               });
               return {};
             });
}

} // namespace mlir::moe::tile

#endif // MOE_LIB_TARGET_CPU_TILE_CLAIMPANELS_H
