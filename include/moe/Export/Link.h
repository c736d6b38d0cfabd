//===- Link.h - from one object to a library --------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_EXPORT_LINK_H
#define MOE_EXPORT_LINK_H

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"
#include "llvm/Support/Error.h"

namespace moec {

/// Links `objects` into the shared library `library` with LLD, in this process. The library needs
/// no other library, its soname is `soname`, its only dynamic symbol is `exported`, and equal
/// objects give equal bytes. Uses files in `scratch` (removed again).
llvm::Error linkShared(llvm::ArrayRef<std::string> objects, llvm::StringRef library,
                       llvm::StringRef soname, llvm::StringRef exported, llvm::StringRef scratch);

/// Writes a deterministic static archive with one member `name.o`.
llvm::Error writeArchive(llvm::StringRef object, llvm::StringRef archive, llvm::StringRef member);

} // namespace moec

#endif // MOE_EXPORT_LINK_H
