//===- Instructions.cpp - what kernels ask of the SIMT executor -----------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "MachineImpl.h"

#include <cmath>
#include <cstring>

using namespace mlir::moe::simt;
using Impl = Machine::Impl;

static float fromBF16(uint16_t bits) {
  uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

//===----------------------------------------------------------------------===//
// Memory
//===----------------------------------------------------------------------===//

void Impl::checkShared(const char *site, uint64_t address, uint32_t bytes, bool writes) {
  const char *verb = writes ? "write" : "read";
  if (address < sharedBegin || address + bytes > sharedBegin + sharedBytes) {
    fail("%s: %s: expected a %s within %llu bytes of shared memory, but got %u bytes at offset "
         "%lld",
         threadName(running).c_str(), site, verb, (unsigned long long)sharedBytes, bytes,
         (long long)(address - sharedBegin));
    return;
  }
  uint16_t self = uint16_t(running + 1);
  auto race = [&](const char *what, int other) {
    fail("%s: %s: race: %s of shared memory at offset %llu, which %s %s since the last barrier",
         threadName(running).c_str(), site, verb, (unsigned long long)(address - sharedBegin),
         threadName(other - 1).c_str(), what);
  };
  for (uint64_t i = address - sharedBegin, end = i + bytes; i < end; ++i) {
    SharedShadow &shadow = sharedShadow[i];
    if (shadow.pending)
      return fail("%s: %s: race: %s of shared memory at offset %llu, which a copy in flight of %s "
                  "writes; expected a wait for it first",
                  threadName(running).c_str(), site, verb, (unsigned long long)i,
                  threadName(shadow.pending - 1).c_str());
    if (shadow.writeEpoch == epoch && shadow.writer != self)
      return race("wrote", shadow.writer);
    if (writes) {
      if (shadow.readEpoch == epoch && (shadow.reader != self || shadow.manyReaders))
        return race("read", shadow.reader);
      shadow.writeEpoch = epoch;
      shadow.writer = self;
    } else {
      shadow.manyReaders = shadow.readEpoch == epoch &&
                           (shadow.manyReaders || (shadow.reader && shadow.reader != self));
      shadow.readEpoch = epoch;
      shadow.reader = self;
    }
  }
}

void Impl::checkGlobal(const char *site, uint64_t address, uint32_t bytes, bool writes) {
  const char *verb = writes ? "write" : "read";
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
      if (!writes && !shadow.written)
        return fail("%s: %s: expected bytes that were written, but got a read of byte %llu of "
                    "`%s`, which nobody wrote",
                    threadName(running).c_str(), site, (unsigned long long)i, region.name.c_str());
      if (shadow.writeLaunch == launchNumber && shadow.writeBlock != blockNumber)
        return fail("%s: %s: race: %s of byte %llu of `%s`, which another block of this launch "
                    "wrote",
                    threadName(running).c_str(), site, verb, (unsigned long long)i,
                    region.name.c_str());
      if (writes) {
        shadow.written = true;
        shadow.writeLaunch = launchNumber;
        shadow.writeBlock = blockNumber;
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
    shadow.writeEpoch = epoch;
    shadow.writer = uint16_t(thread + 1);
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

//===----------------------------------------------------------------------===//
// Synchronisation
//===----------------------------------------------------------------------===//

void Impl::barrier(const char *site) {
  int waiting = 0, ended = 0;
  for (const Thread &thread : threads) {
    waiting += thread.state == State::AtBarrier;
    ended += thread.state == State::Done;
  }
  if (ended)
    return fail("%s: %s: expected all threads at the barrier, but got %d that have ended",
                threadName(running).c_str(), site, ended);
  if (waiting && barrierSite != site)
    return fail("%s: expected all threads at one barrier, but got it at %s and others at %s",
                threadName(running).c_str(), site, barrierSite);
  barrierSite = site;
  if (waiting + 1 < int(threads.size()))
    return pause(State::AtBarrier, site);
  ++statistics.barriers;
  ++epoch;
  for (Thread &thread : threads)
    thread.state = State::Ready;
}

template <typename Fn> Warp &Impl::collective(const char *site, uint32_t mask, Fn finish) {
  int w = running / 32, lane = running % 32;
  Warp &warp = warps[w];
  if (!(mask >> lane & 1))
    fail("%s: %s: expected the lane in the mask of the collective, but got mask %#x",
         threadName(running).c_str(), site, mask);
  if (warp.arrived && (warp.site != site || warp.mask != mask))
    fail("%s: expected all lanes of a warp at one collective, but got it at %s and others at %s",
         threadName(running).c_str(), site, warp.site);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && threads[w * 32 + i].state == State::Done)
      fail("%s: %s: expected all lanes of the mask, but got lane %d ended",
           threadName(running).c_str(), site, i);
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

//===----------------------------------------------------------------------===//
// The functions that code calls
//===----------------------------------------------------------------------===//

extern "C" {

static int32_t simtRegister(int32_t which) {
  switch (which) {
  case 0:
    return current->running;
  case 1:
    return int32_t(current->blockX);
  default:
    return int32_t(current->blockY);
  }
}

static void *simtShared() { return reinterpret_cast<void *>(current->sharedBegin); }

static void simtAccess(const char *site, uint64_t address, int32_t bytes, int32_t align,
                       int32_t space, int32_t writes) {
  Impl &m = *current;
  if (address % uint32_t(align))
    return m.fail("%s: %s: expected an address aligned to %d bytes, but got %#llx",
                  m.threadName(m.running).c_str(), site, align, (unsigned long long)address);
  if (space == 3)
    m.checkShared(site, address, uint32_t(bytes), writes);
  else
    m.checkGlobal(site, address, uint32_t(bytes), writes);
}

static uint16_t simtRoundBF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value))
    return 0x7fff; // what cvt.rn.bf16.f32 makes of every NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void simtBarrier(const char *site) { current->barrier(site); }

static void simtSyncWarp(const char *site, int32_t mask) {
  current->collective(site, uint32_t(mask), [](Warp &) {});
}

static int32_t simtShuffle(const char *site, int32_t kind, int32_t mask, int32_t value,
                           int32_t offset, int32_t clamp) {
  Impl &m = *current;
  int self = m.running % 32;
  Warp &warp = m.warps[m.running / 32];
  warp.in[self][0] = uint32_t(value);
  warp.in[self][1] = uint32_t(offset);
  m.collective(site, uint32_t(mask), [&](Warp &warp) {
    int limit = clamp & 31;
    for (int lane = 0; lane < 32; ++lane) {
      int b = int(warp.in[lane][1] & 31), from = lane;
      switch (kind) {
      case 0: // bfly
        from = lane ^ b;
        from = from <= limit ? from : lane;
        break;
      case 1: // up
        from = lane - b >= limit ? lane - b : lane;
        break;
      case 2: // down
        from = lane + b <= limit ? lane + b : lane;
        break;
      default: // idx
        from = b <= limit ? b : lane;
      }
      warp.out[lane][0] = warp.in[from][0];
    }
  });
  return int32_t(warp.out[self][0]);
}

static int32_t simtVote(const char *site, int32_t kind, int32_t mask, int32_t predicate) {
  Impl &m = *current;
  int self = m.running % 32;
  Warp &warp = m.warps[m.running / 32];
  warp.in[self][0] = uint32_t(predicate);
  m.collective(site, uint32_t(mask), [&](Warp &warp) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      votes |= uint32_t(warp.in[lane][0] != 0) << lane;
    votes &= uint32_t(mask);
    uint32_t result = kind == 0   ? votes != 0                             // any
                      : kind == 1 ? votes == uint32_t(mask)                // all
                      : kind == 2 ? votes                                  // ballot
                                  : votes == 0 || votes == uint32_t(mask); // uni
    for (auto &out : warp.out)
      out[0] = result;
  });
  return int32_t(warp.out[self][0]);
}

static int32_t simtRedux(const char *site, int32_t kind, int32_t mask, int32_t value) {
  Impl &m = *current;
  int self = m.running % 32;
  Warp &warp = m.warps[m.running / 32];
  warp.in[self][0] = uint32_t(value);
  m.collective(site, uint32_t(mask), [&](Warp &warp) {
    bool first = true;
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(uint32_t(mask) >> lane & 1))
        continue;
      uint32_t v = warp.in[lane][0];
      if (first) {
        result = v;
        first = false;
        continue;
      }
      switch (kind) {
      case 1: // add
        result += v;
        break;
      case 2: // and
        result &= v;
        break;
      case 3: // max
        result = uint32_t(std::max(int32_t(result), int32_t(v)));
        break;
      case 4: // min
        result = uint32_t(std::min(int32_t(result), int32_t(v)));
        break;
      case 5: // or
        result |= v;
        break;
      case 6: // umax
        result = std::max(result, v);
        break;
      case 7: // umin
        result = std::min(result, v);
        break;
      case 8: // xor
        result ^= v;
        break;
      default:
        m.fail("%s: expected a reduction of integers, but got another", site);
      }
    }
    for (auto &out : warp.out)
      out[0] = result;
  });
  return int32_t(warp.out[self][0]);
}

