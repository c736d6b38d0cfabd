//===- Model.cpp - what compile, pack and inspect read --------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Model.h"

#include "Commands.h"
#include "Log.h"

#include "moe/Export/Output.h"
#include "moe/Runtime/Machine.h"

#include "llvm/ADT/StringExtras.h"

namespace moec::tool {

llvm::Expected<ModelTable> modelTable() {
  std::string shipped =
      shippedModelRows(commandLine[0].c_str(), reinterpret_cast<void *>(&modelTable));
  return ModelTable::load(shipped, modelRows());
}

llvm::Expected<WeightsChoice> parseWeightsChoice(llvm::StringRef text) {
  WeightsChoice out;
  if (text.empty())
    return out;
  if (text == "none") {
    out.kind = WeightsChoice::None;
    return out;
  }
  if (text == "random" || text.starts_with("random:")) {
    out.kind = WeightsChoice::Random;
    llvm::StringRef seed = text.drop_front(std::min<size_t>(text.size(), 7));
    if (seed.getAsInteger(10, out.seed))
      return makeError(ErrorCode::ARGUMENT, "--checkpoint", "random:SEED with a whole number",
                       "`" + text + "`");
    return out;
  }
  out.kind = WeightsChoice::Path;
  out.path = text.str();
  return out;
}

llvm::Expected<LoadedModel> loadModelWith(llvm::StringRef path, const WeightsChoice &weights,
                                          std::optional<Format> dtype) {
  auto table = modelTable();
  if (!table)
    return table.takeError();
  LoadOptions options;
  options.dtype = dtype;
  options.followLinks = followLinks();
  options.checkpoint = weights.path;
  options.shapesOnly = weights.kind == WeightsChoice::None || weights.kind == WeightsChoice::Random;
  auto loaded = loadModel(path, *table, options);
  if (loaded)
    for (const std::string &note : loaded->spec.notes)
      Log::get().note("note: " + note);
  return loaded;
}

llvm::Error noSuchLayer(const ModelSpec &spec, int64_t number) {
  std::string there;
  for (size_t i = 0, j; i < spec.layers.size(); i = j) {
    for (j = i + 1; j < spec.layers.size(); ++j)
      if (spec.layers[j].index > spec.layers[j - 1].index + 1)
        break;
    there += (there.empty() ? "" : ",") + std::to_string(spec.layers[i].index);
    if (spec.layers[j - 1].index > spec.layers[i].index)
      there += "-" + std::to_string(spec.layers[j - 1].index);
  }
  return makeError(ErrorCode::ARGUMENT, "--layers", "decoder layers of this model (" + there + ")",
                   llvm::Twine(number));
}

llvm::Expected<unsigned> parseThreads(int64_t value) {
  if (value < 0 || value > 4095)
    return makeError(ErrorCode::ARGUMENT, "--threads", "0 to 4095", llvm::Twine(value));
  return value ? static_cast<unsigned>(value) : static_cast<unsigned>(moec_cpus_allowed());
}

llvm::Error packModel(const ModelSpec &spec, llvm::ArrayRef<std::array<uint8_t, 32>> ids,
                      llvm::function_ref<std::unique_ptr<WeightReader>()> makeReader,
                      llvm::StringRef folder, unsigned threads) {
  uint64_t total = 0;
  for (const LayerSpec &layer : spec.layers)
    total += packedFileBytes(layer);
  if (std::optional<uint64_t> room = freeSpace(folder); room && *room < total)
    return makeError(ErrorCode::SPACE, "weights", sizeText(total) + " of free disk space",
                     sizeText(*room),
                     "free some space, choose another folder, or pack fewer layers");
  PackPlan plan(spec.layers, threads);
  std::vector<std::unique_ptr<WeightReader>> readers(plan.workers);
  for (std::unique_ptr<WeightReader> &reader : readers)
    reader = makeReader();
  Progress progress("pack", total, "bytes");
  PackProgress report;
  report.advance = [&](uint64_t bytes) { progress.advance(bytes); };
  report.layer = [&](llvm::StringRef name) { progress.label(name.str()); };
  return packLayers(spec.layers, ids, plan, readers, folder, report);
}

std::string tableText(const std::vector<std::vector<std::string>> &rows) {
  // Counted in code points: names and phrases may hold any UTF-8.
  auto width = [](llvm::StringRef text) {
    return static_cast<size_t>(llvm::count_if(text, [](char c) { return (c & 0xc0) != 0x80; }));
  };
  std::vector<size_t> widths;
  std::vector<bool> numeric;
  for (auto [r, row] : llvm::enumerate(rows))
    for (size_t c = 0; c < row.size(); ++c) {
      if (c >= widths.size()) {
        widths.push_back(0);
        numeric.push_back(true);
      }
      widths[c] = std::max(widths[c], width(row[c]));
      if (r && !row[c].empty() && !isdigit(static_cast<unsigned char>(row[c][0])))
        numeric[c] = false;
    }
  std::string out;
  for (const std::vector<std::string> &row : rows) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c) {
      std::string space(widths[c] - width(row[c]), ' ');
      line += numeric[c] ? space + row[c] : row[c] + space;
      line += "  ";
    }
    out += llvm::StringRef(line).rtrim().str() + "\n";
  }
  return out;
}

} // namespace moec::tool
