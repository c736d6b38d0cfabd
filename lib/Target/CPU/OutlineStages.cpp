//===- OutlineStages.cpp - one function per stage -------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The only place besides the runtime that knows the layout of moec_frame (moec/module.h); the
// static assertions below hold the two together.
//
//===----------------------------------------------------------------------===//

#include "Slice.h"
#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/CPU/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/Dialect/SCF/IR/SCF.h"
#include "mlir/Transforms/RegionUtils.h"
#include "moec/module.h"

#include <cstddef>
#include <limits>

namespace mlir::moe {
#define GEN_PASS_DEF_MOECPUOUTLINESTAGES
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

static_assert(offsetof(moec_frame, workspace) == 0 && offsetof(moec_frame, weights) == 8 &&
                  offsetof(moec_frame, x) == 16 && offsetof(moec_frame, x_stride) == 24 &&
                  offsetof(moec_frame, y) == 32 && offsetof(moec_frame, y_stride) == 40 &&
                  offsetof(moec_frame, tokens) == 48 && offsetof(moec_frame, slots) == 56 &&
                  offsetof(moec_frame, experts) == 64 &&
                  offsetof(moec_frame, expert_weights) == 72 &&
                  offsetof(moec_frame, logits) == 80 && offsetof(moec_frame, logits_stride) == 88 &&
                  offsetof(moec_frame, offsets) == 96 && offsetof(moec_frame, accumulate) == 104 &&
                  offsetof(moec_frame, lanes) == 112 && offsetof(moec_frame, routed_only) == 120 &&
                  offsetof(moec_frame, counters) == 128 && offsetof(moec_frame, router_x) == 1152 &&
                  offsetof(moec_frame, router_x_stride) == 1160,
              "the frame's layout is part of the ABI");

static constexpr llvm::StringLiteral kTokens = "tokens", kSlots = "slots";

namespace {

class Outliner {
public:
  explicit Outliner(func::FuncOp func) : func(func) {}
  LogicalResult run();

private:
  void replaceSizes();
  FailureOr<func::FuncOp> outline(StageOp stage, unsigned number);
  /// What an argument of the entry is, read from the frame.
  FailureOr<Value> argument(OpBuilder &b, Value frame, BlockArgument argument);
  FailureOr<Value> buffer(OpBuilder &b, Value frame, MemRefType type, StringRef role);
  Value field(OpBuilder &b, Value frame, size_t offset, Type type);
  Value address(OpBuilder &b, Value base, int64_t offset);
  void lowerClaims(Operation *root, Value frame);

