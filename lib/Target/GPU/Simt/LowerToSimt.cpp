//===- LowerToSimt.cpp - kernels as functions for the executor ------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "../Kernels/WgmmaAsm.h"
#include "moe/Target/GPU/Passes.h"

#include "mlir/Dialect/GPU/IR/GPUDialect.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/SymbolTable.h"
#include "llvm/ADT/TypeSwitch.h"

namespace mlir::moe {
#define GEN_PASS_DEF_MOEGPUTOSIMT
#include "moe/Target/GPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

namespace {

/// Words through which values pass that do not fit a register: the sums of wgmma and its operand.
constexpr int64_t kScratchWords = 128 + 4;

/// Rewrites one kernel.
class KernelRewriter {
public:
  KernelRewriter(LLVM::LLVMFuncOp kernel, ModuleOp module)
      : kernel(kernel), module(module), b(kernel), loc(kernel.getLoc()) {}
  LogicalResult run();

private:
  Type i1() { return b.getI1Type(); }
  Type i32() { return b.getI32Type(); }
  Type i64() { return b.getI64Type(); }
  Type ptr() { return LLVM::LLVMPointerType::get(b.getContext()); }
  Type none() { return LLVM::LLVMVoidType::get(b.getContext()); }
  Value c32(int64_t v) { return LLVM::ConstantOp::create(b, loc, i32(), v); }
  Value site(Operation *op);
  /// A call of the executor; the result where there is one.
  Value call(StringRef name, Type result, ValueRange args);
  Value address(Value pointer) { return LLVM::PtrToIntOp::create(b, loc, i64(), pointer); }
  Value word(int64_t i) {
    return LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), scratch,
                               ArrayRef<LLVM::GEPArg>{int32_t(i * 4)});
  }
  void access(Operation *op, Value pointer, Type type, std::optional<uint64_t> align, bool writes,
              bool atomic = false);
  /// Replaces `op`, whose result is a struct of words (or one), by the words of the scratch.
  void replaceWithScratch(Operation *op, int64_t first);
  LogicalResult rewrite(Operation *op);
  LogicalResult rewriteWgmma(NVVM::WgmmaMmaAsyncOp op);
  LogicalResult rewriteAssembly(LLVM::InlineAsmOp op);
  LogicalResult rewriteBox(NVVM::CpAsyncBulkTensorGlobalToSharedClusterOp op);
  LogicalResult refuse(Operation *op, const char *expected) {
    return op->emitOpError("expected ") << expected
                                        << ", but got another, which the executor does "
                                           "not know";
  }
  /// Whether there is a predicate, a result or a scope that the executor does not know.
  template <typename Op> bool plain(Op op) {
    return op.getScope() == NVVM::MemScopeKind::CTA && !op->getNumResults();
  }
  template <typename Op> bool unpredicated(Op op) { return !op.getPredicate(); }

  LLVM::LLVMFuncOp kernel;
  ModuleOp module;
  OpBuilder b;
  Location loc;
  Value scratch;
  llvm::StringMap<int> numbers;
};

} // namespace

/// "up_0: nvvm.barrier #3", as the address of a string.
Value KernelRewriter::site(Operation *op) {
  StringRef name = op->getName().getStringRef();
  std::string text = (kernel.getSymName() + ": " + name + " #" + Twine(numbers[name]++)).str();
  std::string symbol = "moe_simt_site_" + text;
  OpBuilder::InsertionGuard guard(b);
  b.setInsertionPointToStart(module.getBody());
  text.push_back('\0');
  auto global = LLVM::GlobalOp::create(b, loc, LLVM::LLVMArrayType::get(b.getI8Type(), text.size()),
                                       /*isConstant=*/true, LLVM::Linkage::Internal, symbol,
                                       b.getStringAttr(text));
  b.setInsertionPoint(op);
  return LLVM::AddressOfOp::create(b, loc, global);
}

