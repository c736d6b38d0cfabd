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

/// Up matmul, activation, down matmul of `op` into `out`; `rows` have as many rows as `out`.
template <typename OpTy>
Value buildExpert(PatternRewriter &rewriter, OpTy op, Value rows, Value offsets, Value out,
                  TypeAttr rowType) {
  Location loc = op.getLoc();
  auto weight = cast<WeightType>(op.getUp().getType());
  Type f32 = rewriter.getF32Type();
  SmallVector<int64_t> productDims;
  if (weight.getParts() > 1)
    productDims.push_back(weight.getParts());
  productDims.push_back(weight.getRows());
  auto products = GroupedMatmulOp::create(rewriter, loc, rows, offsets, op.getUp(),
                                          emptyLike(rewriter, loc, rows, productDims, f32));
  products.setRowTypeAttr(rowType);
  auto hidden = ActivateOp::create(rewriter, loc, products.getResult(0),
                                   emptyLike(rewriter, loc, rows, weight.getRows(), f32));
  buildExpertEpilogue(rewriter, loc, hidden.getEpilogue(), op.getExpert());
  rewriter.setInsertionPointAfter(hidden);
  auto result =
      GroupedMatmulOp::create(rewriter, loc, hidden.getResult(0), offsets, op.getDown(), out);
  if (op.getUpBias()) {
    products.getBiasMutable().assign(op.getUpBias());
    result.getBiasMutable().assign(op.getDownBias());
  }
  return result.getResult(0);
}

/// Fails where there is nothing to build.
template <typename OpTy> LogicalResult checkDecomposable(OpTy op, PatternRewriter &rewriter) {
  if (!op.hasPureTensorSemantics())
    return rewriter.notifyMatchFailure(op, "operands are not tensors");
  if (std::string refused = op.getExpert().getUnimplemented(); !refused.empty())
    return rewriter.notifyMatchFailure(op, "no formula for " + refused);
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
    auto gathered = GatherOp::create(rewriter, loc, op.getX(), op.getOffsets(), op.getPair(),
                                     op.getSlots(), op.getRowWeights(),
                                     emptyLike(rewriter, loc, op.getPair(), hidden, compute));
    rewriter.replaceOp(op, buildExpert(rewriter, op, gathered.getResult(0), op.getOffsets(),
                                       op.getOut(), /*rowType=*/{}));
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
    Value tokens = op.getRows();
    if (!tokens)
      tokens = getValueOrCreateConstantIndexOp(rewriter, loc,
                                               tensor::getMixedSize(rewriter, loc, op.getX(), 0));
    Value empty =
        tensor::EmptyOp::create(rewriter, loc, ArrayRef<int64_t>{2}, rewriter.getI32Type());
    Value offsets = SingleGroupOp::create(rewriter, loc, tokens, empty).getResult(0);
    int64_t hidden = cast<WeightType>(op.getUp().getType()).getCols();
    Value rows =
        buildExpert(rewriter, op, op.getX(), offsets,
                    emptyLike(rewriter, loc, op.getX(), hidden, compute), TypeAttr::get(compute));
    auto combine = CombineOp::create(rewriter, loc, rows, offsets, op.getOut());
    if (op.getGate())
      combine.getGateMutable().assign(op.getGate());
    if (op.getScale())
      combine.getScaleMutable().assign(op.getScale());
    if (op.getAccumulate())
      combine.getAccumulateMutable().assign(op.getAccumulate());
    if (op.getStart())
      combine.getStartMutable().assign(op.getStart());
    rewriter.replaceOp(op, combine.getResults());
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