  func::FuncOp func;
  Location loc{func.getLoc()};
  int64_t tails = 0;
};

} // namespace

Value Outliner::address(OpBuilder &b, Value base, int64_t offset) {
  if (!offset)
    return base;
  return LLVM::GEPOp::create(b, loc, base.getType(), b.getI8Type(), base,
                             ArrayRef<LLVM::GEPArg>{static_cast<int32_t>(offset)});
}

Value Outliner::field(OpBuilder &b, Value frame, size_t offset, Type type) {
  Value pointer = address(b, frame, static_cast<int64_t>(offset));
  if (!type.isIndex())
    return LLVM::LoadOp::create(b, loc, type, pointer, /*alignment=*/8);
  Value value = LLVM::LoadOp::create(b, loc, b.getI64Type(), pointer, /*alignment=*/8);
  return arith::IndexCastOp::create(b, loc, type, value);
}

/// A memref made of the frame's pointer, sizes and strides.
FailureOr<Value> Outliner::buffer(OpBuilder &b, Value frame, MemRefType type, StringRef role) {
  Type i64 = b.getI64Type();
  auto pointerType = LLVM::LLVMPointerType::get(b.getContext());
  size_t base;
  std::optional<size_t> stride;
  if (role == "workspace") {
    base = offsetof(moec_frame, workspace);
  } else if (role == "x") {
    base = offsetof(moec_frame, x);
    stride = offsetof(moec_frame, x_stride);
  } else if (role == "router_x") {
    base = offsetof(moec_frame, router_x);
    stride = offsetof(moec_frame, router_x_stride);
  } else if (role == "y") {
    base = offsetof(moec_frame, y);
    stride = offsetof(moec_frame, y_stride);
  } else if (role == "logits") {
    base = offsetof(moec_frame, logits);
    stride = offsetof(moec_frame, logits_stride);
  } else if (role == "experts") {
    base = offsetof(moec_frame, experts);
  } else if (role == "weights") {
    base = offsetof(moec_frame, expert_weights);
  } else if (role == "offsets") {
    base = offsetof(moec_frame, offsets);
  } else {
    return func.emitOpError("expected a buffer of the frame, but got moe.arg = \"") << role << "\"";
  }
  int64_t rank = type.getRank();
  auto constant = [&](int64_t value) -> Value {
    return LLVM::ConstantOp::create(b, loc, i64, b.getI64IntegerAttr(value));
  };
  SmallVector<Value> sizes, strides(rank);
  for (int64_t d = 0; d < rank; ++d) {
    if (!type.isDynamicDim(d))
      sizes.push_back(constant(type.getDimSize(d)));
    else if (role == "workspace")
      sizes.push_back(constant(std::numeric_limits<int64_t>::max()));
    else if (d == 0)
      sizes.push_back(field(b, frame, offsetof(moec_frame, tokens), i64));
    else
      sizes.push_back(field(b, frame, offsetof(moec_frame, slots), i64));
  }
  Value running = constant(1);
  for (int64_t d = rank - 1; d >= 0; --d) {
    strides[d] = running;
    if (d)
      running = LLVM::MulOp::create(b, loc, running, sizes[d]);
  }
  if (stride)
    strides[0] = field(b, frame, *stride, i64);
  auto arrayType = LLVM::LLVMArrayType::get(i64, rank);
  auto descriptor = LLVM::LLVMStructType::getLiteral(
      b.getContext(), {pointerType, pointerType, i64, arrayType, arrayType});
  Value result = LLVM::UndefOp::create(b, loc, descriptor);
  Value pointer = field(b, frame, base, pointerType);
  auto insert = [&](Value value, ArrayRef<int64_t> position) {
    result = LLVM::InsertValueOp::create(b, loc, result, value, position);
  };
  insert(pointer, 0);
  insert(pointer, 1);
  insert(constant(0), 2);
  for (int64_t d = 0; d < rank; ++d) {
    insert(sizes[d], {3, d});
    insert(strides[d], {4, d});
  }
  return UnrealizedConversionCastOp::create(b, loc, type, result).getResult(0);
}

FailureOr<Value> Outliner::argument(OpBuilder &b, Value frame, BlockArgument argument) {
  unsigned number = argument.getArgNumber();
  auto role = func.getArgAttrOfType<StringAttr>(number, MoEDialect::kArgAttrName);
  if (!role)
    return func.emitOpError("expected moe.arg on argument ") << number;
  if (auto type = dyn_cast<MemRefType>(argument.getType()))
    return buffer(b, frame, type, role);
  Type i64 = b.getI64Type();
  if (role == "accumulate" || role == "routed_only") {
    size_t offset =
        role == "accumulate" ? offsetof(moec_frame, accumulate) : offsetof(moec_frame, routed_only);
    Value flag = field(b, frame, offset, i64);
    Value zero = arith::ConstantIntOp::create(b, loc, 0, 64);
    return arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ne, flag, zero).getResult();
  }
  if (role == "lanes")
    return field(b, frame, offsetof(moec_frame, lanes), b.getIndexType());
  if (role == kTokens)
    return field(b, frame, offsetof(moec_frame, tokens), b.getIndexType());
  if (role == kSlots)
    return field(b, frame, offsetof(moec_frame, slots), b.getIndexType());
  if (role == "weight") {
    auto index = func.getArgAttrOfType<IntegerAttr>(number, MoEDialect::kWeightIndexAttrName);
    if (!index)
      return func.emitOpError("expected ")
             << MoEDialect::kWeightIndexAttrName << " on argument " << number;
    auto pointerType = LLVM::LLVMPointerType::get(b.getContext());
    Value table = field(b, frame, offsetof(moec_frame, weights), pointerType);
    Value pointer = LLVM::LoadOp::create(b, loc, pointerType, address(b, table, index.getInt() * 8),
                                         /*alignment=*/8);
    return UnrealizedConversionCastOp::create(b, loc, argument.getType(), pointer).getResult(0);
  }
  return func.emitOpError("expected a known moe.arg, but got \"") << role.getValue() << "\"";
}

