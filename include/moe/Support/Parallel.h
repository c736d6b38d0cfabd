//===- Parallel.h - independent pieces of work on several threads -*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SUPPORT_PARALLEL_H
#define MOE_SUPPORT_PARALLEL_H

#include "llvm/ADT/STLFunctionalExtras.h"
#include "llvm/Support/Error.h"

#include <cstddef>

namespace moec {

/// Calls work(worker, i) once for every i < count, worker < threads: workers claim numbers from
/// small to large, the calling thread is worker 0. After an error nothing more is claimed, and the
/// error of the smallest number is returned. Where the system refuses threads, fewer work.
llvm::Error parallelFor(size_t count, unsigned threads,
                        llvm::function_ref<llvm::Error(unsigned worker, size_t i)> work);

} // namespace moec

#endif // MOE_SUPPORT_PARALLEL_H
