//===- RunCommand.cpp - moec run ------------------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A client of moec.h like any other.
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "CompileModule.h"
#include "Device.h"
#include "Log.h"
#include "Npy.h"
#include "Usage.h"

#include "moe/Export/Output.h"
#include "moec.h"

#include "llvm/ADT/ScopeExit.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/Path.h"

#include <chrono>
#include <cmath>
#include <cstring>

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string> folder(cl::Positional, cl::Required, cl::desc("DIR"),
                                   cl::value_desc("DIR"), cl::sub(runParser()));
static cl::opt<std::string>
    layerOption("layer",
                cl::desc("Decoder layer number (as 3) or name; not needed if there is one"),
                cl::value_desc("L"), cl::cat(category()), cl::sub(runParser()));
static cl::opt<std::string> input("i", cl::desc("Input x, [..., H], float32 or bfloat16"),
                                  cl::value_desc("x.npy"), cl::cat(category()),
                                  cl::sub(runParser()));
static cl::opt<std::string> output("o", cl::desc("Output y, of x's shape and type"),
                                   cl::value_desc("y.npy"), cl::cat(category()),
                                   cl::sub(runParser()));
static cl::opt<int64_t> tokens("tokens", cl::desc("Make an input of T random tokens instead of -i"),
                               cl::value_desc("T"), cl::init(-1), cl::cat(category()),
                               cl::sub(runParser()));
static cl::opt<uint64_t> seed("seed", cl::desc("Seed of the random input (default 0)"),
                              cl::value_desc("S"), cl::init(0), cl::cat(category()),
                              cl::sub(runParser()));
static cl::opt<std::string>
    trace("trace", cl::desc("Record which experts served which tokens (see moec inspect --usage)"),
          cl::value_desc("usage.safetensors"), cl::cat(category()), cl::sub(runParser()));
static cl::opt<int> threads("threads", cl::desc("Threads (default: those this process may use)"),
                            cl::value_desc("N"), cl::init(0), cl::cat(category()),
                            cl::sub(runParser()));
static cl::opt<std::string> cpu("cpu", cl::desc("Highest CPU level to use, as x86-64-v3"),
                                cl::value_desc("LEVEL"), cl::cat(category()), cl::sub(runParser()));
static cl::opt<std::string> gpu("gpu", cl::desc("GPU level to use, as sm_80 (default: the best)"),
                                cl::value_desc("LEVEL"), cl::cat(category()), cl::sub(runParser()));
static cl::opt<std::string> deviceOption("device", cl::init("cpu"),
                                         cl::desc("Where to run (default cpu): a library for GPUs "
                                                  "needs cuda, or cuda:N for another device"),
                                         cl::value_desc("cpu|cuda|cuda:N"), cl::cat(category()),
                                         cl::sub(runParser()));
static cl::opt<std::string> weights("weights", cl::desc("Folder of packed weights (DIR/weights)"),
                                    cl::value_desc("WEIGHTS"), cl::cat(category()),
                                    cl::sub(runParser()));
static cl::opt<bool> force("force", cl::desc("Replace existing output files"), cl::cat(category()),
                           cl::sub(runParser()));

namespace {
struct Input {
  Array array;
  int64_t tokens = 0;
};
} // namespace

static llvm::Expected<Input> makeInput(const moec_layer_info &info) {
  Input out;
  if (!input.empty()) {
    auto array = readNpy(input);
    if (!array)
      return array.takeError();
    out.array = std::move(*array);
    const std::vector<int64_t> &shape = out.array.shape;
    std::string text;
    for (int64_t size : shape)
      text += (text.empty() ? "" : ", ") + std::to_string(size);
    if (shape.empty() || shape.back() != info.H)
      return makeError(ErrorCode::SHAPE, input,
                       "[..., " + llvm::Twine(info.H) + "] as layer `" + info.name + "` takes",
                       "[" + text + "]");
    out.tokens = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i)
      out.tokens *= shape[i];
    return out;
  }
  out.tokens = tokens;
  bool bf16 = info.compute.code == kDLBfloat;
  out.array.format = bf16 ? Format::BF16 : Format::F32;
  out.array.shape = {tokens, info.H};
  size_t count = static_cast<size_t>(tokens) * info.H;
  out.array.bytes.resize(count * (bf16 ? 2 : 4));
  // Uniform with variance 1; the generator is splitmix64, so the input is the same everywhere.
  uint64_t state = seed;
  for (size_t i = 0; i < count; ++i) {
    uint64_t z = (state += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    z ^= z >> 31;
    float value =
        static_cast<float>((2 * (static_cast<double>(z >> 40) * 0x1p-24) - 1) * std::sqrt(3.0));
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (bf16)
      reinterpret_cast<uint16_t *>(out.array.bytes.data())[i] =
          static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    else
      memcpy(out.array.bytes.data() + 4 * i, &bits, 4);
  }
  return out;
}

