//===- Memory.cpp - memory of the SIMT executor -------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Which accesses are ordered: every thread counts its segments, which end where it lets go of
// something (a barrier, an mbarrier, a warp that synchronises, a fence). `known[t][u]` is the last
// segment of u that thread t was told of; an access in it, or before it, happened before. A barrier
// of the whole block sets one number, the floor, instead of a matrix: all segments up to it are
// known to all. `fencedKnown` is the same for what was told past a fence to the asynchronous proxy,
// through which wgmma reads and TMA writes.
//
//===----------------------------------------------------------------------===//

#include "MachineImpl.h"

#include <algorithm>
#include <cstring>

using namespace mlir::moe::simt;
using Impl = Machine::Impl;

//===----------------------------------------------------------------------===//
// Order
//===----------------------------------------------------------------------===//

static void join(std::vector<uint32_t> &to, const uint32_t *from, size_t count) {
  if (to.empty())
    to.assign(count, 0);
  for (size_t i = 0; i < count; ++i)
    to[i] = std::max(to[i], from[i]);
}

static void join(uint32_t *to, const std::vector<uint32_t> &from) {
  for (size_t i = 0; i < from.size(); ++i)
    to[i] = std::max(to[i], from[i]);
}

/// Whether what `other` did at `stamp` happened before what `thread` does now. What the TMA unit
/// did for a thread is not in the thread's own order.
bool Impl::knows(int thread, int other, uint32_t stamp, bool async) const {
  if ((thread == other && !async) || stamp <= threads[thread].floor)
    return true;
  return !known.empty() && known[size_t(thread) * threads.size() + other] >= stamp;
}

bool Impl::knowsFenced(int thread, int other, uint32_t stamp) const {
  if (stamp <= threads[thread].fencedFloor)
    return true;
  return !fencedKnown.empty() && fencedKnown[size_t(thread) * threads.size() + other] >= stamp;
}

void Impl::release(int thread, Clock &to) {
  size_t count = threads.size();
  Thread &self = threads[thread];
  if (known.empty())
    known.assign(count * count, 0);
  join(to.known, &known[thread * count], count);
  to.known[thread] = std::max(to.known[thread], self.clock);
  to.floor = std::max(to.floor, self.floor);
  if (!fencedKnown.empty())
    join(to.fenced, &fencedKnown[thread * count], count);
  to.fencedFloor = std::max(to.fencedFloor, self.fencedFloor);
  self.clock = ++now;
}

void Impl::acquire(int thread, const Clock &from) {
  size_t count = threads.size();
  Thread &self = threads[thread];
  if (!from.known.empty())
    join(&known[thread * count], from.known);
  if (!from.fenced.empty())
    join(&fencedKnown[thread * count], from.fenced);
  self.floor = std::max(self.floor, from.floor);
  self.fencedFloor = std::max(self.fencedFloor, from.fencedFloor);
}

/// All that the thread knows of, it knows past the fence.
void Impl::fenceProxy(int thread) {
  size_t count = threads.size();
  Thread &self = threads[thread];
  if (fencedKnown.empty())
    fencedKnown.assign(count * count, 0);
  uint32_t *row = &fencedKnown[thread * count];
  if (!known.empty())
    for (size_t i = 0; i < count; ++i)
      row[i] = std::max(row[i], known[thread * count + i]);
  row[thread] = self.clock;
  self.fencedFloor = self.floor;
  self.clock = ++now;
}

/// A barrier of the whole block.
void Impl::meetAll() {
  size_t count = threads.size();
  uint32_t fenced = 0;
  std::vector<uint32_t> all;
  for (size_t t = 0; t < count; ++t) {
    if (!fencedKnown.empty())
      join(all, &fencedKnown[t * count], count);
    fenced = std::max(fenced, threads[t].fencedFloor);
  }
  uint32_t floor = now++;
  for (size_t t = 0; t < count; ++t) {
    threads[t].floor = floor;
    threads[t].clock = now;
    threads[t].fencedFloor = fenced;
    if (!all.empty())
      join(&fencedKnown[t * count], all);
  }
}

//===----------------------------------------------------------------------===//
// Shared memory
//===----------------------------------------------------------------------===//

void Impl::dropReaders(SharedShadow &shadow) {
  if (shadow.more < 0)
    return;
  moreReaders[shadow.more].clear();
  freeReaders.push_back(shadow.more);
  shadow.more = -1;
}

