//===- SmallKernelTest.cpp - Vector math, packing, panels, selection ------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelTest.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"

#include <limits>

//===----------------------------------------------------------------------===//
// Vector math
//===----------------------------------------------------------------------===//

static constexpr int64_t kMathLanes = 16;

void emitMath(OpBuilder &b, Location loc, KernelLevel level, StringRef name,
              Value (*emit)(OpBuilder &, Location, Value)) {
  auto ptr = LLVM::LLVMPointerType::get(b.getContext());
  auto function = func::FuncOp::create(b, loc, (Twine("math_") + name).str(),
                                       b.getFunctionType({ptr, ptr}, {}));
  function->setAttr("target_cpu", b.getStringAttr(getLevelName(level)));
  OpBuilder::InsertionGuard guard(b);
  b.setInsertionPointToStart(function.addEntryBlock());
  auto type = VectorType::get({kMathLanes}, b.getF32Type());
  Value x = LLVM::LoadOp::create(b, loc, type, function.getArgument(0), 4);
  LLVM::StoreOp::create(b, loc, emit(b, loc, x), function.getArgument(1), 4);
  func::ReturnOp::create(b, loc, ValueRange{});
}

static double ulpOf(double v) {
  int exponent;
  std::frexp(v, &exponent);
  return std::ldexp(1.0, std::max(exponent, -125) - 24);
}

void checkMath(StringRef name, void *address, double (*oracle)(double), double maxUlp,
               double maxAbsolute, float flushBelow) {
  auto kernel = reinterpret_cast<void (*)(const float *, float *)>(address);
  double worst = 0, worstAbsolute = 0;
  float worstAt = 0;
  uint64_t step = exhaustive ? 1 : 997;
  float in[kMathLanes], out[kMathLanes];
  for (uint64_t u = 0; u < (uint64_t(1) << 32);) {
    for (float &v : in) {
      v = floatOf(static_cast<uint32_t>(std::min<uint64_t>(u, 0xffffffffu)));
      u += step;
    }
    kernel(in, out);
    for (int i = 0; i < kMathLanes; ++i) {
      if (std::isnan(in[i])) {
        if (!std::isnan(out[i]))
          fail("{0}(NaN) = {1}", name, out[i]);
        continue;
      }
      double want = oracle(in[i]);
      if (std::fabs(want) < flushBelow) {
        if (std::fabs(out[i]) > flushBelow)
          fail("{0}({1}) = {2}, expected a flush to zero", name, in[i], out[i]);
        continue;
      }
      if (std::fabs(want) > std::numeric_limits<float>::max()) {
        if (out[i] != static_cast<float>(want))
          fail("{0}({1}) = {2}, expected {3}", name, in[i], out[i], want);
        continue;
      }
      double error = std::fabs(out[i] - want), ulps = error / ulpOf(want);
      worstAbsolute = std::max(worstAbsolute, std::isnan(error) ? INFINITY : error);
      if (!(ulps <= worst)) {
        worst = ulps;
        worstAt = in[i];
      }
    }
  }
  llvm::outs() << llvm::formatv("{0}: largest error {1:f2} ulp (at {2}), {3:e} absolute\n", name,
                                worst, worstAt, worstAbsolute);
  if (maxUlp && !(worst <= maxUlp))
    fail("{0}: expected at most {1} ulp, but got {2}", name, maxUlp, worst);
  if (maxAbsolute && !(worstAbsolute <= maxAbsolute))
    fail("{0}: expected at most {1} absolute, but got {2}", name, maxAbsolute, worstAbsolute);
}

void checkRound(void *address) {
  auto kernel = reinterpret_cast<void (*)(const float *, float *)>(address);
  float in[kMathLanes], out[kMathLanes];
  for (uint64_t u = 0; u < (uint64_t(1) << 32);) {
    for (float &v : in) {
      v = floatOf(static_cast<uint32_t>(std::min<uint64_t>(u, 0xffffffffu)));
      u += exhaustive ? 1 : 499;
    }
    kernel(in, out);
    for (int i = 0; i < kMathLanes; ++i)
      if (bitsOf(out[i]) != static_cast<uint32_t>(toBF16(in[i])) << 16)
        fail("bf16({0}) = {1}", in[i], out[i]);
  }
}

