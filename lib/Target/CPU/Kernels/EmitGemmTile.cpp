//===- EmitGemmTile.cpp - moe.gemm_tile to calls of matrix kernels --------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelEmitter.h"

#include "moe/Dialect/MoE/IR/MoEDialect.h"

using namespace mlir;
using namespace mlir::moe;

FailureOr<GemmKernelSpec> KernelEmitter::getSpec(GemmTileOp op) {
  UkernelAttr ukernel = op.getUkernel();
  std::optional<KernelLevel> level = parseKernelLevel(ukernel.getLevel());
  if (!level)
    return op.emitOpError("expected a micro-kernel of x86-64-v3, x86-64-v4, avx512-bf16 or "
                          "amx-bf16, but got ")
           << ukernel.getLevel();
  WeightType weight = op.getWeight().getType();
  auto format = dyn_cast<FormatAttr>(weight.getFormat());
  auto layout = dyn_cast<LayoutAttr>(weight.getLayout());
  if (!format || !layout || layout.getValue() != PanelLayout::Panel32)
    return op.emitOpError("expected a weight of f32 or bf16 in panel32, but got ") << weight;

  GemmKernelSpec spec;
  spec.level = *level;
  spec.rows = ukernel.getRows();
  spec.panels = ukernel.getPanels();
  spec.prefetch = ukernel.getPrefetch();
  spec.ahead = ukernel.getAhead();
  spec.steps = ukernel.getKBlock() != 0;
  spec.defer = ukernel.getDefer();
  spec.bf16Weights = format.getValue() == PlainFormat::BF16;
  spec.product = ukernel.getProduct();
  spec.nearRows = spec.isTile() && ukernel.getHint() == LoadHint::Near;
  spec.parts = weight.getParts();
  spec.bias = static_cast<bool>(op.getBias());
  switch (op.getForm()) {
  case ResultForm::Blocked:
    spec.form = KernelForm::Blocked;
    spec.bf16Result = cast<MemRefType>(op.getOut().getType()).getElementType().isBF16();
    break;
  case ResultForm::Rows:
    spec.form = KernelForm::Rows;
    spec.bf16Result = cast<MemRefType>(op.getOut().getType()).getElementType().isBF16();
    break;
  case ResultForm::Combine:
    spec.form = KernelForm::Combine;
    spec.indexed = static_cast<bool>(op.getPair());
    spec.weighted = op.getGate() || (op.getPair() && !op.getUnweighted());
    spec.scaled = static_cast<bool>(op.getScale());
    spec.bf16Result = op.getCompute() && op.getCompute()->isBF16();
    break;
  }
  if (!op.getEpilogue().empty())
    spec.epilogue = &op.getEpilogue();
  // The tile's own order needs no name.
  LoadOrder order =
      ukernel.getOrder() == KernelOrder::BFirst ? LoadOrder::BFirst : LoadOrder::AFirst;
  if (spec.isBFirst() != (order == LoadOrder::BFirst))
    spec.order = order;
  return spec;
}

