//===- MoEAttrs.cpp - attributes of the moe dialect -----------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEAttrs.h"
#include "moe/Dialect/MoE/IR/MoEDialect.h"

#include "mlir/IR/Builders.h"
#include "llvm/ADT/TypeSwitch.h"
#include "llvm/Support/raw_ostream.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

using namespace mlir;
using namespace mlir::moe;

#include "moe/Dialect/MoE/IR/MoEEnums.cpp.inc"
#include "moe/Dialect/MoE/IR/MoEInterfaces.cpp.inc"

FailureOr<Real> moe::parseReal(AsmParser &parser) {
  double value;
  if (failed(parser.parseFloat(value)))
    return failure();
  return Real(value);
}

void moe::printReal(AsmPrinter &printer, Real real) {
  // The shortest digits that give the same double back, in the grammar of MLIR's float literals:
  // a decimal point is required.
  char text[40];
  for (int digits = 6; digits <= 17; ++digits) {
    std::snprintf(text, sizeof(text), "%.*g", digits, real.value);
    if (std::strtod(text, nullptr) == real.value)
      break;
  }
  StringRef number(text);
  size_t exponent = number.find('e');
  printer << number.take_front(exponent);
  if (!number.contains('.'))
    printer << ".0";
  if (exponent != StringRef::npos)
    printer << number.drop_front(exponent);
}

bool moe::isKnownLevel(StringRef level) {
  return level == kLevelV3 || level == kLevelV4 || level == kLevelAvx512Bf16 ||
         level == kLevelAmxBf16;
}

#define GET_ATTRDEF_CLASSES
#include "moe/Dialect/MoE/IR/MoEAttrs.cpp.inc"

void MoEDialect::registerAttributes() {
  addAttributes<
#define GET_ATTRDEF_LIST
#include "moe/Dialect/MoE/IR/MoEAttrs.cpp.inc"
      >();
}

//===----------------------------------------------------------------------===//
// Weight format and layout
//===----------------------------------------------------------------------===//

StringRef FormatAttr::getFormatName() const { return stringifyPlainFormat(getValue()); }
unsigned FormatAttr::getBitsPerElement() const { return getValue() == PlainFormat::F32 ? 32 : 16; }
int64_t FormatAttr::getGroupSize() const { return 1; }
Type FormatAttr::getStorageType() const {
  if (getValue() == PlainFormat::F32)
    return Float32Type::get(getContext());
  return BFloat16Type::get(getContext());
}
Type FormatAttr::getRegisterType() const { return Float32Type::get(getContext()); }

StringRef LayoutAttr::getLayoutName() const {
  return getValue() == PanelLayout::Panel32 ? "panel32-1" : "vector32-1";
}
int64_t LayoutAttr::getPanelWidth() const { return 32; }
int64_t LayoutAttr::getReductionMultiple() const {
  return getValue() == PanelLayout::Panel32 ? 32 : 1;
}

//===----------------------------------------------------------------------===//
// Router
//===----------------------------------------------------------------------===//

LogicalResult GroupsAttr::verify(function_ref<InFlightDiagnostic()> emitError, int64_t count,
                                 int64_t keep, GroupScore, GroupFill) {
  if (count < 1)
    return emitError() << "expected count of groups to be positive, but got " << count;
  if (keep < 1 || keep > count)
    return emitError() << "expected keep in [1, " << count << "], but got " << keep;
  return success();
}

LogicalResult RouterAttr::verify(function_ref<InFlightDiagnostic()> emitError, ScoreFunction,
                                 RouterOrder order, int64_t topK, Renormalize renormalize,
                                 Real epsilon, Real normP, Real scale, RouterPrecision, RouterInput,
                                 LogitTransformAttr logitTransform, Selection select,
                                 SelectionBias bias, GroupsAttr, int64_t extraRows,
                                 Real inputEpsilon, Real jitter, RouterArithmetic,
                                 RouterPrecision) {
  if (topK < 1)
    return emitError() << "expected top_k to be positive, but got " << topK;
  if (!(epsilon >= 0.0) || epsilon.value == HUGE_VAL)
    return emitError() << "expected epsilon to be finite and not negative, but got "
                       << epsilon.value;
  if (!(normP > 0.0) || normP.value == HUGE_VAL)
    return emitError() << "expected norm_p to be finite and positive, but got " << normP.value;
  if (!std::isfinite(scale.value))
    return emitError() << "expected scale to be finite, but got " << scale.value;
  if (logitTransform && !std::isfinite(logitTransform.getValue().value))
    return emitError() << "expected the constant of logit_transform to be finite, but got "
                       << logitTransform.getValue().value;
  if (extraRows < 0)
    return emitError() << "expected extra_rows to be at least 0, but got " << extraRows;
  std::pair<StringRef, double> thresholds[] = {{"input_epsilon", inputEpsilon}, {"jitter", jitter}};
  for (auto [name, value] : thresholds)
    if (!(value >= 0.0) || value == HUGE_VAL)
      return emitError() << "expected " << name << " to be finite and not negative, but got "
                         << value;
  if (bias == SelectionBias::Score && order != RouterOrder::ScoreThenSelect)
    return emitError() << "expected order = score_then_select with selection_bias = score, but got "
                       << stringifyRouterOrder(order);
  if (select == Selection::SparseMixer && topK != 2)
    return emitError() << "expected top_k = 2 with select = sparse_mixer, but got " << topK;
  return success();
}

