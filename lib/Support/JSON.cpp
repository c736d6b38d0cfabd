//===- JSON.cpp - JSON from files that nobody vouches for -----------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/ADT/StringSet.h"
#include "llvm/Support/FormatVariadic.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

namespace moec {

namespace {

/// Shortens foreign text for a message and makes it printable.
std::string excerpt(llvm::StringRef text) {
  constexpr size_t most = 60;
  std::string out = llvm::json::fixUTF8(text.take_front(most));
  for (char &c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
      c = ' ';
  return text.size() > most ? out + "…" : out;
}

/// Whether `word` is a number by JSON's grammar, which llvm::json does not hold to ("02", "+1").
bool isNumber(llvm::StringRef word) {
  auto digits = [&] {
    size_t n = word.take_while([](char c) { return llvm::isDigit(c); }).size();
    word = word.drop_front(n);
    return n > 0;
  };
  word.consume_front("-");
  if (!word.consume_front("0") && !digits())
    return false;
  if (word.consume_front(".") && !digits())
    return false;
  if (word.consume_front_insensitive("e")) {
    if (!word.consume_front("+"))
      word.consume_front("-");
    if (!digits())
      return false;
  }
  return word.empty();
}

/// Walks JSON text once, without recursion, and enforces the limits. It need not find every
/// syntax error (the parser does), but must never let one hide a duplicate key or a depth.
class Scanner {
public:
  Scanner(llvm::StringRef text, llvm::StringRef where, ErrorCode code, const JSONLimits &limits)
      : text(text), where(where), code(code), limits(limits) {}

  /// `rewritten` is set when literals had to be replaced.
  llvm::Error run(std::optional<std::string> &rewritten);

private:
  struct Level {
    bool object;
    bool wantKey;
    size_t index = 0;
    std::string key;
    llvm::StringSet<> keys;
  };

  llvm::Error fail(const llvm::Twine &expected, const llvm::Twine &got) {
    size_t line = 1 + text.take_front(pos).count('\n');
    size_t column = pos - (text.take_front(pos).rfind('\n') + 1) + 1;
    std::string at = (where + ":" + llvm::Twine(line) + ":" + llvm::Twine(column)).str();
    std::string path = pathText();
    return makeError(code, path.empty() ? at : at + ": " + path, expected, got);
  }

  std::string pathText() const {
    std::string out;
    for (const Level &level : stack) {
      if (out.size() > 200)
        return out + "…";
      if (!level.object)
        out += "[" + std::to_string(level.index) + "]";
      else if (!level.key.empty())
        out += (out.empty() ? "" : ".") + excerpt(level.key);
    }
    return out;
  }

  llvm::Expected<llvm::StringRef> scanString();

  llvm::StringRef text, where;
  ErrorCode code;
  const JSONLimits &limits;
  size_t pos = 0;
  std::vector<Level> stack;
};

/// At an opening quote. Returns the text between the quotes, escapes as written.
llvm::Expected<llvm::StringRef> Scanner::scanString() {
  size_t begin = ++pos;
  bool high = false; // the last character was the first half of a surrogate pair
  while (pos < text.size() && text[pos] != '"') {
    if (static_cast<unsigned char>(text[pos]) < 0x20)
      return fail("no control character inside a string",
                  llvm::formatv("byte {0}", int(text[pos])));
    unsigned unit = 0;
    size_t length = 1;
    if (text[pos] == '\\') {
      bool hex = text.substr(pos + 1).starts_with("u");
      length = hex ? 6 : 2;
      if (hex && text.substr(pos + 2, 4).getAsInteger(16, unit))
        return fail("four hexadecimal digits after \\u", "others");
    }
    bool low = unit >= 0xdc00 && unit < 0xe000;
    if (high != low)
      return fail("surrogates in pairs", "half of one");
    high = unit >= 0xd800 && unit < 0xdc00;
    pos += length;
    if (pos - begin > limits.stringBytes)
      return fail(llvm::formatv("strings of at most {0} bytes", limits.stringBytes),
                  "a longer one");
  }
  if (high)
    return fail("surrogates in pairs", "half of one");
  if (pos >= text.size()) {
    pos = text.size();
    return fail("a closing quote", "the end of the text");
  }
  llvm::StringRef raw = text.slice(begin, pos);
  ++pos;
  return raw;
}

llvm::Error Scanner::run(std::optional<std::string> &rewritten) {
  size_t copied = 0, members = 0;
  while (pos < text.size()) {
    char c = text[pos];
    if (c == '{' || c == '[') {
      if (stack.size() >= limits.depth)
        return fail(llvm::formatv("at most {0} nested brackets", limits.depth), "more");
      Level level;
      level.object = level.wantKey = c == '{';
      stack.push_back(std::move(level));
      ++pos;
    } else if (c == '}' || c == ']') {
      if (stack.empty() || stack.back().object != (c == '}'))
        return fail("brackets that match", llvm::Twine("an extra `") + llvm::Twine(c) + "`");
      stack.pop_back();
      ++pos;
    } else if (c == '"') {
      size_t start = pos;
      llvm::Expected<llvm::StringRef> raw = scanString();
      if (!raw)
        return raw.takeError();
      if (stack.empty() || !stack.back().object || !stack.back().wantKey)
        continue;
      std::string key = raw->str();
      if (raw->contains('\\')) { // "a" and "\u0061" are the same key
        llvm::Expected<llvm::json::Value> decoded = llvm::json::parse(text.slice(start, pos));
        if (!decoded) {
          std::string message = llvm::toString(decoded.takeError());
          pos = start;
          return fail("a JSON string", "`" + excerpt(*raw) + "` (" + message + ")");
        }
        key = decoded->getAsString()->str();
      }
      Level &level = stack.back();
      level.wantKey = false;
      level.key = key;
      if (!level.keys.insert(key).second) {
        pos = start;
        return fail("every key once", "the key `" + excerpt(key) + "` twice");
      }
    } else if (c == ',') {
      if (!stack.empty()) {
        ++stack.back().index;
        stack.back().wantKey = stack.back().object;
      }
      if (++members > limits.members)
        return fail(llvm::formatv("at most {0} values", limits.members), "more");
      ++pos;
    } else if (llvm::isAlnum(c) || c == '-' || c == '+' || c == '.') {
      size_t start = pos;
      llvm::StringRef word = text.substr(pos).take_while(
          [](char c) { return llvm::isAlnum(c) || c == '-' || c == '+' || c == '.'; });
      pos += word.size();
      if (limits.nonFiniteAsNull && (word == "NaN" || word == "Infinity" || word == "-Infinity")) {
        if (!rewritten)
          rewritten.emplace();
        *rewritten += text.slice(copied, start);
        *rewritten += "null";
        copied = pos;
      } else if (word != "true" && word != "false" && word != "null" && !isNumber(word)) {
        pos = start;
        return fail("a JSON value", "`" + excerpt(word) + "`");
      }
    } else {
      ++pos;
    }
  }
  if (!stack.empty())
    return fail("a closing bracket", "the end of the text");
  if (rewritten)
    *rewritten += text.substr(copied);
  return llvm::Error::success();
}

} // namespace

llvm::Expected<llvm::json::Value> parseJSON(llvm::StringRef text, llvm::StringRef where,
                                            ErrorCode code, const JSONLimits &limits) {
  if (text.size() > limits.textBytes)
    return makeError(code, where, llvm::formatv("at most {0} bytes of JSON", limits.textBytes),
                     llvm::formatv("{0} bytes", text.size()));
  if (text.trim(" \t\r\n").empty())
    return makeError(code, where, "JSON", text.empty() ? "an empty file" : "only blanks");
  std::optional<std::string> rewritten;
  if (llvm::Error error = Scanner(text, where, code, limits).run(rewritten))
    return error;
  llvm::Expected<llvm::json::Value> value = llvm::json::parse(rewritten ? *rewritten : text);
  if (value)
    return value;
  // llvm::json says "[line:column, byte=n]: reason".
  std::string message = llvm::toString(value.takeError());
  llvm::StringRef place, reason;
  std::tie(place, reason) = llvm::StringRef(message).split("]: ");
  place = place.ltrim('[').split(',').first;
  if (reason.empty())
    return makeError(code, where, "JSON", "other text (" + message + ")");
  return makeError(code, where + ":" + place, "JSON", "other text (" + reason + ")");
}

llvm::Expected<llvm::json::Value> readJSON(const InputFile &file, ErrorCode code,
                                           const JSONLimits &limits) {
  auto text = file.readAll(limits.textBytes);
  if (!text)
    return text.takeError();
  return parseJSON(*text, file.path(), code, limits);
}

llvm::Expected<llvm::json::Value> readJSON(llvm::StringRef path, ErrorCode code,
                                           const JSONLimits &limits) {
  auto file = InputFile::open(path);
  if (!file)
    return file.takeError();
  return readJSON(**file, code, limits);
}

bool isInteger(const llvm::json::Value &value) {
  if (value.getAsUINT64())
    return true;
  std::optional<int64_t> i = value.getAsInteger();
  return i && *i < 0 && *i > std::numeric_limits<int64_t>::min();
}

std::string numberText(double value) {
  // The shortest form that reads back as the same number.
  char buffer[40];
  for (int digits : {6, 15, 17}) {
    std::snprintf(buffer, sizeof buffer, "%.*g", digits, value);
    if (std::strtod(buffer, nullptr) == value)
      break;
  }
  return buffer;
}

std::string describeJSON(const llvm::json::Value *value) {
  using llvm::json::Value;
  if (!value)
    return "nothing";
  switch (value->kind()) {
  case Value::Null:
    return "null";
  case Value::Boolean:
    return *value->getAsBoolean() ? "true" : "false";
  case Value::Number:
    if (std::optional<int64_t> i = value->getAsInteger()) {
      if (isInteger(*value))
        return std::to_string(*i);
      return numberText(*value->getAsNumber()) + ".0";
    }
    return numberText(*value->getAsNumber());
  case Value::String:
    return "the string \"" + excerpt(*value->getAsString()) + "\"";
  case Value::Array:
    return llvm::formatv("an array of {0}", value->getAsArray()->size()).str();
  case Value::Object:
    return "an object";
  }
  return "something else";
}

void JSONDocument::fail(const llvm::Twine &path, const llvm::Twine &expected,
                        const llvm::Twine &got, const llvm::Twine &hint) {
  fail(code, path, expected, got, hint);
}

void JSONDocument::fail(ErrorCode other, const llvm::Twine &path, const llvm::Twine &expected,
                        const llvm::Twine &got, const llvm::Twine &hint) {
  if (first)
    return;
  std::string at = path.str();
  first.emplace(other, at.empty() ? file : file + ": " + at, expected.str(), got.str(), hint.str());
}

llvm::Error JSONDocument::take() {
  if (!first)
    return llvm::Error::success();
  Error error = *first;
  first.reset();
  return llvm::make_error<Error>(std::move(error));
}

JSONReader::JSONReader(JSONDocument &doc, const llvm::json::Value *value, std::string path)
    : doc(doc), at(std::move(path)) {
  if (value)
    object = value->getAsObject();
  if (!object)
    doc.fail(at, "an object", describeJSON(value));
}

std::string JSONReader::pathOf(llvm::StringRef key) const {
  return at.empty() ? key.str() : at + "." + key.str();
}

bool JSONReader::has(llvm::StringRef key) {
  asked.insert(key.str());
  return object && object->get(key);
}

const llvm::json::Value *JSONReader::get(llvm::StringRef key) {
  asked.insert(key.str());
  return object ? object->get(key) : nullptr;
}

const llvm::json::Value *JSONReader::require(llvm::StringRef key, const llvm::Twine &expected) {
  const llvm::json::Value *value = get(key);
  if (!value && object)
    doc.fail(pathOf(key), expected, "nothing");
  return value;
}

int64_t JSONReader::integer(llvm::StringRef key, int64_t low, int64_t high,
                            std::optional<int64_t> fallback) {
  const llvm::json::Value *value = get(key);
  if (!object || (!value && fallback))
    return fallback.value_or(low);
  std::optional<int64_t> i = value && isInteger(*value) ? value->getAsInteger() : std::nullopt;
  if (i && *i >= low && *i <= high)
    return *i;
  doc.fail(pathOf(key), llvm::formatv("an integer from {0} to {1}", low, high),
           describeJSON(value));
  return fallback.value_or(low);
}

double JSONReader::number(llvm::StringRef key, std::optional<double> fallback) {
  const llvm::json::Value *value = get(key);
  if (!object || (!value && fallback))
    return fallback.value_or(0);
  std::optional<double> d = value ? value->getAsNumber() : std::nullopt;
  if (d && std::isfinite(*d))
    return *d;
  doc.fail(pathOf(key), "a number", describeJSON(value));
  return fallback.value_or(0);
}

bool JSONReader::boolean(llvm::StringRef key, std::optional<bool> fallback) {
  const llvm::json::Value *value = get(key);
  if (!object || (!value && fallback))
    return fallback.value_or(false);
  std::optional<bool> b = value ? value->getAsBoolean() : std::nullopt;
  if (b)
    return *b;
  doc.fail(pathOf(key), "true or false", describeJSON(value));
  return fallback.value_or(false);
}

std::string JSONReader::string(llvm::StringRef key, std::optional<std::string> fallback) {
  const llvm::json::Value *value = get(key);
  if (!object || (!value && fallback))
    return fallback.value_or("");
  std::optional<llvm::StringRef> s = value ? value->getAsString() : std::nullopt;
  if (s && !s->empty() && !s->contains('\0'))
    return s->str();
  doc.fail(pathOf(key), "a string that is not empty", describeJSON(value));
  return fallback.value_or("");
}

std::vector<std::string> JSONReader::strings(llvm::StringRef key, bool required) {
  std::vector<std::string> out;
  const llvm::json::Value *value = get(key);
  if (!object || (!value && !required))
    return out;
  const llvm::json::Array *array = value ? value->getAsArray() : nullptr;
  if (!array) {
    doc.fail(pathOf(key), "an array of strings", describeJSON(value));
    return out;
  }
  for (size_t i = 0; i < array->size(); ++i) {
    std::optional<llvm::StringRef> s = (*array)[i].getAsString();
    if (!s) {
      doc.fail(pathOf(key) + "[" + llvm::Twine(i) + "]", "a string", describeJSON(&(*array)[i]));
      return out;
    }
    out.push_back(s->str());
  }
  return out;
}

size_t JSONReader::choice(llvm::StringRef key, const std::vector<std::string> &names,
                          std::optional<size_t> fallback) {
  const llvm::json::Value *value = get(key);
  if (!object || (!value && fallback))
    return fallback.value_or(0);
  if (std::optional<llvm::StringRef> s = value ? value->getAsString() : std::nullopt)
    for (size_t i = 0; i < names.size(); ++i)
      if (*s == names[i])
        return i;
  doc.fail(pathOf(key), quoteList(names, "or"), describeJSON(value));
  return fallback.value_or(0);
}

void JSONReader::finish() {
  if (!object)
    return;
  for (const auto &member : *object) {
    std::string key = llvm::StringRef(member.first).str();
    if (asked.count(key) || llvm::StringRef(key).starts_with("$"))
      continue;
    std::vector<std::string> known(asked.begin(), asked.end());
    std::vector<std::string> near = nearestNames(key, known, 1);
    doc.fail(at, "only known keys", "`" + excerpt(key) + "`",
             near.empty() ? "known are " + quoteList(known) : "did you mean `" + near[0] + "`?");
    return;
  }
}

} // namespace moec
