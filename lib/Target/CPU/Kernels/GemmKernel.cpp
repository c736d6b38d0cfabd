//===- GemmKernel.cpp - Matrix kernels of exact tile sizes ----------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelBuilder.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/IR/BuiltinOps.h"
#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/Support/xxhash.h"

#include <algorithm>

using namespace mlir;
using namespace mlir::moe;

//===----------------------------------------------------------------------===//
// Levels and specs
//===----------------------------------------------------------------------===//

std::optional<KernelLevel> moe::parseKernelLevel(StringRef level) {
  if (level == "x86-64-v3")
    return KernelLevel::V3;
  if (level == "x86-64-v4" || level == "avx512-bf16" || level == "amx-bf16")
    return KernelLevel::V4;
  return std::nullopt;
}

StringRef moe::getLevelName(KernelLevel level) {
  return level == KernelLevel::V3 ? "x86-64-v3" : "x86-64-v4";
}

int64_t moe::getLevelLanes(KernelLevel level) { return level == KernelLevel::V3 ? 8 : 16; }

int64_t moe::getLevelRegisters(KernelLevel level) { return level == KernelLevel::V3 ? 16 : 32; }

bool GemmKernelSpec::isBFirst() const {
  if (order == LoadOrder::Automatic)
    return rows >= panels * getVectorsPerPanel();
  return order == LoadOrder::BFirst;
}

int64_t GemmKernelSpec::getRegisters() const {
  int64_t vectors = panels * getVectorsPerPanel();
  return rows * vectors + (isBFirst() ? vectors : rows) + 1;
}

/// Sixteen hexadecimal digits that depend on the operations of the region alone.
static std::string hashRegion(Region &region) {
  std::string text;
  llvm::raw_string_ostream os(text);
  for (Operation &op : region.front()) {
    // Operations of a region print with the numbering of their parent; print each one as a
    // generic line of name, attributes and operand positions instead.
    os << op.getName() << op.getAttrDictionary();
    for (Type type : op.getResultTypes())
      os << " " << type;
    for (Value operand : op.getOperands()) {
      if (auto arg = dyn_cast<BlockArgument>(operand)) {
        os << " arg" << arg.getArgNumber();
      } else {
        Operation *def = operand.getDefiningOp();
        if (def->getBlock() == op.getBlock())
          os << " op" << std::distance(op.getBlock()->begin(), Block::iterator(def));
        else
          os << " " << def->getName() << def->getAttrDictionary();
      }
    }
    os << ";";
  }
  return llvm::utohexstr(llvm::xxh3_64bits(text), /*LowerCase=*/true, /*Width=*/16);
}

std::string GemmKernelSpec::getName() const {
  std::string word = isTile() ? "amx" : isDot() ? "dot" : level == KernelLevel::V3 ? "v3" : "v4";
  if (isWide())
    word += "_f64";
  std::string name =
      llvm::formatv("moe_gemm_{0}_r{1}_p{2}_{3}", word, rows, panels, bf16Weights ? "bf16" : "f32");
  if (prefetch)
    name += llvm::formatv("_pf{0}", prefetch).str();
  if (touchesAhead())
    name += llvm::formatv("_ah{0}", ahead).str();
  if (steps)
    name += "_steps";
  if (order != LoadOrder::Automatic)
    name += order == LoadOrder::BFirst ? "_bfirst" : "_afirst";
  switch (form) {
  case KernelForm::Blocked:
    name += "_blocked";
    break;
  case KernelForm::Rows:
    name += "_rows";
    break;
  case KernelForm::Combine:
    name += indexed ? "_combine" : "_add";
    // What is usual of the form needs no word.
    if (weighted != indexed)
      name += weighted ? "_weighted" : "_plain";
    if (scaled)
      name += "_scaled";
    break;
  }
  name += llvm::utostr(parts);
  if (form != KernelForm::Blocked || product != KernelProduct::Fma)
    name += bf16Result ? "_bf16" : "_f32";
  if (bias)
    name += "_bias";
  if (epilogue)
    name += (epilogueName.empty() ? "" : "_" + epilogueName) + "_" + hashRegion(*epilogue);
  return name;
}

