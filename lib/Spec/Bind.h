//===- Bind.h - where a layer's weights lie in a checkpoint -----*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_SPEC_BIND_H
#define MOE_LIB_SPEC_BIND_H

#include "Row.h"

namespace moec {

/// Finds the form of every weight of a layer in a checkpoint, whose sorted tensor names are `names`
/// and whose configuration says `encoding`.
llvm::Error bindSources(RowReader::Layer &layer, const Checkpoint &checkpoint,
                        const std::vector<std::string> &names, Encoding encoding);

/// Whether one of the sorted `names` starts with `prefix`.
bool startsAny(const std::vector<std::string> &names, const std::string &prefix);

/// Says aloud what packing will do to the values of a checkpoint.
void noteConversions(ModelSpec &spec, const Checkpoint &checkpoint);

/// Checks all weights against the checkpoint and decides formats and compute dtype.
llvm::Error bindFormats(ModelSpec &spec, const Checkpoint &checkpoint, const LoadOptions &options,
                        const ConfigDtype &stated);

} // namespace moec

#endif // MOE_LIB_SPEC_BIND_H
