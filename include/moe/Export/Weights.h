//===- Weights.h - packing weights into files -------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// One file a layer, `<layer>.safetensors`, written while the source is read: a
// worker reads, packs, hashes and writes a block of rows before it takes the
// next one.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_EXPORT_WEIGHTS_H
#define MOE_EXPORT_WEIGHTS_H

#include "moe/Export/Module.h"
#include "moe/Runtime/Pack.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace moec {

class Checkpoint;

/// Rows row0 … row1-1 of one part of one expert, in memory.
struct WeightRows {
  /// `source.data` is where row 0 would be: pass it to moec_pack with row0 and row1.
  moec_pack_source source;
  /// The tensor's name, for errors.
  std::string tensor;
};

/// Where weights come from. One thread at a time asks, for rows in order but not for all of them.
class WeightReader {
public:
  virtual ~WeightReader();
  /// Reads rows [row0, row1) of `part` of `expert`. The memory is valid until the next call.
  virtual llvm::Expected<WeightRows> read(const LayerSpec &layer, const WeightSpec &weight,
                                          int64_t expert, int64_t part, int64_t row0,
                                          int64_t row1) = 0;
};

/// Deterministic random weights (`--checkpoint random:SEED`). The value number i of tensor NAME
/// (row-major in the tensor's own shape, from 0) is, with 64-bit wrap-around arithmetic,
///
///   mix(x)  = x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB;
///             x ^= x >> 31                                   (the finalizer of splitmix64)
///   g       = 0x9E3779B97F4A7C15
///   key     = mix(SEED + g * (1 + FNV-1a 64 of NAME))
///   u(z)    = (z >> 40) * 2^-24                              (in [0, 1), exact in f32)
///   value   = f32((2 u(mix(key + (i + 1) g)) - 1) * sqrt(3 / Kin))
///
/// computed in double, rounded to f32 and then to the tensor's format: uniform with variance 1/Kin,
/// so that outputs are of the order of inputs. Row e of a router is multiplied, before rounding to
/// f32, by 0.5 + 1.5 u(mix(key ^ ((e + 1) * 0xD1B54A32D192ED03))): experts with longer rows are
/// chosen more often, so routing is uneven. Vectors are uniform within 0.25 of 0 (biases) or of 1
/// (scales) instead. A weight without sources (bare config.json) takes
/// NAME = "<layer>.<role>", shape [experts, parts * rows, cols].
std::unique_ptr<WeightReader> randomWeights(uint64_t seed);

/// Weights of a checkpoint, whose tensors were checked (Checkpoint::checkWeight).
std::unique_ptr<WeightReader> checkpointWeights(const Checkpoint &checkpoint);

/// What packing reports while it works; called by one thread at a time.
struct PackProgress {
  /// Called with packed bytes since the last call.
  std::function<void(uint64_t bytes)> advance = [](uint64_t) {};
  /// Called with the name of a layer that is begun.
  std::function<void(llvm::StringRef name)> layer = [](llvm::StringRef) {};
};

/// What packing of some layers takes on at most `threads` threads.
struct PackPlan {
  PackPlan(llvm::ArrayRef<LayerSpec> layers, unsigned threads);
  unsigned workers;         ///< threads that find something to do
  uint64_t transposedBytes; ///< of a block of a transposed weight
  uint64_t memory;          ///< anonymous memory of all workers, at most
};

/// Packs layers, each into `folder`/<layer>.safetensors (which must not exist), with a reader
/// for each worker of the plan, which was made for these layers. Blocks are claimed in the order of
/// the files, so that one layer keeps all workers busy and few files are open. `ids` are the
/// layers' identities (layerId). The bytes do not depend on the number of workers. E-NONFINITE
/// names tensor and element; E-SPACE, E-IO. A failed file is the caller's to remove (it stages).
llvm::Error packLayers(llvm::ArrayRef<LayerSpec> layers,
                       llvm::ArrayRef<std::array<uint8_t, 32>> ids, const PackPlan &plan,
                       llvm::ArrayRef<std::unique_ptr<WeightReader>> readers,
                       llvm::StringRef folder, const PackProgress &progress = {});

/// Bytes of the packed file of a layer.
uint64_t packedFileBytes(const LayerSpec &layer);

/// The tensor that holds `part` of `expert`: its name and where the elements lie in it.
struct TensorSlice {
  std::string tensor;
  /// Element (row, col) is number first + row * rowStride + col * colStride of the tensor.
  int64_t first = 0, rowStride = 0, colStride = 0;
  /// The tensor's shape, outermost first.
  std::vector<int64_t> shape;
};
TensorSlice locate(const LayerSpec &layer, const WeightSpec &weight, int64_t expert, int64_t part);

/// One tensor of a packed file.
struct PackedTensor {
  std::string role, format;
  uint64_t offset = 0, bytes = 0, hash = 0;
};

/// One packed file as it was found.
struct PackedFile {
  std::array<uint8_t, 32> id{};
  std::string layout;
  uint64_t bytes = 0;
  std::vector<PackedTensor> tensors;
};

/// Reads and checks the header of a packed file: magic, schema, sizes, alignment. E-IO,
/// E-FILE-FORMAT, E-ABI (a higher schema).
llvm::Expected<PackedFile> readPackedHeader(llvm::StringRef path);

/// Reads every byte and compares the hashes. E-HASH names the tensor.
llvm::Error checkPackedBytes(llvm::StringRef path, const PackedFile &file,
                             const PackProgress &progress = {});

} // namespace moec

#endif // MOE_EXPORT_WEIGHTS_H