Value KernelRewriter::call(StringRef name, Type result, ValueRange args) {
  auto function = module.lookupSymbol<LLVM::LLVMFuncOp>(name);
  if (!function) {
    OpBuilder::InsertionGuard guard(b);
    b.setInsertionPointToStart(module.getBody());
    function = LLVM::LLVMFuncOp::create(
        b, loc, name, LLVM::LLVMFunctionType::get(result, llvm::to_vector(args.getTypes())));
  }
  auto call = LLVM::CallOp::create(b, loc, function, args);
  return isa<LLVM::LLVMVoidType>(result) ? Value() : call.getResult();
}

static unsigned bytesOf(Type type) {
  if (auto vector = dyn_cast<VectorType>(type))
    return vector.getNumElements() * bytesOf(vector.getElementType());
  return type.getIntOrFloatBitWidth() / 8;
}

void KernelRewriter::access(Operation *op, Value pointer, Type type, std::optional<uint64_t> align,
                            bool writes, bool atomic) {
  unsigned space = cast<LLVM::LLVMPointerType>(pointer.getType()).getAddressSpace();
  if (space != 1 && space != 3)
    return;
  call("moe_simt_access", none(),
       {site(op), address(pointer), c32(bytesOf(type)), c32(align.value_or(bytesOf(type))),
        c32(space), c32(writes), c32(atomic)});
}

void KernelRewriter::replaceWithScratch(Operation *op, int64_t first) {
  Type type = op->getResult(0).getType();
  Value result;
  if (auto fields = dyn_cast<LLVM::LLVMStructType>(type)) {
    result = LLVM::UndefOp::create(b, loc, type);
    for (auto [i, field] : llvm::enumerate(fields.getBody())) {
      Value v = LLVM::LoadOp::create(b, loc, field, word(first + i));
      result = LLVM::InsertValueOp::create(b, loc, result, v, ArrayRef<int64_t>{int64_t(i)});
    }
  } else {
    result = LLVM::LoadOp::create(b, loc, type, word(first));
  }
  op->getResult(0).replaceAllUsesWith(result);
  op->erase();
}

LogicalResult KernelRewriter::rewriteWgmma(NVVM::WgmmaMmaAsyncOp op) {
  auto shape = op.getShape();
  auto sums = cast<LLVM::LLVMStructType>(op.getInouts().getType());
  if (shape.getM() != 64 || shape.getK() != 16 || op.getTypeA() != NVVM::WGMMATypes::bf16 ||
      op.getTypeB() != NVVM::WGMMATypes::bf16 || op.getTypeD() != NVVM::WGMMATypes::f32 ||
      op.getScaleA() != NVVM::WGMMAScaleIn::one || op.getScaleB() != NVVM::WGMMAScaleIn::one ||
      int64_t(sums.getBody().size()) * 2 != shape.getN())
    return refuse(op, "wgmma m64nNk16 of bf16 to f32");
  for (int64_t i = 0; i < shape.getN() / 2; ++i)
    LLVM::StoreOp::create(
        b, loc, LLVM::ExtractValueOp::create(b, loc, op.getInouts(), ArrayRef<int64_t>{i}),
        word(i));
  int32_t flags = (op.getLayoutA() == NVVM::MMALayout::col ? 2 : 0) |
                  (op.getLayoutB() == NVVM::MMALayout::row ? 4 : 0) |
                  (op.getScaleD() == NVVM::WGMMAScaleOut::zero ? 8 : 0);
  call(
      "moe_simt_wgmma", none(),
      {site(op), c32(flags), c32(shape.getN()), op.getDescriptorA(), op.getDescriptorB(), scratch});
  replaceWithScratch(op, 0);
  return success();
}

LogicalResult KernelRewriter::rewriteAssembly(LLVM::InlineAsmOp op) {
  if (int64_t n = wgmmaColumns(op)) {
    // 4 words of A, the descriptor, the sums.
    for (int64_t i = 0; i < n / 2; ++i)
      LLVM::StoreOp::create(b, loc, op->getOperand(5 + i), word(i));
    for (int64_t i = 0; i < 4; ++i)
      LLVM::StoreOp::create(b, loc, op->getOperand(i), word(n / 2 + i));
    Value zero = LLVM::ConstantOp::create(b, loc, i64(), 0);
    call("moe_simt_wgmma", none(), {site(op), c32(1), c32(n), zero, op->getOperand(4), scratch});
    replaceWithScratch(op, 0);
    return success();
  }
  if (!isReadSums(op))
    return refuse(op, "wgmma as assembly");
  int64_t count = op->getNumOperands();
  for (int64_t i = 0; i < count; ++i)
    LLVM::StoreOp::create(b, loc, op->getOperand(i), word(i));
  call("moe_simt_wgmma_read", none(), {site(op), c32(count), scratch});
  replaceWithScratch(op, 0);
  return success();
}

