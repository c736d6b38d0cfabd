//===- InspectCommand.cpp - moec inspect ----------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "Log.h"
#include "Model.h"
#include "Usage.h"

#include "moe/Export/Manifest.h"
#include "moe/Export/Output.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/Format.h"
#include "llvm/Support/raw_ostream.h"

#include <algorithm>
#include <map>
#include <set>
#include <sys/ioctl.h>
#include <unistd.h>

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string> subject(cl::Positional, cl::desc("MODEL or DIR"),
                                    cl::sub(inspectParser()));
static cl::opt<bool> modelsOption("models", cl::desc("Print the model table"), cl::cat(category()),
                                  cl::sub(inspectParser()));
static cl::opt<bool> specOption("spec", cl::desc("Print the *.moe.json of the model"),
                                cl::cat(category()), cl::sub(inspectParser()));
static cl::opt<bool> checkOption("check",
                                 cl::desc("Read every weight byte of DIR and check its hash"),
                                 cl::cat(category()), cl::sub(inspectParser()));
static cl::opt<std::string> weightsOption("weights",
                                          cl::desc("Folder of packed weights (DIR/weights)"),
                                          cl::value_desc("WEIGHTS"), cl::cat(category()),
                                          cl::sub(inspectParser()));
static cl::opt<std::string>
    usageOption("usage", cl::desc("Show which experts were used (from moec run --trace)"),
                cl::value_desc("usage.safetensors"), cl::cat(category()), cl::sub(inspectParser()));
static cl::opt<std::string> svgOption("svg", cl::desc("Write the picture of --usage to FILE"),
                                      cl::value_desc("FILE"), cl::cat(category()),
                                      cl::sub(inspectParser()));
static cl::opt<bool> jsonOption("json", cl::desc("Print JSON instead of tables"),
                                cl::cat(category()), cl::sub(inspectParser()));
static cl::opt<std::string> outputOption("o", cl::desc("Write to FILE instead of stdout"),
                                         cl::value_desc("FILE"), cl::cat(category()),
                                         cl::sub(inspectParser()));

static llvm::Error print(llvm::StringRef text) {
  if (!outputOption.empty() && outputOption != "-")
    return replaceFile(outputOption, text);
  llvm::outs() << text;
  return llvm::Error::success();
}

static std::string jsonText(llvm::json::Value value) {
  std::string text;
  llvm::raw_string_ostream os(text);
  os << llvm::formatv("{0:2}", value) << "\n";
  return text;
}

//===----------------------------------------------------------------------===//
// Tables
//===----------------------------------------------------------------------===//

static std::string plainText(const llvm::json::Value &value) {
  if (auto string = value.getAsString())
    return string->str();
  std::string text;
  llvm::raw_string_ostream os(text);
  os << value;
  return text;
}

/// {"router":{"score":"softmax"}} to ("router.score", "softmax").
static void flatten(const llvm::json::Object &object, const std::string &prefix,
                    std::vector<std::pair<std::string, std::string>> &out) {
  std::vector<llvm::StringRef> keys;
  for (const auto &member : object)
    keys.push_back(member.first);
  llvm::sort(keys);
  // Numbers and words before groups, so that the letters come first.
  for (bool groups : {false, true})
    for (llvm::StringRef key : keys) {
      const llvm::json::Value &value = *object.get(key);
      std::string path = prefix.empty() ? key.str() : prefix + "." + key.str();
      if (const llvm::json::Object *inner = value.getAsObject()) {
        if (groups)
          flatten(*inner, path, out);
      } else if (!groups) {
        out.emplace_back(path, plainText(value));
      }
    }
}

static std::string originOf(const LayerSpec &layer, const std::string &path) {
  auto it = layer.origins.find(path);
  return it == layer.origins.end() ? "default" : it->second;
}

