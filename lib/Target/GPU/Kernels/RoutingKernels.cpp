//===- RoutingKernels.cpp - router and counting sort on a GPU -------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "GPUBuilder.h"
#include "Kernels.h"

using namespace mlir;
using namespace mlir::moe;

static Value sharedBase(GPUBuilder &g) {
  return LLVM::AddressOfOp::create(g.b, g.loc, g.ptr(3), kSharedName);
}

//===----------------------------------------------------------------------===//
// Stage and logits
//===----------------------------------------------------------------------===//

/// x, rounded, in rows of the workspace and, for the logits, as f32 in shared memory.
static void stageRows(GPUBuilder &g, const StageKernel &spec, ValueRange args, Value firstToken,
                      Value firstColumn, Value shared) {
  Value x = args[0], stride = args[1], tokens = args[2], rows = args[3];
  int64_t elementBytes = spec.x.isF32() ? 4 : 2;
  g.loop(g.thread(), g.c(kLogitsTokens * kLogitsSlice), g.c(spec.threads()), [&](Value i) {
    Value token = g.add(firstToken, g.div(i, kLogitsSlice));
    Value column = g.add(firstColumn, g.rem(i, kLogitsSlice));
    Value real = g.andi(g.less(token, tokens), g.less(column, spec.H));
    auto read = scf::IfOp::create(g.b, g.loc, g.i16(), real, /*withElse=*/true);
    {
      OpBuilder::InsertionGuard guard(g.b);
      g.b.setInsertionPointToStart(read.thenBlock());
      Value index = g.add(g.mul(g.wide(token), stride), g.wide(column));
      Value bits = g.roundBits(g.loadElement(g.element(x, index, elementBytes), spec.x));
      scf::YieldOp::create(g.b, g.loc, bits);
      g.b.setInsertionPointToStart(read.elseBlock());
      Value zero = arith::ConstantOp::create(g.b, g.loc, g.b.getI16IntegerAttr(0));
      scf::YieldOp::create(g.b, g.loc, zero);
    }
    Value bits = read.getResult(0);
    if (shared)
      g.store(g.widenBits(bits), g.at(shared, g.mul(i, 4)), 4);
    g.ifThen(g.andi(g.less(token, tokens), g.less(column, spec.width)), [&] {
      Value index = g.add(g.mul(g.wide(token), spec.width), g.wide(column));
      g.store(bits, g.element(rows, index, 2), 2);
    });
  });
}

/// Partial sums of one slice for the panels of this warp.
static void sumSlice(GPUBuilder &g, const StageKernel &spec, ValueRange args, Value firstToken,
                     Value slice, Value shared) {
  Value tokens = args[2], weight = args[4], partial = args[5];
  bool f32 = spec.router.getFormat().getStorageType().isF32();
  int64_t panels = spec.router.panelCount(), panelBytes = spec.router.panelBytes();
  Value warp = g.div(g.thread(), 32), lane = g.rem(g.thread(), 32);
  Value begin = g.mul(slice, kLogitsSlice);
  // The reduction is padded to 32, so a slice is whole steps of 16.
  Value length = g.min(g.c(kLogitsSlice), g.sub(g.c(spec.router.paddedCols()), begin));
  g.loop(warp, g.c(panels), g.c(spec.threads() / 32), [&](Value panel) {
    Value base = g.at(weight, g.mul(g.wide(panel), panelBytes));
    base = g.at(base, g.wide(g.mul(lane, 4)));
    SmallVector<Value> init(kLogitsTokens, g.f(0));
    auto sums =
        g.loop(g.c(0), length, g.c(16), init, [&](Value k, ValueRange state) -> SmallVector<Value> {
          SmallVector<Value> sum(state);
          // All loads first: they are what the warp waits for.
          Value row = g.add(begin, k);
          SmallVector<Value> w;
          for (int64_t i = 0; i < 16; ++i) {
            if (f32) {
              w.push_back(g.loadF32(g.element(base, g.add(row, i), 128)));
            } else if (i % 2 == 0) {
              Value word = g.loadI32(g.element(base, g.add(g.shr(row, 1), i / 2), 128));
              w.push_back(g.lowHalf(word));
              w.push_back(g.highHalf(word));
            }
          }
          for (int64_t quad = 0; quad < 4; ++quad)
            for (int64_t t = 0; t < kLogitsTokens; ++t) {
              Value place = g.add(g.mul(k, 4), (t * kLogitsSlice + quad * 4) * 4);
              Value four = g.load(VectorType::get({4}, g.f32()), g.at(shared, place), 16);
              for (int64_t i = 0; i < 4; ++i)
                sum[t] = g.fma(g.lane(four, i), w[quad * 4 + i], sum[t]);
            }
          return sum;
        });
    Value column = g.add(g.mul(panel, 32), lane);
    for (int64_t t = 0; t < kLogitsTokens; ++t) {
      Value token = g.add(firstToken, t);
      g.ifThen(g.less(token, tokens), [&] {
        Value row = g.add(g.mul(g.wide(slice), g.wide(tokens)), g.wide(token));
        Value index = g.add(g.mul(row, panels * 32), g.wide(column));
        g.store(sums[t], g.element(partial, index, 4), 4);
      });
    }
  });
}