/// Keeps the readers that a later write must be ordered after. One that the new reader knows of
/// needs no place: who comes after the new one comes after it.
void Impl::recordRead(SharedShadow &shadow, int thread) {
  uint16_t self = uint16_t(thread + 1);
  uint32_t stamp = threads[thread].clock;
  auto covered = [&](uint16_t reader, uint32_t at) {
    return !reader || knows(thread, reader - 1, at);
  };
  if (covered(shadow.reader, shadow.readStamp)) {
    shadow.reader = self;
    shadow.readStamp = stamp;
    if (shadow.more < 0)
      return;
    auto &list = moreReaders[shadow.more];
    list.erase(std::remove_if(list.begin(), list.end(),
                              [&](const Reader &r) { return covered(r.thread, r.stamp); }),
               list.end());
    if (list.empty())
      dropReaders(shadow);
    return;
  }
  if (shadow.more < 0) {
    if (freeReaders.empty()) {
      freeReaders.push_back(int32_t(moreReaders.size()));
      moreReaders.emplace_back();
    }
    shadow.more = freeReaders.back();
    freeReaders.pop_back();
  }
  auto &list = moreReaders[shadow.more];
  for (Reader &reader : list)
    if (covered(reader.thread, reader.stamp)) {
      reader = {self, stamp};
      return;
    }
  list.push_back({self, stamp});
}

void Impl::recordWrite(SharedShadow &shadow, int thread, bool async) {
  shadow.writer = uint16_t(thread + 1);
  shadow.writeStamp = threads[thread].clock;
  shadow.reader = 0;
  shadow.generic = !async;
  shadow.async = async;
  dropReaders(shadow);
}

/// Whether the running thread may access the byte now; reports where it may not.
bool Impl::checkSharedByte(const char *site, uint64_t offset, bool writes, bool asyncProxy) {
  SharedShadow &shadow = sharedShadow[offset];
  const char *verb = writes ? "write" : "read";
  auto race = [&](const char *what, int other) {
    failAt(site,
           "race: %s of shared memory at offset %llu, which %s %s, without a barrier between "
           "them",
           verb, (unsigned long long)offset, threadName(other - 1).c_str(), what);
    return false;
  };
  if (shadow.pending) {
    failAt(site,
           "race: %s of shared memory at offset %llu, which a copy in flight of %s writes; "
           "expected a wait for it first",
           verb, (unsigned long long)offset, threadName(shadow.pending - 1).c_str());
    return false;
  }
  if (shadow.writer && !knows(running, shadow.writer - 1, shadow.writeStamp, shadow.async))
    return race("wrote", shadow.writer);
  if (asyncProxy && shadow.writer && shadow.generic &&
      !knowsFenced(running, shadow.writer - 1, shadow.writeStamp)) {
    failAt(site,
           "expected fence.proxy.async between the write of shared memory at offset %llu by "
           "%s and this %s by the asynchronous proxy, but got none",
           (unsigned long long)offset, threadName(shadow.writer - 1).c_str(), verb);
    return false;
  }
  if (!writes)
    return true;
  if (shadow.inFlight) {
    failAt(site,
           "race: write of shared memory at offset %llu, which a wgmma in flight reads; "
           "expected a wait for it first",
           (unsigned long long)offset);
    return false;
  }
  if (shadow.reader && !knows(running, shadow.reader - 1, shadow.readStamp))
    return race("read", shadow.reader);
  if (shadow.more >= 0)
    for (const Reader &reader : moreReaders[shadow.more])
      if (!knows(running, reader.thread - 1, reader.stamp))
        return race("read", reader.thread);
  return true;
}

bool Impl::checkOffsets(const char *site, uint64_t address, uint32_t bytes, const char *verb) {
  if (address >= sharedBegin && address + bytes <= sharedBegin + sharedBytes)
    return true;
  failAt(site, "expected a %s within %llu bytes of shared memory, but got %u bytes at offset %lld",
         verb, (unsigned long long)sharedBytes, bytes, (long long)(address - sharedBegin));
  return false;
}

void Impl::checkShared(const char *site, uint64_t address, uint32_t bytes, bool writes) {
  if (!checkOffsets(site, address, bytes, writes ? "write" : "read"))
    return;
  uint64_t begin = address - sharedBegin;
  if (!mbarriers.empty()) {
    auto next = mbarriers.lower_bound(begin < 7 ? 0 : begin - 7);
    if (next != mbarriers.end() && next->first < begin + bytes)
      return failAt(site,
                    "expected the mbarrier at offset %llu to be left alone, but got a %s of "
                    "its bytes",
                    (unsigned long long)next->first, writes ? "write" : "read");
  }
  for (uint64_t i = begin; i < begin + bytes; ++i) {
    if (!checkSharedByte(site, i, writes, /*asyncProxy=*/false))
      return;
    if (writes)
      recordWrite(sharedShadow[i], running, /*async=*/false);
    else
      recordRead(sharedShadow[i], running);
  }
}

