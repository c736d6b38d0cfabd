//===- MoETypes.cpp - types of the moe dialect ----------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoETypes.h"
#include "moe/Dialect/MoE/IR/MoEDialect.h"

#include "mlir/IR/Builders.h"
#include "llvm/ADT/TypeSwitch.h"
#include "llvm/Support/MathExtras.h"

using namespace mlir;
using namespace mlir::moe;

#define GET_TYPEDEF_CLASSES
#include "moe/Dialect/MoE/IR/MoETypes.cpp.inc"

void MoEDialect::registerTypes() {
  addTypes<
#define GET_TYPEDEF_LIST
#include "moe/Dialect/MoE/IR/MoETypes.cpp.inc"
      >();
}

// !moe.weight<64x2x1024x2048xbf16, panel32>; a format or layout without a short name is written as
// an attribute.
Type WeightType::parse(AsmParser &parser) {
  SmallVector<int64_t, 4> dims;
  MLIRContext *context = parser.getContext();
  if (parser.parseLess())
    return {};
  SMLoc loc = parser.getCurrentLocation();
  if (parser.parseDimensionList(dims, /*allowDynamic=*/false, /*withTrailingX=*/true))
    return {};
  if (dims.size() != 4) {
    parser.emitError(loc) << "expected a weight of 4 dimensions (experts, parts, rows, columns), "
                             "but got "
                          << dims.size();
    return {};
  }

  StringRef keyword;
  WeightFormatInterface format;
  loc = parser.getCurrentLocation();
  if (succeeded(parser.parseOptionalKeyword(&keyword))) {
    std::optional<PlainFormat> plain = symbolizePlainFormat(keyword);
    if (!plain) {
      parser.emitError(loc) << "expected weight format f32 or bf16, but got '" << keyword << "'";
      return {};
    }
    format = FormatAttr::get(context, *plain);
  } else if (parser.parseAttribute(format)) {
    return {};
  }
  if (parser.parseComma())
    return {};

  WeightLayoutInterface layout;
  loc = parser.getCurrentLocation();
  if (succeeded(parser.parseOptionalKeyword(&keyword))) {
    std::optional<PanelLayout> panel = symbolizePanelLayout(keyword);
    if (!panel) {
      parser.emitError(loc) << "expected weight layout panel32 or vector32, but got '" << keyword
                            << "'";
      return {};
    }
    layout = LayoutAttr::get(context, *panel);
  } else if (parser.parseAttribute(layout)) {
    return {};
  }
  if (parser.parseGreater())
    return {};
  return parser.getChecked<WeightType>(context, dims[0], dims[1], dims[2], dims[3], format, layout);
}

void WeightType::print(AsmPrinter &printer) const {
  printer << "<" << getExperts() << "x" << getParts() << "x" << getRows() << "x" << getCols()
          << "x";
  if (auto format = dyn_cast<FormatAttr>(getFormat()))
    printer << stringifyPlainFormat(format.getValue());
  else
    printer << getFormat();
  printer << ", ";
  if (auto layout = dyn_cast<LayoutAttr>(getLayout()))
    printer << stringifyPanelLayout(layout.getValue());
  else
    printer << getLayout();
  printer << ">";
}

LogicalResult WeightType::verify(function_ref<InFlightDiagnostic()> emitError, int64_t experts,
                                 int64_t parts, int64_t rows, int64_t cols,
                                 WeightFormatInterface format, WeightLayoutInterface layout) {
  std::pair<StringRef, int64_t> dims[] = {{"experts", experts}, {"rows", rows}, {"columns", cols}};
  for (auto [name, value] : dims)
    if (value < 1)
      return emitError() << "expected a weight with positive " << name << ", but got " << value;
  if (parts != 1 && parts != 2)
    return emitError() << "expected a weight of 1 or 2 parts, but got " << parts;
  auto panels = dyn_cast<LayoutAttr>(layout);
  if (panels && panels.getValue() == PanelLayout::Vector32 &&
      (cols != 1 || !format.getStorageType().isF32()))
    return emitError() << "expected one column of f32 in layout vector32, but got " << cols
                       << " of " << format.getFormatName();
  // Offsets into the packed bytes are 64-bit. Padding adds less than a panel in each direction.
  double bytes = double(experts) * parts * (double(rows) + layout.getPanelWidth()) *
                 (double(cols) + layout.getReductionMultiple()) * format.getBitsPerElement() / 8;
  if (bytes > double(int64_t(1) << 60))
    return emitError() << "expected a weight of at most 2^60 bytes, but got " << experts << "x"
                       << parts << "x" << rows << "x" << cols << " elements";
  return success();
}

WeightType WeightType::getVector(MLIRContext *context, int64_t experts, int64_t parts,
                                 int64_t rows) {
  return get(context, experts, parts, rows, 1, FormatAttr::get(context, PlainFormat::F32),
             LayoutAttr::get(context, PanelLayout::Vector32));
}
bool WeightType::isVector() const {
  auto layout = dyn_cast<LayoutAttr>(getLayout());
  return layout && layout.getValue() == PanelLayout::Vector32;
}
int64_t WeightType::paddedCols() const {
  return llvm::alignTo(getCols(), getLayout().getReductionMultiple());
}
int64_t WeightType::panelCols() const { return getLayout().getPanelWidth() / getParts(); }
int64_t WeightType::panelCount() const { return llvm::divideCeil(getRows(), panelCols()); }
int64_t WeightType::panelBytes() const {
  return paddedCols() * getLayout().getPanelWidth() * getFormat().getBitsPerElement() / 8;
}
int64_t WeightType::packedBytes() const {
  return llvm::alignTo(getExperts() * panelCount() * panelBytes(), 4096);
}
