//===- Module.cpp - the identity and packed form of layers ---------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Module.h"
#include "moe/Runtime/Pack.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/BLAKE3.h"
#include "llvm/Support/raw_ostream.h"

#include <algorithm>

namespace moec {

llvm::StringRef versionString() { return MOEC_VERSION; }

//===----------------------------------------------------------------------===//
// Identity and sizes of layers
//===----------------------------------------------------------------------===//

static void writeCanonical(const llvm::json::Value &value, llvm::raw_ostream &os) {
  if (const llvm::json::Object *object = value.getAsObject()) {
    std::vector<llvm::StringRef> keys;
    for (const auto &member : *object)
      keys.push_back(member.first);
    std::sort(keys.begin(), keys.end());
    os << '{';
    llvm::ListSeparator comma(",");
    for (llvm::StringRef key : keys) {
      os << comma << llvm::json::Value(key) << ':';
      writeCanonical(*object->get(key), os);
    }
    os << '}';
    return;
  }
  if (const llvm::json::Array *array = value.getAsArray()) {
    os << '[';
    llvm::ListSeparator comma(",");
    for (const llvm::json::Value &element : *array) {
      os << comma;
      writeCanonical(element, os);
    }
    os << ']';
    return;
  }
  os << value;
}

std::string canonicalText(const llvm::json::Value &value) {
  std::string text;
  llvm::raw_string_ostream os(text);
  writeCanonical(value, os);
  return text;
}

std::array<uint8_t, 32> layerId(const LayerSpec &layer) {
  llvm::json::Object object = semantics(layer);
  object["layout"] = packedLayout;
  std::string text = canonicalText(std::move(object));
  return llvm::BLAKE3::hash<32>(llvm::arrayRefFromStringRef(text));
}

std::string hexText(const std::array<uint8_t, 32> &id) {
  return llvm::toHex(llvm::ArrayRef<uint8_t>(id), /*LowerCase=*/true);
}

std::vector<PackedWeight> packedWeights(const LayerSpec &layer) {
  std::vector<PackedWeight> out;
  for (const WeightSpec &weight : layer.weights) {
    PackedWeight packed;
    packed.role = weight.role;
    packed.format = name(weight.format).str();
    bool vector = isVector(weight.role);
    packed.layout = (vector ? vectorLayout : packedLayout).str();
    packed.experts = weight.experts;
    packed.parts = weight.parts;
    packed.rows = weight.rows;
    packed.cols = weight.cols;
    packed.bytes = moec_pack_tensor_bytes(vector ? MOEC_VECTOR32 : MOEC_PANEL32,
                                          weight.format == Format::F32 ? MOEC_DT_F32 : MOEC_DT_BF16,
                                          weight.experts, static_cast<int32_t>(weight.parts),
                                          weight.rows, weight.cols);
    out.push_back(std::move(packed));
  }
  return out;
}

} // namespace moec
