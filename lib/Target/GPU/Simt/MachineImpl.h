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
#include <map>
#include <random>

namespace mlir::moe::simt {

enum class State { Ready, AtBarrier, AtCollective, AtMBarrier, AtWarpgroup, AtRegisters, Done };

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
  // What orders this thread's accesses: see Clocks.cpp.
  uint32_t clock = 1, floor = 0, fencedFloor = 0;
  // AtMBarrier: offset of the barrier and the parity that is waited for. AtBarrier: its number.
  uint64_t barrier = 0;
  uint32_t parity = 0;
};

/// What a thread knows of the others when it lets go of something, for those who take it up.
struct Clock {
  std::vector<uint32_t> known, fenced; ///< by thread; empty: nothing
  uint32_t floor = 0, fencedFloor = 0;
};

/// One of the sixteen barriers of a block.
struct Barrier {
  const char *site = nullptr;
  uint32_t count = 0, arrived = 0; ///< threads; 0: all threads of the block
  Clock clock;
};

/// An mbarrier object.
struct MBarrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0; ///< outstanding transactions of this phase
  Clock open, done;  ///< of those who arrived in this phase, in the one before it
  int initThread = 0;
  uint32_t initStamp = 0;
};

/// What has been ordered and ends at an mbarrier: a box of the TMA unit, or the copies of a thread.
struct AsyncOp {
  const char *site;
  int thread;
  uint64_t barrier;
  bool arrives;                    ///< copies of a thread: an arrival instead of bytes
  std::vector<PendingCopy> copies; ///< a box: its chunks of 16 bytes
  Clock clock;
};

/// One wgmma of one warp, from its issue to its wait.
struct WgmmaOp {
  const char *site = nullptr;
  uint64_t sequence = 0;
  int32_t n = 0;
  bool leftInRegisters = false, transposedA = false, transposedB = false;
  uint64_t descriptorA = 0, descriptorB = 0;
  uint32_t left[32][4] = {};
  uint32_t from = 0, to = 0;   ///< chains of accumulators: 0 is none
  bool zero = false;           ///< starts a sum
  std::vector<float> start;    ///< without `from`: [lane][n / 2]
  std::vector<uint32_t> bytes; ///< offsets of chunks of 16 bytes that it reads
};

/// What the lanes of a warp bring to a collective, and its wgmmas.
struct Warp {
  const char *site = nullptr;
  uint32_t mask = 0, arrived = 0;
  uint64_t address[32];
  uint32_t in[32][10];
  uint32_t out[32][4];
  // wgmma.
  std::vector<WgmmaOp> open;
  std::deque<std::vector<WgmmaOp>> groups;
  WgmmaOp building;
  uint64_t issued = 0;
  uint32_t chains = 0;
  bool fenced = false;
  std::map<uint32_t, std::vector<float>> sums; ///< finished chains: [lane][n / 2]
  uint32_t registers = 0;                      ///< a thread's, once setmaxnreg ran
};

/// Last accesses of a byte of shared memory; threads count from 1.
struct SharedShadow {
  uint32_t writeStamp = 0, readStamp = 0;
  uint16_t writer = 0, reader = 0, pending = 0;
  uint16_t inFlight = 0; ///< wgmmas of warps that read it and were not waited for
  int32_t more = -1;     ///< further readers: an index into moreReaders
  bool generic = false;  ///< written by ordinary stores and copies: the async proxy needs a fence
  bool async = false;    ///< written by the TMA unit: even its thread needs a wait
};

struct Reader {
  uint16_t thread;
  uint32_t stamp;
};

/// Last accesses of a byte of global memory; blocks count from 1.
struct GlobalShadow {
  uint64_t writeBlock = 0;
  uint32_t writeLaunch = 0, writeStamp = 0; ///< segment of the writer
  uint16_t writer = 0;                      ///< thread of its block
  bool written = false;
};

/// What blocks let go of, by block.
using BlockClocks = std::map<uint64_t, Clock>;

/// What a thread took up from other blocks, at one of its segments.
struct TakenBlocks {
  int thread;
  uint32_t stamp;
  BlockClocks from;
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
  uint32_t gridX = 0;
  // The block.
  uint32_t blockX = 0, blockY = 0;
  uint64_t blockNumber = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<SharedShadow> sharedShadow;
  std::vector<std::vector<Reader>> moreReaders;
  std::vector<int32_t> freeReaders;
  char *window = nullptr; ///< of shared memory: begins at a multiple of 256 KiB
  uint64_t sharedBegin = 0, sharedBytes = 0;
  Barrier barriers[16];
  std::map<uint64_t, MBarrier> mbarriers; ///< by offset
  std::deque<AsyncOp> asyncOps;
  uint32_t registerBudget = 0; ///< of the block, once setmaxnreg ran
  // Order of accesses: see Clocks.cpp. Square matrices by thread, empty until they are needed.
  uint32_t now = 1;
  std::vector<uint32_t> known, fencedKnown;
  // Order between blocks: see Blocks.cpp. By address of the atomic word, and by thread.
  std::map<uint64_t, BlockClocks> releasedBlocks; ///< of the launch
  std::map<int, Clock> fences;                    ///< what each thread let go of last
  std::map<int, BlockClocks> seenBlocks;          ///< through atomics since the last fence
  std::vector<TakenBlocks> takenBlocks;
  // Fibers.
  char *stacks = nullptr;
  size_t stackCount = 0;
  void *scheduler = nullptr;
  int running = -1;

