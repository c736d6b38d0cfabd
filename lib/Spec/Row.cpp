//===- Row.cpp - a row of the model table, applied ------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Row.h"

#include "Attributes.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/MathExtras.h"

#include <algorithm>
#include <limits>

namespace moec {

namespace {

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

} // namespace

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
  std::vector<std::string> types{"integer",    "number",   "boolean",
                                 "activation", "integers", "string"};
  std::string type = types[rule.choice("type", types)];
  std::vector<std::string> spellings = rule.strings("spellings", false);
  spellings.insert(spellings.begin(), key);
  const llvm::json::Value *fallback = rule.get("default");
  bool nullable = rule.boolean("nullable", false);
  bool perLayer = rule.boolean("per_layer", false);
  const llvm::json::Value *accepted = rule.get("values");
  if (accepted && !accepted->getAsArray())
    badRow("keys." + key + ".values", "an array of the values that can be read", accepted);
  int64_t low = 0, high = 0;
  if (type == "integer" || type == "integers") {
    low = rule.integer("from", -1, int64_t(1) << 40);
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
  keyPaths[key] = at;
  if (nullable && used.empty() && out.value.getAsNull()) {
    values[key] = std::move(out); // what asks for it must look first
    return;
  }
  auto integerIn = [&](const llvm::json::Value &value) {
    std::optional<int64_t> i = isInteger(value) ? value.getAsInteger() : std::nullopt;
    return i && *i >= low && *i <= high;
  };
  std::string range = "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  if (perLayer && out.value.getAsArray()) {
    for (const llvm::json::Value &element : *out.value.getAsArray())
      if (!integerIn(element))
        configDoc.fail(at, range + ", or a list of them", describeJSON(&element));
  } else if (type == "integer") {
    if (!integerIn(out.value))
      configDoc.fail(at, range, describeJSON(&out.value));
  } else if (type == "string") {
    if (!out.value.getAsString())
      configDoc.fail(at, "a string", describeJSON(&out.value));
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
  if (accepted && !failed() && !llvm::is_contained(*accepted->getAsArray(), out.value)) {
    std::vector<std::string> names;
    for (const llvm::json::Value &value : *accepted->getAsArray())
      names.push_back(llvm::formatv("{0}", value).str());
    configDoc.fail(ErrorCode::UNSUPPORTED, at, quoteList(names, "or"), describeJSON(&out.value),
                   "a " + row.modelType + " layer with this value is not known");
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
/// {"layer_multiple_of": k, "plus": n} | {"layer_modulo": k, "is": k} | {"layer_from": k} |
/// {"layer_to": k} | {"not": c} | {"all": [c…]} | {"any": [c…]}
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
    if (!array && !(list && list->value.getAsNull())) {
      badRow(at + ".layer_in", "a key whose value is a list", reader.get("layer_in"));
      return false;
    }
    if (!list)
      return false;
    origin = list->origin;
    result = array && llvm::any_of(*array, [&](const llvm::json::Value &v) {
               return v.getAsInteger() == std::optional<int64_t>(layerIndex);
             });
  } else if (reader.has("layer_multiple_of")) {
    std::optional<int64_t> step =
        integerOf(reader.string("layer_multiple_of"), at + ".layer_multiple_of", origin);
    int64_t plus = reader.integer("plus", 0, Limits::layers, 0);
    result = step && *step > 0 && (layerIndex + plus) % *step == 0;
  } else if (reader.has("layer_modulo")) {
    std::string other;
    std::optional<int64_t> period =
        integerOf(reader.string("layer_modulo"), at + ".layer_modulo", origin);
    std::optional<int64_t> rest = integerOf(reader.string("is"), at + ".is", other);
    result = period && rest && *period > 0 && layerIndex % *period == *rest;
    origin += ", " + other;
  } else if (reader.has("layer_from")) {
    std::optional<int64_t> first =
        integerOf(reader.string("layer_from"), at + ".layer_from", origin);
    result = first && layerIndex >= *first;
  } else if (reader.has("layer_to")) {
    std::optional<int64_t> last = integerOf(reader.string("layer_to"), at + ".layer_to", origin);
    result = last && layerIndex <= *last;
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

/// A literal | {"key": k} | {"if": c, "then": e, "else": e} | {"product": [e…]}
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
  } else if (reader.has("product")) {
    const llvm::json::Array *factors = reader.get("product")->getAsArray();
    if (!factors) {
      badRow(at + ".product", "an array of values", reader.get("product"));
      return out;
    }
    int64_t product = 1;
    for (size_t i = 0; i < factors->size() && !failed(); ++i) {
      Sourced factor = evaluate(&(*factors)[i], at + ".product[" + std::to_string(i) + "]");
      std::optional<int64_t> n = factor.value.getAsInteger();
      if (!n && !failed())
        badRow(at + ".product", "integers", &factor.value);
      // Keys are below 2^40; what passes 2^62 is refused as a size anyway.
      if (llvm::MulOverflow(product, n.value_or(1), product))
        product = std::numeric_limits<int64_t>::max();
      out.origin += (out.origin.empty() ? "" : ", ") + factor.origin;
    }
    out.value = product;
  } else {
    std::string key = reader.string("key");
    const Sourced *value = valueOf(key, at + ".key");
    if (!value)
      return out;
    out = *value;
    if (const llvm::json::Array *array = out.value.getAsArray()) {
      if (size_t(layerIndex) >= array->size())
        configDoc.fail(keyPaths[key], "a value for every layer",
                       llvm::Twine(array->size()) + " values for layer " + llvm::Twine(layerIndex));
      else
        out.value = llvm::json::Value((*array)[layerIndex]);
    }
    if (out.value.getAsNull())
      configDoc.fail(keyPaths[key], "a value, as the class default is null", "nothing");
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
        readForm(reader, weight, source);
        source.scales = withNumber(source.scales);
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
      bool beside = block.boolean("beside", false); // the layer has more than this block
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
      if (!beside)
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
    if (k.contains("expert") || k.contains("moe") || k.contains("router") || k.contains("routed") ||
        k.contains("topk") || k.contains("scoring"))
      out.push_back(key);
  }
  std::sort(out.begin(), out.end());
  return out;
}

} // namespace moec
