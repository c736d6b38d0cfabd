//===- Output.h - files and folders that appear whole or not at all -*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Everything moec writes is first written into a temporary folder beside its
// target and then published by one rename. A failure, a full disk or a signal
// leaves nothing behind; after kill -9 the next run removes what was left.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_EXPORT_OUTPUT_H
#define MOE_EXPORT_OUTPUT_H

#include "moe/Support/Error.h"

#include "llvm/ADT/StringRef.h"
#include "llvm/Support/Error.h"

#include <cstdint>
#include <memory>
#include <string>

namespace moec {

/// A file being written from its beginning to its end. Every error is coded: E-SPACE for a full
/// disk, quota or file size limit, else E-IO. Nothing is buffered: hand over large pieces.
class StagedFile {
public:
  /// Creates `path` (it must not exist). `shown` is the name used in errors; empty: `path`.
  static llvm::Expected<std::unique_ptr<StagedFile>> create(llvm::StringRef path,
                                                            llvm::StringRef shown = "");
  /// Closes without a word; call close() to learn of errors.
  ~StagedFile();
  StagedFile(const StagedFile &) = delete;
  StagedFile &operator=(const StagedFile &) = delete;

  /// Appends `size` bytes.
  llvm::Error write(const void *data, size_t size);
  /// Writes `size` bytes at `offset`; the position for write() does not change.
  llvm::Error writeAt(const void *data, size_t size, uint64_t offset);
  /// Reserves `size` bytes of disk where the file system can (E-SPACE before the long work).
  llvm::Error reserve(uint64_t size);
  /// Bytes appended so far.
  uint64_t size() const { return position; }
  /// fsync and close.
  llvm::Error close();

private:
  StagedFile(int fd, std::string shown) : fd(fd), shown(std::move(shown)) {}
  llvm::Error failure(int error) const;

  int fd;
  std::string shown;
  uint64_t position = 0;
};

/// Writes a small file in one go.
llvm::Error writeFile(llvm::StringRef path, llvm::StringRef contents, llvm::StringRef shown = "");

/// Writes a file so that `path` is either untouched or complete. Replaces a regular file.
llvm::Error replaceFile(llvm::StringRef path, llvm::StringRef contents);

/// Bytes free for this user on the file system of `path`, or nothing if unknown.
std::optional<uint64_t> freeSpace(llvm::StringRef path);

/// What a staged output becomes.
enum class OutputKind {
  Folder,  ///< a DIR with a manifest.json
  Weights, ///< a folder of packed weights
  File     ///< one file
};

/// A temporary folder `.NAME.moec-tmp-XXXXXX` beside `target`, held by a lock while the process
/// lives. Not published: removed by the destructor.
class StagedOutput {
public:
  /// E-EXISTS: target exists and `force` is not given, or is not something of this kind that may
  /// be replaced. E-IO: its parent folder is missing or not writable. E-LOCKED: another process is
  /// writing the same target. Removes what dead processes left.
  static llvm::Expected<std::unique_ptr<StagedOutput>> create(llvm::StringRef target,
                                                              OutputKind kind, bool force);
  ~StagedOutput();
  StagedOutput(const StagedOutput &) = delete;
  StagedOutput &operator=(const StagedOutput &) = delete;

  /// The temporary folder. For OutputKind::File the file is `output` in it; for the folder kinds
  /// the published folder is `output` in it.
  const std::string &folder() const { return temporary; }
  std::string output() const { return temporary + "/output"; }

  /// Makes target appear in one step and removes the rest of the temporary folder.
  llvm::Error publish();
  /// Removes the temporary folder. Nothing happens the second time.
  void discard();

private:
  StagedOutput(std::string target, std::string temporary, OutputKind kind, bool force, int lock)
      : target(std::move(target)), temporary(std::move(temporary)), kind(kind), force(force),
        lock(lock) {}

  std::string target, temporary;
  OutputKind kind;
  bool force;
  int lock;
};

/// Removes a folder and everything in it, following no link. Errors are ignored.
void removeTree(llvm::StringRef path);

/// E-SPACE, E-MEMORY, E-EXISTS or E-IO of an errno value. `doing` is a noun phrase ("a file that
/// can be written").
llvm::Error osError(llvm::StringRef where, llvm::StringRef expected, int error);

} // namespace moec

#endif // MOE_EXPORT_OUTPUT_H
