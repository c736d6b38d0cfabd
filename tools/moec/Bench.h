//===- Bench.h - the parts of moec bench ------------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// BenchModel.cpp makes what is measured (weights, banks) of the code that
// BenchCode.cpp compiles, BenchRun.cpp measures one test on a CPU and
// BenchGPU.cpp on a GPU, BenchTable.cpp prints rows, BenchCommand.cpp is the
// command.
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_BENCH_H
#define MOEC_TOOL_BENCH_H

#include "Device.h"
#include "Measure.h"
#include "Usage.h"

#include "moe/Export/Manifest.h"
#include "moe/Support/Machine.h"
#include "moec.h"

#include "llvm/ADT/ScopeExit.h"

#include <memory>
#include <optional>

namespace moec::tool {

//===----------------------------------------------------------------------===//
// What is measured
//===----------------------------------------------------------------------===//

/// Times every run() of a pool: with gang = 0 the runtime makes one call a stage.
class StageClock {
public:
  explicit StageClock(moec_executor *pool);
  const moec_executor *executor() const { return &clock; }

  struct Run {
    double seconds = 0;
    double busiest = 0, mean = 0; ///< of the lanes, in seconds
  };
  std::vector<Run> runs; ///< since it was last cleared

private:
  static void run(void *self, int32_t n, void (*task)(void *, int32_t), void *arg);

  moec_executor *pool;
  moec_executor clock;
};

/// A compiled folder, opened: closes itself.
struct OpenedModel {
  moec_model *model = nullptr;
  moec_context *context = nullptr; ///< on the pool
  moec_context *stages = nullptr;  ///< on the clock; null on a GPU
  OpenedModel() = default;
  OpenedModel(const OpenedModel &) = delete;
  ~OpenedModel();
};

/// One set of weights of one layer.
struct Bank {
  const OpenedModel *in = nullptr;
  int32_t layer = 0;
};

/// A layer and its banks.
struct Subject {
  LayerSpec spec;
  std::string name;  ///< as in the model
  std::string level; ///< that runs
  uint64_t bankBytes = 0, activeFlops = 0;
  std::vector<Bank> banks;
  /// Labels of the stages of an entry ("forward", "route", "experts"); may be empty.
  std::map<std::string, std::vector<std::string>> labels;