LogicalResult GemmKernelSpec::verify(Location loc) const {
  if (rows < 1 || panels < 1 || panels > getMaxPanels(level))
    return emitError(loc) << "kernel: expected at least one row and 1 to " << getMaxPanels(level)
                          << " panels, but got " << rows << " rows and " << panels << " panels";
  if (!fitsRegisters())
    return emitError(loc) << "kernel: expected a tile within the " << getLevelRegisters(level)
                          << " vector registers of " << getLevelName(level) << ", but got " << rows
                          << " rows and " << panels * getVectorsPerPanel()
                          << " vectors, which need " << getRegisters()
                          << (isBFirst() ? " (b first)" : " (a first)");
  if (parts != 1 && parts != 2)
    return emitError(loc) << "kernel: expected 1 or 2 parts, but got " << parts;
  if (prefetch < 0)
    return emitError(loc) << "kernel: expected prefetch >= 0, but got " << prefetch;
  if (form == KernelForm::Combine && (parts != 1 || epilogue))
    return emitError(loc) << "kernel: expected one part and no region in the combine form, but "
                             "got "
                          << parts << (epilogue ? " parts and a region" : " parts");
  if (form == KernelForm::Blocked && parts != 1 && !epilogue)
    return emitError(loc) << "kernel: expected a region to merge the parts of the blocked form, "
                             "but got none";
  if (ahead < 0 || ahead > 32 || (ahead && panels != 1))
    return emitError(loc) << "kernel: expected ahead in 0 to 32 with one panel, but got " << ahead
                          << " and " << panels << " panels";
  if (steps && !isTile())
    return emitError(loc) << "kernel: expected products of tiles in steps, but got others";
  bool pairs = UkernelAttr::readsPairs(product);
  if (isTile() && ((rows != 16 && rows != 32) || panels != 1))
    return emitError(loc) << "kernel: expected 16 or 32 rows and one panel for products of tiles, "
                             "but got "
                          << rows << " and " << panels;
  if (isTile() && form == KernelForm::Blocked && !bf16Result)
    return emitError(loc) << "kernel: expected a result of bf16 in the blocked form of tiles, but "
                             "got f32";
  if (pairs && (level != KernelLevel::V4 || !bf16Weights))
    return emitError(loc) << "kernel: expected x86-64-v4 and weights of bf16 for products of bf16, "
                             "but got "
                          << getLevelName(level) << " and " << (bf16Weights ? "bf16" : "f32");
  if (isWide() && (form != KernelForm::Rows || epilogue || bf16Weights))
    return emitError(loc)
           << "kernel: expected weights of f32 and rows without a region for sums in "
              "f64, but got another kernel";
  if (form == KernelForm::Blocked && bf16Result && !pairs)
    return emitError(loc) << "kernel: expected f32 in the blocked form of multiply-adds, but got "
                             "bf16";
  if (form == KernelForm::Blocked && bf16Result && parts == 2 && panels > 1 && panels % 2)
    return emitError(loc) << "kernel: expected 1 or an even number of panels of 16 columns in a "
                             "blocked result of bf16, but got "
                          << panels;
  if (epilogue) {
    bool valid = epilogue->hasOneBlock() && epilogue->getNumArguments() == parts &&
                 epilogue->front().getTerminator()->getNumOperands() == 1;
    for (Value arg : epilogue->getArguments())
      valid &= arg.getType().isF32();
    if (!valid)
      return emitError(loc) << "kernel: expected an epilogue of one block with " << parts
                            << " f32 arguments and one f32 result, but got another region";
  }
  return success();
}

//===----------------------------------------------------------------------===//
// KernelBuilder
//===----------------------------------------------------------------------===//

func::FuncOp KernelBuilder::start(StringRef name, KernelLevel level, ArrayRef<Type> args,
                                  StringRef features) {
  MLIRContext *context = b.getContext();
  auto function = func::FuncOp::create(b, loc, name, b.getFunctionType(args, {}));
  function.setPrivate();
  function->setAttr("llvm.linkage", LLVM::LinkageAttr::get(context, LLVM::Linkage::Internal));
  function->setAttr("target_cpu", b.getStringAttr(getLevelName(level)));
  if (!features.empty()) {
    SmallVector<StringRef> names;
    features.split(names, ',');
    function->setAttr("target_features", LLVM::TargetFeaturesAttr::get(context, names));
  }
  // The scheduler models of most CPUs move loads up for their latency; this one keeps the emitted
  // order, which is what fits the registers. The instructions are those of the level.
  function->setAttr("tune_cpu", b.getStringAttr("znver3"));
  if (level == KernelLevel::V4)
    function->setAttr("prefer_vector_width", b.getStringAttr("512"));
  // Inlined into a task, a kernel would lose its registers to the task's own values.
  function->setAttr("passthrough",
                    b.getArrayAttr({b.getStringAttr("noinline"), b.getStringAttr("nounwind")}));
  saved = b.saveInsertionPoint();
  b.setInsertionPointToStart(function.addEntryBlock());
  return function;
}

void KernelBuilder::finish() {
  func::ReturnOp::create(b, loc, ValueRange{});
  b.restoreInsertionPoint(saved);
}

//===----------------------------------------------------------------------===//
// The k loop
//===----------------------------------------------------------------------===//

