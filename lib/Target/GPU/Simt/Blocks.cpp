//===- Blocks.cpp - order between the blocks of a launch ------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Blocks of one launch may exchange bytes in one way: who wrote them passes a fence of the device
// and then an atomic operation; who reads them sees that operation through one of its own on the
// same word, and passes a fence. The threads of a block share this by their barriers. Atomics alone
// order nothing: LLVM drops what their ordering says when it makes PTX.
//
//===----------------------------------------------------------------------===//

#include "MachineImpl.h"

using namespace mlir::moe::simt;
using Impl = Machine::Impl;

void Impl::fenceDevice() {
  Thread &self = threads[running];
  Clock clock;
  release(running, clock);
  fences[running] = std::move(clock);
  auto seen = seenBlocks.find(running);
  if (seen == seenBlocks.end())
    return;
  // Who learns of this segment of the thread by a barrier has taken it up too.
  takenBlocks.push_back({running, self.clock, std::move(seen->second)});
  seenBlocks.erase(seen);
}

void Impl::atomicDevice(uint64_t address) {
  // A chain of atomic operations carries on what was released by the first of them.
  if (auto word = releasedBlocks.find(address); word != releasedBlocks.end())
    for (const auto &[block, clock] : word->second)
      if (block != blockNumber)
        seenBlocks[running][block] = clock;
  if (auto fence = fences.find(running); fence != fences.end())
    releasedBlocks[address][blockNumber] = fence->second;
}

/// Whether what another block wrote is known to the running thread.
bool Impl::tookUp(const GlobalShadow &shadow) const {
  for (const TakenBlocks &taken : takenBlocks) {
    auto block = taken.from.find(shadow.writeBlock);
    if (block == taken.from.end() || !knows(running, taken.thread, taken.stamp))
      continue;
    const Clock &clock = block->second;
    if (shadow.writeStamp <= clock.floor ||
        (shadow.writer < clock.known.size() && shadow.writeStamp <= clock.known[shadow.writer]))
      return true;
  }
  return false;
}
