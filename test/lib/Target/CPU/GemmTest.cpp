//===- GemmTest.cpp - Products of every tile ------------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelTest.h"

#include <chrono>
#include <limits>

static double activate(StringRef name, double g, double u) {
  if (name == "silu")
    return g / (1 + std::exp(-g)) * u;
  if (name == "silu1")
    return g / (1 + std::exp(-g));
  if (name == "gelu")
    return 0.5 * g * (1 + std::erf(g * 0.70710678118654752)) * u;
  if (name == "gelu_tanh")
    return 0.5 * g * (1 + std::tanh(0.79788456080286536 * (g + 0.044715 * g * g * g))) * u;
  return (std::isnan(g) ? g : std::max(g, 0.0)) * u;
}

std::vector<GemmCase> makeGemmCases(KernelLevel level, ModuleOp functions) {
  std::vector<GemmCase> cases;
  auto add = [&](GemmKernelSpec spec, StringRef activation = "") {
    if (!spec.fitsRegisters())
      return; // an order that is not the tile's own
    if (!activation.empty()) {
      auto function = functions.lookupSymbol<func::FuncOp>(activation);
      spec.epilogue = &function.getBody();
      spec.epilogueName = activation.str();
    }
    std::vector<int64_t> counts = {spec.rows};
    if (tileLevel)
      counts = spec.rows == 16 ? std::vector<int64_t>{1, 2, 15, 16}
                               : std::vector<int64_t>{17, 18, 31, 32};
    for (int64_t rows : counts)
      cases.push_back({spec, spec.getName(), activation.str(), rows});
    if (spec.defer)
      cases.push_back({spec, spec.getName(), activation.str(), 32, /*before=*/true});
  };
  for (int64_t panels = 1; panels <= (tileLevel ? 1 : GemmKernelSpec::getMaxPanels(level));
       ++panels)
    for (int64_t rows = tileLevel ? 16 : 1; rows <= (tileLevel ? 32 : 16);
         rows += tileLevel ? 16 : 1)
      for (bool bf16 : {false, true}) {
        if (dotLevel && !bf16)
          continue;
        GemmKernelSpec spec;
        spec.product = tileLevel  ? KernelProduct::TileBF16
                       : dotLevel ? KernelProduct::DotBF16
                                  : KernelProduct::Fma;
        spec.level = level;
        spec.rows = rows;
        spec.panels = panels;
        spec.bf16Weights = bf16;
        if (!spec.fitsRegisters())
          continue;
        add(spec);
        GemmKernelSpec s = spec;
        s.form = KernelForm::Combine;
        s.bf16Result = bf16;
        s.prefetch = 1024;
        add(s);
        if (panels == 1) {
          s.ahead = 8;
          add(s);
        }
        if (panels == 1) {
          s.steps = true;
          add(s);
        }
        if (tileLevel) {
          s.nearRows = true;
          add(s);
          s.nearRows = false;
          s.defer = 2;
          add(s);
          s.ahead = 32;
          s.defer = 1;
          add(s);
          s.defer = 0;
        }
        s = spec;
        s.form = KernelForm::Blocked;
        s.parts = 2;
        // Half groups of a bf16 block come from one panel or from pairs of panels.
        s.bf16Result = dotLevel && (panels == 1 || panels % 2 == 0);
        add(s, "silu");
        if (tileLevel) {
          s.steps = true;
          s.defer = 2;
          add(s, "silu");
          s.defer = 8;
          add(s, "silu");
          s.steps = false;
          s.defer = 0;
        }
        // The other forms and activations on a few tiles: they share the loop.
        bool few = panels <= 2 && (tileLevel || rows <= 3 || rows == 6 || rows == 14);
        if (!few)
          continue;
        s.parts = 1;
        add(s);
        add(s, "silu1");
        if (dotLevel && !tileLevel) {
          s.bf16Result = false;
          add(s);
        }
        s.parts = 2;
        s.steps = panels == 1;
        s.defer = tileLevel ? 4 : 0;
        add(s, "gelu");
        add(s, "gelu_tanh");
        add(s, "relu");
        s = spec;
        s.parts = 2;
        s.steps = tileLevel;
        add(s);
        s.defer = tileLevel;
        add(s, "silu");
        s.parts = 1;
        s.bf16Result = true;
        add(s);
        s.form = KernelForm::Combine;
        s.bf16Result = !bf16;
        add(s);
        s.indexed = s.weighted = false;
        add(s);
        s.steps = panels == 1;
        s.defer = 0;
        add(s);
        s = spec;
        if (tileLevel)
          continue; // one order, and both kinds of prefetch
        s.order = LoadOrder::BFirst;
        add(s);
        s.order = LoadOrder::AFirst;
        add(s);
      }
  // Sums in f64.
  for (int64_t panels = 1; panels <= GemmKernelSpec::getMaxPanels(level) && !dotLevel; ++panels)
    for (int64_t rows = 1; rows <= 8; ++rows) {
      GemmKernelSpec spec;
      spec.product = KernelProduct::FmaF64;
      spec.level = level;
      spec.rows = rows;
      spec.panels = panels;
      spec.prefetch = rows % 2 ? 1024 : 0;
      add(spec);
    }
  return cases;
}