namespace {

/// Emits one GEMM kernel.
class GemmEmitter {
public:
  GemmEmitter(OpBuilder &b, Location loc, const GemmKernelSpec &spec)
      : k(b, loc), spec(spec), lanes(spec.getLanes()), panelVectors(spec.getVectorsPerPanel()),
        vectors(spec.panels * panelVectors) {}

  FailureOr<func::FuncOp> emit();

private:
  SmallVector<Value> emitProduct();
  void emitTiles();
  SmallVector<Value> emitSteps(Value a, Value bRow, int64_t steps, SmallVector<Value> acc);
  Value loadA(Value a, int64_t row, int64_t step);
  Value loadB(ArrayRef<Value> panelRows, int64_t vector, bool odd);
  Value product(Value a, Value b, Value acc);
  LogicalResult forEachRow(ArrayRef<Value> acc,
                           function_ref<LogicalResult(Value, ArrayRef<Value>)> store);
  SmallVector<Value> addBias(ArrayRef<Value> acc);
  FailureOr<Value> applyEpilogue(ArrayRef<Value> acc, int64_t p, int64_t s);
  /// Whether the kernel writes half of a group and may have to zero the other half.
  bool fillsGroup() const {
    return spec.form == KernelForm::Blocked && spec.bf16Result && spec.panels == 1 &&
           spec.parts == 2;
  }
  LogicalResult storeBlocked(Value row, ArrayRef<Value> acc);
  LogicalResult storeRows(Value row, ArrayRef<Value> acc, bool whole);
  Value realLanes(int64_t column, Value limit);
  LogicalResult storeCombine(Value row, ArrayRef<Value> acc);

  /// Keeps the odd k of pairs.
  Value highMask() { return splatI32(k.b, k.loc, lanes, static_cast<int32_t>(0xffff0000)); }
  /// Steps of k that a row of 128 bytes of the panel takes.
  int64_t stepsPerRow() const {
    return spec.bf16Weights && spec.product == KernelProduct::Fma ? 2 : 1;
  }
  /// Output columns of a panel, and the vectors that hold them (parts merged).
  int64_t panelColumns() const { return 32 / spec.parts; }
  int64_t outVectors() const { return panelVectors / spec.parts; }

  KernelBuilder k;
  const GemmKernelSpec &spec;
  int64_t lanes, panelVectors, vectors;
  Value aBlock, bPanels, groups, panelBytes, out, bias, stack, maskSlot;
  Value realRows;           // of a block of tiles
  Value firstStep, endStep; // of a call that makes some of the steps; else null
  SmallVector<Value> formArgs;
};

} // namespace

/// Element `step` of a row of the group at `a` in every lane: one k in f32, or a pair of bf16.
Value GemmEmitter::loadA(Value a, int64_t row, int64_t step) {
  OpBuilder &b = k.b;
  Type element = spec.isDot() ? Type(b.getI32Type()) : b.getF32Type();
  Value scalar = k.load(element, k.at(a, row * 64 + step * 4));
  if (spec.isWide()) {
    element = b.getF64Type();
    scalar = arith::ExtFOp::create(b, k.loc, element, scalar);
  }
  Value v = vector::BroadcastOp::create(b, k.loc, k.vec(lanes, element), scalar);
  return spec.isDot() ? vector::BitCastOp::create(b, k.loc, k.vec(2 * lanes, b.getBF16Type()), v)
                      : v;
}

/// acc + a * b, for each of a pair in turn.
Value GemmEmitter::product(Value av, Value bv, Value acc) {
  OpBuilder &b = k.b;
  if (!spec.isDot())
    return vector::FMAOp::create(b, k.loc, av, bv, acc);
  return LLVM::CallIntrinsicOp::create(b, k.loc, acc.getType(),
                                       b.getStringAttr("llvm.x86.avx512bf16.dpbf16ps.512"),
                                       ValueRange{acc, av, bv})
      .getResult(0);
}

/// Vector `vector` of one row of the panels: one k of f32 weights, a row of bf16 pairs, or its even
/// or odd k as f32.
Value GemmEmitter::loadB(ArrayRef<Value> panelRows, int64_t vector, bool odd) {
  OpBuilder &b = k.b;
  Value p = k.at(panelRows[vector / panelVectors], (vector % panelVectors) * lanes * 4);
  if (spec.isDot())
    return k.load(k.vec(2 * lanes, b.getBF16Type()), p);
  if (!spec.bf16Weights) {
    Value v = k.load(k.vec(lanes, b.getF32Type()), p);
    if (spec.isWide())
      v = arith::ExtFOp::create(b, k.loc, k.vec(lanes, b.getF64Type()), v);
    return v;
  }
  Value pairs = k.load(k.vec(lanes, b.getI32Type()), p);
  if (!odd)
    return k.widenBits(pairs);
  Value mask = maskSlot ? LLVM::LoadOp::create(b, k.loc, k.vec(lanes, b.getI32Type()), maskSlot,
                                               /*alignment=*/64, /*isVolatile=*/true)
                              .getResult()
                        : highMask();
  Value high = arith::AndIOp::create(b, k.loc, pairs, mask);
  return vector::BitCastOp::create(b, k.loc, k.vec(lanes, b.getF32Type()), high);
}

