//===- Log.cpp - what the driver says on stderr ---------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Log.h"

#include "llvm/Support/Format.h"
#include "llvm/Support/raw_ostream.h"

#include <sys/ioctl.h>
#include <unistd.h>

namespace moec::tool {

Log &Log::get() {
  static Log log;
  return log;
}

void Log::line(const char *event, llvm::json::Object fields) {
  fields["event"] = event;
  std::string text;
  llvm::raw_string_ostream os(text);
  os << llvm::json::Value(std::move(fields)) << "\n";
  // One write a line: parent and child share the stream.
  llvm::errs() << text;
  llvm::errs().flush();
}

void Log::note(const llvm::Twine &text) {
  if (quiet)
    return;
  if (json)
    line("note", llvm::json::Object{{"text", llvm::json::fixUTF8(text.str())}});
  else
    llvm::errs() << text << "\n";
}

void Log::warning(const llvm::Twine &text) {
  if (json)
    line("warning", llvm::json::Object{{"text", llvm::json::fixUTF8(text.str())}});
  else
    llvm::errs() << "warning: " << text << "\n";
}

int Log::report(llvm::Error error) {
  if (!error)
    return 0;
  int code = 0;
  for (const Error &e : takeErrors(std::move(error))) {
    if (!code)
      code = exitCode(e.code);
    if (json)
      line("error", e.toJSON());
    else
      llvm::errs() << e.message() << "\n";
  }
  return code;
}

Progress::Progress(std::string phase, uint64_t total, std::string unit)
    : phase(std::move(phase)), unit(std::move(unit)), total(total),
      terminal(!Log::get().json && !Log::get().quiet && isatty(STDERR_FILENO)),
      begin(std::chrono::steady_clock::now()), shown(begin) {}

void Progress::advance(uint64_t amount) {
  done += amount;
  auto now = std::chrono::steady_clock::now();
  if (now - shown < std::chrono::milliseconds(100))
    return;
  shown = now;
  draw(false);
}

Progress::~Progress() { draw(true); }

void Progress::draw(bool last) {
  Log &log = Log::get();
  if (log.quiet)
    return;
  if (log.json) {
    log.line("progress", llvm::json::Object{{"phase", phase},
                                            {"done", static_cast<int64_t>(done)},
                                            {"total", static_cast<int64_t>(total)},
                                            {"unit", unit}});
    return;
  }
  if (!terminal)
    return;
  if (last) {
    llvm::errs() << "\r\033[K";
    return;
  }
  double share = total ? std::min(1.0, static_cast<double>(done) / total) : 0;
  double seconds = std::chrono::duration<double>(shown - begin).count();
  constexpr int width = 30;
  int filled = static_cast<int>(share * width);
  std::string text =
      phase + " [" + std::string(filled, '#') + std::string(width - filled, '.') + "] ";
  text += std::to_string(static_cast<int>(share * 100)) + "%";
  if (unit == "bytes")
    text += " " + sizeText(done) + " of " + sizeText(total);
  if (share > 0.01 && seconds > 0.5)
    text += ", " + timeText(seconds * (1 - share) / share) + " left";
  if (!what.empty())
    text += "  " + what;
  winsize size;
  size_t columns = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
  text.resize(std::min(text.size(), columns - 1));
  llvm::errs() << "\r\033[K" << text;
  llvm::errs().flush();
}

static std::string scaled(double value, const char *const *units, const char *separator) {
  int i = 0;
  while (value >= 999.95 && units[i + 1]) {
    value /= 1000;
    ++i;
  }
  std::string text;
  llvm::raw_string_ostream os(text);
  os << llvm::format(i == 0 ? "%.0f" : value < 99.95 ? "%.1f" : "%.0f", value);
  if (*units[i])
    os << separator << units[i];
  return text;
}

std::string sizeText(uint64_t bytes) {
  static const char *const units[] = {"B", "kB", "MB", "GB", "TB", nullptr};
  return scaled(static_cast<double>(bytes), units, " ");
}

std::string countText(uint64_t count) {
  static const char *const units[] = {"", "k", "M", "B", "T", nullptr};
  return scaled(static_cast<double>(count), units, " ");
}

std::string timeText(double seconds) {
  std::string text;
  llvm::raw_string_ostream os(text);
  if (seconds < 1e-3)
    os << llvm::format("%.0f us", seconds * 1e6);
  else if (seconds < 1)
    os << llvm::format("%.1f ms", seconds * 1e3);
  else if (seconds < 60)
    os << llvm::format("%.1f s", seconds);
  else
    os << static_cast<int64_t>(seconds) / 60 << " min " << static_cast<int64_t>(seconds) % 60
       << " s";
  return text;
}

} // namespace moec::tool
