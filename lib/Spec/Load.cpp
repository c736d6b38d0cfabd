//===- Load.cpp - from a model on disk to a ModelSpec ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Load.h"

#include "Attributes.h"

#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/Path.h"

#include <algorithm>
#include <cctype>
#include <set>

namespace moec {

namespace {

//===----------------------------------------------------------------------===//
// Configurations
//===----------------------------------------------------------------------===//

/// A value and where it came from.
struct Sourced {
  llvm::json::Value value = nullptr;
  std::string origin;
};

/// The object of a configuration that describes the text model, and the way to it.
struct Config {
  const llvm::json::Object *object = nullptr; ///< with the row's keys
  const llvm::json::Object *outer = nullptr;  ///< the whole file
  std::string path;                           ///< "" or "text_config."
  std::string modelType;
  bool composite() const { return object != outer; }
};

/// The names transformers gives to the activations that are known here.
std::optional<Activation> activationOf(llvm::StringRef text) {
  if (text == "silu" || text == "swish")
    return Activation::SiLU;
  if (text == "gelu" || text == "gelu_python")
    return Activation::GELU;
  if (text == "gelu_pytorch_tanh" || text == "gelu_new" || text == "gelu_fast" ||
      text == "gelu_accurate" || text == "gelu_python_tanh")
    return Activation::GELUTanh;
  if (text == "relu")
    return Activation::ReLU;
  if (text == "relu2")
    return Activation::ReLU2;
  return std::nullopt;
}

/// Finds the object whose model_type has a row: the file itself, or the text model inside it.
llvm::Expected<std::pair<Config, const ModelRow *>>
findConfig(const llvm::json::Value &root, const std::string &file, const ModelTable &table) {
  Config config;
  config.object = config.outer = root.getAsObject();
  if (!config.object)
    return makeError(ErrorCode::CONFIG, file, "an object", describeJSON(&root));
  std::vector<std::string> seen;
  for (int depth = 0; depth < 4; ++depth) {
    const llvm::json::Value *type = config.object->get("model_type");
    if (!type && depth == 0)
      return makeError(ErrorCode::CONFIG, file + ": model_type", "a string", "nothing",
                       "a Hugging Face config.json names its model_type");
    std::optional<llvm::StringRef> text = type ? type->getAsString() : std::nullopt;
    if (type && (!text || text->empty()))
      return makeError(ErrorCode::CONFIG, file + ": " + config.path + "model_type", "a string",
                       describeJSON(type));
    if (text) {
      seen.push_back(text->str());
      config.modelType = text->str();
      if (const ModelRow *row = table.find(*text))
        return std::make_pair(config, row);
    }
    const llvm::json::Object *inner = nullptr;
    for (const char *key : {"text_config", "language_config", "llm_config", "thinker_config"}) {
      inner = config.object->getObject(key);
      if (inner) {
        config.path += std::string(key) + ".";
        config.object = inner;
        break;
      }
    }
    if (!inner)
      break;
  }
  std::vector<std::string> known;
  for (const auto &row : table.rows())
    known.push_back(row.first);
  std::vector<std::string> near = nearestNames(seen.back(), known, 1);
  std::string hint =
      near.empty() ? "the table has " + quoteList(known) : "the nearest is `" + near[0] + "`";
  hint += "; describe the layers in a *.moe.json file (`moec inspect --spec` prints one to start "
          "from), or add a row with --model-rows";
  for (std::string &s : seen)
    s = llvm::json::fixUTF8(llvm::StringRef(s).take_front(80));
  return makeError(ErrorCode::UNKNOWN_MODEL, file + ": " + config.path + "model_type",
                   "one with a row in the model table", quoteList(seen, "with inside"), hint);
}

/// What a configuration or a folder says about quantization is refused by name.
llvm::Error refuseQuantized(const Config &config, const std::string &file) {
  for (const llvm::json::Object *object : {config.outer, config.object}) {
    for (const char *key : {"quantization_config", "compression_config"}) {
      const llvm::json::Value *value = object->get(key);
      if (!value || value->getAsNull())
        continue;
      std::string method = "a quantized checkpoint";
      if (const llvm::json::Object *q = value->getAsObject()) {
        if (q->empty())
          continue;
        for (const char *field : {"quant_method", "format", "quant_algo"})
          if (std::optional<llvm::StringRef> text = q->getString(field)) {
            method = "`" + llvm::json::fixUTF8(text->take_front(60)) + "`";
            break;
          }
      }
      return makeError(
          ErrorCode::UNSUPPORTED, file + ": " + (object == config.outer ? "" : config.path) + key,
          "weights in f32, bf16 or f16", method, "quantized checkpoints are not implemented yet");
    }
  }
  return llvm::Error::success();
}

/// The dtype a configuration states: `dtype` or `torch_dtype`, of the text model or of the whole.
struct ConfigDtype {
  std::optional<Format> format;
  std::string origin;
  bool half = false; ///< float16, which becomes f32
};

llvm::Expected<ConfigDtype> configDtype(const Config &config, const std::string &file) {
  ConfigDtype out;
  for (const llvm::json::Object *object : {config.object, config.outer}) {
    for (const char *key : {"dtype", "torch_dtype"}) {
      const llvm::json::Value *value = object->get(key);
      if (!value || value->getAsNull())
        continue;
      std::string at = (object == config.outer ? "" : config.path) + key;
      std::optional<llvm::StringRef> text = value->getAsString();
      if (!text)
        return makeError(ErrorCode::CONFIG, file + ": " + at, "the name of a dtype",
                         describeJSON(value));
      llvm::StringRef dtype = *text;
      dtype.consume_front("torch.");
      out.origin = "config key `" + at + "`";
      if (dtype == "float32" || dtype == "float")
        out.format = Format::F32;
      else if (dtype == "bfloat16")
        out.format = Format::BF16;
      else if (dtype == "float16" || dtype == "half")
        out.half = true;
      else if (dtype != "auto")
        return makeError(ErrorCode::UNSUPPORTED, file + ": " + at,
                         "`float32`, `bfloat16` or `float16`", describeJSON(value));
      return out;
    }
  }
  return out;
}

//===----------------------------------------------------------------------===//
// Rows
//===----------------------------------------------------------------------===//

/// Applies the rules of a row to a configuration.
class RowReader {
public:
  RowReader(const ModelRow &row, const Config &config, const std::string &file)
      : row(row), config(config), rowDoc(row.file, ErrorCode::CONFIG),
        configDoc(file, ErrorCode::CONFIG) {}

