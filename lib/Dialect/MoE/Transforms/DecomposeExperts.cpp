//===- DecomposeExperts.cpp - moe-decompose-experts -----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "FusePass.h"

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Dialect/MoE/Transforms/Passes.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Arith/Utils/Utils.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/Dialect/Tensor/IR/Tensor.h"

namespace mlir::moe {
#define GEN_PASS_DEF_DECOMPOSEEXPERTSPASS
#include "moe/Dialect/MoE/Transforms/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

/// The type that activations and expert rows are rounded to.
Type getComputeType(Operation *op, Value out) {
  if (auto func = op->getParentOfType<func::FuncOp>())
    if (auto compute = func->getAttrOfType<TypeAttr>(MoEDialect::kComputeAttrName))
      return compute.getValue();
  return cast<ShapedType>(out.getType()).getElementType();
}

/// An empty tensor whose first dimension is that of `like` and whose others are `dims`.
Value emptyLike(OpBuilder &builder, Location loc, Value like, ArrayRef<int64_t> dims, Type type) {
  SmallVector<OpFoldResult> sizes = {tensor::getMixedSize(builder, loc, like, 0)};
  for (int64_t dim : dims)
    sizes.push_back(builder.getIndexAttr(dim));
  return tensor::EmptyOp::create(builder, loc, sizes, type);
}

/// Up matmul, activation, down matmul into `out`; `rows` have as many rows as `out`.
Value buildExpert(PatternRewriter &rewriter, Location loc, Value rows, Value offsets, Value up,
                  Value down, ExpertAttr expert, Value out, TypeAttr rowType) {
  auto weight = cast<WeightType>(up.getType());
  Type f32 = rewriter.getF32Type();
  SmallVector<int64_t> productDims;
  if (weight.getParts() > 1)
    productDims.push_back(weight.getParts());
  productDims.push_back(weight.getRows());
  auto products = GroupedMatmulOp::create(rewriter, loc, rows, offsets, up,
                                          emptyLike(rewriter, loc, rows, productDims, f32));
  products.setRowTypeAttr(rowType);
  auto hidden = ActivateOp::create(rewriter, loc, products.getResult(0),
                                   emptyLike(rewriter, loc, rows, weight.getRows(), f32));
  buildExpertEpilogue(rewriter, loc, hidden.getEpilogue(), expert);
  rewriter.setInsertionPointAfter(hidden);
  return GroupedMatmulOp::create(rewriter, loc, hidden.getResult(0), offsets, down, out)
      .getResult(0);
}

/// Fails where there is nothing to build.
template <typename OpTy> LogicalResult checkDecomposable(OpTy op, PatternRewriter &rewriter) {
  if (!op.hasPureTensorSemantics())
    return rewriter.notifyMatchFailure(op, "operands are not tensors");
  ExpertAttr expert = op.getExpert();
  if (expert.getClamp() || expert.getBias() || expert.getNorm() || expert.getLatent())
    return rewriter.notifyMatchFailure(op, "no formula for " + expert.getUnimplemented());
  return success();
}

struct DecomposeExperts : OpRewritePattern<ExpertsOp> {
  using OpRewritePattern::OpRewritePattern;

  LogicalResult matchAndRewrite(ExpertsOp op, PatternRewriter &rewriter) const override {
    if (failed(checkDecomposable(op, rewriter)))
      return failure();
    Location loc = op.getLoc();
    Type compute = getComputeType(op, op.getOut());
    int64_t hidden = cast<WeightType>(op.getUp().getType()).getCols();
    auto gathered =
        GatherOp::create(rewriter, loc, op.getX(), op.getOffsets(), op.getPair(), op.getSlots(),
                         emptyLike(rewriter, loc, op.getPair(), hidden, compute));
    rewriter.replaceOp(op, buildExpert(rewriter, loc, gathered.getResult(0), op.getOffsets(),
                                       op.getUp(), op.getDown(), op.getExpert(), op.getOut(),
                                       /*rowType=*/{}));
    return success();
  }
};

struct DecomposeFfn : OpRewritePattern<FfnOp> {
  using OpRewritePattern::OpRewritePattern;

  LogicalResult matchAndRewrite(FfnOp op, PatternRewriter &rewriter) const override {
    if (failed(checkDecomposable(op, rewriter)))
      return failure();
    Location loc = op.getLoc();
    Type compute = getComputeType(op, op.getOut());
    Value tokens = getValueOrCreateConstantIndexOp(
        rewriter, loc, tensor::getMixedSize(rewriter, loc, op.getX(), 0));
    Value empty =
        tensor::EmptyOp::create(rewriter, loc, ArrayRef<int64_t>{2}, rewriter.getI32Type());
    Value offsets = SingleGroupOp::create(rewriter, loc, tokens, empty).getResult(0);
    int64_t hidden = cast<WeightType>(op.getUp().getType()).getCols();
    Value rows =
        buildExpert(rewriter, loc, op.getX(), offsets, op.getUp(), op.getDown(), op.getExpert(),
                    emptyLike(rewriter, loc, op.getX(), hidden, compute), TypeAttr::get(compute));
    rewriter.replaceOp(op,
                       CombineOp::create(rewriter, loc, rows, offsets, /*pair=*/Value(),
                                         /*weights=*/Value(), /*slots=*/Value(), op.getAccumulate(),
                                         op.getOut(), CombineAttr::get(rewriter.getContext()))
                           .getResult(0));
    return success();
  }
};

struct DecomposeExpertsPass : moe::impl::DecomposeExpertsPassBase<DecomposeExpertsPass> {
  using Base::Base;

  void runOnOperation() override {
    RewritePatternSet patterns(&getContext());
    populateDecomposeExpertsPatterns(patterns);
    if (failed(rewriteAll<ExpertsOp, FfnOp>(getOperation(), std::move(patterns), numDecomposed,
                                            numDeclined, remarks)))
      signalPassFailure();
  }
};

} // namespace

void moe::populateDecomposeExpertsPatterns(RewritePatternSet &patterns) {
  patterns.add<DecomposeExperts, DecomposeFfn>(patterns.getContext());
}
