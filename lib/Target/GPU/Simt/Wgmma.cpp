//===- Wgmma.cpp - warpgroup matrix products of the SIMT executor -------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A wgmma is carried out when its warp waits for it: until then its accumulators hold marks, NaNs
// that name the sum (a chain) and their place in it, and bytes that it reads must not change. The
// value behind a mark comes from `readSums`, the empty assembly that kernels put after the wait so
// that a compiler does not move code before it.
//
//===----------------------------------------------------------------------===//

#include "MachineImpl.h"

#include <cstring>

using namespace mlir::moe::simt;
using Impl = Machine::Impl;

/// A mark: a quiet NaN with 14 bits of chain and 8 of place. Arithmetic makes no NaN but chain 0.
static constexpr uint32_t kMarkBits = 0x7fc00000;
static uint32_t mark(uint32_t chain, uint32_t place) { return kMarkBits | chain << 8 | place; }
static uint32_t chainOf(uint32_t word) {
  return (word & 0xffc00000) == kMarkBits ? word >> 8 & 0x3fff : 0;
}

/// Offset in shared memory of element (mn, k) of an operand that a descriptor describes, or why
/// there is none.
static const char *place(uint64_t descriptor, bool transposed, int mn, int k, uint64_t *out) {
  uint64_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  uint64_t stride = (descriptor >> 32 & 0x3fff) << 4;
  int mode = int(descriptor >> 62);
  if (descriptor >> 49 & 7)
    return "expected a descriptor with base offset 0, but got another";
  if (mode == 0) {
    if (transposed)
      return "expected a swizzle with a transposed operand, but got none, which the executor does "
             "not know";
    *out = start + mn / 8 * stride + k / 8 * leading + mn % 8 * 16 + k % 8 * 2;
    return nullptr;
  }
  uint64_t width = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  // A row of the pattern may be entered in the middle; its eight rows begin where the pattern does.
  if (start / width * width % (8 * width))
    return "expected a descriptor whose pattern begins at a multiple of 8 rows of the swizzle, but "
           "got another address";
  uint64_t offset;
  if (transposed) {
    uint64_t perRow = width / 2;
    offset = start + mn / perRow * leading + k / 8 * stride + k % 8 * width + mn % perRow * 2;
  } else {
    if (start % width + 32 > width)
      return "expected 16 elements within a row of the swizzle, but got an address near its end";
    offset = start + mn / 8 * stride + mn % 8 * width + k * 2;
  }
  *out = offset ^ (offset >> 3 & (mode == 1 ? 0x70 : mode == 2 ? 0x30 : 0x10));
  return nullptr;
}

/// flags: 1 A in registers, 2 and 4 transposed A and B, 8 start from zero. words: sums, then A.
void Impl::issueWgmma(const char *site, int32_t flags, int32_t n, uint64_t descriptorA,
                      uint64_t descriptorB, uint32_t *words) {
  int self = running % 32, count = n / 2;
  if (threads.size() % 128)
    return failAt(site, "expected whole warpgroups of 128 threads, but got a block of %zu",
                  threads.size());
  Warp &mine = warps[running / 32];
  bool first = !mine.arrived;
  WgmmaOp &op = mine.building;
  if (first) {
    op = WgmmaOp();
    op.site = site;
    op.n = n;
    op.leftInRegisters = flags & 1;
    op.transposedA = flags & 2;
    op.transposedB = flags & 4;
    op.zero = flags & 8;
    op.descriptorA = descriptorA;
    op.descriptorB = descriptorB;
    op.from = op.zero ? 0 : chainOf(words[0]);
    if (!op.from && !op.zero)
      op.start.assign(size_t(32) * count, 0);
  } else if (op.descriptorB != descriptorB ||
             (!op.leftInRegisters && op.descriptorA != descriptorA)) {
    return failAt(site, "expected one descriptor in all lanes of a warp, but got two");
  }
  for (int i = 0; i < count && !op.zero; ++i) {
    uint32_t chain = chainOf(words[i]);
    if (chain != op.from || (chain && (words[i] & 0xff) != uint32_t(i)))
      return failAt(site,
                    "expected the accumulators of one sum in their order, but got others in "
                    "place %d",
                    i);
    if (!chain)
      std::memcpy(&op.start[size_t(self) * count + i], &words[i], 4);
  }
  if (op.leftInRegisters)
    std::memcpy(op.left[self], words + count, 16);
  collective(site, 0xffffffffu, [&](Warp &warp) {
    ++statistics.wgmmas;
    WgmmaOp &op = warp.building;
    if (!warp.fenced)
      return failAt(site, "expected wgmma.fence before the first wgmma after other uses of its "
                          "registers, but got none");
    op.sequence = warp.issued++;
    // The low byte is never zero: a NaN that was bf16 has no bits there.
    warp.chains = warp.chains % 0x3fff + 1;
    warp.chains += warp.chains % 256 == 0;
    op.to = warp.chains;
    for (int i = running / 128 * 128; i < running / 128 * 128 + 128; ++i)
      if (threads[i].state == State::AtWarpgroup)
        threads[i].state = State::Ready;
    auto read = [&](uint64_t descriptor, bool transposed, int firstRow, int rows) {
      for (int mn = firstRow; mn < firstRow + rows; ++mn)
        for (int k = 0; k < 16; ++k) {
          uint64_t offset = 0;
          if (const char *text = place(descriptor, transposed, mn, k, &offset))
            return failAt(site, "%s", text);
          uint64_t address = reinterpret_cast<uint64_t>(window) + offset;
          if (!checkOffsets(site, address, 2, "wgmma operand"))
            return;
          for (uint64_t i = address - sharedBegin, end = i + 2; i < end; ++i) {
            if (!checkSharedByte(site, i, /*writes=*/false, /*asyncProxy=*/true))
              return;
            ++sharedShadow[i].inFlight;
          }
          op.bytes.push_back(uint32_t(address - sharedBegin));
        }
    };
    int row = running / 32 % 4 * 16;
    if (!op.leftInRegisters)
      read(op.descriptorA, op.transposedA, row, 16);
    read(op.descriptorB, op.transposedB, 0, op.n);
    warp.open.push_back(op);
  });
  for (int i = 0; i < count; ++i)
    words[i] = mark(mine.open.back().to, uint32_t(i));
}

