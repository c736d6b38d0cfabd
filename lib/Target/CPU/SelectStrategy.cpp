//===- SelectStrategy.cpp - the schedule of every matmul ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/CPU/Passes.h"
#include "moe/Target/StrategyOverrides.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "llvm/Support/MemoryBuffer.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOESELECTSTRATEGY
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

/// The fields of a strategy that a person can change.
struct Fields {
  int64_t rows = 0, panels = 0, prefetch = 0, ahead = 0, kBlock = 0, chunkRows = 0,
          panelsPerTask = 0;
  std::optional<KernelOrder> order;           // not said: the one with fewer live registers
  KernelProduct product = KernelProduct::Fma; // not to be changed: it decides the bits
};

struct SelectStrategyPass : public mlir::moe::impl::MoESelectStrategyBase<SelectStrategyPass> {
  using MoESelectStrategyBase::MoESelectStrategyBase;

  void runOnOperation() override;

private:
  LogicalResult readOverrides();
  LogicalResult apply(Operation *op, const llvm::json::Object &changes, Fields &fields);
  LogicalResult select(func::FuncOp func, const CPULevel &level);
  FailureOr<StrategyAttr> build(Operation *op, const CPULevel &level, const Fields &fields,
                                RowSource source, ResultForm result);

  StrategyOverrides changes;
};

} // namespace

/// The order that needs fewer registers: with fewer rows than vectors, rows are broadcast first.
static KernelOrder bestOrder(int64_t rows, int64_t vectors) {
  return rows < vectors ? KernelOrder::AFirst : KernelOrder::BFirst;
}

/// Rows that the register file allows for `vectors` accumulators a row.
static int64_t mostRows(const CPULevel &level, int64_t vectors) {
  int64_t rows = 0;
  while (UkernelAttr::getRegistersNeeded(rows + 1, vectors, bestOrder(rows + 1, vectors)) <=
         int64_t(level.vectorRegisters))
    ++rows;
  return rows;
}

/// The instruction of a matmul's products: it follows from the level and the types alone.
static KernelProduct productOf(GroupedMatmulOp matmul, const CPULevel &level) {
  Type rows =
      matmul.getRowType() ? *matmul.getRowType() : getElementTypeOrSelf(matmul.getRows().getType());
  auto format = dyn_cast<FormatAttr>(matmul.getWeightType().getFormat());
  bool bf16 = rows.isBF16() && format && format.getValue() == PlainFormat::BF16;
  if (!level.bf16Products || !bf16)
    return KernelProduct::Fma;
  return level.tiles ? KernelProduct::TileBF16 : KernelProduct::DotBF16;
}

/// Sums of a router with f32 weights are f64: what a logit is off, a weight is off relatively, and
/// logits grow large. Products of bf16 weights are short; their model rounds far more than the sum.
static KernelProduct routerProduct(WeightType weight) {
  auto format = dyn_cast<FormatAttr>(weight.getFormat());
  return format && format.getValue() == PlainFormat::F32 ? KernelProduct::FmaF64
                                                         : KernelProduct::Fma;
}

/// Defaults by level and shape. The reasons are measurements: a block as tall as the registers
/// allow reads every weight once per 14 (or 3) rows; chunks keep the packed rows of a lane in
/// `l2Bytes` of L2; four panels a task share one pass over the rows.
static Fields defaults(const CPULevel &level, WeightType weight, bool combine,
                       KernelProduct product, int64_t l2Bytes) {
  Fields fields;
  fields.product = product;
  fields.panels = 1;
  int64_t vectors = UkernelAttr::getVectorsPerRow(level.name, fields.panels, product);
  fields.rows = product == KernelProduct::TileBF16 ? 32 : mostRows(level, vectors);
  fields.prefetch = 1024;
  // Vectors gain nothing from touching the next task's weights (measured on Zen 4). Tiles compute
  // faster than memory delivers: a third of their time at 64 to 128 rows.
  if (product == KernelProduct::TileBF16) {
    fields.ahead = combine && weight.getExperts() == 1 ? 0 : 8;
    // 32 KB of a panel stay in the first cache while the blocks of a chunk pass.
    if (weight.getCols() > 16 * 32)
      fields.kBlock = 16;
  }
  int64_t elementBytes = UkernelAttr::readsPairs(product) ? 2 : 4;
  int64_t fit = l2Bytes / (elementBytes * weight.getCols());
  fit = std::clamp<int64_t>(fit, 4 * fields.rows, 512);
  // A whole number of blocks, so that no chunk ends in a thin one.
  fields.chunkRows = fit / fields.rows * fields.rows;
  fields.panelsPerTask = std::min<int64_t>(combine ? 8 : 4, weight.panelCount());
  return fields;
}