static int32_t simtMatch(const char *site, int32_t mask, int32_t value) {
  Impl &m = *current;
  int self = m.running % 32;
  Warp &warp = m.warps[m.running / 32];
  warp.in[self][0] = uint32_t(value);
  m.collective(site, uint32_t(mask), [&](Warp &warp) {
    for (int lane = 0; lane < 32; ++lane) {
      warp.out[lane][0] = 0;
      for (int other = 0; other < 32; ++other)
        if (uint32_t(mask) >> other & 1 && warp.in[other][0] == warp.in[lane][0])
          warp.out[lane][0] |= 1u << other;
    }
  });
  return int32_t(warp.out[self][0]);
}

static void simtLdMatrix(const char *site, int32_t count, int32_t transposed, uint64_t address,
                         uint32_t *result) {
  Impl &m = *current;
  int self = m.running % 32;
  if (address % 16)
    m.fail("%s: %s: expected an address aligned to 16 bytes, but got %#llx",
           m.threadName(m.running).c_str(), site, (unsigned long long)address);
  // Lanes that name no row may hold anything.
  if (self < count * 8)
    m.checkShared(site, address, 16, false);
  Warp &warp = m.warps[m.running / 32];
  warp.address[self] = address;
  m.collective(site, 0xffffffffu, [&](Warp &warp) {
    for (int i = 0; i < count; ++i)
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t half[2];
        for (int j = 0; j < 2; ++j) {
          int row = lane / 4, col = 2 * (lane % 4) + j;
          if (transposed)
            std::swap(row, col);
          std::memcpy(&half[j], reinterpret_cast<const char *>(warp.address[i * 8 + row]) + col * 2,
                      2);
        }
        warp.out[lane][i] = uint32_t(half[0]) | uint32_t(half[1]) << 16;
      }
  });
  std::memcpy(result, warp.out[self], size_t(count) * 4);
}

