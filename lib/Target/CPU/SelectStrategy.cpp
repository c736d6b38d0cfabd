//===- SelectStrategy.cpp - the schedule of every matmul ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/CostModel.h"
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
  int64_t rows = 0, panels = 0, prefetch = 0, ahead = 0, kBlock = 0, defer = 0, chunkRows = 0,
          panelsPerTask = 0, sumRows = 4096, kChunk = 0;
  LoadHint hint = LoadHint::Near;
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

/// Columns of k of a chunk of k: at 2048 the rows of a chunk of 256 are 1 MB of bf16.
static constexpr int64_t kOuterColumns = 2048;

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

/// The cheapest tile by the model; of equal ones the one of fewer panels.
static std::pair<int64_t, int64_t> cheapestTile(const CPULevel &level, KernelProduct product,
                                                const CostModel &model) {
  if (product == KernelProduct::TileBF16)
    return {model.compute(16, 1) < model.compute(32, 1) ? 16 : 32, 1};
  std::pair<int64_t, int64_t> best = {1, 1};
  double least = model.compute(1, 1);
  for (int64_t panels = 1; panels <= UkernelAttr::getMaxPanels(level.name); ++panels) {
    int64_t vectors = UkernelAttr::getVectorsPerRow(level.name, panels, product);
    for (int64_t rows = 1; rows <= mostRows(level, vectors); ++rows)
      if (double time = model.compute(rows, panels); time < least * 0.999) {
        least = time;
        best = {rows, panels};
      }
  }
  return best;
}

/// Rows and groups of k of a chunk: as many rows as fit in L2, at least four blocks, with all of k
/// or with chunks of it, whichever takes less. `given`: rows that are chosen already; 0: none.
static void chooseChunk(Fields &fields, const CostModel &model, int64_t given) {
  auto rowsThatFit = [&](int64_t groups) {
    int64_t fit = model.core().l2Bytes / (groups * 64);
    fit = std::clamp<int64_t>(fit, 4 * fields.rows, 512);
    // A whole number of blocks, so that no chunk ends in a thin one.
    return fit / fields.rows * fields.rows;
  };
  int64_t groups = model.groups(), outer = kOuterColumns / model.groupColumns();
  fields.chunkRows = given ? given : rowsThatFit(groups);
  if (fields.product == KernelProduct::FmaF64 || fields.panels != 1 || outer >= groups)
    return;
  int64_t rows = given ? given : rowsThatFit(outer);
  // Vectors do without chunks of k: their blocks read the rows once for all panels of a task, and
  // to keep and fetch their sums costs more (Zen 4, K = 4096 and 14336: 2 %). Larger chunks pay.
  int64_t kChunk = fields.product == KernelProduct::TileBF16 ? outer : 0;
  if (model.total(fields.rows, fields.panels, rows, kChunk, fields.panelsPerTask) <
      model.total(fields.rows, fields.panels, fields.chunkRows, 0, fields.panelsPerTask)) {
    fields.chunkRows = rows;
    fields.kChunk = kChunk;
  }
}

