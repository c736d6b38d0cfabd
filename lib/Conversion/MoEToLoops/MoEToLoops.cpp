//===- MoEToLoops.cpp - convert-moe-to-loops ------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Conversion/MoEToLoops/MoEToLoops.h"
#include "LoopBuilder.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/Func/Transforms/FuncConversions.h"
#include "mlir/Dialect/Utils/StaticValueUtils.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/IRMapping.h"

namespace mlir::moe {
#define GEN_PASS_DEF_CONVERTMOETOLOOPSPASS
#include "moe/Conversion/MoEToLoops/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

Value moe::loadWeight(LoopBuilder &l, WeightType type, Value packed, Value expert, int64_t part,
                      Value row, Value col) {
  // Layout panel32-1: panels of 32 columns; with two parts 16 of each.
  int64_t width = type.getLayout().getPanelWidth(), cols = type.panelCols();
  Value panel = l.addi(l.muli(expert, type.panelCount()), l.divi(row, cols));
  Value lane = l.addi(l.remi(row, cols), part * cols);
  Value base = l.muli(panel, type.paddedCols() * width);
  Value inside;
  if (type.getFormat().getStorageType().isF32())
    inside = l.addi(l.muli(col, width), lane);
  else // pairs of reduction elements lie side by side
    inside = l.addi(l.addi(l.muli(l.divi(col, 2), 2 * width), l.muli(lane, 2)), l.remi(col, 2));
  return l.loadF32(packed, l.addi(base, inside));
}

void moe::buildDispatch(LoopBuilder &l, Value ids, Value offsets, Value pair, int64_t experts) {
  Value zero = l.i32(0), one = l.i32(1), bound = l.i32(experts);
  Value slots = l.dim(ids, 1), count = l.muli(l.dim(ids, 0), slots);
  Value cursors = l.alloc(OpFoldResult(l.b.getIndexAttr(experts)), l.b.getI32Type());
  // Calls body(pair, expert) for every id inside [0, E).
  auto forEachRow = [&](function_ref<void(Value, Value)> body) {
    l.loop(count, [&](Value p) {
      Value id = l.load(ids, {l.divi(p, slots), l.remi(p, slots)});
      Value inside = l.andi(l.cmp(arith::CmpIPredicate::sge, id, zero),
                            l.cmp(arith::CmpIPredicate::slt, id, bound));
      l.when(inside, [&] { body(p, l.toIndex(id)); });
    });
  };
  auto increment = [&](Value memref, Value at) {
    Value old = l.load(memref, at);
    l.store(l.addi(old, one), memref, at);
    return old;
  };
  l.loop(experts + 1, [&](Value e) { l.store(zero, offsets, e); });
  forEachRow([&](Value, Value e) { increment(offsets, l.addi(e, 1)); });
  l.loop(experts, [&](Value e) {
    Value first = l.load(offsets, e), next = l.addi(e, 1);
    l.store(first, cursors, e);
    l.store(l.addi(first, l.load(offsets, next)), offsets, next);
  });
  forEachRow(
      [&](Value p, Value e) { l.store(l.toI32(p), pair, l.toIndex(increment(cursors, e))); });
  l.free(cursors);
}

namespace {

/// The value that the epilogue gives for the parts of one column.
Value inlineEpilogue(LoopBuilder &l, Region &region, ValueRange parts) {
  IRMapping mapping;
  mapping.map(region.getArguments(), parts);
  for (Operation &op : region.front().without_terminator())
    l.b.clone(op, mapping);
  return mapping.lookupOrDefault(region.front().getTerminator()->getOperand(0));
}

/// y in f32 while rows are added to it, in ascending order of sorted row; rounded once at the end.
/// For moe.combine and the combine clause of moe.grouped_matmul.
struct TokenSums {
  LoopBuilder &l;
  Value y, sums, pair, weights, slots, gate, scale;

  template <typename OpTy>
  TokenSums(LoopBuilder &l, OpTy op, Value pair, Value weights, Value slots)
      : l(l), y(op.getOut()), pair(pair), weights(op.getUnweighted() ? Value() : weights),
        slots(slots), gate(op.getGate()), scale(op.getScale()) {
    int64_t width = cast<MemRefType>(y.getType()).getDimSize(1);
    OpFoldResult cols = ShapedType::isDynamic(width) ? OpFoldResult(l.dim(y, 1))
                                                     : OpFoldResult(l.b.getIndexAttr(width));
    sums = l.alloc({OpFoldResult(l.dim(y, 0)), cols}, l.b.getF32Type());
    Value accumulate = op.getAccumulate(), start = op.getStart() ? op.getStart() : y;
    forEach([&](Value t, Value j) {
      Value zero = l.real(0.0);
      l.store(accumulate ? l.select(accumulate, l.loadF32(start, {t, j}), zero) : zero, sums,
              {t, j});
    });
  }

