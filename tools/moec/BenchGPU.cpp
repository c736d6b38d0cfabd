//===- BenchGPU.cpp - one test of moec bench on a GPU ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Calls are captured into graphs, one for each input, and replayed; events of
// the device tell their time. Before every call a buffer of twice the L2 cache
// is overwritten, so that weights come from memory.
//
//===----------------------------------------------------------------------===//

#include "Bench.h"
#include "Commands.h"

#include "moe/Export/Module.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace moec::tool {

// Numbers of cuda.h.
static constexpr int clockRate = 13, processors = 16, memoryClock = 36, busWidth = 37, l2Bytes = 38,
                     capabilityMajor = 75, capabilityMinor = 76;

/// Products and sums of bf16 that one processor's tensor cores finish in a cycle, from the data
/// sheets; of the newest that is known for what is newer.
static double tensorFlopsPerCycle(int major, int minor) {
  if (major == 8)
    return minor == 0 ? 2048 : 1024;
  return major < 8 ? 0 : major == 9 ? 4096 : 8192;
}

/// Bytes/s of copies from the device to itself, read and written; 0 where there is no memory.
static llvm::Expected<double> copyRate(Device &device) {
  size_t bytes = std::min<uint64_t>(512u << 20, device.freeMemory() / 8);
  auto from = Buffer::make(&device, bytes), to = Buffer::make(&device, bytes);
  for (auto *buffer : {&from, &to})
    if (!*buffer)
      return buffer->takeError();
  std::vector<double> times;
  for (int i = -1; i < 9; ++i) {
    for (auto step : {0, 1, 2}) {
      llvm::Error error = step == 0   ? device.begin()
                          : step == 1 ? device.copy(to->address(), from->address(), bytes)
                                      : device.end();
      if (error)
        return std::move(error);
    }
    auto seconds = device.seconds();
    if (!seconds)
      return seconds.takeError();
    if (i >= 0)
      times.push_back(*seconds);
  }
  double median = quartiles(std::move(times)).median;
  return median > 0 ? 2.0 * static_cast<double>(bytes) / median : 0;
}

llvm::Expected<MachineConstants> measureDevice(Device &device) {
  MachineConstants out;
  out.version = versionString();
  out.cpu = device.name();
  out.threads = std::max(1, device.attribute(processors));
  out.l3Total = device.attribute(l2Bytes);
  double hertz = 1e3 * device.attribute(clockRate);
  double tensor =
      tensorFlopsPerCycle(device.attribute(capabilityMajor), device.attribute(capabilityMinor)) *
      hertz * out.threads;
  out.flops["mma_bf16_nominal"] = {tensor, tensor / out.threads};
  // Two transfers a cycle of the memory's clock, over the whole bus.
  double memory = 2e3 * device.attribute(memoryClock) * device.attribute(busWidth) / 8;
  auto copies = copyRate(device);
  if (!copies)
    return copies.takeError();
  out.read["copy"] = {*copies, *copies};
  if (memory > 0)
    out.read["nominal"] = {memory, memory};
  return out;
}

namespace {

/// Calls of one subject on inputs that lie on the device.
class DeviceCaller {
public:
  enum What { Layer, Route };

  DeviceCaller(const Subject &subject, Device &device, DLDevice where, int64_t tokens)
      : subject(subject), device(device), where(where), tokens(tokens) {}

  llvm::Error prepare(const std::vector<BenchInput> &from) {
    auto add = [&](Buffer &to, const void *content, size_t bytes) -> llvm::Error {
      auto made = Buffer::make(&device, bytes, content);
      if (!made)
        return made.takeError();
      to = std::move(*made);
      return llvm::Error::success();
    };
    for (const BenchInput &input : from) {
      Input &here = inputs.emplace_back();
      if (llvm::Error error = add(here.x, input.x.data(), input.x.size()))
        return error;
      if (input.experts.empty() || subject.spec.kind == LayerKind::Dense)
        continue;
      if (llvm::Error error = add(here.experts, input.experts.data(), input.experts.size() * 4))
        return error;
      if (llvm::Error error = add(here.weights, input.weights.data(), input.weights.size() * 4))
        return error;
    }
    if (llvm::Error error = add(y, nullptr, inputs.front().x.size()))
      return error;
    return add(chosen, nullptr, static_cast<size_t>(tokens * subject.spec.K) * 4);
  }