RouterAttr RouterAttr::withPrecision(RouterPrecision precision) const {
  return get(getContext(), getScore(), getOrder(), getTopK(), getRenormalize(), getEpsilon(),
             getNormP(), getScale(), precision, getInput(), getLogitTransform(), getSelect(),
             getSelectionBias(), getGroups(), getExtraRows(), getInputEpsilon(), getJitter(),
             getModelArithmetic(), getWeightDtype());
}

std::string RouterAttr::getUnimplemented() const {
  std::string text;
  llvm::raw_string_ostream os(text);
  double p = getNormP();
  if (getScore() == ScoreFunction::SqrtSoftplus)
    os << "score = " << stringifyScoreFunction(getScore());
  else if (getRenormalize() == Renormalize::JointShared)
    os << "renormalize = " << stringifyRenormalize(getRenormalize());
  else if (getRenormalize() == Renormalize::LpNorm && p != 1.0 && p != 2.0)
    os << "norm_p = " << p;
  else if (getInput() == RouterInput::Mlp)
    os << "input = " << stringifyRouterInput(getInput());
  else if (getSelect() != Selection::TopK && getSelect() != Selection::SparseMixer)
    os << "select = " << stringifySelection(getSelect());
  else if (getExtraRows())
    os << "extra_rows = " << getExtraRows();
  return text;
}

//===----------------------------------------------------------------------===//
// Experts
//===----------------------------------------------------------------------===//

LogicalResult ClampAttr::verify(function_ref<InFlightDiagnostic()> emitError, ClampKind kind,
                                Real limit, Real alpha, Real upLimit) {
  if (!(limit > 0.0))
    return emitError() << "expected limit to be positive, but got " << limit.value;
  if (!std::isfinite(alpha.value))
    return emitError() << "expected alpha to be finite, but got " << alpha.value;
  if ((kind == ClampKind::Tanh) != (upLimit > 0.0) || upLimit < 0.0)
    return emitError() << "expected a positive up_limit with kind = tanh, and only there, but got "
                       << upLimit.value;
  return success();
}

LogicalResult ExpertAttr::verify(function_ref<InFlightDiagnostic()> emitError, ExpertForm form,
                                 Activation, ClampAttr clamp, bool, bool, int64_t latent) {
  if (clamp && form != ExpertForm::Glu)
    return emitError() << "expected form = glu with a clamp, but got " << stringifyExpertForm(form);
  if (latent < 0)
    return emitError() << "expected latent to be at least 0, but got " << latent;
  return success();
}

std::string ExpertAttr::getUnimplemented() const {
  std::string text;
  llvm::raw_string_ostream os(text);
  if (getNorm())
    os << "norm = true";
  else if (getLatent())
    os << "latent = " << getLatent();
  return text;
}

//===----------------------------------------------------------------------===//
// Symbols
//===----------------------------------------------------------------------===//