//===----------------------------------------------------------------------===//
// Packing, panels, selection
//===----------------------------------------------------------------------===//

void checkPack(const PackKernelSpec &spec, void *address, std::mt19937 &random) {
  for (int64_t columns : {1, 8, 15, 16, 17, 33, 48, 130})
    for (int64_t rows : {1, 3, 14}) {
      int64_t element = spec.bf16Source ? 2 : 4, rowBytes = (columns + 5) * element;
      int64_t tokens = 20, slots = 3, width = spec.bf16Block ? 32 : 16;
      int64_t groups = (columns + width - 1) / width;
      // The last row ends exactly at the end of the source.
      std::vector<char> x(rowBytes * (tokens - 1) + columns * element);
      std::vector<float> values(tokens * columns);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < columns; ++c) {
          float v = std::normal_distribution<float>()(random);
          if (c == 4 && t % 5 == 1)
            v = std::numeric_limits<float>::quiet_NaN();
          char *p = x.data() + t * rowBytes + c * element;
          if (spec.bf16Source) {
            uint16_t h = toBF16(v);
            std::memcpy(p, &h, 2);
            v = fromBF16(h);
          } else {
            std::memcpy(p, &v, 4);
            if (spec.bf16Compute || spec.bf16Block)
              v = fromBF16(toBF16(v));
          }
          values[t * columns + c] = v;
        }
      std::vector<int32_t> pairs(rows);
      for (int64_t r = 0; r < rows; ++r)
        pairs[r] = static_cast<int32_t>(random() % (tokens * slots));
      pairs[0] = static_cast<int32_t>(tokens * slots - 1);
      Buffer out(groups * rows * 64);
      if (spec.gather)
        reinterpret_cast<void (*)(char *, int64_t, int32_t *, int64_t, int64_t, int64_t, char *)>(
            address)(x.data(), rowBytes, pairs.data(), slots, rows, columns, out.data());
      else
        reinterpret_cast<void (*)(char *, int64_t, int64_t, int64_t, char *)>(address)(
            x.data(), rowBytes, rows, columns, out.data());
      if (!out.guardsHold())
        fail("{0}: wrote outside its block", spec.getName());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < groups * width; ++c) {
          int64_t t = spec.gather ? pairs[r] / slots : r;
          float want = c < columns ? values[t * columns + c] : 0.0f;
          int64_t at = c / width * rows * width + r * width + c % width;
          float got = spec.bf16Block ? fromBF16(out.as<uint16_t>()[at]) : out.as<float>()[at];
          if (!sameBits(want, got))
            fail("{0} columns {1} rows {2}: ({3}, {4}) expected {5}, but got {6}", spec.getName(),
                 columns, rows, r, c, want, got);
        }
    }
}

