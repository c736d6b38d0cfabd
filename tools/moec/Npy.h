//===- Npy.h - NumPy's array files ------------------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Versions 1 and 2, C order, no pickle. float32 is '<f4'. bfloat16 is '<V2', as
// NumPy saves arrays of ml_dtypes.bfloat16 (load with .view(ml_dtypes.bfloat16));
// '<u2' (the bits) is read as bfloat16 too.
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_NPY_H
#define MOEC_TOOL_NPY_H

#include "moe/Spec/ModelSpec.h"
#include "moe/Support/Error.h"

#include <vector>

namespace moec::tool {

struct Array {
  Format format = Format::F32;
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  int64_t elements() const;
};

/// E-IO, E-FILE-FORMAT (no npy, truncated, trailing bytes, Fortran order), E-DTYPE.
llvm::Expected<Array> readNpy(llvm::StringRef path);

/// The bytes of a version 1 file.
std::string npyText(const Array &array);

} // namespace moec::tool

#endif // MOEC_TOOL_NPY_H
