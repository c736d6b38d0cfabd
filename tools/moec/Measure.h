//===- Measure.h - what this machine can do at most -------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Loops that do nothing but the instruction or the load in question. They are
// measuring tools: nothing of them is linked into a compiled model.
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_MEASURE_H
#define MOEC_TOOL_MEASURE_H

#include "moe/Support/Machine.h"
#include "moec.h"

namespace mlir::moe {
struct CPULevel;
}

namespace moec::tool {

/// Instructions beyond the CPU levels' names, usable in this process.
struct Instructions {
  bool avx2 = false, avx512 = false, bf16 = false, amx = false;
};
/// Asks the CPU and the system; for AMX requests the permission (once, for the process).
Instructions instructions();

/// Null if this process can run code of `level`, else the first feature that is missing.
const char *missingFeature(const mlir::moe::CPULevel &level);

/// Name, caches and levels; measures nothing.
MachineConstants describeMachine();

/// Physical cores and CPUs of the affinity mask.
struct CPUs {
  int cpus = 0, cores = 0;
};
CPUs affinity();

/// Bytes of memory that can be had without swapping; 0 if unknown.
uint64_t availableMemory();

/// Fills flops, read and forkNs with the lanes of `pool`; about two seconds.
/// `bandwidth`: bytes of the buffer that is read, 0 for four times the last-level cache within
/// reason.
llvm::Error measureMachine(MachineConstants &machine, moec_executor *pool, uint64_t bandwidth = 0);

/// A buffer in memory that is read again and again beside other measurements: on a shared machine
/// the bandwidth of this minute is not that of the last.
class ReadProbe {
public:
  /// Of four times the last-level cache, at least 256 MB, at most an eighth of what is free.
  ReadProbe(const MachineConstants &machine, moec_executor *pool);
  ~ReadProbe();
  ReadProbe(const ReadProbe &) = delete;
  /// Reads it once; bytes/s, or 0 where there is no memory or no AVX2.
  double pass();

private:
  moec_executor *pool;
  void *memory = nullptr;
  size_t mapped = 0, bytes = 0;
  char *base = nullptr;
};

} // namespace moec::tool

#endif // MOEC_TOOL_MEASURE_H