/// Steps of k for `steps` rows of b: acc[r][v] += a[r] * b[v]. `a` points at element (0, k) of a
/// group of the block, `bRow` at the first row of the first panel. The order of emission is what
/// keeps the registers: the fewer of the two operands is held whole, the other passes through one
/// register.
SmallVector<Value> GemmEmitter::emitSteps(Value a, Value bRow, int64_t steps,
                                          SmallVector<Value> acc) {
  OpBuilder &b = k.b;
  int64_t halves = stepsPerRow();
  auto barrier = [&] {
    LLVM::FenceOp::create(b, k.loc, LLVM::AtomicOrdering::acq_rel, "singlethread");
  };
  // Within a step as many loads may move up as there are free registers; a widened load takes two.
  int64_t free = getLevelRegisters(spec.level) - spec.getRegisters();
  int64_t ahead = std::max<int64_t>(1, free / 2);
  for (int64_t row = 0; row < steps; ++row) {
    SmallVector<Value> panelRows;
    for (int64_t p = 0; p < spec.panels; ++p) {
      Value panel = p ? k.at(bRow, k.mul(panelBytes, p)) : bRow;
      panelRows.push_back(k.at(panel, row * 128));
    }
    if (spec.prefetch)
      for (Value panelRow : panelRows)
        for (int64_t line : {0, 64})
          k.prefetch(k.at(panelRow, spec.prefetch + line), spec.prefetchesL2());
    for (int64_t half = 0; half < halves; ++half) {
      int64_t step = row * halves + half;
      // Steps are separated by a barrier: it emits no instruction and keeps the scheduler from
      // moving the next step's loads up, into registers that the tile has not got. The odd half of
      // a bf16 row therefore loads its pairs again instead of holding them.
      if (step)
        barrier();
      auto fma = [&](int64_t r, int64_t v, Value av, Value bv) {
        Value &c = acc[r * vectors + v];
        c = product(av, bv, c);
      };
      if (spec.isBFirst()) {
        SmallVector<Value> bv;
        for (int64_t v = 0; v < vectors; ++v)
          bv.push_back(loadB(panelRows, v, half));
        for (int64_t r = 0; r < spec.rows; ++r) {
          if (r && r % ahead == 0)
            barrier();
          Value av = loadA(a, r, step);
          for (int64_t v = 0; v < vectors; ++v)
            fma(r, v, av, bv[v]);
        }
      } else {
        SmallVector<Value> av;
        for (int64_t r = 0; r < spec.rows; ++r)
          av.push_back(loadA(a, r, step));
        for (int64_t v = 0; v < vectors; ++v) {
          if (v && v % ahead == 0)
            barrier();
          Value bv = loadB(panelRows, v, half);
          for (int64_t r = 0; r < spec.rows; ++r)
            fma(r, v, av[r], bv);
        }
      }
    }
  }
  return acc;
}

/// The accumulators of the tile, row by row: a loop over the groups of columns of a, and in it
/// a loop over the group's rows of b unless they are unrolled whole.
SmallVector<Value> GemmEmitter::emitProduct() {
  OpBuilder &b = k.b;
  int64_t stepsPerRow = this->stepsPerRow(), groupRows = 16 / stepsPerRow;
  // About 48 multiply-adds per loop body: the counter and the branch are then noise, and the body
  // stays within the cache of decoded instructions.
  int64_t unroll = 1;
  while (unroll < groupRows && unroll * stepsPerRow * spec.rows * vectors < 48)
    unroll *= 2;

  Type element = spec.isWide() ? b.getF64Type() : b.getF32Type();
  Value zero = arith::ConstantOp::create(b, k.loc, b.getZeroAttr(k.vec(lanes, element)));
  SmallVector<Value> init(spec.rows * vectors, zero);
  // Lines of the next task's weights, each the next one of a run as long as there are groups.
  Value next, run;
  if (spec.touchesAhead()) {
    next = k.at(bPanels, panelBytes);
    run = k.mul(groups, 64);
  }
  auto body = [&](Value group, ValueRange acc) -> SmallVector<Value> {
    Value a = k.at(aBlock, k.mul(group, spec.rows * 64));
    Value bRow = k.at(bPanels, k.mul(group, groupRows * 128));
    if (spec.touchesAhead()) {
      Value line = k.at(next, k.mul(group, 64));
      for (int64_t i = 0; i < spec.ahead; ++i, line = k.at(line, run))
        k.prefetch(line, /*second=*/true);
    }
    if (unroll == groupRows)
      return emitSteps(a, bRow, unroll, SmallVector<Value>(acc));
    return k.loop(
        k.index(groupRows), unroll, acc, [&](Value row, ValueRange inner) -> SmallVector<Value> {
          return emitSteps(k.at(a, k.mul(row, stepsPerRow * 4)), k.at(bRow, k.mul(row, 128)),
                           unroll, SmallVector<Value>(inner));
        });
  };
  SmallVector<Value> sums = k.loop(groups, 1, init, body);
  if (spec.isWide()) {
    sums = addBias(sums);
    for (Value &sum : sums)
      sum = arith::TruncFOp::create(b, k.loc, k.vec(lanes, b.getF32Type()), sum);
  }
  return sums;
}

