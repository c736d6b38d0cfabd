//===- Files.cpp - files of model folders ---------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Support/Files.h"

#include "llvm/ADT/ScopeExit.h"
#include "llvm/Support/FormatVariadic.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace moec {

llvm::Error systemError(const llvm::Twine &where, const llvm::Twine &action, int errnoValue) {
  ErrorCode code = ErrorCode::IO;
  if (errnoValue == ENOSPC || errnoValue == EDQUOT)
    code = ErrorCode::SPACE;
  else if (errnoValue == ENOMEM)
    code = ErrorCode::MEMORY;
  else if (errnoValue == EEXIST || errnoValue == ENOTEMPTY)
    code = ErrorCode::EXISTS;
  return makeError(code, where, "to " + action, std::strerror(errnoValue));
}

llvm::Error checkPlainName(llvm::StringRef member, const llvm::Twine &where) {
  if (!member.empty() && member != "." && member != ".." && member.size() <= NAME_MAX &&
      member.find_first_of(llvm::StringRef("/\0", 2)) == llvm::StringRef::npos)
    return llvm::Error::success();
  return makeError(ErrorCode::PATH, where, "the plain name of a file in this folder",
                   "`" + llvm::json::fixUTF8(member.take_front(200)) + "`");
}

//===----------------------------------------------------------------------===//
// Reading
//===----------------------------------------------------------------------===//

llvm::Expected<std::unique_ptr<InputFile>> InputFile::adopt(int fd, std::string name) {
  struct stat info;
  if (::fstat(fd, &info) != 0) {
    int error = errno;
    ::close(fd);
    return systemError(name, "read the file's size", error);
  }
  if (!S_ISREG(info.st_mode)) {
    ::close(fd);
    return makeError(ErrorCode::PATH, name, "a regular file",
                     S_ISDIR(info.st_mode) ? "a folder" : "a device, pipe or socket");
  }
  return std::unique_ptr<InputFile>(
      new InputFile(fd, std::move(name), static_cast<uint64_t>(info.st_size)));
}

llvm::Expected<std::unique_ptr<InputFile>> InputFile::open(llvm::StringRef path) {
  std::string name = path.str();
  // O_NONBLOCK: opening a pipe must not wait for its other end.
  int fd = ::open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0)
    return systemError(name, "open the file", errno);
  return adopt(fd, std::move(name));
}

InputFile::~InputFile() { ::close(fd); }

