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

//===----------------------------------------------------------------------===//
// Synchronisation
//===----------------------------------------------------------------------===//

/// bar.sync (waits) and bar.arrive of one of sixteen barriers; `count` 0 is the whole block.
void Impl::barrier(const char *site, uint32_t number, uint32_t count, bool waits) {
  if (number > 15)
    return failAt(site, "expected a barrier from 0 to 15, but got %u", number);
  Barrier &barrier = barriers[number];
  uint32_t ended = 0, all = uint32_t(threads.size());
  for (const Thread &thread : threads)
    ended += thread.state == State::Done;
  uint32_t wanted = count ? count : all;
  if (wanted % 32 || wanted > all)
    return failAt(site, "expected a barrier of whole warps, at most %u threads, but got %u", all,
                  wanted);
  if (ended > all - wanted)
    return failAt(site, "expected %s at the barrier, but got %u that have ended",
                  count ? (std::to_string(wanted) + " threads").c_str() : "all threads", ended);
  if (barrier.arrived && barrier.count != count)
    return failAt(site,
                  "expected one number of threads at barrier %u, but got %u here and %u at "
                  "%s",
                  number, count, barrier.count, barrier.site);
  if (barrier.arrived && !count && barrier.site != site)
    return fail("%s: expected all threads at one barrier, but got it at %s and others at %s",
                threadName(running).c_str(), site, barrier.site);
  barrier.site = site;
  barrier.count = count;
  // Only a part of the block needs to know who was there.
  if (count)
    release(running, barrier.clock);
  Thread &self = threads[running];
  self.barrier = number;
  if (++barrier.arrived < wanted) {
    if (waits)
      pause(State::AtBarrier, site);
    return;
  }
  ++statistics.barriers;
  if (!count)
    meetAll();
  for (int i = 0; i < int(all); ++i)
    if (i == running ? waits
                     : threads[i].state == State::AtBarrier && threads[i].barrier == number) {
      threads[i].state = State::Ready;
      if (count)
        acquire(i, barrier.clock);
    }
  barrier = Barrier();
}

/// setmaxnreg: registers come from what the block was started with, and are waited for.
void Impl::setRegisters(const char *site, uint32_t count, bool increase, uint32_t atLaunch) {
  int w = running / 32;
  if (count % 8 || count < 24 || count > 256)
    return failAt(site, "expected 24 to 256 registers in steps of 8, but got %u", count);
  registerBudget = atLaunch * uint32_t(warps.size());
  auto taken = [&] {
    uint32_t sum = 0;
    for (int i = 0; i < int(warps.size()); ++i)
      if (i != w)
        sum += warps[i].registers ? warps[i].registers : atLaunch;
    return sum;
  };
  uint32_t before = warps[w].registers ? warps[w].registers : atLaunch;
  if (increase ? count < before : count > before)
    return failAt(site, "expected setmaxnreg to %s, but got %u after %u",
                  increase ? "increase" : "decrease", count, before);
  while (taken() + count > registerBudget)
    pause(State::AtRegisters, site);
  collective(site, 0xffffffffu, [&](Warp &warp) { warp.registers = count; });
  for (Thread &thread : threads)
    if (thread.state == State::AtRegisters)
      thread.state = State::Ready;
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
  case 2:
    return int32_t(current->blockY);
  default:
    return int32_t(current->gridX);
  }
}

static void *simtShared() { return reinterpret_cast<void *>(current->sharedBegin); }

static void simtAccess(const char *site, uint64_t address, int32_t bytes, int32_t align,
                       int32_t space, int32_t writes, int32_t atomic) {
  Impl &m = *current;
  if (address % uint32_t(align))
    return m.fail("%s: %s: expected an address aligned to %d bytes, but got %#llx",
                  m.threadName(m.running).c_str(), site, align, (unsigned long long)address);
  if (space == 3)
    m.checkShared(site, address, uint32_t(bytes), writes);
  else
    m.checkGlobal(site, address, uint32_t(bytes), writes, atomic);
  if (atomic)
    m.atomicDevice(address);
}

static void simtFenceDevice() { current->fenceDevice(); }

static uint16_t simtRoundBF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value))
    return 0x7fff; // what cvt.rn.bf16.f32 makes of every NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void simtBarrier(const char *site, int32_t number, int32_t count, int32_t waits) {
  current->barrier(site, uint32_t(number), uint32_t(count), waits);
}

static void simtSyncWarp(const char *site, int32_t mask) {
  Impl &m = *current;
  m.collective(site, uint32_t(mask), [&](Warp &) {
    Clock clock;
    int first = m.running / 32 * 32;
    for (int lane = 0; lane < 32; ++lane)
      if (uint32_t(mask) >> lane & 1)
        m.release(first + lane, clock);
    for (int lane = 0; lane < 32; ++lane)
      if (uint32_t(mask) >> lane & 1)
        m.acquire(first + lane, clock);
  });
}