namespace {
/// Arrays of this process as tensors where the layer runs: the arrays themselves on the CPU, copies
/// on a device.
class Tensors {
public:
  Tensors(Device *device, DLDevice where) : device(device), where(where) {}

  llvm::Expected<DLTensor *> add(void *host, size_t bytes, bool isInput, uint8_t code, uint8_t bits,
                                 std::vector<int64_t> shape) {
    auto entry = std::make_unique<Entry>();
    entry->host = host;
    entry->output = !isInput;
    entry->shape = std::move(shape);
    DLTensor &t = entry->tensor;
    memset(&t, 0, sizeof(t));
    t.data = host;
    if (device) {
      auto buffer = Buffer::make(device, bytes, isInput ? host : nullptr);
      if (!buffer)
        return buffer.takeError();
      entry->buffer = std::move(*buffer);
      t.data = entry->buffer.data();
    }
    t.device = where;
    t.ndim = static_cast<int32_t>(entry->shape.size());
    t.dtype = {code, bits, 1};
    t.shape = entry->shape.data();
    entries.push_back(std::move(entry));
    return &entries.back()->tensor;
  }

  /// Copies what was written back into the arrays.
  llvm::Error read() {
    for (const std::unique_ptr<Entry> &entry : entries)
      if (device && entry->output)
        if (llvm::Error error = entry->buffer.read(entry->host))
          return error;
    return llvm::Error::success();
  }

private:
  struct Entry {
    void *host;
    bool output;
    Buffer buffer;
    std::vector<int64_t> shape;
    DLTensor tensor;
  };
  Device *device;
  DLDevice where;
  std::vector<std::unique_ptr<Entry>> entries;
};
} // namespace

/// The position of --layer in the module.
static llvm::Expected<int32_t> findLayer(const moec_model *model) {
  int32_t count = moec_layer_count(model);
  std::vector<std::string> names;
  for (int32_t i = 0; i < count; ++i) {
    moec_layer_info info;
    MOEC_INIT(info);
    moec_error error;
    if (moec_get_layer_info(model, i, &info, &error))
      return runtimeError(error);
    if (layerOption == info.name || layerOption == std::to_string(info.index))
      return i;
    names.push_back(info.name);
  }
  if (layerOption.empty() && count == 1)
    return 0;
  if (names.size() > 6) {
    names.erase(names.begin() + 3, names.end() - 1);
    names[2] = "…";
  }
  return makeError(ErrorCode::ARGUMENT, "--layer", "one of the layers " + quoteList(names, "and"),
                   layerOption.empty() ? std::string("none") : "`" + layerOption + "`");
}

static llvm::Error refuseExisting(llvm::StringRef path) {
  llvm::sys::fs::file_status status;
  if (force || path.empty() || llvm::sys::fs::status(path, status) ||
      status.type() != llvm::sys::fs::file_type::regular_file)
    return llvm::Error::success();
  return makeError(ErrorCode::EXISTS, path, "a name that does not exist yet", "a file",
                   "--force replaces it");
}

