//===- Device.cpp - memory and time on a CUDA device ----------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Device.h"

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

namespace moec::tool {

llvm::Expected<DLDevice> parseDevice(llvm::StringRef text) {
  DLDevice out = {kDLCPU, 0};
  llvm::StringRef rest = text;
  if (text == "cpu")
    return out;
  out.device_type = kDLCUDA;
  if (text == "cuda" ||
      (rest.consume_front("cuda:") && !rest.getAsInteger(10, out.device_id) && out.device_id >= 0))
    return out;
  return makeError(ErrorCode::ARGUMENT, "--device", "`cpu`, `cuda` or `cuda:N`", "`" + text + "`");
}

//===----------------------------------------------------------------------===//
// The driver
//===----------------------------------------------------------------------===//

/// Names and signatures of cuda.h; every function returns 0 for success.
#define MOEC_TOOL_CUDA(X)                                                                          \
  X("cuInit", init, (unsigned))                                                                    \
  X("cuGetErrorName", errorName, (int, const char **))                                             \
  X("cuDeviceGet", get, (int *, int))                                                              \
  X("cuDeviceGetName", name, (char *, int, int))                                                   \
  X("cuDeviceGetAttribute", attribute, (int *, int, int))                                          \
  X("cuDevicePrimaryCtxRetain", retain, (void **, int))                                            \
  X("cuDevicePrimaryCtxRelease_v2", giveBack, (int))                                               \
  X("cuCtxPushCurrent_v2", push, (void *))                                                         \
  X("cuCtxPopCurrent_v2", pop, (void **))                                                          \
  X("cuCtxSynchronize", synchronize, (void))                                                       \
  X("cuMemGetInfo_v2", memoryInfo, (size_t *, size_t *))                                           \
  X("cuMemAlloc_v2", allocate, (uint64_t *, size_t))                                               \
  X("cuMemFree_v2", release, (uint64_t))                                                           \
  X("cuMemcpyHtoD_v2", upload, (uint64_t, const void *, size_t))                                   \
  X("cuMemcpyDtoH_v2", download, (void *, uint64_t, size_t))                                       \
  X("cuMemcpyDtoDAsync_v2", copy, (uint64_t, uint64_t, size_t, void *))                            \
  X("cuMemsetD2D8Async", fill, (uint64_t, size_t, unsigned char, size_t, size_t, void *))          \
  X("cuStreamCreate", streamCreate, (void **, unsigned))                                           \
  X("cuStreamDestroy_v2", streamDestroy, (void *))                                                 \
  X("cuStreamBeginCapture_v2", beginCapture, (void *, int))                                        \
  X("cuStreamEndCapture", endCapture, (void *, void **))                                           \
  X("cuGraphInstantiateWithFlags", instantiate, (void **, void *, unsigned long long))             \
  X("cuGraphLaunch", launch, (void *, void *))                                                     \
  X("cuGraphExecDestroy", execDestroy, (void *))                                                   \
  X("cuGraphDestroy", graphDestroy, (void *))                                                      \
  X("cuEventCreate", eventCreate, (void **, unsigned))                                             \
  X("cuEventDestroy_v2", eventDestroy, (void *))                                                   \
  X("cuEventRecord", record, (void *, void *))                                                     \
  X("cuEventElapsedTime", elapsed, (float *, void *, void *))

struct Device::Impl {
#define MEMBER(text, name, arguments) int(*name) arguments = nullptr;
  MOEC_TOOL_CUDA(MEMBER)
#undef MEMBER
  int32_t number = 0;
  int handle = 0;
  bool current = false;
  void *context = nullptr, *stream = nullptr, *first = nullptr, *last = nullptr;