void mlir::moe::emitStage(OpBuilder &b, LLVM::LLVMFuncOp kernel, const StageKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  ValueRange args = kernel.getArguments();
  Value firstToken = g.mul(g.blockX(), kLogitsTokens), slice = g.blockY();
  Value shared = spec.router ? sharedBase(g) : Value();
  stageRows(g, spec, args, firstToken, g.mul(slice, kLogitsSlice), shared);
  if (spec.dense)
    g.ifThen(g.equal(g.ori(g.ori(g.blockX(), slice), g.thread()), 0), [&] {
      g.store(g.c(0), args.back(), 4);
      g.store(args[2], g.at(args.back(), 4), 4);
    });
  if (!spec.router)
    return;
  g.barrier();
  sumSlice(g, spec, args, firstToken, slice, shared);
}

//===----------------------------------------------------------------------===//
// Select
//===----------------------------------------------------------------------===//

/// An unsigned number that is larger where a score is: NaN is largest, -0 equals 0; never 0.
static Value scoreKey(GPUBuilder &g, Value score) {
  Value bits = g.bits(g.addf(score, g.f(0)));
  Value sign = arith::ShRSIOp::create(g.b, g.loc, bits, g.c(31));
  Value key = g.xori(bits, g.ori(sign, g.c(int32_t(0x80000000))));
  return g.select(g.isNaN(score), g.c(-1), key);
}

/// The score that a key was made of.
static Value keyScore(GPUBuilder &g, Value key) {
  Value positive = g.less(key, 0);
  Value bits = g.select(positive, g.xori(key, g.c(int32_t(0x80000000))), g.xori(key, g.c(-1)));
  return g.real(bits);
}

static Value redux(GPUBuilder &g, Value v, NVVM::ReduxKind kind) {
  return NVVM::ReduxOp::create(g.b, g.loc, g.i32(), v, kind, g.all());
}

/// p[i] / Σp over the values of all lanes that are `real`.
static void softmax(GPUBuilder &g, MutableArrayRef<Value> v, ArrayRef<Value> real, Value largest) {
  Value sum;
  for (auto [value, isReal] : llvm::zip_equal(v, real)) {
    value = g.exp(g.subf(value, largest));
    if (isReal)
      value = g.select(isReal, value, g.f(0));
    sum = sum ? g.addf(sum, value) : value;
  }
  sum = g.reduce(sum, [&](Value a, Value b) { return g.addf(a, b); });
  for (Value &value : v)
    value = g.divf(value, sum);
}

static Value sigmoid(GPUBuilder &g, Value v) {
  Value negated = arith::NegFOp::create(g.b, g.loc, v);
  return g.divf(g.f(1), g.addf(g.f(1), g.exp(negated)));
}