// #moe.source<"pattern"[, part = 1][, arrangement = stacked][, rows = [0, 8]][, transposed]
//             [, interleaved]>
Attribute SourceAttr::parse(AsmParser &parser, Type) {
  std::string pattern;
  int64_t part = 0;
  Arrangement arrangement = Arrangement::PerExpert;
  bool transposed = false, interleaved = false;
  SmallVector<int64_t, 2> rows;
  if (parser.parseLess() || parser.parseString(&pattern))
    return {};
  while (succeeded(parser.parseOptionalComma())) {
    SMLoc loc = parser.getCurrentLocation();
    StringRef key;
    if (parser.parseKeyword(&key))
      return {};
    if (key == "transposed") {
      transposed = true;
    } else if (key == "interleaved") {
      interleaved = true;
    } else if (key == "part") {
      if (parser.parseEqual() || parser.parseInteger(part))
        return {};
    } else if (key == "arrangement") {
      StringRef value;
      if (parser.parseEqual() || parser.parseKeyword(&value))
        return {};
      std::optional<Arrangement> symbol = symbolizeArrangement(value);
      if (!symbol) {
        parser.emitError(loc) << "expected arrangement to be per_expert or stacked, but got '"
                              << value << "'";
        return {};
      }
      arrangement = *symbol;
    } else if (key == "rows") {
      int64_t begin, end;
      if (parser.parseEqual() || parser.parseLSquare() || parser.parseInteger(begin) ||
          parser.parseComma() || parser.parseInteger(end) || parser.parseRSquare())
        return {};
      rows.assign({begin, end});
    } else {
      parser.emitError(loc) << "expected part, arrangement, rows, transposed or interleaved, but "
                               "got '"
                            << key << "'";
      return {};
    }
  }
  if (parser.parseGreater())
    return {};
  return parser.getChecked<SourceAttr>(parser.getContext(), pattern, part, arrangement, transposed,
                                       interleaved, rows);
}

void SourceAttr::print(AsmPrinter &printer) const {
  printer << "<";
  printer.printString(getPattern());
  if (getPart())
    printer << ", part = " << getPart();
  if (getArrangement() != Arrangement::PerExpert)
    printer << ", arrangement = " << stringifyArrangement(getArrangement());
  if (!getRows().empty())
    printer << ", rows = [" << getRows()[0] << ", " << getRows()[1] << "]";
  if (getTransposed())
    printer << ", transposed";
  if (getInterleaved())
    printer << ", interleaved";
  printer << ">";
}

LogicalResult SourceAttr::verify(function_ref<InFlightDiagnostic()> emitError, StringRef pattern,
                                 int64_t part, Arrangement, bool, bool, ArrayRef<int64_t> rows) {
  if (pattern.empty())
    return emitError() << "expected a tensor name, but got an empty string";
  if (part < 0)
    return emitError() << "expected part to be at least 0, but got " << part;
  if (!rows.empty() && rows.size() != 2)
    return emitError() << "expected rows to be [begin, end], but got " << rows.size() << " numbers";
  if (!rows.empty() && (rows[0] < 0 || rows[1] <= rows[0]))
    return emitError() << "expected rows to be [begin, end] with 0 <= begin < end, but got ["
                       << rows[0] << ", " << rows[1] << "]";
  return success();
}

LogicalResult DimsAttr::verify(function_ref<InFlightDiagnostic()> emitError, int64_t h, int64_t f,
                               int64_t e, int64_t k, int64_t s) {
  std::pair<StringRef, int64_t> dims[] = {{"H", h}, {"F", f}, {"E", e}, {"K", k}};
  for (auto [name, value] : dims)
    if (value < 1)
      return emitError() << "expected " << name << " to be positive, but got " << value;
  if (k > e)
    return emitError() << "expected K to be at most E = " << e << ", but got " << k;
  if (s < 0)
    return emitError() << "expected S to be at least 0, but got " << s;
  return success();
}

//===----------------------------------------------------------------------===//
// Decisions
//===----------------------------------------------------------------------===//

LogicalResult TargetAttr::verify(function_ref<InFlightDiagnostic()> emitError, Device device,
                                 StringRef level) {
  if (device == Device::CPU && !isKnownLevel(level))
    return emitError() << "expected level to be x86-64-v3, x86-64-v4, avx512-bf16 or amx-bf16, "
                          "but got \""
                       << level << "\"";
  return success();
}

std::pair<int64_t, int64_t> UkernelAttr::getRegisterFile(StringRef level) {
  if (level == kLevelV4 || level == kLevelAvx512Bf16 || level == kLevelAmxBf16)
    return {32, 16};
  if (level == kLevelV3)
    return {16, 8};
  return {0, 0};
}

int64_t UkernelAttr::getMaxPanels(StringRef level) { return level == kLevelV3 ? 2 : 4; }

int64_t UkernelAttr::getRegistersNeeded(int64_t rows, int64_t vectors, KernelOrder order) {
  return rows * vectors + (order == KernelOrder::BFirst ? vectors : rows) + 1;
}

int64_t UkernelAttr::getVectorsPerRow(StringRef level, int64_t panels, KernelProduct product) {
  int64_t vectors = panels * 32 / getRegisterFile(level).second;
  return product == KernelProduct::FmaF64 ? 2 * vectors : vectors;
}

