//===- Safetensors.cpp - weights in safetensors files ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Safetensors.h"

#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/CheckedArithmetic.h"
#include "llvm/Support/Endian.h"
#include "llvm/Support/FormatVariadic.h"

#include <algorithm>
#include <cstring>

namespace moec {

namespace {

struct DtypeRow {
  llvm::StringLiteral name;
  unsigned bits;
};
constexpr DtypeRow dtypes[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64}};

constexpr uint64_t headerLimit = 100'000'000;

} // namespace

llvm::StringRef name(Dtype dtype) { return dtypes[static_cast<size_t>(dtype)].name; }
unsigned bitsOf(Dtype dtype) { return dtypes[static_cast<size_t>(dtype)].bits; }

std::string shapeText(llvm::ArrayRef<int64_t> shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    out += (i ? "," : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string describe(const TensorInfo &tensor) {
  return (name(tensor.dtype) + " " + shapeText(tensor.shape)).str();
}

//===----------------------------------------------------------------------===//
// One file
//===----------------------------------------------------------------------===//

namespace {

/// Reads one entry of the header. Offsets are made absolute by adding `dataStart`, and end inside
/// the file of `fileSize` bytes.
TensorInfo readTensor(JSONDocument &doc, const std::string &tensor, const llvm::json::Value &value,
                      uint64_t dataStart, uint64_t fileSize) {
  TensorInfo out;
  std::string at = "tensor `" + llvm::json::fixUTF8(llvm::StringRef(tensor).take_front(200)) + "`";
  JSONReader reader(doc, &value, at);

  std::string dtype = reader.string("dtype");
  if (doc.failed())
    return out;
  auto row = llvm::find_if(dtypes, [&](const DtypeRow &r) { return r.name == dtype; });
  if (row == std::end(dtypes)) {
    std::vector<std::string> all;
    for (const DtypeRow &r : dtypes)
      all.push_back(r.name.str());
    doc.fail(at + ".dtype", "a dtype of the format",
             "\"" + llvm::json::fixUTF8(llvm::StringRef(dtype).take_front(40)) + "\"",
             "they are " + quoteList(all));
    return out;
  }
  out.dtype = static_cast<Dtype>(row - std::begin(dtypes));

  const llvm::json::Value *shape = reader.get("shape");
  const llvm::json::Array *dims = shape ? shape->getAsArray() : nullptr;
  if (!dims) {
    doc.fail(at + ".shape", "an array", describeJSON(shape));
    return out;
  }
  // Every product is checked before the next factor is used.
  uint64_t elements = 1;
  for (size_t i = 0; i < dims->size(); ++i) {
    std::optional<uint64_t> d = (*dims)[i].getAsUINT64();
    if (!d || *d > uint64_t(INT64_MAX)) {
      doc.fail(at + ".shape[" + llvm::Twine(i) + "]", "an integer from 0 to 2^63-1",
               describeJSON(&(*dims)[i]));
      return out;
    }
    std::optional<uint64_t> product = llvm::checkedMulUnsigned<uint64_t>(elements, *d);
    if (!product) {
      doc.fail(at + ".shape", "fewer than 2^64 elements", "more");
      return out;
    }
    elements = *product;
    out.shape.push_back(static_cast<int64_t>(*d));
  }
  std::optional<uint64_t> bits = llvm::checkedMulUnsigned<uint64_t>(elements, bitsOf(out.dtype));
  if (!bits || *bits % 8) {
    doc.fail(at + ".shape", bits ? "a whole number of bytes" : "fewer than 2^61 bytes",
             describe(out));
    return out;
  }

  const llvm::json::Value *offsets = reader.get("data_offsets");
  const llvm::json::Array *pair = offsets ? offsets->getAsArray() : nullptr;
  if (!pair || pair->size() != 2) {
    doc.fail(at + ".data_offsets", "an array of 2", describeJSON(offsets));
    return out;
  }
  std::optional<uint64_t> begin = (*pair)[0].getAsUINT64(), end = (*pair)[1].getAsUINT64();
  uint64_t room = fileSize - dataStart;
  if (!begin || !end || *begin > *end || *end > room) {
    doc.fail(at + ".data_offsets",
             "begin and end from 0 to " + llvm::Twine(room) + ", in this order",
             begin && end ? "[" + llvm::Twine(*begin) + "," + llvm::Twine(*end) + "]"
                          : llvm::Twine("something else"),
             begin && end && *begin <= *end ? "the file was truncated, or its download is not over"
                                            : "");
    return out;
  }
  if (*end - *begin != *bits / 8) {
    doc.fail(at + ".data_offsets", llvm::Twine(*bits / 8) + " bytes for " + describe(out),
             llvm::Twine(*end - *begin));
    return out;
  }
  out.offset = dataStart + *begin;
  out.bytes = *end - *begin;
  return out;
}

} // namespace

llvm::Expected<std::unique_ptr<SafetensorsFile>>
SafetensorsFile::open(std::unique_ptr<InputFile> file) {
  const std::string path = file->path();
  auto malformed = [&](const llvm::Twine &expected, const llvm::Twine &got) {
    return makeError(ErrorCode::FILE_FORMAT, path, expected, got);
  };
  uint64_t fileSize = file->size();
  if (fileSize < 8)
    return malformed("a safetensors file, at least 8 bytes", llvm::Twine(fileSize));
  char lengthBytes[8];
  if (llvm::Error error = file->readAt(0, lengthBytes))
    return error;
  uint64_t headerSize = llvm::support::endian::read64le(lengthBytes);
  if (headerSize > headerLimit)
    return malformed("a safetensors header of at most " + llvm::Twine(headerLimit) + " bytes",
                     llvm::Twine(headerSize));
  if (headerSize > fileSize - 8)
    return malformed("a safetensors header inside the file of " + llvm::Twine(fileSize) + " bytes",
                     "one of " + llvm::Twine(headerSize));
  std::string text(headerSize, '\0');
  if (llvm::Error error = file->readAt(8, llvm::MutableArrayRef<char>(text.data(), text.size())))
    return error;

  JSONLimits limits;
  limits.textBytes = headerLimit;
  llvm::Expected<llvm::json::Value> header =
      parseJSON(text, path + " header", ErrorCode::FILE_FORMAT, limits);
  if (!header)
    return header.takeError();
  text = std::string();
  const llvm::json::Object *object = header->getAsObject();
  if (!object)
    return malformed("a header that is an object", describeJSON(&*header));

  auto out = std::make_unique<SafetensorsFile>();
  JSONDocument doc(path, ErrorCode::FILE_FORMAT);
  uint64_t dataStart = 8 + headerSize;
  for (const auto &member : *object) {
    std::string key = llvm::StringRef(member.first).str();
    if (key != "__metadata__") {
      out->table.emplace(key, readTensor(doc, key, member.second, dataStart, fileSize));
      continue;
    }
    if (member.second.getAsNull())
      continue;
    const llvm::json::Object *meta = member.second.getAsObject();
    if (!meta) {
      doc.fail(key, "an object of strings", describeJSON(&member.second));
      continue;
    }
    for (const auto &entry : *meta) {
      if (std::optional<llvm::StringRef> value = entry.second.getAsString())
        out->meta.emplace(llvm::StringRef(entry.first).str(), value->str());
      else
        doc.fail(key + "." + llvm::StringRef(entry.first).take_front(60).str(), "a string",
                 describeJSON(&entry.second));
    }
  }
  if (llvm::Error error = doc.take())
    return error;

  // Tensors must cover the data: each starts where the one before it ends.
  std::vector<std::pair<std::pair<uint64_t, uint64_t>, const std::string *>> order;
  for (const auto &[key, info] : out->table)
    order.push_back({{info.offset, info.offset + info.bytes}, &key});
  std::sort(order.begin(), order.end());
  uint64_t covered = dataStart;
  for (const auto &[extent, key] : order) {
    if (extent.first != covered)
      return malformed("tensor `" + *key + "` at data offset " + llvm::Twine(covered - dataStart) +
                           ", where the one before it ends",
                       llvm::Twine(extent.first - dataStart) +
                           (extent.first < covered ? " (they overlap)" : " (there is a hole)"));
    covered = extent.second;
  }
  if (covered != fileSize)
    return malformed("tensors that end with the file, at byte " + llvm::Twine(fileSize),
                     "the last one ends at byte " + llvm::Twine(covered));
  out->input = std::move(file);
  return out;
}

//===----------------------------------------------------------------------===//
// Values
//===----------------------------------------------------------------------===//

namespace {

/// Counts elements whose exponent bits are all ones. `Word` is the element as an integer.
template <typename Word>
void scan(const char *data, size_t count, Word mask, int64_t firstIndex, NonFinite &found) {
  constexpr size_t block = 4096;
  for (size_t begin = 0; begin < count; begin += block) {
    size_t end = std::min(count, begin + block);
    uint64_t bad = 0; // a loop without branches, so that it is vectorized
    for (size_t i = begin; i < end; ++i) {
      Word w;
      std::memcpy(&w, data + i * sizeof(Word), sizeof(Word));
      bad += (w & mask) == mask;
    }
    if (!bad)
      continue;
    for (size_t i = begin; i < end && found.first < 0; ++i) {
      Word w;
      std::memcpy(&w, data + i * sizeof(Word), sizeof(Word));
      if ((w & mask) == mask)
        found.first = firstIndex + static_cast<int64_t>(i);
    }
    found.count += bad;
  }
}

float halfToFloat(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31,
           mantissa = half & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    float value = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

} // namespace

void scanNonFinite(Dtype dtype, const char *data, size_t count, int64_t firstIndex,
                   NonFinite &found) {
  if (dtype == Dtype::F32)
    scan<uint32_t>(data, count, 0x7f800000u, firstIndex, found);
  else if (dtype == Dtype::BF16)
    scan<uint16_t>(data, count, 0x7f80, firstIndex, found);
  else if (dtype == Dtype::F16)
    scan<uint16_t>(data, count, 0x7c00, firstIndex, found);
}

llvm::Error checkFinite(const NonFinite &found, llvm::StringRef file, llvm::StringRef tensor) {
  if (!found.count)
    return llvm::Error::success();
  return makeError(ErrorCode::NONFINITE, file + ": tensor `" + tensor + "`", "finite values",
                   llvm::Twine(found.count) + " NaN or infinite, the first at index " +
                       llvm::Twine(found.first));
}

void toFloat(Dtype dtype, const char *data, size_t count, float *out) {
  if (dtype == Dtype::F32) {
    std::memcpy(out, data, count * sizeof(float));
    return;
  }
  for (size_t i = 0; i < count; ++i) {
    uint16_t w;
    std::memcpy(&w, data + 2 * i, sizeof w);
    if (dtype == Dtype::BF16) {
      uint32_t bits = uint32_t(w) << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    } else {
      out[i] = halfToFloat(w);
    }
  }
}

} // namespace moec
