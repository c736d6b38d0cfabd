//===- Config.cpp - what a config.json says of its own --------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Config.h"

#include "moe/Support/JSON.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/FormatVariadic.h"

namespace moec {

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
    // The text model of a composite configuration may go without a type of its own.
    std::string implied = depth && !text ? seen.back() + "_text" : "";
    if (!text && table.find(implied))
      text = implied;
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

llvm::Expected<Encoding> configEncoding(const Config &config, const std::string &file) {
  for (const llvm::json::Object *object : {config.outer, config.object}) {
    for (const char *key : {"quantization_config", "compression_config"}) {
      const llvm::json::Value *value = object->get(key);
      if (!value || value->getAsNull())
        continue;
      std::string method = describeJSON(value);
      if (const llvm::json::Object *q = value->getAsObject()) {
        if (q->empty())
          continue;
        std::string name = q->getString("quant_method").value_or("").str();
        std::string fmt = q->getString("fmt").value_or("e4m3").str();
        const llvm::json::Value *block = q->get("weight_block_size");
        if (name == "mxfp4")
          return Encoding::MXFP4;
        if (name == "fp8" && block && *block == llvm::json::Value(llvm::json::Array{128, 128}) &&
            (fmt == "e4m3" || fmt == "float8_e4m3fn" || fmt == "float8_e4m3"))
          return Encoding::FP8;
        // Named as the file does: method, then what tells its formats apart.
        method = name.empty() ? "a quantized checkpoint" : "`" + name + "`";
        for (const char *field : {"format", "fmt", "quant_algo", "bits", "weight_block_size"})
          if (const llvm::json::Value *detail = q->get(field))
            method += llvm::formatv(", {0} {1}", field, *detail).str();
        method = llvm::json::fixUTF8(llvm::StringRef(method).take_front(160));
      }
      return makeError(ErrorCode::UNSUPPORTED,
                       file + ": " + (object == config.outer ? "" : config.path) + key,
                       "weights in f32, bf16, f16, `fp8` (e4m3) in blocks of 128 x 128, or `mxfp4`",
                       method, saveInBF16);
    }
  }
  return Encoding::Plain;
}

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

} // namespace moec