/// One lane of the mask, which is nowhere said, but always the same.
static int32_t simtElect(const char *site, int32_t mask) {
  Impl &m = *current;
  Warp &warp = m.warps[m.running / 32];
  m.collective(site, uint32_t(mask), [&](Warp &warp) {
    int lane = m.options.order == Order::Forward ? __builtin_ctz(uint32_t(mask))
                                                 : 31 - __builtin_clz(uint32_t(mask));
    for (auto &out : warp.out)
      out[0] = uint32_t(lane);
  });
  return int32_t(warp.out[m.running % 32][0]) == m.running % 32;
}

static void simtRegisters(const char *site, int32_t count, int32_t increase, int32_t atLaunch) {
  current->setRegisters(site, uint32_t(count), increase, uint32_t(atLaunch));
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
              bf16ToFloat(uint16_t(warp.in[lane][i] >> 16 * j));
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          b[2 * quad + j + 8 * i][group] = bf16ToFloat(uint16_t(warp.in[lane][4 + i] >> 16 * j));
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

static void simtMBarrierInit(const char *site, uint64_t address, int32_t count) {
  current->initMBarrier(site, address, uint32_t(count));
}

static void simtMBarrierArrive(const char *site, uint64_t address, int32_t count, int32_t bytes) {
  current->arrive(site, address, uint32_t(count), bytes);
}

static void simtMBarrierExpect(const char *site, uint64_t address, int32_t bytes) {
  current->expectBytes(site, address, bytes);
}

static void simtMBarrierWait(const char *site, uint64_t address, int32_t parity) {
  current->waitParity(site, address, uint32_t(parity));
}

static void simtCopyArrive(const char *site, uint64_t address, int32_t counts) {
  current->arriveAfterCopies(site, address, counts);
}

static void simtBox(const char *site, uint64_t to, const void *map, int32_t rank,
                    const int32_t *coordinates, uint64_t barrier) {
  current->orderBox(site, to, map, rank, coordinates, barrier);
}

static void simtFenceProxy() { current->fenceProxy(current->running); }

static void simtWgmma(const char *site, int32_t flags, int32_t n, uint64_t a, uint64_t b,
                      uint32_t *words) {
  current->issueWgmma(site, flags, n, a, b, words);
}

static void simtWgmmaFence(const char *site) {
  current->collective(site, 0xffffffffu, [](Warp &warp) { warp.fenced = true; });
}

static void simtWgmmaCommit(const char *site) { current->commitWgmma(site); }
static void simtWgmmaWait(const char *site, int32_t pending) { current->waitWgmma(site, pending); }

static void simtWgmmaRead(const char *site, int32_t count, uint32_t *words) {
  current->readSums(site, count, words);
}
}

const std::vector<std::pair<const char *, void *>> &mlir::moe::simt::simtSymbols() {
  auto address = [](auto *function) { return reinterpret_cast<void *>(function); };
  static const std::vector<std::pair<const char *, void *>> symbols = {
      {"moe_simt_register", address(simtRegister)},
      {"moe_simt_shared", address(simtShared)},
      {"moe_simt_access", address(simtAccess)},
      {"moe_simt_round_bf16", address(simtRoundBF16)},
      {"moe_simt_barrier", address(simtBarrier)},
      {"moe_simt_syncwarp", address(simtSyncWarp)},
      {"moe_simt_shuffle", address(simtShuffle)},
      {"moe_simt_vote", address(simtVote)},
      {"moe_simt_redux", address(simtRedux)},
      {"moe_simt_match", address(simtMatch)},
      {"moe_simt_ldmatrix", address(simtLdMatrix)},
      {"moe_simt_mma", address(simtMma)},
      {"moe_simt_copy", address(simtCopy)},
      {"moe_simt_commit", address(simtCommit)},
      {"moe_simt_wait", address(simtWait)},
      {"moe_simt_elect", address(simtElect)},
      {"moe_simt_registers", address(simtRegisters)},
      {"moe_simt_mbarrier_init", address(simtMBarrierInit)},
      {"moe_simt_mbarrier_arrive", address(simtMBarrierArrive)},
      {"moe_simt_mbarrier_expect", address(simtMBarrierExpect)},
      {"moe_simt_mbarrier_wait", address(simtMBarrierWait)},
      {"moe_simt_copy_arrive", address(simtCopyArrive)},
      {"moe_simt_box", address(simtBox)},
      {"moe_simt_fence_proxy", address(simtFenceProxy)},
      {"moe_simt_fence_device", address(simtFenceDevice)},
      {"moe_simt_wgmma", address(simtWgmma)},
      {"moe_simt_wgmma_fence", address(simtWgmmaFence)},
      {"moe_simt_wgmma_commit", address(simtWgmmaCommit)},
      {"moe_simt_wgmma_wait", address(simtWgmmaWait)},
      {"moe_simt_wgmma_read", address(simtWgmmaRead)},
  };
  return symbols;
}