LogicalResult SelectStrategyPass::readOverrides() {
  if (overridesFile.empty())
    return changes.read(getOperation(), overrides);
  auto file = llvm::MemoryBuffer::getFile(overridesFile, /*IsText=*/true);
  if (!file)
    return getOperation().emitError("expected a readable strategy file `")
           << overridesFile << "`, but got: " << file.getError().message();
  return changes.read(getOperation(), (*file)->getBuffer());
}

LogicalResult SelectStrategyPass::apply(Operation *op, const llvm::json::Object &changes,
                                        Fields &fields) {
  for (const auto &[key, value] : changes) {
    StringRef name = key;
    if (name == "order") {
      auto order = value.getAsString();
      auto symbol = order ? symbolizeKernelOrder(*order) : std::nullopt;
      if (!symbol)
        return op->emitOpError("expected strategy field `order` to be \"b_first\" or "
                               "\"a_first\", but got another value");
      fields.order = *symbol;
      continue;
    }
    int64_t *field = llvm::StringSwitch<int64_t *>(name)
                         .Case("rows", &fields.rows)
                         .Case("panels", &fields.panels)
                         .Case("prefetch", &fields.prefetch)
                         .Case("ahead", &fields.ahead)
                         .Case("k_block", &fields.kBlock)
                         .Case("chunk_rows", &fields.chunkRows)
                         .Case("panels_per_task", &fields.panelsPerTask)
                         .Default(nullptr);
    if (!field)
      return op->emitOpError("expected a strategy field (rows, panels, order, prefetch, "
                             "ahead, k_block, chunk_rows, panels_per_task), but got `")
             << name << "`";
    auto number = value.getAsInteger();
    if (!number)
      return op->emitOpError("expected strategy field `")
             << name << "` to be an integer, but got another value";
    *field = *number;
  }
  return success();
}

FailureOr<StrategyAttr> SelectStrategyPass::build(Operation *op, const CPULevel &level,
                                                  const Fields &fields, RowSource source,
                                                  ResultForm result) {
  auto emit = [&] { return op->emitOpError("illegal strategy: "); };
  int64_t vectors = UkernelAttr::getVectorsPerRow(level.name, fields.panels, fields.product);
  KernelOrder order = fields.order.value_or(bestOrder(fields.rows, vectors));
  auto kernel =
      UkernelAttr::getChecked(emit, &getContext(), level.name, fields.rows, fields.panels, order,
                              fields.prefetch, fields.product, fields.ahead, fields.kBlock);
  if (!kernel)
    return failure();
  auto strategy = StrategyAttr::getChecked(emit, &getContext(), kernel, fields.chunkRows,
                                           fields.panelsPerTask, source, result);
  if (!strategy)
    return failure();
  return strategy;
}