LogicalResult KernelRewriter::rewriteBox(NVVM::CpAsyncBulkTensorGlobalToSharedClusterOp op) {
  if (op.getMode() != NVVM::TMALoadMode::TILE || op.getMulticastMask() || op.getPredicate() ||
      op.getGroup() || !op.getIm2colOffsets().empty())
    return refuse(op, "a tiled box of this block");
  for (auto [i, coordinate] : llvm::enumerate(op.getCoordinates()))
    LLVM::StoreOp::create(b, loc, coordinate, word(i));
  call("moe_simt_box", none(),
       {site(op), address(op.getDstMem()), op.getTmaDescriptor(),
        c32(int64_t(op.getCoordinates().size())), scratch, address(op.getMbar())});
  op->erase();
  return success();
}

LogicalResult KernelRewriter::rewrite(Operation *op) {
  b.setInsertionPoint(op);
  auto replace = [&](Value v) {
    op->getResult(0).replaceAllUsesWith(v);
    op->erase();
    return success();
  };
  auto erase = [&] {
    op->erase();
    return success();
  };
  auto bits = [&](Value v) -> Value {
    return v.getType().isInteger(32) ? v : LLVM::BitcastOp::create(b, loc, i32(), v).getResult();
  };
  auto unbits = [&](Value v, Type type) -> Value {
    return v.getType() == type ? v : LLVM::BitcastOp::create(b, loc, type, v).getResult();
  };
  auto reg = [&](int32_t which) { return replace(call("moe_simt_register", i32(), {c32(which)})); };
  return llvm::TypeSwitch<Operation *, LogicalResult>(op)
      .Case([&](LLVM::LoadOp load) {
        access(op, load.getAddr(), load.getType(), load.getAlignment(), false);
        return success();
      })
      .Case([&](LLVM::StoreOp store) {
        access(op, store.getAddr(), store.getValue().getType(), store.getAlignment(), true);
        return success();
      })
      .Case([&](LLVM::AtomicRMWOp atomic) {
        if (cast<LLVM::LLVMPointerType>(atomic.getPtr().getType()).getAddressSpace() != 1)
          return LogicalResult(
              op->emitOpError("expected atomics in global memory, but got another"));
        // LLVM makes relaxed ones of all others.
        if (atomic.getOrdering() != LLVM::AtomicOrdering::monotonic)
          return refuse(op, "a monotonic atomic beside fences");
        access(op, atomic.getPtr(), atomic.getVal().getType(), std::nullopt, true, true);
        return success();
      })
      .Case([&](LLVM::FenceOp fence) {
        if (fence.getSyncscope() != "device" ||
            fence.getOrdering() != LLVM::AtomicOrdering::acq_rel)
          return refuse(op, "a fence of the device that acquires and releases");
        call("moe_simt_fence_device", none(), {});
        return erase();
      })
      .Case([&](LLVM::FPTruncOp trunc) {
        // The host has no instruction for this everywhere, and its library another rounding of NaN.
        if (!trunc.getType().isBF16())
          return success();
        Value half = call("moe_simt_round_bf16", b.getI16Type(), {trunc.getArg()});
        return replace(LLVM::BitcastOp::create(b, loc, trunc.getType(), half));
      })
      .Case([&](LLVM::AddressOfOp addressOf) {
        // The only global of a kernel is its dynamic shared memory.
        Value base = call("moe_simt_shared", ptr(), {});
        return replace(LLVM::AddrSpaceCastOp::create(b, loc, addressOf.getType(), base));
      })
      .Case([&](NVVM::ThreadIdXOp) { return reg(0); })
      .Case([&](NVVM::BlockIdXOp) { return reg(1); })
      .Case([&](NVVM::BlockIdYOp) { return reg(2); })
      .Case([&](NVVM::GridDimXOp) { return reg(3); })
      .Case([&](NVVM::BarrierOp barrier) {
        if (barrier.getReductionOp() || barrier->getNumResults())
          return refuse(op, "a barrier without a reduction");
        Value number = barrier.getBarrierId(), count = barrier.getNumberOfThreads();
        call("moe_simt_barrier", none(),
             {site(op), number ? number : c32(0), count ? count : c32(0), c32(1)});
        return erase();
      })
      .Case([&](NVVM::BarrierArriveOp barrier) {
        Value number = barrier.getBarrierId();
        call("moe_simt_barrier", none(),
             {site(op), number ? number : c32(0), barrier.getNumberOfThreads(), c32(0)});
        return erase();
      })
      .Case([&](NVVM::ElectSyncOp elect) {
        Value mask = elect.getMembermask() ? elect.getMembermask() : c32(-1);
        Value v = call("moe_simt_elect", i32(), {site(op), mask});
        return replace(LLVM::TruncOp::create(b, loc, i1(), v));
      })
      .Case([&](NVVM::SetMaxRegisterOp set) {
        auto atLaunch = kernel->getAttrOfType<IntegerAttr>(NVVM::NVVMDialect::getMaxnregAttrName());
        if (!atLaunch)
          return LogicalResult(
              op->emitOpError("expected a kernel with nvvm.maxnreg, but got none"));
        call("moe_simt_registers", none(),
             {site(op), c32(set.getRegCount()),
              c32(set.getAction() == NVVM::SetMaxRegisterAction::increase),
              c32(atLaunch.getInt())});
        return erase();
      })
      .Case([&](NVVM::MBarrierInitOp init) {
        if (!unpredicated(init))
          return refuse(op, "an mbarrier.init without predicate");
        call("moe_simt_mbarrier_init", none(),
             {site(op), address(init.getAddr()), init.getCount()});
        return erase();
      })
      .Case([&](NVVM::MBarrierArriveOp arrive) {
        if (!plain(arrive) || arrive.getRelaxed())
          return refuse(op, "an arrival of this block without a result");
        Value count = arrive.getCount() ? arrive.getCount() : c32(1);
        call("moe_simt_mbarrier_arrive", none(),
             {site(op), address(arrive.getAddr()), count, c32(0)});
        return erase();
      })
      .Case([&](NVVM::MBarrierArriveExpectTxOp arrive) {
        if (!plain(arrive) || arrive.getRelaxed() || !unpredicated(arrive))
          return refuse(op, "an arrival of this block without a result");
        call("moe_simt_mbarrier_arrive", none(),
             {site(op), address(arrive.getAddr()), c32(1), arrive.getTxcount()});
        return erase();
      })
      .Case([&](NVVM::MBarrierExpectTxOp expect) {
        if (expect.getScope() != NVVM::MemScopeKind::CTA)
          return refuse(op, "expect_tx in this block");
        call("moe_simt_mbarrier_expect", none(),
             {site(op), address(expect.getAddr()), expect.getTxcount()});
        return erase();
      })
      .Case([&](NVVM::MBarrierTryWaitParityOp wait) {
        call("moe_simt_mbarrier_wait", none(),
             {site(op), address(wait.getAddr()), wait.getPhase()});
        return erase();
      })
      .Case([&](NVVM::CpAsyncMBarrierArriveOp arrive) {
        call("moe_simt_copy_arrive", none(),
             {site(op), address(arrive.getAddr()), c32(!arrive.getNoinc())});
        return erase();
      })
      .Case([&](NVVM::CpAsyncBulkTensorGlobalToSharedClusterOp box) { return rewriteBox(box); })
      .Case([&](NVVM::FenceMbarrierInitOp) {
        call("moe_simt_fence_proxy", none(), {});
        return erase();
      })
      .Case([&](NVVM::FenceProxyOp fence) {
        if (fence.getKind() != NVVM::ProxyKind::async &&
            fence.getKind() != NVVM::ProxyKind::async_shared)
          return refuse(op, "a fence to the asynchronous proxy");
        call("moe_simt_fence_proxy", none(), {});
        return erase();
      })
      .Case([&](NVVM::WgmmaFenceAlignedOp) {
        call("moe_simt_wgmma_fence", none(), {site(op)});
        return erase();
      })
      .Case([&](NVVM::WgmmaGroupSyncAlignedOp) {
        call("moe_simt_wgmma_commit", none(), {site(op)});
        return erase();
      })
      .Case([&](NVVM::WgmmaWaitGroupSyncOp wait) {
        call("moe_simt_wgmma_wait", none(), {site(op), c32(wait.getGroup())});
        return erase();
      })
      .Case([&](NVVM::WgmmaMmaAsyncOp wgmma) { return rewriteWgmma(wgmma); })
      .Case([&](LLVM::InlineAsmOp assembly) { return rewriteAssembly(assembly); })
      .Case([&](NVVM::SyncWarpOp sync) {
        call("moe_simt_syncwarp", none(), {site(op), sync.getMask()});
        op->erase();
        return success();
      })
      .Case([&](NVVM::ShflOp shuffle) {
        Value v = call("moe_simt_shuffle", i32(),
                       {site(op), c32(int32_t(shuffle.getKind())), shuffle.getThreadMask(),
                        bits(shuffle.getVal()), shuffle.getOffset(), shuffle.getMaskAndClamp()});
        return replace(unbits(v, shuffle.getType()));
      })
      .Case([&](NVVM::VoteSyncOp vote) {
        Value predicate = LLVM::ZExtOp::create(b, loc, i32(), vote.getPred());
        Value v = call("moe_simt_vote", i32(),
                       {site(op), c32(int32_t(vote.getKind())), vote.getMask(), predicate});
        if (vote.getType().isInteger(1))
          v = LLVM::TruncOp::create(b, loc, i1(), v);
        return replace(v);
      })
      .Case([&](NVVM::ReduxOp redux) {
        if (!redux.getType().isInteger(32))
          return LogicalResult(op->emitOpError("expected redux of i32, but got another type"));
        return replace(call(
            "moe_simt_redux", i32(),
            {site(op), c32(int32_t(redux.getKind())), redux.getMaskAndClamp(), redux.getVal()}));
      })
      .Case([&](NVVM::MatchSyncOp match) {
        if (match.getKind() != NVVM::MatchSyncKind::any || !match.getVal().getType().isInteger(32))
          return LogicalResult(op->emitOpError("expected match.any of i32, but got another"));
        return replace(
            call("moe_simt_match", i32(), {site(op), match.getThreadMask(), match.getVal()}));
      })
      .Case([&](NVVM::LdMatrixOp matrix) {
        if (matrix.getEltType() != NVVM::LdStMatrixEltType::B16)
          return LogicalResult(op->emitOpError("expected ldmatrix of b16, but got another"));
        call("moe_simt_ldmatrix", none(),
             {site(op), c32(matrix.getNum()), c32(matrix.getLayout() == NVVM::MMALayout::col),
              address(matrix.getPtr()), scratch});
        replaceWithScratch(op, 0);
        return success();
      })
      .Case([&](NVVM::MmaOp mma) {
        auto shape = mma.getShape();
        if (shape.getM() != 16 || shape.getN() != 8 || shape.getK() != 16 ||
            mma.getMultiplicandAPtxType() != NVVM::MMATypes::bf16 ||
            mma.getMultiplicandBPtxType() != NVVM::MMATypes::bf16 ||
            mma.getLayoutA() != NVVM::MMALayout::row || mma.getLayoutB() != NVVM::MMALayout::col ||
            mma->getNumOperands() != 10)
          return LogicalResult(op->emitOpError("expected mma.sync m16n8k16 of bf16, but got "
                                               "another, which the executor does not know"));
        for (auto [i, operand] : llvm::enumerate(mma->getOperands()))
          LLVM::StoreOp::create(b, loc, operand, word(i));
        call("moe_simt_mma", none(), {site(op), scratch});
        replaceWithScratch(op, 6);
        return success();
      })
      .Case([&](NVVM::CpAsyncOp copy) {
        Value bytes = copy.getCpSize() ? copy.getCpSize() : c32(copy.getSize());
        call(
            "moe_simt_copy", none(),
            {site(op), address(copy.getDst()), address(copy.getSrc()), c32(copy.getSize()), bytes});
        op->erase();
        return success();
      })
      .Case([&](NVVM::CpAsyncCommitGroupOp) {
        call("moe_simt_commit", none(), {});
        op->erase();
        return success();
      })
      .Case([&](NVVM::CpAsyncWaitGroupOp wait) {
        call("moe_simt_wait", none(), {c32(wait.getN())});
        op->erase();
        return success();
      })
      .Default([&](Operation *) {
        if (isa<NVVM::NVVMDialect>(op->getDialect()))
          return LogicalResult(op->emitOpError("expected an operation that the executor knows, but "
                                               "got one that it does not"));
        if (!isa<LLVM::LLVMDialect>(op->getDialect()))
          return LogicalResult(
              op->emitOpError("expected the LLVM dialect; run moe-gpu-lower-kernels"));
        return success();
      });
}

