//===- KernelTest.h - what the parts of moe-kernel-test share -------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TEST_KERNELTEST_H
#define MOE_TEST_KERNELTEST_H

#include "moe/Target/CPU/Kernels.h"

#include "mlir/IR/Builders.h"
#include "mlir/IR/BuiltinOps.h"

#include "llvm/Support/CommandLine.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

using namespace mlir;
using namespace mlir::moe;

/// --exhaustive.
extern llvm::cl::opt<bool> exhaustive;
/// The level multiplies pairs of bf16, on tiles.
extern bool dotLevel, tileLevel;
extern int failures;

template <typename... Args> void fail(const char *format, Args &&...args) {
  if (++failures <= 40)
    llvm::errs() << "FAILED: " << llvm::formatv(format, std::forward<Args>(args)...) << "\n";
}

//===----------------------------------------------------------------------===//
// Scalars and memory
//===----------------------------------------------------------------------===//

inline uint32_t bitsOf(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float floatOf(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
/// To nearest, ties to even, by comparing distances: shares nothing with the emitted code.
inline uint16_t toBF16(float v) {
  if (std::isnan(v))
    return static_cast<uint16_t>((bitsOf(v) >> 16) | 0x40);
  uint32_t u = bitsOf(v), low = u & 0xffff, high = u >> 16;
  if (low > 0x8000 || (low == 0x8000 && (high & 1)))
    ++high;
  return static_cast<uint16_t>(high);
}
inline float fromBF16(uint16_t v) { return floatOf(static_cast<uint32_t>(v) << 16); }
inline bool sameBits(float a, float b) {
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
// Products: GemmTest.cpp
//===----------------------------------------------------------------------===//

struct GemmCase {
  GemmKernelSpec spec;
  std::string name, activation;
  int64_t rows; // of a block: a kernel of tiles takes any number up to spec.rows
  /// Of a kernel that defers: the block before is tested, of 32 rows, whose sums wait.
  bool before = false;
};

/// Every tile of the budget in every format and form. `functions`: the activations.
std::vector<GemmCase> makeGemmCases(KernelLevel level, ModuleOp functions);
void checkGemm(const GemmCase &test, void *address, int64_t depth, std::mt19937 &random);
void benchGemm(const GemmCase &test, void *address, int64_t depth, std::mt19937 &random);
void checkGemmNaN(const GemmCase &test, void *address, std::mt19937 &random);

//===----------------------------------------------------------------------===//
// Vector math, packing, panels, selection: SmallKernelTest.cpp
//===----------------------------------------------------------------------===//

void emitMath(OpBuilder &b, Location loc, KernelLevel level, StringRef name,
              Value (*emit)(OpBuilder &, Location, Value));
void checkMath(StringRef name, void *address, double (*oracle)(double), double maxUlp,
               double maxAbsolute, float flushBelow);
void checkRound(void *address);
void checkPack(const PackKernelSpec &spec, void *address, std::mt19937 &random);
void checkPanels(const PanelKernelSpec &spec, void *address, std::mt19937 &random);
void checkSelect(const SelectKernelSpec &spec, void *address, std::mt19937 &random);

#endif // MOE_TEST_KERNELTEST_H
