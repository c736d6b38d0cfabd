//===- Async.cpp - mbarriers and the TMA unit of the SIMT executor ------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "MachineImpl.h"

#include <algorithm>
#include <cstring>

using namespace mlir::moe::simt;
using Impl = Machine::Impl;

//===----------------------------------------------------------------------===//
// mbarriers
//===----------------------------------------------------------------------===//

void Impl::initMBarrier(const char *site, uint64_t address, uint32_t count) {
  if (!checkOffsets(site, address, 8, "mbarrier"))
    return;
  uint64_t offset = address - sharedBegin;
  if (offset % 8)
    return failAt(site, "expected an mbarrier at a multiple of 8, but got offset %llu",
                  (unsigned long long)offset);
  if (count == 0 || count >= 1u << 20)
    return failAt(site, "expected an mbarrier of 1 to 1048575 arrivals, but got %u", count);
  if (mbarriers.count(offset))
    return failAt(site, "expected a place without mbarrier, but got offset %llu, where one is",
                  (unsigned long long)offset);
  for (uint64_t i = offset; i < offset + 8; ++i) {
    if (!checkSharedByte(site, i, /*writes=*/true, /*asyncProxy=*/false))
      return;
    recordWrite(sharedShadow[i], running, /*async=*/false);
  }
  MBarrier &barrier = mbarriers[offset];
  barrier.count = barrier.pending = count;
  barrier.initThread = running;
  barrier.initStamp = threads[running].clock;
}

/// The mbarrier at an address, which the running thread must know to be initialised.
MBarrier &Impl::mbarrier(const char *site, uint64_t address) {
  auto found = mbarriers.find(address - sharedBegin);
  if (found == mbarriers.end())
    failAt(site,
           "expected an mbarrier, but got offset %lld of shared memory, where none was "
           "initialised",
           (long long)(address - sharedBegin));
  MBarrier &barrier = found->second;
  if (!knows(running, barrier.initThread, barrier.initStamp))
    failAt(site,
           "race: the mbarrier at offset %llu was initialised by %s, without a barrier "
           "since",
           (unsigned long long)found->first, threadName(barrier.initThread).c_str());
  return barrier;
}

/// Ends the phase where nothing is outstanding, and wakes who waits for it.
void Impl::settle(uint64_t offset, MBarrier &barrier) {
  if (barrier.pending || barrier.bytes)
    return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.done = std::move(barrier.open);
  barrier.open = Clock();
  for (Thread &thread : threads)
    if (thread.state == State::AtMBarrier && thread.barrier == offset &&
        (barrier.phase & 1) != thread.parity)
      thread.state = State::Ready;
}

void Impl::arrive(const char *site, uint64_t address, uint32_t count, int64_t bytes) {
  MBarrier &barrier = mbarrier(site, address);
  if (count > barrier.pending)
    return failAt(site,
                  "expected at most %u more arrivals in phase %u of the mbarrier at offset "
                  "%llu, but got %u",
                  barrier.pending, barrier.phase, (unsigned long long)(address - sharedBegin),
                  count);
  release(running, barrier.open);
  barrier.bytes += bytes;
  barrier.pending -= count;
  settle(address - sharedBegin, barrier);
}

void Impl::expectBytes(const char *site, uint64_t address, int64_t bytes) {
  MBarrier &barrier = mbarrier(site, address);
  barrier.bytes += bytes;
  settle(address - sharedBegin, barrier);
}

void Impl::waitParity(const char *site, uint64_t address, uint32_t parity) {
  MBarrier &barrier = mbarrier(site, address);
  if (parity > 1)
    return failAt(site, "expected a parity of 0 or 1, but got %u", parity);
  Thread &self = threads[running];
  while ((barrier.phase & 1) == parity) {
    self.barrier = address - sharedBegin;
    self.parity = parity;
    pause(State::AtMBarrier, site);
  }
  acquire(running, barrier.done);
}

/// cp.async.mbarrier.arrive: the barrier follows all copies that this thread ordered so far.
void Impl::arriveAfterCopies(const char *site, uint64_t address, bool counts) {
  MBarrier &barrier = mbarrier(site, address);
  if (!counts && barrier.pending == 0)
    return failAt(site, "expected a place among the arrivals of the mbarrier, but got none left");
  if (counts) // an arrival more, which is then made
    ++barrier.pending;
  AsyncOp op{site, running, address - sharedBegin, /*arrives=*/true, {}, {}};
  Thread &self = threads[running];
  for (auto &group : self.groups)
    op.copies.insert(op.copies.end(), group.begin(), group.end());
  for (auto &group : self.groups)
    group.clear();
  op.copies.insert(op.copies.end(), self.open.begin(), self.open.end());
  self.open.clear();
  release(running, op.clock);
  asyncOps.push_back(std::move(op));
  if (options.earlyCopies)
    landAsync(asyncOps.size() - 1);
}

