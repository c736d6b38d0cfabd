//===- SimtTool.cpp - run a layer's GPU code on the SIMT executor ---------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
//   moe-simt LAYER.mlir --function f0 [options] DIR:TOKENS:SLOTS ...
//
// LAYER.mlir is a module as after the phase `import`. The function is compiled for a GPU and each
// case run on the executor. Files of a case, raw and little endian: x.bin (bf16 or f32, as the
// function's x), router_x.bin (the same, where the router reads it), y.bin (with --accumulate),
// experts.bin and weights.bin (i32, f32; an `experts` entry), w<i>.bin (f32 [E][parts][rows][cols],
// the weight with index i). Written: y.out, experts.out, weights.out, logits.out (which the entry
// has). Exit status 1 and a sentence on stderr: the executor found a fault; 2: anything else.
//
//===----------------------------------------------------------------------===//

#include "SimtCode.h"

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/InitAll.h"
#include "moe/Runtime/Pack.h"
#include "moe/Target/GPU/Simt.h"

#include "mlir/AsmParser/AsmParser.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/GPU/IR/GPUDialect.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/SymbolTable.h"
#include "mlir/Parser/Parser.h"
#include "mlir/Pass/PassManager.h"
#include "mlir/Pass/PassRegistry.h"
#include "llvm/Support/CommandLine.h"
#include "llvm/Support/InitLLVM.h"
#include "llvm/Support/MemoryBuffer.h"
#include "llvm/Support/raw_ostream.h"

#include <cstring>
#include <map>

using namespace mlir;
using namespace mlir::moe;
namespace cl = llvm::cl;

static cl::opt<std::string> input(cl::Positional, cl::Required, cl::desc("LAYER.mlir"));
static cl::list<std::string> cases(cl::Positional, cl::desc("DIR:TOKENS:SLOTS ..."));
static cl::opt<std::string> functionName("function", cl::desc("entry to run"), cl::init("f0"));
static cl::opt<std::string> orderName("order", cl::desc("forward, reverse or shuffled:SEED"),
                                      cl::init("forward"));
static cl::opt<bool> earlyCopies("early-copies", cl::desc("copies land when they are ordered"));
static cl::opt<bool> accumulate("accumulate", cl::desc("y += result"));
static cl::opt<int64_t> padding("padding", cl::desc("elements between rows of x and y"));
static cl::opt<int64_t> shift("shift", cl::desc("elements by which x and y are misaligned"));
static cl::opt<std::string> mutation("mutate", cl::desc("KERNEL:KIND:N, a planted fault"));
static cl::opt<bool> routedOnly("routed-only", cl::desc("the routed sum alone"));
static cl::opt<bool> atomic("atomic", cl::desc("gpu_combine = \"atomic\""));
static cl::opt<std::string> gpuName("gpu", cl::desc("architecture"), cl::init("sm_80"));
static cl::opt<std::string> tiles("tiles", cl::desc("gpu_tiles of both matmuls, as text"));

[[noreturn]] static void die(const Twine &message) {
  llvm::errs() << "moe-simt: " << message << "\n";
  std::exit(2);
}

template <typename T> static std::vector<T> readFile(const std::string &path, size_t count) {
  auto file = llvm::MemoryBuffer::getFile(path, /*IsText=*/false, false);
  if (!file)
    die("expected file " + path + ", but got: " + file.getError().message());
  if ((*file)->getBufferSize() != count * sizeof(T))
    die("expected " + Twine(count * sizeof(T)) + " bytes in " + path + ", but got " +
        Twine((*file)->getBufferSize()));
  std::vector<T> data(count);
  std::memcpy(data.data(), (*file)->getBufferStart(), count * sizeof(T));
  return data;
}

static void writeFile(const std::string &path, const void *data, size_t bytes) {
  std::error_code error;
  llvm::raw_fd_ostream os(path, error);
  if (error)
    die("expected to write " + path + ", but got: " + error.message());
  os.write(static_cast<const char *>(data), bytes);
}

static void runPipeline(ModuleOp module, StringRef text) {
  PassManager pm(module.getContext());
  if (failed(parsePassPipeline(text, pm)) || failed(pm.run(module)))
    die("expected the pipeline `" + text + "` to run");
}

