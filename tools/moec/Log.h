//===- Log.h - what the driver says on stderr -------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Results go to stdout, everything else to stderr: sentences for a person, or
// with `--log json` one JSON object a line:
//   {"event":"progress","phase":"pack","done":1,"total":2,"unit":"bytes"}
//   {"event":"note"|"warning","text":"…"}
//   {"event":"error","code":101,"name":"E-SHAPE","where","expected","got","hint","message"}
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_LOG_H
#define MOEC_TOOL_LOG_H

#include "moe/Support/Error.h"

#include <chrono>
#include <string>

namespace moec::tool {

struct Log {
  bool json = false;
  bool quiet = false; ///< no notes and no progress; warnings and errors stay

  static Log &get();

  void note(const llvm::Twine &text);
  void warning(const llvm::Twine &text);
  /// Prints every error in `error` and returns the exit code of the first; 0 for success.
  int report(llvm::Error error);
  void line(const char *event, llvm::json::Object fields);
};

/// Progress of one long phase: a bar with an estimate of the time left where stderr is a terminal,
/// JSON lines with --log json, else nothing.
class Progress {
public:
  Progress(std::string phase, uint64_t total, std::string unit);
  ~Progress();
  void advance(uint64_t amount);
  /// What is being worked on, shown behind the bar.
  void label(std::string text) { what = std::move(text); }

private:
  void draw(bool last);

  std::string phase, unit, what;
  uint64_t total, done = 0;
  bool terminal;
  std::chrono::steady_clock::time_point begin, shown;
};

/// "1.5 GB" (decimal units).
std::string sizeText(uint64_t bytes);
/// "1.4 s", "3 min 20 s".
std::string timeText(double seconds);
/// "46.7 B", "1.5 M": for counts of parameters.
std::string countText(uint64_t count);

} // namespace moec::tool

#endif // MOEC_TOOL_LOG_H
