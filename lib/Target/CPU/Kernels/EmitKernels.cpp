//===- EmitKernels.cpp - Task operations to calls of vector kernels -------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelBuilder.h"

#include "moe/Dialect/MoE/IR/MoEDialect.h"
#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Passes.h"

#include "mlir/Dialect/MemRef/IR/MemRef.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/PatternMatch.h"
#include "mlir/IR/SymbolTable.h"
#include "mlir/Transforms/WalkPatternRewriteDriver.h"
#include "llvm/ADT/TypeSwitch.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOECPUEMITKERNELS
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

/// A memref as a kernel sees it: the address of element 0 and strides in bytes.
struct Buffer {
  Value pointer;
  SmallVector<Value> strideBytes; // i64
  int64_t elementBytes;
};

/// Replaces the task operations of one module.
class KernelEmitter {
public:
  explicit KernelEmitter(ModuleOp module) : module(module), symbols(module) {}

  LogicalResult run();

private:
  LogicalResult lower(GemmTileOp op);
  LogicalResult lower(PackRowsOp op);
  LogicalResult lower(NormalizeRowsOp op);
  LogicalResult lower(SelectExpertsOp op);
  LogicalResult lower(BeginPanelsOp op);
  LogicalResult lower(EndPanelsOp op);

  template <typename PanelsOp> LogicalResult lowerPanels(PanelsOp op, Value accumulate);

  FailureOr<GemmKernelSpec> getSpec(GemmTileOp op);
  LogicalResult callGemm(KernelBuilder &k, GemmTileOp op, const GemmKernelSpec &spec, Value panel);

  /// The level of the function that holds `op`.
  FailureOr<KernelLevel> getLevel(Operation *op);
  FailureOr<Buffer> getBuffer(KernelBuilder &k, Operation *op, Value memref);
  Value toI64(KernelBuilder &k, Value index) {
    return arith::IndexCastOp::create(k.b, k.loc, k.i64(), index);
  }
  /// The address of a weight's packed bytes.
  Value toPointer(KernelBuilder &k, Value weight) {
    return UnrealizedConversionCastOp::create(k.b, k.loc, k.ptr(), weight).getResult(0);
  }
  void call(KernelBuilder &k, func::FuncOp kernel, ArrayRef<Value> args) {
    func::CallOp::create(k.b, k.loc, kernel, args);
  }
  /// The kernel of that name, emitted now if there is none yet.
  FailureOr<func::FuncOp> get(StringRef name,
                              function_ref<FailureOr<func::FuncOp>(OpBuilder &)> emit);

  LogicalResult frameTiles(GemmTileOp op);

  ModuleOp module;
  SymbolTable symbols;
  llvm::SmallPtrSet<Block *, 4> framed; ///< stages and functions that have tiles
};

} // namespace

FailureOr<KernelLevel> KernelEmitter::getLevel(Operation *op) {
  auto function = op->getParentOfType<func::FuncOp>();
  auto target =
      function ? function->getAttrOfType<TargetAttr>(MoEDialect::kTargetAttrName) : TargetAttr();
  if (!target)
    return op->emitOpError("expected a function with ")
           << MoEDialect::kTargetAttrName << " around it, but got none";
  std::optional<KernelLevel> level = parseKernelLevel(target.getLevel());
  if (!level)
    return op->emitOpError("expected a level with kernels (x86-64-v3, x86-64-v4, avx512-bf16, "
                           "amx-bf16), but got ")
           << target.getLevel();
  return *level;
}

FailureOr<func::FuncOp>
KernelEmitter::get(StringRef name, function_ref<FailureOr<func::FuncOp>(OpBuilder &)> emit) {
  if (auto function = symbols.lookup<func::FuncOp>(name))
    return function;
  OpBuilder b = OpBuilder::atBlockEnd(module.getBody());
  FailureOr<func::FuncOp> function = emit(b);
  if (succeeded(function))
    symbols.insert(*function);
  return function;
}

