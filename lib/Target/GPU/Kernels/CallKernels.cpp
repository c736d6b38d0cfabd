//===- CallKernels.cpp - between the tensors of a call and the layer ------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The runtime launches these by name; lib/Runtime/CudaRun.c passes the arguments listed here.
//
//===----------------------------------------------------------------------===//

#include "GPUBuilder.h"
#include "Kernels.h"

#include "mlir/Dialect/LLVMIR/NVVMDialect.h"
#include "moe/Target/GPU/Passes.h"
#include "moec/module.h"

using namespace mlir;
using namespace mlir::moe;

static constexpr int64_t kThreads = 256;

LLVM::LLVMFuncOp mlir::moe::createKernel(OpBuilder &b, Location loc, StringRef name,
                                         ArrayRef<Type> types, int64_t threads,
                                         int64_t sharedBytes) {
  auto type = LLVM::LLVMFunctionType::get(LLVM::LLVMVoidType::get(b.getContext()), types);
  auto kernel = LLVM::LLVMFuncOp::create(b, loc, name, type);
  kernel->setAttr(gpu::GPUDialect::getKernelFuncAttrName(), b.getUnitAttr());
  kernel->setAttr(NVVM::NVVMDialect::getKernelFuncAttrName(), b.getUnitAttr());
  // Exactly this block size, so that ptxas knows how many registers there are.
  kernel->setAttr(NVVM::NVVMDialect::getReqntidAttrName(),
                  b.getDenseI32ArrayAttr({int32_t(threads), 1, 1}));
  kernel->setAttr(kSharedBytesAttrName, b.getI64IntegerAttr(sharedBytes));
  return kernel;
}

void mlir::moe::declareShared(gpu::GPUModuleOp kernels) {
  OpBuilder b = OpBuilder::atBlockBegin(kernels.getBody());
  // Public, without a value, and the only one: anything else becomes a variable of one byte that
  // overlaps others.
  LLVM::GlobalOp::create(b, kernels.getLoc(), LLVM::LLVMArrayType::get(b.getI8Type(), 0),
                         /*isConstant=*/false, LLVM::Linkage::External, kSharedName, Attribute(),
                         /*alignment=*/1024, /*addrSpace=*/3);
}

/// f16 bits as f32: exact, NaN stays NaN.
static Value widenF16(GPUBuilder &g, Value bits) {
  Value half = LLVM::BitcastOp::create(g.b, g.loc, g.b.getF16Type(), bits);
  return LLVM::FPExtOp::create(g.b, g.loc, g.f32(), half);
}

/// call_in(ids, ids_stride i64, wide i32, weights, weights_stride i64, type i32, rows i32,
///         slots i32, E i32, skip i32, first i64, ids_out, weights_out, status)
/// One thread per row = token · slots + slot of a chunk that begins at token `first`. Ids are i64
/// where wide, weights of MOEC_DT_ `type`. Ids outside [0, E) become -1; those below -1 or above
/// E - 1 are reported unless `skip`: status = min(status, token << 32 | slot).
static void emitCallIn(GPUBuilder &g, ValueRange args) {
  Value ids = args[0], idsStride = args[1], wide = args[2], weights = args[3];
  Value weightsStride = args[4], type = args[5], rows = args[6], slots = args[7], E = args[8];
  Value skip = args[9], first = args[10], idsOut = args[11], weightsOut = args[12];
  Value status = args[13];
  Value row = g.add(g.mul(g.blockX(), kThreads), g.thread());
  g.ifThen(g.less(row, rows), [&] {
    Value token = g.div(row, slots), slot = g.rem(row, slots);
    Value from = g.add(g.mul(g.wide(token), idsStride), g.wide(slot));
    auto read = scf::IfOp::create(g.b, g.loc, g.i64(), g.equal(wide, 0), /*withElse=*/true);
    {
      OpBuilder::InsertionGuard guard(g.b);
      g.b.setInsertionPointToStart(read.thenBlock());
      scf::YieldOp::create(g.b, g.loc, g.wide(g.loadI32(g.element(ids, from, 4))));
      g.b.setInsertionPointToStart(read.elseBlock());
      scf::YieldOp::create(g.b, g.loc, g.load(g.i64(), g.element(ids, from, 8), 8));
    }
    Value id = read.getResult(0);
    // Negative ids are large as unsigned numbers.
    Value inside = g.icmp(arith::CmpIPredicate::ult, id, g.wide(E));
    g.store(g.select(inside, g.narrow(id), g.c(-1)), g.element(idsOut, row, 4), 4);
    Value foreign =
        g.andi(g.xori(inside, g.bit(true)), g.icmp(arith::CmpIPredicate::ne, id, g.c64(-1)));
    g.ifThen(g.andi(foreign, g.equal(skip, 0)), [&] {
      Value where = g.ori(g.shl(g.add(first, g.wide(token)), 32), g.wide(slot));
      LLVM::AtomicRMWOp::create(g.b, g.loc, LLVM::AtomicBinOp::umin, status, where,
                                LLVM::AtomicOrdering::monotonic);
    });
    Value fromWeight = g.add(g.mul(g.wide(token), weightsStride), g.wide(slot));
    auto whole = scf::IfOp::create(g.b, g.loc, g.f32(), g.equal(type, MOEC_DT_F32),
                                   /*withElse=*/true);
    {
      OpBuilder::InsertionGuard guard(g.b);
      g.b.setInsertionPointToStart(whole.thenBlock());
      scf::YieldOp::create(g.b, g.loc, g.loadF32(g.element(weights, fromWeight, 4)));
      g.b.setInsertionPointToStart(whole.elseBlock());
      Value bits = g.load(g.i16(), g.element(weights, fromWeight, 2), 2);
      scf::YieldOp::create(
          g.b, g.loc, g.select(g.equal(type, MOEC_DT_BF16), g.widenBits(bits), widenF16(g, bits)));
    }
    g.store(whole.getResult(0), g.element(weightsOut, row, 4), 4);
  });
}

