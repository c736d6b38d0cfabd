//===- VectorMath.cpp - Vector math as plain arithmetic -------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The polynomials are our own fits: weighted least squares on 400 to 600 Chebyshev nodes of the
// interval, iterated with Lawson's weights until the largest error stands (minimax), function
// values from 40-digit arithmetic, coefficients rounded to f32. Fit errors, before f32 rounding:
//   exp   (e^r - 1 - r) / r^2 on |r| <= ln2/2, degree 4           3.1e-9 of e^r
//   erf   erf(x) / x in x^2 on |x| <= 1, degree 6                 1.3e-9 of erf
//   erf   log(erfc(x)) on 1 <= x <= 4, degree 6                   1.1e-9 absolute in erf
//   tanh  (tanh(x) / x - 1) / x^2 in x^2 on |x| <= 0.625, degree 4   4.4e-9 of tanh
//
//===----------------------------------------------------------------------===//

#include "moe/Target/CPU/VectorMath.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/Dialect/Vector/IR/VectorOps.h"
#include "mlir/IR/BuiltinTypes.h"
#include "mlir/IR/IRMapping.h"
#include "mlir/IR/Matchers.h"
#include "mlir/IR/PatternMatch.h"
#include "llvm/ADT/ArrayRef.h"

#include <limits>

using namespace mlir;

namespace {

/// Short names for the operations of this file on vectors of one length.
struct Emitter {
  OpBuilder &b;
  Location loc;
  int64_t lanes;

  Emitter(OpBuilder &b, Location loc, Value x)
      : b(b), loc(loc), lanes(cast<VectorType>(x.getType()).getNumElements()) {}

  VectorType f32() { return VectorType::get({lanes}, b.getF32Type()); }
  VectorType i32() { return VectorType::get({lanes}, b.getI32Type()); }
  Value f(float v) { return moe::splatF32(b, loc, lanes, v); }
  Value i(int32_t v) { return moe::splatI32(b, loc, lanes, v); }
  Value add(Value x, Value y) { return arith::AddFOp::create(b, loc, x, y); }
  Value sub(Value x, Value y) { return arith::SubFOp::create(b, loc, x, y); }
  Value mul(Value x, Value y) { return arith::MulFOp::create(b, loc, x, y); }
  Value div(Value x, Value y) { return arith::DivFOp::create(b, loc, x, y); }
  Value fma(Value x, Value y, Value z) { return vector::FMAOp::create(b, loc, x, y, z); }
  Value addi(Value x, Value y) { return arith::AddIOp::create(b, loc, x, y); }
  Value andi(Value x, Value y) { return arith::AndIOp::create(b, loc, x, y); }
  Value ori(Value x, Value y) { return arith::OrIOp::create(b, loc, x, y); }
  Value shl(Value x, int n) { return arith::ShLIOp::create(b, loc, x, i(n)); }
  Value shr(Value x, int n) { return arith::ShRUIOp::create(b, loc, x, i(n)); }
  Value bits(Value x) { return vector::BitCastOp::create(b, loc, i32(), x); }
  Value float_(Value x) { return vector::BitCastOp::create(b, loc, f32(), x); }
  Value cmp(arith::CmpFPredicate p, Value x, Value y) {
    return arith::CmpFOp::create(b, loc, p, x, y);
  }
  Value select(Value c, Value x, Value y) { return arith::SelectOp::create(b, loc, c, x, y); }

  /// c[0] + c[1] x + c[2] x^2 ..., by Horner's rule.
  Value poly(Value x, ArrayRef<float> c) {
    Value r = f(c.back());
    for (float v : llvm::reverse(c.drop_back()))
      r = fma(r, x, f(v));
    return r;
  }
  Value abs(Value x) { return float_(andi(bits(x), i(0x7fffffff))); }
  Value copySign(Value magnitude, Value sign) {
    return float_(ori(bits(magnitude), andi(bits(sign), i(std::numeric_limits<int32_t>::min()))));
  }
};

} // namespace

Value moe::splatF32(OpBuilder &b, Location loc, int64_t lanes, float value) {
  auto type = VectorType::get({lanes}, b.getF32Type());
  return arith::ConstantOp::create(b, loc, DenseElementsAttr::get(type, value));
}

