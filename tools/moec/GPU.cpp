//===- GPU.cpp - which GPUs the driver reports ----------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The driver is loaded at run time: moec neither needs nor links CUDA.
//
//===----------------------------------------------------------------------===//

#include "GPU.h"

#include <cstddef>
#include <dlfcn.h>

namespace moec::tool {

GPUReport findGPUs() {
  GPUReport out;
  void *driver = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) {
    out.absent = "no CUDA driver (libcuda.so.1) on this machine";
    return out;
  }
  // Signatures of cuda.h; every call returns 0 for success.
  auto find = [&](const char *name) { return ::dlsym(driver, name); };
  auto init = reinterpret_cast<int (*)(unsigned)>(find("cuInit"));
  auto versionOf = reinterpret_cast<int (*)(int *)>(find("cuDriverGetVersion"));
  auto countOf = reinterpret_cast<int (*)(int *)>(find("cuDeviceGetCount"));
  auto get = reinterpret_cast<int (*)(int *, int)>(find("cuDeviceGet"));
  auto nameOf = reinterpret_cast<int (*)(char *, int, int)>(find("cuDeviceGetName"));
  auto memoryOf = reinterpret_cast<int (*)(size_t *, int)>(find("cuDeviceTotalMem_v2"));
  auto attribute = reinterpret_cast<int (*)(int *, int, int)>(find("cuDeviceGetAttribute"));
  if (!init || !versionOf || !countOf || !get || !nameOf || !memoryOf || !attribute) {
    out.absent = "libcuda.so.1 lacks functions that every driver since CUDA 3.2 has";
    return out;
  }
  int version = 0;
  if (versionOf(&version) == 0 && version > 0)
    out.version = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  if (int code = init(0)) {
    out.absent = code == 100 ? "the CUDA driver is there, but no device"
                             : "the CUDA driver refused to start (code " + std::to_string(code) +
                                   ", cuda.h names it)";
    return out;
  }
  int count = 0;
  countOf(&count);
  for (int i = 0; i < count; ++i) {
    int device, major = 0, minor = 0;
    char name[256] = "";
    size_t memory = 0;
    constexpr int capabilityMajor = 75, capabilityMinor = 76;
    if (get(&device, i) || nameOf(name, sizeof(name), device) || memoryOf(&memory, device) ||
        attribute(&major, capabilityMajor, device) || attribute(&minor, capabilityMinor, device))
      continue;
    // As lib/Runtime refuses them: the kernels need asynchronous copies and bf16 tensor cores.
    std::string refused;
    if (major < 8)
      refused = "the kernels need compute capability 8.0 or more";
    else if (version < 11000)
      refused = "the driver is older than CUDA 11.0";
    out.devices.push_back(
        {name, "sm_" + std::to_string(major) + std::to_string(minor), memory, refused});
  }
  if (out.devices.empty())
    out.absent = "the CUDA driver is there, but no device";
  return out;
}

} // namespace moec::tool
