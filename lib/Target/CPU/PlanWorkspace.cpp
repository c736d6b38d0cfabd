//===- PlanWorkspace.cpp - scratch becomes offsets of one workspace -------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Slice.h"
#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/CPU/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOECPUPLANWORKSPACE
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

constexpr int64_t kAlignment = 64;

/// Scratch of one function: what all share, and per stage what every lane has.
struct Scratch {
  SmallVector<memref::AllocOp> shared;
  SmallVector<std::pair<StageOp, SmallVector<memref::AllocOp>>> lanes;
};

/// Where everything lies, as values at one place of one function.
struct Plan {
  SmallVector<Value> shared;             ///< offset of each shared allocation
  SmallVector<SmallVector<Value>> lanes; ///< offset in the lane's part, per stage
  Value lanesBegin, laneBytes, total;
};

class Planner {
public:
  explicit Planner(func::FuncOp func) : func(func), loc(func.getLoc()) {}
  LogicalResult run();

private:
  LogicalResult collect();
  FailureOr<Value> bytesOf(OpBuilder &b, memref::AllocOp alloc, IRMapping &mapping,
                           llvm::function_ref<Value(Value)> leaf);
  FailureOr<Plan> plan(OpBuilder &b, Value laneCount, llvm::function_ref<Value(Value)> leaf);
  LogicalResult makeBytesFunction();
  void replace(OpBuilder &b, memref::AllocOp alloc, Value workspace, Value offset);

  func::FuncOp func;
  Location loc;
  Scratch scratch;
};

} // namespace

LogicalResult Planner::collect() {
  WalkResult walk = func.walk([&](memref::AllocOp alloc) {
    if (!alloc.getType().getLayout().isIdentity() || alloc.getSymbolOperands().size()) {
      alloc.emitOpError("expected scratch without a layout, but got ") << alloc.getType();
      return WalkResult::interrupt();
    }
    auto stage = alloc->getParentOfType<StageOp>();
    if (!stage) {
      scratch.shared.push_back(alloc);
      return WalkResult::advance();
    }
    if (alloc->getBlock() != &stage.getBody().front()) {
      alloc.emitOpError("expected scratch of a lane at the top of its stage, but got it deeper");
      return WalkResult::interrupt();
    }
    if (scratch.lanes.empty() || scratch.lanes.back().first != stage)
      scratch.lanes.push_back({stage, {}});
    scratch.lanes.back().second.push_back(alloc);
    return WalkResult::advance();
  });
  return failure(walk.wasInterrupted());
}

FailureOr<Value> Planner::bytesOf(OpBuilder &b, memref::AllocOp alloc, IRMapping &mapping,
                                  llvm::function_ref<Value(Value)> leaf) {
  MemRefType type = alloc.getType();
  int64_t fixed = type.getElementTypeBitWidth() / 8;
  for (int64_t size : type.getShape())
    if (!ShapedType::isDynamic(size))
      fixed *= size;
  Value bytes = arith::ConstantIndexOp::create(b, loc, fixed);
  for (Value size : alloc.getDynamicSizes()) {
    FailureOr<Value> copy = cloneSlice(b, size, mapping, leaf);
    if (failed(copy))
      return failure();
    bytes = b.createOrFold<arith::MulIOp>(loc, bytes, *copy);
  }
  Value up = b.createOrFold<arith::AddIOp>(loc, bytes,
                                           arith::ConstantIndexOp::create(b, loc, kAlignment - 1));
  return b.createOrFold<arith::AndIOp>(loc, up,
                                       arith::ConstantIndexOp::create(b, loc, -kAlignment));
}

FailureOr<Plan> Planner::plan(OpBuilder &b, Value laneCount,
                              llvm::function_ref<Value(Value)> leaf) {
  Plan plan;
  IRMapping mapping;
  Value zero = arith::ConstantIndexOp::create(b, loc, 0);
  Value end = zero;
  for (memref::AllocOp alloc : scratch.shared) {
    FailureOr<Value> bytes = bytesOf(b, alloc, mapping, leaf);
    if (failed(bytes))
      return failure();
    plan.shared.push_back(end);
    end = b.createOrFold<arith::AddIOp>(loc, end, *bytes);
  }
  plan.lanesBegin = end;
  plan.laneBytes = zero;
  for (auto &[stage, allocs] : scratch.lanes) {
    Value laneEnd = zero;
    plan.lanes.emplace_back();
    for (memref::AllocOp alloc : allocs) {
      FailureOr<Value> bytes = bytesOf(b, alloc, mapping, leaf);
      if (failed(bytes))
        return failure();
      plan.lanes.back().push_back(laneEnd);
      laneEnd = b.createOrFold<arith::AddIOp>(loc, laneEnd, *bytes);
    }
    plan.laneBytes = b.createOrFold<arith::MaxUIOp>(loc, plan.laneBytes, laneEnd);
  }
  plan.total = b.createOrFold<arith::AddIOp>(
      loc, end, b.createOrFold<arith::MulIOp>(loc, plan.laneBytes, laneCount));
  return plan;
}

