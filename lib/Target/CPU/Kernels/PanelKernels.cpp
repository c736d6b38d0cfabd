//===- PanelKernels.cpp - Packing rows, opening and closing panels --------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelBuilder.h"

#include "llvm/ADT/bit.h"
#include "llvm/Support/FormatVariadic.h"

#include <cmath>

using namespace mlir;
using namespace mlir::moe;

static const char *levelWord(KernelLevel level) { return level == KernelLevel::V3 ? "v3" : "v4"; }

//===----------------------------------------------------------------------===//
// Rows into rows16 blocks
//===----------------------------------------------------------------------===//

std::string PackKernelSpec::getName() const {
  return (Twine("moe_pack_") + levelWord(level) + (bf16Source ? "_bf16" : "_f32") +
          (bf16Block                    ? "_block32"
           : bf16Compute && !bf16Source ? "_round"
                                        : "") +
          (gather ? "_gather" : "") +
          (weighted ? (bf16Compute ? "_weighted_round" : "_weighted") : ""))
      .str();
}

func::FuncOp moe::emitPackKernel(OpBuilder &b, Location loc, const PackKernelSpec &spec) {
  KernelBuilder k(b, loc);
  Type ptr = k.ptr(), i64 = k.i64();
  SmallVector<Type> args = {ptr, i64};
  if (spec.gather)
    args.append({ptr, i64});
  if (spec.weighted)
    args.push_back(ptr);
  args.append({i64, i64, ptr});
  func::FuncOp function = k.start(spec.getName(), spec.level, args);
  unsigned next = 0;
  Value x = function.getArgument(next++), rowBytes = function.getArgument(next++);
  Value pairs, slots, weights;
  if (spec.gather) {
    pairs = function.getArgument(next++);
    slots = arith::TruncIOp::create(b, loc, b.getI32Type(), function.getArgument(next++));
  }
  if (spec.weighted)
    weights = function.getArgument(next++);
  Value rows = function.getArgument(next++), columns = function.getArgument(next++);
  Value out = function.getArgument(next++);

  int64_t elementBytes = spec.bf16Source ? 2 : 4;
  int64_t lanes = getLevelLanes(spec.level);
  int64_t width = spec.bf16Block ? 32 : 16, outBytes = 64 / width; // a group's columns
  Value whole = arith::ShRUIOp::create(b, loc, columns, k.index(spec.bf16Block ? 5 : 4));
  Value rest = arith::AndIOp::create(b, loc, columns, k.index(width - 1));
  Value groupBytes = k.mul(rows, 64);
  k.loop(rows, 1, [&](Value row) {
    Value source = row, weight;
    if (spec.gather) {
      Value pair = k.load(b.getI32Type(), k.at(pairs, k.mul(row, 4)));
      if (spec.weighted)
        weight = k.load(b.getF32Type(),
                        k.at(weights, k.mul(arith::ExtUIOp::create(b, loc, i64, pair), 4)));
      source = arith::ExtUIOp::create(b, loc, i64, arith::DivUIOp::create(b, loc, pair, slots));
    }
    // `count` elements from p to q. A row is rounded when it is read, and its product with a weight
    // is rounded again.
    auto copy = [&](Value p, Value q, int64_t count) {
      if (spec.bf16Block && spec.bf16Source && !weight)
        return k.store(k.load(k.vec(count, b.getI16Type()), p), q);
      Value v = k.loadF32(p, count, spec.bf16Source);
      bool rounded = !spec.bf16Source && (weight || !spec.bf16Block);
      if (rounded && (spec.bf16Compute || spec.bf16Block))
        v = emitRoundToBF16(b, loc, v);
      if (weight) {
        Value factor = vector::BroadcastOp::create(b, loc, v.getType(), weight);
        v = arith::MulFOp::create(b, loc, v, factor);
        if (spec.bf16Compute)
          v = emitRoundToBF16(b, loc, v);
      }
      k.storeF32(v, q, spec.bf16Block);
    };
    Value from = k.at(x, k.mul(source, rowBytes));
    Value to = k.at(out, k.mul(row, 64));
    k.loop(whole, 1, [&](Value group) {
      Value p = k.at(from, k.mul(group, width * elementBytes));
      Value q = k.at(to, k.mul(group, groupBytes));
      for (int64_t c = 0; c < width; c += lanes)
        copy(k.at(p, c * elementBytes), k.at(q, c * outBytes), lanes);
    });
    // The last group, one by one: nothing is read beyond the row.
    k.ifThen(k.less(k.index(0), rest), [&] {
      Value p = k.at(from, k.mul(whole, width * elementBytes));
      Value q = k.at(to, k.mul(whole, groupBytes));
      Value zero = splatF32(b, loc, lanes, 0.0f);
      for (int64_t c = 0; c < 16; c += lanes)
        k.store(zero, k.at(q, c * 4));
      k.loop(rest, 1, [&](Value column) {
        copy(k.at(p, k.mul(column, elementBytes)), k.at(q, k.mul(column, outBytes)), 1);
      });
    });
  });
  k.finish();
  return function;
}

