//===- Usage.cpp - which experts served which tokens ----------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Usage.h"

#include "moe/Export/Module.h"
#include "moe/Spec/Safetensors.h"

#include "llvm/ADT/STLExtras.h"
#include "llvm/Support/Format.h"
#include "llvm/Support/raw_ostream.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace moec::tool {

std::string usageText(const Usage &usage) {
  std::string header = "{\"__metadata__\":{\"format\":\"moec-usage\",\"model\":" +
                       canonicalText(llvm::json::Value(usage.model)) + ",\"schema\":\"1\"}";
  std::string data;
  auto add = [&](const std::string &name, const char *dtype, llvm::ArrayRef<int64_t> shape,
                 const void *bytes, size_t size) {
    header +=
        "," + canonicalText(llvm::json::Value(name)) + ":{\"dtype\":\"" + dtype + "\",\"shape\":[";
    for (auto [i, dim] : llvm::enumerate(shape))
      header += (i ? "," : "") + std::to_string(dim);
    header += "],\"data_offsets\":[" + std::to_string(data.size()) + "," +
              std::to_string(data.size() + size) + "]}";
    data.append(static_cast<const char *>(bytes), size);
  };
  for (const LayerUsage &layer : usage.layers) {
    // 8-byte items first keeps every tensor aligned to its element.
    add(layer.layer + ".counts", "I64", {static_cast<int64_t>(layer.counts.size())},
        layer.counts.data(), layer.counts.size() * 8);
    add(layer.layer + ".experts", "I32", {layer.tokens, layer.chosen}, layer.experts.data(),
        layer.experts.size() * 4);
    add(layer.layer + ".weights", "F32", {layer.tokens, layer.chosen}, layer.weights.data(),
        layer.weights.size() * 4);
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i)
    out[i] = static_cast<char>(static_cast<uint64_t>(header.size()) >> (8 * i));
  return out + header + data;
}

template <typename T>
static llvm::Expected<std::vector<T>>
readTensor(const SafetensorsFile &file, const std::string &name, Dtype dtype, size_t rank) {
  auto it = file.tensors().find(name);
  llvm::StringRef path = file.file().path();
  if (it == file.tensors().end())
    return makeError(ErrorCode::FILE_FORMAT, path, "tensor `" + name + "`", "none");
  const TensorInfo &info = it->second;
  if (info.dtype != dtype || info.shape.size() != rank)
    return makeError(ErrorCode::FILE_FORMAT, path.str() + ": tensor `" + name + "`",
                     moec::name(dtype) + " of rank " + llvm::Twine(rank), describe(info));
  std::vector<T> out(info.bytes / sizeof(T));
  if (llvm::Error error = file.file().readAt(
          info.offset,
          llvm::MutableArrayRef<char>(reinterpret_cast<char *>(out.data()), info.bytes)))
    return std::move(error);
  return out;
}