  /// Bytes of weights that a call with that many different experts reads.
  uint64_t bytesRead(int64_t experts) const;
};

struct BenchSetup {
  std::string path;            ///< DIR or MODEL
  std::vector<int64_t> layers; ///< decoder layers wanted; empty: one of each kind of MoE layer
  std::optional<Format> dtype; ///< MODEL only
  std::string level;           ///< cap; empty: the best
  DLDevice device = {kDLCPU, 0};
  std::vector<std::string> gpus; ///< of `device`, as "sm_90", "sm_90a": what code is made for
  int64_t banks = 0;             ///< 0: until they exceed twice the last-level cache
  int64_t maxTokens = 0;
  bool dense = true; ///< also the dense FFN of equal active parameters
  uint64_t cacheBytes = 0;
  std::string scratch; ///< an empty folder to compile into
};

/// Everything in memory, ready to run. `notes` are said aloud. On a GPU `pool` and `clock` are
/// null.
struct BenchModel {
  std::string name;
  uint64_t totalParameters = 0;
  std::vector<std::unique_ptr<OpenedModel>> opened;
  std::vector<std::pair<Subject, std::optional<Subject>>> subjects; ///< and its dense FFN
  std::vector<std::string> notes;
};
/// Compiles `spec` for one CPU level, or for `gpus` where there are any, into `folder` (library and
/// manifest, no weights).
llvm::Error compileInto(const ModelSpec &spec, const std::string &level,
                        llvm::ArrayRef<std::string> gpus, const std::string &folder,
                        const std::string &scratch);
/// The best level that this build makes and this machine runs, up to `cap`.
llvm::Expected<std::string> chooseLevel(const std::string &cap);
/// The dense FFN that multiplies as many weights for a token as the layer's experts do. Nothing
/// for a layer that is dense.
llvm::Expected<std::optional<LayerSpec>> denseTwin(const LayerSpec &layer);

llvm::Expected<BenchModel> prepareBench(const BenchSetup &setup, moec_executor *pool,
                                        StageClock *clock);

//===----------------------------------------------------------------------===//
// One test
//===----------------------------------------------------------------------===//

/// How tokens choose experts.
struct Routing {
  enum Kind { Model, Uniform, Zipf, OneExpert, Recorded } kind = Uniform;
  std::string text; ///< as given
  Usage recorded;
};
/// E-ARGUMENT, or what reading the file says.
llvm::Expected<Routing> parseRouting(llvm::StringRef text);

struct Quartiles {
  double low = 0, median = 0, high = 0;
  double spread() const { return median > 0 ? (high - low) / median : 0; }
};

struct StageTime {
  std::string label;
  double seconds = 0; ///< median
  double balance = 1; ///< mean busy time of the lanes over that of the busiest
};

/// One row: everything in seconds, bytes and FLOPs; what is printed is computed from it.
struct BenchRow {
  const Subject *subject = nullptr;
  const Subject *denseSubject = nullptr;
  int64_t tokens = 0;
  std::string routing;
  Quartiles layer, route, dense; ///< of a call; route is part of layer where it ran on its own
  Quartiles enqueued;            ///< on a GPU: of a call that is not the replay of a graph
  Quartiles ratio;               ///< layer over dense, block by block
  int64_t blocks = 0, calls = 0, inputs = 0;
  double expertsUsed = 0;    ///< mean over the inputs
  int64_t largestExpert = 0; ///< rows of the busiest expert, of any input
  double bytes = 0, flops = 0;
  double denseBytes = 0, denseFlops = 0;
  double read = 0; ///< bytes/s: the best pass over memory between this test's blocks
  std::vector<StageTime> stages;
};

/// One input: tokens, and where they go if that is not the router's to say.
struct BenchInput {
  std::vector<char> x;
  std::vector<int32_t> experts; ///< [T,K]; empty: the router decides
  std::vector<float> weights;   ///< [T,K]
};
llvm::Expected<std::vector<BenchInput>> makeInputs(const Subject &subject, int64_t tokens,
                                                   const Routing &routing, uint64_t seed);
Quartiles quartiles(std::vector<double> values);
/// Notes in `row` which experts the inputs use, and what a call reads and multiplies. `routed`: the
/// router's choice for an input that leaves it to it.
llvm::Error countWork(BenchRow &row, const Subject &subject, const Subject *dense,
                      std::vector<BenchInput> &inputs,
                      llvm::function_ref<llvm::Expected<std::vector<int32_t>>(int64_t)> routed);

struct BenchOptions {
  int64_t blocks = 0; ///< 0: 15, fewer (at least 5) where one test would take over ten seconds
  uint64_t seed = 0;
};

llvm::Expected<BenchRow> runTest(const Subject &subject, const Subject *dense, int64_t tokens,
                                 const Routing &routing, const BenchOptions &options,
                                 StageClock &clock, ReadProbe &probe);

/// Measures the device: rates and cache as those of a machine with one thread for each processor.
llvm::Expected<MachineConstants> measureDevice(Device &device);
/// The same test on a GPU: every call is the replay of a graph, timed by events, and finds a cold
/// L2 cache.
llvm::Expected<BenchRow> runTestOnDevice(const Subject &subject, const Subject *dense,
                                         int64_t tokens, const Routing &routing,
                                         const BenchOptions &options, Device &device,
                                         const MachineConstants &machine);

//===----------------------------------------------------------------------===//
// Output
//===----------------------------------------------------------------------===//

/// The facts that all rows share.
struct BenchHeader {
  std::string model;
  MachineConstants machine;
  uint64_t totalParameters = 0;
};

/// One JSON record, schema 1 (docs/measuring.md).
llvm::json::Object benchRecord(const BenchHeader &header, const BenchRow &row);
std::string benchMarkdown(const BenchHeader &header, const std::vector<BenchRow> &rows);
/// A heading line and a line a record; nested keys joined with dots.
std::string benchCSV(const BenchHeader &header, const std::vector<BenchRow> &rows);

} // namespace moec::tool

#endif // MOEC_TOOL_BENCH_H