//===----------------------------------------------------------------------===//
// Normalised rows
//===----------------------------------------------------------------------===//

std::string NormalizeKernelSpec::getName() const {
  return llvm::formatv("moe_normalize_{0}_{1}_{2:x-8}{3}", levelWord(level), columns,
                       llvm::bit_cast<uint32_t>(epsilon), rounded ? "_rounded" : "");
}

func::FuncOp moe::emitNormalizeKernel(OpBuilder &b, Location loc, const NormalizeKernelSpec &spec) {
  KernelBuilder k(b, loc);
  Type ptr = k.ptr(), i64 = k.i64();
  func::FuncOp function = k.start(spec.getName(), spec.level, {ptr, i64, ptr});
  int64_t columns = spec.columns;
  Value block = function.getArgument(0), rows = function.getArgument(1);
  Value scale = function.getArgument(2);
  // Sixteen sums on every level, so that the bits are those of any other. Columns that do not
  // exist are zero and add nothing.
  constexpr int64_t lanes = 16;
  VectorType vector = k.vec(lanes, b.getF32Type());
  Value groups = k.index(llvm::divideCeil(columns, lanes)), groupBytes = k.mul(rows, 64);
  k.loop(rows, 1, [&](Value row) {
    Value base = k.at(block, k.mul(row, 64));
    auto at = [&](Value group) { return k.at(base, k.mul(group, groupBytes)); };
    Value zero = splatF32(b, loc, lanes, 0.0f);
    Value squares =
        k.loop(groups, 1, ValueRange{zero}, [&](Value group, ValueRange acc) -> SmallVector<Value> {
          Value v = k.load(vector, at(group));
          return {vector::FMAOp::create(b, loc, v, v, acc[0])};
        })[0];
    Value mean = arith::DivFOp::create(b, loc, k.sum(squares), k.float32(columns));
    mean = arith::AddFOp::create(b, loc, mean, k.float32(spec.epsilon));
    Value root = LLVM::SqrtOp::create(b, loc, b.getF32Type(), mean);
    Value factor = arith::DivFOp::create(b, loc, k.float32(1.0f), root);
    Value factors = vector::BroadcastOp::create(b, loc, vector, factor);
    Value last = splatF32(b, loc, lanes, static_cast<float>(1.0 / std::sqrt(double(columns))));
    k.loop(groups, 1, [&](Value group) {
      Value v = k.load(vector, at(group));
      for (Value factor : {factors, k.load(vector, k.at(scale, k.mul(group, 64))), last}) {
        v = arith::MulFOp::create(b, loc, v, factor);
        if (spec.rounded)
          v = emitRoundToBF16(b, loc, v);
      }
      k.store(v, at(group));
    });
  });
  k.finish();
  return function;
}

//===----------------------------------------------------------------------===//
// Panel scratches
//===----------------------------------------------------------------------===//

std::string PanelKernelSpec::getName() const {
  return (Twine(begin ? "moe_begin_panels_" : "moe_end_panels_") + levelWord(level) +
          (bf16Y ? "_bf16" : "_f32"))
      .str();
}