void Outliner::lowerClaims(Operation *root, Value frame) {
  root->walk([&](ClaimOp claim) {
    OpBuilder b(claim);
    Value counter =
        address(b, frame,
                static_cast<int64_t>(offsetof(moec_frame, counters)) +
                    static_cast<int64_t>(claim.getCounter()) * 8 * int64_t(sizeof(int64_t)));
    Value count = arith::IndexCastOp::create(b, loc, b.getI64Type(), claim.getCount());
    // Tasks carry no data of each other: the order of the counter alone matters.
    Value old = LLVM::AtomicRMWOp::create(b, loc, LLVM::AtomicBinOp::add, counter, count,
                                          LLVM::AtomicOrdering::monotonic);
    claim.replaceAllUsesWith(arith::IndexCastOp::create(b, loc, b.getIndexType(), old).getResult());
    claim.erase();
  });
}

/// Sizes of the frame's buffers are numbers of the frame, whichever buffer they were asked of. A
/// stage that needs only the size of y is then the same function for every type of y.
void Outliner::replaceSizes() {
  OpBuilder b(func.getContext());
  auto number = [&, known = llvm::StringMap<Value>()](StringRef role) mutable {
    Value &value = known[role];
    if (!value) {
      unsigned position = func.getNumArguments();
      auto attributes =
          b.getDictionaryAttr(b.getNamedAttr(MoEDialect::kArgAttrName, b.getStringAttr(role)));
      (void)func.insertArgument(position, b.getIndexType(), attributes, loc);
      value = func.getArgument(position);
    }
    return value;
  };
  func.walk([&](memref::DimOp dim) {
    auto argument = dyn_cast<BlockArgument>(dim.getSource());
    if (!argument || argument.getOwner() != &func.getBody().front() || !dim.getConstantIndex() ||
        !cast<MemRefType>(argument.getType()).isDynamicDim(*dim.getConstantIndex()))
      return;
    auto role =
        func.getArgAttrOfType<StringAttr>(argument.getArgNumber(), MoEDialect::kArgAttrName);
    if (!role || role == "workspace")
      return;
    dim.replaceAllUsesWith(number(*dim.getConstantIndex() == 0 ? kTokens : kSlots));
    dim.erase();
  });
}