static llvm::Error run() {
  if (tokens.getNumOccurrences() && (tokens < 0 || tokens > (int64_t(1) << 31)))
    return makeError(ErrorCode::ARGUMENT, "--tokens", "0 to 2147483648", llvm::Twine(tokens));
  for (auto [option, path] :
       {std::pair("-i", &input), std::pair("-o", &output), std::pair("--trace", &trace)})
    if (*path == "-")
      return makeError(ErrorCode::ARGUMENT, option, "the name of a file", "`-`");
  if (input.empty() == (tokens < 0))
    return makeError(ErrorCode::ARGUMENT, "moec run", "one of -i and --tokens",
                     input.empty() ? "neither" : "both");
  if (output.empty() && trace.empty() && input.empty())
    Log::get().note("nothing is kept: give -o or --trace to keep results");
  if (!input.empty() && output.empty() && trace.empty())
    return makeError(ErrorCode::ARGUMENT, "moec run", "-o or --trace", "neither");
  if (threads < 0)
    return makeError(ErrorCode::ARGUMENT, "--threads", "0 or more", llvm::Twine(threads));
  if (llvm::Error error = refuseExisting(output))
    return error;
  if (llvm::Error error = refuseExisting(trace))
    return error;

  auto where = parseDevice(deviceOption);
  if (!where)
    return where.takeError();
  bool cuda = where->device_type == kDLCUDA;
  for (const auto &[option, given] : {std::pair("--threads", threads.getNumOccurrences()),
                                      std::pair("--cpu", cpu.getNumOccurrences())})
    if (cuda && given)
      return makeError(ErrorCode::ARGUMENT, option, "none with --device cuda", "one");

  if (llvm::Error wrong = checkGPULevel(gpu, cuda))
    return wrong;
  const std::string &level = cuda ? gpu : cpu;

  moec_error error;
  moec_model *model = nullptr;
  moec_open_options options;
  MOEC_INIT(options);
  options.device = *where;
  options.weights = weights.empty() ? nullptr : weights.c_str();
  options.cpu_level = level.empty() ? nullptr : level.c_str();
  if (moec_open(folder.c_str(), &options, &model, &error))
    return runtimeError(error);
  llvm::scope_exit closeModel([&] { moec_close(model); });
  auto layer = findLayer(model);
  if (!layer)
    return layer.takeError();
  moec_layer_info info;
  MOEC_INIT(info);
  if (moec_get_layer_info(model, *layer, &info, &error))
    return runtimeError(error);
  if (!trace.empty() && info.kind != 0)
    return makeError(ErrorCode::ARGUMENT, "--trace", "a layer with experts",
                     llvm::Twine("the dense layer `") + info.name + "`");
  auto in = makeInput(info);
  if (!in)
    return in.takeError();

  std::unique_ptr<Device> device;
  moec_executor *pool = nullptr;
  if (cuda) {
    auto opened = Device::open(where->device_id);
    if (!opened)
      return opened.takeError();
    device = std::move(*opened);
  } else {
    moec_pool_options poolOptions;
    MOEC_INIT(poolOptions);
    poolOptions.threads = threads;
    if (moec_pool_create(&poolOptions, &pool, &error))
      return runtimeError(error);
  }
  llvm::scope_exit closePool([&] { moec_pool_destroy(pool); });
  moec_context_options contextOptions;
  MOEC_INIT(contextOptions);
  contextOptions.executor = pool;
  // A device has work for many tokens at once.
  contextOptions.max_tokens =
      std::max<int64_t>(1, std::min<int64_t>(in->tokens, cuda ? 8192 : 512));
  moec_context *context = nullptr;
  if (moec_context_create(model, &contextOptions, &context, &error))
    return runtimeError(error);
  llvm::scope_exit closeContext([&] { moec_context_destroy(context); });

  Array y;
  y.format = in->array.format;
  y.shape = in->array.shape;
  y.bytes.resize(in->array.bytes.size());
  bool bf16 = y.format == Format::BF16;
  LayerUsage usage;
  usage.layer = info.name;
  usage.tokens = in->tokens;
  usage.chosen = info.K;
  std::vector<int32_t> counts;
  Tensors tensors(device.get(), *where);
  llvm::Error failed = llvm::Error::success();
  auto make = [&](auto &values, bool isInput, uint8_t code, uint8_t bits,
                  std::vector<int64_t> shape) -> DLTensor * {
    if (failed)
      return nullptr;
    auto made = tensors.add(values.data(), values.size() * sizeof(values[0]), isInput, code, bits,
                            std::move(shape));
    if (!made) {
      failed = made.takeError();
      return nullptr;
    }
    return *made;
  };
  moec_call call;
  MOEC_INIT(call);
  uint8_t code = bf16 ? kDLBfloat : kDLFloat, bits = bf16 ? 16 : 32;
  call.x = make(in->array.bytes, true, code, bits, {in->tokens, info.H});
  call.y = make(y.bytes, false, code, bits, {in->tokens, info.H});
  call.stream = device ? device->stream() : nullptr;
  if (!trace.empty()) {
    usage.experts.resize(in->tokens * info.K);
    usage.weights.resize(in->tokens * info.K);
    counts.resize(info.E + 1);
    call.experts_out = make(usage.experts, false, kDLInt, 32, {in->tokens, info.K});
    call.weights_out = make(usage.weights, false, kDLFloat, 32, {in->tokens, info.K});
    call.counts_out = make(counts, false, kDLInt, 32, {info.E + 1});
  }
  if (failed)
    return failed;
  auto begin = std::chrono::steady_clock::now();
  if (moec_run(context, *layer, &call, &error))
    return runtimeError(error);
  if (device)
    if (llvm::Error late = device->wait())
      return late;
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (device && moec_context_status(context, &error))
    return runtimeError(error);
  if (llvm::Error late = tensors.read())
    return late;

  if (!output.empty())
    if (llvm::Error late = replaceFile(output, npyText(y)))
      return late;
  if (!trace.empty()) {
    usage.counts.assign(counts.begin(), counts.end() - 1);
    Usage file;
    llvm::StringRef stem = llvm::sys::path::filename(llvm::StringRef(folder).rtrim('/'));
    stem.consume_back(".moec");
    file.model = stem.str();
    file.layers.push_back(std::move(usage));
    if (llvm::Error late = replaceFile(trace, usageText(file)))
      return late;
  }
  Log::get().note(llvm::Twine("layer ") + info.name + " (" + info.level +
                  "): " + llvm::Twine(in->tokens) + " tokens in " + timeText(seconds) +
                  (cuda ? " (first call)" : " (first call, weights not yet in memory)"));
  return llvm::Error::success();
}

const Command runCommand = {"run", "DIR --layer L -i x.npy -o y.npy",
                            "Run one layer on an array or on random tokens.", runParser,
                            [] { return Log::get().report(run()); }};

} // namespace moec::tool