/// D = A · B + C: words 0–3 are A, 4–5 B, 6–9 C and then D. The products are exact; their sum is
/// rounded once, where the hardware promises less.
static void simtMma(const char *site, uint32_t *words) {
  Impl &m = *current;
  int self = m.running % 32;
  Warp &warp = m.warps[m.running / 32];
  std::memcpy(warp.in[self], words, 40);
  m.collective(site, 0xffffffffu, [&](Warp &warp) {
    ++m.statistics.products;
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      int group = lane / 4, quad = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j)
          a[group + 8 * (i % 2)][2 * quad + j + 8 * (i / 2)] =
              fromBF16(uint16_t(warp.in[lane][i] >> 16 * j));
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          b[2 * quad + j + 8 * i][group] = fromBF16(uint16_t(warp.in[lane][4 + i] >> 16 * j));
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
        float c;
        std::memcpy(&c, &warp.in[lane][6 + i], 4);
        double sum = c;
        for (int k = 0; k < 16; ++k)
          sum += double(a[row][k]) * b[k][col];
        float rounded = float(sum);
        std::memcpy(&warp.out[lane][i], &rounded, 4);
      }
  });
  std::memcpy(words + 6, warp.out[self], 16);
}

static void simtCopy(const char *site, uint64_t to, uint64_t from, int32_t size, int32_t bytes) {
  current->orderCopy(site, {to, from, uint32_t(size), uint32_t(bytes)});
}

static void simtCommit() {
  Thread &self = current->threads[current->running];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

static void simtWait(int32_t pending) {
  Impl &m = *current;
  Thread &self = m.threads[m.running];
  while (self.groups.size() > size_t(pending)) {
    for (const PendingCopy &copy : self.groups.front())
      m.land(m.running, copy);
    self.groups.pop_front();
  }
}
}

const std::vector<std::pair<const char *, void *>> &mlir::moe::simt::simtSymbols() {
  auto address = [](auto *function) { return reinterpret_cast<void *>(function); };
  static const std::vector<std::pair<const char *, void *>> symbols = {
      {"moe_simt_register", address(simtRegister)}, {"moe_simt_shared", address(simtShared)},
      {"moe_simt_access", address(simtAccess)},     {"moe_simt_round_bf16", address(simtRoundBF16)},
      {"moe_simt_barrier", address(simtBarrier)},   {"moe_simt_syncwarp", address(simtSyncWarp)},
      {"moe_simt_shuffle", address(simtShuffle)},   {"moe_simt_vote", address(simtVote)},
      {"moe_simt_redux", address(simtRedux)},       {"moe_simt_match", address(simtMatch)},
      {"moe_simt_ldmatrix", address(simtLdMatrix)}, {"moe_simt_mma", address(simtMma)},
      {"moe_simt_copy", address(simtCopy)},         {"moe_simt_commit", address(simtCommit)},
      {"moe_simt_wait", address(simtWait)},
  };
  return symbols;
}
