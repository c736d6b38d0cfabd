//===- BenchRun.cpp - one test of moec bench ------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Blocks of calls of the layer, of its router where that runs on its own, and
// of the dense FFN take turns, so that whatever else the machine does meets all
// of them. Every call takes the next input and the next bank.
//
//===----------------------------------------------------------------------===//

#include "Bench.h"
#include "Commands.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

namespace moec::tool {

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Quartiles quartiles(std::vector<double> values) {
  llvm::sort(values);
  size_t n = values.size();
  return {values[n / 4], values[n / 2], values[n - 1 - n / 4]};
}

llvm::Expected<Routing> parseRouting(llvm::StringRef text) {
  Routing out;
  out.text = text.str();
  if (text == "uniform") {
    out.kind = Routing::Uniform;
  } else if (text == "zipf") {
    out.kind = Routing::Zipf;
  } else if (text == "one-expert") {
    out.kind = Routing::OneExpert;
  } else if (text == "model") {
    out.kind = Routing::Model;
  } else if (text.consume_front("recorded:") && !text.empty()) {
    out.kind = Routing::Recorded;
    auto usage = readUsage(text);
    if (!usage)
      return usage.takeError();
    out.recorded = std::move(*usage);
    out.text = "recorded";
  } else {
    return makeError(ErrorCode::ARGUMENT, "--routing",
                     "`uniform`, `zipf`, `one-expert`, `model` or `recorded:FILE`",
                     "`" + out.text + "`");
  }
  return out;
}

namespace {

/// splitmix64: the same inputs everywhere.
class Random {
public:
  explicit Random(uint64_t seed) : state(seed) {}
  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  /// In (0, 1).
  double uniform() { return (static_cast<double>(next() >> 12) + 0.5) * 0x1p-52; }

private:
  uint64_t state;
};

DLTensor tensor(void *data, uint8_t code, uint8_t bits, int64_t *shape) {
  DLTensor t;
  memset(&t, 0, sizeof(t));
  t.data = data;
  t.device = {kDLCPU, 0};
  t.ndim = 2;
  t.dtype = {code, bits, 1};
  t.shape = shape;
  return t;
}

/// Calls of one subject on rotating inputs and banks.
class Caller {
public:
  Caller(const Subject &subject, int64_t tokens, std::vector<BenchInput> &inputs)
      : subject(subject), tokens(tokens), inputs(inputs),
        bf16(subject.spec.compute == Format::BF16),
        y(static_cast<size_t>(tokens * subject.spec.H) * (bf16 ? 2 : 4)),
        chosen(tokens * subject.spec.K) {}

  enum What { Layer, Route };
  /// Runs call number `n`. `stages`: on the context that times stages.
  llvm::Error call(int64_t n, What what, bool stages = false) {
    BenchInput &in = inputs[n % static_cast<int64_t>(inputs.size())];
    const Bank &bank = subject.banks[n % static_cast<int64_t>(subject.banks.size())];
    int64_t wide[] = {tokens, subject.spec.H}, narrow[] = {tokens, subject.spec.K};
    uint8_t code = bf16 ? kDLBfloat : kDLFloat, bits = bf16 ? 16 : 32;
    DLTensor x = tensor(in.x.data(), code, bits, wide), out = tensor(y.data(), code, bits, wide);
    DLTensor experts = tensor(in.experts.data(), kDLInt, 32, narrow);
    DLTensor weights = tensor(in.weights.data(), kDLFloat, 32, narrow);
    DLTensor ids = tensor(chosen.data(), kDLInt, 32, narrow);
    moec_call call;
    MOEC_INIT(call);
    call.x = &x;
    if (what == Route) {
      call.experts_out = &ids;
    } else {
      call.y = &out;
      if (!in.experts.empty() && subject.spec.kind == LayerKind::MoE) {
        call.experts = &experts;
        call.weights = &weights;
      }
    }
    moec_error error;
    if (moec_run(stages ? bank.in->stages : bank.in->context, bank.layer, &call, &error))
      return runtimeError(error);
    return llvm::Error::success();
  }

  /// Seconds a call of a block of `count` calls that begins with call number `first`.
  llvm::Expected<double> block(int64_t first, int64_t count, What what) {
    double begin = now();
    for (int64_t i = 0; i < count; ++i)
      if (llvm::Error error = call(first + i, what))
        return std::move(error);
    return (now() - begin) / static_cast<double>(count);
  }

