//===- KernelSpec.cpp - Levels, and what a matrix kernel is ---------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "KernelBuilder.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/Support/xxhash.h"

using namespace mlir;
using namespace mlir::moe;

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
  if (defer)
    name += llvm::formatv("_defer{0}", defer).str();
  if (nearRows)
    name += "_near";
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
  if (steps && (isWide() || panels != 1))
    return emitError(loc) << "kernel: expected steps with sums in f32 of one panel, but got "
                          << panels << (isWide() ? " and f64" : "");
  if (defer < 0 || defer > 8 || (defer && (!isTile() || !steps)) || (nearRows && !isTile()))
    return emitError(loc)
           << "kernel: expected defer in 0 to 8 and near rows with products of tiles "
              "alone, but got "
           << defer << (nearRows ? " and near rows" : "");
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
