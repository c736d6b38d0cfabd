//===- RouteKernel.cpp - the routing of few tokens in one launch ----------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Many blocks sum logits; the last one to arrive goes on with all that follows. The order between
// the blocks is:
//
//   a block: partial sums, barrier, one thread: fence, atomic, fence; barrier, the last: reads them
//
// The fences are instructions of their own: LLVM makes relaxed atomics of all others for NVPTX.
//
//===----------------------------------------------------------------------===//

#include "Router.h"

using namespace mlir;
using namespace mlir::moe;

/// Whether this block arrives last of `count`, the same for all its threads.
static Value arrivesLast(GPUBuilder &g, Value ticket, int64_t count, Value shared) {
  g.barrier();
  g.ifThen(g.equal(g.thread(), 0), [&] {
    auto fence = [&] {
      LLVM::FenceOp::create(g.b, g.loc, LLVM::AtomicOrdering::acq_rel, "device");
    };
    fence();
    // From all ones or zero to the largest, and down to zero again: as it was, for the next call.
    Value before =
        LLVM::AtomicRMWOp::create(g.b, g.loc, LLVM::AtomicBinOp::udec_wrap, ticket, g.c(count - 1),
                                  LLVM::AtomicOrdering::monotonic, "device");
    fence();
    g.store(before, shared, 4);
  });
  g.barrier();
  return g.equal(g.loadI32(shared), 1);
}

/// The rows of few ids: a thread has an id, and counts those that are before it.
static void sortFew(GPUBuilder &g, const RouteKernel &spec, Value ids, Value tokens,
                    Arguments &args, Value shared) {
  int64_t K = spec.select.router.getTopK(), E = spec.select.E;
  Value offsets = args.next(), pair = args.next(), order = args.next();
  Value count = g.mul(tokens, K), threads = g.c(RouteKernel::kThreads);
  auto idAt = [&](Value i) { return g.loadI32(g.at(shared, g.mul(i, 4))); };
  auto below = [&](Value x, Value y) { return g.icmp(arith::CmpIPredicate::ult, x, y); };
  auto countIf = [&](Value begin, Value end, function_ref<Value(Value)> condition) {
    return g.loop(begin, end, g.c(1), {g.c(0)}, [&](Value i, ValueRange sum) -> SmallVector<Value> {
      Value one = arith::ExtUIOp::create(g.b, g.loc, g.i32(), condition(i));
      return {g.add(sum[0], one)};
    })[0];
  };
  g.barrier();
  g.loop(g.thread(), count, threads,
         [&](Value i) { g.store(g.loadI32(g.element(ids, i, 4)), g.at(shared, g.mul(i, 4)), 4); });
  g.barrier();
  g.loop(g.thread(), g.c(E + 1), threads, [&](Value e) {
    Value first = countIf(g.c(0), count, [&](Value i) { return below(idAt(i), e); });
    g.store(first, g.element(offsets, e, 4), 4);
  });
  g.loop(g.thread(), count, threads, [&](Value i) {
    Value id = idAt(i);
    auto before = [&](Value other) {
      Value otherId = idAt(other);
      return g.ori(below(otherId, id), g.andi(g.equal(otherId, id), g.less(other, i)));
    };
    Value row = countIf(g.c(0), count, before);
    Value begin = g.mul(g.div(i, K), K);
    Value rank = countIf(begin, g.add(begin, K), before);
    g.store(i, g.element(pair, row, 4), 4);
    g.store(row, g.element(order, g.add(begin, rank), 4), 4);
  });
}

void mlir::moe::emitRoute(OpBuilder &b, LLVM::LLVMFuncOp kernel, const RouteKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  Arguments args(kernel.getArguments());
  Staged staged = emitStageBlock(g, spec.stage, args);
  Value ticket = args.next();
  SelectValues values(staged.partial, staged.tokens, {}, spec.select, args);
  auto finish = [&] {
    Value warp = g.div(g.thread(), 32);
    g.ifThen(g.less(warp, staged.tokens), [&] { emitSelectToken(g, spec.select, values, warp); });
    if (spec.sort)
      sortFew(g, spec, values.experts, staged.tokens, args, g.sharedBase());
  };
  if (spec.stage.slices() == 1) {
    g.barrier();
    return finish();
  }
  g.ifThen(arrivesLast(g, ticket, spec.stage.slices(), g.sharedBase()), finish);
}
