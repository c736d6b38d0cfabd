//===- Output.cpp - files and folders that appear whole or not at all -----===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Output.h"

#include "llvm/ADT/SmallString.h"
#include "llvm/Support/Path.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace path = llvm::sys::path;

namespace moec {

llvm::Error osError(llvm::StringRef where, llvm::StringRef expected, int error) {
  switch (error) {
  case ENOSPC:
  case EDQUOT:
    return makeError(ErrorCode::SPACE, where, expected, strerror(error),
                     "free some space or choose another folder");
  case EFBIG:
    return makeError(ErrorCode::SPACE, where, expected, strerror(error),
                     "raise the limit on file sizes (ulimit -f) or choose another file system");
  case ENOMEM:
    return makeError(ErrorCode::MEMORY, where, expected, strerror(error));
  default:
    return makeError(ErrorCode::IO, where, expected, strerror(error));
  }
}

//===----------------------------------------------------------------------===//
// StagedFile
//===----------------------------------------------------------------------===//

llvm::Expected<std::unique_ptr<StagedFile>> StagedFile::create(llvm::StringRef file,
                                                               llvm::StringRef shown) {
  std::string name = shown.empty() ? file.str() : shown.str();
  int fd = ::open(file.str().c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
  if (fd < 0)
    return osError(name, "a file that can be created", errno);
  return std::unique_ptr<StagedFile>(new StagedFile(fd, std::move(name)));
}

StagedFile::~StagedFile() {
  if (fd >= 0)
    ::close(fd);
}

llvm::Error StagedFile::failure(int error) const {
  return osError(shown, "all bytes to be written", error);
}

llvm::Error StagedFile::writeAt(const void *data, size_t size, uint64_t offset) {
  const char *bytes = static_cast<const char *>(data);
  while (size) {
    // The kernel moves at most 2 GiB - 4096 bytes a call.
    ssize_t n = ::pwrite(fd, bytes, std::min<size_t>(size, size_t(1) << 30), offset);
    if (n < 0) {
      if (errno == EINTR)
        continue;
      return failure(errno);
    }
    bytes += n;
    size -= n;
    offset += n;
  }
  return llvm::Error::success();
}

llvm::Error StagedFile::write(const void *data, size_t size) {
  if (llvm::Error error = writeAt(data, size, position))
    return error;
  position += size;
  return llvm::Error::success();
}

llvm::Error StagedFile::reserve(uint64_t size) {
  if (!size)
    return llvm::Error::success();
  if (::fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(size)) == 0)
    return llvm::Error::success();
  // A file system without fallocate finds out while writing.
  if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)
    return failure(errno);
  return llvm::Error::success();
}

llvm::Error StagedFile::close() {
  int file = fd;
  fd = -1;
  int error = ::fsync(file) ? errno : 0;
  // Some special files cannot be synchronised.
  if (error == EINVAL || error == EROFS)
    error = 0;
  if (::close(file) && !error)
    error = errno;
  return error ? failure(error) : llvm::Error::success();
}

llvm::Error writeFile(llvm::StringRef file, llvm::StringRef contents, llvm::StringRef shown) {
  auto out = StagedFile::create(file, shown);
  if (!out)
    return out.takeError();
  if (llvm::Error error = (*out)->write(contents.data(), contents.size()))
    return error;
  return (*out)->close();
}

