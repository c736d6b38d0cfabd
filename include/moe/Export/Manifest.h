//===- Manifest.h - manifest.json of a compiled module ----------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_EXPORT_MANIFEST_H
#define MOE_EXPORT_MANIFEST_H

#include "moe/Spec/ModelSpec.h"
#include "moe/Support/Error.h"

#include <array>
#include <string>
#include <vector>

namespace mlir::moe {
struct CodeTable;
}

namespace moec {

/// The highest "schema" this build reads, and the one it writes.
constexpr int64_t manifestSchema = 1;

/// What is written. Same inputs, same bytes: no date, no host, no absolute path.
///   schema, moec, abi, llvm   numbers and versions
///   name, target, library, header
///   layers    name, index, code (number in `code`), id, file, bytes
///   code      shapes, packed weights, levels with their entries; every stage says path =
///             optimized, as code without an optimized path is refused
///   strategy  the chosen schedule of every function (what --strategy reads)
///   reasons   why: a sentence for each of them
///   sizes     bytes of the library and of all weights
///   spec      the *.moe.json of the model with the origin of every attribute
struct ManifestInput {
  const ModelSpec &spec;
  const mlir::moe::CodeTable &table;
  llvm::json::Value strategy, reasons;
  std::string library, header;
  uint64_t libraryBytes = 0;
};
std::string manifestText(const ManifestInput &input);

/// What is read back.
struct Manifest {
  struct Layer {
    std::string name, file;
    int64_t index = 0, code = 0;
    std::array<uint8_t, 32> id{};
    uint64_t bytes = 0;
  };
  std::string version, name, target, library, header;
  std::vector<Layer> layers;
  ModelSpec spec;
  llvm::json::Value json = nullptr; ///< all of it
};

/// Reads DIR/manifest.json. E-IO, E-FILE-FORMAT, E-ABI (a higher schema or another ABI major).
llvm::Expected<Manifest> readManifest(llvm::StringRef folder);

} // namespace moec

#endif // MOE_EXPORT_MANIFEST_H
