//===- Device.h - memory and time on a CUDA device --------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// What `moec run` and `moec bench` need of the CUDA driver beside moec.h, which takes tensors on
// the device and never waits. The driver is loaded at run time.
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_DEVICE_H
#define MOEC_TOOL_DEVICE_H

#include "moe/Support/Error.h"
#include "moec.h"

#include <memory>

namespace moec::tool {

/// "cpu", "cuda" or "cuda:1" of --device.
llvm::Expected<DLDevice> parseDevice(llvm::StringRef text);

/// A CUDA device that a model has been opened on, with a stream of its own.
class Device {
public:
  static llvm::Expected<std::unique_ptr<Device>> open(int32_t number);
  ~Device();
  Device(const Device &) = delete;

  int32_t number() const;
  void *stream() const;
  std::string name() const;
  /// An attribute of cuda.h by its number; 0 where the driver does not know it.
  int attribute(int number) const;
  /// Bytes that are free now.
  uint64_t freeMemory() const;
  llvm::Error wait();
  /// Of `bytes` bytes of the device, without an order.
  llvm::Error upload(uint64_t to, const void *from, size_t bytes);
  llvm::Error download(void *to, uint64_t from, size_t bytes);

  // On the stream, in order.
  llvm::Error fill(uint64_t to, unsigned char value, size_t bytes);
  llvm::Error copy(uint64_t to, uint64_t from, size_t bytes);
  /// Begins and ends a time that `seconds` waits for.
  llvm::Error begin();
  llvm::Error end();
  llvm::Expected<double> seconds();

  /// Calls between these are recorded and not run.
  llvm::Error beginCapture();
  class Graph;
  llvm::Expected<std::unique_ptr<Graph>> endCapture();

private:
  friend class Buffer;
  Device();
  llvm::Expected<uint64_t> allocate(size_t bytes);
  void release(uint64_t memory);
  struct Impl;
  std::unique_ptr<Impl> impl;
};

/// A recorded call.
class Device::Graph {
public:
  ~Graph();
  llvm::Error launch();

private:
  friend class Device;
  Graph(Device &device, void *graph, void *exec) : device(device), graph(graph), exec(exec) {}
  Device &device;
  void *graph, *exec;
};

/// Memory of a device, or of the host where there is none.
class Buffer {
public:
  /// `device` null: host memory.
  static llvm::Expected<Buffer> make(Device *device, size_t bytes, const void *content = nullptr);
  Buffer() = default;
  Buffer(Buffer &&other) { *this = std::move(other); }
  Buffer &operator=(Buffer &&other);
  ~Buffer();

  void *data() const { return reinterpret_cast<void *>(place); }
  size_t size() const { return bytes; }
  uint64_t address() const { return place; }
  llvm::Error read(void *to) const;

private:
  Device *device = nullptr;
  uint64_t place = 0;
  size_t bytes = 0;
};

} // namespace moec::tool

#endif // MOEC_TOOL_DEVICE_H