/// The argument whose dimension `value` is, with the dimension.
static std::optional<std::pair<unsigned, int64_t>> argumentDim(Value value) {
  auto dim = value.getDefiningOp<memref::DimOp>();
  if (!dim || !dim.getConstantIndex())
    return std::nullopt;
  auto argument = dyn_cast<BlockArgument>(dim.getSource());
  if (!argument || !isa<func::FuncOp>(argument.getOwner()->getParentOp()))
    return std::nullopt;
  return std::make_pair(argument.getArgNumber(), *dim.getConstantIndex());
}

/// <function>_workspace_bytes(tokens, slots, lanes).
LogicalResult Planner::makeBytesFunction() {
  OpBuilder b(func);
  Type i64 = b.getI64Type();
  auto bytes = func::FuncOp::create(b, loc, (func.getSymName() + "_workspace_bytes").str(),
                                    b.getFunctionType({i64, i64, i64}, i64));
  auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
  if (const CPULevel *level = findCPULevel(target.getLevel()))
    setTargetAttributes(bytes, *level);
  func->setAttr(MoEDialect::kWorkspaceAttrName, FlatSymbolRefAttr::get(bytes));
  Block *block = bytes.addEntryBlock();
  b.setInsertionPointToStart(block);
  SmallVector<Value> arguments;
  for (BlockArgument argument : block->getArguments())
    arguments.push_back(arith::IndexCastOp::create(b, loc, b.getIndexType(), argument));
  FailureOr<Plan> result = plan(b, arguments[2], [&](Value value) -> Value {
    auto dim = argumentDim(value);
    if (!dim)
      return nullptr;
    auto role = func.getArgAttrOfType<StringAttr>(dim->first, MoEDialect::kArgAttrName);
    if (dim->second == 0)
      return arguments[0];
    if (role && (role == "experts" || role == "weights") && dim->second == 1)
      return arguments[1];
    return nullptr;
  });
  if (failed(result))
    return failure();
  Value total = arith::IndexCastOp::create(b, loc, i64, result->total);
  func::ReturnOp::create(b, loc, total);
  return success();
}

void Planner::replace(OpBuilder &b, memref::AllocOp alloc, Value workspace, Value offset) {
  b.setInsertionPoint(alloc);
  Value view = memref::ViewOp::create(b, alloc.getLoc(), alloc.getType(), workspace, offset,
                                      alloc.getDynamicSizes());
  alloc.replaceAllUsesWith(view);
  alloc.erase();
}

LogicalResult Planner::run() {
  if (failed(collect()) || failed(makeBytesFunction()))
    return failure();
  MLIRContext *context = func.getContext();
  OpBuilder b(context);
  auto addArgument = [&](Type type, StringRef role) -> Value {
    auto attr = DictionaryAttr::get(context, {{StringAttr::get(context, MoEDialect::kArgAttrName),
                                               StringAttr::get(context, role)}});
    unsigned position = func.getNumArguments();
    (void)func.insertArgument(position, type, attr, loc);
    return func.getArgument(position);
  };
  Value workspace =
      addArgument(MemRefType::get({ShapedType::kDynamic}, b.getI8Type()), "workspace");
  Value laneCount = addArgument(b.getIndexType(), "lanes");
  b.setInsertionPointToStart(&func.getBody().front());
  FailureOr<Plan> result = plan(b, laneCount, [&](Value value) -> Value {
    return isa<BlockArgument>(value) ? value : Value();
  });
  if (failed(result))
    return failure();
  for (auto [alloc, offset] : llvm::zip_equal(scratch.shared, result->shared))
    replace(b, alloc, workspace, offset);
  for (auto [entry, offsets] : llvm::zip_equal(scratch.lanes, result->lanes)) {
    auto &[stage, allocs] = entry;
    b.setInsertionPointToStart(&stage.getBody().front());
    Value base = arith::AddIOp::create(
        b, loc, result->lanesBegin,
        arith::MulIOp::create(b, loc, stage.getLane(), result->laneBytes).getResult());
    for (auto [alloc, offset] : llvm::zip_equal(allocs, offsets)) {
      b.setInsertionPoint(alloc);
      Value place = b.createOrFold<arith::AddIOp>(loc, base, offset);
      replace(b, alloc, workspace, place);
    }
  }
  return success();
}

namespace {
struct PlanWorkspacePass : public mlir::moe::impl::MoECPUPlanWorkspaceBase<PlanWorkspacePass> {
  void runOnOperation() override {
    for (auto func : llvm::to_vector(getOperation().getOps<func::FuncOp>()))
      if (func->hasAttr(MoEDialect::kTargetAttrName) && failed(Planner(func).run()))
        return signalPassFailure();
  }
};
} // namespace
