//===- BenchTable.cpp - rows of moec bench --------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Bench.h"
#include "Log.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/Format.h"
#include "llvm/Support/raw_ostream.h"

#include <cmath>
#include <ctime>

namespace moec::tool {

namespace {
/// What a row says about the machine.
struct Derived {
  std::pair<std::string, double> peak; ///< instruction and FLOP/s
  double read = 0;                     ///< bytes/s
  double roof = 0;  ///< seconds: the larger of reading the weights and multiplying
  double bound = 0; ///< least ratio to the measured dense FFN that the machine allows
};
} // namespace

static Derived derive(const BenchHeader &header, const BenchRow &row) {
  Derived out;
  out.peak = header.machine.bestFlops(row.subject->spec.compute == Format::BF16);
  out.read = row.read > 0 ? row.read : header.machine.bestRead();
  if (out.peak.second > 0 && out.read > 0)
    out.roof = std::max(row.bytes / out.read, row.flops / out.peak.second);
  if (row.dense.median > 0)
    out.bound = out.roof / row.dense.median;
  return out;
}

static double digits(double value, int count = 4) {
  if (value == 0 || !std::isfinite(value))
    return 0;
  double unit = std::pow(10.0, std::floor(std::log10(std::fabs(value))) + 1 - count);
  // Through text: a product with a power of ten is not the nearest number.
  std::string text;
  llvm::raw_string_ostream os(text);
  os << llvm::format("%.*g", count, std::round(value / unit) * unit);
  double out = value;
  (void)llvm::StringRef(text).getAsDouble(out);
  return out;
}

static llvm::json::Object inMicroseconds(const Quartiles &q) {
  return llvm::json::Object{{"q1", digits(q.low * 1e6)},
                            {"median", digits(q.median * 1e6)},
                            {"q3", digits(q.high * 1e6)}};
}

static std::string dateText() {
  char text[32];
  time_t seconds = ::time(nullptr);
  tm parts;
  ::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", ::gmtime_r(&seconds, &parts));
  return text;
}

llvm::json::Object benchRecord(const BenchHeader &header, const BenchRow &row) {
  const Subject &subject = *row.subject;
  const LayerSpec &spec = subject.spec;
  Derived d = derive(header, row);
  double seconds = row.layer.median;
  llvm::json::Object out{
      {"schema", 1},
      {"kind", "moec-bench"},
      {"moec", header.machine.version},
      {"date", dateText()},
      {"cpu", header.machine.cpu},
      {"threads", header.machine.threads},
      {"level", subject.level},
      {"model", header.model},
      {"layer", subject.name},
      {"layer_kind", name(spec.kind)},
      {"H", spec.H},
      {"F", spec.F},
      {"E", spec.E},
      {"K", spec.K},
      {"S", spec.combine.sharedWidth},
      {"format", name(spec.format)},
      {"compute", name(spec.compute)},
      {"parameters", spec.totalParameters()},
      {"active_parameters", spec.activeParameters()},
      {"tokens", row.tokens},
      {"routing", row.routing},
      {"experts_used", digits(row.expertsUsed)},
      {"largest_expert", row.largestExpert},
      {"banks", static_cast<int64_t>(subject.banks.size())},
      {"bank_bytes", static_cast<int64_t>(subject.bankBytes)},
      {"cache_bytes", header.machine.l3Total},
      {"inputs", row.inputs},
      {"blocks", row.blocks},
      {"calls_per_block", row.calls},
      {"us", inMicroseconds(row.layer)},
      {"spread", digits(row.layer.spread(), 3)},
      {"tokens_per_s", digits(row.tokens / seconds)},
      {"gflops", digits(row.flops / seconds / 1e9)},
      {"peak", llvm::json::Object{{"instruction", d.peak.first},
                                  {"gflops", digits(d.peak.second / 1e9)},
                                  {"share", digits(row.flops / seconds / d.peak.second, 3)}}},
      {"weight_bytes", static_cast<int64_t>(row.bytes)},
      {"gbs", digits(row.bytes / seconds / 1e9)},
      {"read", llvm::json::Object{{"gbs", digits(d.read / 1e9)},
                                  {"share", digits(row.bytes / seconds / d.read, 3)}}},
      {"roof_us", digits(d.roof * 1e6)},
      {"roof_share", digits(d.roof / seconds, 3)}};
  if (row.enqueued.median > 0)
    out["enqueued_us"] = inMicroseconds(row.enqueued);
  if (row.route.median > 0)
    out["route_us"] = inMicroseconds(row.route);
  if (row.denseSubject)
    out["dense"] =
        llvm::json::Object{{"F", row.denseSubject->spec.F},
                           {"us", inMicroseconds(row.dense)},
                           {"gflops", digits(row.denseFlops / row.dense.median / 1e9)},
                           {"gbs", digits(row.denseBytes / row.dense.median / 1e9)},
                           {"ratio", llvm::json::Object{{"q1", digits(row.ratio.low, 3)},
                                                        {"median", digits(row.ratio.median, 3)},
                                                        {"q3", digits(row.ratio.high, 3)}}},
                           {"bound", digits(d.bound, 3)}};
  double total = 0;
  for (const StageTime &stage : row.stages)
    total += stage.seconds;
  llvm::json::Array stages;
  for (const StageTime &stage : row.stages)
    stages.push_back(llvm::json::Object{{"stage", stage.label},
                                        {"us", digits(stage.seconds * 1e6)},
                                        {"share", digits(stage.seconds / total, 3)},
                                        {"balance", digits(stage.balance, 3)}});
  out["stages"] = std::move(stages);
  return out;
}

static std::string number(double value) {
  std::string text;
  llvm::raw_string_ostream os(text);
  os << llvm::format(value < 9.995 ? "%.2f" : value < 99.95 ? "%.1f" : "%.0f", value);
  return text;
}
static std::string percent(double share) {
  return std::to_string(static_cast<int64_t>(std::lround(share * 100))) + " %";
}

std::string benchMarkdown(const BenchHeader &header, const std::vector<BenchRow> &rows) {
  // The columns of llama-bench, then what it does not print.
  std::vector<std::vector<std::string>> table = {
      {"model", "layer", "size", "params (active)", "level", "threads", "dtype", "routing", "test",
       "us", "± %", "tok/s", "GFLOP/s (of peak)", "GB/s (of read)", "of roof", "x dense (bound)",
       "stages"}};
  for (const BenchRow &row : rows) {
    const Subject &subject = *row.subject;
    const LayerSpec &spec = subject.spec;
    Derived d = derive(header, row);
    double seconds = row.layer.median, total = 0;
    std::string stages;
    for (const StageTime &stage : row.stages)
      total += stage.seconds;
    for (const StageTime &stage : row.stages)
      stages += (stages.empty() ? "" : ", ") + stage.label + " " + percent(stage.seconds / total);
    table.push_back(
        {header.model, subject.name, sizeText(subject.bankBytes),
         countText(spec.totalParameters()) + " (" + countText(spec.activeParameters()) + ")",
         subject.level, std::to_string(header.machine.threads), name(spec.compute).str(),
         row.routing, "T=" + std::to_string(row.tokens), number(seconds * 1e6),
         number(row.layer.spread() * 100), number(static_cast<double>(row.tokens) / seconds),
         number(row.flops / seconds / 1e9) + " (" + percent(row.flops / seconds / d.peak.second) +
             ")",
         number(row.bytes / seconds / 1e9) + " (" + percent(row.bytes / seconds / d.read) + ")",
         percent(d.roof / seconds),
         row.denseSubject ? number(row.ratio.median) + " (" + number(d.bound) + ")" : "-", stages});
  }
  std::string out;
  llvm::raw_string_ostream os(out);
  for (auto [r, row] : llvm::enumerate(table)) {
    os << "| " << llvm::join(row, " | ") << " |\n";
    if (r == 0) {
      for (size_t c = 0; c < row.size(); ++c)
        os << (c == 0 ? "| " : " ") << (c >= 9 && c <= 15 ? "---:" : "---") << " |";
      os << "\n";
    }
  }
  return out;
}

static void flatten(const llvm::json::Value &value, const std::string &path,
                    std::vector<std::pair<std::string, std::string>> &out) {
  if (const llvm::json::Object *object = value.getAsObject()) {
    std::vector<std::string> keys;
    for (const auto &member : *object)
      keys.push_back(llvm::StringRef(member.first).str());
    llvm::sort(keys);
    for (const std::string &key : keys)
      flatten(*object->get(key), path.empty() ? key : path + "." + key, out);
    return;
  }
  std::string text;
  llvm::raw_string_ostream os(text);
  if (const llvm::json::Array *array = value.getAsArray()) {
    // Stages: "up=61.2;down=30.1".
    for (const llvm::json::Value &element : *array)
      if (const llvm::json::Object *stage = element.getAsObject())
        os << (text.empty() ? "" : ";") << stage->getString("stage").value_or("") << "="
           << stage->getNumber("us").value_or(0);
  } else if (auto string = value.getAsString()) {
    bool quote = string->find_first_of(",\"\n") != llvm::StringRef::npos;
    std::string doubled;
    for (char c : *string)
      doubled += c == '"' ? std::string("\"\"") : std::string(1, c);
    os << (quote ? "\"" + doubled + "\"" : doubled);
  } else {
    os << value;
  }
  out.emplace_back(path, text);
}

std::string benchCSV(const BenchHeader &header, const std::vector<BenchRow> &rows) {
  std::vector<std::string> columns;
  std::vector<std::map<std::string, std::string>> lines;
  for (const BenchRow &row : rows) {
    std::vector<std::pair<std::string, std::string>> fields;
    flatten(benchRecord(header, row), "", fields);
    std::map<std::string, std::string> line;
    for (auto &[key, text] : fields) {
      if (!llvm::is_contained(columns, key))
        columns.push_back(key);
      line[key] = text;
    }
    lines.push_back(std::move(line));
  }
  std::string out = llvm::join(columns, ",") + "\n";
  for (std::map<std::string, std::string> &line : lines) {
    std::vector<std::string> cells;
    for (const std::string &column : columns)
      cells.push_back(line[column]);
    out += llvm::join(cells, ",") + "\n";
  }
  return out;
}

} // namespace moec::tool
