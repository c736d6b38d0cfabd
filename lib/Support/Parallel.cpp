//===- Parallel.cpp - independent pieces of work on several threads -------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Support/Parallel.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <pthread.h>
#include <vector>

namespace moec {

namespace {
struct Shared {
  llvm::function_ref<llvm::Error(unsigned, size_t)> work;
  size_t count;
  std::atomic<size_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex; // of the two below
  size_t failed;
  llvm::Error error = llvm::Error::success();

  void run(unsigned worker) {
    while (!stop) {
      size_t i = next++;
      if (i >= count)
        return;
      llvm::Error result = work(worker, i);
      if (!result)
        continue;
      stop = true;
      std::lock_guard<std::mutex> lock(mutex);
      if (i > failed) {
        llvm::consumeError(std::move(result));
        continue;
      }
      llvm::consumeError(std::move(error));
      error = std::move(result);
      failed = i;
    }
  }
};

struct Worker {
  Shared *shared;
  unsigned number;
  pthread_t thread;
};
} // namespace

llvm::Error parallelFor(size_t count, unsigned threads,
                        llvm::function_ref<llvm::Error(unsigned worker, size_t i)> work) {
  Shared shared{work, count, {}, {}, {}, count};
  // No std::thread: it throws where there are no threads to be had, and nothing here may throw.
  std::vector<Worker> workers(std::min<size_t>(threads, count));
  size_t started = 1;
  for (; started < workers.size(); ++started) {
    workers[started] = {&shared, static_cast<unsigned>(started), {}};
    auto body = [](void *argument) -> void * {
      auto *self = static_cast<Worker *>(argument);
      self->shared->run(self->number);
      return nullptr;
    };
    if (pthread_create(&workers[started].thread, nullptr, body, &workers[started]))
      break;
  }
  shared.run(0);
  for (size_t i = 1; i < started; ++i)
    pthread_join(workers[i].thread, nullptr);
  return std::move(shared.error);
}

} // namespace moec
