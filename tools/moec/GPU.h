//===- GPU.h - which GPUs the driver reports --------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_GPU_H
#define MOEC_TOOL_GPU_H

#include <cstdint>
#include <string>
#include <vector>

namespace moec::tool {

struct GPU {
  std::string name, architecture; ///< "NVIDIA H100 …", "sm_90"
  uint64_t memory = 0;            ///< bytes
  std::string refused;            ///< why moec cannot use it; empty if it can
};

struct GPUReport {
  std::string absent;  ///< why there is none, one sentence; empty if there is one
  std::string version; ///< of CUDA that the driver supports, "12.8"; empty without a driver
  std::vector<GPU> devices;
};

/// Loads the CUDA driver if there is one, asks, and creates no context.
GPUReport findGPUs();

} // namespace moec::tool

#endif // MOEC_TOOL_GPU_H