  /// Calls that make a block of some milliseconds; runs enough of them to touch every bank.
  llvm::Expected<std::pair<int64_t, double>> warmUp(What what) {
    int64_t calls = static_cast<int64_t>(std::max(subject.banks.size(), inputs.size()));
    if (auto first = block(0, calls, what); !first)
      return first.takeError();
    auto seconds = block(0, std::min<int64_t>(calls, 8), what);
    if (!seconds)
      return seconds.takeError();
    constexpr double wanted = 0.008;
    double count = std::ceil(wanted / std::max(*seconds, 1e-7));
    return std::pair(static_cast<int64_t>(std::clamp(count, 1.0, 20000.0)), *seconds);
  }

  const std::vector<int32_t> &routed() const { return chosen; }

private:
  const Subject &subject;
  int64_t tokens;
  std::vector<BenchInput> &inputs;
  bool bf16;
  std::vector<char> y;
  std::vector<int32_t> chosen;
};

} // namespace

/// K different experts for each of T tokens. `popularity`: the odds of each expert.
static std::vector<int32_t> drawExperts(int64_t tokens, int64_t chosen,
                                        const std::vector<double> &popularity, Random &random) {
  size_t experts = popularity.size();
  std::vector<int32_t> out;
  std::vector<std::pair<double, int32_t>> keys(experts);
  out.reserve(tokens * chosen);
  for (int64_t t = 0; t < tokens; ++t) {
    // Weighted draw without replacement: the K smallest of exponential times.
    for (size_t e = 0; e < experts; ++e)
      keys[e] = {-std::log(random.uniform()) / popularity[e], static_cast<int32_t>(e)};
    std::partial_sort(keys.begin(), keys.begin() + chosen, keys.end());
    for (int64_t k = 0; k < chosen; ++k)
      out.push_back(keys[k].second);
  }
  return out;
}

llvm::Expected<std::vector<BenchInput>> makeInputs(const Subject &subject, int64_t tokens,
                                                   const Routing &routing, uint64_t seed) {
  const LayerSpec &spec = subject.spec;
  // Few tokens touch few experts: more inputs, so that together they touch most.
  std::vector<BenchInput> out(tokens < 64 ? 16 : 4);
  Random random(seed * 0x1000193 + 1);
  std::vector<double> popularity(spec.E, 1.0);
  if (routing.kind == Routing::Zipf) {
    std::vector<int32_t> order(spec.E);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[random.next() % i]);
    for (int64_t rank = 0; rank < spec.E; ++rank)
      popularity[order[rank]] = std::pow(static_cast<double>(rank + 1), -1.2);
  }
  const LayerUsage *recorded = nullptr;
  if (routing.kind == Routing::Recorded && spec.kind == LayerKind::MoE) {
    const std::vector<LayerUsage> &layers = routing.recorded.layers;
    auto it = llvm::find_if(layers, [&](const LayerUsage &l) { return l.layer == subject.name; });
    if (it == layers.end() && layers.size() == 1)
      it = layers.begin();
    if (it == layers.end())
      return makeError(ErrorCode::ARGUMENT, "--routing recorded",
                       "a recording of layer `" + subject.name + "`",
                       "layers " + llvm::Twine(layers.size()) + ", none of that name");
    recorded = &*it;
    if (recorded->chosen != spec.K || static_cast<int64_t>(recorded->counts.size()) != spec.E ||
        recorded->tokens < 1)
      return makeError(
          ErrorCode::ARGUMENT, "--routing recorded",
          "tokens with K = " + llvm::Twine(spec.K) + " of E = " + llvm::Twine(spec.E) + " experts",
          llvm::Twine(recorded->tokens) + " tokens with K = " + llvm::Twine(recorded->chosen) +
              " of " + llvm::Twine(recorded->counts.size()));
    for (int32_t id : recorded->experts)
      if (id < 0 || id >= spec.E)
        return makeError(ErrorCode::ARGUMENT, "--routing recorded",
                         "experts 0 to " + llvm::Twine(spec.E - 1), llvm::Twine(id));
  }
  bool bf16 = spec.compute == Format::BF16;
  int64_t at = 0; // token of the recording
  for (auto [number, input] : llvm::enumerate(out)) {
    int64_t count = tokens * spec.H;
    input.x.resize(count * (bf16 ? 2 : 4));
    for (int64_t i = 0; i < count; ++i) {
      float value = static_cast<float>((2 * random.uniform() - 1) * std::sqrt(3.0));
      uint32_t bits;
      memcpy(&bits, &value, 4);
      uint16_t high = static_cast<uint16_t>(bits >> 16);
      memcpy(input.x.data() + i * (bf16 ? 2 : 4), bf16 ? static_cast<void *>(&high) : &bits,
             bf16 ? 2 : 4);
    }
    if (spec.kind == LayerKind::Dense || routing.kind == Routing::Model)
      continue;
    if (recorded) {
      for (int64_t t = 0; t < tokens; ++t, at = (at + 1) % recorded->tokens)
        input.experts.insert(input.experts.end(), recorded->experts.begin() + at * spec.K,
                             recorded->experts.begin() + (at + 1) * spec.K);
    } else if (routing.kind == Routing::OneExpert) {
      // Every token takes the same K experts; the next input takes the next ones.
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t k = 0; k < spec.K; ++k)
          input.experts.push_back(
              static_cast<int32_t>((static_cast<int64_t>(number) * spec.K + k) % spec.E));
    } else {
      input.experts = drawExperts(tokens, spec.K, popularity, random);
    }
    input.weights.assign(tokens * spec.K, 1.0f / static_cast<float>(spec.K));
  }
  return std::move(out);
}