LogicalResult KernelRewriter::run() {
  b.setInsertionPointToStart(&kernel.getBody().front());
  scratch = LLVM::AllocaOp::create(b, loc, ptr(), i32(), c32(kScratchWords), /*alignment=*/16);
  SmallVector<Operation *> ops;
  kernel.getBody().walk([&](Operation *op) { ops.push_back(op); });
  for (Operation *op : ops)
    if (op != scratch.getDefiningOp() && failed(rewrite(op)))
      return failure();
  // <kernel>_simt: the arguments from their addresses.
  b.setInsertionPointAfter(kernel);
  auto entry = LLVM::LLVMFuncOp::create(b, loc, (kernel.getSymName() + "_simt").str(),
                                        LLVM::LLVMFunctionType::get(none(), {ptr()}));
  Block *block = entry.addEntryBlock(b);
  b.setInsertionPointToStart(block);
  SmallVector<Value> args;
  for (auto [i, type] : llvm::enumerate(kernel.getArgumentTypes())) {
    Value place = LLVM::GEPOp::create(b, loc, ptr(), b.getI8Type(), block->getArgument(0),
                                      ArrayRef<LLVM::GEPArg>{int32_t(i * 8)});
    place = LLVM::LoadOp::create(b, loc, ptr(), place);
    // An argument that is memory (a tensor map) is where its value is.
    if (kernel.getArgAttr(i, LLVM::LLVMDialect::getByValAttrName()))
      args.push_back(place);
    else
      args.push_back(LLVM::LoadOp::create(b, loc, type, place));
  }
  for (unsigned i = 0; i < kernel.getNumArguments(); ++i)
    kernel.setArgAttrs(i, ArrayRef<NamedAttribute>());
  LLVM::CallOp::create(b, loc, kernel, args);
  LLVM::ReturnOp::create(b, loc, ValueRange());
  return success();
}

namespace {
struct ToSimtPass : public mlir::moe::impl::MoEGPUToSimtBase<ToSimtPass> {
  void runOnOperation() override {
    ModuleOp module = getOperation();
    for (auto kernels : llvm::to_vector(module.getOps<gpu::GPUModuleOp>())) {
      StringRef name = kernels.getName();
      for (auto kernel : llvm::to_vector(kernels.getOps<LLVM::LLVMFuncOp>())) {
        kernel->remove();
        module.push_back(kernel);
        kernel.setSymName((name + "_" + kernel.getSymName()).str());
        if (failed(KernelRewriter(kernel, module).run()))
          return signalPassFailure();
        // Nothing of the device is left on it.
        for (NamedAttribute attr : llvm::to_vector(kernel->getDiscardableAttrs()))
          kernel->removeDiscardableAttr(attr.getName());
      }
      kernels.erase();
    }
    module->removeAttr(gpu::GPUDialect::getContainerModuleAttrName());
  }
};
} // namespace