  /// One layer before its weights are bound.
  struct Layer {
    LayerSpec spec;
    std::string module;                ///< "layers.3.mlp"
    std::vector<std::string> prefixes; ///< where its tensors may lie
    /// Role to forms; a form is a list of sources relative to the prefix.
    std::map<std::string, std::vector<std::vector<WeightSource>>> forms;
  };

  llvm::Expected<std::vector<Layer>> run();
  /// Keys of the MoE family that the row does not read.
  std::vector<std::string> unreadKeys() const;

private:
  const llvm::json::Object &rules() const { return *row.rules->getAsObject(); }

  bool failed() const { return rowDoc.failed() || configDoc.failed(); }
  void badRow(const std::string &at, const llvm::Twine &expected, const llvm::json::Value *got) {
    rowDoc.fail(at, expected, describeJSON(got));
  }

  void readKeys();
  void readKey(const std::string &key, JSONReader &rule);
  Sourced evaluate(const llvm::json::Value *expression, const std::string &at);
  bool holds(const llvm::json::Value *condition, const std::string &at, std::string &origin);
  const Sourced *valueOf(llvm::StringRef key, const std::string &at);
  std::optional<int64_t> integerOf(llvm::StringRef key, const std::string &at, std::string &origin);
  int64_t size(JSONReader &block, const char *attribute, LayerSpec &layer);
  std::string withNumber(std::string text) const;
  void readBlock(JSONReader &block, const std::string &at, Layer &out);
  void readForms(JSONReader &block, Layer &out);
  template <typename Read>
  void readGroup(JSONReader &block, const char *group, LayerSpec &layer, bool required, Read read);

