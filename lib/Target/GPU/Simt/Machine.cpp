//===- Machine.cpp - runs GPU kernels on the CPU --------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "MachineImpl.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <sys/mman.h>

using namespace mlir::moe::simt;

// Saves the registers that a function must keep, and continues where another fiber did so.
extern "C" void moe_simt_switch(void **from, void *to);
asm(R"(
.text
.type moe_simt_switch, @function
moe_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moe_simt_switch, .-moe_simt_switch
)");

static constexpr size_t kStackBytes = 64 * 1024;
// Descriptors of wgmma hold 18 bits of an address.
static constexpr size_t kWindowBytes = 256 * 1024;

thread_local Machine::Impl *mlir::moe::simt::current = nullptr;

//===----------------------------------------------------------------------===//
// Faults
//===----------------------------------------------------------------------===//

std::string Machine::Impl::threadName(int thread) const {
  char text[96];
  std::snprintf(text, sizeof text, "thread %d (warp %d, lane %d) of block (%u, %u)", thread,
                thread / 32, thread % 32, blockX, blockY);
  return text;
}

void Machine::Impl::failAt(const char *site, const char *format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  fail("%s: %s: %s", threadName(running).c_str(), site, text);
}

void Machine::Impl::fail(const char *format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  if (error.empty())
    error = std::string("kernel `") + kernelName + "`: " + text;
  // A fiber that failed never continues; its stack is used anew by the next block.
  if (running >= 0)
    moe_simt_switch(&threads[running].stackPointer, scheduler);
}

//===----------------------------------------------------------------------===//
// Fibers
//===----------------------------------------------------------------------===//

static void enterFiber() {
  Machine::Impl *m = current;
  m->kernel(m->arguments);
  Thread &self = m->threads[m->running];
  if (!self.groups.empty() || !self.open.empty())
    m->dropCopies(m->running);
  self.state = State::Done;
  moe_simt_switch(&self.stackPointer, m->scheduler);
}

void Machine::Impl::resume(int thread) {
  running = thread;
  moe_simt_switch(&scheduler, threads[thread].stackPointer);
  running = -1;
}

void Machine::Impl::pause(State state, const char *where) {
  Thread &self = threads[running];
  self.state = state;
  self.where = where;
  moe_simt_switch(&self.stackPointer, scheduler);
}

/// One order of n things per round.
void Machine::Impl::shuffle(std::vector<int> &list) {
  std::iota(list.begin(), list.end(), 0);
  if (options.order == Order::Reverse)
    std::reverse(list.begin(), list.end());
  if (options.order == Order::Shuffled)
    std::shuffle(list.begin(), list.end(), random);
}

void Machine::Impl::startBlock() {
  int count = int(threads.size());
  std::memset(reinterpret_cast<void *>(sharedBegin), 0xff, sharedBytes);
  std::fill(sharedShadow.begin(), sharedShadow.end(), SharedShadow());
  moreReaders.clear();
  freeReaders.clear();
  for (Barrier &barrier : barriers)
    barrier = Barrier();
  mbarriers.clear();
  asyncOps.clear();
  fences.clear();
  seenBlocks.clear();
  takenBlocks.clear();
  registerBudget = 0;
  now = 1;
  known.clear();
  fencedKnown.clear();
  for (int i = 0; i < count; ++i) {
    Thread &thread = threads[i];
    thread = Thread();
    char *top = stacks + (i + 1) * kStackBytes;
    // As after a call: the stack is 8 modulo 16 where a function begins.
    void **slot = reinterpret_cast<void **>(top) - 2;
    *slot = reinterpret_cast<void *>(&enterFiber);
    slot -= 6; // rbp, rbx, r12 … r15
    std::memset(slot, 0, 6 * sizeof(void *));
    thread.stackPointer = slot;
  }
  for (Warp &warp : warps)
    warp = Warp();
}

bool Machine::Impl::runBlock() {
  startBlock();
  int count = int(threads.size());
  std::vector<int> warpOrder(warps.size()), laneOrder(32);
  for (;;) {
    bool progress = false, done = true;
    shuffle(warpOrder);
    for (int w : warpOrder) {
      // A warp runs until no lane of it can.
      for (bool again = true; again;) {
        again = false;
        shuffle(laneOrder);
        for (int lane : laneOrder) {
          int i = w * 32 + lane;
          if (i >= count || threads[i].state != State::Ready)
            continue;
          resume(i);
          again = progress = true;
          if (!error.empty())
            return false;
        }
      }
    }
    for (const Thread &thread : threads)
      done &= thread.state == State::Done;
    if (done)
      return finishBlock();
    // What is in flight lands as late as it may; in a shuffled order also at any other time.
    if ((!progress || (options.order == Order::Shuffled && random() % 4 == 0)) && landOne()) {
      if (!error.empty())
        return false;
      continue;
    }
    if (!progress)
      return reportDeadlock();
  }
}

/// What a block may not leave behind.
bool Machine::Impl::finishBlock() {
  if (!asyncOps.empty())
    fail("%s: %s: expected a wait for every box and copy before the block ends, but got one in "
         "flight",
         threadName(asyncOps.front().thread).c_str(), asyncOps.front().site);
  for (size_t w = 0; w < warps.size(); ++w) {
    const Warp &warp = warps[w];
    if (!warp.open.empty() || !warp.groups.empty())
      fail("%s: expected a wait for every wgmma before the block ends, but got one in flight",
           threadName(int(w) * 32).c_str());
    else if (warp.registers != warps[w / 4 * 4].registers)
      fail("%s: expected setmaxnreg in all warps of a warpgroup, but got other numbers in this one",
           threadName(int(w) * 32).c_str());
  }
  return error.empty();
}