  /// Token and weight of sorted row n.
  std::pair<Value, Value> find(Value n) {
    Value token = n, weight;
    if (pair) {
      Value p = l.loadIndex(pair, n);
      token = l.divi(p, slots);
      if (weights)
        weight = l.load(weights, {token, l.remi(p, slots)});
    } else if (gate) {
      weight = l.load(gate, {n, l.index(0)});
    }
    if (!weight)
      weight = l.real(1.0);
    return {token, scale ? l.mul(weight, scale) : weight};
  }

  void add(Value token, Value j, Value weight, Value product) {
    l.store(l.fma(weight, product, l.load(sums, {token, j})), sums, {token, j});
  }

  void finish() {
    forEach([&](Value t, Value j) { l.storeF32(l.load(sums, {t, j}), y, {t, j}); });
    l.free(sums);
  }

private:
  void forEach(function_ref<void(Value, Value)> body) {
    l.loop(l.dim(y, 0), [&](Value t) { l.loop(l.dim(y, 1), [&](Value j) { body(t, j); }); });
  }
};

/// Element (source, j) of rows, rounded to `type`; multiplied with the weight of pair p and rounded
/// again where there are weights.
Value loadRow(LoopBuilder &l, Value rows, Value source, Value j, Type type, Value rowWeights,
              Value p, Value slots) {
  Value value = l.round(l.loadF32(rows, {source, j}), type);
  if (!rowWeights)
    return value;
  return l.round(l.mul(value, l.load(rowWeights, {source, l.remi(p, slots)})), type);
}

/// Rows that exist: offsets[E].
Value getRowCount(LoopBuilder &l, Value offsets) {
  return l.loadIndex(offsets, l.addi(l.dim(offsets, 0), l.index(-1)));
}

/// A pattern for an operation on memrefs; `lower` emits its loops.
template <typename OpTy> struct LowerOp : OpConversionPattern<OpTy> {
  using OpConversionPattern<OpTy>::OpConversionPattern;
  using OpAdaptor = typename OpConversionPattern<OpTy>::OpAdaptor;

  LogicalResult matchAndRewrite(OpTy op, OpAdaptor adaptor,
                                ConversionPatternRewriter &rewriter) const override {
    if (!op.hasPureBufferSemantics())
      return rewriter.notifyMatchFailure(op, "operands are not memrefs");
    LoopBuilder l{rewriter, op.getLoc()};
    lower(op, adaptor, l);
    rewriter.eraseOp(op);
    return success();
  }
  virtual void lower(OpTy op, OpAdaptor adaptor, LoopBuilder &l) const = 0;
};

struct LowerDispatch : LowerOp<DispatchOp> {
  using LowerOp::LowerOp;
  void lower(DispatchOp op, OpAdaptor, LoopBuilder &l) const override {
    buildDispatch(l, op.getIds(), op.getOutOffsets(), op.getOutPair(), op.getExperts());
  }
};

struct LowerSingleGroup : LowerOp<SingleGroupOp> {
  using LowerOp::LowerOp;
  void lower(SingleGroupOp op, OpAdaptor, LoopBuilder &l) const override {
    l.store(l.i32(0), op.getOut(), l.index(0));
    l.store(l.toI32(op.getRows()), op.getOut(), l.index(1));
  }
};

struct LowerGather : LowerOp<GatherOp> {
  using LowerOp::LowerOp;
  void lower(GatherOp op, OpAdaptor, LoopBuilder &l) const override {
    Type type = cast<MemRefType>(op.getOut().getType()).getElementType();
    l.loop(getRowCount(l, op.getOffsets()), [&](Value n) {
      Value p = l.loadIndex(op.getPair(), n), token = l.divi(p, op.getSlots());
      l.loop(l.dim(op.getX(), 1), [&](Value j) {
        l.storeF32(loadRow(l, op.getX(), token, j, type, op.getRowWeights(), p, op.getSlots()),
                   op.getOut(), {n, j});
      });
    });
  }
};

struct LowerActivate : LowerOp<ActivateOp> {
  using LowerOp::LowerOp;
  void lower(ActivateOp op, OpAdaptor, LoopBuilder &l) const override {
    bool hasParts = cast<MemRefType>(op.getParts().getType()).getRank() == 3;
    l.loop(l.dim(op.getOut(), 0), [&](Value n) {
      l.loop(l.dim(op.getOut(), 1), [&](Value j) {
        SmallVector<Value> parts;
        for (int64_t part = 0; part < op.getNumParts(); ++part)
          parts.push_back(hasParts ? l.loadF32(op.getParts(), {n, l.index(part), j})
                                   : l.loadF32(op.getParts(), {n, j}));
        l.storeF32(inlineEpilogue(l, op.getEpilogue(), parts), op.getOut(), {n, j});
      });
    });
  }
};

struct LowerCombine : LowerOp<CombineOp> {
  using LowerOp::LowerOp;
  void lower(CombineOp op, OpAdaptor, LoopBuilder &l) const override {
    TokenSums sums(l, op, op.getPair(), op.getWeights(), op.getSlots());
    l.loop(getRowCount(l, op.getOffsets()), [&](Value n) {
      auto [token, weight] = sums.find(n);
      l.loop(l.dim(op.getRows(), 1), [&, token = token, weight = weight](Value j) {
        sums.add(token, j, weight, l.loadF32(op.getRows(), {n, j}));
      });
    });
    sums.finish();
  }
};

struct LowerGroupedMatmul : LowerOp<GroupedMatmulOp> {
  using LowerOp::LowerOp;
  void lower(GroupedMatmulOp op, OpAdaptor adaptor, LoopBuilder &l) const override {
    WeightType weight = op.getWeightType();
    Value rows = op.getRows();
    Type rowType =
        op.getRowType() ? *op.getRowType() : cast<MemRefType>(rows.getType()).getElementType();
    std::optional<TokenSums> sums;
    if (op.hasCombine())
      sums.emplace(l, op, op.getCombinePair(), op.getCombineWeights(), op.getCombineSlots());

    l.loop(weight.getExperts(), [&](Value e) {
      Value first = l.loadIndex(op.getOffsets(), e);
      Value last = l.loadIndex(op.getOffsets(), l.addi(e, 1));
      l.loop(first, last, [&](Value n) {
        Value p = op.hasVia() ? l.loadIndex(op.getViaPair(), n) : n;
        Value source = op.hasVia() ? l.divi(p, op.getViaSlots()) : n;
        std::pair<Value, Value> target;
        if (sums)
          target = sums->find(n);
        l.loop(weight.getRows(), [&](Value j) {
          SmallVector<Value> products = l.fold(
              l.index(weight.getCols()), SmallVector<Value>(weight.getParts(), l.real(0.0)),
              [&](Value i, ValueRange state) {
                Value a =
                    loadRow(l, rows, source, i, rowType, op.getRowWeights(), p, op.getViaSlots());
                SmallVector<Value> next;
                for (auto [part, sum] : llvm::enumerate(state))
                  next.push_back(
                      l.fma(a, loadWeight(l, weight, adaptor.getWeight(), e, part, j, i), sum));
                return next;
              });
          if (op.getBias())
            for (auto [part, product] : llvm::enumerate(products))
              product = l.add(product, loadWeight(l, cast<WeightType>(op.getBias().getType()),
                                                  adaptor.getBias(), e, part, j, l.index(0)));
          if (op.hasEpilogue())
            products = {inlineEpilogue(l, op.getEpilogue(), products)};
          if (sums)
            sums->add(target.first, j, target.second, l.round(products[0], *op.getCombineType()));
          else if (products.size() == 1)
            l.storeF32(products[0], op.getOut(), {n, j});
          else
            for (auto [part, product] : llvm::enumerate(products))
              l.storeF32(product, op.getOut(), {n, l.index(part), j});
        });
      });
    });
    if (sums)
      sums->finish();
  }
};

struct ConvertMoEToLoopsPass : moe::impl::ConvertMoEToLoopsPassBase<ConvertMoEToLoopsPass> {
  void runOnOperation() override {
    TypeConverter converter;
    addWeightConversion(converter);
    RewritePatternSet patterns(&getContext());
    populateMoEToLoopsPatterns(converter, patterns);
    populateFunctionOpInterfaceTypeConversionPattern<func::FuncOp>(patterns, converter);
    populateCallOpTypeConversionPattern(patterns, converter);
    populateReturnOpTypeConversionPattern(patterns, converter);

    ConversionTarget target(getContext());
    target.addIllegalDialect<MoEDialect>();
    target.addLegalOp<LayerOp, WeightOp>();
    // A yield goes with the operation around it.
    target.addDynamicallyLegalOp<YieldOp>([](YieldOp op) { return true; });
    target.addDynamicallyLegalOp<func::FuncOp>([&](func::FuncOp op) {
      return converter.isSignatureLegal(op.getFunctionType()) && converter.isLegal(&op.getBody());
    });
    target.addDynamicallyLegalOp<func::CallOp, func::ReturnOp>(
        [&](Operation *op) { return converter.isLegal(op); });
    target.markUnknownOpDynamicallyLegal([](Operation *) { return true; });
    if (failed(applyFullConversion(getOperation(), target, std::move(patterns))))
      signalPassFailure();
  }
};

} // namespace

void moe::addWeightConversion(TypeConverter &converter) {
  converter.addConversion([](Type type) { return type; });
  converter.addConversion([](WeightType type) -> Type {
    int64_t bits = type.getFormat().getBitsPerElement();
    return MemRefType::get({type.packedBytes() * 8 / bits}, type.getFormat().getStorageType());
  });
  auto cast = [](OpBuilder &builder, Type type, ValueRange inputs, Location loc) -> Value {
    return UnrealizedConversionCastOp::create(builder, loc, type, inputs).getResult(0);
  };
  converter.addSourceMaterialization(cast);
  converter.addTargetMaterialization(cast);
}

void moe::populateMoEToLoopsPatterns(const TypeConverter &converter, RewritePatternSet &patterns) {
  populateRouterToLoopsPatterns(converter, patterns);
  patterns.add<LowerDispatch, LowerSingleGroup, LowerGather, LowerActivate, LowerCombine,
               LowerGroupedMatmul>(converter, patterns.getContext());
}
