//===- Simt.h - runs GPU kernels on the CPU ---------------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A machine for tests, not for speed: every thread of a block is a fiber, blocks run one after
// another. What the hardware leaves open is settled against the kernel: warps run in an order of
// choice, as far as they can; shared memory begins as NaN; an asynchronous copy lands as late (or
// as early) as it may. What the programming model forbids stops the launch with a sentence:
//
//   * races in shared memory: accesses without a barrier, mbarrier or warp that synchronises
//     between them, with copies and boxes in flight, with operands of a wgmma in flight;
//   * a fence to the asynchronous proxy (or of an mbarrier's initialisation) that is missing;
//     accumulators that are read before their wgmma was waited for; boxes and descriptors that the
//     hardware would not take;
//   * accesses outside of the buffers that the machine was told of, misaligned ones, reads of
//     bytes that nobody wrote; bytes that blocks of one launch exchange;
//   * lanes of a warp at different collectives; barriers that not all threads reach; threads that
//     wait for ever.
//
// Code comes from the pass moe-gpu-to-simt, which calls the functions at the end.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_GPU_SIMT_H
#define MOE_TARGET_GPU_SIMT_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moec/module.h"

namespace mlir::moe::simt {

/// In which order the warps of a block run, and the lanes of a warp.
enum class Order { Forward, Reverse, Shuffled };

struct Options {
  Order order = Order::Forward;
  uint64_t seed = 0;         ///< of Order::Shuffled
  bool earlyCopies = false;  ///< copies land when they are ordered, not when they are waited for
  size_t maxShared = 163840; ///< bytes of shared memory that a block can have: 232448 on sm_90
};

/// What was run, for tests that must not pass because nothing ran.
struct Statistics {
  uint64_t launches = 0, blocks = 0, barriers = 0, collectives = 0, copies = 0, products = 0;
  uint64_t boxes = 0, wgmmas = 0;
};

class Machine {
public:
  explicit Machine(Options options);
  ~Machine();

  /// Declares global memory. Bytes of a region that is not `written` are an error to read before a
  /// kernel writes them; `readOnly` ones are an error to write.
  void addRegion(const void *data, size_t bytes, std::string name, bool written, bool readOnly);

  /// Runs all blocks of a launch; `kernel` is a function `<kernel>_simt`. False where the launch,
  /// or one before it, failed.
  bool launch(void (*kernel)(void *const *arguments), const moec_gpu_launch &launch);

  /// Empty, or what went wrong first, in words.
  const std::string &error() const;
  const Statistics &statistics() const;

  struct Impl;

private:
  std::unique_ptr<Impl> impl;
};

/// Fills the 128 bytes of a tensor map, which only this machine understands; empty, or what the
/// driver would refuse it for.
std::string encodeTensorMap(const moec_gpu_map &view, void *map);

/// Names and addresses of the functions that generated code calls.
const std::vector<std::pair<const char *, void *>> &simtSymbols();

} // namespace mlir::moe::simt

#endif // MOE_TARGET_GPU_SIMT_H
