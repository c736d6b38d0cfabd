//===- Files.h - files of model folders -------------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A model folder's members are opened by plain name, and what was opened is
// checked, not how it was spelled.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SUPPORT_FILES_H
#define MOE_SUPPORT_FILES_H

#include "moe/Support/Error.h"

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace moec {

/// An error for a failed system call: ENOSPC and EDQUOT give E-SPACE, ENOMEM E-MEMORY, EEXIST and
/// ENOTEMPTY E-EXISTS, the rest E-IO. `action` completes "expected to <action>".
llvm::Error systemError(const llvm::Twine &where, const llvm::Twine &action, int errnoValue);

/// A regular file opened for reading. Reads never go through a mapping, so a file that shrinks
/// meanwhile is an error and not a signal.
class InputFile {
public:
  /// Opens any path the user named (symbolic links are followed). E-IO, E-PATH for a non-file.
  static llvm::Expected<std::unique_ptr<InputFile>> open(llvm::StringRef path);
  ~InputFile();
  InputFile(const InputFile &) = delete;
  InputFile &operator=(const InputFile &) = delete;

  const std::string &path() const { return name; }
  /// Bytes, when opened.
  uint64_t size() const { return bytes; }
  /// Reads exactly out.size() bytes at `offset`. E-IO; E-FILE-FORMAT when the file ends before.
  llvm::Error readAt(uint64_t offset, llvm::MutableArrayRef<char> out) const;
  /// The whole file. E-FILE-FORMAT when it is larger than `most`.
  llvm::Expected<std::string> readAll(uint64_t most) const;
  /// Tells the kernel that [offset, offset+length) is read next, or not again.
  void willNeed(uint64_t offset, uint64_t length) const;
  void dontNeed(uint64_t offset, uint64_t length) const;

private:
  friend class InputFolder;
  InputFile(int fd, std::string name, uint64_t bytes)
      : fd(fd), name(std::move(name)), bytes(bytes) {}
  static llvm::Expected<std::unique_ptr<InputFile>> adopt(int fd, std::string name);

  int fd;
  std::string name;
  uint64_t bytes;
};

/// A model folder. Members are plain names; a symbolic link must lead to a regular file inside
/// the folder or inside `blobs` of the same Hugging Face cache repository.
class InputFolder {
public:
  /// `followLinks`: links may lead anywhere (--follow-links). E-IO, E-PATH.
  static llvm::Expected<std::unique_ptr<InputFolder>> open(llvm::StringRef path,
                                                           bool followLinks = false);
  ~InputFolder();
  InputFolder(const InputFolder &) = delete;
  InputFolder &operator=(const InputFolder &) = delete;

  const std::string &path() const { return name; }
  /// Whether a directory entry of this name exists, whatever it is.
  bool has(llvm::StringRef member) const;
  /// Opens a member. E-PATH: not a plain name, not a regular file, or a link that leaves the
  /// folder. E-IO: missing or unreadable, with the nearest names in the folder.
  llvm::Expected<std::unique_ptr<InputFile>> openMember(llvm::StringRef member) const;
  /// Names in the folder, sorted.
  std::vector<std::string> members() const;
  /// Of a repository in a Hugging Face cache, where its model is, for errors about what the folder
  /// lacks; else "".
  std::string snapshotHint() const;

private:
  InputFolder(int fd, std::string name, std::string canonical, bool followLinks)
      : fd(fd), name(std::move(name)), canonical(std::move(canonical)), followLinks(followLinks) {}

  int fd;
  std::string name, canonical;
  bool followLinks;
};

/// E-PATH unless `member` is one path component without "/", NUL, "." or "..".
llvm::Error checkPlainName(llvm::StringRef member, const llvm::Twine &where);

} // namespace moec

#endif // MOE_SUPPORT_FILES_H
