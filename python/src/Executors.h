//===- Executors.h - where parallel work of a library runs ------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_PYTHON_EXECUTORS_H
#define MOEC_PYTHON_EXECUTORS_H

#include "Tensor.h"

#include <atomic>
#include <dlfcn.h>
#include <unistd.h>

namespace moec::python {

/// The runtime's own pool of threads.
struct Pool {
  explicit Pool(int threads, int spinMicroseconds)
      : threads(threads), spinMicroseconds(spinMicroseconds) {
    moec_pool_options options;
    MOEC_INIT(options);
    options.threads = threads;
    options.spin_us = spinMicroseconds;
    moec_error error;
    check(moec_pool_create(&options, &executor, &error), error);
  }
  ~Pool() { moec_pool_destroy(executor); }
  Pool(const Pool &) = delete;

  int threads, spinMicroseconds;
  moec_executor *executor = nullptr;
};

/// Runs every task on the calling thread, last one first: an executor that makes no promise (gang
/// 0), for finding out whether anything relies on one.
struct Serial {
  explicit Serial(int lanes) {
    if (lanes < 1)
      raise(MOEC_E_ARGUMENT, "Serial: lanes", "at least 1", std::to_string(lanes));
    executor = {sizeof executor, nullptr, lanes, 0, run};
  }
  static void run(void *, int32_t n, void (*task)(void *, int32_t), void *arg) {
    while (n-- > 0)
      task(arg, n);
  }
  moec_executor executor;
};

/// The threads of an OpenMP runtime that is already in the process: torch's own. Nothing is linked:
/// the two functions are looked up in the library of that name.
struct OpenMP {
  OpenMP(const std::string &path, int lanes) : path(path), lanes(lanes), owner(getpid()) {
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!library)
      raise(MOEC_E_ARGUMENT, "OpenMP: path", "an OpenMP runtime that is loaded already", path);
    parallel = reinterpret_cast<ParallelFn>(dlsym(library, "GOMP_parallel"));
    auto maximum = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
    if (!parallel || !maximum)
      raise(MOEC_E_ARGUMENT, "OpenMP: path", "a library with GOMP_parallel", path);
    if (lanes < 0)
      raise(MOEC_E_ARGUMENT, "OpenMP: lanes", "at least 0", std::to_string(lanes));
    executor = {sizeof executor, this, lanes ? lanes : maximum(), /*gang=*/0, run};
  }
  OpenMP(const OpenMP &) = delete;

  static void run(void *self, int32_t n, void (*task)(void *, int32_t), void *arg) {
    auto *pool = static_cast<OpenMP *>(self);
    Work work{{0}, n, task, arg};
    // The threads of OpenMP do not live on in a child of fork.
    if (n == 1 || getpid() != pool->owner)
      help(&work);
    else
      pool->parallel(help, &work, static_cast<unsigned>(n), 0);
  }

  std::string path;
  int lanes;
  moec_executor executor;

private:
  using ParallelFn = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);
  struct Work {
    std::atomic<int32_t> next;
    int32_t count;
    void (*task)(void *, int32_t);
    void *arg;
  };
  static void help(void *data) {
    auto *work = static_cast<Work *>(data);
    for (int32_t i; (i = work->next.fetch_add(1)) < work->count;)
      work->task(work->arg, i);
  }

  ParallelFn parallel = nullptr;
  pid_t owner;
};

} // namespace moec::python

#endif // MOEC_PYTHON_EXECUTORS_H