Value moe::splatI32(OpBuilder &b, Location loc, int64_t lanes, int32_t value) {
  auto type = VectorType::get({lanes}, b.getI32Type());
  return arith::ConstantOp::create(b, loc, DenseElementsAttr::get(type, value));
}

Value moe::emitExp(OpBuilder &b, Location loc, Value x) {
  Emitter e(b, loc, x);
  // x = n ln2 + r. Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves n in
  // the low bits: no float-to-int conversion, which would be undefined on NaN and infinities.
  Value magic = e.f(12582912.0f);
  Value shifted = e.fma(x, e.f(1.44269504f), magic);
  Value n = e.sub(shifted, magic);
  // ln2 in two steps: the first has 9 trailing zero bits, so n times it is exact.
  Value r = e.fma(n, e.f(-0.693145751953125f), x);
  r = e.fma(n, e.f(-1.42860677e-6f), r);
  Value q = e.poly(r, {0.499999934f, 0.166665206f, 0.0416683879f, 0.00836871527f, 0.00138146013f});
  Value p = e.add(e.fma(e.mul(r, r), q, r), e.f(1.0f));
  // Times 2^n by adding n to the exponent; shl drops the bits of the constant above n.
  Value result = e.float_(e.addi(e.bits(p), e.shl(e.bits(shifted), 23)));
  // Outside the range the bits above are meaningless and are replaced; x + inf is inf or NaN.
  Value inf = e.f(std::numeric_limits<float>::infinity());
  result = e.select(e.cmp(arith::CmpFPredicate::OLT, x, e.f(-87.3365402f)), e.f(0.0f), result);
  return e.select(e.cmp(arith::CmpFPredicate::UGT, x, e.f(88.7228317f)), e.add(x, inf), result);
}

Value moe::emitErf(OpBuilder &b, Location loc, Value x) {
  Emitter e(b, loc, x);
  Value ax = e.abs(x);
  // x + x q: the rounding of q, which is small, costs less than that of a factor above 1.
  Value q = e.poly(e.mul(x, x), {0.12837917f, -0.376126258f, 0.112835852f, -0.0268538125f,
                                 0.00518832857f, -0.000801020063f, 7.85388274e-05f});
  Value small = e.fma(x, q, x);
  // From |x| = 4 on erf rounds to 1 (1 - erf(4) = 1.5e-8). The select keeps NaN.
  Value c = e.select(e.cmp(arith::CmpFPredicate::OGT, ax, e.f(4.0f)), e.f(4.0f), ax);
  Value log = e.poly(c, {-0.000353716437f, -1.12704005f, -0.638225656f, -0.103037388f,
                         0.0218053278f, -0.00293960974f, 0.000185574265f});
  Value large = e.copySign(e.sub(e.f(1.0f), moe::emitExp(b, loc, log)), x);
  return e.select(e.cmp(arith::CmpFPredicate::OLE, ax, e.f(1.0f)), small, large);
}

Value moe::emitTanh(OpBuilder &b, Location loc, Value x) {
  Emitter e(b, loc, x);
  Value ax = e.abs(x);
  Value x2 = e.mul(x, x);
  Value q =
      e.poly(x2, {-0.333332819f, 0.133314422f, -0.0537397152f, 0.0206390875f, -0.00570498728f});
  Value small = e.fma(e.mul(x2, q), x, x);
  // 1 - 2 / (e^2|x| + 1): e^2|x| may be inf, the quotient is then 0.
  Value t = moe::emitExp(b, loc, e.add(ax, ax));
  Value large = e.sub(e.f(1.0f), e.div(e.f(2.0f), e.add(t, e.f(1.0f))));
  large = e.copySign(large, x);
  return e.select(e.cmp(arith::CmpFPredicate::OLE, ax, e.f(0.625f)), small, large);
}

Value moe::emitRoundToBF16Bits(OpBuilder &b, Location loc, Value x) {
  Emitter e(b, loc, x);
  Value bits = e.bits(x);
  Value odd = e.andi(e.shr(bits, 16), e.i(1));
  Value rounded = e.shr(e.addi(e.addi(bits, e.i(0x7fff)), odd), 16);
  Value quiet = e.ori(e.shr(bits, 16), e.i(0x40));
  return e.select(e.cmp(arith::CmpFPredicate::UNO, x, x), quiet, rounded);
}

