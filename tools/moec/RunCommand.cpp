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

static DLTensor tensor(void *data, uint8_t code, uint8_t bits, int64_t *shape, int32_t rank) {
  DLTensor t;
  memset(&t, 0, sizeof(t));
  t.data = data;
  t.device = {kDLCPU, 0};
  t.ndim = rank;
  t.dtype = {code, bits, 1};
  t.shape = shape;
  return t;
}

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
  if (input.empty() == (tokens < 0))
    return makeError(ErrorCode::ARGUMENT, "moec run", "one of -i and --tokens",
                     input.empty() ? "neither" : "both");
  if (output.empty() && trace.empty() && input.empty())
    Log::get().note("nothing is kept: give -o or --trace to keep results");
  if (!input.empty() && output.empty() && trace.empty())
    return makeError(ErrorCode::ARGUMENT, "moec run", "-o or --trace", "neither");
  if (tokens > (int64_t(1) << 31))
    return makeError(ErrorCode::ARGUMENT, "--tokens", "at most 2147483648", llvm::Twine(tokens));
  if (threads < 0)
    return makeError(ErrorCode::ARGUMENT, "--threads", "0 or more", llvm::Twine(threads));
  if (llvm::Error error = refuseExisting(output))
    return error;
  if (llvm::Error error = refuseExisting(trace))
    return error;

  moec_error error;
  moec_model *model = nullptr;
  moec_open_options options;
  MOEC_INIT(options);
  options.weights = weights.empty() ? nullptr : weights.c_str();
  options.cpu_level = cpu.empty() ? nullptr : cpu.c_str();
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

  moec_pool_options poolOptions;
  MOEC_INIT(poolOptions);
  poolOptions.threads = threads;
  moec_executor *pool = nullptr;
  if (moec_pool_create(&poolOptions, &pool, &error))
    return runtimeError(error);
  llvm::scope_exit closePool([&] { moec_pool_destroy(pool); });
  moec_context_options contextOptions;
  MOEC_INIT(contextOptions);
  contextOptions.executor = pool;
  contextOptions.max_tokens = std::max<int64_t>(1, std::min<int64_t>(in->tokens, 512));
  moec_context *context = nullptr;
  if (moec_context_create(model, &contextOptions, &context, &error))
    return runtimeError(error);
  llvm::scope_exit closeContext([&] { moec_context_destroy(context); });

  Array y;
  y.format = in->array.format;
  y.shape = in->array.shape;
  y.bytes.resize(in->array.bytes.size());
  bool bf16 = y.format == Format::BF16;
  int64_t wide[] = {in->tokens, info.H}, chosen[] = {in->tokens, info.K}, all[] = {info.E + 1};
  DLTensor xTensor =
      tensor(in->array.bytes.data(), bf16 ? kDLBfloat : kDLFloat, bf16 ? 16 : 32, wide, 2);
  DLTensor yTensor = tensor(y.bytes.data(), bf16 ? kDLBfloat : kDLFloat, bf16 ? 16 : 32, wide, 2);
  LayerUsage usage;
  usage.layer = info.name;
  usage.tokens = in->tokens;
  usage.chosen = info.K;
  std::vector<int32_t> counts;
  DLTensor idTensor, weightTensor, countTensor;
  moec_call call;
  MOEC_INIT(call);
  call.x = &xTensor;
  call.y = &yTensor;
  if (!trace.empty()) {
    usage.experts.resize(in->tokens * info.K);
    usage.weights.resize(in->tokens * info.K);
    counts.resize(info.E + 1);
    idTensor = tensor(usage.experts.data(), kDLInt, 32, chosen, 2);
    weightTensor = tensor(usage.weights.data(), kDLFloat, 32, chosen, 2);
    countTensor = tensor(counts.data(), kDLInt, 32, all, 1);
    call.experts_out = &idTensor;
    call.weights_out = &weightTensor;
    call.counts_out = &countTensor;
  }
  auto begin = std::chrono::steady_clock::now();
  if (moec_run(context, *layer, &call, &error))
    return runtimeError(error);
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  if (!output.empty())
    if (llvm::Error failed = replaceFile(output, npyText(y)))
      return failed;
  if (!trace.empty()) {
    usage.counts.assign(counts.begin(), counts.end() - 1);
    Usage file;
    llvm::StringRef stem = llvm::sys::path::filename(llvm::StringRef(folder).rtrim('/'));
    stem.consume_back(".moec");
    file.model = stem.str();
    file.layers.push_back(std::move(usage));
    if (llvm::Error failed = replaceFile(trace, usageText(file)))
      return failed;
  }
  Log::get().note(llvm::Twine("layer ") + info.name + " (" + info.level +
                  "): " + llvm::Twine(in->tokens) + " tokens in " + timeText(seconds) +
                  " (first call, weights not yet in memory)");
  return llvm::Error::success();
}

const Command runCommand = {"run", "DIR --layer L -i x.npy -o y.npy",
                            "Run one layer on an array or on random tokens.", runParser,
                            [] { return Log::get().report(run()); }};

} // namespace moec::tool