/// Random product operands in their packed forms, and the exact chain.
struct Operands {
  int64_t rows, panels, depth, groups, panelBytes;
  bool bf16, steps = false;
  /// Of the block before: what its kernel call wants of it, and its 1024 sums.
  char *before = nullptr;
  const float *waiting = nullptr;
  bool defers = false;
  int64_t most = 0; // rows that the kernel takes

  void follow(const GemmCase &test) {
    steps = test.spec.steps;
    defers = test.spec.defer;
    most = test.spec.rows;
  }
  std::vector<float> a, b; // [rows][depth], [depth][panels*32] by lane
  Buffer aBlock, bPanels;

  static int64_t bytesA(int64_t rows, int64_t depth) {
    return dotLevel ? (depth + 31) / 32 * 32 * rows * 2 : (depth + 15) / 16 * 16 * rows * 4;
  }

  Operands(std::mt19937 &random, int64_t rows, int64_t panels, int64_t depth, bool bf16)
      : rows(rows), panels(panels), depth(depth),
        groups(dotLevel ? (depth + 31) / 32 : (depth + 15) / 16),
        panelBytes((depth + 31) / 32 * 32 * 32 * (bf16 ? 2 : 4)), bf16(bf16), a(rows * depth),
        b(depth * panels * 32), aBlock(bytesA(rows, depth) + (tileLevel ? 960 : 0)),
        bPanels(panelBytes * panels) {
    std::normal_distribution<float> normal;
    for (float &v : a)
      v = normal(random);
    for (float &v : b) {
      v = normal(random) / std::sqrt(static_cast<float>(depth)) * 2;
      if (bf16)
        v = fromBF16(toBF16(v));
    }
    if (dotLevel) {
      // Rows of bf16, some of them subnormal; the first column's sums are subnormal for a while.
      for (float &v : a)
        v = random() % 16 ? fromBF16(toBF16(v)) : floatOf((random() & 0x807f) << 16);
      for (int64_t k = 0; k < depth; ++k)
        b[k * panels * 32] = k < depth / 2 ? floatOf((0x0100 + random() % 64) << 16) : 0.5f;
    }
    pack();
  }
  void pack() {
    std::memset(aBlock.data(), 0, bytesA(rows, depth));
    std::memset(bPanels.data(), 0, panelBytes * panels);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < depth; ++k)
        if (dotLevel)
          aBlock.as<uint16_t>()[k / 32 * rows * 32 + r * 32 + k % 32] = toBF16(a[r * depth + k]);
        else
          aBlock.as<float>()[k / 16 * rows * 16 + r * 16 + k % 16] = a[r * depth + k];
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t c = 0; c < panels * 32; ++c) {
        char *panel = bPanels.data() + c / 32 * panelBytes;
        float v = b[k * panels * 32 + c];
        if (bf16)
          reinterpret_cast<uint16_t *>(panel)[k / 2 * 64 + c % 32 * 2 + k % 2] = toBF16(v);
        else
          reinterpret_cast<float *>(panel)[k * 32 + c % 32] = v;
      }
  }
  /// Zero, with its sign, for subnormals.
  static float flush(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? v * 0.0f : v; }
  /// Lane c of row r: one chain of fused multiply-adds, k ascending. vdpbf16ps takes pairs of k, of
  /// each first the odd one, and reads and writes subnormals as zero (Intel's manual; an EPYC of
  /// Zen 4 agrees bit for bit).
  float chain(int64_t r, int64_t c) const {
    float sum = 0.0f;
    if (tileLevel) {
      // tdpbf16ps: 32 k at a time the sum of the even and that of the odd products.
      for (int64_t tile = 0; tile < depth; tile += 32) {
        float parts[2] = {0, 0};
        for (int64_t k = tile; k < tile + 32; ++k) {
          float x = k < depth ? flush(a[r * depth + k]) : 0;
          float y = k < depth ? flush(b[k * panels * 32 + c]) : 0;
          parts[k % 2] = flush(std::fma(x, y, parts[k % 2]));
        }
        sum = flush(sum + flush(parts[0] + parts[1]));
      }
      return sum;
    }
    if (dotLevel) {
      for (int64_t pair = 0; pair < depth; pair += 2)
        for (int64_t k : {pair + 1, pair})
          if (k < depth)
            sum = flush(std::fma(flush(a[r * depth + k]), flush(b[k * panels * 32 + c]), sum));
          else
            sum = flush(std::fma(0.0f, 0.0f, sum));
      return sum;
    }
    for (int64_t k = 0; k < depth; ++k)
      sum = std::fma(a[r * depth + k], b[k * panels * 32 + c], sum);
    return sum;
  }
  /// The same chain in f64, rounded once. (A product of two floats is exact in f64.)
  float wideChain(int64_t r, int64_t c) const {
    double sum = 0.0;
    for (int64_t k = 0; k < depth; ++k)
      sum += static_cast<double>(a[r * depth + k]) * static_cast<double>(b[k * panels * 32 + c]);
    return static_cast<float>(sum);
  }
  double exact(int64_t r, int64_t c, double &magnitude) const {
    double sum = 0;
    magnitude = 0;
    for (int64_t k = 0; k < depth; ++k) {
      double p = double(a[r * depth + k]) * double(b[k * panels * 32 + c]);
      sum += p;
      magnitude += std::fabs(p);
    }
    return sum;
  }
};

