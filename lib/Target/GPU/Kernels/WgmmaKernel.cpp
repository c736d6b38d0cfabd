//===- WgmmaKernel.cpp - grouped matmul by warpgroups ---------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The kernel of GemmKernel.cpp for sm_90a: 128 packed columns by up to 256 rows of one expert.
//
//   weight: the left operand (64 columns of a warpgroup), in registers. The TMA unit brings boxes
//   of panels as they are in the file, swizzled by 128 bytes: chunk c of panel row r at c ^ (r mod
//   8). A word is two steps of the reduction of one column, as the operand register wants it.
//
//   rows: the right operand, in shared memory, K-major with a swizzle of 128 bytes. They are
//   gathered by cp.async; the unit cannot gather here.
//
//   Warpgroup 0 fills the ring, 1 and 2 multiply. Blocks stay and take tile after tile, so that the
//   ring is filled for the next tile while this one is written.
//
//     filler:       wait until the place is empty; order the box and the copies; then, for the
//     stage
//                   `lag` before: wait for its own copies, fence to the asynchronous proxy, arrive
//     multipliers:  wait until the place is full; for each 16 of the reduction load the operand,
//                   multiply, wait for the product before this one; tell the filler that the stage
//                   before is empty
//
// The reduction runs upwards in steps of 16, in every tile.
//
//===----------------------------------------------------------------------===//

#include "AtomicSums.h"
#include "TileSearch.h"
#include "WgmmaAsm.h"

using namespace mlir;
using namespace mlir::moe;

namespace {

/// Columns of a warpgroup's product, threads of a warpgroup.
constexpr int64_t kGroupCols = 64, kGroup = 128;
/// Registers of a thread that fills and of one that multiplies, in tiles that move them: three
/// warpgroups have what they start with. With 72 for the filler, which has the addresses of 16
/// rows, some models' kernels spill.
constexpr int64_t kFillRegisters = 88, kMultiplyRegisters = 208;
static_assert(kFillRegisters + 2 * kMultiplyRegisters <= 3 * GPUTileAttr::kStartRegisters);
/// Rows that a warpgroup writes at a time.
constexpr int64_t kPiece = 64;

class WgmmaEmitter {
public:
  WgmmaEmitter(OpBuilder &b, LLVM::LLVMFuncOp kernel, const GemmKernel &spec)
      : g(b, kernel.getLoc()), spec(spec), tile(spec.tile), args(kernel.getArguments()) {}
  LogicalResult emit();

private:
  /// What a role carries from tile to tile: the stage it is at and the parity it waits for there.
  using State = SmallVector<Value>;
  State forTiles(State init, function_ref<State(ValueRange)> body);
  void fill();
  State fillTile(ValueRange state);
  void copyRows(Value step, Value place, ArrayRef<Value> sources);
  void announce(Value stage);
  LogicalResult multiply();
  State multiplyTile(ValueRange state, bool &good);
  SmallVector<Value> loadLeft(Value place, int64_t k);
  LogicalResult store(ValueRange sums);

  int64_t parts() const { return spec.weight.getParts(); }
  int64_t rows() const { return tile.getRows(); }
  int64_t stages() const { return tile.getStages(); }
  /// A stage is announced after so many were ordered behind it. Multipliers give a stage back once
  /// they have the one after it: both must have been announced before the place is needed again.
  int64_t lag() const { return std::min(stages() / 2, stages() - 2); }
  int64_t stageBytes() const { return tile.getWeightBytes() + tile.getRowBytes(); }
  int64_t steps() const { return llvm::divideCeil(spec.weight.paddedCols(), tile.getK()); }
  Value full(Value stage) { return barrierAt(stage, 0); }
  Value empty(Value stage) { return barrierAt(stage, 8); }
  Value barrierAt(Value stage, int64_t offset) {
    return g.at(g.at(shared, g.mul(stage, 16)), tile.getBarrierOffset() + offset);
  }
  void wait(Value barrier, Value parity) {
    NVVM::MBarrierTryWaitParityOp::create(g.b, g.loc, barrier, parity, g.c(0x989680));
  }
  /// One arrival for the warp, after all its lanes.
  void arrive(Value barrier) {
    NVVM::SyncWarpOp::create(g.b, g.loc, g.all());
    g.ifThen(g.equal(lane, 0),
             [&] { NVVM::MBarrierArriveOp::create(g.b, g.loc, Type(), barrier, Value()); });
  }
  /// The place after `stage` in the ring, and the parity there.
  void turn(Value &stage, Value &parity) {
    Value next = g.add(stage, 1), last = g.equal(next, stages());
    stage = g.select(last, g.c(0), next);
    parity = g.select(last, g.xori(parity, g.c(1)), parity);
  }
  void groupBarrier(int64_t group) { // of the warpgroup that multiplies
    NVVM::BarrierOp::create(g.b, g.loc, TypeRange(), g.add(groupIndex, group), g.c(kGroup),
                            NVVM::BarrierReductionAttr(), Value());
  }