/// Medians of the stages of `calls` calls on the timing context.
static llvm::Error timeStages(Caller &caller, Caller::What what,
                              const std::vector<std::string> &labels, int64_t calls,
                              StageClock &clock, std::vector<StageTime> &out) {
  std::vector<std::vector<StageClock::Run>> all;
  for (int64_t n = 0; n < calls; ++n) {
    clock.runs.clear();
    if (llvm::Error error = caller.call(n, what, /*stages=*/true))
      return error;
    if (n == 0)
      continue; // first touch of that context's workspace
    all.resize(clock.runs.size());
    for (size_t s = 0; s < clock.runs.size() && s < all.size(); ++s)
      all[s].push_back(clock.runs[s]);
  }
  for (auto [s, runs] : llvm::enumerate(all)) {
    StageTime stage;
    stage.label = labels.size() == all.size() ? labels[s] : "stage " + std::to_string(s);
    std::vector<double> seconds, balance;
    for (const StageClock::Run &run : runs) {
      seconds.push_back(run.seconds);
      balance.push_back(run.busiest > 0 ? run.mean / run.busiest : 1);
    }
    stage.seconds = quartiles(seconds).median;
    stage.balance = quartiles(balance).median;
    out.push_back(std::move(stage));
  }
  return llvm::Error::success();
}

llvm::Error countWork(BenchRow &row, const Subject &subject, const Subject *dense,
                      std::vector<BenchInput> &inputs,
                      llvm::function_ref<llvm::Expected<std::vector<int32_t>>(int64_t)> routed) {
  const LayerSpec &spec = subject.spec;
  bool isRouted = spec.kind == LayerKind::MoE;
  for (size_t n = 0; n < inputs.size() && isRouted; ++n) {
    std::vector<int32_t> experts = inputs[n].experts;
    if (experts.empty()) {
      auto chosen = routed(static_cast<int64_t>(n));
      if (!chosen)
        return chosen.takeError();
      experts = std::move(*chosen);
    }
    std::vector<int64_t> counts(spec.E);
    for (int32_t id : experts)
      if (id >= 0 && id < spec.E)
        ++counts[id];
    row.expertsUsed +=
        static_cast<double>(spec.E - llvm::count(counts, 0)) / static_cast<double>(inputs.size());
    row.largestExpert = std::max(row.largestExpert, *llvm::max_element(counts));
  }
  double perExpert = static_cast<double>(subject.bytesRead(1) - subject.bytesRead(0));
  row.bytes =
      static_cast<double>(subject.bytesRead(0)) + (isRouted ? perExpert * row.expertsUsed : 0.0);
  row.flops = static_cast<double>(subject.activeFlops) * static_cast<double>(row.tokens);
  if (dense) {
    row.denseBytes = static_cast<double>(dense->bankBytes);
    row.denseFlops = static_cast<double>(dense->activeFlops) * static_cast<double>(row.tokens);
  }
  return llvm::Error::success();
}