/// Element (r, c) of a blocked result.
static float blockedAt(const GemmCase &test, Buffer &out, int64_t r, int64_t c) {
  if (test.spec.bf16Result)
    return fromBF16(out.as<uint16_t>()[c / 32 * test.rows * 32 + r * 32 + c % 32]);
  return out.as<float>()[c / 16 * test.rows * 16 + r * 16 + c % 16];
}

/// Calls a kernel; one of tiles takes the rows of the block before the arguments of its form, and
/// one that works in steps of k is called for three of them at a time.
template <typename... Args>
static void callKernel(void *address, const Operands &operands, char *out, Args... args) {
  Operands &in = const_cast<Operands &>(operands);
  char *a = in.aBlock.data(), *b = in.bPanels.data();
  if (in.steps) {
    // The sums of the block before, then those of the block.
    std::vector<float> memory(2048, std::numeric_limits<float>::quiet_NaN());
    float *sums = memory.data() + 1024;
    if (in.waiting)
      std::copy(in.waiting, in.waiting + 1024, memory.data());
    for (int64_t first = 0; first < in.groups; first += 3) {
      int64_t end = std::min(first + 3, in.groups);
      if (in.defers)
        reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, int64_t, Args...,
                                  int64_t, int64_t, float *, char *, int64_t)>(address)(
            a, b, in.groups, in.panelBytes, in.waiting && in.before == out ? nullptr : out,
            std::min(in.rows, in.most), args..., first, end, sums, in.before, int64_t(!in.waiting));
      else if (tileLevel)
        reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, int64_t, Args...,
                                  int64_t, int64_t, float *)>(address)(
            a, b, in.groups, in.panelBytes, out, in.rows, args..., first, end, sums);
      else
        reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, Args..., int64_t,
                                  int64_t, float *)>(address)(a, b, in.groups, in.panelBytes, out,
                                                              args..., first, end, sums);
    }
  } else if (tileLevel)
    reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, int64_t, Args...)>(address)(
        a, b, in.groups, in.panelBytes, out, in.rows, args...);
  else
    reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, Args...)>(address)(
        a, b, in.groups, in.panelBytes, out, args...);
}

