//===- TileTasks.cpp - moe-cpu-tile-tasks -------------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Tile/EntryTiler.h"
#include "moe/Target/CPU/Passes.h"

#include "llvm/ADT/TypeSwitch.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOECPUTILETASKS
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;
using namespace mlir::moe::tile;

StageOp EntryTiler::stageFor(ArrayRef<Operation *> ops, StringRef label, bool withTail) {
  llvm::SmallDenseSet<Value> own;
  for (Operation *op : ops)
    own.insert_range(cast<DestinationStyleOpInterface>(op).getDpsInits());
  size_t earliest = 0;
  for (Operation *op : ops)
    for (Value operand : op->getOperands())
      if (auto it = written.find(operand); it != written.end() && !own.contains(operand))
        earliest = std::max(earliest, it->second + 1);
  size_t number = earliest;
  while (number < stages.size() && (withTail || stages[number].getLabel() != label))
    ++number;
  if (number == stages.size()) {
    OpBuilder end = OpBuilder::atBlockTerminator(&func.getBody().front());
    stages.push_back(StageOp::create(end, loc, label, withTail));
  }
  for (Value out : own)
    written[out] = number;
  return stages[number];
}

LogicalResult EntryTiler::run() {
  auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
  level = findCPULevel(target.getLevel());
  if (!level || !level->implemented)
    return func.emitOpError("expected level ")
           << implementedLevelNames() << ", but got `" << target.getLevel() << "`";
  SmallVector<Operation *> ops;
  for (Operation &op : func.getBody().front())
    if (isa<MoEDialect>(op.getDialect()))
      ops.push_back(&op);
  // The offsets are part of the frame: the runtime hands them on as counts.
  for (Operation *op : ops) {
    Value offsets;
    if (auto dispatch = dyn_cast<DispatchOp>(op))
      offsets = dispatch.getOutOffsets();
    else if (auto dispatch = dyn_cast<RouteDispatchOp>(op))
      offsets = dispatch.getOutOffsets();
    if (!offsets)
      continue;
    auto attr = DictionaryAttr::get(func.getContext(),
                                    {{StringAttr::get(func.getContext(), MoEDialect::kArgAttrName),
                                      StringAttr::get(func.getContext(), "offsets")}});
    unsigned position = func.getNumArguments();
    if (failed(func.insertArgument(position, offsets.getType(), attr, loc)))
      return failure();
    offsets.replaceAllUsesWith(func.getArgument(position));
  }
  // Buffers tell who waits for whom, so each of them is written once.
  llvm::SmallDenseSet<Value> outs;
  for (Operation *op : ops)
    for (Value out : cast<DestinationStyleOpInterface>(op).getDpsInits())
      if (!outs.insert(out).second)
        return op->emitOpError("expected a buffer that no other operation writes, but got one "
                               "that is written twice");
  // Sizes and scratch first, so that every stage can use them wherever it stands.
  if (ops.empty())
    return success();
  Operation *firstOp = ops.front();
  for (Operation &op : llvm::make_early_inc_range(func.getBody().front()))
    if (!isa<MoEDialect>(op.getDialect()) && !op.hasTrait<OpTrait::IsTerminator>() &&
        firstOp->isBeforeInBlock(&op))
      op.moveBefore(firstOp);
  b.setInsertionPoint(firstOp);
  for (Operation *op : ops) {
    loc = op->getLoc();
    LogicalResult result =
        TypeSwitch<Operation *, LogicalResult>(op)
            .Case<RouterOp, RouteDispatchOp, DispatchOp, SingleGroupOp, GatherOp, GroupedMatmulOp,
                  ActivateOp, CombineOp>([&](auto op) { return tile(op); })
            .Case<ExpertsOp, FfnOp>([&](auto op) -> LogicalResult {
              // What decomposition had a formula for is not here any more.
              std::string unimplemented = op.getExpert().getUnimplemented();
              if (unimplemented.empty())
                return op.emitOpError("expected matmuls; run the phases canonical and fuse first");
              return op.emitOpError("expected an expert that the CPU target implements, but got ")
                     << unimplemented;
            })
            .Default([&](Operation *op) {
              return op->emitOpError("expected an operation that the CPU target can tile; "
                                     "run the phases canonical and fuse first");
            });
    if (failed(result))
      return failure();
  }
  for (Operation *op : llvm::reverse(ops))
    op->erase();
  for (auto op : llvm::make_early_inc_range(func.getOps<memref::AllocOp>()))
    if (op->use_empty())
      op.erase();
  int64_t tails = llvm::count_if(stages, [](StageOp stage) { return !stage.getTail().empty(); });
  if (stages.size() > 8 || counters + tails > 16)
    return func.emitOpError("expected at most 8 stages and 16 counters, but got ")
           << stages.size() << " and " << counters + tails;
  return success();
}

namespace {
struct TileTasksPass : public mlir::moe::impl::MoECPUTileTasksBase<TileTasksPass> {
  void runOnOperation() override {
    for (auto func : getOperation().getOps<func::FuncOp>())
      if (func->hasAttr(MoEDialect::kTargetAttrName) && failed(EntryTiler(func).run()))
        return signalPassFailure();
  }
};
} // namespace