/// call_out(ids, weights, rows i32, slots i32, ids_out, ids_stride i64, mode i32, weights_out,
///          weights_stride i64)
/// mode: bit 0: write ids, as i64 with bit 1; bit 2: write weights.
static void emitCallOut(GPUBuilder &g, ValueRange args) {
  Value ids = args[0], weights = args[1], rows = args[2], slots = args[3], idsOut = args[4];
  Value idsStride = args[5], mode = args[6], weightsOut = args[7], weightsStride = args[8];
  Value row = g.add(g.mul(g.blockX(), kThreads), g.thread());
  auto has = [&](int64_t bits) { return g.equal(g.andi(mode, bits), bits); };
  g.ifThen(g.less(row, rows), [&] {
    Value token = g.div(row, slots), slot = g.rem(row, slots);
    g.ifThen(has(1), [&] {
      Value id = g.loadI32(g.element(ids, row, 4));
      Value to = g.add(g.mul(g.wide(token), idsStride), g.wide(slot));
      g.ifThenElse(
          has(2), [&] { g.store(g.wide(id), g.element(idsOut, to, 8), 8); },
          [&] { g.store(id, g.element(idsOut, to, 4), 4); });
    });
    g.ifThen(has(4), [&] {
      Value to = g.add(g.mul(g.wide(token), weightsStride), g.wide(slot));
      g.store(g.loadF32(g.element(weights, row, 4)), g.element(weightsOut, to, 4), 4);
    });
  });
}

/// call_counts(ids, rows i32, E i32, counts)
/// Block e adds the number of rows of expert e to counts[e], block E of those that have none.
static void emitCallCounts(GPUBuilder &g, ValueRange args) {
  Value ids = args[0], rows = args[1], E = args[2], counts = args[3];
  Value expert = g.blockX(), isLast = g.equal(expert, E);
  auto sum = g.loop(g.thread(), rows, g.c(kThreads), {g.c(0)},
                    [&](Value i, ValueRange state) -> SmallVector<Value> {
                      Value id = g.loadI32(g.element(ids, i, 4));
                      Value outside = g.icmp(arith::CmpIPredicate::uge, id, E);
                      Value mine = g.select(isLast, outside, g.equal(id, expert));
                      return {g.add(state[0], g.select(mine, g.c(1), g.c(0)))};
                    });
  Value total = g.reduce(sum[0], [&](Value a, Value b) { return g.add(a, b); });
  Value shared = g.sharedBase();
  g.ifThen(g.equal(g.rem(g.thread(), 32), 0),
           [&] { g.store(total, g.at(shared, g.mul(g.div(g.thread(), 32), 4)), 4); });
  g.barrier();
  g.ifThen(g.equal(g.thread(), 0), [&] {
    Value place = g.element(counts, expert, 4);
    Value all = g.loadI32(place);
    for (int64_t w = 0; w < kThreads / 32; ++w)
      all = g.add(all, g.loadI32(g.at(shared, w * 4)));
    g.store(all, place, 4);
  });
}

void mlir::moe::emitCallKernels(gpu::GPUModuleOp kernels) {
  OpBuilder b = OpBuilder::atBlockEnd(kernels.getBody());
  Location loc = kernels.getLoc();
  Type p = LLVM::LLVMPointerType::get(b.getContext(), 1), w = b.getI32Type(), l = b.getI64Type();
  auto make = [&](StringRef name, ArrayRef<Type> types, int64_t sharedBytes,
                  void (*fill)(GPUBuilder &, ValueRange)) {
    LLVM::LLVMFuncOp kernel = createKernel(b, loc, name, types, kThreads, sharedBytes);
    OpBuilder inner = OpBuilder::atBlockBegin(kernel.addEntryBlock(b));
    GPUBuilder g(inner, loc);
    fill(g, kernel.getArguments());
    inner.setInsertionPointToEnd(&kernel.getBody().front());
    LLVM::ReturnOp::create(inner, loc, ValueRange());
  };
  make("in", {p, l, w, p, l, w, w, w, w, w, l, p, p, p}, 0, emitCallIn);
  make("out", {p, p, w, w, p, l, w, p, l}, 0, emitCallOut);
  make("counts", {p, w, w, p}, kThreads / 32 * 4, emitCallCounts);
}