/// Layers that are equal in everything printed are printed once.
static std::string layersText(const ModelSpec &spec) {
  std::string out;
  llvm::raw_string_ostream os(out);
  std::vector<std::vector<std::string>> rows = {
      {"layers", "name", "kind", "H", "F", "E", "K", "weights", "parameters", "active", "packed"}};
  uint64_t total = 0, active = 0, packed = 0;
  std::vector<std::pair<std::string, const LayerSpec *>> groups;
  auto key = [](const LayerSpec &layer) {
    std::string text = canonicalText(semantics(layer));
    for (const auto &[path, origin] : layer.origins)
      text += "\n" + path + ": " + origin;
    return text;
  };
  for (size_t i = 0; i < spec.layers.size();) {
    const LayerSpec &layer = spec.layers[i];
    std::string text = key(layer);
    size_t j = i;
    uint64_t bytes = 0;
    while (j < spec.layers.size() && key(spec.layers[j]) == text)
      bytes += packedFileBytes(spec.layers[j++]);
    uint64_t count = j - i;
    total += layer.totalParameters() * count;
    active += layer.activeParameters() * count;
    packed += bytes;
    std::string range = std::to_string(layer.index);
    if (count > 1)
      range += "-" + std::to_string(spec.layers[j - 1].index);
    rows.push_back({range, layer.name + (count > 1 ? " …" : ""), name(layer.kind).str(),
                    std::to_string(layer.H), std::to_string(layer.F), std::to_string(layer.E),
                    std::to_string(layer.K), name(layer.format).str(),
                    countText(layer.totalParameters() * count),
                    countText(layer.activeParameters() * count), sizeText(bytes)});
    groups.emplace_back(range, &layer);
    i = j;
  }
  os << "model       " << spec.name << " (" << spec.modelType << "), computes in "
     << name(spec.dtype) << "\nparameters  " << countText(total) << " in these layers, "
     << countText(active) << " active per token; packed " << sizeText(packed) << "\n\n"
     << tableText(rows);
  for (auto [range, layer] : groups) {
    os << "\nattributes of layer" << (llvm::StringRef(range).contains('-') ? "s " : " ") << range
       << "\n";
    llvm::json::Object object = semantics(*layer);
    object.erase("weights");
    std::vector<std::pair<std::string, std::string>> values;
    flatten(object, "", values);
    std::vector<std::vector<std::string>> table = {{"attribute", "value", "origin"}};
    for (const auto &[path, value] : values)
      table.push_back({path, value, originOf(*layer, path)});
    os << tableText(table);
    table = {{"weight", "shape", "format", "sources"}};
    for (const WeightSpec &weight : layer->weights) {
      std::string sources;
      for (const WeightSource &source : weight.sources)
        sources += (sources.empty() ? "" : ", ") + source.tensor;
      table.push_back({weight.role,
                       "[" + std::to_string(weight.experts) + "][" + std::to_string(weight.parts) +
                           "][" + std::to_string(weight.rows) + "," + std::to_string(weight.cols) +
                           "]",
                       name(weight.format).str(), sources.empty() ? "none" : sources});
    }
    os << "\n" << tableText(table);
  }
  return out;
}

/// "e0_v4_*" for functions that differ by the types of x and y alone, where it matches no function
/// but them.
static std::string patternText(llvm::ArrayRef<llvm::StringRef> functions,
                               llvm::ArrayRef<llvm::StringRef> all) {
  std::map<llvm::StringRef, std::vector<llvm::StringRef>> stems;
  for (llvm::StringRef function : functions) {
    llvm::StringRef stem = function;
    while (stem.consume_back("_f32") || stem.consume_back("_bf16"))
      ;
    stems[stem].push_back(function);
  }
  std::vector<std::string> out;
  for (const auto &[stem, members] : stems) {
    std::string prefix = stem.str() + "_";
    size_t matching =
        llvm::count_if(all, [&](llvm::StringRef name) { return name.starts_with(prefix); });
    if (members.size() > 1 && matching == members.size())
      out.push_back(prefix + "*");
    else
      for (llvm::StringRef member : members)
        out.push_back(member.str());
  }
  return llvm::join(out, ", ");
}

/// The schedules of a manifest, a row for those that are equal; why each was chosen below.
static std::string strategyText(const llvm::json::Object &strategy,
                                const llvm::json::Object *reasons) {
  // A schedule is equal to another where matmul, fields and reason are.
  using Schedule = std::pair<std::string, std::map<std::string, std::string>>;
  std::map<std::pair<Schedule, std::string>, std::vector<llvm::StringRef>> equal;
  std::vector<llvm::StringRef> functions;
  std::set<std::string> columns;
  for (const auto &[function, value] : strategy) {
    functions.push_back(function);
    const llvm::json::Object *ops = value.getAsObject();
    const llvm::json::Object *why = reasons ? reasons->getObject(function) : nullptr;
    for (const auto &[op, fieldsValue] : ops ? *ops : llvm::json::Object()) {
      Schedule schedule{llvm::StringRef(op).str(), {}};
      if (const llvm::json::Object *fields = fieldsValue.getAsObject())
        for (const auto &[key, field] : *fields)
          if (!field.getAsArray()) { // tiles of a GPU: their reason says them in words
            schedule.second[llvm::StringRef(key).str()] = plainText(field);
            columns.insert(llvm::StringRef(key).str());
          }
      std::string reason = why ? why->getString(op).value_or("").str() : "";
      equal[{schedule, reason}].push_back(function);
    }
  }
  std::vector<std::vector<std::string>> rows = {{"functions", "matmul"}};
  for (const std::string &column : columns) {
    rows[0].push_back(column);
    std::replace(rows[0].back().begin(), rows[0].back().end(), '_', ' ');
  }
  std::string why;
  for (auto &[key, members] : equal) {
    const auto &[schedule, reason] = key;
    llvm::sort(members);
    rows.push_back({patternText(members, functions), schedule.first});
    for (const std::string &column : columns) {
      auto field = schedule.second.find(column);
      rows.back().push_back(field == schedule.second.end() ? "" : field->second);
    }
    if (!reason.empty())
      why += rows.back()[0] + " " + schedule.first + ": " + reason + "\n";
  }
  return tableText(rows) + (why.empty() ? "" : "\nwhy\n" + why);
}