llvm::Error InputFile::readAt(uint64_t offset, llvm::MutableArrayRef<char> out) const {
  size_t done = 0;
  while (done < out.size()) {
    size_t step = std::min<size_t>(out.size() - done, size_t(1) << 30);
    ssize_t n = ::pread(fd, out.data() + done, step, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      return systemError(name, "read the file", errno);
    if (n == 0)
      return makeError(ErrorCode::FILE_FORMAT, name,
                       llvm::formatv("{0} bytes from offset {1}", out.size(), offset).str(),
                       llvm::formatv("the end of the file after {0}", done).str(),
                       "the file was truncated");
    done += static_cast<size_t>(n);
  }
  return llvm::Error::success();
}

llvm::Expected<std::string> InputFile::readAll(uint64_t most) const {
  if (bytes > most)
    return makeError(ErrorCode::FILE_FORMAT, name, llvm::formatv("at most {0} bytes", most).str(),
                     llvm::formatv("{0}", bytes).str());
  std::string text(bytes, '\0');
  if (llvm::Error error = readAt(0, llvm::MutableArrayRef<char>(text.data(), text.size())))
    return error;
  return text;
}

void InputFile::willNeed(uint64_t offset, uint64_t length) const {
  (void)::posix_fadvise(fd, static_cast<off_t>(offset), static_cast<off_t>(length),
                        POSIX_FADV_WILLNEED);
}

void InputFile::dontNeed(uint64_t offset, uint64_t length) const {
  (void)::posix_fadvise(fd, static_cast<off_t>(offset), static_cast<off_t>(length),
                        POSIX_FADV_DONTNEED);
}

namespace {

/// Where an open descriptor really is, as the kernel names it.
std::string pathOfDescriptor(int fd) {
  std::string link = "/proc/self/fd/" + std::to_string(fd);
  std::string out(PATH_MAX, '\0');
  ssize_t n = ::readlink(link.c_str(), out.data(), out.size());
  out.resize(n > 0 ? static_cast<size_t>(n) : 0);
  return out;
}

bool isBelow(llvm::StringRef path, llvm::StringRef folder) {
  return path.size() > folder.size() && path.starts_with(folder) &&
         (folder.ends_with("/") || path[folder.size()] == '/');
}

/// "<repo>/blobs" of a Hugging Face cache snapshot "<repo>/snapshots/<revision>[/…]", or "".
std::string blobsOf(llvm::StringRef folder) {
  size_t at = (folder + "/").str().rfind("/snapshots/");
  return at == std::string::npos ? "" : (folder.take_front(at) + "/blobs").str();
}

} // namespace

llvm::Expected<std::unique_ptr<InputFolder>> InputFolder::open(llvm::StringRef path,
                                                               bool followLinks) {
  std::string name = path.str();
  int fd = ::open(name.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY);
  if (fd < 0)
    return systemError(name, "open the folder", errno);
  std::string canonical = pathOfDescriptor(fd);
  while (name.size() > 1 && name.back() == '/')
    name.pop_back();
  return std::unique_ptr<InputFolder>(
      new InputFolder(fd, std::move(name), std::move(canonical), followLinks));
}

InputFolder::~InputFolder() { ::close(fd); }

bool InputFolder::has(llvm::StringRef member) const {
  if (llvm::Error error = checkPlainName(member, name)) {
    llvm::consumeError(std::move(error));
    return false;
  }
  struct stat info;
  return ::fstatat(fd, member.str().c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0;
}

std::vector<std::string> InputFolder::members() const {
  std::vector<std::string> out;
  int copy = ::openat(fd, ".", O_RDONLY | O_CLOEXEC | O_DIRECTORY);
  DIR *dir = copy < 0 ? nullptr : ::fdopendir(copy);
  if (!dir) {
    if (copy >= 0)
      ::close(copy);
    return out;
  }
  while (dirent *entry = ::readdir(dir)) {
    llvm::StringRef member = entry->d_name;
    if (member != "." && member != "..")
      out.push_back(member.str());
  }
  ::closedir(dir);
  std::sort(out.begin(), out.end());
  return out;
}

std::string InputFolder::snapshotHint() const {
  if (!has("snapshots"))
    return "";
  std::string snapshots = name + "/snapshots";
  std::vector<std::string> revisions;
  if (auto folder = open(snapshots))
    revisions = (*folder)->members();
  else
    llvm::consumeError(folder.takeError());
  // What a download without a revision is.
  auto main = InputFile::open(name + "/refs/main");
  auto text = main ? (*main)->readAll(1000) : llvm::Expected<std::string>(main.takeError());
  if (!text)
    llvm::consumeError(text.takeError());
  else if (std::string revision = llvm::StringRef(*text).trim().str();
           llvm::is_contained(revisions, revision))
    revisions = {revision};
  if (revisions.empty())
    return "a repository of a Hugging Face cache without a snapshot: its download is not complete";
  for (std::string &revision : revisions)
    revision = snapshots + "/" + revision;
  return "a repository of a Hugging Face cache; the model is in " + quoteList(revisions, "or");
}

llvm::Expected<std::unique_ptr<InputFile>> InputFolder::openMember(llvm::StringRef member) const {
  if (llvm::Error error = checkPlainName(member, name))
    return error;
  std::string file = name + "/" + member.str();
  auto missing = [&](int error) -> llvm::Error {
    if (error != ENOENT)
      return systemError(file, "open the file", error);
    std::vector<std::string> near = nearestNames(member, members());
    return makeError(ErrorCode::IO, file, "a file", "none of this name",
                     near.empty() ? "" : "the folder has " + quoteList(near));
  };
  // O_PATH has no side effects, so the object can be looked at before anything is done with it.
  int look = ::openat(fd, member.str().c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC);
  if (look < 0)
    return missing(errno);
  struct stat info;
  bool link = ::fstat(look, &info) == 0 && S_ISLNK(info.st_mode);
  if (link) {
    ::close(look);
    look = ::openat(fd, member.str().c_str(), O_PATH | O_CLOEXEC);
    if (look < 0)
      return errno == ENOENT
                 ? makeError(ErrorCode::PATH, file, "a link to a file", "a link that leads nowhere")
                 : missing(errno);
  }
  llvm::scope_exit closeLook([&] { ::close(look); });
  if (::fstat(look, &info) != 0)
    return systemError(file, "look at the file", errno);
  if (!S_ISREG(info.st_mode))
    return makeError(ErrorCode::PATH, file, "a regular file",
                     S_ISDIR(info.st_mode) ? "a folder" : "a device, pipe or socket");
  if (link && !followLinks) {
    std::string target = pathOfDescriptor(look), blobs = blobsOf(canonical);
    if (target.empty() || canonical.empty() ||
        !(isBelow(target, canonical) || (!blobs.empty() && isBelow(target, blobs))))
      return makeError(ErrorCode::PATH, file, "a link that stays inside the model folder",
                       "one to `" + target + "`", "--follow-links accepts it");
  }
  // The checked object itself is opened, not its name a second time.
  int opened = ::open(("/proc/self/fd/" + std::to_string(look)).c_str(), O_RDONLY | O_CLOEXEC);
  if (opened < 0)
    return systemError(file, "open the file", errno);
  return InputFile::adopt(opened, file);
}

} // namespace moec
