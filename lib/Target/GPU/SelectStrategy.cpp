//===- SelectStrategy.cpp - target and tiles of GPU code ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Layer.h"
#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/GPU/Arch.h"
#include "moe/Target/GPU/Passes.h"
#include "moe/Target/StrategyOverrides.h"

#include "mlir/AsmParser/AsmParser.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "llvm/Support/MathExtras.h"

#include <cmath>

namespace mlir::moe {
#define GEN_PASS_DEF_MOEGPUATTACHTARGET
#define GEN_PASS_DEF_MOEGPUSELECTSTRATEGY
#include "moe/Target/GPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

static const GPUArch *checkArch(Operation *op, StringRef name) {
  const GPUArch *arch = findGPUArch(name);
  if (!arch) {
    op->emitError("expected a GPU architecture (")
        << implementedArchNames() << "), but got `" << name << "`";
    return nullptr;
  }
  if (!arch->implemented) {
    op->emitError("expected a GPU architecture that is built (")
        << implementedArchNames() << "), but got `" << name << "`: " << arch->refusal;
    return nullptr;
  }
  return arch;
}

//===----------------------------------------------------------------------===//
// Target
//===----------------------------------------------------------------------===//

namespace {
struct AttachTargetPass : public mlir::moe::impl::MoEGPUAttachTargetBase<AttachTargetPass> {
  using MoEGPUAttachTargetBase::MoEGPUAttachTargetBase;