/// What an entry takes, read before it is lowered.
struct Signature {
  std::map<std::string, MemRefType> buffers;
  std::map<int64_t, WeightType> weights;
  bool dense = false;
  int64_t dim(const char *name, unsigned i) const { return buffers.at(name).getDimSize(i); }
  int64_t bytes(const char *name) const { return buffers.at(name).getElementTypeBitWidth() / 8; }
};

static Signature readSignature(func::FuncOp func) {
  Signature signature;
  for (BlockArgument argument : func.getArguments()) {
    unsigned i = argument.getArgNumber();
    auto role = func.getArgAttrOfType<StringAttr>(i, MoEDialect::kArgAttrName);
    if (auto type = dyn_cast<WeightType>(argument.getType()))
      signature.weights[func.getArgAttrOfType<IntegerAttr>(i, MoEDialect::kWeightIndexAttrName)
                            .getInt()] = type;
    else if (auto type = dyn_cast<MemRefType>(argument.getType()))
      signature.buffers[role.str()] = type;
  }
  signature.dense = !signature.buffers.count("experts");
  return signature;
}

//===----------------------------------------------------------------------===//
// Planted faults
//===----------------------------------------------------------------------===//

/// Plants one fault; dies where there is no place for it, so that a test cannot pass by accident.
static void mutate(ModuleOp module) {
  if (mutation.empty())
    return;
  SmallVector<StringRef> parts;
  StringRef(mutation).split(parts, ':');
  if (parts.size() != 3)
    die("expected --mutate KERNEL:KIND:N");
  StringRef kind = parts[1];
  int64_t number = std::stol(parts[2].str()), seen = 0;
  bool done = false;
  module.walk([&](LLVM::LLVMFuncOp kernel) {
    if (kernel.getSymName() != parts[0])
      return;
    // Faults change blocks: the operations are listed first.
    SmallVector<Operation *> ops;
    kernel.getBody().walk([&](Operation *op) { ops.push_back(op); });
    if (kind == "extra-barrier") {
      // At the beginning, and the first warp goes past it.
      OpBuilder b(ops.front());
      Location loc = kernel.getLoc();
      Value thread = NVVM::ThreadIdXOp::create(b, loc, b.getI32Type());
      Value warp = LLVM::ConstantOp::create(b, loc, b.getI32Type(), 32);
      Value others = LLVM::ICmpOp::create(b, loc, LLVM::ICmpPredicate::uge, thread, warp);
      Block *head = ops.front()->getBlock(), *rest = head->splitBlock(ops.front());
      Block *own = b.createBlock(rest);
      NVVM::BarrierOp::create(b, loc);
      LLVM::BrOp::create(b, loc, ValueRange(), rest);
      b.setInsertionPointToEnd(head);
      LLVM::CondBrOp::create(b, loc, others, own, rest);
      done = true;
    }
    for (Operation *op : ops) {
      if (done)
        break;
      auto here = [&] { return !done && seen++ == number && (done = true); };
      OpBuilder b(op);
      if (kind == "drop-barrier" && isa<NVVM::BarrierOp>(op) && here()) {
        op->erase();
      } else if (kind == "drop-mbarrier-wait" && isa<NVVM::MBarrierTryWaitParityOp>(op) && here()) {
        op->erase();
      } else if (kind == "flip-phase" && isa<NVVM::MBarrierTryWaitParityOp>(op) && here()) {
        Value one = LLVM::ConstantOp::create(b, op->getLoc(), b.getI32Type(), 1);
        op->setOperand(1, LLVM::XOrOp::create(b, op->getLoc(), op->getOperand(1), one));
      } else if (kind == "more-bytes" && isa<NVVM::MBarrierArriveExpectTxOp>(op) && here()) {
        Value more = LLVM::ConstantOp::create(b, op->getLoc(), b.getI32Type(), 128);
        op->setOperand(1, LLVM::AddOp::create(b, op->getLoc(), op->getOperand(1), more));
      } else if (kind == "drop-arrive" && isa<NVVM::MBarrierArriveOp>(op) && here()) {
        op->erase();
      } else if (kind == "drop-proxy-fence" && isa<NVVM::FenceProxyOp>(op) && here()) {
        op->erase();
      } else if (kind == "drop-init-fence" && isa<NVVM::FenceMbarrierInitOp>(op) && here()) {
        op->erase();
      } else if (kind == "drop-wgmma-fence" && isa<NVVM::WgmmaFenceAlignedOp>(op) && here()) {
        op->erase();
      } else if (kind == "late-wgmma-wait" && isa<NVVM::WgmmaWaitGroupSyncOp>(op) && here()) {
        auto wait = cast<NVVM::WgmmaWaitGroupSyncOp>(op);
        wait.setGroup(wait.getGroup() + 1);
      } else if (kind == "box-place" && isa<NVVM::CpAsyncBulkTensorGlobalToSharedClusterOp>(op) &&
                 here()) {
        // One row of the panels further.
        Value one = LLVM::ConstantOp::create(b, op->getLoc(), b.getI32Type(), 1);
        op->setOperand(3, LLVM::AddOp::create(b, op->getLoc(), op->getOperand(3), one));
      } else if (kind == "swap-left" && isa<LLVM::InlineAsmOp>(op) && op->getNumOperands() > 8 &&
                 op->getOperand(4).getType().isInteger(64) && here()) {
        Value first = op->getOperand(1);
        op->setOperand(1, op->getOperand(2));
        op->setOperand(2, first);
      } else if (kind == "descriptor" && isa<LLVM::InlineAsmOp>(op) && op->getNumOperands() > 8 &&
                 op->getOperand(4).getType().isInteger(64) && here()) {
        // The swizzle of 64 bytes instead of 128.
        Value other = LLVM::ConstantOp::create(b, op->getLoc(), b.getI64Type(),
                                               b.getI64IntegerAttr(int64_t(uint64_t(3) << 62)));
        op->setOperand(4, LLVM::XOrOp::create(b, op->getLoc(), op->getOperand(4), other));
      } else if (kind == "drop-wait" && isa<NVVM::CpAsyncWaitGroupOp>(op) && here()) {
        op->erase();
      } else if (kind == "late-wait" && isa<NVVM::CpAsyncWaitGroupOp>(op) && here()) {
        auto wait = cast<NVVM::CpAsyncWaitGroupOp>(op);
        wait.setN(wait.getN() + 1);
      } else if (kind == "drop-commit" && isa<NVVM::CpAsyncCommitGroupOp>(op) && here()) {
        op->erase();
      } else if (kind == "transpose" && isa<NVVM::LdMatrixOp>(op) && here()) {
        cast<NVVM::LdMatrixOp>(op).setLayout(NVVM::MMALayout::col);
      } else if (kind == "swizzle" && isa<LLVM::XOrOp>(op) && here()) {
        op->getResult(0).replaceAllUsesWith(op->getOperand(0));
      } else if (kind == "swap-operands" && isa<NVVM::MmaOp>(op) && here()) {
        Value first = op->getOperand(1);
        op->setOperand(1, op->getOperand(2));
        op->setOperand(2, first);
      } else if (kind == "drop-product" && isa<NVVM::MmaOp>(op) && here()) {
        SmallVector<Value> sums;
        for (auto extract : llvm::to_vector(op->getUsers())) {
          auto value = cast<LLVM::ExtractValueOp>(extract);
          value.getResult().replaceAllUsesWith(op->getOperand(6 + value.getPosition()[0]));
        }
      } else if (kind == "no-zero-fill" && isa<NVVM::CpAsyncOp>(op) && here()) {
        op->setOperand(2, LLVM::ConstantOp::create(b, op->getLoc(), b.getI32Type(), 16));
      } else if (kind == "shuffle-far" && isa<NVVM::ShflOp>(op) && here()) {
        op->setOperand(2, LLVM::ConstantOp::create(b, op->getLoc(), b.getI32Type(), 31));
      } else if (kind == "drop-vote" && isa<NVVM::VoteSyncOp>(op) && here()) {
        auto vote = cast<NVVM::VoteSyncOp>(op);
        op->getResult(0).replaceAllUsesWith(
            LLVM::ZExtOp::create(b, op->getLoc(), op->getResult(0).getType(), vote.getPred()));
      } else if (kind == "drop-fence" && isa<LLVM::FenceOp>(op) && here()) {
        op->erase();
      } else if (kind == "more-blocks" && isa<LLVM::AtomicRMWOp>(op) && here()) {
        Value one = LLVM::ConstantOp::create(b, op->getLoc(), b.getI32Type(), 1);
        op->setOperand(1, LLVM::AddOp::create(b, op->getLoc(), op->getOperand(1), one));
      } else if (kind == "fewer-blocks" && isa<LLVM::AtomicRMWOp>(op) && here()) {
        Value one = LLVM::ConstantOp::create(b, op->getLoc(), b.getI32Type(), 1);
        op->setOperand(1, LLVM::SubOp::create(b, op->getLoc(), op->getOperand(1), one));
      } else if (kind == "drop-store" && isa<LLVM::StoreOp>(op) && here()) {
        op->erase();
      } else if (kind == "flip-compare" && isa<LLVM::ICmpOp>(op) && here()) {
        auto compare = cast<LLVM::ICmpOp>(op);
        if (compare.getPredicate() == LLVM::ICmpPredicate::slt)
          compare.setPredicate(LLVM::ICmpPredicate::sle);
        else if (compare.getPredicate() == LLVM::ICmpPredicate::ult)
          compare.setPredicate(LLVM::ICmpPredicate::ule);
        else if (compare.getPredicate() == LLVM::ICmpPredicate::ugt)
          compare.setPredicate(LLVM::ICmpPredicate::uge);
        else
          compare.setPredicate(LLVM::ICmpPredicate::ne);
      }
    }
  });
  if (!done)
    die("expected a place for --mutate " + mutation + ", but got " + Twine(seen) + " candidates");
}

