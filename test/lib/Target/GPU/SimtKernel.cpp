//===- SimtKernel.cpp - run one kernel on the SIMT executor ---------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
//   moe-simt-kernel FILE.mlir --kernel m_k --block 128 --shared 4096 --arg ARG ... [options]
//
// FILE holds gpu.modules in the LLVM dialect (the kernel @k of @m is m_k). Arguments in order:
//
//   in:NAME:TYPE:COUNT[:START[:STEP]]   global memory of f32, bf16 or i32, START, START + STEP, ...
//   out:NAME:TYPE:COUNT                 global memory that nobody wrote; printed at the end
//   map:NAME:SIZES:STRIDES:BOX:SWIZZLE  a tensor map over NAME; lists of numbers, as 64x8:128:64x8
//   hide:NAME:...                       as in, but no argument of its own (for a map)
//
// Exit status 1 and a sentence: the executor found a fault; 2: anything else.
//
//===----------------------------------------------------------------------===//

#include "SimtCode.h"

#include "moe/InitAll.h"
#include "moe/Target/GPU/Simt.h"

#include "mlir/Parser/Parser.h"
#include "mlir/Pass/PassManager.h"
#include "mlir/Pass/PassRegistry.h"
#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/CommandLine.h"
#include "llvm/Support/Format.h"
#include "llvm/Support/InitLLVM.h"
#include "llvm/Support/raw_ostream.h"

#include <cstring>
#include <list>
#include <map>

using namespace mlir;
using namespace mlir::moe;
namespace cl = llvm::cl;

static cl::opt<std::string> input(cl::Positional, cl::Required, cl::desc("FILE.mlir"));
static cl::opt<std::string> kernelName("kernel", cl::init("m_k"), cl::desc("MODULE_KERNEL"));
static cl::opt<uint32_t> threads("block", cl::init(32), cl::desc("threads"));
static cl::opt<uint32_t> shared("shared", cl::init(0), cl::desc("bytes of dynamic shared memory"));
static cl::list<std::string> arguments("arg", cl::desc("arguments of the kernel"));
static cl::opt<std::string> orderName("order", cl::init("forward"),
                                      cl::desc("forward, reverse or shuffled:SEED"));
static cl::opt<bool> early("early-copies", cl::desc("copies land when they are ordered"));

[[noreturn]] static void die(const Twine &message) {
  llvm::errs() << "moe-simt-kernel: " << message << "\n";
  std::exit(2);
}

static uint64_t number(StringRef text) {
  uint64_t value;
  if (text.getAsInteger(10, value))
    die("expected a number, but got `" + text + "`");
  return value;
}

static SmallVector<uint64_t> numbers(StringRef text) {
  SmallVector<uint64_t> list;
  for (StringRef piece : llvm::split(text, 'x'))
    if (!piece.empty())
      list.push_back(number(piece));
  return list;
}

namespace {
struct Buffer {
  std::string name, type;
  uint64_t count = 0;
  bool out = false;
  std::vector<uint8_t> bytes;
  uint64_t elementBytes() const { return type == "bf16" ? 2 : 4; }
  uint8_t *data() { return bytes.data() + (256 - uintptr_t(bytes.data()) % 256) % 256; }
};
struct alignas(64) Map {
  uint8_t bytes[128];
};
} // namespace

static uint16_t toBF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void fill(Buffer &buffer, float start, float step) {
  for (uint64_t i = 0; i < buffer.count; ++i) {
    float value = start + step * float(i);
    int32_t integer = int32_t(value);
    uint16_t half = toBF16(value);
    const void *from = buffer.type == "bf16"  ? static_cast<void *>(&half)
                       : buffer.type == "i32" ? static_cast<void *>(&integer)
                                              : static_cast<void *>(&value);
    std::memcpy(buffer.data() + i * buffer.elementBytes(), from, buffer.elementBytes());
  }
}

static void print(Buffer &buffer) {
  llvm::outs() << buffer.name << ":";
  for (uint64_t i = 0; i < buffer.count; ++i) {
    const uint8_t *from = buffer.data() + i * buffer.elementBytes();
    uint32_t word = 0;
    std::memcpy(&word, from, buffer.elementBytes());
    if (buffer.type == "i32") {
      llvm::outs() << " " << int32_t(word);
      continue;
    }
    word <<= buffer.type == "bf16" ? 16 : 0;
    float value;
    std::memcpy(&value, &word, 4);
    llvm::outs() << " " << llvm::format("%g", value);
  }
  llvm::outs() << "\n";
}