void Impl::commitWgmma(const char *site) {
  collective(site, 0xffffffffu, [&](Warp &warp) {
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
    warp.fenced = false;
  });
}

void Impl::waitWgmma(const char *site, int32_t pending) {
  int w = running / 32;
  // Carried out by the whole warpgroup: all four warps must have issued it.
  for (bool ready = false; !ready;) {
    ready = true;
    Warp &warp = warps[w];
    if (warp.groups.size() > size_t(pending)) {
      const auto &last = warp.groups[warp.groups.size() - pending - 1];
      for (const WgmmaOp &op : last)
        for (int other = w / 4 * 4; other < w / 4 * 4 + 4; ++other)
          ready &= warps[other].issued > op.sequence;
    }
    if (!ready)
      pause(State::AtWarpgroup, site);
  }
  collective(site, 0xffffffffu, [&](Warp &warp) {
    while (warp.groups.size() > size_t(pending)) {
      for (const WgmmaOp &op : warp.groups.front())
        runWgmma(w, op);
      warp.groups.pop_front();
    }
  });
}

void Impl::runWgmma(int w, const WgmmaOp &op) {
  Warp &warp = warps[w];
  int count = op.n / 2;
  for (int other = w / 4 * 4; other < w / 4 * 4 + 4; ++other)
    for (const auto &group : warps[other].groups)
      for (const WgmmaOp &theirs : group)
        if (theirs.sequence == op.sequence &&
            (theirs.n != op.n || theirs.descriptorB != op.descriptorB))
          return failAt(op.site,
                        "expected one descriptor in all warps of a warpgroup, but got "
                        "another in warp %d",
                        other);
  auto element = [&](uint64_t descriptor, bool transposed, int mn, int k) {
    uint64_t offset = 0;
    place(descriptor, transposed, mn, k, &offset);
    uint16_t bits;
    std::memcpy(&bits, window + offset, 2);
    return bf16ToFloat(bits);
  };
  float a[16][16];
  std::vector<float> b(size_t(op.n) * 16);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      if (op.leftInRegisters) {
        // As the left operand of mma.sync: word i holds row + 8 (i mod 2), k + 8 (i / 2).
        int lane = row % 8 * 4 + k % 8 / 2, word = row / 8 + k / 8 * 2;
        a[row][k] = bf16ToFloat(uint16_t(op.left[lane][word] >> k % 2 * 16));
      } else {
        a[row][k] = element(op.descriptorA, op.transposedA, w % 4 * 16 + row, k);
      }
  for (int col = 0; col < op.n; ++col)
    for (int k = 0; k < 16; ++k)
      b[col * 16 + k] = element(op.descriptorB, op.transposedB, col, k);
  std::vector<float> sums = op.from   ? std::move(warp.sums[op.from])
                            : op.zero ? std::vector<float>(size_t(32) * count, 0.0f)
                                      : op.start;
  warp.sums.erase(op.from);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < count; ++i) {
      int row = lane / 4 + i / 2 % 2 * 8, col = 2 * (lane % 4) + i % 2 + i / 4 * 8;
      double sum = sums[size_t(lane) * count + i];
      for (int k = 0; k < 16; ++k)
        sum += double(a[row][k]) * b[col * 16 + k];
      sums[size_t(lane) * count + i] = float(sum);
    }
  warp.sums[op.to] = std::move(sums);
  for (uint32_t offset : op.bytes)
    for (uint32_t i = offset; i < offset + 2; ++i) {
      --sharedShadow[i].inFlight;
      recordRead(sharedShadow[i], w * 32);
    }
}

void Impl::readSums(const char *site, int32_t count, uint32_t *words) {
  Warp &warp = warps[running / 32];
  for (int i = 0; i < count; ++i) {
    uint32_t chain = chainOf(words[i]);
    if (!chain)
      continue;
    auto found = warp.sums.find(chain);
    if (found == warp.sums.end())
      return failAt(site, "expected accumulators whose wgmma was waited for, but got those of one "
                          "in flight, or of one that was continued");
    size_t perLane = found->second.size() / 32;
    std::memcpy(&words[i], &found->second[running % 32 * perLane + (words[i] & 0xff)], 4);
  }
}