/// Gives the keys of experts outside of the best groups the key of the fill. Keys of lane l, which
/// has experts `ids`; 0 where there is none.
static void keepGroups(GPUBuilder &g, GroupsAttr groups, int64_t E, ArrayRef<Value> ids,
                       MutableArrayRef<Value> keys) {
  int64_t count = groups.getCount(), size = E / count, P = ids.size();
  Value lane = ids[0];
  // The largest key of the group, and the expert that has it.
  auto largest = [&](Value group, Value except) -> std::pair<Value, Value> {
    Value key = g.c(0), id = g.c(-1);
    for (int64_t j = 0; j < P; ++j) {
      Value inside = g.equal(g.div(ids[j], size), group);
      if (except)
        inside = g.andi(inside, g.icmp(arith::CmpIPredicate::ne, ids[j], except));
      Value mine = g.select(inside, keys[j], g.c(0));
      Value better = g.icmp(arith::CmpIPredicate::ugt, mine, key);
      id = g.select(better, ids[j], id);
      key = g.select(better, mine, key);
    }
    Value best = redux(g, key, NVVM::ReduxKind::UMAX);
    Value candidate = g.select(g.equal(key, best), id, g.c(-1));
    return {best, redux(g, candidate, NVVM::ReduxKind::UMIN)};
  };
  // Lane n has the key of group n.
  Value group = g.loop(g.c(0), g.c(count), g.c(1), {g.c(0)},
                       [&](Value n, ValueRange state) -> SmallVector<Value> {
                         auto [best, id] = largest(n, {});
                         Value score = keyScore(g, best);
                         if (groups.getReduce() == GroupScore::SumTop2)
                           score = g.addf(score, keyScore(g, largest(n, id).first));
                         return {g.select(g.equal(lane, n), scoreKey(g, score), state[0])};
                       })[0];
  auto kept =
      g.loop(g.c(0), g.c(groups.getKeep()), g.c(1), {group, g.c(0)},
             [&](Value, ValueRange state) -> SmallVector<Value> {
               Value best = redux(g, state[0], NVVM::ReduxKind::UMAX);
               Value candidate = g.select(g.equal(state[0], best), lane, g.c(-1));
               Value winner = redux(g, candidate, NVVM::ReduxKind::UMIN);
               Value bit = arith::ShLIOp::create(g.b, g.loc, g.c(1), winner);
               return {g.select(g.equal(lane, winner), g.c(0), state[0]), g.ori(state[1], bit)};
             });
  // Keys of +0 and of -inf.
  int32_t fill = groups.getFill() == GroupFill::Zero ? int32_t(0x80000000) : 0x007fffff;
  for (int64_t j = 0; j < P; ++j) {
    Value of = g.div(ids[j], size);
    Value bit = g.andi(arith::ShRUIOp::create(g.b, g.loc, kept[1], g.andi(of, 31)).getResult(), 1);
    Value taken = g.select(g.equal(bit, 1), keys[j], g.c(fill));
    // Padding stays padding.
    keys[j] = g.select(g.equal(keys[j], 0), keys[j], taken);
  }
}

