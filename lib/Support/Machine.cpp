//===- Machine.cpp - measured constants of a machine ----------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Support/Machine.h"

#include "moe/Support/JSON.h"

#include <algorithm>
#include <cmath>

namespace moec {

double MachineConstants::bestRead() const {
  double best = 0;
  for (const auto &[name, rate] : read)
    best = std::max(best, rate.all);
  return best;
}

std::pair<std::string, double> MachineConstants::bestFlops(bool bf16) const {
  std::pair<std::string, double> best{"", 0};
  for (const auto &[name, rate] : flops)
    if ((bf16 || llvm::StringRef(name).starts_with("fma_f32")) && rate.all > best.second)
      best = {name, rate.all};
  return best;
}

/// Rates have no more than four digits that mean something.
static int64_t rounded(double value) {
  if (value < 1)
    return 0;
  double unit = std::pow(10.0, std::max(0.0, std::floor(std::log10(value)) - 3));
  return static_cast<int64_t>(std::round(value / unit) * unit);
}

llvm::json::Value toJSON(const MachineConstants &machine) {
  auto rates = [](const std::map<std::string, Rate> &from, double Rate::*field) {
    llvm::json::Object out;
    for (const auto &[name, rate] : from)
      out[name] = rounded(rate.*field);
    return out;
  };
  return llvm::json::Object{{"schema", machineSchema},
                            {"kind", "moec-machine"},
                            {"moec", machine.version},
                            {"cpu", machine.cpu},
                            {"threads", machine.threads},
                            {"caches", llvm::json::Object{{"line", machine.line},
                                                          {"l1d", machine.l1d},
                                                          {"l2", machine.l2},
                                                          {"l3", machine.l3},
                                                          {"l3_total", machine.l3Total}}},
                            {"levels", llvm::json::Array(machine.levels)},
                            {"flops", rates(machine.flops, &Rate::all)},
                            {"flops_one", rates(machine.flops, &Rate::one)},
                            {"read", rates(machine.read, &Rate::all)},
                            {"read_one", rates(machine.read, &Rate::one)},
                            {"fork_ns", rounded(machine.forkNs)}};
}

llvm::Expected<MachineConstants> readMachine(llvm::StringRef path) {
  auto value = readJSON(path, ErrorCode::FILE_FORMAT);
  if (!value)
    return value.takeError();
  const llvm::json::Object *root = value->getAsObject();
  llvm::StringRef kind = root ? root->getString("kind").value_or("") : "";
  if (kind != "moec-machine")
    return makeError(ErrorCode::FILE_FORMAT, path, "a machine file (kind \"moec-machine\")",
                     root ? "kind \"" + kind.str() + "\"" : describeJSON(&*value),
                     "moec doctor --save writes one");
  if (std::optional<int64_t> schema = root->getInteger("schema"); schema && *schema > machineSchema)
    return makeError(ErrorCode::ABI, path, "schema " + llvm::Twine(machineSchema) + " or lower",
                     "schema " + llvm::Twine(*schema), "a newer moec wrote it; update moec");

  JSONDocument document(path, ErrorCode::FILE_FORMAT);
  JSONReader reader(document, &*value, "$");
  MachineConstants out;
  constexpr int64_t most = int64_t(1) << 50;
  reader.integer("schema", 1, machineSchema);
  out.version = reader.string("moec", "");
  out.cpu = reader.string("cpu", "");
  out.threads = static_cast<int32_t>(reader.integer("threads", 1, 4096));
  out.levels = reader.strings("levels", /*required=*/true);
  out.forkNs = reader.number("fork_ns", 0.0);
  JSONReader caches(document, reader.require("caches", "an object"), "$.caches");
  out.line = caches.integer("line", 1, 4096, 64);
  out.l1d = caches.integer("l1d", 0, most, 0);
  out.l2 = caches.integer("l2", 0, most, 0);
  out.l3 = caches.integer("l3", 0, most, 0);
  out.l3Total = caches.integer("l3_total", 0, most, out.l3);
  auto rates = [&](llvm::StringRef key, std::map<std::string, Rate> &into, double Rate::*field) {
    const llvm::json::Value *found = reader.require(key, "an object of numbers");
    std::string at = ("$." + key).str();
    const llvm::json::Object *object = found ? found->getAsObject() : nullptr;
    if (!object)
      return document.fail(at, "an object of numbers", describeJSON(found));
    for (const auto &[name, number] : *object) {
      std::optional<double> rate = number.getAsNumber();
      if (!rate || !(*rate > 0))
        return document.fail(at + "." + llvm::StringRef(name).str(), "a positive number",
                             describeJSON(&number));
      into[llvm::StringRef(name).str()].*field = *rate;
    }
  };
  rates("flops", out.flops, &Rate::all);
  rates("flops_one", out.flops, &Rate::one);
  rates("read", out.read, &Rate::all);
  rates("read_one", out.read, &Rate::one);
  if (llvm::Error error = document.take())
    return std::move(error);
  return out;
}

} // namespace moec