int main(int argc, char **argv) {
  llvm::InitLLVM init(argc, argv);
  cl::ParseCommandLineOptions(argc, argv, "run a kernel without a GPU\n");
  DialectRegistry registry;
  moe::registerAllDialects(registry);
  moe::registerAllPasses();
  MLIRContext context(registry);
  OwningOpRef<ModuleOp> module = parseSourceFile<ModuleOp>(input, &context);
  if (!module)
    die("expected IR that can be read in " + input);
  PassManager pm(&context);
  if (failed(parsePassPipeline("moe-gpu-to-simt", pm)) || failed(pm.run(*module)))
    return 2;
  auto code = compileForSimt(*module);
  if (!code)
    die(llvm::toString(code.takeError()));

  simt::Options options;
  options.earlyCopies = early;
  options.maxShared = 232448;
  StringRef order(orderName);
  if (order == "reverse")
    options.order = simt::Order::Reverse;
  if (order.consume_front("shuffled:")) {
    options.order = simt::Order::Shuffled;
    options.seed = number(order);
  }
  simt::Machine machine(options);
  std::list<Buffer> buffers;
  std::list<Map> maps;
  std::list<void *> pointers;
  std::vector<void *> list;
  for (StringRef text : arguments) {
    SmallVector<StringRef> part;
    text.split(part, ':');
    auto at = [&](size_t i) { return i < part.size() ? part[i] : StringRef(); };
    if (at(0) == "map") {
      auto buffer = llvm::find_if(buffers, [&](Buffer &b) { return b.name == at(1); });
      if (buffer == buffers.end())
        die("expected a map over an argument before it, but got `" + text + "`");
      auto sizes = numbers(at(2)), strides = numbers(at(3)), box = numbers(at(4));
      if (sizes.size() > 5 || strides.size() + 1 != sizes.size() || box.size() != sizes.size())
        die("expected 1 to 5 sizes, a stride less and as many of the box, but got `" + text + "`");
      moec_gpu_map view = {};
      view.base = buffer->data();
      view.rank = int32_t(sizes.size());
      view.swizzle = int32_t(number(at(5)));
      llvm::copy(sizes, view.sizes);
      llvm::copy(strides, view.strides);
      llvm::copy(box, view.box);
      std::string error = simt::encodeTensorMap(view, maps.emplace_back().bytes);
      if (!error.empty()) {
        llvm::errs() << error << "\n";
        return 1;
      }
      list.push_back(maps.back().bytes);
      continue;
    }
    bool out = at(0) == "out", hidden = at(0) == "hide";
    if (!out && !hidden && at(0) != "in")
      die("expected in, out, hide or map, but got `" + text + "`");
    Buffer &buffer = buffers.emplace_back();
    buffer.name = at(1).str();
    buffer.type = at(2).str();
    buffer.count = number(at(3));
    buffer.out = out;
    buffer.bytes.resize(buffer.count * buffer.elementBytes() + 256);
    double start = 0, step = 1;
    if (!at(4).empty())
      (void)at(4).getAsDouble(start);
    if (!at(5).empty())
      (void)at(5).getAsDouble(step);
    fill(buffer, out ? -1 : float(start), out ? 0 : float(step));
    machine.addRegion(buffer.data(), buffer.count * buffer.elementBytes(), buffer.name, !out, !out);
    if (hidden)
      continue;
    pointers.push_back(buffer.data());
    list.push_back(&pointers.back());
  }
  auto function = code->find(kernelName + "_simt");
  if (!function)
    die(llvm::toString(function.takeError()));
  moec_gpu_launch launch = {kernelName.c_str(), 0, shared, {1, 1, 1}, {threads, 1, 1}, list.data()};
  if (!machine.launch(reinterpret_cast<void (*)(void *const *)>(*function), launch)) {
    llvm::errs() << machine.error() << "\n";
    return 1;
  }
  for (Buffer &buffer : buffers)
    if (buffer.out)
      print(buffer);
  return 0;
}