/// The cheapest by the formulas of CostModel.h. What no formula says: four panels of a task share
/// one pass over the rows (eight where the sums of tokens are kept), and the order of tasks, which
/// is chunks of rows, and in them panels, so that a lane's packed rows serve all its tasks.
static Fields defaults(const CPULevel &level, WeightType weight, bool combine,
                       KernelProduct product, const CoreConstants &core, int64_t chunkRows) {
  CostModel model(level.name, product, weight, core);
  Fields fields;
  fields.product = product;
  std::tie(fields.rows, fields.panels) = cheapestTile(level, product, model);
  fields.prefetch = model.prefetch();
  fields.panelsPerTask = std::min<int64_t>(combine ? 8 : 4, weight.panelCount());
  fields.panelsPerTask = std::max(fields.panelsPerTask / fields.panels, int64_t(1)) * fields.panels;
  // Sums of a task's tokens may take twice L2: they are touched before they are wanted, and every
  // panel more reads the rows once less (Zen 4, T = 2048: 5 % of the layer).
  if (combine)
    fields.sumRows = model.core().l2Bytes * 2 / 128;
  chooseChunk(fields, model, chunkRows);
  if (product == KernelProduct::TileBF16) {
    fields.hint = LoadHint::Stream;
    // Where a block computes for less time than its weights take to arrive, several have to touch
    // what comes later. (Vectors gain nothing from it: measured on Zen 4.)
    if (model.balance() > double(fields.rows))
      fields.ahead = combine && weight.getExperts() == 1 ? 0 : 8;
    // Two thirds of L1 hold a part of the panel (2 KB for 32 k) while the blocks of a chunk pass;
    // parts of nearly equal size.
    int64_t groups = fields.kChunk ? fields.kChunk : model.groups();
    int64_t fit = std::max<int64_t>(1, model.core().l1Bytes * 2 / 3 / 2048);
    int64_t parts = llvm::divideCeil(groups, fit);
    fields.kBlock = llvm::divideCeil(groups, parts);
    if (fields.kChunk) // whole parts
      while (fields.kChunk % fields.kBlock)
        --fields.kBlock;
    int64_t last = (model.groups() - 1) % fields.kBlock + 1;
    if (fields.rows == 32)
      fields.defer = std::min<int64_t>(8, llvm::divideCeil(32, last));
  }
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
    if (name == "hint") {
      auto hint = value.getAsString();
      auto symbol = hint ? symbolizeLoadHint(*hint) : std::nullopt;
      if (!symbol)
        return op->emitOpError("expected strategy field `hint` to be \"near\" or \"stream\", but "
                               "got another value");
      fields.hint = *symbol;
      continue;
    }
    int64_t *field = llvm::StringSwitch<int64_t *>(name)
                         .Case("rows", &fields.rows)
                         .Case("panels", &fields.panels)
                         .Case("prefetch", &fields.prefetch)
                         .Case("ahead", &fields.ahead)
                         .Case("k_block", &fields.kBlock)
                         .Case("defer", &fields.defer)
                         .Case("chunk_rows", &fields.chunkRows)
                         .Case("sum_rows", &fields.sumRows)
                         .Case("k_chunk", &fields.kChunk)
                         .Case("panels_per_task", &fields.panelsPerTask)
                         .Default(nullptr);
    if (!field)
      return op->emitOpError("expected a strategy field (rows, panels, order, prefetch, ahead, "
                             "k_block, hint, defer, chunk_rows, panels_per_task, sum_rows, "
                             "k_chunk), but got `")
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
  auto kernel = UkernelAttr::getChecked(emit, &getContext(), level.name, fields.rows, fields.panels,
                                        order, fields.prefetch, fields.product, fields.ahead,
                                        fields.kBlock, fields.hint, fields.defer);
  if (!kernel)
    return failure();
  auto strategy =
      StrategyAttr::getChecked(emit, &getContext(), kernel, fields.chunkRows, fields.panelsPerTask,
                               source, result, fields.sumRows, fields.kChunk);
  if (!strategy)
    return failure();
  return strategy;
}

LogicalResult SelectStrategyPass::select(func::FuncOp func, const CPULevel &level) {
  StringRef function = func.getSymName();
  unsigned number = 0;
  CoreConstants core{double(fma256), double(fma512), double(dot), double(tile),
                     double(read),   l1Bytes,        l2Bytes};
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
      // The matmuls of one group walk the same list of chunks and, where the rows between them
      // stay in blocks, the same blocks. Combines of one chain walk the same panels.
      auto shared = offsets ? groups.find(offsets) : groups.end();
      Fields fields = defaults(level, weight, combine, product, core,
                               shared != groups.end() ? shared->second.chunkRows : 0);
      if (before) {
        fields.panels = before.getUkernel().getPanels();
        fields.panelsPerTask = before.getPanelsPerTask();
        fields.sumRows = before.getSumRows();
      }
      const Fields chosen = fields;
      if (failed(changes.visit(op, function, name.str(), [&](const llvm::json::Object &change) {
            return apply(op, change, fields);
          })))
        return failure();
      // What follows from a field that was changed follows it.
      if (fields.kBlock == chosen.kBlock && fields.panels != 1)
        fields.kBlock = 0;
      if (fields.defer == chosen.defer && (fields.rows != 32 || !fields.kBlock))
        fields.defer = 0;
      if (fields.kChunk == chosen.kChunk && (!fields.kBlock || fields.kChunk % fields.kBlock))
        fields.kChunk = 0;
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