/// The sums of a block of up to 16 or 32 rows into `stack`, rows of 32 columns: one or two tiles of
/// rows (4, 5) by the two tiles of a panel (6, 7) into the sums (0 to 3). Tiles have fixed numbers,
/// so there is nothing to allocate and nothing to spill.
///
/// The weights are wanted from the second cache. A kernel of one tile of rows reads its panel once
/// and prefetches it `prefetch` bytes ahead. One of two tiles touches the weights that come later,
/// `ahead` lines at each step, each the next one of a run of its own: walked line by line a
/// prefetch holds the buffers that the loads of tiles wait for, while the hardware's streams follow
/// 32 slow ones (measured by hand on a machine with AMX: a third at 64 to 128 rows).
void GemmEmitter::emitTiles() {
  OpBuilder &b = k.b;
  int64_t high = spec.rows / 16;
  auto call = [&](StringRef name, ArrayRef<int64_t> tiles, ValueRange rest = {}) {
    SmallVector<Value> args;
    for (int64_t tile : tiles)
      args.push_back(LLVM::ConstantOp::create(b, k.loc, b.getI8Type(), b.getI8IntegerAttr(tile)));
    llvm::append_range(args, rest);
    LLVM::CallIntrinsicOp::create(b, k.loc, b.getStringAttr("llvm.x86." + name), args);
  };
  auto load = [&](StringRef name, int64_t tile, Value from, int64_t stride) {
    call(name, {tile}, {from, k.index(stride)});
  };
  auto place = [&](int64_t sum) { return k.at(stack, sum / 2 * 16 * 128 + sum % 2 * 64); };
  auto zeroAll = [&] {
    for (int64_t sum = 0; sum < 2 * high; ++sum)
      call("tilezero", {sum});
  };
  if (firstStep)
    k.ifThenElse(k.less(firstStep, k.index(1)), zeroAll, [&] {
      for (int64_t sum = 0; sum < 2 * high; ++sum)
        load("tileloaddt164", sum, place(sum), 128);
    });
  else
    zeroAll();
  Value aBytes = k.mul(realRows, 64), next = k.at(bPanels, panelBytes);
  Value run = k.mul(groups, 64);
  k.loop(firstStep ? k.sub(endStep, firstStep) : groups, 1, [&](Value step) {
    if (firstStep)
      step = k.add(step, firstStep);
    Value a = k.at(aBlock, k.mul(step, aBytes)), w = k.at(bPanels, k.mul(step, 2048));
    if (spec.prefetch && high == 1) {
      for (int64_t line = 0; line < 2048; line += 64)
        k.prefetch(k.at(w, spec.prefetch + line), /*second=*/true);
    } else if (spec.touchesAhead()) {
      Value line = k.at(next, k.mul(step, 64));
      for (int64_t i = 0; i < spec.ahead; ++i, line = k.at(line, run))
        k.prefetch(line, /*second=*/true);
    }
    // Rows by the hint of streams: they come from the second cache and need not evict the weights.
    load("tileloaddt164", 4, a, 64);
    load("tileloadd64", 6, w, 128);
    call("tdpbf16ps", {0, 4, 6});
    load("tileloadd64", 7, k.at(w, 64), 128);
    call("tdpbf16ps", {1, 4, 7});
    if (high == 2) {
      load("tileloaddt164", 5, k.at(a, 16 * 64), 64);
      call("tdpbf16ps", {2, 5, 6});
      call("tdpbf16ps", {3, 5, 7});
    }
  });
  for (int64_t sum = 0; sum < 2 * high; ++sum)
    load("tilestored64", sum, place(sum), 128);
}

StringRef moe::getTileFrameName(bool begin) {
  return begin ? "moe_tiles_begin_amx" : "moe_tiles_end_amx";
}