FailureOr<func::FuncOp> Outliner::outline(StageOp stage, unsigned number) {
  loc = stage.getLoc();
  OpBuilder b(func);
  Type i32 = b.getI32Type();
  auto pointerType = LLVM::LLVMPointerType::get(b.getContext());
  std::string name = (func.getSymName() + "_stage" + Twine(number)).str();
  auto outlined =
      func::FuncOp::create(b, loc, name, b.getFunctionType({pointerType, i32, i32}, {}));
  auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
  const CPULevel *level = findCPULevel(target.getLevel());
  if (!level)
    return func.emitOpError("expected a known level, but got `") << target.getLevel() << "`";
  setTargetAttributes(outlined, *level);
  outlined->setAttr("stage", stage.getLabelAttr());
  Block *block = outlined.addEntryBlock();
  b.setInsertionPointToStart(block);
  Value frame = block->getArgument(0);
  Value lane = arith::IndexCastOp::create(b, loc, b.getIndexType(), block->getArgument(1));
  Value lanes = arith::IndexCastOp::create(b, loc, b.getIndexType(), block->getArgument(2));

  // Everything from outside, computed again from the frame.
  llvm::SetVector<Value> captured;
  getUsedValuesDefinedAbove(stage->getRegions(), captured);
  IRMapping mapping;
  bool failedArgument = false;
  for (Value value : captured) {
    FailureOr<Value> copy = cloneSlice(b, value, mapping, [&](Value leaf) -> Value {
      auto blockArgument = dyn_cast<BlockArgument>(leaf);
      if (!blockArgument)
        return nullptr;
      FailureOr<Value> made = argument(b, frame, blockArgument);
      failedArgument |= failed(made);
      return failed(made) ? Value() : *made;
    });
    if (failed(copy) || failedArgument)
      return failure();
  }
  mapping.map(stage.getLane(), lane);
  mapping.map(stage.getLanes(), lanes);
  auto inlineOps = [&](Region &region) {
    for (Operation &op : region.front().without_terminator())
      b.clone(op, mapping);
  };
  inlineOps(stage.getBody());
  if (!stage.getTail().empty()) {
    // The last counters count the lanes that have finished a body. Release what this lane wrote,
    // acquire what the others did.
    int64_t counter = MOEC_COUNTERS - 1 - tails++;
    Value finished = address(b, frame,
                             static_cast<int64_t>(offsetof(moec_frame, counters)) +
                                 counter * 8 * int64_t(sizeof(int64_t)));
    Value one = LLVM::ConstantOp::create(b, loc, b.getI64Type(), b.getI64IntegerAttr(1));
    Value before = LLVM::AtomicRMWOp::create(b, loc, LLVM::AtomicBinOp::add, finished, one,
                                             LLVM::AtomicOrdering::acq_rel);
    Value all = arith::IndexCastOp::create(b, loc, b.getI64Type(), lanes);
    Value last = arith::SubIOp::create(b, loc, all, one);
    Value isLast = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::eq, before, last);
    auto guard = scf::IfOp::create(b, loc, isLast, /*withElseRegion=*/false);
    OpBuilder::InsertionGuard insertion(b);
    b.setInsertionPoint(guard.thenBlock()->getTerminator());
    inlineOps(stage.getTail());
  }
  b.setInsertionPointToEnd(block);
  func::ReturnOp::create(b, loc);
  lowerClaims(outlined, frame);
  return outlined;
}

LogicalResult Outliner::run() {
  auto workspace = func->getAttrOfType<FlatSymbolRefAttr>(MoEDialect::kWorkspaceAttrName);
  if (!workspace)
    return func.emitOpError("expected attribute ")
           << MoEDialect::kWorkspaceAttrName << "; run moe-cpu-plan-workspace first";
  replaceSizes();
  SmallVector<Attribute> stages;
  for (StageOp stage : func.getOps<StageOp>()) {
    FailureOr<func::FuncOp> outlined = outline(stage, stages.size());
    if (failed(outlined))
      return failure();
    stages.push_back(FlatSymbolRefAttr::get(*outlined));
  }
  if (stages.empty() || stages.size() > MOEC_MAX_STAGES)
    return func.emitOpError("expected 1 to ")
           << MOEC_MAX_STAGES << " stages, but got " << stages.size();
  OpBuilder b(func);
  CodeOp::create(b, func.getLoc(), func.getSymNameAttr(), b.getArrayAttr(stages), workspace);
  func.erase();
  return success();
}

namespace {
struct OutlineStagesPass : public mlir::moe::impl::MoECPUOutlineStagesBase<OutlineStagesPass> {
  void runOnOperation() override {
    for (auto func : llvm::to_vector(getOperation().getOps<func::FuncOp>()))
      if (func->hasAttr(MoEDialect::kTargetAttrName) && failed(Outliner(func).run()))
        return signalPassFailure();
  }
};
} // namespace