Value moe::emitRoundToBF16(OpBuilder &b, Location loc, Value x) {
  Emitter e(b, loc, x);
  return e.float_(e.shl(moe::emitRoundToBF16Bits(b, loc, x), 16));
}

/// The vector of `lanes` copies of the scalar constant that defines `v`, or null.
static Value splatConstant(OpBuilder &b, Location loc, Value v, int64_t lanes) {
  TypedAttr attr;
  if (!matchPattern(v, m_Constant(&attr)))
    return {};
  auto type = VectorType::get({lanes}, v.getType());
  return arith::ConstantOp::create(b, loc, DenseElementsAttr::get(type, Attribute(attr)));
}

FailureOr<SmallVector<Value>> moe::emitRegionOnVectors(OpBuilder &b, Region &region,
                                                       ValueRange args) {
  Block &block = region.front();
  assert(args.size() == block.getNumArguments() && "one vector per region argument");
  int64_t lanes = cast<VectorType>(args.front().getType()).getNumElements();
  IRMapping map;
  map.map(block.getArguments(), args);

  auto lookUp = [&](Operation *user, Value v) -> Value {
    if (Value mapped = map.lookupOrNull(v))
      return mapped;
    Value splat = splatConstant(b, user->getLoc(), v, lanes);
    if (splat)
      map.map(v, splat);
    else
      user->emitOpError("expected operands from its own region or constants, but got a value "
                        "defined outside");
    return splat;
  };

  for (Operation &op : block.without_terminator()) {
    Location loc = op.getLoc();
    if (matchPattern(&op, m_Constant()))
      continue; // splatted at its use
    for (Value operand : op.getOperands())
      if (!lookUp(&op, operand))
        return failure();
    auto operand = [&](unsigned i) { return map.lookup(op.getOperand(i)); };
    if (isa<math::ExpOp>(op)) {
      map.map(op.getResult(0), emitExp(b, loc, operand(0)));
    } else if (isa<math::ErfOp>(op)) {
      map.map(op.getResult(0), emitErf(b, loc, operand(0)));
    } else if (isa<math::TanhOp>(op)) {
      map.map(op.getResult(0), emitTanh(b, loc, operand(0)));
    } else if (isa<math::AbsFOp>(op)) {
      map.map(op.getResult(0), Emitter(b, loc, operand(0)).abs(operand(0)));
    } else if (isa<math::FmaOp>(op)) {
      map.map(op.getResult(0),
              vector::FMAOp::create(b, loc, operand(0), operand(1), operand(2)).getResult());
    } else if (isa<arith::ArithDialect>(op.getDialect()) && op.hasTrait<OpTrait::Elementwise>() &&
               op.getNumRegions() == 0) {
      Operation *clone = b.clone(op, map);
      for (auto [from, to] : llvm::zip(op.getResults(), clone->getResults())) {
        to.setType(VectorType::get({lanes}, from.getType()));
        map.map(from, to);
      }
    } else {
      op.emitOpError("expected arith, math.exp, math.erf, math.tanh, math.absf or math.fma in a "
                     "kernel epilogue, but got an operation without a vector form");
      return failure();
    }
  }
  SmallVector<Value> results;
  Operation *terminator = block.getTerminator();
  for (Value v : terminator->getOperands()) {
    Value mapped = lookUp(terminator, v);
    if (!mapped)
      return failure();
    results.push_back(mapped);
  }
  return results;
}

namespace {
/// math.exp and others on vectors of f32.
template <typename MathOp, Value (*emit)(OpBuilder &, Location, Value)>
struct ExpandMath : OpRewritePattern<MathOp> {
  using OpRewritePattern<MathOp>::OpRewritePattern;
  LogicalResult matchAndRewrite(MathOp op, PatternRewriter &rewriter) const override {
    auto type = dyn_cast<VectorType>(op.getType());
    if (!type || type.getRank() != 1 || type.isScalable() || !type.getElementType().isF32())
      return rewriter.notifyMatchFailure(op, "expected a rank-1 vector of f32");
    rewriter.replaceOp(op, emit(rewriter, op.getLoc(), op.getOperand()));
    return success();
  }
};
} // namespace

void moe::populateVectorMathPatterns(RewritePatternSet &patterns) {
  patterns.add<ExpandMath<math::ExpOp, emitExp>, ExpandMath<math::ErfOp, emitErf>,
               ExpandMath<math::TanhOp, emitTanh>>(patterns.getContext());
}
