//===- KernelTest.cpp - Builds and runs every CPU kernel ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// moe-kernel-test --level=x86-64-v3|x86-64-v4|avx512-bf16|amx-bf16 [--asm FILE] [--ir FILE]
//                 [--no-run] [--emulate] [--exhaustive] [--only TEXT] [--bench DEPTH]
//
// Emits every tile of the level's register budget in every weight format and form, compiles them
// with the passes of the compiler and checks them in this process. Products must equal a loop of
// std::fma bit for bit (which is what makes the bits independent of the tile), and a float64 loop
// within f32 accuracy; activations are compared with float64. Every output starts as NaN and has
// guard bytes on both sides that must survive. --asm writes the assembly for asm_loops.py.
//
// avx512-bf16 builds what that level has beyond x86-64-v4, the products of bf16 pairs; their loop
// is a software model of vdpbf16ps (see Operands::chain). amx-bf16 has the products of tiles; with
// --emulate their instructions are executed in software where the machine has none.
//
//===----------------------------------------------------------------------===//

#include "../../../tools/AmxEmulator.h"
#include "moe/Dialect/MoE/IR/MoEDialect.h"
#include "moe/Target/CPU/Codegen.h"
#include "moe/Target/CPU/Kernels.h"
#include "moe/Target/CPU/VectorMath.h"

#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/MLIRContext.h"
#include "mlir/InitAllDialects.h"
#include "mlir/InitAllExtensions.h"
#include "mlir/InitAllPasses.h"
#include "mlir/Parser/Parser.h"
#include "mlir/Pass/PassManager.h"
#include "mlir/Pass/PassRegistry.h"
#include "mlir/Target/LLVMIR/Dialect/All.h"
#include "mlir/Target/LLVMIR/Export.h"

#include "llvm/ADT/StringSet.h"
#include "llvm/ExecutionEngine/Orc/LLJIT.h"
#include "llvm/IR/LegacyPassManager.h"
#include "llvm/IR/Module.h"
#include "llvm/MC/TargetRegistry.h"
#include "llvm/Support/CommandLine.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/InitLLVM.h"
#include "llvm/Support/TargetSelect.h"
#include "llvm/Target/TargetMachine.h"
#include "llvm/TargetParser/Host.h"
#include "llvm/Transforms/Utils/Cloning.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

using namespace mlir;
using namespace mlir::moe;

static llvm::cl::opt<std::string>
    levelName("level", llvm::cl::desc("x86-64-v3, x86-64-v4, avx512-bf16, amx-bf16"),
              llvm::cl::Required);
static llvm::cl::opt<std::string> asmFile("asm", llvm::cl::desc("write the assembly here"));
static llvm::cl::opt<std::string> irFile("ir", llvm::cl::desc("write the optimized LLVM IR here"));
static llvm::cl::opt<int64_t> bench("bench", llvm::cl::desc("time products of this depth"));
static llvm::cl::opt<bool> noRun("no-run", llvm::cl::desc("compile only"));
static llvm::cl::opt<bool> emulate("emulate", llvm::cl::desc("AMX in software"));
static llvm::cl::opt<bool> exhaustive("exhaustive", llvm::cl::desc("math on every float"));
static llvm::cl::opt<std::string> only("only", llvm::cl::desc("kernels whose name contains this"));

/// The level multiplies pairs of bf16, on tiles.
static bool dotLevel = false, tileLevel = false;
static int failures = 0;

template <typename... Args> static void fail(const char *format, Args &&...args) {
  if (++failures <= 40)
    llvm::errs() << "FAILED: " << llvm::formatv(format, std::forward<Args>(args)...) << "\n";
}

//===----------------------------------------------------------------------===//
// Scalars and memory
//===----------------------------------------------------------------------===//