llvm::Expected<Usage> readUsage(llvm::StringRef path) {
  auto input = InputFile::open(path);
  if (!input)
    return input.takeError();
  auto opened = SafetensorsFile::open(std::move(*input));
  if (!opened)
    return opened.takeError();
  const SafetensorsFile &file = **opened;
  auto meta = [&](const char *key) {
    auto it = file.metadata().find(key);
    return it == file.metadata().end() ? std::string() : it->second;
  };
  if (meta("format") != "moec-usage")
    return makeError(ErrorCode::FILE_FORMAT, path, "a usage file (format \"moec-usage\")",
                     "format \"" + meta("format") + "\"", "moec run --trace writes one");
  int64_t schema;
  if (llvm::StringRef(meta("schema")).getAsInteger(10, schema) || schema < 1)
    return makeError(ErrorCode::FILE_FORMAT, path, "a schema number", "`" + meta("schema") + "`");
  if (schema > 1)
    return makeError(ErrorCode::ABI, path, "schema 1", "schema " + llvm::Twine(schema),
                     "a newer moec wrote it");
  Usage usage;
  usage.model = meta("model");
  for (const auto &[tensor, info] : file.tensors()) {
    llvm::StringRef name = tensor;
    if (!name.consume_back(".counts"))
      continue;
    LayerUsage layer;
    layer.layer = name.str();
    auto counts = readTensor<int64_t>(file, tensor, Dtype::I64, 1);
    if (!counts)
      return counts.takeError();
    layer.counts = std::move(*counts);
    auto experts = readTensor<int32_t>(file, layer.layer + ".experts", Dtype::I32, 2);
    if (!experts)
      return experts.takeError();
    layer.experts = std::move(*experts);
    auto weights = readTensor<float>(file, layer.layer + ".weights", Dtype::F32, 2);
    if (!weights)
      return weights.takeError();
    layer.weights = std::move(*weights);
    const TensorInfo &shape = file.tensors().at(layer.layer + ".experts");
    layer.tokens = shape.shape[0];
    layer.chosen = shape.shape[1];
    for (int64_t count : layer.counts)
      if (count < 0)
        return makeError(ErrorCode::FILE_FORMAT, path.str() + ": tensor `" + tensor + "`",
                         "counts of at least 0", llvm::Twine(count));
    usage.layers.push_back(std::move(layer));
  }
  if (usage.layers.empty())
    return makeError(ErrorCode::FILE_FORMAT, path, "at least one layer (`NAME.counts`)", "none");
  // The order of names is not the order of layers: model.layers.10 comes after model.layers.9.
  auto key = [](const std::string &text) {
    std::vector<std::pair<std::string, uint64_t>> out;
    for (size_t i = 0; i < text.size();) {
      std::string word;
      while (i < text.size() && !isdigit(static_cast<unsigned char>(text[i])))
        word += text[i++];
      uint64_t number = 0;
      while (i < text.size() && isdigit(static_cast<unsigned char>(text[i])))
        number = number * 10 + (text[i++] - '0');
      out.emplace_back(word, number);
    }
    return out;
  };
  llvm::sort(usage.layers,
             [&](const LayerUsage &a, const LayerUsage &b) { return key(a.layer) < key(b.layer); });
  return usage;
}

Balance balanceOf(const LayerUsage &layer) {
  Balance out;
  double total = 0, largest = 0;
  for (int64_t count : layer.counts) {
    total += count;
    largest = std::max(largest, static_cast<double>(count));
    out.unused += count == 0;
  }
  if (total == 0)
    return out;
  for (int64_t count : layer.counts)
    if (count)
      out.entropy -= count / total * std::log(count / total);
  double experts = static_cast<double>(layer.counts.size());
  out.entropy = experts > 1 ? out.entropy / std::log(experts) : 1.0;
  out.imbalance = largest / (total / experts);
  return out;
}

/// 0 … 1 of the layer's largest count.
static std::vector<double> shares(const LayerUsage &layer) {
  int64_t largest = 1;
  for (int64_t count : layer.counts)
    largest = std::max(largest, count);
  std::vector<double> out;
  for (int64_t count : layer.counts)
    out.push_back(static_cast<double>(count) / largest);
  return out;
}