void mlir::moe::emitSelect(OpBuilder &b, LLVM::LLVMFuncOp kernel, const SelectKernel &spec) {
  GPUBuilder g(b, kernel.getLoc());
  ValueRange args = kernel.getArguments();
  Value partial = args[0], tokens = args[1], weights = args[2], experts = args[3];
  RouterAttr router = spec.router;
  int64_t P = spec.panels, K = router.getTopK(), keep = llvm::divideCeil(K, 32);
  bool scoreFirst = router.getOrder() == RouterOrder::ScoreThenSelect;
  bool isSoftmax = router.getScore() == ScoreFunction::Softmax;
  Value lane = g.rem(g.thread(), 32);
  // Uniform in a warp: one warp per token.
  Value token = g.add(g.mul(g.blockX(), kSelectWarps), g.div(g.thread(), 32));
  g.ifThen(g.less(token, tokens), [&] {
    // Lane l has experts l, 32 + l, …; `real` is null where all lanes have one.
    SmallVector<Value> ids, real;
    for (int64_t j = 0; j < P; ++j) {
      ids.push_back(g.add(lane, j * 32));
      real.push_back((j + 1) * 32 <= spec.E ? Value() : g.less(ids[j], spec.E));
    }
    auto at = [&](Value slice, int64_t j) {
      Value row = g.add(g.mul(g.wide(slice), g.wide(tokens)), g.wide(token));
      return g.element(partial, g.add(g.mul(row, P * 32), g.wide(ids[j])), 4);
    };
    SmallVector<Value> z;
    for (int64_t j = 0; j < P; ++j)
      z.push_back(g.loadF32(at(g.c(0), j)));
    if (spec.slices > 1)
      z = g.loop(g.c(1), g.c(spec.slices), g.c(1), z,
                 [&](Value slice, ValueRange state) -> SmallVector<Value> {
                   SmallVector<Value> sum(state);
                   for (int64_t j = 0; j < P; ++j)
                     sum[j] = g.addf(sum[j], g.loadF32(at(slice, j)));
                   return sum;
                 });
    // Vectors are padded to whole panels.
    int64_t next = 4 + (spec.logits ? 2 : 0);
    if (spec.bias) {
      for (int64_t j = 0; j < P; ++j)
        z[j] = g.addf(z[j], g.loadF32(g.element(args[next], ids[j], 4)));
      ++next;
    }
    if (spec.logits)
      for (int64_t j = 0; j < P; ++j) {
        auto write = [&] {
          Value index = g.add(g.mul(g.wide(token), args[5]), g.wide(ids[j]));
          g.store(z[j], g.element(args[4], index, 4), 4);
        };
        real[j] ? g.ifThen(real[j], write) : write();
      }

    SmallVector<Value> score = z;
    if (scoreFirst && isSoftmax) {
      Value largest;
      for (int64_t j = 0; j < P; ++j) {
        Value v = real[j] ? g.select(real[j], z[j], g.f(-INFINITY)) : z[j];
        largest = largest ? g.maxf(largest, v) : v;
      }
      largest = g.reduce(largest, [&](Value a, Value b) { return g.maxf(a, b); });
      softmax(g, score, real, largest);
    } else if (scoreFirst) {
      for (Value &v : score)
        v = sigmoid(g, v);
    }
    SmallVector<Value> state;
    for (int64_t j = 0; j < P; ++j) {
      Value by = score[j];
      if (spec.selectionBias)
        by = g.addf(by, g.loadF32(g.element(args[next], ids[j], 4)));
      Value key = scoreKey(g, by);
      state.push_back(real[j] ? g.select(real[j], key, g.c(0)) : key);
    }
    if (router.getGroups())
      keepGroups(g, router.getGroups(), spec.E, ids, state);
    // What was chosen by is the score, unless something was added or left out.
    bool apart = spec.selectionBias || router.getGroups();
    state.append(2 * keep, g.c(0)); // ids and keys of the chosen, K of them spread over the lanes
    state = g.loop(g.c(0), g.c(K), g.c(1), state,
                   [&](Value round, ValueRange old) -> SmallVector<Value> {
                     SmallVector<Value> next(old);
                     Value key = next[0], id = ids[0];
                     for (int64_t j = 1; j < P; ++j) {
                       Value better = g.icmp(arith::CmpIPredicate::ugt, next[j], key);
                       id = g.select(better, ids[j], id);
                       key = g.select(better, next[j], key);
                     }
                     Value best = redux(g, key, NVVM::ReduxKind::UMAX);
                     Value candidate = g.select(g.equal(key, best), id, g.c(-1));
                     Value winner = redux(g, candidate, NVVM::ReduxKind::UMIN);
                     if (apart) {
                       Value own = g.c(0); // one lane has it
                       for (int64_t j = 0; j < P; ++j)
                         own = g.select(g.equal(ids[j], winner), g.bits(score[j]), own);
                       best = redux(g, own, NVVM::ReduxKind::UMAX);
                     }
                     for (int64_t j = 0; j < P; ++j)
                       next[j] = g.select(g.equal(ids[j], winner), g.c(0), next[j]);
                     for (int64_t q = 0; q < keep; ++q) {
                       Value mine = g.equal(g.add(lane, q * 32), round);
                       next[P + q] = g.select(mine, winner, next[P + q]);
                       next[P + keep + q] = g.select(mine, best, next[P + keep + q]);
                     }
                     return next;
                   });

    SmallVector<Value> chosen, weight, isChosen;
    for (int64_t q = 0; q < keep; ++q) {
      chosen.push_back(state[P + q]);
      Value kept = state[P + keep + q];
      weight.push_back(apart ? g.real(kept) : keyScore(g, kept));
      isChosen.push_back(g.less(g.add(lane, q * 32), K));
    }
    if (!scoreFirst && isSoftmax) {
      // The first of the chosen is the largest.
      softmax(g, weight, isChosen, g.shuffle(NVVM::ShflKind::idx, weight[0], g.c(0)));
    } else if (!scoreFirst) {
      for (Value &v : weight)
        v = sigmoid(g, v);
    }
    if (router.getRenormalize() == Renormalize::Sum) {
      Value sum;
      for (auto [v, mine] : llvm::zip_equal(weight, isChosen)) {
        Value term = g.select(mine, v, g.f(0));
        sum = sum ? g.addf(sum, term) : term;
      }
      sum = g.reduce(sum, [&](Value a, Value b) { return g.addf(a, b); });
      sum = g.addf(sum, g.f(router.getEpsilon()));
      for (Value &v : weight)
        v = g.divf(v, sum);
    }
    for (int64_t q = 0; q < keep; ++q) {
      Value v = weight[q];
      if (router.getScale().value != 1.0)
        v = g.mulf(v, g.f(router.getScale()));
      g.ifThen(isChosen[q], [&] {
        Value index = g.add(g.mul(g.wide(token), K), g.wide(g.add(lane, q * 32)));
        g.store(v, g.element(weights, index, 4), 4);
        g.store(chosen[q], g.element(experts, index, 4), 4);
      });
    }
  });
}