//===----------------------------------------------------------------------===//
// Boxes
//===----------------------------------------------------------------------===//

namespace {
/// What the executor keeps in the 128 bytes of a tensor map.
struct TensorMap {
  char magic[8];
  moec_gpu_map view;
};
} // namespace
static_assert(sizeof(TensorMap) <= 128);
static constexpr char kMagic[8] = {'s', 'i', 'm', 't', ' ', 'm', 'a', 'p'};

std::string mlir::moe::simt::encodeTensorMap(const moec_gpu_map &view, void *map) {
  auto text = [](const char *what, uint64_t got) {
    return std::string("expected a tensor map with ") + what + ", but got " + std::to_string(got);
  };
  if (view.rank < 1 || view.rank > 5)
    return text("1 to 5 dimensions", view.rank);
  if (reinterpret_cast<uint64_t>(view.base) % 16)
    return text("a base at a multiple of 16", reinterpret_cast<uint64_t>(view.base));
  if (view.swizzle != 0 && view.swizzle != 32 && view.swizzle != 64 && view.swizzle != 128)
    return text("a swizzle of 0, 32, 64 or 128 bytes", view.swizzle);
  for (int i = 0; i < view.rank; ++i) {
    if (view.sizes[i] == 0 || view.sizes[i] > uint64_t(1) << 32)
      return text("sizes of 1 to 4294967296", view.sizes[i]);
    if (view.box[i] == 0 || view.box[i] > 256)
      return text("a box of 1 to 256 elements a dimension", view.box[i]);
    if (i && (view.strides[i - 1] % 16 || view.strides[i - 1] >= uint64_t(1) << 40))
      return text("strides that are multiples of 16 below 2^40", view.strides[i - 1]);
  }
  uint64_t inner = view.box[0] * 2;
  if (inner % 16)
    return text("inner rows of a multiple of 16 bytes", inner);
  if (view.swizzle && inner > uint64_t(view.swizzle))
    return text("inner rows within the swizzle", inner);
  TensorMap out = {};
  std::memcpy(out.magic, kMagic, 8);
  out.view = view;
  std::memset(map, 0, 128);
  std::memcpy(map, &out, sizeof out);
  return "";
}

/// Where a byte of a box lands: bits 4 and up are turned by the rows of 128 bytes.
static uint64_t swizzled(uint64_t offset, int32_t swizzle) {
  return offset ^ (offset >> 3 & (swizzle == 128  ? 0x70
                                  : swizzle == 64 ? 0x30
                                  : swizzle == 32 ? 0x10
                                                  : 0));
}