  /// Puts call number `n` on the stream.
  llvm::Error call(int64_t n, What what) {
    Input &in = inputs[n % inputs.size()];
    const Bank &bank = subject.banks[n % subject.banks.size()];
    int64_t wide[] = {tokens, subject.spec.H}, narrow[] = {tokens, subject.spec.K};
    DLTensor x = tensor(in.x, kDLBfloat, 16, wide), out = tensor(y, kDLBfloat, 16, wide);
    DLTensor experts = tensor(in.experts, kDLInt, 32, narrow);
    DLTensor weights = tensor(in.weights, kDLFloat, 32, narrow);
    DLTensor ids = tensor(chosen, kDLInt, 32, narrow);
    moec_call call;
    MOEC_INIT(call);
    call.stream = device.stream();
    call.x = &x;
    if (what == Route) {
      call.experts_out = &ids;
    } else {
      call.y = &out;
      if (in.experts.address()) {
        call.experts = &experts;
        call.weights = &weights;
      }
    }
    moec_error error;
    if (moec_run(bank.in->context, bank.layer, &call, &error))
      return runtimeError(error);
    return llvm::Error::success();
  }

  /// Records a graph for every input.
  llvm::Error capture(What what) {
    for (size_t n = 0; n < inputs.size(); ++n) {
      // Once without: what a driver loads late is there then.
      if (llvm::Error error = call(n, what))
        return error;
      if (llvm::Error error = device.beginCapture())
        return error;
      llvm::Error failed = call(n, what);
      auto graph = device.endCapture();
      if (failed) {
        if (!graph)
          llvm::consumeError(graph.takeError());
        return failed;
      }
      if (!graph)
        return graph.takeError();
      graphs[what].push_back(std::move(*graph));
    }
    return device.wait();
  }

  llvm::Error replay(int64_t n, What what) { return graphs[what][n % inputs.size()]->launch(); }

  llvm::Expected<std::vector<int32_t>> routed(int64_t n) {
    if (llvm::Error error = call(n, Route))
      return std::move(error);
    if (llvm::Error error = device.wait())
      return std::move(error);
    std::vector<int32_t> ids(chosen.size() / 4);
    if (llvm::Error error = chosen.read(ids.data()))
      return std::move(error);
    return ids;
  }

private:
  struct Input {
    Buffer x, experts, weights;
  };
  DLTensor tensor(const Buffer &buffer, uint8_t code, uint8_t bits, int64_t *shape) {
    DLTensor t;
    memset(&t, 0, sizeof(t));
    t.data = buffer.data();
    t.device = where;
    t.ndim = 2;
    t.dtype = {code, bits, 1};
    t.shape = shape;
    return t;
  }

  const Subject &subject;
  Device &device;
  DLDevice where;
  int64_t tokens;
  std::vector<Input> inputs;
  Buffer y, chosen;
  std::vector<std::unique_ptr<Device::Graph>> graphs[2];
};

/// Overwrites a buffer, then times what `start` puts on the stream.
class ColdTimer {
public:
  static llvm::Expected<ColdTimer> make(Device &device, int64_t cache) {
    auto flush = Buffer::make(&device, std::max<int64_t>(2 * cache, 1 << 20));
    if (!flush)
      return flush.takeError();
    return ColdTimer(device, std::move(*flush));
  }
  llvm::Expected<double> time(llvm::function_ref<llvm::Error()> start) {
    if (llvm::Error error = device->fill(flush.address(), ++value, flush.size()))
      return std::move(error);
    if (llvm::Error error = device->begin())
      return std::move(error);
    if (llvm::Error error = start())
      return std::move(error);
    if (llvm::Error error = device->end())
      return std::move(error);
    return device->seconds();
  }

private:
  ColdTimer(Device &device, Buffer flush) : device(&device), flush(std::move(flush)) {}
  Device *device;
  Buffer flush;
  unsigned char value = 0;
};

} // namespace

