//===- Ptxas.h - machine code of a GPU -------------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_EXPORT_PTXAS_H
#define MOEC_EXPORT_PTXAS_H

#include "llvm/ADT/StringRef.h"
#include "llvm/Support/Error.h"

#include <string>

namespace moec {

/// The assembler of the CUDA toolkit: `bin/ptxas` below CUDA_ROOT, CUDA_HOME or CUDA_PATH, on PATH,
/// or, where none of the three is set, below /usr/local/cuda. E-TARGET where there is none.
llvm::Expected<std::string> findPtxas();

/// The cubin of `ptx` for "sm_80". Files are made in folder `scratch` and removed. E-TARGET where
/// ptxas does not know the architecture or cannot be run, E-INTERNAL where it refuses the code.
llvm::Expected<std::string> assemble(llvm::StringRef ptx, llvm::StringRef arch,
                                     llvm::StringRef scratch);

} // namespace moec

#endif // MOEC_EXPORT_PTXAS_H