/// Calls the kernel of op's exact number of rows for spec.panels panels from `panel` (i64) on.
LogicalResult KernelEmitter::callGemm(KernelBuilder &k, GemmTileOp op, const GemmKernelSpec &spec,
                                      Value panel) {
  OpBuilder &b = k.b;
  WeightType weight = op.getWeight().getType();
  int64_t panelBytes = weight.panelBytes(), panelCols = weight.panelCols();
  FailureOr<Buffer> a = getBuffer(k, op, op.getA());
  FailureOr<Buffer> out = getBuffer(k, op, op.getOut());
  if (failed(a) || failed(out))
    return failure();
  Value count = toI64(k, op.getCount());
  Value weights = toPointer(k, op.getWeight());
  Value number = k.add(k.mul(toI64(k, op.getExpert()), weight.panelCount()), panel);
  SmallVector<Value> args = {a->pointer, k.at(weights, k.mul(number, panelBytes)),
                             k.index(llvm::divideCeil(weight.getCols(), spec.getGroupColumns())),
                             op.getAhead() ? toI64(k, op.getAhead()) : k.index(panelBytes)};
  size_t outPlace = args.size();
  Value firstColumn = k.mul(panel, panelCols);
  Value row = op.getRow() ? toI64(k, op.getRow()) : Value();
  Value before; // what a kernel that defers wants of the block before
  switch (spec.form) {
  case KernelForm::Blocked: {
    Value columns = k.sub(k.index(weight.getRows()), firstColumn);
    bool shared = spec.bf16Result && panelCols == 16;
    // The panel's columns in a block of so many rows.
    auto place = [&](Value block, Value rows) {
      Value groupBytes = k.mul(rows, 64);
      if (!shared) {
        Value group = k.mul(panel, spec.bf16Result ? 1 : panelCols / 16);
        return k.at(block, k.mul(group, groupBytes));
      }
      // Two panels share a group of 32 columns; a last panel alone zeroes the half after it.
      Value half = arith::AndIOp::create(b, k.loc, panel, k.index(1));
      Value group = arith::ShRUIOp::create(b, k.loc, panel, k.index(1));
      return k.at(k.at(block, k.mul(group, groupBytes)), k.mul(half, 32));
    };
    args.push_back(place(out->pointer, count));
    args.push_back(columns);
    if (spec.defer) // whole blocks of bf16 rows, padded to whole panels
      before = place(k.at(out->pointer, -32 * 2 * int64_t(llvm::alignTo(weight.getRows(), 32))),
                     k.index(32));
    if (shared) {
      if (spec.panels == 1) {
        Value last = weight.panelCount() % 2
                         ? arith::CmpIOp::create(b, k.loc, arith::CmpIPredicate::eq, panel,
                                                 k.index(weight.panelCount() - 1))
                               .getResult()
                         : arith::ConstantIntOp::create(b, k.loc, 0, 1).getResult();
        args.push_back(arith::ExtUIOp::create(b, k.loc, k.i64(), last));
      }
    }
    break;
  }
  case KernelForm::Rows: {
    auto type = cast<MemRefType>(op.getOut().getType());
    Value width = type.isDynamicDim(type.getRank() - 1)
                      ? toI64(k, memref::DimOp::create(b, k.loc, op.getOut(), type.getRank() - 1))
                      : k.index(type.getShape().back());
    Value p = out->pointer;
    if (row)
      p = k.at(p, k.mul(row, out->strideBytes[0]));
    args.push_back(k.at(p, k.mul(firstColumn, out->elementBytes)));
    if (spec.defer)
      before = k.at(args.back(), k.mul(out->strideBytes[0], -32));
    args.push_back(out->strideBytes[0]);
    args.push_back(type.getRank() == 3 ? out->strideBytes[1] : k.index(0));
    args.push_back(k.sub(width, firstColumn));
    break;
  }
  case KernelForm::Combine: {
    auto type = cast<MemRefType>(op.getOut().getType());
    SmallVector<int64_t> strides;
    int64_t offset;
    if (type.getRank() != 3 || failed(type.getStridesAndOffset(strides, offset)) ||
        strides[1] != 32)
      return op.emitOpError("expected a scratch of [panels, T, 32] with rows of 32 elements, but "
                            "got ")
             << type;
    // The scratch holds the panels of the whole operation; skip those before `panel`.
    Value skipped = k.sub(panel, toI64(k, op.getPanel()));
    Value p = k.at(out->pointer, k.mul(skipped, out->strideBytes[0]));
    auto fromRow = [&](Value pointer, int64_t bytes) {
      return row ? k.at(pointer, k.mul(row, bytes)) : pointer;
    };
    args.append({spec.indexed ? p : fromRow(p, 128), out->strideBytes[0]});
    if (spec.indexed) {
      FailureOr<Buffer> pair = getBuffer(k, op, op.getPair());
      if (failed(pair))
        return failure();
      args.push_back(fromRow(pair->pointer, 4));
    }
    if (spec.defer)
      before =
          k.at(spec.indexed ? args.back() : args[outPlace], spec.indexed ? -32 * 4 : -32 * 128);
    if (spec.weighted) {
      FailureOr<Buffer> w = getBuffer(k, op, spec.indexed ? op.getWeights() : op.getGate());
      if (failed(w))
        return failure();
      args.push_back(spec.indexed ? w->pointer : fromRow(w->pointer, 4));
    }
    if (spec.indexed)
      args.push_back(toI64(k, op.getSlots()));
    if (spec.scaled)
      args.push_back(op.getScale());
    break;
  }
  }
  // One row of a panel, for each panel.
  if (spec.bias)
    args.insert(args.begin() + outPlace + 1, k.at(toPointer(k, op.getBias()), k.mul(number, 128)));

  if (spec.steps) {
    FailureOr<Buffer> sums = getBuffer(k, op, op.getSums());
    if (failed(sums))
      return failure();
    args.append({toI64(k, op.getFirstStep()), toI64(k, op.getEndStep()), sums->pointer});
  }
  if (spec.defer) {
    Value number = toI64(k, op.getNumber());
    Value first = arith::CmpIOp::create(b, k.loc, arith::CmpIPredicate::eq, number, k.index(0));
    Value none = LLVM::ZeroOp::create(b, k.loc, k.ptr());
    Value last = arith::CmpIOp::create(b, k.loc, arith::CmpIPredicate::eq,
                                       k.add(number, k.index(1)), toI64(k, op.getBlocks()));
    args.append({LLVM::SelectOp::create(b, k.loc, first, none, before),
                 arith::ExtUIOp::create(b, k.loc, k.i64(), last)});
  }

  if (spec.isTile()) {
    // Two kernels, for one tile of rows and for two. The others' arguments are shifted by one.
    args.insert(args.begin() + 5, count);
    func::FuncOp kernels[2];
    for (int64_t high : {1, 2}) {
      GemmKernelSpec exact = spec;
      exact.rows = std::min(spec.rows, 16 * high);
      FailureOr<func::FuncOp> kernel = get(
          exact.getName(), [&](OpBuilder &at) { return emitGemmKernel(at, op.getLoc(), exact); });
      if (failed(kernel))
        return failure();
      kernels[high - 1] = *kernel;
    }
    k.ifThenElse(
        k.less(count, k.index(17)), [&] { call(k, kernels[0], args); },
        [&] { call(k, kernels[1], args); });
    return frameTiles(op);
  }

  // One kernel per number of rows; a block of no rows has nothing to do.
  SmallVector<int64_t> cases;
  SmallVector<func::FuncOp> kernels;
  for (int64_t rows = 1; rows <= spec.rows; ++rows) {
    GemmKernelSpec exact = spec;
    exact.rows = rows;
    FailureOr<func::FuncOp> kernel =
        get(exact.getName(), [&](OpBuilder &at) { return emitGemmKernel(at, op.getLoc(), exact); });
    if (failed(kernel))
      return failure();
    cases.push_back(rows);
    kernels.push_back(*kernel);
  }
  auto choice = scf::IndexSwitchOp::create(b, k.loc, TypeRange(), op.getCount(), cases,
                                           static_cast<unsigned>(cases.size()));
  OpBuilder::InsertionGuard guard(b);
  for (auto [i, kernel] : llvm::enumerate(kernels)) {
    b.setInsertionPointToStart(&choice.getCaseRegions()[i].emplaceBlock());
    call(k, kernel, args);
    scf::YieldOp::create(b, k.loc);
  }
  b.setInsertionPointToStart(&choice.getDefaultRegion().emplaceBlock());
  scf::YieldOp::create(b, k.loc);
  return success();
}