static uint32_t bitsOf(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
static float floatOf(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
/// To nearest, ties to even, by comparing distances: shares nothing with the emitted code.
static uint16_t toBF16(float v) {
  if (std::isnan(v))
    return static_cast<uint16_t>((bitsOf(v) >> 16) | 0x40);
  uint32_t u = bitsOf(v), low = u & 0xffff, high = u >> 16;
  if (low > 0x8000 || (low == 0x8000 && (high & 1)))
    ++high;
  return static_cast<uint16_t>(high);
}
static float fromBF16(uint16_t v) { return floatOf(static_cast<uint32_t>(v) << 16); }
static bool sameBits(float a, float b) {
  return bitsOf(a) == bitsOf(b) || (std::isnan(a) && std::isnan(b));
}

/// Bytes that start as quiet NaNs (in f32 and in bf16), between two guards.
class Buffer {
public:
  explicit Buffer(size_t bytes) : bytes(bytes), store(bytes + 2 * guard) {
    for (size_t i = 0; i < store.size(); ++i)
      store[i] = pattern(i);
  }
  char *data() { return store.data() + guard; }
  template <typename T> T *as() { return reinterpret_cast<T *>(data()); }
  bool guardsHold() const {
    for (size_t i = 0; i < guard; ++i)
      if (store[i] != pattern(i) || store[guard + bytes + i] != pattern(guard + bytes + i))
        return false;
    return true;
  }
  bool untouched(size_t from, size_t to) const {
    for (size_t i = from; i < to; ++i)
      if (store[guard + i] != pattern(guard + i))
        return false;
    return true;
  }

private:
  static constexpr size_t guard = 256;
  static char pattern(size_t i) { return static_cast<char>(i % 2 ? 0x7f : 0xd5); }
  size_t bytes;
  std::vector<char> store;
};

//===----------------------------------------------------------------------===//
// Kernels
//===----------------------------------------------------------------------===//

static const char *epilogues = R"(
func.func private @silu(%g: f32, %u: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %n = arith.negf %g : f32
  %e = math.exp %n : f32
  %d = arith.addf %e, %one : f32
  %s = arith.divf %g, %d : f32
  %m = arith.mulf %s, %u : f32
  return %m : f32
}
func.func private @gelu(%g: f32, %u: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %half = arith.constant 0.5 : f32
  %r = arith.constant 0.707106781 : f32
  %a = arith.mulf %g, %r : f32
  %e = math.erf %a : f32
  %p = arith.addf %e, %one : f32
  %h = arith.mulf %g, %half : f32
  %s = arith.mulf %h, %p : f32
  %m = arith.mulf %s, %u : f32
  return %m : f32
}
func.func private @gelu_tanh(%g: f32, %u: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %half = arith.constant 0.5 : f32
  %c = arith.constant 0.797884583 : f32
  %k = arith.constant 0.044715 : f32
  %g2 = arith.mulf %g, %g : f32
  %g3 = arith.mulf %g2, %g : f32
  %kg = arith.mulf %g3, %k : f32
  %in = arith.addf %g, %kg : f32
  %a = arith.mulf %in, %c : f32
  %t = math.tanh %a : f32
  %p = arith.addf %t, %one : f32
  %h = arith.mulf %g, %half : f32
  %s = arith.mulf %h, %p : f32
  %m = arith.mulf %s, %u : f32
  return %m : f32
}
func.func private @relu(%g: f32, %u: f32) -> f32 {
  %zero = arith.constant 0.0 : f32
  %r = arith.maximumf %g, %zero : f32
  %m = arith.mulf %r, %u : f32
  return %m : f32
}
func.func private @silu1(%g: f32) -> f32 {
  %one = arith.constant 1.0 : f32
  %n = arith.negf %g : f32
  %e = math.exp %n : f32
  %d = arith.addf %e, %one : f32
  %s = arith.divf %g, %d : f32
  return %s : f32
}
)";

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

struct GemmCase {
  GemmKernelSpec spec;
  std::string name, activation;
  int64_t rows; // of a block: a kernel of tiles takes any number up to spec.rows
};

/// Every tile of the budget in every format and form.
static std::vector<GemmCase> makeGemmCases(KernelLevel level, ModuleOp functions) {
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
        if (tileLevel) {
          s.steps = true;
          add(s);
        }
        s = spec;
        s.form = KernelForm::Blocked;
        s.parts = 2;
        // Half groups of a bf16 block come from one panel or from pairs of panels.
        s.bf16Result = dotLevel && (panels == 1 || panels % 2 == 0);
        add(s, "silu");
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
        s.steps = tileLevel;
        add(s, "gelu");
        add(s, "gelu_tanh");
        add(s, "relu");
        s = spec;
        s.parts = 2;
        s.steps = tileLevel;
        add(s);
        add(s, "silu");
        s.parts = 1;
        s.bf16Result = true;
        add(s);
        s.form = KernelForm::Combine;
        s.bf16Result = !bf16;
        add(s);
        s.indexed = s.weighted = false;
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
    std::vector<float> sums(1024, std::numeric_limits<float>::quiet_NaN());
    for (int64_t first = 0; first < in.groups; first += 3)
      reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, int64_t, Args..., int64_t,
                                int64_t, float *)>(address)(
          a, b, in.groups, in.panelBytes, out, in.rows, args..., first,
          std::min(first + 3, in.groups), sums.data());
  } else if (tileLevel)
    reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, int64_t, Args...)>(address)(
        a, b, in.groups, in.panelBytes, out, in.rows, args...);
  else
    reinterpret_cast<void (*)(char *, char *, int64_t, int64_t, char *, Args...)>(address)(
        a, b, in.groups, in.panelBytes, out, args...);
}