bool Machine::Impl::reportDeadlock() {
  std::string text = "deadlock: ";
  int shown = 0, finished = 0;
  for (int i = 0; i < int(threads.size()); ++i) {
    const Thread &thread = threads[i];
    if (thread.state == State::Done) {
      ++finished;
      continue;
    }
    if (i && threads[i - 1].state == thread.state && threads[i - 1].where == thread.where)
      continue;
    if (++shown > 4)
      continue;
    text += "from " + threadName(i) + " on, threads wait at " + thread.where;
    if (thread.state == State::AtMBarrier) {
      const MBarrier &barrier = mbarriers.at(thread.barrier);
      text += " (phase " + std::to_string(barrier.phase) + " of the mbarrier at offset " +
              std::to_string(thread.barrier) + ": " + std::to_string(barrier.pending) +
              " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing)";
    }
    text += "; ";
  }
  text +=
      std::to_string(finished) + " of " + std::to_string(threads.size()) + " threads have ended";
  fail("%s", text.c_str());
  return false;
}

//===----------------------------------------------------------------------===//
// Machine
//===----------------------------------------------------------------------===//

Machine::Machine(Options options) : impl(std::make_unique<Impl>()) {
  impl->options = options;
  impl->random.seed(options.seed);
}

Machine::~Machine() {
  if (impl->stacks)
    munmap(impl->stacks, impl->stackCount * kStackBytes);
  if (impl->window)
    munmap(impl->window, kWindowBytes);
}

void Machine::addRegion(const void *data, size_t bytes, std::string name, bool written,
                        bool readOnly) {
  Region region;
  region.begin = reinterpret_cast<uint64_t>(data);
  region.bytes = bytes;
  region.name = std::move(name);
  region.readOnly = readOnly;
  if (!readOnly) {
    region.shadow.resize(bytes);
    for (GlobalShadow &shadow : region.shadow)
      shadow.written = written;
  }
  impl->regions.push_back(std::move(region));
}

const std::string &Machine::error() const { return impl->error; }
const Statistics &Machine::statistics() const { return impl->statistics; }

bool Machine::launch(void (*kernel)(void *const *), const moec_gpu_launch &launch) {
  Impl &m = *impl;
  if (!m.error.empty())
    return false;
  m.kernelName = launch.name;
  m.kernel = kernel;
  m.arguments = launch.arguments;
  m.running = -1;
  uint64_t count = uint64_t(launch.block[0]) * launch.block[1] * launch.block[2];
  if (launch.block[1] != 1 || launch.block[2] != 1 || launch.grid[2] != 1)
    m.fail("expected blocks of one dimension and a grid of two, but got others");
  else if (count == 0 || count > 1024 || count % 32 != 0)
    m.fail("expected 32 to 1024 threads in whole warps, but got %llu", (unsigned long long)count);
  else if (launch.grid[0] == 0 || launch.grid[1] == 0 || launch.grid[0] > 2147483647u ||
           launch.grid[1] > 65535)
    m.fail("expected a grid within the limits, but got %u x %u", launch.grid[0], launch.grid[1]);
  else if (launch.shared_bytes > m.options.maxShared)
    m.fail("expected at most %zu bytes of shared memory, but got %u", m.options.maxShared,
           launch.shared_bytes);
  if (!m.error.empty())
    return false;
  if (m.stackCount < count) {
    if (m.stacks)
      munmap(m.stacks, m.stackCount * kStackBytes);
    void *memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    m.stackCount = memory == MAP_FAILED ? 0 : count;
    m.stacks = memory == MAP_FAILED ? nullptr : static_cast<char *>(memory);
    if (!m.stacks) {
      m.fail("expected memory for %llu stacks, but got none", (unsigned long long)count);
      return false;
    }
  }
  m.threads.assign(count, Thread());
  m.warps.assign(count / 32, Warp());
  if (!m.window) {
    void *memory = mmap(nullptr, 2 * kWindowBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      m.fail("expected memory for a block, but got none");
      return false;
    }
    uint64_t begin = reinterpret_cast<uint64_t>(memory);
    uint64_t head = (kWindowBytes - begin % kWindowBytes) % kWindowBytes;
    m.window = static_cast<char *>(memory) + head;
    if (head)
      munmap(memory, head);
    munmap(m.window + kWindowBytes, kWindowBytes - head);
  }
  // Not at its beginning, where an address would be an offset.
  m.sharedBegin = reinterpret_cast<uint64_t>(m.window) + 1024;
  m.sharedBytes = launch.shared_bytes;
  m.sharedShadow.assign(launch.shared_bytes, SharedShadow());
  ++m.launchNumber;
  m.releasedBlocks.clear();
  ++m.statistics.launches;
  Impl *outer = current;
  current = &m;
  // Blocks have no order: run them from the last where warps are reversed.
  m.gridX = launch.grid[0];
  uint64_t blocks = uint64_t(launch.grid[0]) * launch.grid[1];
  bool good = true;
  for (uint64_t i = 0; i < blocks && good; ++i) {
    uint64_t number = m.options.order == Order::Reverse ? blocks - 1 - i : i;
    m.blockX = uint32_t(number % launch.grid[0]);
    m.blockY = uint32_t(number / launch.grid[0]);
    m.blockNumber = number + 1;
    ++m.statistics.blocks;
    good = m.runBlock();
  }
  current = outer;
  return good;
}