  GPUBuilder g;
  const GemmKernel &spec;
  GPUTileAttr tile;
  ValueRange args;
  Value shared, thread, lane, warp, groupIndex;
  // Of this tile.
  Value expert, colBlock, firstRow, rowCount;
};

} // namespace

/// Calls `body` for every tile of this block: tile b, b + blocks, ... Experts are looked for from
/// those of the tile before on.
WgmmaEmitter::State WgmmaEmitter::forTiles(State init, function_ref<State(ValueRange)> body) {
  TileSearch search(g, spec, args[3], lane);
  Value blocks = NVVM::GridDimXOp::create(g.b, g.loc, g.i32());
  // (tile, first expert to look at, tiles before it, of the role)
  State start = {g.blockX(), g.c(0), g.c(0)};
  start.append(init);
  SmallVector<Type> types(ValueRange(start).getTypes());
  // Inside: (tile, first expert, tiles before it, expert, tiles before that, its row tiles, role).
  SmallVector<Type> inner(6, g.i32());
  inner.append(types.begin() + 3, types.end());
  auto before = [&](OpBuilder &, Location, ValueRange state) {
    TileSearch::Found found = search.find(state[0], state[1], state[2]);
    SmallVector<Value> forward = {state[0],     found.next,   found.nextBefore,
                                  found.expert, found.before, found.rowTiles};
    forward.append(state.begin() + 3, state.end());
    scf::ConditionOp::create(g.b, g.loc, found.found, forward);
  };
  auto after = [&](OpBuilder &, Location, ValueRange state) {
    expert = state[3];
    auto [column, row, count] = search.place(state[0], state[3], state[4], state[5]);
    colBlock = column, firstRow = row, rowCount = count;
    SmallVector<Value> next = {g.add(state[0], blocks), state[1], state[2]};
    next.append(body(state.drop_front(6)));
    scf::YieldOp::create(g.b, g.loc, next);
  };
  auto loop = scf::WhileOp::create(g.b, g.loc, inner, start, before, after);
  return State(loop.getResults().drop_front(6));
}

//===----------------------------------------------------------------------===//
// Filling
//===----------------------------------------------------------------------===//

void WgmmaEmitter::copyRows(Value step, Value place, ArrayRef<Value> sources) {
  int64_t chunks = tile.getK() / 8;
  Value c = g.rem(thread, chunks), r = g.div(thread, chunks);
  // Every row that this thread copies is r mod 8.
  Value to = g.add(g.mul(r, tile.getK() * 2), g.mul(g.xori(c, g.andi(r, 7)), 16));
  to = g.at(g.at(place, to), tile.getWeightBytes());
  Value chunk = g.add(g.mul(step, chunks), c);
  Value inside;
  if (spec.weight.paddedCols() % tile.getK())
    inside = g.less(chunk, spec.weight.paddedCols() / 8);
  for (auto [i, source] : llvm::enumerate(sources)) {
    // Rows that do not exist are -1: nothing is read, and zeros are multiplied.
    Value real = g.icmp(arith::CmpIPredicate::sge, source, g.c(0));
    if (inside)
      real = g.andi(real, inside);
    Value from = g.element(args[0], g.select(real, source, g.c(0)), spec.rowWidth * 2);
    from = g.at(from, g.wide(g.mul(g.select(real, chunk, g.c(0)), 16)));
    Value bytes = g.select(real, g.c(16), g.c(0));
    int64_t first = int64_t(i) * kGroup / chunks;
    auto copy = [&] {
      NVVM::CpAsyncOp::create(g.b, g.loc, g.at(to, first * tile.getK() * 2), from, 16,
                              NVVM::LoadCacheModifierKind::CG, bytes);
    };
    if (first + kGroup / chunks <= rows())
      copy();
    else
      g.ifThen(g.less(r, rows() - first), copy);
  }
}

/// This thread's copies of a stage have landed: tells it to the other proxy and to those who wait.
void WgmmaEmitter::announce(Value stage) {
  NVVM::FenceProxyOp::create(
      g.b, g.loc, NVVM::ProxyKindAttr::get(g.b.getContext(), NVVM::ProxyKind::async_shared),
      NVVM::SharedSpaceAttr::get(g.b.getContext(), NVVM::SharedSpace::shared_cta));
  arrive(full(stage));
}