LogicalResult SelectStrategyPass::select(func::FuncOp func, const CPULevel &level) {
  StringRef function = func.getSymName();
  unsigned number = 0;
  // What the matmuls of one group of rows have in common.
  struct Shared {
    int64_t chunkRows, blockRows;
  };
  DenseMap<Value, Shared> groups;
  WalkResult walk = func.walk([&](Operation *op) {
    StrategyAttr strategy;
    auto choose = [&](WeightType weight, const Twine &name, RowSource source, ResultForm result,
                      bool combine, Value offsets, StrategyAttr before,
                      KernelProduct product = KernelProduct::Fma) -> LogicalResult {
      Fields fields = defaults(level, weight, combine, product, l2Bytes);
      // The matmuls of one group walk the same list of chunks and, where the rows between them
      // stay in blocks, the same blocks. Combines of one chain walk the same panels.
      auto shared = offsets ? groups.find(offsets) : groups.end();
      if (shared != groups.end())
        fields.chunkRows = shared->second.chunkRows;
      if (before) {
        fields.panels = before.getUkernel().getPanels();
        fields.panelsPerTask = before.getPanelsPerTask();
      }
      if (failed(changes.visit(op, function, name.str(), [&](const llvm::json::Object &change) {
            return apply(op, change, fields);
          })))
        return failure();
      if (shared != groups.end()) {
        auto [chunkRows, blockRows] = shared->second;
        if (fields.chunkRows != chunkRows)
          return op->emitOpError("illegal strategy: expected chunk_rows ")
                 << chunkRows << " as in the matmul before it, but got " << fields.chunkRows;
        if (source == RowSource::Blocked && fields.rows != blockRows)
          return op->emitOpError("illegal strategy: expected rows ")
                 << blockRows << " as in the matmul that wrote the blocks, but got " << fields.rows;
      }
      if (before && (fields.panels != before.getUkernel().getPanels() ||
                     fields.panelsPerTask != before.getPanelsPerTask()))
        return op->emitOpError("illegal strategy: expected panels ")
               << before.getUkernel().getPanels() << " and panels_per_task "
               << before.getPanelsPerTask() << " as in the combine before it, but got "
               << fields.panels << " and " << fields.panelsPerTask;
      if (offsets)
        groups[offsets] = {fields.chunkRows, fields.rows};
      FailureOr<StrategyAttr> built = build(op, level, fields, source, result);
      if (failed(built))
        return failure();
      strategy = *built;
      return success();
    };
    LogicalResult result = success();
    auto chooseRouter = [&](auto router) {
      WeightType weight = router.getWeight().getType();
      result = choose(weight, "router", RowSource::Rows, ResultForm::Rows, /*combine=*/false,
                      /*offsets=*/Value(), /*before=*/StrategyAttr(), routerProduct(weight));
      if (succeeded(result))
        router.setStrategyAttr(strategy);
    };
    if (auto router = dyn_cast<RouterOp>(op)) {
      chooseRouter(router);
    } else if (auto router = dyn_cast<RouteDispatchOp>(op)) {
      chooseRouter(router);
    } else if (auto matmul = dyn_cast<GroupedMatmulOp>(op)) {
      RowSource source = RowSource::Rows;
      if (matmul.hasVia())
        source = RowSource::Gather;
      else if (auto producer = matmul.getRows().getDefiningOp<GroupedMatmulOp>())
        if (producer.getStrategyAttr() &&
            producer.getStrategyAttr().getResult() == ResultForm::Blocked)
          source = RowSource::Blocked;
      // Row blocks suit a reader that is a matmul on the same rows; anything else wants rows.
      ResultForm form = ResultForm::Rows;
      if (matmul.hasCombine()) {
        form = ResultForm::Combine;
      } else if (matmul.hasEpilogue() && matmul->getResult(0).hasOneUse()) {
        auto reader = dyn_cast<GroupedMatmulOp>(*matmul->getResult(0).user_begin());
        if (reader && reader.getRows() == matmul->getResult(0) && !reader.hasVia())
          form = ResultForm::Blocked;
      }
      GroupedMatmulOp before;
      if (matmul.getStart())
        before = matmul.getStart().getDefiningOp<GroupedMatmulOp>();
      result = choose(matmul.getWeightType(), "grouped_matmul." + Twine(number++), source, form,
                      matmul.hasCombine(), matmul.getOffsets(),
                      before ? before.getStrategyAttr() : StrategyAttr(), productOf(matmul, level));
      if (succeeded(result))
        matmul.setStrategyAttr(strategy);
    }
    return failed(result) ? WalkResult::interrupt() : WalkResult::advance();
  });
  return failure(walk.wasInterrupted());
}

void SelectStrategyPass::runOnOperation() {
  if (failed(readOverrides()))
    return signalPassFailure();
  for (auto func : getOperation().getOps<func::FuncOp>()) {
    auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
    if (!target)
      continue;
    const CPULevel *level = findCPULevel(target.getLevel());
    if (!level || !level->implemented) {
      func.emitOpError("expected level ")
          << implementedLevelNames() << ", but got `" << target.getLevel() << "`";
      return signalPassFailure();
    }
    if (failed(select(func, *level)))
      return signalPassFailure();
  }
  if (failed(changes.checkAllUsed(getOperation())))
    signalPassFailure();
}