func::FuncOp moe::emitTileFrame(OpBuilder &b, Location loc, bool begin) {
  KernelBuilder k(b, loc);
  func::FuncOp function =
      k.start(getTileFrameName(begin), KernelLevel::V4, {}, "+amx-tile,+amx-bf16");
  if (begin) {
    // Palette 1; bytes of a row of each tile as i16 from byte 16 on, rows as i8 from byte 48 on.
    Value config = LLVM::AllocaOp::create(b, loc, k.ptr(), b.getI8Type(), k.index(64), 64);
    k.store(splatI32(b, loc, 16, 0), config);
    k.store(k.int32(1), config);
    k.store(splatI32(b, loc, 4, 64 << 16 | 64), k.at(config, 16));
    k.store(splatI32(b, loc, 2, 0x10101010), k.at(config, 48));
    LLVM::CallIntrinsicOp::create(b, loc, b.getStringAttr("llvm.x86.ldtilecfg"), config);
  } else {
    LLVM::CallIntrinsicOp::create(b, loc, b.getStringAttr("llvm.x86.tilerelease"), ValueRange{});
  }
  k.finish();
  return function;
}

//===----------------------------------------------------------------------===//
// Stores
//===----------------------------------------------------------------------===//

/// Vector s of the merged columns of panel p of one row.
FailureOr<Value> GemmEmitter::applyEpilogue(ArrayRef<Value> acc, int64_t p, int64_t s) {
  SmallVector<Value> parts;
  for (int64_t part = 0; part < spec.parts; ++part)
    parts.push_back(acc[p * panelVectors + part * outVectors() + s]);
  if (!spec.epilogue)
    return parts.front();
  FailureOr<SmallVector<Value>> results = emitRegionOnVectors(k.b, *spec.epilogue, parts);
  if (failed(results))
    return failure();
  return results->front();
}

/// Vectors of whole rows with the bias of their lanes.
SmallVector<Value> GemmEmitter::addBias(ArrayRef<Value> acc) {
  SmallVector<Value> sums(acc);
  if (!spec.bias)
    return sums;
  for (auto [v, sum] : llvm::enumerate(sums)) {
    // Panels of 32 lanes follow each other, in the order of the panel's own lanes.
    int64_t vector = static_cast<int64_t>(v) % vectors;
    Value lane = k.load(k.vec(lanes, k.b.getF32Type()), k.at(bias, vector * lanes * 4));
    if (spec.isWide())
      lane = arith::ExtFOp::create(k.b, k.loc, sum.getType(), lane);
    sum = arith::AddFOp::create(k.b, k.loc, sum, lane);
  }
  return sums;
}

/// Runs `store` on every row's vectors, bias added. The accumulators go through the stack and the
/// rows through a loop: unrolled, the epilogue's constants would be kept in registers across the k
/// loop, which has none to spare, and its code would be `rows` times as long. The copy costs one
/// store and one load per vector and whole product.
LogicalResult GemmEmitter::forEachRow(ArrayRef<Value> acc,
                                      function_ref<LogicalResult(Value, ArrayRef<Value>)> store) {
  // A bias of sums in f64 was added before they were rounded.
  auto biased = [&](ArrayRef<Value> row) {
    return spec.isWide() ? SmallVector<Value>(row) : addBias(row);
  };
  if (spec.rows == 1)
    return store(k.index(0), biased(acc));
  int64_t rowBytes = vectors * lanes * 4;
  Value rows = spec.isTile() ? realRows : k.index(spec.rows);
  for (auto [i, v] : llvm::enumerate(acc))
    k.store(v, k.at(stack, static_cast<int64_t>(i) * lanes * 4));
  LogicalResult result = success();
  k.loop(rows, 1, [&](Value row) {
    Value from = k.at(stack, k.mul(row, rowBytes));
    SmallVector<Value> loaded;
    for (int64_t v = 0; v < vectors; ++v)
      loaded.push_back(k.load(k.vec(lanes, k.b.getF32Type()), k.at(from, v * lanes * 4)));
    result = store(row, biased(loaded));
  });
  return result;
}

/// The i1 vector of the lanes whose column, counted from `column`, is below the i64 `limit`.
Value GemmEmitter::realLanes(int64_t column, Value limit) {
  OpBuilder &b = k.b;
  Value clamped = arith::TruncIOp::create(
      b, k.loc, b.getI32Type(),
      arith::MinSIOp::create(b, k.loc, limit, k.index(spec.panels * panelColumns())));
  SmallVector<int32_t> numbers;
  for (int64_t l = 0; l < lanes; ++l)
    numbers.push_back(static_cast<int32_t>(column + l));
  Value number = arith::ConstantOp::create(
      b, k.loc,
      DenseIntElementsAttr::get(k.vec(lanes, b.getI32Type()), ArrayRef<int32_t>(numbers)));
  return arith::CmpIOp::create(
      b, k.loc, arith::CmpIPredicate::slt, number,
      vector::BroadcastOp::create(b, k.loc, k.vec(lanes, b.getI32Type()), clamped));
}