void Impl::orderBox(const char *site, uint64_t to, const void *map, int32_t rank,
                    const int32_t *coordinates, uint64_t barrierAddress) {
  TensorMap stored;
  std::memcpy(&stored, map, sizeof stored);
  if (std::memcmp(stored.magic, kMagic, 8) || reinterpret_cast<uint64_t>(map) % 64)
    return failAt(site, "expected a tensor map at a multiple of 64, but got other bytes");
  const moec_gpu_map &view = stored.view;
  if (view.rank != rank)
    return failAt(site, "expected %d coordinates, as the tensor map has dimensions, but got %d",
                  view.rank, rank);
  MBarrier &barrier = mbarrier(site, barrierAddress);
  uint64_t barrierOffset = barrierAddress - sharedBegin;
  // Another proxy than the one that initialised it: a fence in between.
  if (sharedShadow[barrierOffset].generic &&
      !knowsFenced(running, barrier.initThread, barrier.initStamp))
    return failAt(site,
                  "expected fence.mbarrier.init between the initialisation of the mbarrier "
                  "at offset %llu and this copy, but got none",
                  (unsigned long long)barrierOffset);
  if ((to - sharedBegin) % 128)
    return failAt(site,
                  "expected a box at a multiple of 128 bytes of shared memory, but got "
                  "offset %lld",
                  (long long)(to - sharedBegin));
  if (view.swizzle && view.box[0] * 2 != uint32_t(view.swizzle))
    return failAt(site, "expected inner rows of %d bytes, as the swizzle, but got %u", view.swizzle,
                  view.box[0] * 2);
  uint64_t bytes = 2;
  for (int i = 0; i < rank; ++i)
    bytes *= view.box[i];
  if (!checkOffsets(site, to, uint32_t(bytes), "box"))
    return;
  AsyncOp op{site, running, barrierOffset, /*arrives=*/false, {}, {}};
  uint32_t at[5] = {};
  for (uint64_t done = 0; done < bytes; done += 16) {
    // Element 8 · (done / 16) of the box.
    uint64_t element = done / 2;
    bool inside = true;
    uint64_t from = reinterpret_cast<uint64_t>(view.base);
    int64_t first = 0;
    for (int i = 0; i < rank; ++i) {
      at[i] = element % view.box[i];
      element /= view.box[i];
      int64_t c = int64_t(coordinates[i]) + at[i];
      if (i == 0)
        first = c;
      else
        inside &= c >= 0 && c < int64_t(view.sizes[i]);
      from += i ? uint64_t(c) * view.strides[i - 1] : uint64_t(c) * 2;
    }
    if (first < 0 && first > -8)
      return failAt(site,
                    "expected a first coordinate that is not negative or a multiple of 8, "
                    "but got %d, which the executor does not know",
                    coordinates[0]);
    int64_t real = std::clamp<int64_t>(int64_t(view.sizes[0]) - first, 0, 8);
    if (first < 0 || !inside)
      real = 0;
    uint64_t offset = swizzled(to - sharedBegin + done, view.swizzle);
    if (real)
      checkGlobal(site, from, uint32_t(real) * 2, false);
    op.copies.push_back({sharedBegin + offset, from, 16, uint32_t(real) * 2});
    for (uint64_t i = offset; i < offset + 16; ++i) {
      if (!checkSharedByte(site, i, /*writes=*/true, /*asyncProxy=*/true))
        return;
      recordWrite(sharedShadow[i], running, /*async=*/true);
      sharedShadow[i].pending = uint16_t(running + 1);
    }
  }
  ++statistics.boxes;
  release(running, op.clock);
  asyncOps.push_back(std::move(op));
  if (options.earlyCopies)
    landAsync(asyncOps.size() - 1);
}

/// Carries out one operation and tells its barrier.
void Impl::landAsync(size_t index) {
  AsyncOp op = std::move(asyncOps[index]);
  asyncOps.erase(asyncOps.begin() + index);
  uint32_t stamp = op.clock.known[op.thread];
  int64_t bytes = 0;
  for (const PendingCopy &copy : op.copies) {
    land(op.thread, copy);
    bytes += copy.size;
    for (uint32_t i = 0; i < copy.size; ++i) {
      SharedShadow &shadow = sharedShadow[copy.to - sharedBegin + i];
      shadow.writeStamp = stamp;
      shadow.generic = op.arrives;
      shadow.async = true;
    }
  }
  MBarrier &barrier = mbarriers.at(op.barrier);
  // The order that the thread had when it ordered this is passed on.
  auto join = [](std::vector<uint32_t> &to, const std::vector<uint32_t> &from) {
    to.resize(std::max(to.size(), from.size()));
    for (size_t i = 0; i < from.size(); ++i)
      to[i] = std::max(to[i], from[i]);
  };
  join(barrier.open.known, op.clock.known);
  join(barrier.open.fenced, op.clock.fenced);
  barrier.open.floor = std::max(barrier.open.floor, op.clock.floor);
  barrier.open.fencedFloor = std::max(barrier.open.fencedFloor, op.clock.fencedFloor);
  if (op.arrives) {
    if (barrier.pending == 0) {
      error = error.empty() ? "kernel `" + kernelName + "`: " + op.site +
                                  ": expected a place among the arrivals of the mbarrier, but got "
                                  "none left when the copies landed"
                            : error;
      return;
    }
    --barrier.pending;
  } else {
    barrier.bytes -= bytes;
  }
  settle(op.barrier, barrier);
}

/// Where no thread can go on, something that is in flight may land.
bool Impl::landOne() {
  if (asyncOps.empty())
    return false;
  size_t index = options.order == Order::Forward   ? 0
                 : options.order == Order::Reverse ? asyncOps.size() - 1
                                                   : random() % asyncOps.size();
  landAsync(index);
  return true;
}