llvm::Error replaceFile(llvm::StringRef file, llvm::StringRef contents) {
  struct stat info;
  if (::stat(file.str().c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    // A pipe or a device is written as it is.
    int fd = ::open(file.str().c_str(), O_WRONLY | O_CLOEXEC);
    if (fd < 0)
      return osError(file, "a file that can be written", errno);
    while (!contents.empty()) {
      ssize_t n = ::write(fd, contents.data(), contents.size());
      if (n < 0 && errno == EINTR)
        continue;
      if (n < 0) {
        int error = errno;
        ::close(fd);
        return osError(file, "all bytes to be written", error);
      }
      contents = contents.drop_front(n);
    }
    ::close(fd);
    return llvm::Error::success();
  }
  auto staged = StagedOutput::create(file, OutputKind::File, /*force=*/true);
  if (!staged)
    return staged.takeError();
  if (llvm::Error error = writeFile((*staged)->output(), contents, file))
    return error;
  return (*staged)->publish();
}

std::optional<uint64_t> freeSpace(llvm::StringRef file) {
  struct statvfs info;
  if (::statvfs(file.str().c_str(), &info))
    return std::nullopt;
  return uint64_t(info.f_bavail) * info.f_frsize;
}

//===----------------------------------------------------------------------===//
// StagedOutput
//===----------------------------------------------------------------------===//

static void removeAt(int parent, const char *name) {
  if (::unlinkat(parent, name, 0) == 0 || errno == ENOENT)
    return;
  int fd = ::openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0)
    return;
  if (DIR *dir = ::fdopendir(fd)) {
    std::vector<std::string> names;
    while (dirent *entry = ::readdir(dir))
      if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
        names.push_back(entry->d_name);
    for (const std::string &child : names)
      removeAt(fd, child.c_str());
    ::closedir(dir);
  } else {
    ::close(fd);
  }
  ::unlinkat(parent, name, AT_REMOVEDIR);
}

void removeTree(llvm::StringRef folder) { removeAt(AT_FDCWD, folder.str().c_str()); }

static bool syncFolder(const std::string &folder) {
  int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0)
    return false;
  bool ok = ::fsync(fd) == 0 || errno == EINVAL || errno == EROFS;
  ::close(fd);
  return ok;
}

static bool exists(const std::string &file) {
  struct stat info;
  return ::lstat(file.c_str(), &info) == 0;
}

static std::string joined(llvm::StringRef a, llvm::StringRef b) {
  llvm::SmallString<256> out(a);
  path::append(out, b);
  return std::string(out);
}

/// May `target` be replaced by something of this kind? Only what moec itself may have written: a
/// mistyped -o must never delete a folder of the user's.
static llvm::Error mayReplace(const std::string &target, OutputKind kind) {
  struct stat info;
  if (::stat(target.c_str(), &info))
    return llvm::Error::success(); // a dangling link
  if (kind == OutputKind::File) {
    if (S_ISREG(info.st_mode))
      return llvm::Error::success();
    return makeError(ErrorCode::EXISTS, target, "a regular file that can be replaced",
                     S_ISDIR(info.st_mode) ? "a folder" : "something else");
  }
  if (!S_ISDIR(info.st_mode))
    return makeError(ErrorCode::EXISTS, target, "a folder written by moec", "a file",
                     "remove it or choose another name");
  if (kind == OutputKind::Folder && exists(joined(target, "manifest.json")))
    return llvm::Error::success();
  bool foreign = false;
  if (DIR *dir = ::opendir(target.c_str())) {
    while (dirent *entry = ::readdir(dir)) {
      llvm::StringRef name = entry->d_name;
      if (name == "." || name == "..")
        continue;
      foreign |= kind != OutputKind::Weights || !name.ends_with(".safetensors");
    }
    ::closedir(dir);
  }
  if (foreign)
    return makeError(ErrorCode::EXISTS, target, "a folder written by moec",
                     kind == OutputKind::Weights ? "a folder with other files"
                                                 : "a folder without manifest.json",
                     "--force replaces only what moec wrote; choose another name");
  return llvm::Error::success();
}

