//===- SpecJSON.cpp - reading and writing *.moe.json ----------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Attributes.h"

#include "moe/Spec/ModelSpec.h"
#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"

#include <algorithm>
#include <functional>

namespace moec {

namespace {

template <typename E> std::vector<std::string> namesOf() {
  std::vector<std::string> out;
  for (llvm::StringRef n : enumNames<E>())
    out.push_back(n.str());
  return out;
}

/// Reads whatever attributes an object has into a spec.
struct AttributeReader {
  JSONReader &reader;
  bool demandRequired;
  const OnRead &onRead;

  template <typename T> void operator()(const char *key, T &field, bool required) const {
    if (!reader.has(key) && !(required && demandRequired))
      return;
    if constexpr (std::is_enum_v<T>) {
      field = static_cast<T>(reader.choice(key, namesOf<T>()));
    } else if constexpr (std::is_same_v<T, bool>) {
      field = reader.boolean(key);
    } else if constexpr (std::is_same_v<T, double>) {
      field = reader.number(key);
    } else {
      field = reader.integer(key, 0, Limits::hidden);
    }
    if (onRead)
      onRead(reader.pathOf(key));
  }
};

} // namespace

void readRouter(JSONReader &reader, RouterSpec &router, bool demandRequired, const OnRead &onRead) {
  visitRouter(router, AttributeReader{reader, demandRequired, onRead});
}

void readExpert(JSONReader &reader, ExpertSpec &expert, bool demandRequired, const OnRead &onRead) {
  visitExpert(expert, AttributeReader{reader, demandRequired, onRead});
}

void readCombine(JSONReader &reader, CombineSpec &combine, const OnRead &onRead) {
  visitCombine(combine, AttributeReader{reader, false, onRead});
}

void readForm(JSONReader &reader, const WeightSpec &weight, WeightSource &source) {
  source.arrangement = static_cast<Arrangement>(
      reader.choice("arrangement", namesOf<Arrangement>(), size_t(Arrangement::PerExpert)));
  source.firstPart = reader.integer("first_part", 0, weight.parts - 1, 0);
  source.partCount = reader.integer("part_count", 1, weight.parts - source.firstPart, 1);
  source.transposed = reader.boolean("transposed", false);
  source.interleaved = reader.boolean("interleaved", false);
  source.encoding = static_cast<Encoding>(
      reader.choice("encoding", namesOf<Encoding>(), size_t(Encoding::Plain)));
  bool plain = source.encoding == Encoding::Plain;
  if (plain && reader.has("scales"))
    reader.document().fail(reader.pathOf("scales"), "scales of an encoding", "encoding `plain`");
  if (!plain)
    source.scales = reader.string("scales");
  if (!plain && (source.transposed || isVector(weight.role)))
    reader.document().fail(reader.pathOf("encoding"), "`plain` for vectors and transposed tensors",
                           "`" + name(source.encoding) + "`");
}

//===----------------------------------------------------------------------===//
// Writing
//===----------------------------------------------------------------------===//

namespace {

/// "model.layers.3.mlp" to "model.layers.{i}.mlp": the layer's number as a whole component.
std::string generalize(llvm::StringRef text, int64_t index) {
  llvm::SmallVector<llvm::StringRef> parts;
  text.split(parts, '.');
  std::string number = std::to_string(index), out;
  for (llvm::StringRef part : parts) {
    if (part.data() != text.data())
      out += '.';
    out += part == number ? "{i}" : part.str();
  }
  return out;
}

std::string specialize(std::string text, int64_t index) {
  std::string number = std::to_string(index);
  for (size_t at = text.find("{i}"); at != std::string::npos; at = text.find("{i}", at))
    text.replace(at, 3, number);
  return text;
}

llvm::json::Object layerJSON(const LayerSpec &layer, Format dtype, bool origins) {
  llvm::json::Object out{{"name", generalize(layer.name, layer.index)},
                         {"kind", name(layer.kind)},
                         {"H", layer.H},
                         {"F", layer.F},
                         {"expert", expertJSON(layer.expert)}};
  if (layer.kind == LayerKind::MoE) {
    out["E"] = layer.E;
    out["K"] = layer.K;
    out["router"] = routerJSON(layer.router);
    if (llvm::json::Object combine = combineJSON(layer.combine); !combine.empty())
      out["combine"] = std::move(combine);
  }
  if (layer.compute != dtype)
    out["compute"] = name(layer.compute);
  if (layer.format != dtype)
    out["format"] = name(layer.format);
  llvm::json::Object weights;
  for (const WeightSpec &weight : layer.weights) {
    llvm::json::Object w;
    if (weight.format != layer.format && !isVector(weight.role))
      w["format"] = name(weight.format);
    llvm::json::Array from;
    for (const WeightSource &source : weight.sources) {
      llvm::json::Object s{{"tensor", generalize(source.tensor, layer.index)}};
      if (source.arrangement != Arrangement::PerExpert)
        s["arrangement"] = name(source.arrangement);
      if (source.firstPart != 0)
        s["first_part"] = source.firstPart;
      if (source.partCount != 1)
        s["part_count"] = source.partCount;
      if (source.transposed)
        s["transposed"] = true;
      if (source.interleaved)
        s["interleaved"] = true;
      if (source.encoding != Encoding::Plain) {
        s["encoding"] = name(source.encoding);
        s["scales"] = generalize(source.scales, layer.index);
      }
      from.push_back(std::move(s));
    }
    if (!from.empty())
      w["from"] = std::move(from);
    if (!w.empty())
      weights[weight.role] = std::move(w);
  }
  if (!weights.empty())
    out["weights"] = std::move(weights);
  if (origins) {
    llvm::json::Object o;
    for (const auto &[attribute, origin] : layer.origins)
      o[attribute] = generalize(origin, layer.index);
    out["origins"] = std::move(o);
  }
  return out;
}

} // namespace

llvm::json::Value toJSON(const ModelSpec &spec, bool origins) {
  llvm::json::Array layers;
  for (size_t i = 0; i < spec.layers.size();) {
    llvm::json::Object entry = layerJSON(spec.layers[i], spec.dtype, origins);
    size_t next = i + 1;
    while (next < spec.layers.size() &&
           spec.layers[next].index == spec.layers[next - 1].index + 1 &&
           layerJSON(spec.layers[next], spec.dtype, origins) == entry)
      ++next;
    int64_t first = spec.layers[i].index, last = spec.layers[next - 1].index;
    if (first == last)
      entry["index"] = first;
    else
      entry["index"] = std::to_string(first) + "-" + std::to_string(last);
    layers.push_back(std::move(entry));
    i = next;
  }
  llvm::json::Object out{{"$schema", "moe-spec.schema.json"},
                         {"schema", specSchema},
                         {"name", spec.name},
                         {"dtype", name(spec.dtype)},
                         {"layers", std::move(layers)}};
  if (!spec.modelType.empty())
    out["model_type"] = spec.modelType;
  return out;
}

//===----------------------------------------------------------------------===//
// Reading
//===----------------------------------------------------------------------===//

namespace {

/// An index, "first-last", or an array of both.
void readIndices(JSONDocument &doc, const std::string &path, const llvm::json::Value *value,
                 std::vector<int64_t> &out) {
  std::string expected = "a layer's index, a range such as \"0-31\", or an array of them";
  if (!value || doc.failed())
    return doc.fail(path, expected, describeJSON(value));
  auto inRange = [](int64_t i) { return i >= 0 && i < Limits::layers; };
  if (const llvm::json::Array *array = value->getAsArray()) {
    if (array->empty())
      doc.fail(path, expected, "an empty array");
    for (size_t i = 0; i < array->size(); ++i) {
      std::string at = path + "[" + std::to_string(i) + "]";
      if ((*array)[i].getAsArray())
        return doc.fail(at, expected, describeJSON(&(*array)[i]));
      readIndices(doc, at, &(*array)[i], out);
    }
    return;
  }
  if (value->kind() == llvm::json::Value::Number) {
    if (std::optional<int64_t> i = value->getAsInteger(); i && inRange(*i)) {
      out.push_back(*i);
      return;
    }
  } else if (std::optional<llvm::StringRef> text = value->getAsString()) {
    auto [first, last] = text->split('-');
    int64_t a, b;
    if (!first.getAsInteger(10, a) && !last.getAsInteger(10, b) && inRange(a) && inRange(b) &&
        a <= b) {
      for (int64_t i = a; i <= b; ++i)
        out.push_back(i);
      return;
    }
  }
  doc.fail(path, expected + " below " + std::to_string(Limits::layers), describeJSON(value));
}

void readSource(JSONReader &reader, const WeightSpec &weight, WeightSource &source) {
  source.tensor = reader.string("tensor");
  readForm(reader, weight, source);
  bool numbered = llvm::StringRef(source.tensor).contains("{e}");
  if (weight.experts > 1 && source.arrangement == Arrangement::PerExpert && !numbered)
    reader.document().fail(reader.pathOf("tensor"), "a name with {e} for the expert's number",
                           "\"" + source.tensor + "\"");
  if (source.arrangement == Arrangement::Stacked && numbered)
    reader.document().fail(reader.pathOf("tensor"), "a name without {e}, as all experts are in it",
                           "\"" + source.tensor + "\"");
  reader.finish();
}

void readWeights(JSONDocument &doc, const llvm::json::Value *value, const std::string &path,
                 LayerSpec &layer) {
  layer.weights = weightsOf(layer);
  if (!value)
    return;
  JSONReader reader(doc, value, path);
  for (WeightSpec &weight : layer.weights) {
    const llvm::json::Value *entry = reader.get(weight.role);
    if (!entry)
      continue;
    JSONReader w(doc, entry, reader.pathOf(weight.role));
    if (!isVector(weight.role)) // vectors are f32
      weight.format =
          static_cast<Format>(w.choice("format", namesOf<Format>(), size_t(layer.format)));
    if (const llvm::json::Value *from = w.get("from")) {
      const llvm::json::Array *array = from->getAsArray();
      if (!array || array->empty() || array->size() > 8) {
        doc.fail(w.pathOf("from"), "an array of 1 to 8 sources", describeJSON(from));
        return;
      }
      std::vector<int> covered(weight.parts, 0);
      for (size_t i = 0; i < array->size(); ++i) {
        JSONReader s(doc, &(*array)[i], w.pathOf("from") + "[" + std::to_string(i) + "]");
        WeightSource source;
        readSource(s, weight, source);
        if (doc.failed())
          return;
        for (int64_t p = 0; p < source.partCount; ++p)
          ++covered[source.firstPart + p];
        weight.sources.push_back(std::move(source));
      }
      for (size_t p = 0; p < covered.size(); ++p)
        if (covered[p] != 1)
          doc.fail(w.pathOf("from"), "every part from one source",
                   "part " + llvm::Twine(p) + " from " + llvm::Twine(covered[p]));
    }
    w.finish();
  }
  reader.finish();
}

void readLayer(JSONDocument &doc, const llvm::json::Value &value, const std::string &path,
               const std::string &file, ModelSpec &spec) {
  JSONReader reader(doc, &value, path);
  LayerSpec layer;
  std::vector<int64_t> indices;
  readIndices(doc, reader.pathOf("index"), reader.get("index"), indices);
  layer.name = reader.string("name");
  std::string origin = "file `" + file + "`";
  auto fromFile = [&](llvm::StringRef attribute) { layer.origins[attribute.str()] = origin; };
  layer.kind =
      static_cast<LayerKind>(reader.choice("kind", namesOf<LayerKind>(), size_t(LayerKind::MoE)));
  layer.H = reader.integer("H", 1, Limits::hidden);
  layer.F = reader.integer("F", 1, Limits::width);
  fromFile("kind"), fromFile("H"), fromFile("F");
  // Paths of readers start with the layer's; origins do not.
  OnRead onRead = [&](const std::string &at) {
    fromFile(llvm::StringRef(at).drop_front(path.size() + 1));
  };
  if (layer.kind == LayerKind::MoE) {
    layer.E = reader.integer("E", 1, Limits::experts);
    layer.K = reader.integer("K", 1, Limits::chosen);
    fromFile("E"), fromFile("K");
    if (!doc.failed() && layer.K > layer.E)
      doc.fail(reader.pathOf("K"), "at most E = " + llvm::Twine(layer.E), llvm::Twine(layer.K));
    JSONReader router(doc, reader.require("router", "an object"), reader.pathOf("router"));
    readRouter(router, layer.router, true, onRead);
    router.finish();
    if (const llvm::json::Value *combine = reader.get("combine")) {
      JSONReader c(doc, combine, reader.pathOf("combine"));
      readCombine(c, layer.combine, onRead);
      c.finish();
    }
  }
  JSONReader expert(doc, reader.require("expert", "an object"), reader.pathOf("expert"));
  readExpert(expert, layer.expert, true, onRead);
  expert.finish();
  layer.compute =
      static_cast<Format>(reader.choice("compute", namesOf<Format>(), size_t(spec.dtype)));
  layer.format =
      static_cast<Format>(reader.choice("format", namesOf<Format>(), size_t(spec.dtype)));
  fromFile("compute"), fromFile("format");
  if (doc.failed())
    return;
  readWeights(doc, reader.get("weights"), reader.pathOf("weights"), layer);
  if (const llvm::json::Value *origins = reader.get("origins")) {
    // A spec that was written with origins speaks for itself.
    JSONReader o(doc, origins, reader.pathOf("origins"));
    layer.origins.clear();
    if (const llvm::json::Object *object = origins->getAsObject())
      for (const auto &member : *object)
        layer.origins[llvm::StringRef(member.first).str()] = o.string(member.first);
  }
  reader.finish();
  if (indices.size() > 1 && !llvm::StringRef(layer.name).contains("{i}"))
    doc.fail(reader.pathOf("name"), "a name with {i} for the layer's number",
             "\"" + layer.name + "\"");
  for (int64_t index : indices) {
    LayerSpec copy = layer;
    copy.index = index;
    copy.name = specialize(layer.name, index);
    for (WeightSpec &weight : copy.weights)
      for (WeightSource &source : weight.sources)
        source.tensor = specialize(source.tensor, index),
        source.scales = specialize(source.scales, index);
    for (auto &origin : copy.origins)
      origin.second = specialize(origin.second, index);
    spec.layers.push_back(std::move(copy));
    if (spec.layers.size() > size_t(Limits::layers))
      return doc.fail(path, "at most " + llvm::Twine(Limits::layers) + " layers", "more");
  }
}

} // namespace

llvm::Expected<ModelSpec> fromJSON(const llvm::json::Value &value, llvm::StringRef where) {
  JSONDocument doc(where, ErrorCode::CONFIG);
  ModelSpec spec;
  JSONReader reader(doc, &value, "");
  if (int64_t schema = reader.integer("schema", 1, int64_t(1) << 31); schema > specSchema)
    doc.fail(ErrorCode::ABI, "schema", "at most " + llvm::Twine(specSchema), llvm::Twine(schema),
             "a newer moec wrote this file");
  spec.name = reader.string("name");
  if (!doc.failed() && identifierFor(spec.name) != llvm::StringRef(spec.name).lower())
    doc.fail("name", "letters, digits and `_`, not starting with a digit", "\"" + spec.name + "\"",
             "`" + identifierFor(spec.name) + "` would do");
  spec.modelType = reader.string("model_type", "");
  spec.dtype = static_cast<Format>(reader.choice("dtype", namesOf<Format>()));
  const llvm::json::Value *layers = reader.require("layers", "an array of layers");
  if (layers && !doc.failed()) {
    const llvm::json::Array *array = layers->getAsArray();
    if (!array || array->empty())
      doc.fail("layers", "an array of at least one layer",
               array ? "an empty array" : describeJSON(layers));
    else
      for (size_t i = 0; i < array->size() && !doc.failed(); ++i)
        readLayer(doc, (*array)[i], "layers[" + std::to_string(i) + "]", where.str(), spec);
  }
  reader.finish();
  if (llvm::Error error = doc.take())
    return error;
  // In model order; layers of equal index stay in the file's order.
  std::vector<std::pair<int64_t, size_t>> order;
  for (const LayerSpec &layer : spec.layers)
    order.emplace_back(layer.index, order.size());
  std::sort(order.begin(), order.end());
  std::vector<LayerSpec> sorted;
  for (const auto &[index, position] : order)
    sorted.push_back(std::move(spec.layers[position]));
  spec.layers = std::move(sorted);
  for (const LayerSpec &layer : spec.layers)
    if (llvm::Error error = checkConsistent(layer))
      return error;
  return spec;
}

} // namespace moec