int64_t UkernelAttr::getVectorsPerRow() const {
  return getVectorsPerRow(getLevel(), getPanels(), getProduct());
}

LogicalResult UkernelAttr::verify(function_ref<InFlightDiagnostic()> emitError, StringRef level,
                                  int64_t rows, int64_t panels, KernelOrder order, int64_t prefetch,
                                  KernelProduct product, int64_t ahead, int64_t kBlock,
                                  LoadHint hint, int64_t defer) {
  int64_t registers = getRegisterFile(level).first;
  if (!registers)
    return emitError() << "expected level of a micro-kernel to be x86-64-v3, x86-64-v4, "
                          "avx512-bf16 or amx-bf16, but got \""
                       << level << "\"";
  if (rows < 1 || rows > registers)
    return emitError() << "expected rows in [1, " << registers << "], but got " << rows;
  if (panels < 1 || panels > getMaxPanels(level))
    return emitError() << "expected panels in [1, " << getMaxPanels(level) << "] at " << level
                       << ", but got " << panels;
  bool tile = product == KernelProduct::TileBF16;
  if (tile && (level != kLevelAmxBf16 || (rows != 16 && rows != 32) || panels != 1))
    return emitError() << "expected product = tile_bf16 at level amx-bf16 with rows = 16 or 32 and "
                          "panels = 1, but got "
                       << level << ", rows = " << rows << ", panels = " << panels;
  int64_t needed = getRegistersNeeded(rows, getVectorsPerRow(level, panels, product), order);
  if (!tile && needed > registers)
    return emitError() << "expected a micro-kernel in the " << registers << " registers of "
                       << level << ", but got rows = " << rows << ", panels = " << panels
                       << ", order = " << stringifyKernelOrder(order) << ", which need " << needed;
  if (prefetch < 0 || prefetch > (1 << 20))
    return emitError() << "expected prefetch in [0, " << (1 << 20) << "] bytes, but got "
                       << prefetch;
  if (ahead < 0 || ahead > 32 || (ahead && 32 % ahead))
    return emitError() << "expected ahead to be 0 or a divisor of 32, but got " << ahead;
  if (ahead && panels != 1)
    return emitError() << "expected panels = 1 with ahead = " << ahead << ", but got " << panels;
  bool wide = product == KernelProduct::FmaF64;
  if (kBlock < 0 || kBlock > (1 << 20) || (kBlock && (wide || panels != 1)))
    return emitError() << "expected k_block in [0, " << (1 << 20)
                       << "], and 0 with product = fma_f64 or several panels, but got " << kBlock;
  if (hint != LoadHint::Near && !tile)
    return emitError() << "expected hint = near unless product = tile_bf16, but got "
                       << stringifyLoadHint(hint);
  if (defer < 0 || defer > 8 || (defer && (!tile || !kBlock || rows != 32)))
    return emitError()
           << "expected defer in [0, 8], and 0 unless product = tile_bf16, rows = 32 and "
              "k_block is not 0, but got defer = "
           << defer << ", rows = " << rows << ", k_block = " << kBlock;
  if (product == KernelProduct::DotBF16 && level != kLevelAvx512Bf16)
    return emitError() << "expected product = dot_bf16 at level avx512-bf16 only, but got "
                       << level;
  return success();
}

LogicalResult StrategyAttr::verify(function_ref<InFlightDiagnostic()> emitError,
                                   UkernelAttr ukernel, int64_t chunkRows, int64_t panelsPerTask,
                                   RowSource, ResultForm, int64_t sumRows, int64_t kChunk) {
  if (chunkRows < ukernel.getRows())
    return emitError() << "expected chunk_rows to be at least the micro-kernel's rows = "
                       << ukernel.getRows() << ", but got " << chunkRows;
  if (panelsPerTask < 1 || panelsPerTask % ukernel.getPanels())
    return emitError() << "expected panels_per_task to be a positive multiple of the "
                          "micro-kernel's panels = "
                       << ukernel.getPanels() << ", but got " << panelsPerTask;
  if (sumRows < 1 || sumRows > (1 << 24))
    return emitError() << "expected sum_rows in [1, " << (1 << 24) << "], but got " << sumRows;
  int64_t kBlock = ukernel.getKBlock();
  if (kChunk && (!kBlock || kChunk < 0 || kChunk % kBlock))
    return emitError() << "expected k_chunk to be 0 or a multiple of k_block = " << kBlock
                       << ", but got " << kChunk;
  return success();
}
