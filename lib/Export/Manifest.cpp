//===- Manifest.cpp - manifest.json of a compiled module ------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Manifest.h"

#include "moe/Export/Module.h"
#include "moe/Export/Weights.h"
#include "moe/Support/JSON.h"
#include "moe/Target/CPU/ModuleTable.h"
#include "moec.h"
#include "moec/module.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Config/llvm-config.h"
#include "llvm/Support/raw_ostream.h"

namespace moec {

static const char *dtypeText(int32_t dtype) {
  return dtype == MOEC_DT_F32 ? "f32" : dtype == MOEC_DT_BF16 ? "bf16" : "f16";
}

std::string manifestText(const ManifestInput &input) {
  const mlir::moe::CodeTable &table = input.table;
  std::string text;
  llvm::raw_string_ostream os(text);
  llvm::json::OStream json(os, /*IndentSize=*/1);
  uint64_t weightBytes = 0;
  json.objectBegin();
  json.attribute("schema", manifestSchema);
  json.attribute("moec", versionString());
  json.attribute("abi", std::to_string(MOEC_ABI >> 16) + "." + std::to_string(MOEC_ABI & 0xffff));
  json.attribute("llvm", LLVM_VERSION_STRING);
  json.attribute("name", table.name);
  json.attribute("target", table.images.empty() ? "cpu" : "cuda");
  json.attribute("library", input.library);
  json.attribute("header", input.header);
  json.attributeArray("layers", [&] {
    for (size_t i = 0; i < table.layers.size(); ++i) {
      const mlir::moe::LayerEntry &layer = table.layers[i];
      uint64_t bytes = packedFileBytes(input.spec.layers[i]);
      weightBytes += bytes;
      json.object([&] {
        json.attribute("name", layer.name);
        json.attribute("index", layer.index);
        json.attribute("code", layer.code);
        json.attribute("id", hexText(layer.id));
        json.attribute("file", layer.file);
        json.attribute("bytes", static_cast<int64_t>(bytes));
      });
    }
  });
  json.attributeArray("code", [&] {
    for (const mlir::moe::LayerCode &code : table.codes)
      json.object([&] {
        json.attribute("kind", code.kind ? "dense" : "moe");
        json.attribute("compute", dtypeText(code.compute));
        json.attribute("H", code.H);
        json.attribute("F", code.F);
        json.attribute("E", code.E);
        json.attribute("K", code.K);
        json.attribute("active_flops", static_cast<int64_t>(code.activeFlops));
        json.attributeArray("weights", [&] {
          for (const mlir::moe::WeightEntry &w : code.weights)
            json.object([&] {
              json.attribute("role", w.role);
              json.attribute("format", w.format);
              json.attribute("layout", w.layout);
              json.attributeArray("shape", [&] {
                for (int64_t size : {w.experts, w.parts, w.rows, w.cols})
                  json.value(size);
              });
              json.attribute("bytes", static_cast<int64_t>(w.bytes));
            });
        });
        json.attributeArray("levels", [&] {
          for (const mlir::moe::LevelCode &level : code.levels)
            json.object([&] {
              json.attribute("level", level.level);
              json.attributeArray("entries", [&] {
                static const char *const kinds[] = {"forward", "route", "experts"};
                for (const mlir::moe::CodeEntry &entry : level.entries)
                  json.object([&] {
                    json.attribute("kind", kinds[entry.kind]);
                    json.attribute("x", dtypeText(entry.xType));
                    if (entry.kind != MOEC_ENTRY_ROUTE)
                      json.attribute("y", dtypeText(entry.yType));
                    json.attributeArray("stages", [&] {
                      for (size_t s = 0; s < entry.stages.size(); ++s)
                        json.object([&] {
                          json.attribute("function", entry.stages[s]);
                          json.attribute("label", entry.labels[s]);
                          json.attribute("path", "optimized");
                        });
                    });
                  });
              });
            });
        });
      });
  });
  if (!table.images.empty()) {
    json.attributeArray("images", [&] {
      for (const mlir::moe::GPUImage &image : table.images)
        json.object([&] {
          json.attribute("kind", image.kind == MOEC_IMAGE_PTX ? "ptx" : "cubin");
          json.attribute("arch", image.name);
          json.attribute("bytes", static_cast<int64_t>(image.bytes.size()));
        });
    });
    json.attributeArray("gpu_levels", [&] {
      for (const mlir::moe::GPULevel &level : table.gpuLevels)
        json.object([&] {
          json.attribute("level", level.level);
          json.attribute("images", level.imageCount);
          json.attribute("kernels", level.kernelCount);
        });
    });
    json.attributeArray("kernels", [&] {
      for (const mlir::moe::GPUKernel &kernel : table.kernels)
        json.object([&] {
          json.attribute("name", kernel.name);
          json.attribute("threads", static_cast<int64_t>(kernel.threads));
          json.attribute("shared", static_cast<int64_t>(kernel.sharedBytes));
        });
    });
  }
  json.attribute("strategy", input.strategy);
  json.attribute("reasons", input.reasons);
  json.attributeObject("sizes", [&] {
    json.attribute("library", static_cast<int64_t>(input.libraryBytes));
    json.attribute("weights", static_cast<int64_t>(weightBytes));
  });
  json.attribute("spec", toJSON(input.spec, /*origins=*/true));
  json.objectEnd();
  os << "\n";
  return text;
}

llvm::Expected<Manifest> readManifest(llvm::StringRef folder) {
  std::string path = (folder + "/manifest.json").str();
  auto value = readJSON(path, ErrorCode::FILE_FORMAT);
  if (!value)
    return value.takeError();
  const llvm::json::Object *root = value->getAsObject();
  auto broken = [&](const llvm::Twine &where, const llvm::Twine &expected,
                    const llvm::json::Value *got) {
    return makeError(ErrorCode::FILE_FORMAT, path + ": " + where, expected, describeJSON(got),
                     "compile the model again");
  };
  if (!root)
    return broken("$", "an object", &*value);
  std::optional<int64_t> schema = root->getInteger("schema");
  if (!schema || *schema < 1)
    return broken("$.schema", "a schema number", root->get("schema"));
  if (*schema > manifestSchema)
    return makeError(ErrorCode::ABI, path, "schema " + llvm::Twine(manifestSchema) + " or lower",
                     "schema " + llvm::Twine(*schema), "a newer moec wrote it; update moec");
  Manifest out;
  for (auto [key, target] : {std::pair("moec", &out.version), std::pair("name", &out.name),
                             std::pair("target", &out.target), std::pair("library", &out.library),
                             std::pair("header", &out.header)}) {
    std::optional<llvm::StringRef> string = root->getString(key);
    if (!string)
      return broken(llvm::Twine("$.") + key, "a string", root->get(key));
    *target = string->str();
  }
  const llvm::json::Array *layers = root->getArray("layers");
  if (!layers)
    return broken("$.layers", "an array", root->get("layers"));
  for (auto [i, element] : llvm::enumerate(*layers)) {
    const llvm::json::Object *object = element.getAsObject();
    std::string where = "$.layers[" + std::to_string(i) + "]";
    if (!object)
      return broken(where, "an object", &element);
    Manifest::Layer layer;
    auto name = object->getString("name"), id = object->getString("id"),
         member = object->getString("file");
    auto index = object->getInteger("index"), code = object->getInteger("code"),
         bytes = object->getInteger("bytes");
    std::string raw;
    if (!name || !id || !member || !index || !code || !bytes || id->size() != 64 ||
        !llvm::tryGetFromHex(*id, raw))
      return broken(where, "name, index, code, id (64 digits), file and bytes", &element);
    if (llvm::Error error = checkPlainName(*member, path + ": " + where + ".file"))
      return std::move(error);
    layer.name = name->str();
    layer.file = member->str();
    layer.index = *index;
    layer.code = *code;
    layer.bytes = *bytes;
    std::copy(raw.begin(), raw.end(), layer.id.begin());
    out.layers.push_back(std::move(layer));
  }
  const llvm::json::Value *spec = root->get("spec");
  if (!spec)
    return broken("$.spec", "the model's spec", spec);
  auto read = fromJSON(*spec, path + ": $.spec");
  if (!read)
    return read.takeError();
  out.spec = std::move(*read);
  if (out.spec.layers.size() != out.layers.size())
    return makeError(ErrorCode::FILE_FORMAT, path,
                     llvm::Twine(out.layers.size()) + " layers in $.spec",
                     llvm::Twine(out.spec.layers.size()), "compile the model again");
  out.json = std::move(*value);
  return out;
}

} // namespace moec