/// state: stage and parity; stage that is announced next; stages that were ordered, up to `lag`.
WgmmaEmitter::State WgmmaEmitter::fillTile(ValueRange old) {
  int64_t chunks = tile.getK() / 8, atOnce = kGroup / chunks;
  Value r = g.div(thread, chunks);
  SmallVector<Value> sources;
  for (int64_t first = 0; first < rows(); first += atOnce) {
    Value row = g.add(r, first), real = g.less(row, rowCount);
    Value source = g.add(firstRow, g.select(real, row, g.c(0)));
    if (spec.gather)
      source = g.div(g.loadI32(g.element(args[1], source, 4)), args[2]);
    sources.push_back(g.select(real, source, g.c(-1)));
  }
  return g.loop(
      g.c(0), g.c(steps()), g.c(1), old, [&](Value step, ValueRange s) -> SmallVector<Value> {
        Value stage = s[0], parity = s[1], late = s[2], ordered = s[3];
        wait(empty(stage), parity);
        Value place = g.at(shared, g.mul(stage, stageBytes()));
        g.ifThen(g.equal(thread, 0), [&] {
          NVVM::MBarrierArriveExpectTxOp::create(
              g.b, g.loc, Type(), full(stage), g.c(tile.getWeightBytes()), NVVM::MemScopeKind::CTA,
              /*relaxed=*/false, Value());
          Value to = LLVM::AddrSpaceCastOp::create(g.b, g.loc, g.ptr(7), place);
          SmallVector<Value> box = {g.c(0), g.mul(step, tile.getK() / 2),
                                    g.mul(colBlock, tile.getCols() / 32), expert};
          NVVM::CpAsyncBulkTensorGlobalToSharedClusterOp::create(
              g.b, g.loc, to, args[4], box, full(stage), ValueRange(), Value(), Value(),
              NVVM::TMALoadMode::TILE, /*isCTAOnly=*/false, NVVM::CTAGroupKindAttr(), Value());
        });
        copyRows(step, place, sources);
        NVVM::CpAsyncCommitGroupOp::create(g.b, g.loc);
        NVVM::CpAsyncWaitGroupOp::create(g.b, g.loc, lag());
        Value landed = g.icmp(arith::CmpIPredicate::sge, ordered, g.c(lag()));
        g.ifThen(landed, [&] { announce(late); });
        Value unused = g.c(0), next = late;
        turn(next, unused);
        late = g.select(landed, next, late);
        ordered = g.min(g.add(ordered, 1), g.c(lag()));
        turn(stage, parity);
        return {stage, parity, late, ordered};
      });
}

void WgmmaEmitter::fill() {
  // The wait for the phase before the first passes at once.
  State end =
      forTiles({g.c(0), g.c(1), g.c(0), g.c(0)}, [&](ValueRange state) { return fillTile(state); });
  NVVM::CpAsyncWaitGroupOp::create(g.b, g.loc, 0);
  g.loop(g.c(0), end[3], g.c(1), ValueRange(end[2]),
         [&](Value, ValueRange s) -> SmallVector<Value> {
           announce(s[0]);
           Value stage = s[0], unused = g.c(0);
           turn(stage, unused);
           return {stage};
         });
}

//===----------------------------------------------------------------------===//
// Multiplying
//===----------------------------------------------------------------------===//

/// The left operand of 16 steps of the reduction. Row i of a warp's 16 is column i of the half of a
/// panel that is this warp's, row i + 8 the column 16 further: gate and up meet in a thread.
SmallVector<Value> WgmmaEmitter::loadLeft(Value place, int64_t k) {
  // Words 16 u + 8 half + group of panel rows k / 2 + quad (+ 4). Read as they lie, the rows of two
  // neighbouring quads would meet in the banks: odd ones read the other u first.
  Value quad = g.rem(lane, 4), group = g.div(lane, 4), odd = g.andi(quad, 1);
  Value inGroup = g.rem(warp, 4), half = g.rem(inGroup, 2);
  Value panel = g.add(g.mul(groupIndex, 2), g.div(inGroup, 2));
  int64_t panelBytes = tile.getK() / 2 * 128;
  Value chunk = g.add(g.mul(half, 2), g.div(group, 4));
  chunk = g.add(g.xori(chunk, quad), g.mul(odd, 4));
  Value at = g.add(g.mul(panel, panelBytes), g.mul(quad, 128));
  at = g.add(at, g.add(g.mul(chunk, 16), g.mul(g.rem(group, 4), 4)));
  Value first = g.at(place, at), second = g.at(place, g.xori(at, g.c(64)));
  Value swap = g.equal(odd, 1);
  SmallVector<Value> words;
  for (int64_t i = 0; i < 2; ++i) {
    // Four rows further the pattern has turned by half a row.
    Value a = g.load(g.i32(), g.at(i ? second : first, k * 64 + i * 512), 4);
    Value b = g.load(g.i32(), g.at(i ? first : second, k * 64 + i * 512), 4);
    words.push_back(g.select(swap, b, a));
    words.push_back(g.select(swap, a, b));
  }
  return words;
}