llvm::Expected<BenchRow> runTest(const Subject &subject, const Subject *dense, int64_t tokens,
                                 const Routing &routing, const BenchOptions &options,
                                 StageClock &clock, ReadProbe &probe) {
  const LayerSpec &spec = subject.spec;
  bool routed = spec.kind == LayerKind::MoE;
  auto inputs = makeInputs(subject, tokens, routing, options.seed);
  if (!inputs)
    return inputs.takeError();
  bool routeApart = routed && routing.kind != Routing::Model;
  BenchRow row;
  row.subject = &subject;
  row.denseSubject = dense;
  row.tokens = tokens;
  row.routing = routed ? routing.text : "-";
  row.inputs = static_cast<int64_t>(inputs->size());

  Caller layer(subject, tokens, *inputs);
  std::optional<Caller> other;
  if (dense)
    other.emplace(*dense, tokens, *inputs);

  auto choice = [&](int64_t n) -> llvm::Expected<std::vector<int32_t>> {
    if (llvm::Error error = layer.call(n, Caller::Route))
      return std::move(error);
    return layer.routed();
  };
  if (llvm::Error error = countWork(row, subject, dense, *inputs, choice))
    return std::move(error);

  auto layerCalls = layer.warmUp(Caller::Layer);
  if (!layerCalls)
    return layerCalls.takeError();
  std::pair<int64_t, double> routeCalls = {0, 0}, denseCalls = {0, 0};
  if (routeApart) {
    auto calls = layer.warmUp(Caller::Route);
    if (!calls)
      return calls.takeError();
    routeCalls = *calls;
  }
  if (other) {
    auto calls = other->warmUp(Caller::Layer);
    if (!calls)
      return calls.takeError();
    denseCalls = *calls;
  }
  double once = static_cast<double>(layerCalls->first) * layerCalls->second +
                static_cast<double>(routeCalls.first) * routeCalls.second +
                static_cast<double>(denseCalls.first) * denseCalls.second;
  row.blocks = options.blocks
                   ? options.blocks
                   : static_cast<int64_t>(std::clamp(10.0 / std::max(once, 1e-6), 5.0, 15.0));
  row.calls = layerCalls->first;

  std::vector<double> layerTimes, routeTimes, denseTimes, ratios;
  for (int64_t b = 0; b < row.blocks; ++b) {
    row.read = std::max(row.read, probe.pass());
    auto seconds = layer.block(b * layerCalls->first, layerCalls->first, Caller::Layer);
    if (!seconds)
      return seconds.takeError();
    double total = *seconds;
    if (routeApart) {
      auto extra = layer.block(b * routeCalls.first, routeCalls.first, Caller::Route);
      if (!extra)
        return extra.takeError();
      routeTimes.push_back(*extra);
      total += *extra;
    }
    layerTimes.push_back(total);
    if (!other)
      continue;
    auto baseline = other->block(b * denseCalls.first, denseCalls.first, Caller::Layer);
    if (!baseline)
      return baseline.takeError();
    denseTimes.push_back(*baseline);
    ratios.push_back(total / *baseline);
  }
  row.layer = quartiles(layerTimes);
  if (routeApart)
    row.route = quartiles(routeTimes);
  if (other) {
    row.dense = quartiles(denseTimes);
    row.ratio = quartiles(ratios);
  }

  auto labels = [&](const char *entry) {
    auto it = subject.labels.find(entry);
    return it == subject.labels.end() ? std::vector<std::string>() : it->second;
  };
  int64_t calls = layerCalls->second > 0.2 ? 3 : 9;
  if (routeApart)
    if (llvm::Error error =
            timeStages(layer, Caller::Route, labels("route"), calls, clock, row.stages))
      return std::move(error);
  if (llvm::Error error =
          timeStages(layer, Caller::Layer, labels(routeApart ? "experts" : "forward"), calls, clock,
                     row.stages))
    return std::move(error);
  return std::move(row);
}

} // namespace moec::tool