llvm::Expected<std::unique_ptr<StagedOutput>> StagedOutput::create(llvm::StringRef wanted,
                                                                   OutputKind kind, bool force) {
  while (wanted.size() > 1 && wanted.ends_with("/"))
    wanted = wanted.drop_back();
  std::string target = wanted.str();
  std::string name = path::filename(wanted).str();
  std::string parent = path::parent_path(wanted).str();
  if (parent.empty())
    parent = ".";
  if (name.empty() || name == "." || name == ".." || name == "/")
    return makeError(ErrorCode::ARGUMENT, "-o", "the name of a file or folder to be made",
                     "`" + target + "`");

  struct stat info;
  if (::stat(parent.c_str(), &info))
    return osError(target, "an existing parent folder `" + parent + "`", errno);
  if (exists(target)) {
    // What --force would not replace is said before --force is named.
    if (llvm::Error error = mayReplace(target, kind))
      return std::move(error);
    if (!force)
      return makeError(ErrorCode::EXISTS, target, "a name that does not exist yet",
                       kind == OutputKind::File ? "a file" : "a folder", "--force replaces it");
  }

  // Left by a process that is dead: its lock can be taken. Held: somebody is writing right now.
  std::string prefix = "." + name + ".moec-tmp-";
  if (DIR *dir = ::opendir(parent.c_str())) {
    std::vector<std::string> leftovers;
    while (dirent *entry = ::readdir(dir))
      if (llvm::StringRef(entry->d_name).starts_with(prefix) &&
          strlen(entry->d_name) == prefix.size() + 6)
        leftovers.push_back(joined(parent, entry->d_name));
    ::closedir(dir);
    for (const std::string &leftover : leftovers) {
      int fd = ::open(leftover.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
      if (fd < 0)
        continue;
      bool held = ::flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK;
      if (!held)
        removeTree(leftover);
      ::close(fd);
      if (held)
        return makeError(ErrorCode::LOCKED, target, "no other process that writes it",
                         "a running one (its files are in `" + leftover + "`)",
                         "wait for it or choose another name");
    }
  }

  std::string temporary = joined(parent, prefix + "XXXXXX");
  if (!::mkdtemp(temporary.data()))
    return osError(target, "a folder `" + parent + "` that can be written to", errno);
  int lock = ::open(temporary.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock >= 0)
    (void)::flock(lock, LOCK_EX | LOCK_NB); // a file system without locks just goes without
  std::unique_ptr<StagedOutput> out(
      new StagedOutput(std::move(target), std::move(temporary), kind, force, lock));
  if (kind != OutputKind::File && ::mkdir(out->output().c_str(), 0777))
    return osError(out->target, "a folder that can be created", errno);
  return std::move(out);
}

StagedOutput::~StagedOutput() { discard(); }

void StagedOutput::discard() {
  if (temporary.empty())
    return;
  removeTree(temporary);
  if (lock >= 0)
    ::close(lock);
  lock = -1;
  temporary.clear();
}

static int renameat2(const std::string &from, const std::string &to, unsigned flags) {
  return static_cast<int>(
      ::syscall(SYS_renameat2, AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags));
}

llvm::Error StagedOutput::publish() {
  constexpr unsigned noReplace = 1, exchange = 2;
  std::string from = output();
  if (kind != OutputKind::File)
    syncFolder(from);
  if (kind == OutputKind::File && force) {
    if (::rename(from.c_str(), target.c_str()))
      return osError(target, "a file that can be put in place", errno);
  } else {
    int error = renameat2(from, target, noReplace) ? errno : 0;
    if (error == EEXIST && force) {
      // The old folder changes places with the new one, then goes with the temporary folder.
      error = renameat2(from, target, exchange) ? errno : 0;
      if (error == EINVAL || error == ENOSYS) {
        std::string old = temporary + "/old";
        error = ::rename(target.c_str(), old.c_str()) ? errno : 0;
        if (!error && ::rename(from.c_str(), target.c_str())) {
          error = errno;
          (void)::rename(old.c_str(), target.c_str());
        }
      }
    } else if (error == EINVAL || error == ENOSYS) { // no flags on this file system
      error = exists(target) ? EEXIST : ::rename(from.c_str(), target.c_str()) ? errno : 0;
    }
    if (error == EEXIST)
      return makeError(ErrorCode::EXISTS, target, "a name that does not exist yet",
                       "one that appeared meanwhile", "--force replaces it");
    if (error)
      return osError(target, "a name that can be put in place", error);
  }
  llvm::StringRef parent = path::parent_path(target);
  syncFolder(parent.empty() ? "." : parent.str());
  discard();
  return llvm::Error::success();
}

} // namespace moec