FailureOr<Buffer> KernelEmitter::getBuffer(KernelBuilder &k, Operation *op, Value memref) {
  auto type = cast<MemRefType>(memref.getType());
  SmallVector<int64_t> strides;
  int64_t offset;
  if (failed(type.getStridesAndOffset(strides, offset)) ||
      (!strides.empty() && strides.back() != 1))
    return op->emitOpError("expected buffers whose elements are next to each other, but got ")
           << type;
  Buffer buffer;
  buffer.elementBytes = type.getElementTypeBitWidth() / 8;
  OpBuilder &b = k.b;
  auto metadata = memref::ExtractStridedMetadataOp::create(b, k.loc, memref);
  Value base = memref::ExtractAlignedPointerAsIndexOp::create(b, k.loc, memref);
  buffer.pointer = LLVM::IntToPtrOp::create(b, k.loc, k.ptr(), toI64(k, base));
  if (offset == ShapedType::kDynamic)
    buffer.pointer =
        k.at(buffer.pointer, k.mul(toI64(k, metadata.getOffset()), buffer.elementBytes));
  else if (offset)
    buffer.pointer = k.at(buffer.pointer, k.index(offset * buffer.elementBytes));
  for (auto [dim, stride] : llvm::enumerate(strides))
    buffer.strideBytes.push_back(
        stride == ShapedType::kDynamic
            ? k.mul(toI64(k, metadata.getStrides()[dim]), buffer.elementBytes)
            : k.index(stride * buffer.elementBytes));
  return buffer;
}

