//===- Error.cpp - coded errors of the compiler ---------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Support/Error.h"

#include "llvm/Support/raw_ostream.h"

#include <algorithm>

namespace moec {

char Error::ID;

namespace {
struct Row {
  int number;
  llvm::StringLiteral name, sentence;
};
constexpr Row rows[] = {
#define MOEC_ERROR(number, ENUM, name, sentence) {number, name, sentence},
#include "moec/errors.def"
#undef MOEC_ERROR
};

const Row &rowOf(ErrorCode code) {
  for (const Row &row : rows)
    if (row.number == static_cast<int>(code))
      return row;
  return *std::prev(std::end(rows));
}
} // namespace

llvm::StringRef errorName(ErrorCode code) { return rowOf(code).name; }

llvm::StringRef errorSentence(ErrorCode code) { return rowOf(code).sentence; }

std::optional<ErrorCode> errorCodeOf(llvm::StringRef name) {
  for (const Row &row : rows)
    if (row.name == name)
      return static_cast<ErrorCode>(row.number);
  return std::nullopt;
}

int exitCode(ErrorCode code) {
  switch (static_cast<int>(code) / 100) {
  case 1:
    return 2;
  case 2:
    return 3;
  case 3:
    return 4;
  case 4:
    return 5;
  case 5:
    return 6;
  case 7:
    return 7;
  default:
    return 70;
  }
}

void Error::log(llvm::raw_ostream &os) const {
  os << errorName(code) << ": ";
  if (!where.empty())
    os << where << ": ";
  if (!expected.empty())
    os << "expected " << expected << ", but got ";
  os << got;
  if (!hint.empty())
    os << "; " << hint;
}

std::error_code Error::convertToErrorCode() const { return llvm::inconvertibleErrorCode(); }

llvm::json::Object Error::toJSON() const {
  // Text from a model folder may hold any bytes; JSON may not.
  return llvm::json::Object{
      {"code", static_cast<int>(code)},           {"name", errorName(code)},
      {"where", llvm::json::fixUTF8(where)},      {"expected", llvm::json::fixUTF8(expected)},
      {"got", llvm::json::fixUTF8(got)},          {"hint", llvm::json::fixUTF8(hint)},
      {"message", llvm::json::fixUTF8(message())}};
}

llvm::Error makeError(ErrorCode code, const llvm::Twine &where, const llvm::Twine &expected,
                      const llvm::Twine &got, const llvm::Twine &hint) {
  return llvm::make_error<Error>(code, where.str(), expected.str(), got.str(), hint.str());
}

std::vector<Error> takeErrors(llvm::Error error) {
  std::vector<Error> out;
  llvm::handleAllErrors(
      std::move(error), [&](const Error &e) { out.push_back(e); },
      [&](const llvm::ErrorInfoBase &e) {
        out.emplace_back(ErrorCode::INTERNAL, "", "", e.message(), "");
      });
  return out;
}

std::vector<std::string> nearestNames(llvm::StringRef name,
                                      const std::vector<std::string> &candidates, unsigned limit) {
  auto sharedPrefix = [&](llvm::StringRef other) {
    size_t i = 0;
    while (i < name.size() && i < other.size() && name[i] == other[i])
      ++i;
    return i;
  };
  struct Near {
    unsigned distance;
    std::string name;
  };
  std::vector<Near> near;
  for (const std::string &candidate : candidates) {
    unsigned most = std::max<size_t>(2, std::max(name.size(), candidate.size()) / 3);
    unsigned distance = name.edit_distance(candidate, /*AllowReplacements=*/true, most);
    if (distance <= most)
      near.push_back({distance, candidate});
    else if (sharedPrefix(candidate) >= 4 && 2 * sharedPrefix(candidate) >= name.size())
      near.push_back({most + static_cast<unsigned>(candidate.size()), candidate});
  }
  std::sort(near.begin(), near.end(), [](const Near &a, const Near &b) {
    return a.distance != b.distance ? a.distance < b.distance : a.name < b.name;
  });
  std::vector<std::string> out;
  for (const Near &n : near)
    if (out.size() < limit)
      out.push_back(n.name);
  return out;
}

std::string quoteList(const std::vector<std::string> &names, llvm::StringRef last) {
  std::string out;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i)
      out += i + 1 == names.size() ? " " + last.str() + " " : std::string(", ");
    out += "`" + names[i] + "`";
  }
  return out;
}

} // namespace moec
