//===- Machine.h - measured constants of a machine --------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// What `moec doctor --save F` writes and `moec compile --machine F` reads: one
// JSON object, schema 1 (docs/measuring.md).
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SUPPORT_MACHINE_H
#define MOE_SUPPORT_MACHINE_H

#include "moe/Support/Error.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace moec {

/// The highest "schema" this build reads, and the one it writes.
constexpr int64_t machineSchema = 1;

/// One measurement: of all threads together and of one alone.
struct Rate {
  double all = 0, one = 0;
};

struct MachineConstants {
  std::string version; ///< of the moec that measured
  std::string cpu;     ///< "AMD EPYC"
  int32_t threads = 1; ///< that were used for `Rate::all`
  /// Bytes. l1d and l2 of one core, l3 of one instance, l3Total of all this process may use;
  /// 0 where there is none or the system does not say.
  int64_t line = 64, l1d = 0, l2 = 0, l3 = 0, l3Total = 0;
  std::vector<std::string> levels; ///< those that run here, by rising rank
  /// FLOP/s by instruction, registers only: "fma_f32_128", "fma_f32_256", "fma_f32_512",
  /// "dpbf16_256", "dpbf16_512", "amx_bf16". Absent: the machine lacks it.
  std::map<std::string, Rate> flops;
  /// Bytes/s read from memory: "plain", "prefetch" (4 KB pages), "huge", "huge_prefetch" (2 MB
  /// pages; absent where the system gives none).
  std::map<std::string, Rate> read;
  double forkNs = 0; ///< one parallel region of all threads that does nothing, warm

  /// The largest of `read`, of all threads.
  double bestRead() const;
  /// The largest of `flops` that computes products of `bf16` (else f32) values, and its name.
  /// Exact f32 products serve bf16 as well.
  std::pair<std::string, double> bestFlops(bool bf16) const;
};

llvm::json::Value toJSON(const MachineConstants &machine);

/// E-IO, E-FILE-FORMAT, E-ABI (a higher schema). Unknown keys are skipped: fields are only added.
llvm::Expected<MachineConstants> readMachine(llvm::StringRef path);

} // namespace moec

#endif // MOE_SUPPORT_MACHINE_H