std::string usageTable(const Usage &usage, unsigned columns, bool colours) {
  std::string out;
  llvm::raw_string_ostream os(out);
  size_t nameWidth = 5, experts = 1;
  for (const LayerUsage &layer : usage.layers) {
    nameWidth = std::max(nameWidth, layer.layer.size());
    experts = std::max(experts, layer.counts.size());
  }
  nameWidth = std::min<size_t>(nameWidth, 32);
  constexpr size_t numbers = 44; // width of the columns of numbers
  size_t room = columns > nameWidth + numbers + 8 ? columns - nameWidth - numbers : 8;
  size_t perCell = (experts + room - 1) / room;
  os << "expert usage of " << usage.model << "; each line is scaled to its busiest expert";
  if (perCell > 1)
    os << "; a cell is " << perCell << " experts";
  os << "\n"
     << llvm::left_justify("layer", nameWidth)
     << "    tokens entropy max/mean unused busiest  experts\n";
  for (const LayerUsage &layer : usage.layers) {
    Balance balance = balanceOf(layer);
    size_t busiest =
        layer.counts.empty()
            ? 0
            : std::max_element(layer.counts.begin(), layer.counts.end()) - layer.counts.begin();
    std::string name = layer.layer;
    if (name.size() > nameWidth)
      name = "~" + name.substr(name.size() - nameWidth + 1);
    os << llvm::left_justify(name, nameWidth)
       << llvm::format(" %9lld %7.3f %8.2f %6lld %7zu  ", static_cast<long long>(layer.tokens),
                       balance.entropy, balance.imbalance, static_cast<long long>(balance.unused),
                       busiest);
    std::vector<double> heat = shares(layer);
    static const char *const blocks[] = {"·", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
    for (size_t i = 0; i < heat.size(); i += perCell) {
      double value =
          *std::max_element(heat.begin() + i, heat.begin() + std::min(heat.size(), i + perCell));
      int step = value <= 0 ? 0 : std::min(8, 1 + static_cast<int>(value * 7.999));
      if (colours) {
        static const int palette[] = {238, 17, 19, 27, 37, 71, 148, 214, 196};
        os << "\033[38;5;" << palette[step] << "m" << blocks[step];
      } else {
        os << blocks[step];
      }
    }
    os << (colours ? "\033[0m\n" : "\n");
  }
  return out;
}

std::string usageSVG(const Usage &usage) {
  size_t experts = 1;
  for (const LayerUsage &layer : usage.layers)
    experts = std::max(experts, layer.counts.size());
  const int cell = experts > 128 ? 6 : experts > 32 ? 10 : 16, left = 220, top = 40, right = 190;
  int width = left + cell * static_cast<int>(experts) + right;
  int height = top + cell * static_cast<int>(usage.layers.size()) + 30;
  std::string out;
  llvm::raw_string_ostream os(out);
  auto escaped = [](llvm::StringRef text) {
    std::string safe;
    for (char c : text)
      safe += c == '<' ? "&lt;" : c == '&' ? "&amp;" : c == '>' ? "&gt;" : std::string(1, c);
    return safe;
  };
  os << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << width << "\" height=\"" << height
     << "\" font-family=\"sans-serif\" font-size=\"" << std::min(cell, 12)
     << "\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"8\" y=\"20\" "
        "font-size=\"14\">Expert usage of "
     << escaped(usage.model) << " (rows: layers, columns: experts 0 to " << experts - 1
     << ")</text>\n";
  for (auto [row, layer] : llvm::enumerate(usage.layers)) {
    int y = top + cell * static_cast<int>(row);
    Balance balance = balanceOf(layer);
    os << "<text x=\"" << left - 6 << "\" y=\"" << y + cell - 2 << "\" text-anchor=\"end\">"
       << escaped(layer.layer) << "</text>\n";
    std::vector<double> heat = shares(layer);
    for (auto [expert, value] : llvm::enumerate(heat)) {
      // White over blue to dark blue: readable in grey as well.
      int red = static_cast<int>(247 - 239 * value), green = static_cast<int>(251 - 203 * value),
          blue = static_cast<int>(255 - 148 * value);
      os << "<rect x=\"" << left + cell * static_cast<int>(expert) << "\" y=\"" << y
         << "\" width=\"" << cell << "\" height=\"" << cell << "\" fill=\""
         << llvm::format("#%02x%02x%02x", red, green, blue) << "\"><title>" << escaped(layer.layer)
         << ", expert " << expert << ": " << layer.counts[expert] << " rows</title></rect>\n";
    }
    os << "<text x=\"" << left + cell * static_cast<int>(experts) + 6 << "\" y=\"" << y + cell - 2
       << "\">" << llvm::format("entropy %.3f, max/mean %.2f", balance.entropy, balance.imbalance)
       << "</text>\n";
  }
  os << "</svg>\n";
  return out;
}

} // namespace moec::tool