  llvm::Error check(int code, const llvm::Twine &what) const;
};

llvm::Error Device::Impl::check(int code, const llvm::Twine &what) const {
  if (!code)
    return llvm::Error::success();
  const char *text = nullptr;
  if (errorName)
    errorName(code, &text);
  return makeError(code == 2 ? ErrorCode::DEVICE_MEMORY : ErrorCode::LAUNCH,
                   "CUDA device " + llvm::Twine(number), "to " + what,
                   "the driver reports " + llvm::Twine(text ? text : "an error") + " (" +
                       llvm::Twine(code) + ")");
}

Device::Device() : impl(std::make_unique<Impl>()) {}

llvm::Expected<std::unique_ptr<Device>> Device::open(int32_t number) {
  std::unique_ptr<Device> out(new Device);
  Impl &cuda = *out->impl;
  cuda.number = number;
  void *library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return makeError(ErrorCode::NO_DRIVER, "--device cuda",
                     "the CUDA driver (libcuda.so.1) on this machine", "none");
#define FIND(text, name, arguments)                                                                \
  cuda.name = reinterpret_cast<int(*) arguments>(::dlsym(library, text));                          \
  if (!cuda.name)                                                                                  \
    return makeError(ErrorCode::DRIVER_OLD, "--device cuda", "a CUDA driver with " text,           \
                     "one without");
  MOEC_TOOL_CUDA(FIND)
#undef FIND
  if (llvm::Error error = cuda.check(cuda.init(0), "start the driver"))
    return std::move(error);
  if (cuda.get(&cuda.handle, number))
    return makeError(ErrorCode::NO_DEVICE, "--device", "a CUDA device of this machine",
                     "number " + llvm::Twine(number), "moec doctor lists them");
  if (llvm::Error error = cuda.check(cuda.retain(&cuda.context, cuda.handle), "start a context"))
    return std::move(error);
  if (llvm::Error error = cuda.check(cuda.push(cuda.context), "use the context"))
    return std::move(error);
  cuda.current = true;
  if (llvm::Error error = cuda.check(cuda.streamCreate(&cuda.stream, 1), "create a stream"))
    return std::move(error);
  for (void **event : {&cuda.first, &cuda.last})
    if (llvm::Error error = cuda.check(cuda.eventCreate(event, 0), "create an event"))
      return std::move(error);
  return std::move(out);
}

Device::~Device() {
  Impl &cuda = *impl;
  for (void *event : {cuda.first, cuda.last})
    if (event)
      (void)cuda.eventDestroy(event);
  if (cuda.stream)
    (void)cuda.streamDestroy(cuda.stream);
  void *old;
  if (cuda.current)
    (void)cuda.pop(&old);
  if (cuda.context)
    (void)cuda.giveBack(cuda.handle);
}

int32_t Device::number() const { return impl->number; }

void *Device::stream() const { return impl->stream; }

std::string Device::name() const {
  char text[256] = "";
  (void)impl->name(text, sizeof text, impl->handle);
  return text;
}

int Device::attribute(int number) const {
  int value = 0;
  return impl->attribute(&value, number, impl->handle) ? 0 : value;
}

uint64_t Device::freeMemory() const {
  size_t unused = 0, total = 0;
  return impl->memoryInfo(&unused, &total) ? 0 : unused;
}

llvm::Error Device::wait() { return impl->check(impl->synchronize(), "finish"); }

llvm::Error Device::upload(uint64_t to, const void *from, size_t bytes) {
  return impl->check(impl->upload(to, from, bytes), "take a copy");
}

llvm::Error Device::download(void *to, uint64_t from, size_t bytes) {
  return impl->check(impl->download(to, from, bytes), "give a copy");
}

llvm::Error Device::fill(uint64_t to, unsigned char value, size_t bytes) {
  return impl->check(impl->fill(to, bytes, value, bytes, 1, impl->stream), "fill memory");
}

llvm::Error Device::copy(uint64_t to, uint64_t from, size_t bytes) {
  return impl->check(impl->copy(to, from, bytes, impl->stream), "copy memory");
}

llvm::Error Device::begin() {
  return impl->check(impl->record(impl->first, impl->stream), "record an event");
}

llvm::Error Device::end() {
  return impl->check(impl->record(impl->last, impl->stream), "record an event");
}

llvm::Expected<double> Device::seconds() {
  if (llvm::Error error = wait())
    return std::move(error);
  float milliseconds = 0;
  if (llvm::Error error =
          impl->check(impl->elapsed(&milliseconds, impl->first, impl->last), "tell a time"))
    return std::move(error);
  return milliseconds * 1e-3;
}

llvm::Error Device::beginCapture() {
  constexpr int relaxed = 2;
  return impl->check(impl->beginCapture(impl->stream, relaxed), "begin a capture");
}

llvm::Expected<std::unique_ptr<Device::Graph>> Device::endCapture() {
  void *graph = nullptr, *exec = nullptr;
  if (llvm::Error error = impl->check(impl->endCapture(impl->stream, &graph), "end a capture"))
    return std::move(error);
  if (llvm::Error error =
          impl->check(impl->instantiate(&exec, graph, 0), "make a graph that can be launched")) {
    (void)impl->graphDestroy(graph);
    return std::move(error);
  }
  return std::unique_ptr<Graph>(new Graph(*this, graph, exec));
}

llvm::Expected<uint64_t> Device::allocate(size_t bytes) {
  uint64_t place = 0;
  if (llvm::Error error = impl->check(impl->allocate(&place, bytes ? bytes : 1),
                                      "give " + llvm::Twine(bytes) + " bytes of memory"))
    return std::move(error);
  return place;
}

void Device::release(uint64_t memory) { (void)impl->release(memory); }

Device::Graph::~Graph() {
  (void)device.impl->execDestroy(exec);
  (void)device.impl->graphDestroy(graph);
}

llvm::Error Device::Graph::launch() {
  return device.impl->check(device.impl->launch(exec, device.impl->stream), "launch a graph");
}

//===----------------------------------------------------------------------===//
// Buffer
//===----------------------------------------------------------------------===//

llvm::Expected<Buffer> Buffer::make(Device *device, size_t bytes, const void *content) {
  Buffer out;
  out.device = device;
  out.bytes = bytes;
  if (!device) {
    out.place = reinterpret_cast<uint64_t>(std::calloc(bytes ? bytes : 1, 1));
    if (!out.place)
      return makeError(ErrorCode::MEMORY, "tensors", llvm::Twine(bytes) + " bytes", "none");
    if (content)
      memcpy(out.data(), content, bytes);
    return std::move(out);
  }
  auto place = device->allocate(bytes);
  if (!place)
    return place.takeError();
  out.place = *place;
  if (content)
    if (llvm::Error error = device->upload(out.place, content, bytes))
      return std::move(error);
  return std::move(out);
}

Buffer &Buffer::operator=(Buffer &&other) {
  std::swap(device, other.device);
  std::swap(place, other.place);
  std::swap(bytes, other.bytes);
  return *this;
}

Buffer::~Buffer() {
  if (place && device)
    device->release(place);
  else if (place)
    std::free(data());
}

llvm::Error Buffer::read(void *to) const {
  if (device)
    return device->download(to, place, bytes);
  memcpy(to, data(), bytes);
  return llvm::Error::success();
}

} // namespace moec::tool