  const ModelRow &row;
  const Config &config;
  JSONDocument rowDoc, configDoc;
  std::map<std::string, Sourced> values;
  std::set<std::string> readSpellings;
  int64_t layerIndex = 0;
};

void RowReader::readKeys() {
  const llvm::json::Value *keys = rules().get("keys");
  JSONReader reader(rowDoc, keys, "keys");
  if (rowDoc.failed())
    return;
  for (const auto &member : *keys->getAsObject()) {
    std::string key = llvm::StringRef(member.first).str();
    JSONReader rule(rowDoc, reader.get(key), "keys." + key);
    readKey(key, rule);
    rule.finish();
    if (failed())
      return;
  }
  for (const std::string &key : JSONReader(rowDoc, row.rules.get(), "").strings("ignored", false))
    readSpellings.insert(key);
}

void RowReader::readKey(const std::string &key, JSONReader &rule) {
  std::vector<std::string> types{"integer", "number", "boolean", "activation", "integers"};
  std::string type = types[rule.choice("type", types)];
  std::vector<std::string> spellings = rule.strings("spellings", false);
  spellings.insert(spellings.begin(), key);
  const llvm::json::Value *fallback = rule.get("default");
  bool nullable = rule.boolean("nullable", false);
  int64_t low = 0, high = 0;
  if (type == "integer" || type == "integers") {
    low = rule.integer("from", 0, int64_t(1) << 40);
    high = rule.integer("to", low, int64_t(1) << 40);
  }
  if (rowDoc.failed())
    return;

  Sourced out;
  std::string used;
  for (const std::string &spelling : spellings) {
    readSpellings.insert(spelling);
    const llvm::json::Value *value = config.object->get(spelling);
    if (!value || (value->getAsNull() && nullable))
      continue;
    if (!used.empty()) {
      if (!(*value == out.value))
        return configDoc.fail(config.path + spelling,
                              "the same value as `" + used + "`, which means the same",
                              describeJSON(value));
      continue;
    }
    used = spelling;
    out = {*value, "config key `" + config.path + spelling + "`"};
  }
  if (used.empty()) {
    if (!fallback)
      return configDoc.fail(config.path + key, "a value, as it has no default", "nothing");
    out = {*fallback, "class default of " + row.configClass + " (`" + key + "` is absent)"};
  }

  std::string at = config.path + (used.empty() ? key : used);
  auto integerIn = [&](const llvm::json::Value &value) {
    std::optional<int64_t> i = isInteger(value) ? value.getAsInteger() : std::nullopt;
    return i && *i >= low && *i <= high;
  };
  std::string range = "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  if (type == "integer") {
    if (!integerIn(out.value))
      configDoc.fail(at, range, describeJSON(&out.value));
  } else if (type == "number") {
    if (!out.value.getAsNumber())
      configDoc.fail(at, "a number", describeJSON(&out.value));
  } else if (type == "boolean") {
    if (!out.value.getAsBoolean())
      configDoc.fail(at, "true or false", describeJSON(&out.value));
  } else if (type == "integers") {
    const llvm::json::Array *array = out.value.getAsArray();
    if (!array)
      configDoc.fail(at, "an array of integers", describeJSON(&out.value));
    else
      for (size_t i = 0; i < array->size(); ++i)
        if (!integerIn((*array)[i]))
          configDoc.fail(at + "[" + llvm::Twine(i) + "]", range, describeJSON(&(*array)[i]));
  } else if (type == "activation") {
    std::optional<llvm::StringRef> text = out.value.getAsString();
    std::optional<Activation> activation = text ? activationOf(*text) : std::nullopt;
    if (!text)
      configDoc.fail(at, "the name of an activation", describeJSON(&out.value));
    else if (!activation)
      configDoc.fail(ErrorCode::UNSUPPORTED, at,
                     "`silu`, `gelu`, `gelu_pytorch_tanh`, `relu` or another name of these",
                     describeJSON(&out.value), "this activation is not implemented");
    else
      out.value = name(*activation).str();
  }
  values[key] = std::move(out);
}

const Sourced *RowReader::valueOf(llvm::StringRef key, const std::string &at) {
  auto it = values.find(key.str());
  if (it != values.end())
    return &it->second;
  std::vector<std::string> known;
  for (const auto &value : values)
    known.push_back(value.first);
  rowDoc.fail(at, "one of " + quoteList(known), "`" + key + "`");
  return nullptr;
}

std::optional<int64_t> RowReader::integerOf(llvm::StringRef key, const std::string &at,
                                            std::string &origin) {
  const Sourced *value = valueOf(key, at);
  if (!value)
    return std::nullopt;
  origin = value->origin;
  std::optional<int64_t> i = value->value.getAsInteger();
  if (!i)
    rowDoc.fail(at, "a key whose value is an integer", describeJSON(&value->value));
  return i;
}

/// {"key": k} | {"key": k, "equals": v} | {"key": k, "above": n} | {"layer_in": k} |
/// {"layer_multiple_of": k, "plus": n} | {"not": c} | {"all": [c…]} | {"any": [c…]}
bool RowReader::holds(const llvm::json::Value *condition, const std::string &at,
                      std::string &origin) {
  JSONReader reader(rowDoc, condition, at);
  if (failed())
    return false;
  bool result = false;
  if (reader.has("all") || reader.has("any")) {
    bool all = reader.has("all");
    const char *word = all ? "all" : "any";
    const llvm::json::Array *list = reader.get(word)->getAsArray();
    if (!list) {
      badRow(at + "." + word, "an array of conditions", reader.get(word));
      return false;
    }
    result = all;
    for (size_t i = 0; i < list->size(); ++i) {
      std::string here, place = at + "." + word + "[" + std::to_string(i) + "]";
      bool one = holds(&(*list)[i], place, here);
      if (!here.empty() && origin.find(here) == std::string::npos)
        origin += (origin.empty() ? "" : ", ") + here;
      result = all ? result && one : result || one;
    }
  } else if (reader.has("not")) {
    result = !holds(reader.get("not"), at + ".not", origin);
  } else if (reader.has("layer_in")) {
    const Sourced *list = valueOf(reader.string("layer_in"), at + ".layer_in");
    const llvm::json::Array *array = list ? list->value.getAsArray() : nullptr;
    if (!array) {
      badRow(at + ".layer_in", "a key whose value is a list", reader.get("layer_in"));
      return false;
    }
    origin = list->origin;
    result = llvm::any_of(*array, [&](const llvm::json::Value &v) {
      return v.getAsInteger() == std::optional<int64_t>(layerIndex);
    });
  } else if (reader.has("layer_multiple_of")) {
    std::optional<int64_t> step =
        integerOf(reader.string("layer_multiple_of"), at + ".layer_multiple_of", origin);
    int64_t plus = reader.integer("plus", 0, Limits::layers, 0);
    result = step && *step > 0 && (layerIndex + plus) % *step == 0;
  } else {
    const Sourced *value = valueOf(reader.string("key"), at + ".key");
    if (!value)
      return false;
    origin = value->origin;
    if (reader.has("equals")) {
      result = value->value == *reader.get("equals");
    } else if (reader.has("above")) {
      std::optional<double> number = value->value.getAsNumber();
      if (!number)
        badRow(at + ".key", "a key whose value is a number", &value->value);
      result = number && *number > reader.number("above");
    } else {
      std::optional<bool> truth = value->value.getAsBoolean();
      if (!truth)
        badRow(at + ".key", "a key whose value is true or false", &value->value);
      result = truth.value_or(false);
    }
  }
  reader.finish();
  return result;
}

/// A literal | {"key": k} | {"if": c, "then": e, "else": e}
Sourced RowReader::evaluate(const llvm::json::Value *expression, const std::string &at) {
  if (!expression->getAsObject())
    return {*expression, "rule of row " + row.modelType};
  JSONReader reader(rowDoc, expression, at);
  Sourced out;
  if (reader.has("if")) {
    std::string origin;
    bool truth = holds(reader.get("if"), at + ".if", origin);
    const llvm::json::Value *then = reader.require("then", "a value");
    const llvm::json::Value *other = reader.require("else", "a value");
    if (failed())
      return out;
    out = evaluate(truth ? then : other, at + (truth ? ".then" : ".else"));
    out.origin = origin;
  } else if (const Sourced *value = valueOf(reader.string("key"), at + ".key")) {
    out = *value;
  }
  reader.finish();
  return out;
}

std::string RowReader::withNumber(std::string text) const {
  for (size_t at = text.find("{i}"); at != std::string::npos; at = text.find("{i}", at))
    text.replace(at, 3, std::to_string(layerIndex));
  return text;
}

int64_t RowReader::size(JSONReader &block, const char *attribute, LayerSpec &layer) {
  std::string at = block.pathOf(attribute);
  const llvm::json::Value *expression = block.require(attribute, "a size");
  if (failed())
    return 1;
  Sourced value = evaluate(expression, at);
  layer.origins[attribute] = value.origin;
  std::optional<int64_t> i = value.value.getAsInteger();
  if (!i && !failed())
    badRow(at, "an integer", &value.value);
  return i.value_or(1);
}

/// Evaluates every attribute of "router", "expert" or "combine", then reads the result as in a
/// *.moe.json file.
template <typename Read>
void RowReader::readGroup(JSONReader &block, const char *group, LayerSpec &layer, bool required,
                          Read read) {
  const llvm::json::Value *rule = required ? block.require(group, "an object") : block.get(group);
  if (!rule || failed())
    return;
  std::string at = block.pathOf(group);
  const llvm::json::Object *object = rule->getAsObject();
  if (!object)
    return badRow(at, "an object", rule);
  llvm::json::Object evaluated;
  for (const auto &member : *object) {
    std::string key = llvm::StringRef(member.first).str();
    Sourced value = evaluate(&member.second, at + "." + key);
    layer.origins[std::string(group) + "." + key] = value.origin;
    evaluated[key] = std::move(value.value);
  }
  if (failed())
    return;
  llvm::json::Value result = std::move(evaluated);
  JSONReader reader(rowDoc, &result, at);
  read(reader);
  reader.finish();
}

void RowReader::readForms(JSONReader &block, Layer &out) {
  std::string at = block.pathOf("weights");
  const llvm::json::Value *weights = block.require("weights", "an object");
  JSONReader roles(rowDoc, weights, at);
  for (const WeightSpec &weight : out.spec.weights) {
    const llvm::json::Value *list = roles.require(weight.role, "an array of forms");
    if (failed())
      return;
    const llvm::json::Array *forms = list->getAsArray();
    if (!forms || forms->empty())
      return badRow(roles.pathOf(weight.role), "an array of forms", list);
    for (size_t f = 0; f < forms->size(); ++f) {
      std::string here = roles.pathOf(weight.role) + "[" + std::to_string(f) + "]";
      const llvm::json::Array *sources = (*forms)[f].getAsArray();
      if (!sources || sources->empty())
        return badRow(here, "an array of sources", &(*forms)[f]);
      std::vector<WeightSource> form;
      std::vector<int> covered(weight.parts, 0);
      for (size_t s = 0; s < sources->size(); ++s) {
        JSONReader reader(rowDoc, &(*sources)[s], here + "[" + std::to_string(s) + "]");
        WeightSource source;
        source.tensor = withNumber(reader.string("tensor"));
        source.arrangement =
            static_cast<Arrangement>(reader.choice("arrangement", {"per_expert", "stacked"}, 0));
        source.firstPart = reader.integer("first_part", 0, weight.parts - 1, 0);
        source.partCount = reader.integer("part_count", 1, weight.parts - source.firstPart, 1);
        source.transposed = reader.boolean("transposed", false);
        source.interleaved = reader.boolean("interleaved", false);
        reader.finish();
        if (failed())
          return;
        for (int64_t p = 0; p < source.partCount; ++p)
          ++covered[source.firstPart + p];
        form.push_back(std::move(source));
      }
      if (llvm::any_of(covered, [](int n) { return n != 1; }))
        return badRow(here, "sources that cover every part once", &(*forms)[f]);
      out.forms[weight.role].push_back(std::move(form));
    }
  }
  for (llvm::StringRef role : weightRoles())
    roles.get(role); // the weights of attributes that this layer does not have
  roles.finish();
}

void RowReader::readBlock(JSONReader &block, const std::string &at, Layer &out) {
  LayerSpec &layer = out.spec;
  layer.index = layerIndex;
  layer.kind = block.choice("kind", {"moe", "dense"}) ? LayerKind::Dense : LayerKind::MoE;
  out.module = withNumber(block.string("module"));
  for (const std::string &prefix : block.strings("prefixes", true))
    out.prefixes.push_back(withNumber(prefix));
  if (out.prefixes.empty() && !failed())
    badRow(block.pathOf("prefixes"), "at least one prefix", block.get("prefixes"));
  layer.H = size(block, "H", layer);
  layer.F = size(block, "F", layer);
  if (layer.kind == LayerKind::MoE) {
    layer.E = size(block, "E", layer);
    layer.K = size(block, "K", layer);
    readGroup(block, "router", layer, true,
              [&](JSONReader &reader) { readRouter(reader, layer.router, true); });
    readGroup(block, "combine", layer, false,
              [&](JSONReader &reader) { readCombine(reader, layer.combine); });
  }
  readGroup(block, "expert", layer, true,
            [&](JSONReader &reader) { readExpert(reader, layer.expert, true); });
  if (failed())
    return;
  layer.weights = weightsOf(layer);
  readForms(block, out);
  block.finish();
}

llvm::Expected<std::vector<RowReader::Layer>> RowReader::run() {
  std::vector<Layer> out;
  readKeys();
  int64_t count = 0;
  if (!failed()) {
    Sourced layers = evaluate(rules().get("layers"), "layers");
    std::optional<int64_t> i = layers.value.getAsInteger();
    if (!failed() && (!i || *i < 1 || *i > Limits::layers))
      badRow("layers", "a number of layers from 1 to " + llvm::Twine(Limits::layers),
             &layers.value);
    count = i.value_or(0);
  }
  const llvm::json::Array *blocks = rules().getArray("blocks");
  if (!blocks)
    badRow("blocks", "an array", rules().get("blocks"));
  for (layerIndex = 0; layerIndex < count && !failed(); ++layerIndex) {
    for (size_t b = 0; b < blocks->size() && !failed(); ++b) {
      std::string at = "blocks[" + std::to_string(b) + "]";
      JSONReader block(rowDoc, &(*blocks)[b], at);
      std::string origin = "rule of row " + row.modelType;
      if (const llvm::json::Value *when = block.get("when")) {
        std::string reason;
        if (!holds(when, at + ".when", reason))
          continue;
        origin = reason;
      }
      Layer layer;
      layer.spec.origins["kind"] = origin;
      readBlock(block, at, layer);
      out.push_back(std::move(layer));
      break; // the first block that fits
    }
  }
  if (llvm::Error error = rowDoc.take()) {
    llvm::consumeError(configDoc.take());
    return error;
  }
  if (llvm::Error error = configDoc.take())
    return error;
  if (out.empty())
    return makeError(ErrorCode::CONFIG, row.file + ": blocks", "a block for at least one layer",
                     "none that fits");
  return out;
}

std::vector<std::string> RowReader::unreadKeys() const {
  std::vector<std::string> out;
  for (const auto &member : *config.object) {
    std::string key = llvm::StringRef(member.first).str();
    const llvm::json::Value &value = member.second;
    if (readSpellings.count(key) || value.getAsNull() || value == llvm::json::Value(false) ||
        value == llvm::json::Value(0))
      continue;
    llvm::StringRef k = key;
    if (k.contains("expert") || k.contains("moe") || k.contains("router") || k.contains("routed"))
      out.push_back(key);
  }
  std::sort(out.begin(), out.end());
  return out;
}

//===----------------------------------------------------------------------===//
// Weights
//===----------------------------------------------------------------------===//

/// Where the text model's modules lie in checkpoints.
const char *const roots[] = {"model.", "", "model.language_model.", "language_model.model.",
                             "language_model."};

/// Whether one of the sorted `names` starts with `prefix`.
bool startsAny(const std::vector<std::string> &names, const std::string &prefix) {
  auto it = std::lower_bound(names.begin(), names.end(), prefix);
  return it != names.end() && llvm::StringRef(*it).starts_with(prefix);
}

std::string withExpert(std::string text, int64_t expert) {
  for (size_t at = text.find("{e}"); at != std::string::npos; at = text.find("{e}", at))
    text.replace(at, 3, std::to_string(expert));
  return text;
}

/// Finds the form of every weight of a layer in a checkpoint.
llvm::Error bindSources(RowReader::Layer &layer, const Checkpoint &checkpoint,
                        const std::vector<std::string> &names) {
  std::string prefix;
  for (const char *root : roots)
    for (const std::string &candidate : layer.prefixes)
      if (prefix.empty() && startsAny(names, root + candidate + "."))
        prefix = root + candidate + ".";
  bool none = prefix.empty();
  if (none)
    prefix = roots[0] + layer.prefixes.front() + ".";
  for (WeightSpec &weight : layer.spec.weights) {
    const std::vector<WeightSource> *chosen = nullptr;
    for (const std::vector<WeightSource> &form : layer.forms[weight.role]) {
      bool any = false;
      for (const WeightSource &source : form)
        for (int64_t e = 0; e < weight.experts && !any; ++e)
          any = checkpoint.has(withExpert(prefix + source.tensor, e));
      if (any) {
        chosen = &form;
        break;
      }
    }
    if (!chosen)
      return checkpoint.missing(
          withExpert(prefix + layer.forms[weight.role].front().front().tensor, 0));
    for (WeightSource source : *chosen) {
      source.tensor = prefix + source.tensor;
      // More experts in the files than the configuration says would be dropped without a word.
      if (source.tensor.find("{e}") != std::string::npos &&
          checkpoint.has(withExpert(source.tensor, weight.experts)))
        return makeError(ErrorCode::TENSOR, checkpoint.path(),
                         llvm::Twine(weight.experts) + " experts, as " + layer.spec.origins["E"] +
                             " says",
                         "tensor `" + withExpert(source.tensor, weight.experts) + "` as well");
      weight.sources.push_back(std::move(source));
    }
  }
  return llvm::Error::success();
}

/// The dtype of a weight's tensors: f32 when any is wider than bf16.
Format storedFormat(const WeightSpec &weight, const Checkpoint &checkpoint, bool &half) {
  Format out = Format::BF16;
  for (const WeightSource &source : weight.sources) {
    int64_t count = source.arrangement == Arrangement::Stacked ? 1 : weight.experts;
    for (int64_t e = 0; e < count; ++e) {
      const TensorInfo *info = checkpoint.find(withExpert(source.tensor, e));
      if (!info || info->dtype != Dtype::BF16)
        out = Format::F32;
      half |= info && info->dtype == Dtype::F16;
    }
  }
  return out;
}

/// Says aloud what packing will do to the values of a checkpoint.
void noteConversions(ModelSpec &spec, const Checkpoint &checkpoint) {
  std::set<std::string> notes;
  for (const LayerSpec &layer : spec.layers)
    for (const WeightSpec &weight : layer.weights) {
      bool half = false;
      Format stored = storedFormat(weight, checkpoint, half);
      if (half && !isVector(weight.role))
        notes.insert("the checkpoint holds f16 tensors: they are converted to " +
                     name(weight.format).str());
      else if (stored == Format::F32 && weight.format == Format::BF16)
        notes.insert("f32 weights of the checkpoint are rounded to bf16");
      else if (stored == Format::BF16 && weight.format == Format::F32 && !isVector(weight.role))
        notes.insert("bf16 weights of the checkpoint are widened to f32");
    }
  spec.notes.insert(spec.notes.end(), notes.begin(), notes.end());
}

/// Checks all weights against the checkpoint and decides formats and compute dtype.
llvm::Error bindFormats(ModelSpec &spec, const Checkpoint &checkpoint, const LoadOptions &options,
                        const ConfigDtype &stated) {
  bool half = false;
  for (LayerSpec &layer : spec.layers) {
    Format experts = Format::BF16;
    for (WeightSpec &weight : layer.weights) {
      std::string demand = weight.role == "router" ? "E and H" : "E, F and H";
      if (layer.kind == LayerKind::Dense)
        demand = "F and H";
      std::string sizes;
      for (const char *letter : {"E", "F", "H"}) {
        auto it = layer.origins.find(letter);
        if (llvm::StringRef(demand).contains(letter) && it != layer.origins.end())
          sizes += (sizes.empty() ? "" : ", ") + std::string(letter) + " from " + it->second;
      }
      if (llvm::Error error = checkpoint.checkWeight(
              weight, "the model (" + (sizes.empty() ? demand : sizes) + ")"))
        return error;
      if (isVector(weight.role))
        continue;
      weight.format = storedFormat(weight, checkpoint, half);
      if (weight.role != "router" && weight.format == Format::F32)
        experts = Format::F32;
    }
    Format chosen = options.dtype.value_or(experts);
    std::string origin = options.dtype ? "command line" : "checkpoint";
    for (WeightSpec &weight : layer.weights) {
      if (isVector(weight.role))
        continue;
      if (weight.role != "router" || chosen == Format::F32)
        weight.format = chosen; // an f32 router stays f32 beside bf16 experts
      layer.origins["weights." + weight.role + ".format"] =
          weight.role == "router" && chosen == Format::BF16 ? "checkpoint" : origin;
    }
    layer.format = layer.compute = chosen;
    layer.origins["format"] = layer.origins["compute"] = origin;
  }
  spec.dtype = spec.layers.front().compute;
  noteConversions(spec, checkpoint);
  if (!options.dtype && stated.format && *stated.format != spec.dtype)
    spec.notes.push_back(stated.origin + " says " + name(*stated.format).str() +
                         ", but the tensors are not: the layers compute in " +
                         name(spec.dtype).str());
  return llvm::Error::success();
}

//===----------------------------------------------------------------------===//
// Inputs
//===----------------------------------------------------------------------===//

/// "Mixtral-8x7B-v0.1" of a folder path, also inside a Hugging Face cache.
std::string modelNameOf(llvm::StringRef folder, llvm::StringRef fallback) {
  llvm::SmallString<256> path(folder);
  if (std::error_code error = llvm::sys::fs::real_path(folder, path))
    path = folder;
  llvm::StringRef base = llvm::sys::path::filename(path);
  for (llvm::StringRef part : llvm::split(path, '/'))
    if (part.consume_front("models--"))
      base = part.rsplit("--").second.empty() ? part : part.rsplit("--").second;
  std::string out = base.empty() || base == "." || base == "/" ? "" : identifierFor(base);
  return out.empty() || out == "model" ? identifierFor(fallback) : out;
}

llvm::Expected<std::unique_ptr<Checkpoint>> openCheckpoint(llvm::StringRef path, bool followLinks) {
  if (llvm::sys::fs::is_directory(path))
    return Checkpoint::open(path, followLinks);
  return Checkpoint::openFile(path);
}

bool hasWeights(const InputFolder &folder) {
  for (const std::string &member : folder.members())
    for (llvm::StringRef suffix : {".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth",
                                   ".gguf", ".ckpt", ".h5"})
      if (llvm::StringRef(member).ends_with(suffix))
        return true;
  return false;
}

/// Puts the file in front of errors about a layer.
llvm::Error checkLayers(const ModelSpec &spec, const std::string &file) {
  for (const LayerSpec &layer : spec.layers)
    if (llvm::Error error = checkConsistent(layer)) {
      Error first = takeErrors(std::move(error)).front();
      first.where = file + ": " + first.where;
      return llvm::make_error<Error>(std::move(first));
    }
  return llvm::Error::success();
}

llvm::Expected<LoadedModel> loadConfig(const InputFile &file, const std::string &modelName,
                                       const std::string &checkpointPath, const ModelTable &table,
                                       const LoadOptions &options) {
  llvm::Expected<std::string> text = file.readAll(64u << 20);
  if (!text)
    return text.takeError();
  JSONLimits limits;
  limits.nonFiniteAsNull = true;
  llvm::Expected<llvm::json::Value> root = parseJSON(*text, file.path(), ErrorCode::CONFIG, limits);
  if (!root)
    return root.takeError();
  auto found = findConfig(*root, file.path(), table);
  if (!found)
    return found.takeError();
  const Config &config = found->first;
  const ModelRow &row = *found->second;
  if (llvm::Error error = refuseQuantized(config, file.path()))
    return error;
  llvm::Expected<ConfigDtype> stated = configDtype(config, file.path());
  if (!stated)
    return stated.takeError();
  RowReader reader(row, config, file.path());
  llvm::Expected<std::vector<RowReader::Layer>> layers = reader.run();
  if (!layers)
    return layers.takeError();

  LoadedModel out;
  out.spec.name = modelName.empty() ? identifierFor(row.modelType) : modelName;
  out.spec.modelType = row.modelType;
  for (const std::string &key : reader.unreadKeys())
    out.spec.notes.push_back("config key `" + config.path + key + "` is not read by row " +
                             row.modelType + " (as in transformers)");
  for (RowReader::Layer &layer : *layers)
    layer.spec.name = (config.composite() ? "model.language_model." : "model.") + layer.module;

  if (!checkpointPath.empty()) {
    // Consistency first: a product of absurd sizes must not reach the search for tensors.
    ModelSpec draft;
    for (const RowReader::Layer &layer : *layers)
      draft.layers.push_back(layer.spec);
    if (llvm::Error error = checkLayers(draft, file.path()))
      return error;
    llvm::Expected<std::unique_ptr<Checkpoint>> checkpoint =
        openCheckpoint(checkpointPath, options.followLinks);
    if (!checkpoint)
      return checkpoint.takeError();
    out.checkpoint = std::move(*checkpoint);
    std::vector<std::string> names = out.checkpoint->names();
    for (RowReader::Layer &layer : *layers) {
      if (llvm::Error error = bindSources(layer, *out.checkpoint, names))
        return error;
      out.spec.layers.push_back(std::move(layer.spec));
    }
    // Layers that the configuration leaves out are legitimate (draft heads), but not silently so.
    const LayerSpec &last = out.spec.layers.back();
    std::string number = "." + std::to_string(last.index) + ".";
    std::string beyond = last.weights.front().sources.front().tensor;
    if (size_t at = beyond.find(number); at != std::string::npos) {
      beyond = beyond.substr(0, at) + "." + std::to_string(last.index + 1) + ".";
      if (startsAny(names, beyond))
        out.spec.notes.push_back("the checkpoint has tensors `" + beyond +
                                 "…`, but the config says " + std::to_string(last.index + 1) +
                                 " layers: they are left out");
    }
    if (llvm::Error error = bindFormats(out.spec, *out.checkpoint, options, *stated))
      return error;
  } else {
    out.spec.dtype = options.dtype.value_or(stated->format.value_or(Format::F32));
    std::string origin = options.dtype    ? "command line"
                         : stated->format ? stated->origin
                                          : "default of moec";
    if (!options.dtype && stated->half) {
      origin = stated->origin;
      out.spec.notes.push_back(
          stated->origin + " says float16: the layers compute in f32; --dtype bf16 halves that");
    } else if (!options.dtype && !stated->format) {
      out.spec.notes.push_back("the config states no dtype: f32 is taken; --dtype chooses");
    }
    for (RowReader::Layer &layer : *layers) {
      layer.spec.compute = layer.spec.format = out.spec.dtype;
      layer.spec.origins["compute"] = layer.spec.origins["format"] = origin;
      for (WeightSpec &weight : layer.spec.weights)
        if (!isVector(weight.role))
          weight.format = out.spec.dtype;
      out.spec.layers.push_back(std::move(layer.spec));
    }
  }
  if (llvm::Error error = checkLayers(out.spec, file.path()))
    return error;
  return out;
}

llvm::Expected<LoadedModel> loadSpec(llvm::StringRef path, const LoadOptions &options) {
  llvm::Expected<std::unique_ptr<InputFile>> file = InputFile::open(path);
  if (!file)
    return file.takeError();
  llvm::Expected<std::string> text = (*file)->readAll(64u << 20);
  if (!text)
    return text.takeError();
  llvm::Expected<llvm::json::Value> root = parseJSON(*text, path, ErrorCode::CONFIG);
  if (!root)
    return root.takeError();
  llvm::Expected<ModelSpec> spec = fromJSON(*root, path);
  if (!spec)
    return spec.takeError();
  LoadedModel out;
  out.spec = std::move(*spec);
  if (!options.checkpoint.empty() && !options.shapesOnly) {
    for (const LayerSpec &layer : out.spec.layers)
      for (const WeightSpec &weight : layer.weights)
        if (weight.sources.empty())
          return makeError(ErrorCode::CONFIG, path + ": " + layer.name + ": weights." + weight.role,
                           "`from`, the tensors of this weight", "nothing");
    llvm::Expected<std::unique_ptr<Checkpoint>> checkpoint =
        openCheckpoint(options.checkpoint, options.followLinks);
    if (!checkpoint)
      return checkpoint.takeError();
    out.checkpoint = std::move(*checkpoint);
    for (const LayerSpec &layer : out.spec.layers)
      for (const WeightSpec &weight : layer.weights)
        if (llvm::Error error = out.checkpoint->checkWeight(weight, "the spec"))
          return error;
  }
  if (options.dtype) {
    out.spec.dtype = *options.dtype;
    for (LayerSpec &layer : out.spec.layers) {
      layer.compute = layer.format = *options.dtype;
      layer.origins["compute"] = layer.origins["format"] = "command line";
      for (WeightSpec &weight : layer.weights)
        if (!isVector(weight.role) && (weight.role != "router" || *options.dtype == Format::F32))
          weight.format = *options.dtype;
    }
  }
  if (out.checkpoint)
    noteConversions(out.spec, *out.checkpoint);
  return out;
}

} // namespace