llvm::Expected<BenchRow> runTestOnDevice(const Subject &subject, const Subject *dense,
                                         int64_t tokens, const Routing &routing,
                                         const BenchOptions &options, Device &device,
                                         const MachineConstants &machine) {
  bool isRouted = subject.spec.kind == LayerKind::MoE;
  auto inputs = makeInputs(subject, tokens, routing, options.seed);
  if (!inputs)
    return inputs.takeError();
  bool routeApart = isRouted && routing.kind != Routing::Model;
  BenchRow row;
  row.subject = &subject;
  row.denseSubject = dense;
  row.tokens = tokens;
  row.routing = isRouted ? routing.text : "-";
  row.inputs = static_cast<int64_t>(inputs->size());
  row.calls = 1;
  row.read = machine.read.at("copy").all;

  DLDevice where = {kDLCUDA, device.number()};
  DeviceCaller layer(subject, device, where, tokens);
  if (llvm::Error error = layer.prepare(*inputs))
    return std::move(error);
  std::optional<DeviceCaller> other;
  if (dense) {
    other.emplace(*dense, device, where, tokens);
    if (llvm::Error error = other->prepare(*inputs))
      return std::move(error);
  }
  auto choice = [&](int64_t n) { return layer.routed(n); };
  if (llvm::Error error = countWork(row, subject, dense, *inputs, choice))
    return std::move(error);

  using What = DeviceCaller::What;
  if (llvm::Error error = layer.capture(What::Layer))
    return std::move(error);
  if (routeApart)
    if (llvm::Error error = layer.capture(What::Route))
      return std::move(error);
  if (other)
    if (llvm::Error error = other->capture(What::Layer))
      return std::move(error);
  auto timer = ColdTimer::make(device, machine.l3Total);
  if (!timer)
    return timer.takeError();
  row.blocks = options.blocks ? options.blocks : 50;
  std::vector<double> layerTimes, routeTimes, denseTimes, enqueuedTimes, ratios;
  // Two rounds that do not count: the first launches of a graph load it.
  for (int64_t n = -2; n < row.blocks; ++n) {
    int64_t number = n + 2;
    double total = 0;
    auto measure = [&](std::vector<double> &times,
                       llvm::function_ref<llvm::Error()> start) -> llvm::Expected<double> {
      auto seconds = timer->time(start);
      if (seconds && n >= 0)
        times.push_back(*seconds);
      return seconds;
    };
    std::vector<double> experts;
    auto seconds = measure(experts, [&] { return layer.replay(number, What::Layer); });
    if (!seconds)
      return seconds.takeError();
    total = *seconds;
    if (routeApart) {
      auto extra = measure(routeTimes, [&] { return layer.replay(number, What::Route); });
      if (!extra)
        return extra.takeError();
      total += *extra;
    }
    auto enqueued = measure(enqueuedTimes, [&] { return layer.call(number, What::Layer); });
    if (!enqueued)
      return enqueued.takeError();
    if (n >= 0)
      layerTimes.push_back(total);
    if (!other)
      continue;
    auto baseline = measure(denseTimes, [&] { return other->replay(number, What::Layer); });
    if (!baseline)
      return baseline.takeError();
    if (n >= 0)
      ratios.push_back(*baseline > 0 ? total / *baseline : 0);
  }
  // What the device has to say about the calls.
  moec_error error;
  if (moec_context_status(subject.banks.front().in->context, &error))
    return runtimeError(error);
  row.layer = quartiles(layerTimes);
  row.enqueued = quartiles(enqueuedTimes);
  if (routeApart)
    row.route = quartiles(routeTimes);
  if (other) {
    row.dense = quartiles(denseTimes);
    row.ratio = quartiles(ratios);
  }
  return std::move(row);
}

} // namespace moec::tool
