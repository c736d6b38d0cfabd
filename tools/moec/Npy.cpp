//===- Npy.cpp - NumPy's array files --------------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Npy.h"

#include "moe/Support/Files.h"

#include <cstring>

namespace moec::tool {

int64_t Array::elements() const {
  int64_t count = 1;
  for (int64_t size : shape)
    count *= size;
  return count;
}

namespace {
/// The header is a Python dictionary literal of three known keys; nothing else is accepted.
class HeaderParser {
public:
  explicit HeaderParser(llvm::StringRef text) : rest(text) {}

  bool parse(std::string &descr, bool &fortran, std::vector<int64_t> &shape) {
    bool hasDescr = false, hasOrder = false, hasShape = false;
    if (!take("{"))
      return false;
    while (!take("}")) {
      std::string key;
      if (!string(key) || !take(":"))
        return false;
      if (key == "descr" && !hasDescr) {
        hasDescr = true;
        if (!string(descr))
          return false;
      } else if (key == "fortran_order" && !hasOrder) {
        hasOrder = true;
        if (take("True"))
          fortran = true;
        else if (take("False"))
          fortran = false;
        else
          return false;
      } else if (key == "shape" && !hasShape) {
        hasShape = true;
        if (!take("("))
          return false;
        while (!take(")")) {
          int64_t size;
          if (rest.consumeInteger(10, size) || size < 0 || shape.size() == 32)
            return false;
          shape.push_back(size);
          if (!take(",") && !rest.ltrim().starts_with(")"))
            return false;
          rest = rest.ltrim();
        }
      } else {
        return false;
      }
      if (!take(",") && !rest.ltrim().starts_with("}"))
        return false;
    }
    return hasDescr && hasOrder && hasShape && rest.trim(" \n").empty();
  }

private:
  bool take(llvm::StringRef token) {
    rest = rest.ltrim();
    return rest.consume_front(token);
  }
  bool string(std::string &out) {
    rest = rest.ltrim();
    if (rest.empty() || (rest[0] != '\'' && rest[0] != '"'))
      return false;
    size_t end = rest.find(rest[0], 1);
    if (end == llvm::StringRef::npos)
      return false;
    out = rest.slice(1, end).str();
    rest = rest.drop_front(end + 1);
    return true;
  }

  llvm::StringRef rest;
};
} // namespace

llvm::Expected<Array> readNpy(llvm::StringRef path) {
  auto opened = InputFile::open(path);
  if (!opened)
    return opened.takeError();
  InputFile &in = **opened;
  auto broken = [&](const llvm::Twine &expected, const llvm::Twine &got,
                    const llvm::Twine &hint = "") {
    return makeError(ErrorCode::FILE_FORMAT, path, expected, got, hint);
  };
  unsigned char head[12] = {};
  size_t headBytes = std::min<uint64_t>(in.size(), 12);
  if (llvm::Error error =
          in.readAt(0, llvm::MutableArrayRef<char>(reinterpret_cast<char *>(head), headBytes)))
    return std::move(error);
  if (headBytes < 12 || memcmp(head, "\x93NUMPY", 6))
    return broken("a .npy file", in.size() < 12 ? llvm::Twine(in.size()) + " bytes"
                                                : llvm::Twine("other bytes at its beginning"));
  if (head[6] != 1 && head[6] != 2)
    return broken("npy version 1 or 2", "version " + llvm::Twine(unsigned(head[6])));
  uint64_t length = head[8] | head[9] << 8, begin = 10;
  if (head[6] == 2) {
    length |= uint64_t(head[10]) << 16 | uint64_t(head[11]) << 24;
    begin = 12;
  }
  if (length > (1u << 20) || begin + length > in.size())
    return broken("a header within the file", llvm::Twine(length) + " bytes");
  std::string text(length, '\0');
  if (llvm::Error error = in.readAt(begin, llvm::MutableArrayRef<char>(text.data(), text.size())))
    return std::move(error);
  Array array;
  std::string descr;
  bool fortran = false;
  if (!HeaderParser(text).parse(descr, fortran, array.shape))
    return broken("a header with descr, fortran_order and shape",
                  "`" + llvm::StringRef(text).trim() + "`");
  size_t item;
  if (descr == "<f4") {
    array.format = Format::F32;
    item = 4;
  } else if (descr == "<V2" || descr == "|V2" || descr == "<u2") {
    array.format = Format::BF16;
    item = 2;
  } else {
    return makeError(ErrorCode::DTYPE, path,
                     "float32 ('<f4') or bfloat16 ('<V2', as ml_dtypes saves it)",
                     "'" + descr + "'", "convert it with .astype(numpy.float32)");
  }
  if (fortran)
    return broken("C order", "Fortran order", "save numpy.ascontiguousarray of it");
  uint64_t bytes = item, left = in.size() - begin - length;
  for (int64_t size : array.shape)
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes))
      bytes = UINT64_MAX;
  if (bytes != left)
    return broken(bytes == UINT64_MAX ? llvm::Twine("a shape that fits in memory")
                                      : llvm::Twine(bytes) + " bytes of data",
                  llvm::Twine(left) + " bytes");
  array.bytes.resize(bytes);
  if (llvm::Error error = in.readAt(begin + length, array.bytes))
    return std::move(error);
  return array;
}

std::string npyText(const Array &array) {
  std::string dict = "{'descr': '";
  dict += array.format == Format::F32 ? "<f4" : "<V2";
  dict += "', 'fortran_order': False, 'shape': (";
  for (int64_t size : array.shape)
    dict += std::to_string(size) + ", ";
  if (array.shape.size() > 1)
    dict.resize(dict.size() - 2);
  else if (array.shape.size() == 1)
    dict.pop_back();
  dict += "), }";
  dict.append(63 - (10 + dict.size()) % 64, ' ');
  dict += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  out += static_cast<char>(dict.size() & 0xff);
  out += static_cast<char>(dict.size() >> 8);
  out += dict;
  out.append(array.bytes.data(), array.bytes.size());
  return out;
}

} // namespace moec::tool