static void checkGemm(const GemmCase &test, void *address, int64_t depth, std::mt19937 &random) {
  const GemmKernelSpec &spec = test.spec;
  Operands in(random, test.rows, spec.panels, depth, spec.bf16Weights);
  in.steps = spec.steps;
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
        callKernel(address, in, out.data() + (place == 2 ? 32 : 0), real, int64_t(place == 1));
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
static void benchGemm(const GemmCase &test, void *address, int64_t depth, std::mt19937 &random) {
  const GemmKernelSpec &spec = test.spec;
  if (spec.form != KernelForm::Blocked && (spec.form != KernelForm::Rows || spec.parts != 1))
    return;
  Operands in(random, test.rows, spec.panels, depth, spec.bf16Weights);
  in.steps = spec.steps;
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
static void checkGemmNaN(const GemmCase &test, void *address, std::mt19937 &random) {
  const GemmKernelSpec &spec = test.spec;
  if (spec.form != KernelForm::Blocked || test.rows < 3)
    return;
  Operands in(random, test.rows, spec.panels, 33, spec.bf16Weights);
  in.steps = spec.steps;
  in.a[5] = std::numeric_limits<float>::quiet_NaN();
  in.a[2 * 33 + 7] = std::numeric_limits<float>::infinity();
  // Make the last column of weights zero padding.
  int64_t columns = spec.panels * 32 / spec.parts;
  for (int64_t k = 0; k < 33; ++k)
    for (int64_t part = 0; part < spec.parts; ++part)
      in.b[k * spec.panels * 32 + spec.panels * 32 - 1 - part * (32 / spec.parts)] = 0;
  in.pack();
  Buffer out(columns * test.rows * 4);
  callKernel(address, in, out.data(), columns - 1, int64_t(0));
  for (int64_t r = 0; r < test.rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      float v = blockedAt(test, out, r, c);
      if (c == columns - 1 ? bitsOf(v) != 0 : r == 0 ? !std::isnan(v) : r != 2 && !std::isfinite(v))
        fail("{0}: NaN test, row {1} column {2} is {3}", test.name, r, c, v);
    }
}

//===----------------------------------------------------------------------===//
// Vector math
//===----------------------------------------------------------------------===//

static constexpr int64_t kMathLanes = 16;

static void emitMath(OpBuilder &b, Location loc, KernelLevel level, StringRef name,
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

static void checkMath(StringRef name, void *address, double (*oracle)(double), double maxUlp,
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

static void checkRound(void *address) {
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

static void checkPack(const PackKernelSpec &spec, void *address, std::mt19937 &random) {
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

static void checkPanels(const PanelKernelSpec &spec, void *address, std::mt19937 &random) {
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

static void checkSelect(const SelectKernelSpec &spec, void *address, std::mt19937 &random) {
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

//===----------------------------------------------------------------------===//
// Main
//===----------------------------------------------------------------------===//

int main(int argc, char **argv) {
  llvm::InitLLVM init(argc, argv);
  llvm::cl::ParseCommandLineOptions(argc, argv, "builds and runs every CPU kernel\n");
  std::optional<KernelLevel> level = parseKernelLevel(levelName);
  if (!level) {
    llvm::errs() << "expected a level with kernels, but got " << levelName << "\n";
    return 2;
  }
  tileLevel = levelName == "amx-bf16";
  dotLevel = tileLevel || levelName == "avx512-bf16";
  llvm::InitializeNativeTarget();
  llvm::InitializeNativeTargetAsmPrinter();
  llvm::InitializeNativeTargetAsmParser();

  DialectRegistry registry;
  registerAllDialects(registry);
  registerAllExtensions(registry);
  registerAllToLLVMIRTranslations(registry);
  registerAllPasses();
  registry.insert<MoEDialect>();
  MLIRContext context(registry);
  context.loadDialect<MoEDialect>();
  context.loadAllAvailableDialects();
  OwningOpRef<ModuleOp> functions = parseSourceString<ModuleOp>(epilogues, &context);
  if (!functions)
    return 1;

  Location loc = UnknownLoc::get(&context);
  OwningOpRef<ModuleOp> module = ModuleOp::create(loc);
  OpBuilder b(&context);
  b.setInsertionPointToStart(module->getBody());

  auto wanted = [&](StringRef name) { return only.empty() || name.contains(only); };
  std::vector<GemmCase> gemms;
  for (GemmCase &test : makeGemmCases(*level, *functions))
    if (wanted(test.name))
      gemms.push_back(test);
  llvm::StringSet<> emitted;
  for (const GemmCase &test : gemms)
    if (emitted.insert(test.name).second && failed(emitGemmKernel(b, loc, test.spec)))
      return 1;
  if (tileLevel)
    for (bool begin : {true, false})
      emitTileFrame(b, loc, begin);
  std::vector<PackKernelSpec> packs;
  for (int i = 0; i < 8; ++i)
    if (!dotLevel || !(i & 2))
      packs.push_back({*level, bool(i & 1), bool(i & 2), dotLevel, bool(i & 4)});
  std::vector<PanelKernelSpec> panels;
  for (int i = 0; i < 4; ++i)
    panels.push_back({*level, bool(i & 1), bool(i & 2)});
  std::vector<SelectKernelSpec> selects;
  struct Sizes {
    int64_t experts, chosen;
  };
  int variant = 0;
  for (Sizes s : {Sizes{1, 1},
                  {2, 1},
                  {2, 2},
                  {5, 3},
                  {8, 2},
                  {16, 16},
                  {17, 8},
                  {33, 17},
                  {64, 8},
                  {128, 8},
                  {257, 8},
                  {512, 64},
                  {1024, 64}})
    for (bool scoreFirst : {false, true})
      for (bool renormalize : {false, true}) {
        ++variant;
        auto router = RouterAttr::get(
            &context, ScoreFunction::Softmax,
            scoreFirst ? RouterOrder::ScoreThenSelect : RouterOrder::SelectThenScore, s.chosen,
            renormalize ? Renormalize::Sum : Renormalize::None,
            renormalize && variant % 3 ? 1e-20 : 0.0, /*norm_p=*/2.0, variant % 5 ? 1.0 : 2.5,
            RouterPrecision::F32, RouterInput::Plain, LogitTransformAttr(), Selection::TopK,
            SelectionBias::None, GroupsAttr(), /*extra_rows=*/0, /*input_epsilon=*/0.0,
            /*jitter=*/0.0, RouterArithmetic::UpcastLogits, RouterPrecision::Model);
        SelectKernelSpec spec{*level, s.experts, router};
        spec.copyLogits = variant % 2;
        selects.push_back(spec);
      }
  // As models round in bf16.
  for (RouterArithmetic arithmetic :
       {RouterArithmetic::CastInputs, RouterArithmetic::UpcastLogits, RouterArithmetic::ModelDtype})
    for (RouterOrder order : {RouterOrder::ScoreThenSelect, RouterOrder::SelectThenScore})
      for (RouterPrecision weights : {RouterPrecision::F32, RouterPrecision::Model}) {
        auto router = RouterAttr::get(
            &context, ScoreFunction::Softmax, order, /*top_k=*/6,
            order == RouterOrder::ScoreThenSelect ? Renormalize::Sum : Renormalize::None,
            /*epsilon=*/0.0, /*norm_p=*/2.0, /*scale=*/1.5, RouterPrecision::Model,
            RouterInput::Plain, LogitTransformAttr(), Selection::TopK, SelectionBias::None,
            GroupsAttr(), /*extra_rows=*/0, /*input_epsilon=*/0.0, /*jitter=*/0.0, arithmetic,
            weights);
        selects.push_back({*level, /*experts=*/40, router, /*expertScale=*/false,
                           /*copyLogits=*/true});
      }
  llvm::erase_if(packs, [&](const PackKernelSpec &s) { return !wanted(s.getName()); });
  // Rounding what is bf16 already is the same function.
  llvm::erase_if(packs, [](const PackKernelSpec &s) { return s.bf16Source && s.bf16Compute; });
  if (dotLevel) { // The rest is the code of x86-64-v4.
    panels.clear();
    selects.clear();
  }
  llvm::erase_if(panels, [&](const PanelKernelSpec &s) { return !wanted(s.getName()); });
  llvm::erase_if(selects, [&](const SelectKernelSpec &s) { return !wanted(s.getName()); });
  for (const PackKernelSpec &spec : packs)
    emitPackKernel(b, loc, spec);
  for (const PanelKernelSpec &spec : panels)
    emitPanelKernel(b, loc, spec);
  for (const SelectKernelSpec &spec : selects)
    emitSelectKernel(b, loc, spec);
  bool math = wanted("math") && !dotLevel;
  if (math) {
    emitMath(b, loc, *level, "exp", emitExp);
    emitMath(b, loc, *level, "erf", emitErf);
    emitMath(b, loc, *level, "tanh", emitTanh);
    emitMath(b, loc, *level, "round", emitRoundToBF16);
  }

  PassManager pm(&context);
  if (failed(parsePassPipeline("convert-scf-to-cf,convert-vector-to-llvm,convert-to-llvm,"
                               "reconcile-unrealized-casts,canonicalize,cse",
                               pm)) ||
      failed(pm.run(*module)))
    return 1;
  auto llvmContext = std::make_unique<llvm::LLVMContext>();
  std::unique_ptr<llvm::Module> code = translateModuleToLLVMIR(*module, *llvmContext);
  if (!code)
    return 1;
  for (llvm::Function &f : *code)
    if (!f.isDeclaration())
      f.setLinkage(llvm::GlobalValue::ExternalLinkage);

  auto builder = llvm::cantFail(llvm::orc::JITTargetMachineBuilder::detectHost());
  builder.setCPU("x86-64"); // what the functions' attributes do not say is the baseline
  builder.getFeatures() = llvm::SubtargetFeatures();
  builder.setCodeGenOptLevel(llvm::CodeGenOptLevel::Aggressive);
  builder.setRelocationModel(llvm::Reloc::PIC_);
  std::unique_ptr<llvm::TargetMachine> machine = llvm::cantFail(builder.createTargetMachine());
  code->setTargetTriple(machine->getTargetTriple());
  code->setDataLayout(machine->createDataLayout());

  optimizeModule(*code, *machine);

  if (!irFile.empty()) {
    std::error_code error;
    llvm::raw_fd_ostream os(irFile, error);
    code->print(os, nullptr);
  }
  if (!asmFile.empty()) {
    std::error_code error;
    llvm::raw_fd_ostream os(asmFile, error);
    machine->Options.MCOptions.AsmVerbose = true;
    llvm::legacy::PassManager emit;
    std::unique_ptr<llvm::Module> copy = llvm::CloneModule(*code);
    if (error ||
        machine->addPassesToEmitFile(emit, os, nullptr, llvm::CodeGenFileType::AssemblyFile)) {
      llvm::errs() << "expected to write " << asmFile << ", but could not\n";
      return 1;
    }
    emit.run(*copy);
  }
  if (noRun)
    return 0;

  auto jit = llvm::cantFail(llvm::orc::LLJITBuilder().setJITTargetMachineBuilder(builder).create());
  llvm::cantFail(
      jit->addIRModule(llvm::orc::ThreadSafeModule(std::move(code), std::move(llvmContext))));
  auto address = [&](const std::string &name) {
    return llvm::cantFail(jit->lookup(name)).toPtr<void *>();
  };

  if (emulate)
    amx_emulate();
  if (tileLevel)
    reinterpret_cast<void (*)()>(address(getTileFrameName(/*begin=*/true).str()))();
  std::mt19937 random(7);
  if (bench) {
    for (const GemmCase &test : gemms)
      benchGemm(test, address(test.name), bench, random);
    return 0;
  }
  for (const GemmCase &test : gemms) {
    for (int64_t depth : {1, 16, 33, 130})
      checkGemm(test, address(test.name), depth, random);
    checkGemmNaN(test, address(test.name), random);
  }
  for (const PackKernelSpec &spec : packs)
    checkPack(spec, address(spec.getName()), random);
  for (const PanelKernelSpec &spec : panels)
    checkPanels(spec, address(spec.getName()), random);
  for (const SelectKernelSpec &spec : selects)
    checkSelect(spec, address(spec.getName()), random);
  if (math) {
    float smallest = std::numeric_limits<float>::min();
    checkMath("exp", address("math_exp"), [](double v) { return std::exp(v); }, 2.0, 0, smallest);
    checkMath("erf", address("math_erf"), [](double v) { return std::erf(v); }, 0, 1e-7, smallest);
    checkMath(
        "tanh", address("math_tanh"), [](double v) { return std::tanh(v); }, 4.0, 0, smallest);
    checkRound(address("math_round"));
  }
  if (tileLevel)
    reinterpret_cast<void (*)()>(address(getTileFrameName(/*begin=*/false).str()))();
  if (emulate && !amx_products)
    fail("expected instructions of AMX in software, but got none");
  llvm::outs() << llvm::formatv(
      "{0}: {1} products, {2} packs, {3} panels, {4} selections: ", levelName, gemms.size(),
      packs.size(), panels.size(), selects.size());
  if (failures) {
    llvm::outs() << failures << " failures\n";
    return 1;
  }
  llvm::outs() << "passed\n";
  return 0;
}