llvm::Expected<LoadedModel> loadModel(llvm::StringRef path, const ModelTable &table,
                                      const LoadOptions &options) {
  std::string elsewhere = options.shapesOnly ? "" : options.checkpoint;
  if (!llvm::sys::fs::exists(path))
    return makeError(ErrorCode::CONFIG, path, "a model folder or file", "nothing there");
  if (llvm::sys::fs::is_directory(path)) {
    llvm::Expected<std::unique_ptr<InputFolder>> folder =
        InputFolder::open(path, options.followLinks);
    if (!folder)
      return folder.takeError();
    const std::string &name = (*folder)->path();
    if (!(*folder)->has("config.json"))
      return makeError(ErrorCode::CONFIG, name, "a model folder with config.json", "none in it",
                       (*folder)->has("manifest.json") ? "this is a folder that moec wrote" : "");
    for (const char *quantized : {"hf_quant_config.json", "quantize_config.json"})
      if ((*folder)->has(quantized))
        return makeError(ErrorCode::UNSUPPORTED, name + "/" + quantized,
                         "weights in f32, bf16 or f16", "a quantized checkpoint",
                         "quantized checkpoints are not implemented yet");
    llvm::Expected<std::unique_ptr<InputFile>> file = (*folder)->openMember("config.json");
    if (!file)
      return file.takeError();
    if (elsewhere.empty() && !options.shapesOnly && hasWeights(**folder))
      elsewhere = name;
    return loadConfig(**file, modelNameOf(name, ""), elsewhere, table, options);
  }
  if (path.ends_with(".moe.json"))
    return loadSpec(path, options);
  if (!path.ends_with(".json"))
    return makeError(ErrorCode::ARGUMENT, path,
                     "a checkpoint folder, a config.json, a *.moe.json or a .mlir file",
                     "another kind of file");
  llvm::Expected<std::unique_ptr<InputFile>> file = InputFile::open(path);
  if (!file)
    return file.takeError();
  llvm::StringRef stem = llvm::sys::path::stem(path);
  llvm::StringRef parent = llvm::sys::path::parent_path(path);
  std::string name = stem != "config" ? identifierFor(stem)
                     : parent.empty() ? ""
                                      : modelNameOf(parent, "");
  return loadConfig(**file, name == "model" ? "" : name, elsewhere, table, options);
}

} // namespace moec
