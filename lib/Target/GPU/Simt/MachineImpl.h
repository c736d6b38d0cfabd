//===- MachineImpl.h - state of the SIMT executor ---------------*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_SIMT_MACHINEIMPL_H
#define MOE_LIB_TARGET_GPU_SIMT_MACHINEIMPL_H

#include "moe/Target/GPU/Simt.h"

#include <deque>
#include <random>

namespace mlir::moe::simt {

enum class State { Ready, AtBarrier, AtCollective, Done };

/// One asynchronous copy that was ordered and has not landed.
struct PendingCopy {
  uint64_t to, from;
  uint32_t size, bytes;
};

struct Thread {
  void *stackPointer = nullptr;
  State state = State::Ready;
  const char *where = ""; ///< site at which it waits
  std::vector<PendingCopy> open;
  std::deque<std::vector<PendingCopy>> groups;
  uint32_t warpEpoch = 0;
};

/// What the lanes of a warp bring to a collective.
struct Warp {
  const char *site = nullptr;
  uint32_t mask = 0, arrived = 0;
  uint64_t address[32];
  uint32_t in[32][10];
  uint32_t out[32][4];
};

/// Last accesses of a byte of shared memory; threads count from 1.
struct SharedShadow {
  uint32_t writeEpoch = 0, readEpoch = 0;
  uint16_t writer = 0, reader = 0, pending = 0;
  bool manyReaders = false; ///< of different warps in readEpoch
};

/// Last accesses of a byte of global memory; blocks count from 1.
struct GlobalShadow {
  uint64_t writeBlock = 0;
  uint32_t writeLaunch = 0;
  bool written = false;
};

struct Region {
  uint64_t begin = 0, bytes = 0;
  std::string name;
  bool readOnly = false;
  std::vector<GlobalShadow> shadow;
};

struct Machine::Impl {
  Options options;
  std::string error;
  Statistics statistics;
  std::vector<Region> regions;
  std::mt19937_64 random;
  // The launch.
  std::string kernelName;
  void (*kernel)(void *const *) = nullptr;
  void *const *arguments = nullptr;
  uint32_t launchNumber = 0;
  // The block.
  uint32_t blockX = 0, blockY = 0, epoch = 0;
  uint64_t blockNumber = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<SharedShadow> sharedShadow;
  uint64_t sharedBegin = 0, sharedBytes = 0;
  const char *barrierSite = nullptr;
  // Fibers.
  char *stacks = nullptr;
  size_t stackCount = 0;
  void *scheduler = nullptr;
  int running = -1;

  [[gnu::format(printf, 2, 3)]] void fail(const char *format, ...);
  std::string threadName(int thread) const;
  void resume(int thread);
  void pause(State state, const char *where);
  void shuffle(std::vector<int> &list);
  bool runBlock();
  bool reportDeadlock();

  // Memory.
  void checkShared(const char *site, uint64_t address, uint32_t bytes, bool writes);
  void checkGlobal(const char *site, uint64_t address, uint32_t bytes, bool writes);
  void orderCopy(const char *site, PendingCopy copy);
  void land(int thread, const PendingCopy &copy);
  void dropCopies(int thread);

  // Synchronisation.
  void barrier(const char *site);
  /// Waits until all lanes of `mask` are here; the last one runs `finish`.
  template <typename Fn> Warp &collective(const char *site, uint32_t mask, Fn finish);
};

/// The machine whose code runs on this thread of the host.
extern thread_local Machine::Impl *current;

} // namespace mlir::moe::simt

#endif // MOE_LIB_TARGET_GPU_SIMT_MACHINEIMPL_H