//===----------------------------------------------------------------------===//
// Running
//===----------------------------------------------------------------------===//

/// What the kernels' names begin with.
static std::string prefix;

template <typename Fn> static Fn *find(SimtCode &code, const std::string &name) {
  auto symbol = code.find(name);
  if (!symbol)
    die("expected symbol " + name + ", but got: " + llvm::toString(symbol.takeError()));
  return reinterpret_cast<Fn *>(*symbol);
}

namespace {
struct Run {
  SimtCode *code;
  simt::Machine *machine;
};
} // namespace

static void launchKernel(void *self, const moec_gpu_launch *launch) {
  auto *run = static_cast<Run *>(self);
  auto *kernel = find<void(void *const *)>(*run->code, prefix + launch->name + "_simt");
  run->machine->launch(kernel, *launch);
}

static void makeMap(void *, const moec_gpu_map *view, void *map) {
  std::string error = simt::encodeTensorMap(*view, map);
  if (!error.empty())
    die(error);
}

/// Rows with padding between them, at an address that is misaligned on purpose.
struct Rows {
  std::vector<uint8_t> bytes;
  size_t begin, rowBytes, stride, count;
  Rows(size_t count, size_t width, size_t element)
      : begin(shift * element), rowBytes(width * element), stride((width + padding) * element),
        count(count) {
    bytes.assign(begin + count * stride + 64, 0xff);
    begin += (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
    if (begin + count * stride > bytes.size())
      die("rows do not fit");
  }
  uint8_t *data() { return bytes.data() + begin; }
  void fill(const std::vector<uint8_t> &compact) {
    for (size_t i = 0; i < count; ++i)
      std::memcpy(data() + i * stride, compact.data() + i * rowBytes, rowBytes);
  }
  std::vector<uint8_t> compact() {
    std::vector<uint8_t> result(count * rowBytes);
    for (size_t i = 0; i < count; ++i)
      std::memcpy(result.data() + i * rowBytes, data() + i * stride, rowBytes);
    return result;
  }
  size_t span() const { return count ? (count - 1) * stride + rowBytes : 0; }
};

static int runCase(SimtCode &code, const Signature &signature, bool given, StringRef text) {
  SmallVector<StringRef> parts;
  text.split(parts, ':');
  int64_t T = 0, k = 0;
  if (parts.size() != 3 || parts[1].getAsInteger(10, T) || parts[2].getAsInteger(10, k))
    die("expected DIR:TOKENS:SLOTS, but got " + text);
  std::string dir = parts[0].str() + "/";
  simt::Options options;
  StringRef order = orderName;
  options.earlyCopies = earlyCopies;
  if (gpuName == "sm_90a")
    options.maxShared = 232448;
  if (order == "reverse")
    options.order = simt::Order::Reverse;
  else if (order.consume_front("shuffled:") && !order.getAsInteger(10, options.seed))
    options.order = simt::Order::Shuffled;
  else if (order != "forward")
    die("expected an order, but got " + order);
  simt::Machine machine(options);

  auto has = [&](const char *name) { return signature.buffers.count(name) != 0; };
  moec_frame frame = {};
  frame.tokens = T;
  frame.slots = k;
  frame.lanes = 1;
  frame.accumulate = accumulate;
  frame.routed_only = routedOnly;
  int64_t H = signature.dim("x", 1), E = 0;
  Rows x(T, H, signature.bytes("x"));
  x.fill(readFile<uint8_t>(dir + "x.bin", T * x.rowBytes));
  frame.x = x.data();
  frame.x_stride = H + padding;
  machine.addRegion(x.data(), x.span(), "x", true, true);
  std::unique_ptr<Rows> y, routerX;
  if (has("router_x")) {
    routerX = std::make_unique<Rows>(T, H, signature.bytes("router_x"));
    routerX->fill(readFile<uint8_t>(dir + "router_x.bin", T * routerX->rowBytes));
    frame.router_x = routerX->data();
    frame.router_x_stride = H + padding;
    machine.addRegion(routerX->data(), routerX->span(), "router_x", true, true);
  }
  if (has("y")) {
    y = std::make_unique<Rows>(T, H, signature.bytes("y"));
    if (accumulate)
      y->fill(readFile<uint8_t>(dir + "y.bin", T * y->rowBytes));
    frame.y = y->data();
    frame.y_stride = H + padding;
    machine.addRegion(y->data(), y->span(), "y", accumulate, false);
  }
  std::vector<std::vector<uint8_t>> packed;
  std::vector<const void *> pointers(
      signature.weights.empty() ? 0 : signature.weights.rbegin()->first + 1);
  for (auto [index, type] : signature.weights) {
    size_t part = type.getRows() * type.getCols();
    auto data = readFile<float>(dir + "w" + std::to_string(index) + ".bin",
                                type.getExperts() * type.getParts() * part);
    int32_t dtype = type.getFormat().getStorageType().isF32() ? MOEC_DT_F32 : MOEC_DT_BF16;
    int32_t layout = type.isVector() ? MOEC_VECTOR32 : MOEC_PANEL32;
    uint64_t expertBytes =
        moec_pack_expert_bytes(layout, dtype, type.getParts(), type.getRows(), type.getCols());
    std::vector<uint8_t> bytes(type.getExperts() * expertBytes + 4096);
    uint8_t *base = bytes.data() + (4096 - reinterpret_cast<uintptr_t>(bytes.data()) % 4096) % 4096;
    for (int64_t e = 0; e < type.getExperts(); ++e)
      for (int64_t p = 0; p < type.getParts(); ++p) {
        moec_pack_source source = {data.data() + (e * type.getParts() + p) * part, MOEC_DT_F32,
                                   type.getCols(), 1};
        if (moec_pack(layout, base + e * expertBytes, dtype, type.getParts(), p, type.getRows(),
                      type.getCols(), 0, type.getRows(), &source) >= 0)
          die("expected finite weights");
      }
    pointers[index] = base;
    machine.addRegion(base, type.getExperts() * expertBytes, "weight " + std::to_string(index),
                      true, true);
    E = std::max(E, signature.dense ? 1 : type.getExperts());
    packed.push_back(std::move(bytes));
  }
  frame.weights = pointers.data();
  if (has("logits"))
    E = signature.dim("logits", 1);
  std::vector<int32_t> experts(T * k, -2), offsets(E + 1, -1);
  std::vector<float> weights(T * k, NAN), logits;
  if (given) {
    experts = readFile<int32_t>(dir + "experts.bin", T * k);
    weights = readFile<float>(dir + "weights.bin", T * k);
  }
  machine.addRegion(experts.data(), experts.size() * 4, "experts", given, given);
  machine.addRegion(weights.data(), weights.size() * 4, "weights", given, given);
  machine.addRegion(offsets.data(), offsets.size() * 4, "offsets", false, false);
  frame.experts = experts.data();
  frame.expert_weights = weights.data();
  frame.offsets = offsets.data();
  if (has("logits")) {
    logits.assign(T * (E + 3), NAN);
    frame.logits = logits.data();
    frame.logits_stride = E + 3;
    machine.addRegion(logits.data(), logits.size() * 4, "logits", false, false);
  }
  auto *bytesOf = find<uint64_t(int64_t, int64_t, int64_t)>(
      code, functionName + std::string("_workspace_bytes"));
  uint64_t workspaceBytes = bytesOf(T, k, 1);
  std::vector<uint8_t> workspace(workspaceBytes + 256, 0xff);
  uint8_t *base =
      workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256) % 256;
  frame.workspace = base;
  machine.addRegion(base, workspaceBytes, "workspace", false, false);