WgmmaEmitter::State WgmmaEmitter::multiplyTile(ValueRange old, bool &good) {
  // Zeros that are made here: a compiler would make them between the fence and the first product.
  SmallVector<Value> zeros(rows() / 2, g.f(0));
  SmallVector<Value> state = createReadSums(g.b, g.loc, zeros);
  state.append(old.begin(), old.end());
  state.push_back(g.c(0)); // the stage before
  // Where rows begin, in units of 16 bytes, and how they lie: 8 rows of 128 bytes, swizzled.
  Value base = LLVM::PtrToIntOp::create(g.b, g.loc, g.i32(), shared);
  base = g.shr(g.andi(g.add(base, tile.getWeightBytes()), 0x3ffff), 4);
  Value form = g.c64(int64_t(uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16));
  state = g.loop(
      g.c(0), g.c(steps()), g.c(1), state, [&](Value step, ValueRange s) -> SmallVector<Value> {
        SmallVector<Value> sums(s.drop_back(3));
        Value stage = s[s.size() - 3], parity = s[s.size() - 2], before = s[s.size() - 1];
        wait(full(stage), parity);
        Value place = g.at(shared, g.mul(stage, stageBytes()));
        Value rowsAt = g.add(base, g.mul(stage, stageBytes() / 16));
        for (int64_t k = 0; k < tile.getK(); k += 16) {
          SmallVector<Value> left = loadLeft(place, k);
          Value descriptor = arith::ExtUIOp::create(g.b, g.loc, g.i64(), g.add(rowsAt, k / 8));
          descriptor = g.ori(descriptor, form);
          NVVM::WgmmaFenceAlignedOp::create(g.b, g.loc);
          sums = createWgmma(g.b, g.loc, left, descriptor, sums);
          NVVM::WgmmaGroupSyncAlignedOp::create(g.b, g.loc);
          NVVM::WgmmaWaitGroupSyncOp::create(g.b, g.loc, 1);
          // Of the stage before, nothing is in flight any more.
          if (k == 0)
            g.ifThen(g.icmp(arith::CmpIPredicate::ne, step, g.c(0)),
                     [&] { arrive(empty(before)); });
        }
        before = stage;
        turn(stage, parity);
        sums.append({stage, parity, before});
        return sums;
      });
  NVVM::WgmmaWaitGroupSyncOp::create(g.b, g.loc, 0);
  arrive(empty(state.back()));
  good &= succeeded(store(createReadSums(g.b, g.loc, ValueRange(state).take_front(rows() / 2))));
  return State(state.end() - 3, state.end() - 1);
}

