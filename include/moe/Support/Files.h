//===- Files.h - files of model folders, and output folders -----*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Reading: a model folder's members are opened by plain name, and what was
// opened is checked, not how it was spelled. Writing: a folder is made under a
// temporary name beside its target and appears there by one rename, or not at
// all.
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

private:
  InputFolder(int fd, std::string name, std::string canonical, bool followLinks)
      : fd(fd), name(std::move(name)), canonical(std::move(canonical)), followLinks(followLinks) {}

  int fd;
  std::string name, canonical;
  bool followLinks;
};

/// E-PATH unless `member` is one path component without "/", NUL, "." or "..".
llvm::Error checkPlainName(llvm::StringRef member, const llvm::Twine &where);

/// A file being written. Errors of the system come out of write() and close(), never later.
class OutputFile {
public:
  /// Creates `path`; it must not exist. E-EXISTS, E-IO, E-SPACE.
  static llvm::Expected<std::unique_ptr<OutputFile>> create(llvm::StringRef path);
  ~OutputFile();
  OutputFile(const OutputFile &) = delete;
  OutputFile &operator=(const OutputFile &) = delete;

  const std::string &path() const { return name; }
  /// Position of the next write.
  uint64_t tell() const { return position; }
  llvm::Error writeBytes(llvm::ArrayRef<char> data);
  llvm::Error write(llvm::StringRef data) {
    return writeBytes(llvm::ArrayRef<char>(data.data(), data.size()));
  }
  llvm::Error writeAt(uint64_t offset, llvm::ArrayRef<char> data);
  /// Flushes to the disk and closes.
  llvm::Error close();

private:
  OutputFile(int fd, std::string name) : fd(fd), name(std::move(name)) {}

  int fd;
  std::string name;
  uint64_t position = 0;
};

/// A folder that becomes visible whole or not at all.
///
///   auto out = OutputFolder::create("mixtral.moec", /*force=*/false);
///   … write files below (*out)->path() …
///   if (llvm::Error error = (*out)->publish()) …
///
/// It is written as `.<name>.tmp-<pid>` beside its target. An unpublished folder is removed by the
/// destructor, and on SIGINT and SIGTERM when installSignalCleanup() was called. Leftovers of dead
/// processes (kill -9) are removed by the next create() for the same target.
class OutputFolder {
public:
  /// E-EXISTS when `target` exists and `force` is false (or it is no folder), E-LOCKED while
  /// another process writes the same target, E-IO, E-SPACE.
  static llvm::Expected<std::unique_ptr<OutputFolder>> create(llvm::StringRef target, bool force);
  ~OutputFolder();
  OutputFolder(const OutputFolder &) = delete;
  OutputFolder &operator=(const OutputFolder &) = delete;

  /// Where to write.
  const std::string &path() const { return temporary; }
  const std::string &target() const { return destination; }
  /// Syncs the folder and renames it. With force an existing target is exchanged and removed.
  llvm::Error publish();

private:
  OutputFolder(std::string destination, std::string temporary, int lockFd, bool force)
      : destination(std::move(destination)), temporary(std::move(temporary)), lockFd(lockFd),
        force(force) {}
  void discard();

  std::string destination, temporary;
  int lockFd, slot = -1;
  bool force, published = false;
};

/// On SIGINT, SIGTERM and SIGHUP: remove unpublished output folders and end with 128 + signal.
/// Call once, from main.
void installSignalCleanup();

/// E-SPACE when the file system of `path` (or of its nearest existing parent) has fewer than
/// `bytes` free for this user.
llvm::Error checkFreeSpace(llvm::StringRef path, uint64_t bytes);

/// Writes `text` to `path` by a temporary file and a rename. Replaces an existing file.
llvm::Error writeFileAtomically(llvm::StringRef path, llvm::StringRef text);

} // namespace moec

#endif // MOE_SUPPORT_FILES_H