LogicalResult GemmEmitter::storeBlocked(Value row, ArrayRef<Value> acc) {
  OpBuilder &b = k.b;
  // Lanes beyond the real columns become zero: their products may be NaN (inf times the zero
  // padding of the weights), and the next product would spread it over the row.
  Value zero = splatF32(b, k.loc, lanes, 0.0f);
  Value to = k.at(out, k.mul(row, 64));
  int64_t group = spec.bf16Result ? 32 : 16; // columns in 64 bytes
  for (int64_t p = 0; p < spec.panels; ++p)
    for (int64_t s = 0; s < outVectors(); ++s) {
      int64_t column = p * panelColumns() + s * lanes;
      Value real = realLanes(column, formArgs[0]);
      FailureOr<Value> value = applyEpilogue(acc, p, s);
      if (failed(value))
        return failure();
      Value masked = arith::SelectOp::create(b, k.loc, real, *value, zero);
      k.storeF32(masked,
                 k.at(to, (column / group) * spec.rows * 64 + (column % group) * (64 / group)),
                 spec.bf16Result);
    }
  if (fillsGroup()) {
    Value fill = arith::CmpIOp::create(b, k.loc, arith::CmpIPredicate::ne, formArgs[1], k.index(0));
    k.ifThen(fill, [&] { k.store(splatI32(b, k.loc, 8, 0), k.at(to, 32)); });
  }
  return success();
}

/// Stores a row; `whole` says that all columns of the tile are real, otherwise those beyond the
/// limit are left alone.
LogicalResult GemmEmitter::storeRows(Value row, ArrayRef<Value> acc, bool whole) {
  OpBuilder &b = k.b;
  int64_t elementBytes = spec.bf16Result ? 2 : 4;
  int64_t outParts = spec.epilogue ? 1 : spec.parts;
  Value to = k.at(out, k.mul(row, formArgs[0]));
  for (int64_t part = 0; part < outParts; ++part) {
    Value base = part ? k.at(to, formArgs[1]) : to;
    for (int64_t p = 0; p < spec.panels; ++p)
      for (int64_t s = 0; s < outVectors(); ++s) {
        FailureOr<Value> value = acc[p * panelVectors + part * outVectors() + s];
        if (spec.epilogue)
          value = applyEpilogue(acc, p, s);
        if (failed(value))
          return failure();
        int64_t column = p * panelColumns() + s * lanes;
        Value address = k.at(base, column * elementBytes);
        if (whole) {
          k.storeF32(*value, address, spec.bf16Result);
          continue;
        }
        Value stored = *value;
        if (spec.bf16Result)
          stored = arith::TruncIOp::create(b, k.loc, k.vec(lanes, b.getI16Type()),
                                           emitRoundToBF16Bits(b, k.loc, stored));
        LLVM::MaskedStoreOp::create(b, k.loc, stored, address, realLanes(column, formArgs[2]),
                                    elementBytes);
      }
  }
  return success();
}

/// Rows come in order and each read-modify-write is done before the next: a caller may give one
/// expert twice to one token.
LogicalResult GemmEmitter::storeCombine(Value row, ArrayRef<Value> acc) {
  OpBuilder &b = k.b;
  ArrayRef<Value> args = formArgs;
  auto next = [&] {
    Value arg = args.front();
    args = args.drop_front();
    return arg;
  };
  Value scratchBytes = next(), token = row, number = row;
  Value pairs = spec.indexed ? next() : Value(), weights = spec.weighted ? next() : Value();
  if (spec.indexed) {
    Value slots = arith::TruncIOp::create(b, k.loc, b.getI32Type(), next());
    Value pair = k.load(b.getI32Type(), k.at(pairs, k.mul(row, 4)));
    number = arith::ExtUIOp::create(b, k.loc, k.i64(), pair);
    token =
        arith::ExtUIOp::create(b, k.loc, k.i64(), arith::DivUIOp::create(b, k.loc, pair, slots));
  }
  Value to = k.at(out, k.mul(token, 128)), scalar;
  if (spec.weighted)
    scalar = k.load(b.getF32Type(), k.at(weights, k.mul(number, 4)));
  if (spec.scaled)
    scalar = scalar ? arith::MulFOp::create(b, k.loc, scalar, next()).getResult() : next();
  Value w = scalar ? vector::BroadcastOp::create(b, k.loc, k.vec(lanes, b.getF32Type()), scalar)
                   : splatF32(b, k.loc, lanes, 1.0f);
  for (int64_t v = 0; v < vectors; ++v) {
    Value panel = v < panelVectors ? to : k.at(to, k.mul(scratchBytes, v / panelVectors));
    Value p = k.at(panel, (v % panelVectors) * lanes * 4);
    Value value = acc[v];
    if (spec.bf16Result)
      value = emitRoundToBF16(b, k.loc, value);
    Value y = k.load(k.vec(lanes, b.getF32Type()), p);
    k.store(vector::FMAOp::create(b, k.loc, w, value, y), p);
  }
  return success();
}