  [[gnu::format(printf, 2, 3)]] void fail(const char *format, ...);
  /// `fail` with the running thread and the site in front.
  [[gnu::format(printf, 3, 4)]] void failAt(const char *site, const char *format, ...);
  std::string threadName(int thread) const;
  void resume(int thread);
  void pause(State state, const char *where);
  void shuffle(std::vector<int> &list);
  void startBlock();
  bool runBlock();
  bool finishBlock();
  bool reportDeadlock();
  unsigned char *sharedByte(uint64_t offset) {
    return reinterpret_cast<unsigned char *>(sharedBegin + offset);
  }

  // Order.
  bool knows(int thread, int other, uint32_t stamp, bool async = false) const;
  bool knowsFenced(int thread, int other, uint32_t stamp) const;
  void release(int thread, Clock &to);
  void acquire(int thread, const Clock &from);
  void fenceProxy(int thread);
  void meetAll();

  // Order between blocks.
  void fenceDevice();
  void atomicDevice(uint64_t address);
  bool tookUp(const GlobalShadow &shadow) const;

  // Memory.
  void checkShared(const char *site, uint64_t address, uint32_t bytes, bool writes);
  bool checkSharedByte(const char *site, uint64_t offset, bool writes, bool asyncProxy);
  void recordRead(SharedShadow &shadow, int thread);
  void recordWrite(SharedShadow &shadow, int thread, bool async);
  void dropReaders(SharedShadow &shadow);
  bool checkOffsets(const char *site, uint64_t address, uint32_t bytes, const char *verb);
  void checkGlobal(const char *site, uint64_t address, uint32_t bytes, bool writes,
                   bool atomic = false);
  void orderCopy(const char *site, PendingCopy copy);
  void land(int thread, const PendingCopy &copy);
  void dropCopies(int thread);

  // Synchronisation.
  void barrier(const char *site, uint32_t number, uint32_t count, bool waits);
  /// Waits until all lanes of `mask` are here; the last one runs `finish`.
  template <typename Fn> Warp &collective(const char *site, uint32_t mask, Fn finish);
  void setRegisters(const char *site, uint32_t count, bool increase, uint32_t atLaunch);

  // Asynchronous barriers and boxes.
  MBarrier &mbarrier(const char *site, uint64_t address);
  void initMBarrier(const char *site, uint64_t address, uint32_t count);
  void arrive(const char *site, uint64_t address, uint32_t count, int64_t bytes);
  void expectBytes(const char *site, uint64_t address, int64_t bytes);
  void settle(uint64_t offset, MBarrier &barrier);
  void waitParity(const char *site, uint64_t address, uint32_t parity);
  void arriveAfterCopies(const char *site, uint64_t address, bool counts);
  void orderBox(const char *site, uint64_t to, const void *map, int32_t rank,
                const int32_t *coordinates, uint64_t barrier);
  void landAsync(size_t index);
  bool landOne();

  // Warpgroup matrix products.
  void issueWgmma(const char *site, int32_t flags, int32_t n, uint64_t descriptorA,
                  uint64_t descriptorB, uint32_t *words);
  void commitWgmma(const char *site);
  void waitWgmma(const char *site, int32_t pending);
  void runWgmma(int warp, const WgmmaOp &op);
  void readSums(const char *site, int32_t count, uint32_t *words);
};

/// The machine whose code runs on this thread of the host.
extern thread_local Machine::Impl *current;

inline float bf16ToFloat(uint16_t bits) {
  uint32_t word = uint32_t(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

template <typename Fn> Warp &Machine::Impl::collective(const char *site, uint32_t mask, Fn finish) {
  int w = running / 32, lane = running % 32;
  Warp &warp = warps[w];
  if (!(mask >> lane & 1))
    failAt(site, "expected the lane in the mask of the collective, but got mask %#x", mask);
  if (warp.arrived && (warp.site != site || warp.mask != mask))
    fail("%s: expected all lanes of a warp at one collective, but got it at %s and others at %s",
         threadName(running).c_str(), site, warp.site);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && threads[w * 32 + i].state == State::Done)
      failAt(site, "expected all lanes of the mask, but got lane %d ended", i);
  warp.site = site;
  warp.mask = mask;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    pause(State::AtCollective, site);
    return warp;
  }
  ++statistics.collectives;
  finish(warp);
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1)
      threads[w * 32 + i].state = State::Ready;
  return warp;
}

} // namespace mlir::moe::simt

#endif // MOE_LIB_TARGET_GPU_SIMT_MACHINEIMPL_H