//===----------------------------------------------------------------------===//
// Global memory
//===----------------------------------------------------------------------===//

void Impl::checkGlobal(const char *site, uint64_t address, uint32_t bytes, bool writes,
                       bool atomic) {
  const char *verb = writes ? "write" : "read";
  // Atomic accesses of several blocks do not disturb each other: they count as one block's.
  uint64_t block = atomic ? UINT64_MAX : blockNumber;
  for (Region &region : regions) {
    if (address < region.begin || address >= region.begin + region.bytes)
      continue;
    uint64_t offset = address - region.begin;
    if (offset + bytes > region.bytes)
      break;
    if (writes && region.readOnly)
      return fail("%s: %s: expected `%s` to be read only, but got a write at byte %llu",
                  threadName(running).c_str(), site, region.name.c_str(),
                  (unsigned long long)offset);
    if (region.readOnly)
      return;
    for (uint64_t i = offset; i < offset + bytes; ++i) {
      GlobalShadow &shadow = region.shadow[i];
      if ((!writes || atomic) && !shadow.written)
        return fail("%s: %s: expected bytes that were written, but got a read of byte %llu of "
                    "`%s`, which nobody wrote",
                    threadName(running).c_str(), site, (unsigned long long)i, region.name.c_str());
      if (shadow.writeLaunch == launchNumber && shadow.writeBlock != block &&
          (atomic || shadow.writeBlock == UINT64_MAX || !tookUp(shadow)))
        return fail("%s: %s: race: %s of byte %llu of `%s`, which another block of this launch "
                    "wrote; expected a fence, an atomic and a fence in between",
                    threadName(running).c_str(), site, verb, (unsigned long long)i,
                    region.name.c_str());
      if (writes) {
        shadow.written = true;
        shadow.writeLaunch = launchNumber;
        shadow.writeBlock = block;
        shadow.writer = uint16_t(running);
        shadow.writeStamp = threads[running].clock;
      }
    }
    return;
  }
  fail("%s: %s: expected a %s within a buffer, but got %u bytes at %#llx, which is in none",
       threadName(running).c_str(), site, verb, bytes, (unsigned long long)address);
}

void Impl::orderCopy(const char *site, PendingCopy copy) {
  if (copy.bytes > copy.size)
    return fail("%s: %s: expected to copy at most %u bytes, but got %u",
                threadName(running).c_str(), site, copy.size, copy.bytes);
  if (copy.to % copy.size || (copy.bytes && copy.from % copy.size))
    return fail("%s: %s: expected addresses aligned to %u bytes, but got %#llx and %#llx",
                threadName(running).c_str(), site, copy.size, (unsigned long long)copy.to,
                (unsigned long long)copy.from);
  if (copy.bytes)
    checkGlobal(site, copy.from, copy.bytes, false);
  // From here on it may land at any time: a write by this thread, and nobody else's business.
  checkShared(site, copy.to, copy.size, true);
  ++statistics.copies;
  if (options.earlyCopies)
    return land(running, copy);
  for (uint32_t i = 0; i < copy.size; ++i)
    sharedShadow[copy.to - sharedBegin + i].pending = uint16_t(running + 1);
  threads[running].open.push_back(copy);
}

void Impl::land(int thread, const PendingCopy &copy) {
  auto *to = reinterpret_cast<unsigned char *>(copy.to);
  std::memcpy(to, reinterpret_cast<const void *>(copy.from), copy.bytes);
  std::memset(to + copy.bytes, 0, copy.size - copy.bytes);
  for (uint32_t i = 0; i < copy.size; ++i) {
    SharedShadow &shadow = sharedShadow[copy.to - sharedBegin + i];
    shadow.pending = 0;
    recordWrite(shadow, thread, /*async=*/false);
  }
}

/// A thread that ends leaves its copies to land when they like.
void Impl::dropCopies(int thread) {
  Thread &self = threads[thread];
  for (auto &group : self.groups)
    for (const PendingCopy &copy : group)
      land(thread, copy);
  for (const PendingCopy &copy : self.open)
    land(thread, copy);
}