FailureOr<func::FuncOp> GemmEmitter::emit() {
  if (failed(spec.verify(k.loc)))
    return failure();
  Type ptr = k.ptr(), i64 = k.i64();
  SmallVector<Type> args = {ptr, ptr, i64, i64, ptr};
  if (spec.isTile())
    args.push_back(i64);
  if (spec.bias)
    args.push_back(ptr);
  unsigned formArg = args.size();
  switch (spec.form) {
  case KernelForm::Blocked:
    args.append(fillsGroup() ? 2 : 1, i64);
    break;
  case KernelForm::Rows:
    args.append({i64, i64, i64});
    break;
  case KernelForm::Combine:
    args.push_back(i64);
    if (spec.indexed)
      args.push_back(ptr);
    if (spec.weighted)
      args.push_back(ptr);
    if (spec.indexed)
      args.push_back(i64);
    if (spec.scaled)
      args.push_back(k.b.getF32Type());
    break;
  }
  if (spec.steps)
    args.append({i64, i64, ptr});
  func::FuncOp function = k.start(spec.getName(), spec.level, args, spec.getFeatures());
  aBlock = function.getArgument(0);
  bPanels = function.getArgument(1);
  groups = function.getArgument(2);
  panelBytes = function.getArgument(3);
  out = function.getArgument(4);
  if (spec.isTile())
    realRows = function.getArgument(5);
  if (spec.bias)
    bias = function.getArgument(formArg - 1);
  for (unsigned i = formArg; i < args.size() - (spec.steps ? 3 : 0); ++i)
    formArgs.push_back(function.getArgument(i));
  if (spec.steps) {
    firstStep = function.getArgument(args.size() - 3);
    endStep = function.getArgument(args.size() - 2);
    stack = function.getArgument(args.size() - 1);
  }

  if (spec.rows > 1 && !stack)
    stack = LLVM::AllocaOp::create(k.b, k.loc, ptr, k.b.getF32Type(),
                                   k.index(spec.rows * vectors * lanes), 64);
  // A tile that fills the registers has none for the mask of odd k. It is then read from the stack
  // at every use (volatile: the compiler would keep it in a register, and spill an accumulator).
  // AVX2 code widens into a second register, so it runs out earlier.
  int64_t spare = spec.level == KernelLevel::V3 ? 6 : spec.isBFirst();
  if (stepsPerRow() == 2 && spec.getRegisters() + spare >= getLevelRegisters(spec.level)) {
    maskSlot = LLVM::AllocaOp::create(k.b, k.loc, ptr, k.b.getF32Type(), k.index(lanes), 64);
    k.store(highMask(), maskSlot);
  }
  SmallVector<Value> acc;
  if (spec.isTile())
    emitTiles();
  else
    acc = emitProduct();
  LogicalResult stored = success();
  auto storeAll = [&](bool whole) {
    LogicalResult result = forEachRow(acc, [&](Value row, ArrayRef<Value> rowAcc) {
      switch (spec.form) {
      case KernelForm::Blocked:
        return storeBlocked(row, rowAcc);
      case KernelForm::Rows:
        return storeRows(row, rowAcc, whole);
      case KernelForm::Combine:
        return storeCombine(row, rowAcc);
      }
      llvm_unreachable("all forms are handled");
    });
    if (failed(result))
      stored = failure();
  };
  auto leave = [&] {
    if (spec.form == KernelForm::Rows) {
      Value cut = k.less(formArgs[2], k.index(spec.panels * panelColumns()));
      k.ifThenElse(cut, [&] { storeAll(false); }, [&] { storeAll(true); });
    } else {
      storeAll(true);
    }
  };
  if (spec.steps)
    k.ifThen(arith::CmpIOp::create(k.b, k.loc, arith::CmpIPredicate::eq, endStep, groups), leave);
  else
    leave();
  k.finish();
  if (failed(stored)) {
    function.erase();
    return failure();
  }
  return function;
}

FailureOr<func::FuncOp> moe::emitGemmKernel(OpBuilder &b, Location loc,
                                            const GemmKernelSpec &spec) {
  return GemmEmitter(b, loc, spec).emit();
}