/// Puts the functions that give and return tiles around the stage, or the function, of `op`, once:
/// the configuration is loaded by a lane, not by a call.
LogicalResult KernelEmitter::frameTiles(GemmTileOp op) {
  auto stage = op->getParentOfType<StageOp>();
  auto function = op->getParentOfType<func::FuncOp>();
  Block *block = stage ? &stage.getBody().front() : &function.getBody().front();
  if (!framed.insert(block).second)
    return success();
  if (!stage && !function.getBody().hasOneBlock())
    return op.emitOpError("expected a stage or a function of one block around products of tiles, "
                          "but got several blocks");
  for (bool begin : {true, false}) {
    FailureOr<func::FuncOp> frame = get(getTileFrameName(begin), [&](OpBuilder &at) {
      return FailureOr<func::FuncOp>(emitTileFrame(at, op.getLoc(), begin));
    });
    if (failed(frame))
      return failure();
    OpBuilder b(op.getContext());
    if (begin)
      b.setInsertionPointToStart(block);
    else
      b.setInsertionPoint(block->getTerminator());
    func::CallOp::create(b, op.getLoc(), *frame, ValueRange{});
  }
  return success();
}

LogicalResult KernelEmitter::lower(GemmTileOp op) {
  FailureOr<GemmKernelSpec> spec = getSpec(op);
  if (failed(spec))
    return failure();
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  int64_t panelCount = op.getWeight().getType().panelCount();
  Value panel = toI64(k, op.getPanel());
  LogicalResult result = success();
  if (panelCount % spec->panels == 0) {
    result = callGemm(k, op, *spec, panel);
  } else {
    // The last panels of an expert are fewer than a tile: the next one belongs to another expert.
    GemmKernelSpec single = *spec;
    single.panels = 1;
    single.order = LoadOrder::Automatic;
    Value left = k.sub(k.index(panelCount), panel);
    k.ifThenElse(
        k.less(left, k.index(spec->panels)),
        [&] {
          k.loop(left, 1, [&](Value i) {
            if (failed(callGemm(k, op, single, k.add(panel, i))))
              result = failure();
          });
        },
        [&] {
          if (failed(callGemm(k, op, *spec, panel)))
            result = failure();
        });
  }
  if (succeeded(result))
    op.erase();
  return result;
}