void checkGemm(const GemmCase &test, void *address, int64_t depth, std::mt19937 &random) {
  const GemmKernelSpec &spec = test.spec;
  Operands in(random, test.rows, spec.panels, depth, spec.bf16Weights);
  in.follow(test);
  int64_t lanes = spec.panels * 32, rows = test.rows;
  std::vector<float> chain(rows * lanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < lanes; ++c) {
      chain[r * lanes + c] = spec.isWide() ? in.wideChain(r, c) : in.chain(r, c);
      double magnitude, exact = in.exact(r, c, magnitude);
      // The oracle itself against float64.
      if (std::fabs(chain[r * lanes + c] - exact) > 6e-8 * depth * magnitude + 1e-30)
        fail("{0}: the oracle's chain is off", test.name);
    }
  if (test.before)
    in.waiting = chain.data();
  auto leavesAt = [&](char *place) { in.before = test.before ? place : nullptr; };
  int64_t columns = lanes / spec.parts; // merged output columns
  // Lane of part `part` of merged column c.
  auto laneOf = [&](int64_t c, int64_t part) {
    int64_t perPanel = 32 / spec.parts;
    return c / perPanel * 32 + part * perPanel + c % perPanel;
  };
  auto where = [&](int64_t r, int64_t c) {
    return llvm::formatv("{0} depth {1} row {2} column {3}", test.name, depth, r, c).str();
  };
  // The merged value and whether it must match bit for bit.
  auto compare = [&](int64_t r, int64_t c, int64_t part, float got) {
    if (test.activation.empty()) {
      float want = chain[r * lanes + laneOf(c, part)];
      if (spec.form == KernelForm::Blocked && spec.bf16Result)
        want = fromBF16(toBF16(want));
      if (!sameBits(want, got))
        fail("{0}: expected {1}, but got {2}", where(r, c), want, got);
      return;
    }
    double gate = chain[r * lanes + laneOf(c, 0)];
    double up = spec.parts == 2 ? chain[r * lanes + laneOf(c, 1)] : 1.0;
    double want = activate(test.activation, gate, up);
    double bound = 4e-7 * std::fabs(want) + 1.5e-7 * std::fabs(gate * up);
    if (spec.form == KernelForm::Blocked && spec.bf16Result)
      bound += std::fabs(want) / 256; // half a unit of bf16
    if (!(std::fabs(want - got) <= bound))
      fail("{0}: expected {1}, but got {2}", where(r, c), want, got);
  };

  switch (spec.form) {
  case KernelForm::Blocked: {
    // One panel of 16 columns writes half of a group of a bf16 block: the first alone, the first
    // and zeros after it, the second.
    bool half = spec.bf16Result && columns == 16;
    for (int place = 0; place < (half ? 3 : 1); ++place)
      for (int64_t real : {columns, columns + 100, columns - 1, columns - 15, int64_t(1)}) {
        Buffer out(spec.bf16Result ? (columns + 31) / 32 * rows * 64 : columns * rows * 4);
        char *to = out.data() + (place == 2 ? 32 : 0);
        leavesAt(to);
        if (half)
          callKernel(address, in, to, real, int64_t(place == 1));
        else
          callKernel(address, in, to, real);
        if (!out.guardsHold())
          fail("{0}: wrote outside its block", test.name);
        for (int64_t r = 0; half && r < rows; ++r) {
          int64_t other = r * 64 + (place == 2 ? 0 : 32);
          bool zero = std::all_of(out.data() + other, out.data() + other + 32,
                                  [](char byte) { return byte == 0; });
          if (place == 1 ? !zero : !out.untouched(other, other + 32))
            fail("{0}: the other half of row {1}'s group is wrong", test.name, r);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c) {
            float got = blockedAt(test, out, r, c + (place == 2 ? 16 : 0));
            if (c < real)
              compare(r, c, 0, got);
            else if (bitsOf(got) != 0)
              fail("{0}: expected +0 in the padding, but got {1}", where(r, c), got);
          }
      }
    break;
  }
  case KernelForm::Rows: {
    int64_t outParts = spec.epilogue ? 1 : spec.parts, element = spec.bf16Result ? 2 : 4;
    int64_t partBytes = columns * element + 24, rowBytes = partBytes * outParts + 8;
    for (int64_t real : {columns, columns + 100, columns - 1, columns - 15, int64_t(1)}) {
      Buffer out(rowBytes * rows);
      leavesAt(out.data());
      callKernel(address, in, out.data(), rowBytes, partBytes, real);
      if (!out.guardsHold())
        fail("{0}: wrote outside its rows", test.name);
      real = std::min(real, columns);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t part = 0; part < outParts; ++part) {
          int64_t at = r * rowBytes + part * partBytes;
          for (int64_t c = 0; c < real; ++c)
            if (spec.bf16Result) {
              uint16_t want = toBF16(chain[r * lanes + laneOf(c, part)]);
              if (reinterpret_cast<uint16_t *>(out.data() + at)[c] != want)
                fail("{0}: expected bf16 bits {1}", where(r, c), want);
            } else {
              compare(r, c, part, reinterpret_cast<float *>(out.data() + at)[c]);
            }
          if (!out.untouched(at + real * element, at + columns * element + 24))
            fail("{0}: wrote beyond the columns of row {1}", test.name, r);
        }
    }
    break;
  }
  case KernelForm::Combine: {
    for (int64_t slots : {1, 3}) {
      // One token per row, in shuffled order; the last row repeats the first row's token.
      int64_t tokens = rows + 2;
      std::vector<int32_t> pairs(rows);
      for (int64_t r = 0; r < rows; ++r)
        pairs[r] = static_cast<int32_t>(((rows - r) % tokens) * slots + r % slots);
      if (rows > 1)
        pairs[rows - 1] = pairs[0];
      std::vector<float> weights(tokens * slots);
      for (float &w : weights)
        w = std::uniform_real_distribution<float>(0, 1)(random);
      int64_t scratchBytes = tokens * 128;
      Buffer y(scratchBytes * spec.panels);
      std::vector<float> want(tokens * lanes);
      for (float &v : want)
        v = std::normal_distribution<float>()(random);
      auto yAt = [&](int64_t token, int64_t c) -> float & {
        return y.as<float>()[c / 32 * tokens * 32 + token * 32 + c % 32];
      };
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < lanes; ++c)
          yAt(t, c) = want[t * lanes + c];
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < lanes; ++c) {
          float row = chain[r * lanes + c];
          if (spec.bf16Result)
            row = fromBF16(toBF16(row));
          int64_t token = spec.indexed ? pairs[r] / slots : r + 1;
          float &v = want[token * lanes + c];
          v = spec.indexed ? std::fma(weights[pairs[r]], row, v) : v + row;
        }
      leavesAt(spec.indexed ? reinterpret_cast<char *>(pairs.data()) : y.data() + 128);
      if (!spec.indexed)
        callKernel(address, in, y.data() + 128, scratchBytes);
      else
        callKernel(address, in, y.data(), scratchBytes, pairs.data(), weights.data(), slots);
      if (!y.guardsHold())
        fail("{0}: wrote outside the scratch", test.name);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < lanes; ++c)
          if (!sameBits(want[t * lanes + c], yAt(t, c)))
            fail("{0}: token {1} expected {2}, but got {3}", where(0, c), t, want[t * lanes + c],
                 yAt(t, c));
    }
    break;
  }
  }
}