  void runOnOperation() override {
    SmallVector<const GPUArch *> chosen;
    if (levels.empty())
      chosen.push_back(findGPUArch("sm_80"));
    for (const std::string &name : levels) {
      const GPUArch *found = checkArch(getOperation(), name);
      if (!found)
        return signalPassFailure();
      if (!llvm::is_contained(chosen, found))
        chosen.push_back(found);
    }
    // Whatever the order of the option, so that the output does not depend on it.
    llvm::sort(chosen, [](auto *a, auto *b) { return a->rank < b->rank; });
    Type bf16 = BFloat16Type::get(&getContext());
    SmallVector<Attribute> targets =
        llvm::map_to_vector(chosen, [&](const GPUArch *a) -> Attribute {
          return TargetAttr::get(&getContext(), Device::CUDA, a->name);
        });
    getOperation()->setAttr("moe.targets", ArrayAttr::get(&getContext(), targets));
    for (auto func : getOperation().getOps<func::FuncOp>()) {
      if (!func->hasAttr(MoEDialect::kEntryAttrName))
        continue;
      auto compute = func->getAttrOfType<TypeAttr>(MoEDialect::kComputeAttrName);
      if (!compute || compute.getValue() != bf16) {
        auto error = func.emitOpError("expected moe.compute = bf16 for a GPU, but got ");
        compute ? error << compute.getValue() : error << "none";
        return signalPassFailure();
      }
      if (targets.size() == 1)
        func->setAttr(MoEDialect::kTargetAttrName, targets.front());
      func.walk([&](GroupedMatmulOp op) {
        Type rows = cast<ShapedType>(op.getRows().getType()).getElementType();
        if (!op.getRowTypeAttr() && rows != bf16)
          op.setRowTypeAttr(TypeAttr::get(bf16));
      });
    }
  }
};
} // namespace

//===----------------------------------------------------------------------===//
// Cost
//===----------------------------------------------------------------------===//

/// The tiles that are worth building: few rows, some, many. Of few rows also narrow ones: where
/// experts are few, wide ones would leave processors without work, and what a processor has in
/// flight is what it gets from memory. 128 rows keep the tensor cores busy with two blocks a
/// processor.
static SmallVector<GPUTileAttr> candidates(MLIRContext *context, const GPUArch &arch) {
  // Warpgroups: one unit for all numbers of rows, so that a token's bits do not depend on it. Rings
  // as long as shared memory is.
  if (arch.rank >= 90) {
    auto tile = [&](int64_t rows, int64_t stages) {
      return GPUTileAttr::get(context, /*cols=*/128, rows, /*k=*/64, stages, /*warps_cols=*/8,
                              /*warps_rows=*/1, GPURaster::Rows, /*up_to=*/0, GPUUnit::Wgmma);
    };
    return {tile(8, 8), tile(32, 8), tile(64, 8), tile(128, 6), tile(256, 4)};
  }
  auto tile = [&](int64_t cols, int64_t rows, int64_t k, int64_t stages, int64_t warpsRows) {
    return GPUTileAttr::get(context, cols, rows, k, stages, /*warps_cols=*/cols / 32, warpsRows,
                            GPURaster::Rows, /*up_to=*/0);
  };
  return {tile(32, 8, 64, 8, 1), tile(64, 8, 64, 8, 1), tile(128, 8, 64, 4, 1),
          tile(128, 32, 64, 4, 1), tile(128, 128, 32, 4, 2)};
}

/// Cycles of a grouped matmul of `rows` rows that are spread evenly over the experts. A model that
/// ranks tiles: what a processor with so many blocks at once does in a step of the ring, against
/// what memory has to deliver.
static double cycles(const GPUArch &arch, WeightType weight, GPUTileAttr tile, double rows) {
  double experts = weight.getExperts();
  // How many experts have a row at all.
  double active = experts * (1 - std::pow(1 - 1 / experts, rows));
  double rowTiles = active * std::ceil(rows / active / tile.getRows());
  double tiles = rowTiles * std::ceil(double(weight.panelCount()) * 32 / double(tile.getCols()));
  double steps = std::ceil(double(weight.paddedCols()) / double(tile.getK()));
  // Blocks at once on a processor that has work: as many as fit, and as there are.
  double fit = std::min({double(arch.sharedPerProcessor) / double(tile.getSharedBytes()),
                         65536.0 / double(tile.getRegisters() * tile.getThreads()), 16.0});
  double together =
      std::clamp(std::ceil(tiles / double(arch.processors)), 1.0, std::max(1.0, std::floor(fit)));
  double work = double(tile.getCols()) * double(tile.getRows()) * double(tile.getK());
  double bytes = double(tile.getWeightBytes() + tile.getRowBytes());
  // A block waits for the oldest of the steps that it has in flight, and works through its own
  // instructions; blocks hide each other's waiting, not each other's work.
  double alone =
      std::max(arch.latency / double(tile.getStages() - 1), 40 + double(tile.getK()) * 3);
  double step =
      std::max({alone, together * work / arch.mmaPerCycle, together * bytes / arch.l2PerCycle});
  double rounds = std::max(1.0, tiles / (double(arch.processors) * together));
  double onChip = rounds * (3000 + steps * step);
  double memory = active * double(weight.panelCount() * weight.panelBytes()) / arch.memoryPerCycle /
                  double(arch.processors);
  // Where memory decides, a tile that has less to do still leaves more time to be late.
  return std::max(onChip, memory) + 0.1 * onChip;
}

static ArrayAttr chooseTiles(const GPUArch &arch, WeightType weight) {
  MLIRContext *context = weight.getContext();
  SmallVector<GPUTileAttr> all = candidates(context, arch);
  // The best by powers of two, never back to fewer rows; a tile stays while it is nearly as good,
  // since each is a kernel.
  SmallVector<std::pair<unsigned, int64_t>> ranges; // candidate, largest number of rows
  for (int64_t rows = 1; rows <= (int64_t(1) << 20); rows *= 2) {
    unsigned last = ranges.empty() ? 0 : ranges.back().first, best = last;
    double least = cycles(arch, weight, all[last], rows) * (ranges.empty() ? 1 : 0.98);
    for (unsigned i = 0; i < all.size(); ++i)
      if (double each = cycles(arch, weight, all[i], rows);
          all[i].getRows() >= all[last].getRows() && each < least) {
        best = i;
        least = each;
      }
    if (ranges.empty() || last != best)
      ranges.push_back({best, rows});
    else
      ranges.back().second = rows;
  }
  SmallVector<Attribute> tiles;
  for (auto [i, range] : llvm::enumerate(ranges)) {
    GPUTileAttr t = all[range.first];
    int64_t upTo = i + 1 == ranges.size() ? 0 : range.second;
    tiles.push_back(GPUTileAttr::get(context, t.getCols(), t.getRows(), t.getK(), t.getStages(),
                                     t.getWarpsCols(), t.getWarpsRows(), t.getRaster(), upTo,
                                     t.getUnit()));
  }
  return ArrayAttr::get(context, tiles);
}

/// gpu_tiles and gpu_combine as the manifest writes them.
static LogicalResult applyChange(GroupedMatmulOp op, const llvm::json::Object &change) {
  MLIRContext *context = op.getContext();
  for (const auto &[key, value] : change) {
    if (StringRef(key) == kGPUCombineAttrName) {
      auto text = value.getAsString();
      if (!text || (*text != "ordered" && *text != "atomic"))
        return op.emitOpError("expected strategy field `gpu_combine` to be \"ordered\" or "
                              "\"atomic\", but got another value");
      if (!op.getCombinePair())
        return op.emitOpError(
            "expected strategy field `gpu_combine` on a matmul that combines rows "
            "of experts, but got another");
      op->setAttr(kGPUCombineAttrName, StringAttr::get(context, *text));
      continue;
    }
    const llvm::json::Array *list = value.getAsArray();
    if (StringRef(key) != kGPUTilesAttrName || !list)
      return op.emitOpError("expected a strategy field (gpu_tiles: a list, gpu_combine), but got `")
             << StringRef(key) << "`";
    SmallVector<Attribute> tiles;
    for (const llvm::json::Value &item : *list) {
      auto text = item.getAsString();
      // Its verifier says what is wrong with a tile.
      Attribute tile = text ? parseAttribute(*text, context) : Attribute();
      if (!isa_and_nonnull<GPUTileAttr>(tile))
        return op.emitOpError("expected strategy field `gpu_tiles` to list tiles as "
                              "\"#moe.gpu_tile<...>\", but got another value");
      tiles.push_back(tile);
    }
    op->setAttr(kGPUTilesAttrName, ArrayAttr::get(context, tiles));
  }
  return success();
}

namespace {
struct SelectStrategyPass : public mlir::moe::impl::MoEGPUSelectStrategyBase<SelectStrategyPass> {
  using MoEGPUSelectStrategyBase::MoEGPUSelectStrategyBase;

  void runOnOperation() override {
    StrategyOverrides changes;
    if (failed(changes.read(getOperation(), overrides)))
      return signalPassFailure();
    for (auto func : getOperation().getOps<func::FuncOp>()) {
      auto target = func->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName);
      if (!target || target.getDevice() != Device::CUDA)
        continue;
      const GPUArch *arch = checkArch(func, target.getLevel());
      if (!arch)
        return signalPassFailure();
      unsigned number = 0;
      WalkResult walk = func.walk([&](GroupedMatmulOp op) {
        std::string name = "grouped_matmul." + std::to_string(number++);
        if (isGate(op))
          return WalkResult::advance();
        if (!op->hasAttr(kGPUTilesAttrName))
          op->setAttr(kGPUTilesAttrName, chooseTiles(*arch, op.getWeightType()));
        return WalkResult(
            changes.visit(op, func.getSymName(), name, [&](const llvm::json::Object &change) {
              return applyChange(op, change);
            }));
      });
      if (walk.wasInterrupted())
        return signalPassFailure();
    }
    if (failed(changes.checkAllUsed(getOperation())))
      return signalPassFailure();
  }
};
} // namespace