  Run run{&code, &machine};
  moec_gpu_launcher launcher{&run, launchKernel, makeMap};
  frame.launcher = &launcher;
  uint32_t ticket = UINT32_MAX;
  frame.ticket = &ticket;
  machine.addRegion(&ticket, sizeof ticket, "ticket", true, false);
  find<void(moec_frame *, int32_t, int32_t)>(code, functionName + std::string("_stage0"))(&frame, 0,
                                                                                          1);
  if (!machine.error().empty()) {
    llvm::errs() << machine.error() << "\n";
    return 1;
  }
  if (y)
    writeFile(dir + "y.out", y->compact().data(), T * y->rowBytes);
  writeFile(dir + "experts.out", experts.data(), experts.size() * 4);
  writeFile(dir + "weights.out", weights.data(), weights.size() * 4);
  writeFile(dir + "offsets.out", offsets.data(), offsets.size() * 4);
  if (has("logits"))
    for (int64_t t = 0; t < T; ++t)
      std::memmove(&logits[t * E], &logits[t * (E + 3)], E * 4);
  writeFile(dir + "logits.out", logits.data(), has("logits") ? T * E * 4 : 0);
  const simt::Statistics &s = machine.statistics();
  llvm::outs() << text << " launches " << s.launches << " blocks " << s.blocks << " barriers "
               << s.barriers << " collectives " << s.collectives << " copies " << s.copies
               << " products " << s.products << " boxes " << s.boxes << " wgmmas " << s.wgmmas
               << "\n";
  return 0;
}

