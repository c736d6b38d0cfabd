//===- Safetensors.h - weights in safetensors files -------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A reader for files nobody vouches for. Every extent is checked against the
// file's size before it is used, tensors must cover the data exactly, and bytes
// are read with pread, so a file that shrinks is an error and not a signal.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SPEC_SAFETENSORS_H
#define MOE_SPEC_SAFETENSORS_H

#include "moe/Spec/ModelSpec.h"
#include "moe/Support/Files.h"

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringMap.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace moec {

/// What to do about weights in a format that is not read, for errors.
inline constexpr char saveInBF16[] =
    "save the model in bf16 with transformers: from_pretrained(MODEL, dtype=\"bfloat16\"), "
    ".dequantize() if it is quantized, .save_pretrained(FOLDER)";

/// The element types of the safetensors format.
enum class Dtype {
  BOOL,
  F4,
  F6_E2M3,
  F6_E3M2,
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,
  F64,
  I64,
  U64
};

/// "BF16", as written in the format.
llvm::StringRef name(Dtype dtype);
/// Size of one element in bits: 1 to 8 bytes, 6 for F6_*, 4 for F4.
unsigned bitsOf(Dtype dtype);

/// One tensor of a file.
struct TensorInfo {
  Dtype dtype = Dtype::F32;
  std::vector<int64_t> shape;
  uint64_t offset = 0; ///< from the start of the file
  uint64_t bytes = 0;
};

/// "F32 [2,3]", for messages.
std::string describe(const TensorInfo &tensor);
/// "[8,64]".
std::string shapeText(llvm::ArrayRef<int64_t> shape);

/// One .safetensors file, header read and checked.
class SafetensorsFile {
public:
  /// E-FILE-FORMAT for anything the format forbids: header larger than 100 MB or than the file,
  /// not JSON, duplicate keys, unknown dtypes, negative or huge dimensions, offsets that are out of
  /// order, out of range, overlap or leave holes, and shape × dtype unlike the extent.
  static llvm::Expected<std::unique_ptr<SafetensorsFile>> open(std::unique_ptr<InputFile> file);

  const InputFile &file() const { return *input; }
  const std::map<std::string, TensorInfo> &tensors() const { return table; }
  const std::map<std::string, std::string> &metadata() const { return meta; }

private:
  std::unique_ptr<InputFile> input;
  std::map<std::string, TensorInfo> table;
  std::map<std::string, std::string> meta;
};

/// A strided matrix inside a file: element (r, c) is at elements start + r*rowStride + c*colStride
/// of the extent [offset, offset+bytes).
struct MatrixExtent {
  const SafetensorsFile *file = nullptr;
  std::string tensor; ///< its name, for messages
  Dtype dtype = Dtype::F32;
  uint64_t offset = 0, bytes = 0; ///< extent to read, from the start of the file
  int64_t start = 0;              ///< element of (0,0) inside the extent
  int64_t rows = 0, cols = 0;
  int64_t rowStride = 0, colStride = 0; ///< in elements
  int64_t firstElement = 0; ///< position of the extent's first element in the whole tensor

  /// Encoded (the strides and `start` mean nothing): the extent holds the rows of one expert, and
  /// row r of this matrix is stored row firstRow + r * rowStep.
  Encoding encoding = Encoding::Plain;
  int64_t firstRow = 0, rowStep = 1;
  const SafetensorsFile *scalesFile = nullptr;
  Dtype scalesDtype = Dtype::F32;
  uint64_t scalesOffset = 0; ///< of the expert's first scale
  int64_t scalesCols = 0;    ///< scales in a row of them
};

/// The tensors of a checkpoint folder: one .safetensors file, or shards named by
/// model.safetensors.index.json.
class Checkpoint {
public:
  /// Opens `folder`: model.safetensors if there, else the shards of model.safetensors.index.json,
  /// else the only *.safetensors file. Shards must be plain names of files inside the folder
  /// (E-PATH), exist and hold the tensors that the index claims, and no tensor may be in two files
  /// (E-TENSOR). A folder of .bin, .pt or .gguf files is refused by name (E-UNSUPPORTED).
  static llvm::Expected<std::unique_ptr<Checkpoint>> open(llvm::StringRef folder,
                                                          bool followLinks = false);
  /// Opens one .safetensors file.
  static llvm::Expected<std::unique_ptr<Checkpoint>> openFile(llvm::StringRef path);

  /// Where it was opened.
  const std::string &path() const { return where; }
  /// Null when there is none of this name.
  const TensorInfo *find(llvm::StringRef tensor) const;
  bool has(llvm::StringRef tensor) const { return find(tensor) != nullptr; }
  /// All names, sorted.
  std::vector<std::string> names() const;
  size_t size() const { return index.size(); }

  /// E-TENSOR for a tensor that is not there, with the nearest names.
  llvm::Error missing(llvm::StringRef tensor) const;

  /// Where part `part` of expert `expert` of a weight lies. Dtype and shape were checked by
  /// checkWeight; this call fails as it does.
  llvm::Expected<MatrixExtent> locate(const WeightSpec &weight, int64_t expert, int64_t part) const;

  /// E-TENSOR unless every tensor of the weight's sources is there with the shape that the weight
  /// demands and a dtype that can be read (F32, BF16, F16, or that of its encoding);
  /// E-UNSUPPORTED for other dtypes.
  /// `config` completes "…, as <config> demands".
  llvm::Error checkWeight(const WeightSpec &weight, llvm::StringRef config) const;

  /// Decodes rows [row0, row1) of an encoded extent into `out`, compact and in `format`. f32 is
  /// exact for mxfp4 and the product of value and scale in f32 for fp8; bf16 is that, rounded to
  /// nearest even. `buffer` holds the bytes read.
  llvm::Error decode(const MatrixExtent &extent, int64_t row0, int64_t row1, Format format,
                     std::vector<char> &buffer, std::vector<char> &out) const;

  /// Reads an extent. `buffer` is resized to extent.bytes.
  llvm::Error read(const MatrixExtent &extent, std::vector<char> &buffer) const;

private:
  struct Place {
    const SafetensorsFile *file;
    const TensorInfo *info;
  };
  llvm::Error add(std::unique_ptr<SafetensorsFile> file);
  const Place *place(llvm::StringRef tensor) const;

  std::string where;
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  std::map<std::string, Place, std::less<>> index;
};

/// NaN and infinities met while weights pass by.
struct NonFinite {
  uint64_t count = 0;
  int64_t first = -1; ///< index of the first in its tensor; -1: none
};

/// Adds the NaN and infinities of `count` elements at `data` (F32, BF16 or F16; need not be
/// aligned). `firstIndex` is the tensor index of the first element. Meant to run over bytes that
/// are in the cache anyway; it reads at memory speed.
void scanNonFinite(Dtype dtype, const char *data, size_t count, int64_t firstIndex,
                   NonFinite &found);

/// E-NONFINITE when `found` counts any: names tensor, count and first index.
llvm::Error checkFinite(const NonFinite &found, llvm::StringRef file, llvm::StringRef tensor);

/// Converts `count` elements (F32, BF16 or F16) to f32. Exact.
void toFloat(Dtype dtype, const char *data, size_t count, float *out);

} // namespace moec

#endif // MOE_SPEC_SAFETENSORS_H