void checkPanels(const PanelKernelSpec &spec, void *address, std::mt19937 &random) {
  int64_t element = spec.bf16Y ? 2 : 4;
  for (int64_t columns : {1, 31, 32, 33, 64, 130})
    for (int64_t panels : {1, 2, 3})
      for (int64_t accumulate : {0, 1}) {
        int64_t tokens = 5, rowBytes = (columns + 3) * element, scratchBytes = tokens * 128;
        Buffer y(rowBytes * tokens), scratch(scratchBytes * panels);
        int64_t first = columns > 64 ? 96 : 0;
        auto put = [&](char *p, float v) {
          uint16_t h = toBF16(v);
          if (spec.bf16Y)
            std::memcpy(p, &h, 2);
          else
            std::memcpy(p, &v, 4);
        };
        auto get = [&](char *p) {
          float v;
          uint16_t h;
          std::memcpy(&h, p, 2);
          if (spec.bf16Y)
            return fromBF16(h);
          std::memcpy(&v, p, 4);
          return v;
        };
        auto scratchAt = [&](int64_t t, int64_t c) -> float & {
          return scratch.as<float>()[c / 32 * tokens * 32 + t * 32 + c % 32];
        };
        if (spec.begin) {
          for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = 0; c < columns; ++c)
              put(y.data() + t * rowBytes + c * element, std::normal_distribution<float>()(random));
          reinterpret_cast<void (*)(char *, int64_t, char *, int64_t, int64_t, int64_t, int64_t,
                                    int64_t, int64_t)>(address)(scratch.data(), scratchBytes,
                                                                y.data(), rowBytes, tokens, first,
                                                                panels, columns, accumulate);
        } else {
          for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = 0; c < panels * 32; ++c)
              scratchAt(t, c) = std::normal_distribution<float>()(random);
          reinterpret_cast<void (*)(char *, int64_t, char *, int64_t, int64_t, int64_t, int64_t,
                                    int64_t)>(address)(scratch.data(), scratchBytes, y.data(),
                                                       rowBytes, tokens, first, panels, columns);
        }
        if (!scratch.guardsHold() || !y.guardsHold())
          fail("{0}: wrote outside", spec.getName());
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t c = 0; c < panels * 32; ++c) {
            bool real = first + c < columns;
            char *p = y.data() + t * rowBytes + (first + c) * element;
            if (spec.begin) {
              float want = real && accumulate ? get(p) : 0.0f;
              if (!sameBits(want, scratchAt(t, c)))
                fail("{0} columns {1}: expected {2}, but got {3}", spec.getName(), columns, want,
                     scratchAt(t, c));
            } else if (real) {
              float want = scratchAt(t, c);
              if (spec.bf16Y)
                want = fromBF16(toBF16(want));
              if (!sameBits(want, get(p)))
                fail("{0} columns {1}: expected {2}, but got {3}", spec.getName(), columns, want,
                     get(p));
            }
          }
          if (!spec.begin && !y.untouched(t * rowBytes + columns * element, (t + 1) * rowBytes))
            fail("{0}: wrote beyond the columns of y", spec.getName());
        }
      }
}