/// Prints the best rate of the kernel alone, operands in cache.
void benchGemm(const GemmCase &test, void *address, int64_t depth, std::mt19937 &random) {
  const GemmKernelSpec &spec = test.spec;
  if (test.before ||
      (spec.form != KernelForm::Blocked && (spec.form != KernelForm::Rows || spec.parts != 1)))
    return;
  Operands in(random, test.rows, spec.panels, depth, spec.bf16Weights);
  in.follow(test);
  int64_t columns = spec.panels * 32;
  Buffer out(columns * test.rows * 8);
  double best = 1e30;
  for (int repeat = 0; repeat < 200; ++repeat) {
    auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 20; ++i)
      callKernel(address, in, out.data(), columns * 4, columns * 4, columns);
    std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    best = std::min(best, time.count() / 20);
  }
  llvm::outs() << llvm::formatv("{0}: {1:f1} GF/s\n", test.name,
                                2.0 * test.rows * columns * depth / best * 1e-9);
}

/// NaN and infinity stay in their rows; padding columns stay zero.
void checkGemmNaN(const GemmCase &test, void *address, std::mt19937 &random) {
  const GemmKernelSpec &spec = test.spec;
  if (spec.form != KernelForm::Blocked || test.rows < 3 || test.before)
    return;
  Operands in(random, test.rows, spec.panels, 33, spec.bf16Weights);
  in.follow(test);
  in.a[5] = std::numeric_limits<float>::quiet_NaN();
  in.a[2 * 33 + 7] = std::numeric_limits<float>::infinity();
  // Make the last column of weights zero padding.
  int64_t columns = spec.panels * 32 / spec.parts;
  for (int64_t k = 0; k < 33; ++k)
    for (int64_t part = 0; part < spec.parts; ++part)
      in.b[k * spec.panels * 32 + spec.panels * 32 - 1 - part * (32 / spec.parts)] = 0;
  in.pack();
  Buffer out(columns * test.rows * 4);
  if (spec.bf16Result && columns == 16)
    callKernel(address, in, out.data(), columns - 1, int64_t(0));
  else
    callKernel(address, in, out.data(), columns - 1);
  for (int64_t r = 0; r < test.rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      float v = blockedAt(test, out, r, c);
      if (c == columns - 1 ? bitsOf(v) != 0 : r == 0 ? !std::isnan(v) : r != 2 && !std::isfinite(v))
        fail("{0}: NaN test, row {1} column {2} is {3}", test.name, r, c, v);
    }
}