//===----------------------------------------------------------------------===//
// gemm_tile
//===----------------------------------------------------------------------===//

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
  spec.bf16Weights = format.getValue() == PlainFormat::BF16;
  spec.product = ukernel.getProduct();
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
  switch (spec.form) {
  case KernelForm::Blocked: {
    Value groupBytes = k.mul(count, 64);
    Value columns = k.sub(k.index(weight.getRows()), firstColumn);
    if (spec.bf16Result && panelCols == 16) {
      // Two panels share a group of 32 columns; a last panel alone zeroes the half after it.
      Value half = arith::AndIOp::create(b, k.loc, panel, k.index(1));
      Value group = arith::ShRUIOp::create(b, k.loc, panel, k.index(1));
      args.push_back(k.at(k.at(out->pointer, k.mul(group, groupBytes)), k.mul(half, 32)));
      args.push_back(columns);
      if (spec.panels == 1) {
        Value last = weight.panelCount() % 2
                         ? arith::CmpIOp::create(b, k.loc, arith::CmpIPredicate::eq, panel,
                                                 k.index(weight.panelCount() - 1))
                               .getResult()
                         : arith::ConstantIntOp::create(b, k.loc, 0, 1).getResult();
        args.push_back(arith::ExtUIOp::create(b, k.loc, k.i64(), last));
      }
      break;
    }
    Value group = k.mul(panel, spec.bf16Result ? 1 : panelCols / 16);
    args.push_back(k.at(out->pointer, k.mul(group, groupBytes)));
    args.push_back(columns);
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

  if (spec.isTile()) {
    // Two kernels, for one tile of rows and for two. The others' arguments are shifted by one.
    args.insert(args.begin() + 5, count);
    if (spec.steps) {
      FailureOr<Buffer> sums = getBuffer(k, op, op.getSums());
      if (failed(sums))
        return failure();
      args.append({toI64(k, op.getFirstStep()), toI64(k, op.getEndStep()), sums->pointer});
    }
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

//===----------------------------------------------------------------------===//
// The other task operations
//===----------------------------------------------------------------------===//

LogicalResult KernelEmitter::lower(PackRowsOp op) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  auto rowsType = cast<MemRefType>(op.getRows().getType());
  PackKernelSpec spec;
  spec.level = *level;
  spec.bf16Source = rowsType.getElementType().isBF16();
  spec.bf16Block = cast<MemRefType>(op.getOut().getType()).getElementType().isBF16();
  spec.bf16Compute =
      !spec.bf16Block && op.getCompute().isBF16() && (!spec.bf16Source || op.getRowWeights());
  spec.gather = static_cast<bool>(op.getPair());
  spec.weighted = static_cast<bool>(op.getRowWeights());
  FailureOr<func::FuncOp> kernel =
      get(spec.getName(), [&](OpBuilder &at) { return emitPackKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> rows = getBuffer(k, op, op.getRows());
  FailureOr<Buffer> out = getBuffer(k, op, op.getOut());
  if (failed(kernel) || failed(rows) || failed(out))
    return failure();
  Value first = toI64(k, op.getFirst());
  SmallVector<Value> args;
  if (spec.gather) {
    FailureOr<Buffer> pair = getBuffer(k, op, op.getPair());
    if (failed(pair))
      return failure();
    args = {rows->pointer, rows->strideBytes[0], k.at(pair->pointer, k.mul(first, 4)),
            toI64(k, op.getSlots())};
    if (spec.weighted) {
      FailureOr<Buffer> w = getBuffer(k, op, op.getRowWeights());
      if (failed(w))
        return failure();
      args.push_back(w->pointer);
    }
  } else {
    args = {k.at(rows->pointer, k.mul(first, rows->strideBytes[0])), rows->strideBytes[0]};
  }
  Value width = rowsType.isDynamicDim(1)
                    ? toI64(k, memref::DimOp::create(b, k.loc, op.getRows(), 1))
                    : k.index(rowsType.getDimSize(1));
  args.append({toI64(k, op.getCount()), width, out->pointer});
  call(k, *kernel, args);
  op.erase();
  return success();
}

LogicalResult KernelEmitter::lower(NormalizeRowsOp op) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  int64_t columns = op.getScale().getType().getRows();
  float epsilon = static_cast<float>(op.getEpsilon().convertToDouble());
  NormalizeKernelSpec spec{*level, columns, epsilon, op.getRounded()};
  FailureOr<func::FuncOp> kernel = get(
      spec.getName(), [&](OpBuilder &at) { return emitNormalizeKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> a = getBuffer(k, op, op.getA());
  if (failed(kernel) || failed(a))
    return failure();
  call(k, *kernel, {a->pointer, toI64(k, op.getCount()), toPointer(k, op.getScale())});
  op.erase();
  return success();
}

LogicalResult KernelEmitter::lower(SelectExpertsOp op) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  RouterAttr router = op.getRouter();
  std::string unsupported = router.getUnimplemented();
  if (!unsupported.empty())
    return op.emitOpError("expected a router that the CPU target has code for, but got ")
           << unsupported;
  SelectKernelSpec spec;
  spec.level = *level;
  spec.experts = op.getExperts();
  spec.router = router;
  spec.expertScale = static_cast<bool>(op.getExpertScale());
  spec.copyLogits = static_cast<bool>(op.getOutLogits());
  int64_t topK = router.getTopK();
  if (topK > spec.experts)
    return op.emitOpError("expected top_k <= experts, but got ") << topK << " of " << spec.experts;
  auto isCompact = [&](Value memref) {
    auto type = cast<MemRefType>(memref.getType());
    SmallVector<int64_t> strides;
    int64_t offset;
    return succeeded(type.getStridesAndOffset(strides, offset)) && strides[0] == topK;
  };
  if (!isCompact(op.getOutWeights()) || !isCompact(op.getOutExperts()))
    return op.emitOpError("expected weights and experts of rows of top_k elements next to each "
                          "other, but got ")
           << op.getOutWeights().getType() << " and " << op.getOutExperts().getType();
  FailureOr<func::FuncOp> kernel =
      get(spec.getName(), [&](OpBuilder &at) { return emitSelectKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> logits = getBuffer(k, op, op.getLogits());
  FailureOr<Buffer> weights = getBuffer(k, op, op.getOutWeights());
  FailureOr<Buffer> ids = getBuffer(k, op, op.getOutExperts());
  if (failed(kernel) || failed(logits) || failed(weights) || failed(ids))
    return failure();
  Value first = toI64(k, op.getFirst());
  Value skip = k.mul(first, topK * 4);
  SmallVector<Value> args = {logits->pointer, logits->strideBytes[0], toI64(k, op.getCount()),
                             k.at(weights->pointer, skip), k.at(ids->pointer, skip)};
  for (Value vector : {op.getSelectionBias(), op.getExpertScale()})
    if (vector)
      args.push_back(toPointer(k, vector));
  if (spec.copyLogits) {
    FailureOr<Buffer> copy = getBuffer(k, op, op.getOutLogits());
    if (failed(copy))
      return failure();
    args.append({k.at(copy->pointer, k.mul(first, copy->strideBytes[0])), copy->strideBytes[0]});
  }
  call(k, *kernel, args);
  op.erase();
  return success();
}

template <typename PanelsOp>
LogicalResult KernelEmitter::lowerPanels(PanelsOp op, Value accumulate) {
  FailureOr<KernelLevel> level = getLevel(op);
  if (failed(level))
    return failure();
  auto yType = cast<MemRefType>(op.getY().getType());
  auto scratchType = cast<MemRefType>(op.getScratch().getType());
  SmallVector<int64_t> strides;
  int64_t offset;
  if (scratchType.getRank() != 3 || failed(scratchType.getStridesAndOffset(strides, offset)) ||
      strides[1] != 32)
    return op.emitOpError("expected a scratch of [panels, T, 32] with rows of 32 elements, but "
                          "got ")
           << scratchType;
  PanelKernelSpec spec;
  spec.level = *level;
  spec.bf16Y = yType.getElementType().isBF16();
  spec.begin = static_cast<bool>(accumulate);
  FailureOr<func::FuncOp> kernel =
      get(spec.getName(), [&](OpBuilder &at) { return emitPanelKernel(at, op.getLoc(), spec); });
  OpBuilder b(op);
  KernelBuilder k(b, op.getLoc());
  FailureOr<Buffer> scratch = getBuffer(k, op, op.getScratch());
  FailureOr<Buffer> y = getBuffer(k, op, op.getY());
  if (failed(kernel) || failed(scratch) || failed(y))
    return failure();
  auto dim = [&](Value memref, int64_t d) -> Value {
    auto type = cast<MemRefType>(memref.getType());
    if (!type.isDynamicDim(d))
      return k.index(type.getDimSize(d));
    return toI64(k, memref::DimOp::create(b, k.loc, memref, d));
  };
  SmallVector<Value> args = {
      scratch->pointer,        scratch->strideBytes[0], y->pointer,
      y->strideBytes[0],       dim(op.getY(), 0),       k.mul(toI64(k, op.getFirst()), 32),
      k.index(op.getPanels()), dim(op.getY(), 1)};
  if (accumulate)
    args.push_back(arith::ExtUIOp::create(b, k.loc, k.i64(), accumulate));
  call(k, *kernel, args);
  op.erase();
  return success();
}

LogicalResult KernelEmitter::lower(BeginPanelsOp op) { return lowerPanels(op, op.getAccumulate()); }

LogicalResult KernelEmitter::lower(EndPanelsOp op) { return lowerPanels(op, Value()); }

LogicalResult KernelEmitter::run() {
  // All task operations first: lowering erases them and adds functions.
  SmallVector<Operation *> tasks;
  module.walk([&](Operation *op) {
    if (isa<GemmTileOp, PackRowsOp, NormalizeRowsOp, SelectExpertsOp, BeginPanelsOp, EndPanelsOp>(
            op))
      tasks.push_back(op);
  });
  LogicalResult result = success();
  for (Operation *task : tasks) {
    LogicalResult lowered =
        llvm::TypeSwitch<Operation *, LogicalResult>(task)
            .Case<GemmTileOp, PackRowsOp, NormalizeRowsOp, SelectExpertsOp, BeginPanelsOp,
                  EndPanelsOp>([&](auto op) { return lower(op); });
    if (failed(lowered))
      result = failure(); // go on: report everything at once
  }
  return result;
}

namespace {
struct EmitKernelsPass : moe::impl::MoECPUEmitKernelsBase<EmitKernelsPass> {
  void runOnOperation() override {
    if (failed(KernelEmitter(getOperation()).run()))
      return signalPassFailure();
    RewritePatternSet patterns(&getContext());
    populateVectorMathPatterns(patterns);
    walkAndApplyPatterns(getOperation(), std::move(patterns));
  }
};
} // namespace