func::FuncOp moe::emitPanelKernel(OpBuilder &b, Location loc, const PanelKernelSpec &spec) {
  KernelBuilder k(b, loc);
  Type ptr = k.ptr(), i64 = k.i64();
  SmallVector<Type> args = {ptr, i64, ptr, i64, i64, i64, i64, i64};
  if (spec.begin)
    args.push_back(i64);
  func::FuncOp function = k.start(spec.getName(), spec.level, args);
  Value scratch = function.getArgument(0), scratchBytes = function.getArgument(1);
  Value y = function.getArgument(2), rowBytes = function.getArgument(3);
  Value tokens = function.getArgument(4), firstColumn = function.getArgument(5);
  Value panels = function.getArgument(6), columns = function.getArgument(7);
  int64_t elementBytes = spec.bf16Y ? 2 : 4;
  int64_t lanes = getLevelLanes(spec.level);
  Value zero = splatF32(b, loc, lanes, 0.0f);

  k.loop(panels, 1, [&](Value panel) {
    Value column = k.add(firstColumn, k.mul(panel, 32));
    Value real = k.sub(columns, column); // real columns of this panel; may be < 0 or > 32
    Value base = k.at(scratch, k.mul(panel, scratchBytes));
    Value yBase = k.at(y, k.mul(column, elementBytes));
    Value full = k.less(k.index(31), real);
    Value some = k.less(k.index(0), real);
    Value partial = arith::AndIOp::create(
        b, loc, some, arith::CmpIOp::create(b, loc, arith::CmpIPredicate::slt, real, k.index(32)));

    if (spec.begin) {
      Value accumulate = arith::CmpIOp::create(b, loc, arith::CmpIPredicate::ne,
                                               function.getArgument(8), k.index(0));
      Value copyAll = arith::AndIOp::create(b, loc, accumulate, full);
      auto widen = [&] {
        k.loop(tokens, 1, [&](Value token) {
          Value from = k.at(yBase, k.mul(token, rowBytes));
          Value to = k.at(base, k.mul(token, 128));
          for (int64_t c = 0; c < 32; c += lanes)
            k.store(k.loadF32(k.at(from, c * elementBytes), lanes, spec.bf16Y), k.at(to, c * 4));
        });
      };
      auto clear = [&] {
        k.loop(tokens, 1, [&](Value token) {
          Value to = k.at(base, k.mul(token, 128));
          for (int64_t c = 0; c < 32; c += lanes)
            k.store(zero, k.at(to, c * 4));
        });
        k.ifThen(arith::AndIOp::create(b, loc, accumulate, partial), [&] {
          k.loop(tokens, 1, [&](Value token) {
            Value from = k.at(yBase, k.mul(token, rowBytes));
            Value to = k.at(base, k.mul(token, 128));
            k.loop(real, 1, [&](Value c) {
              k.store(k.loadF32(k.at(from, k.mul(c, elementBytes)), 1, spec.bf16Y),
                      k.at(to, k.mul(c, 4)));
            });
          });
        });
      };
      k.ifThenElse(copyAll, widen, clear);
      return;
    }
    k.ifThen(full, [&] {
      k.loop(tokens, 1, [&](Value token) {
        Value from = k.at(base, k.mul(token, 128));
        Value to = k.at(yBase, k.mul(token, rowBytes));
        for (int64_t c = 0; c < 32; c += lanes)
          k.storeF32(k.loadF32(k.at(from, c * 4), lanes, false), k.at(to, c * elementBytes),
                     spec.bf16Y);
      });
    });
    k.ifThen(partial, [&] {
      k.loop(tokens, 1, [&](Value token) {
        Value from = k.at(base, k.mul(token, 128));
        Value to = k.at(yBase, k.mul(token, rowBytes));
        k.loop(real, 1, [&](Value c) {
          k.storeF32(k.loadF32(k.at(from, k.mul(c, 4)), 1, false), k.at(to, k.mul(c, elementBytes)),
                     spec.bf16Y);
        });
      });
    });
  });
  k.finish();
  return function;
}