//===----------------------------------------------------------------------===//
// Sort
//===----------------------------------------------------------------------===//

// Each block reads all ids: they are few, in L2 after the first block and in L1 for the blocks that
// share a processor; in return there is one launch, no atomic and no order to restore.
void mlir::moe::emitSort(OpBuilder &b, LLVM::LLVMFuncOp kernel, int64_t E) {
  GPUBuilder g(b, kernel.getLoc());
  ValueRange args = kernel.getArguments();
  Value ids = args[0], count = args[1], slots = args[2];
  Value offsets = args[3], pair = args[4], order = args[5];
  constexpr int64_t warps = kSortThreads / 32;
  Value expert = g.blockX(), lane = g.rem(g.thread(), 32), warp = g.div(g.thread(), 32);
  // Every warp has one stretch of ids, so that its rows are known before it writes them.
  Value length = g.mul(g.div(g.add(count, warps * 32 - 1), warps * 32), 32);
  Value begin = g.mul(warp, length), end = g.min(count, g.add(begin, length));

  // Ids below this expert, and its own.
  auto idAt = [&](Value i) {
    auto read = scf::IfOp::create(g.b, g.loc, g.i32(), g.less(i, end), /*withElse=*/true);
    OpBuilder::InsertionGuard guard(g.b);
    g.b.setInsertionPointToStart(read.thenBlock());
    scf::YieldOp::create(g.b, g.loc, g.loadI32(g.element(ids, i, 4)));
    g.b.setInsertionPointToStart(read.elseBlock());
    scf::YieldOp::create(g.b, g.loc, g.c(-1));
    return read.getResult(0);
  };
  auto counts = g.loop(begin, end, g.c(32), {g.c(0), g.c(0)},
                       [&](Value i, ValueRange state) -> SmallVector<Value> {
                         Value id = idAt(g.add(i, lane));
                         // Negative ids are large as unsigned numbers.
                         Value below = g.icmp(arith::CmpIPredicate::ult, id, expert);
                         return {g.add(state[0], g.popcount(g.ballot(below))),
                                 g.add(state[1], g.popcount(g.ballot(g.equal(id, expert))))};
                       });
  Value shared = sharedBase(g);
  g.ifThen(g.equal(lane, 0), [&] {
    Value place = g.at(shared, g.mul(warp, 8));
    g.store(counts[0], place, 4);
    g.store(counts[1], g.at(place, 4), 4);
  });
  g.barrier();
  Value first = g.c(0), start = g.c(0), rows = g.c(0);
  for (int64_t w = 0; w < warps; ++w) {
    Value own = g.loadI32(g.at(shared, w * 8 + 4));
    first = g.add(first, g.loadI32(g.at(shared, w * 8)));
    start = g.add(start, g.select(g.less(g.c(w), warp), own, g.c(0)));
    rows = g.add(rows, own);
  }
  g.ifThen(g.equal(g.thread(), 0), [&] {
    g.store(first, g.element(offsets, expert, 4), 4);
    g.ifThen(g.equal(expert, E - 1),
             [&] { g.store(g.add(first, rows), g.element(offsets, g.c(E), 4), 4); });
  });

  g.loop(begin, end, g.c(32), {g.add(first, start)},
         [&](Value i, ValueRange state) -> SmallVector<Value> {
           Value position = g.add(i, lane), id = idAt(position);
           Value match = g.equal(id, expert);
           Value votes = g.ballot(match);
           g.ifThen(match, [&] {
             Value row = g.add(state[0], g.popcount(g.andi(votes, g.maskBelow(lane))));
             g.store(position, g.element(pair, row, 4), 4);
             // The rank among the token's rows: by expert, then by slot.
             Value token = g.div(position, slots), slot = g.rem(position, slots);
             Value firstSlot = g.mul(token, slots);
             auto rank = g.loop(
                 g.c(0), slots, g.c(1), {g.c(0)},
                 [&](Value other, ValueRange before) -> SmallVector<Value> {
                   Value otherId = g.loadI32(g.element(ids, g.add(firstSlot, other), 4));
                   Value earlier = g.ori(g.icmp(arith::CmpIPredicate::ult, otherId, expert),
                                         g.andi(g.equal(otherId, expert), g.less(other, slot)));
                   return {g.add(before[0],
                                 arith::ExtUIOp::create(g.b, g.loc, g.i32(), earlier).getResult())};
                 });
             g.store(row, g.element(order, g.add(firstSlot, rank[0]), 4), 4);
           });
           return {g.add(state[0], g.popcount(votes))};
         });
}