void checkSelect(const SelectKernelSpec &spec, void *address, std::mt19937 &random) {
  int64_t experts = spec.experts, chosen = spec.router.getTopK(), tokens = 40;
  bool scoreFirst = spec.router.getOrder() == RouterOrder::ScoreThenSelect;
  bool renormalize = spec.router.getRenormalize() == Renormalize::Sum;
  double epsilon = spec.router.getEpsilon(), scale = spec.router.getScale();
  int64_t padded = (experts + 31) / 32 * 32;
  std::vector<float> logits(tokens * padded, std::numeric_limits<float>::quiet_NaN());
  float inf = std::numeric_limits<float>::infinity();
  auto nan = [](int64_t t) { return t == 7 || t == 8 || t == 9; };
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t e = 0; e < experts; ++e) {
      float v = std::normal_distribution<float>(0, 3)(random);
      if (t == 1)
        v = 0.25f; // all equal
      if (t == 2)
        v = e % 2 ? 0.0f : -0.0f; // equal zeros
      if (t == 3)
        v = static_cast<float>(static_cast<int>(v)); // many ties
      if (t == 4 && e % 3 == 0)
        v = -inf;
      if (t == 5)
        v *= 100;
      if (t == 7 && e == experts / 2)
        v = std::numeric_limits<float>::quiet_NaN();
      if (t == 8 && e == experts - 1)
        v = -std::numeric_limits<float>::quiet_NaN();
      if (t == 9)
        v = inf; // inf - inf
      if (t == 10)
        v = -static_cast<float>(e);
      logits[t * padded + e] = v;
    }
  std::vector<float> given = logits;
  auto rounded = [](bool really, double v) {
    return really ? fromBF16(toBF16(static_cast<float>(v))) : v;
  };
  auto step = [&](double v) { return rounded(spec.router.roundsSteps(), v); };
  for (float &v : given)
    v = static_cast<float>(rounded(spec.router.roundsLogits(), v));
  Buffer weights(tokens * chosen * 4), ids(tokens * chosen * 4), copy(tokens * (experts + 3) * 4);
  using Plain = void (*)(float *, int64_t, int64_t, char *, char *);
  using Copying = void (*)(float *, int64_t, int64_t, char *, char *, char *, int64_t);
  if (spec.copyLogits)
    reinterpret_cast<Copying>(address)(logits.data(), padded * 4, tokens, weights.data(),
                                       ids.data(), copy.data(), (experts + 3) * 4);
  else
    reinterpret_cast<Plain>(address)(logits.data(), padded * 4, tokens, weights.data(), ids.data());
  std::string name = spec.getName();
  if (!weights.guardsHold() || !ids.guardsHold() || !copy.guardsHold())
    fail("{0}: wrote outside", name);
  for (int64_t t = 0; t < tokens; ++t) {
    const float *row = &given[t * padded];
    const int32_t *got = ids.as<int32_t>() + t * chosen;
    const float *gotWeights = weights.as<float>() + t * chosen;
    std::vector<bool> used(experts);
    bool valid = true;
    for (int64_t j = 0; j < chosen; ++j) {
      valid &= got[j] >= 0 && got[j] < experts && !used[got[j]];
      if (valid)
        used[got[j]] = true;
    }
    if (!valid) {
      fail("{0}: token {1} has ids that are out of range or repeated", name, t);
      continue;
    }
    if (spec.copyLogits)
      for (int64_t e = 0; e < experts; ++e)
        if (!sameBits(row[e], copy.as<float>()[t * (experts + 3) + e]))
          fail("{0}: token {1} logit {2} is not copied", name, t, e);
    if (nan(t)) {
      for (int64_t j = 0; j < chosen; ++j)
        if (!std::isnan(gotWeights[j]))
          fail("{0}: token {1} expected NaN, but got {2}", name, t, gotWeights[j]);
      continue;
    }
    std::vector<int32_t> order(experts);
    for (int64_t e = 0; e < experts; ++e)
      order[e] = static_cast<int32_t>(e);
    auto sortBy = [&](auto key) {
      std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return key(a) > key(b) || (key(a) == key(b) && a < b);
      });
    };
    sortBy([&](int32_t e) { return row[e]; });
    double top = row[order[0]], total = 0, sum = 0;
    for (int64_t e = 0; e < (scoreFirst ? experts : chosen); ++e)
      total += std::exp(row[order[e]] - top);
    auto score = [&](int32_t e) { return step(std::exp(row[e] - top) / total); };
    if (scoreFirst && spec.router.roundsSteps())
      sortBy(score);
    std::vector<double> want(chosen);
    for (int64_t j = 0; j < chosen; ++j) {
      want[j] = score(order[j]);
      sum += want[j];
    }
    for (int64_t j = 0; j < chosen; ++j) {
      if (renormalize)
        want[j] = step(want[j] / step(step(sum) + epsilon));
      want[j] = rounded(spec.router.roundsWeights(), step(want[j] * scale));
      if (got[j] != order[j])
        fail("{0}: token {1} slot {2} expected expert {3}, but got {4}", name, t, j, order[j],
             got[j]);
      // logit - largest logit is rounded before exp: half an ulp of it is a relative error here.
      double bound = 1e-6 + 1.2e-7 * std::fabs(double(row[order[j]]) - row[order[0]]);
      if (spec.router.roundsWeights() || spec.router.roundsSteps()) {
        bound = 1.0 / 128; // the other side of a rounding
        if (!sameBits(gotWeights[j], fromBF16(toBF16(gotWeights[j]))))
          fail("{0}: token {1} slot {2} expected a weight in bf16, but got {3}", name, t, j,
               gotWeights[j]);
      }
      bool close = std::isnan(want[j]) ? std::isnan(gotWeights[j])
                   : want[j] == 0 ? gotWeights[j] == 0
                                  : std::fabs(gotWeights[j] - want[j]) <= bound * want[j] + 1e-37;
      if (!close)
        fail("{0}: token {1} slot {2} expected weight {3}, but got {4}", name, t, j, want[j],
             gotWeights[j]);
    }
  }
}