int main(int argc, char **argv) {
  llvm::InitLLVM init(argc, argv);
  cl::ParseCommandLineOptions(argc, argv, "run a layer's GPU code without a GPU\n");
  DialectRegistry registry;
  moe::registerAllDialects(registry);
  moe::registerAllPasses();
  MLIRContext context(registry);
  OwningOpRef<ModuleOp> module = parseSourceFile<ModuleOp>(input, &context);
  if (!module)
    die("expected IR that can be read in " + input);
  for (Operation &op : llvm::make_early_inc_range(*module->getBody())) {
    auto func = dyn_cast<func::FuncOp>(op);
    if (!func || func.getSymName() != functionName)
      op.erase();
  }
  auto func = module->lookupSymbol<func::FuncOp>(functionName);
  if (!func)
    die("expected function " + functionName + ", but got none");
  bool given = func->getAttrOfType<StringAttr>(MoEDialect::kEntryAttrName).getValue() == "experts";
  runPipeline(*module,
              "canonicalize,cse,func.func(moe-decompose-experts),canonicalize,cse,"
              "func.func(moe-fuse-router-dispatch),func.func(moe-fuse-gather),"
              "func.func(moe-fuse-activation),func.func(moe-fuse-combine),canonicalize,cse,"
              "moe-gpu-attach-target{levels=" +
                  gpuName + "}");
  if (!tiles.empty()) {
    Attribute attr = parseAttribute(tiles, &context);
    if (!attr)
      die("expected --tiles to be an attribute");
    func.walk([&](GroupedMatmulOp op) { op->setAttr("gpu_tiles", attr); });
  }
  if (atomic)
    func.walk([&](GroupedMatmulOp op) {
      if (op.getCombinePair())
        op->setAttr("gpu_combine", StringAttr::get(&context, "atomic"));
    });
  runPipeline(*module, "moe-gpu-select-strategy,moe-bufferize,canonicalize,cse");
  Signature signature = readSignature(module->lookupSymbol<func::FuncOp>(functionName));
  runPipeline(*module, "moe-gpu-emit-kernels,moe-gpu-lower-host,"
                       "moe-gpu-lower-kernels");
  mutate(*module);
  runPipeline(*module, "moe-gpu-to-simt,convert-scf-to-cf,convert-to-llvm,"
                       "reconcile-unrealized-casts");
  auto code = compileForSimt(*module);
  if (!code)
    die(llvm::toString(code.takeError()));
  prefix = functionName + "_kernels_";
  for (const std::string &text : cases)
    if (int status = runCase(*code, signature, given, text))
      return status;
  return 0;
}
