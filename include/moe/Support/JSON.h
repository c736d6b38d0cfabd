//===- JSON.h - JSON from files that nobody vouches for ---------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// llvm::json recurses without a limit and keeps the last of two equal keys
// without a word, so hostile text is scanned before it is parsed. Readers name
// the file and the JSON path of what they refuse.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SUPPORT_JSON_H
#define MOE_SUPPORT_JSON_H

#include "moe/Support/Files.h"

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"
#include "llvm/Support/JSON.h"

#include <optional>
#include <set>
#include <string>
#include <vector>

namespace moec {

/// What a JSON text may hold. The defaults suit configuration files.
struct JSONLimits {
  unsigned depth = 64;          ///< nested brackets
  size_t stringBytes = 1 << 20; ///< longest string, in bytes of text
  size_t textBytes = 64u << 20; ///< whole text
  size_t members = 8u << 20;    ///< values in all objects and arrays together
  /// Python's json module writes NaN, Infinity and -Infinity; read them as null.
  bool nonFiniteAsNull = false;
};

/// Parses `text`. Refused with `code`: text over the limits, duplicate keys, anything after the
/// value, bad UTF-8, and whatever is not JSON. `where` names the file in errors.
llvm::Expected<llvm::json::Value> parseJSON(llvm::StringRef text, llvm::StringRef where,
                                            ErrorCode code, const JSONLimits &limits = {});

/// The JSON in a file. E-FILE-FORMAT for one of more than `limits.textBytes`, and as parseJSON
/// says.
llvm::Expected<llvm::json::Value> readJSON(const InputFile &file, ErrorCode code,
                                           const JSONLimits &limits = {});
llvm::Expected<llvm::json::Value> readJSON(llvm::StringRef path, ErrorCode code,
                                           const JSONLimits &limits = {});

/// Whether a number was written as an integer: 2, but not 2.0 (llvm::json takes both).
bool isInteger(const llvm::json::Value &value);

/// A number as short as it can be without losing digits: "1e-20", "0.25".
std::string numberText(double value);

/// "a string", "3.5", "an array": for `but got …`.
std::string describeJSON(const llvm::json::Value *value);

/// State shared by the readers of one document: remembers the first error, after which getters
/// return their fallback.
class JSONDocument {
public:
  JSONDocument(llvm::StringRef file, ErrorCode code) : file(file.str()), code(code) {}

  void fail(const llvm::Twine &path, const llvm::Twine &expected, const llvm::Twine &got,
            const llvm::Twine &hint = "");
  void fail(ErrorCode other, const llvm::Twine &path, const llvm::Twine &expected,
            const llvm::Twine &got, const llvm::Twine &hint = "");
  bool failed() const { return first.has_value(); }
  /// The first error, or success.
  llvm::Error take();

private:
  std::string file;
  ErrorCode code;
  std::optional<Error> first;
};

/// Reads one JSON object. Keys never asked for are refused by finish().
class JSONReader {
public:
  /// `value` null or no object: the document fails, and every getter gives its fallback.
  JSONReader(JSONDocument &doc, const llvm::json::Value *value, std::string path);

  JSONDocument &document() { return doc; }
  const std::string &path() const { return at; }
  std::string pathOf(llvm::StringRef key) const;

  bool has(llvm::StringRef key);
  /// The raw value, null when absent; marks the key as read.
  const llvm::json::Value *get(llvm::StringRef key);
  /// As get, but absence is an error.
  const llvm::json::Value *require(llvm::StringRef key, const llvm::Twine &expected);

  int64_t integer(llvm::StringRef key, int64_t low, int64_t high,
                  std::optional<int64_t> fallback = std::nullopt);
  double number(llvm::StringRef key, std::optional<double> fallback = std::nullopt);
  bool boolean(llvm::StringRef key, std::optional<bool> fallback = std::nullopt);
  std::string string(llvm::StringRef key, std::optional<std::string> fallback = std::nullopt);
  std::vector<std::string> strings(llvm::StringRef key, bool required);
  /// One of `names`; returns its position.
  size_t choice(llvm::StringRef key, const std::vector<std::string> &names,
                std::optional<size_t> fallback = std::nullopt);

  /// Refuses keys that no getter asked for, with the nearest known one. "$…" keys are comments.
  void finish();

private:
  JSONDocument &doc;
  const llvm::json::Object *object = nullptr;
  std::string at;
  std::set<std::string> asked;
};

} // namespace moec

#endif // MOE_SUPPORT_JSON_H