/// Result columns and rows meet in shared memory, so that memory is written in whole chunks.
LogicalResult WgmmaEmitter::store(ValueRange sums) {
  int64_t panelCols = spec.weight.panelCols();
  int64_t cols = kGroupCols / parts(), pitch = tile.getResultPitch(parts());
  Value quad = g.rem(lane, 4), group = g.div(lane, 4), inGroup = g.rem(warp, 4);
  Value panelInGroup = g.div(inGroup, 2), half = g.rem(inGroup, 2);
  Value firstCol = g.add(g.mul(colBlock, tile.getCols() / parts()), g.mul(groupIndex, cols));
  Value place = g.at(g.at(shared, tile.getResultOffset()), g.mul(groupIndex, kPiece * pitch));
  // Columns of sums i with i / 2 even and odd.
  Value column = g.add(g.mul(panelInGroup, panelCols), g.add(g.mul(half, 8), group));
  SmallVector<Value> bias;
  if (spec.bias) {
    int64_t panels = spec.weight.panelCount();
    Value panel = g.add(g.mul(colBlock, tile.getCols() / 32), g.mul(groupIndex, 2));
    // Tiles reach beyond the last panel, where the result is not written.
    panel = g.min(g.add(panel, panelInGroup), g.c(panels - 1));
    Value index = g.add(g.mul(g.add(g.mul(expert, panels), panel), 32), g.mul(half, 8));
    for (int64_t u = 0; u < 2; ++u)
      bias.push_back(g.loadF32(g.element(args[6], g.add(g.add(index, group), u * 16), 4)));
  }
  Value inThread = g.rem(thread, kGroup);
  for (int64_t piece = 0; piece < rows(); piece += kPiece) {
    int64_t count = std::min(kPiece, rows() - piece);
    for (int64_t j = piece / 8; j < (piece + count) / 8; ++j)
      for (int64_t e = 0; e < 2; ++e) {
        SmallVector<Value> values = {sums[j * 4 + e], sums[j * 4 + 2 + e]};
        if (spec.bias)
          for (auto [value, add] : llvm::zip_equal(values, bias))
            value = g.addf(value, add);
        for (int64_t u = 0; u < 2; u += parts()) {
          Value value = values[u];
          if (spec.epilogue) {
            SmallVector<Value> inputs;
            for (int64_t p = 0; p < parts(); ++p)
              inputs.push_back(g.toVector(values[u + p]));
            auto results = emitRegionOnVectors(g.b, *spec.epilogue, inputs);
            if (failed(results))
              return failure();
            value = g.fromVector((*results)[0]);
          }
          Value col = g.add(column, u * 16);
          // Padding of the result is zero whatever the activation makes of zero.
          if (spec.weight.getRows() < spec.colBlocks() * tile.getCols() / parts())
            value = g.select(g.less(g.add(firstCol, col), spec.weight.getRows()), value, g.f(0));
          Value row = g.add(g.mul(quad, 2), (j * 8 - piece) + e);
          g.store(g.roundBits(value), g.at(place, g.add(g.mul(row, pitch), g.mul(col, 2))), 2);
        }
      }
    groupBarrier(1);
    int64_t chunks = cols / 8;
    g.loop(inThread, g.c(count * chunks), g.c(kGroup), [&](Value q) {
      Value row = g.div(q, chunks), chunk = g.rem(q, chunks), inTile = g.add(row, piece);
      Value col = g.add(firstCol, g.mul(chunk, 8));
      g.ifThen(g.andi(g.less(inTile, rowCount), g.less(col, spec.resultWidth)), [&] {
        Value words = g.load(g.vec4(), g.at(place, g.add(g.mul(row, pitch), g.mul(chunk, 16))), 16);
        if (spec.add)
          return emitAddToSums(g, spec, args, g.add(firstRow, inTile), col, words);
        Value index = g.add(g.mul(g.wide(g.add(firstRow, inTile)), spec.resultWidth), g.wide(col));
        g.store(words, g.element(args[5], index, 2), 16);
      });
    });
    groupBarrier(1);
  }
  return success();
}

LogicalResult WgmmaEmitter::multiply() {
  bool good = true;
  forTiles({g.c(0), g.c(0)}, [&](ValueRange state) { return multiplyTile(state, good); });
  return success(good);
}

LogicalResult WgmmaEmitter::emit() {
  shared = LLVM::AddressOfOp::create(g.b, g.loc, g.ptr(3), kSharedName);
  thread = g.thread();
  lane = g.rem(thread, 32);
  // The same in all lanes, and said so: roles are whole warpgroups.
  warp = g.shuffle(NVVM::ShflKind::idx, g.div(thread, 32), g.c(0));
  g.ifThen(g.equal(thread, 0), [&] {
    for (int64_t s = 0; s < stages(); ++s) {
      // Four warps that fill and one thread that says how many bytes come; eight that multiply.
      NVVM::MBarrierInitOp::create(g.b, g.loc, full(g.c(s)), g.c(5), Value());
      NVVM::MBarrierInitOp::create(g.b, g.loc, empty(g.c(s)), g.c(8), Value());
    }
    NVVM::FenceMbarrierInitOp::create(g.b, g.loc);
  });
  g.barrier();
  auto registers = [&](int64_t count, NVVM::SetMaxRegisterAction action) {
    if (tile.movesRegisters())
      NVVM::SetMaxRegisterOp::create(g.b, g.loc, uint32_t(count), action);
  };
  LogicalResult result = success();
  g.ifThenElse(
      g.less(warp, 4),
      [&] {
        registers(kFillRegisters, NVVM::SetMaxRegisterAction::decrease);
        fill();
      },
      [&] {
        registers(kMultiplyRegisters, NVVM::SetMaxRegisterAction::increase);
        groupIndex = g.sub(g.div(warp, 4), g.c(1));
        result = multiply();
      });
  return result;
}

LogicalResult mlir::moe::emitWgmmaGemm(OpBuilder &b, LLVM::LLVMFuncOp kernel,
                                       const GemmKernel &spec) {
  return WgmmaEmitter(b, kernel, spec).emit();
}