static std::string codeText(const Manifest &manifest) {
  std::string out;
  llvm::raw_string_ostream os(out);
  const llvm::json::Object &root = *manifest.json.getAsObject();
  uint64_t library = 0;
  if (const llvm::json::Object *sizes = root.getObject("sizes"))
    library = sizes->getInteger("library").value_or(0);
  os << "library     " << manifest.library << ", " << sizeText(library) << ", made by moec "
     << manifest.version << "\n";
  std::vector<std::vector<std::string>> rows = {
      {"code", "level", "entry", "x", "y", "stages", "path"}};
  if (const llvm::json::Array *codes = root.getArray("code"))
    for (auto [number, element] : llvm::enumerate(*codes)) {
      const llvm::json::Object *code = element.getAsObject();
      const llvm::json::Array *levels = code ? code->getArray("levels") : nullptr;
      if (!levels)
        continue;
      for (const llvm::json::Value &levelValue : *levels) {
        const llvm::json::Object *level = levelValue.getAsObject();
        const llvm::json::Array *entries = level ? level->getArray("entries") : nullptr;
        if (!entries)
          continue;
        for (const llvm::json::Value &entryValue : *entries) {
          const llvm::json::Object *entry = entryValue.getAsObject();
          if (!entry)
            continue;
          std::string path;
          size_t stages = 0;
          if (const llvm::json::Array *list = entry->getArray("stages"))
            for (const llvm::json::Value &stage : *list) {
              ++stages;
              if (const llvm::json::Object *object = stage.getAsObject())
                path = object->getString("path").value_or("").str();
            }
          auto text = [&](const llvm::json::Object *object, const char *key) {
            return object->getString(key).value_or("").str();
          };
          rows.push_back({std::to_string(number), text(level, "level"), text(entry, "kind"),
                          text(entry, "x"), text(entry, "y"), std::to_string(stages), path});
        }
      }
    }
  os << "\n" << tableText(rows);
  const llvm::json::Object *strategy = root.getObject("strategy");
  if (!strategy || strategy->empty())
    return out;
  os << "\nstrategies (edit this section of manifest.json and give it to --strategy)\n"
     << strategyText(*strategy, root.getObject("reasons"));
  return out;
}

//===----------------------------------------------------------------------===//
// Checks
//===----------------------------------------------------------------------===//

static llvm::Error checkWeights(const Manifest &manifest) {
  std::string folder = weightsOption.empty() ? subject + "/weights" : weightsOption;
  uint64_t total = 0;
  for (const Manifest::Layer &layer : manifest.layers)
    total += layer.bytes;
  Progress progress("check", total, "bytes");
  PackProgress report;
  report.advance = [&](uint64_t bytes) { progress.advance(bytes); };
  llvm::Error errors = llvm::Error::success();
  for (const Manifest::Layer &layer : manifest.layers) {
    progress.label(layer.name);
    std::string path = folder + "/" + layer.file;
    auto file = readPackedHeader(path);
    if (!file) {
      errors = llvm::joinErrors(std::move(errors), file.takeError());
      continue;
    }
    if (file->id != layer.id) {
      errors = llvm::joinErrors(
          std::move(errors),
          makeError(ErrorCode::WEIGHTS, path, "weights of id " + hexText(layer.id).substr(0, 16),
                    "id " + hexText(file->id).substr(0, 16),
                    "they were packed for another model; moec pack makes them again"));
      continue;
    }
    if (file->bytes != layer.bytes) {
      errors = llvm::joinErrors(std::move(errors), makeError(ErrorCode::WEIGHTS, path,
                                                             llvm::Twine(layer.bytes) + " bytes",
                                                             llvm::Twine(file->bytes) + " bytes"));
      continue;
    }
    if (llvm::Error error = checkPackedBytes(path, *file, report))
      errors = llvm::joinErrors(std::move(errors), std::move(error));
  }
  if (errors)
    return errors;
  return print(std::to_string(manifest.layers.size()) + " weight files, " + sizeText(total) +
               ": every byte as packed\n");
}

static llvm::Error showUsage() {
  auto usage = readUsage(usageOption);
  if (!usage)
    return usage.takeError();
  if (!svgOption.empty())
    if (llvm::Error error = replaceFile(svgOption, usageSVG(*usage)))
      return error;
  if (jsonOption) {
    llvm::json::Array layers;
    for (const LayerUsage &layer : usage->layers) {
      Balance balance = balanceOf(layer);
      layers.push_back(llvm::json::Object{{"layer", layer.layer},
                                          {"tokens", layer.tokens},
                                          {"chosen", layer.chosen},
                                          {"entropy", balance.entropy},
                                          {"imbalance", balance.imbalance},
                                          {"unused", balance.unused},
                                          {"counts", llvm::json::Array(layer.counts)}});
    }
    return print(jsonText(
        llvm::json::Object{{"schema", 1}, {"model", usage->model}, {"layers", std::move(layers)}}));
  }
  bool terminal = isatty(STDOUT_FILENO) && (outputOption.empty() || outputOption == "-");
  winsize size;
  unsigned columns =
      terminal && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 160;
  return print(usageTable(*usage, columns, terminal && !::getenv("NO_COLOR")));
}

static llvm::Error showModels() {
  auto table = modelTable();
  if (!table)
    return table.takeError();
  if (jsonOption) {
    llvm::json::Array rows;
    for (const auto &[type, row] : table->rows())
      rows.push_back(llvm::json::Object{{"model_type", type}, {"config_class", row.configClass}});
    return print(jsonText(llvm::json::Object{{"models", std::move(rows)}}));
  }
  std::vector<std::vector<std::string>> rows = {{"model_type", "config class", "row"}};
  for (const auto &[type, row] : table->rows())
    rows.push_back({type, row.configClass, row.file});
  return print(tableText(rows));
}

static llvm::Error work() {
  if (!svgOption.empty() && usageOption.empty())
    return makeError(ErrorCode::ARGUMENT, "--svg", "--usage with it", "none");
  if (modelsOption)
    return showModels();
  if (!usageOption.empty() && subject.empty())
    return showUsage();
  if (subject.empty())
    return makeError(ErrorCode::ARGUMENT, "moec inspect", "MODEL, DIR, --models or --usage",
                     "none");

  llvm::sys::fs::file_status status;
  bool isFolder = !llvm::sys::fs::status(subject + "/manifest.json", status) &&
                  llvm::sys::fs::exists(status) && !llvm::StringRef(subject).ends_with(".json");
  if (checkOption && !isFolder)
    return makeError(ErrorCode::ARGUMENT, "--check", "a compiled DIR",
                     "`" + subject + "`, which has no manifest.json");
  if (isFolder) {
    auto manifest = readManifest(subject);
    if (!manifest)
      return manifest.takeError();
    if (checkOption)
      return checkWeights(*manifest);
    if (!usageOption.empty())
      return showUsage();
    if (specOption)
      return print(jsonText(toJSON(manifest->spec)));
    if (jsonOption)
      return print(jsonText(manifest->json));
    return print(layersText(manifest->spec) + "\n" + codeText(*manifest));
  }
  auto table = modelTable();
  if (!table)
    return table.takeError();
  LoadOptions options;
  options.followLinks = followLinks();
  auto loaded = loadModel(subject, *table, options);
  if (!loaded)
    return loaded.takeError();
  for (const std::string &note : loaded->spec.notes)
    Log::get().note("note: " + note);
  if (!usageOption.empty())
    return showUsage();
  if (specOption)
    return print(jsonText(toJSON(loaded->spec)));
  if (jsonOption)
    return print(jsonText(toJSON(loaded->spec, /*origins=*/true)));
  std::string text = layersText(loaded->spec);
  text += loaded->checkpoint ? "\nweights     " + std::to_string(loaded->checkpoint->size()) +
                                   " tensors in " + loaded->checkpoint->path() + "\n"
                             : "\nweights     none (shapes only)\n";
  if (llvm::Error error = checkModel(loaded->spec)) {
    for (const Error &e : takeErrors(std::move(error)))
      text += "\nnot compilable yet: " + e.message() + "\n";
  }
  return print(text);
}

static int run() { return Log::get().report(work()); }

const Command inspectCommand = {"inspect", "MODEL|DIR",
                                "Show what a model or a compiled folder holds, and why.",
                                inspectParser, run};

} // namespace moec::tool
