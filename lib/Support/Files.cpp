//===- Files.cpp - files of model folders, and output folders -------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Support/Files.h"

#include "llvm/ADT/ScopeExit.h"
#include "llvm/Support/FormatVariadic.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
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
  size_t at = (folder + "/").str().find("/snapshots/");
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

//===----------------------------------------------------------------------===//
// Writing
//===----------------------------------------------------------------------===//

llvm::Expected<std::unique_ptr<OutputFile>> OutputFile::create(llvm::StringRef path) {
  std::string name = path.str();
  int fd = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0)
    return systemError(name, "create the file", errno);
  return std::unique_ptr<OutputFile>(new OutputFile(fd, std::move(name)));
}

OutputFile::~OutputFile() {
  if (fd >= 0)
    ::close(fd);
}

llvm::Error OutputFile::writeBytes(llvm::ArrayRef<char> data) {
  llvm::Error error = writeAt(position, data);
  if (!error)
    position += data.size();
  return error;
}

llvm::Error OutputFile::writeAt(uint64_t offset, llvm::ArrayRef<char> data) {
  size_t done = 0;
  while (done < data.size()) {
    size_t step = std::min<size_t>(data.size() - done, size_t(1) << 30);
    ssize_t n = ::pwrite(fd, data.data() + done, step, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return systemError(name, "write the file", n < 0 ? errno : ENOSPC);
    done += static_cast<size_t>(n);
  }
  return llvm::Error::success();
}

llvm::Error OutputFile::close() {
  int error = ::fsync(fd) != 0 ? errno : 0;
  if (error == EINVAL || error == EROFS) // a device or a pipe cannot be synced
    error = 0;
  if (::close(fd) != 0 && !error)
    error = errno;
  fd = -1;
  return error ? systemError(name, "write the file", error) : llvm::Error::success();
}

namespace {

/// Removes a tree with system calls alone: this also runs in a signal handler.
bool removeTree(int parent, const char *name, int depth = 0) {
  if (::unlinkat(parent, name, 0) == 0 || errno == ENOENT)
    return true;
  if (depth > 16)
    return false;
  int fd = ::openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0)
    return false;
  struct Entry {
    ino64_t inode;
    off64_t offset;
    unsigned short length;
    unsigned char type;
    char name[1];
  };
  // A pass over a folder that changes may miss entries, so passes go on while they remove any.
  for (bool removed = true; removed;) {
    removed = false;
    ::lseek(fd, 0, SEEK_SET);
    alignas(8) char buffer[2048];
    long n;
    while ((n = ::syscall(SYS_getdents64, fd, buffer, sizeof buffer)) > 0) {
      for (long at = 0; at < n;) {
        auto *entry = reinterpret_cast<Entry *>(buffer + at);
        at += entry->length;
        const char *child = entry->name;
        if (child[0] == '.' && (!child[1] || (child[1] == '.' && !child[2])))
          continue;
        removed |= removeTree(fd, child, depth + 1);
      }
    }
  }
  ::close(fd);
  return ::unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT;
}

/// Unpublished folders of this process, for the signal handler.
struct Slot {
  std::atomic<pid_t> owner{0};
  char path[PATH_MAX];
};
constexpr int slotCount = 16;
Slot slots[slotCount];

void cleanUpAndExit(int signal) {
  for (int pass = 0; pass < 100; ++pass) { // other threads may still be adding files
    bool done = true;
    for (Slot &slot : slots)
      if (slot.owner.load() == ::getpid())
        done &= removeTree(AT_FDCWD, slot.path);
    if (done)
      break;
  }
  ::_exit(128 + signal);
}

/// Target split into its folder and its name.
struct Target {
  std::string parent, name;
  std::string sibling(llvm::StringRef other) const {
    return parent == "/" ? "/" + other.str() : parent + "/" + other.str();
  }
};

llvm::Expected<Target> splitTarget(llvm::StringRef target) {
  llvm::StringRef path = target;
  while (path.size() > 1 && path.ends_with("/"))
    path = path.drop_back();
  size_t slash = path.rfind('/');
  Target out;
  out.name = (slash == llvm::StringRef::npos ? path : path.substr(slash + 1)).str();
  out.parent = slash == llvm::StringRef::npos ? "."
               : slash == 0                   ? "/"
                                              : path.take_front(slash).str();
  if (out.name.empty() || out.name == "." || out.name == ".." || out.name.size() > 200 ||
      path.contains('\0'))
    return makeError(ErrorCode::PATH, target, "the name of a new file or folder",
                     "`" + out.name + "`");
  return out;
}

/// Whether --force may replace `path`: an empty folder, or one that moec wrote.
bool isOurs(const std::string &path) {
  llvm::Expected<std::unique_ptr<InputFolder>> folder = InputFolder::open(path);
  if (!folder) {
    llvm::consumeError(folder.takeError());
    return false;
  }
  std::vector<std::string> members = (*folder)->members();
  if (std::find(members.begin(), members.end(), "manifest.json") != members.end())
    return true;
  return std::all_of(members.begin(), members.end(), [](const std::string &member) {
    return llvm::StringRef(member).ends_with(".safetensors");
  });
}

int renameFlags(const std::string &from, const std::string &to, unsigned flags) {
  return ::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags) == 0 ? 0 : errno;
}

/// Flushes a file or a folder by name.
int syncPath(const std::string &path, int flags) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | flags);
  if (fd < 0)
    return errno;
  int error = ::fsync(fd) != 0 ? errno : 0;
  ::close(fd);
  return error == EINVAL ? 0 : error;
}

int syncTree(const std::string &path) {
  DIR *dir = ::opendir(path.c_str());
  if (!dir)
    return errno;
  int error = 0;
  while (dirent *entry = ::readdir(dir)) {
    llvm::StringRef member = entry->d_name;
    if (member == "." || member == "..")
      continue;
    std::string child = path + "/" + member.str();
    struct stat info;
    if (::lstat(child.c_str(), &info) != 0)
      continue;
    int result = S_ISDIR(info.st_mode)   ? syncTree(child)
                 : S_ISREG(info.st_mode) ? syncPath(child, 0)
                                         : 0;
    if (result && !error)
      error = result;
  }
  ::closedir(dir);
  int result = syncPath(path, O_DIRECTORY);
  return error ? error : result;
}

} // namespace

void installSignalCleanup() {
  struct sigaction action = {};
  action.sa_handler = cleanUpAndExit;
  sigemptyset(&action.sa_mask);
  for (int signal : {SIGINT, SIGTERM, SIGHUP})
    sigaddset(&action.sa_mask, signal);
  for (int signal : {SIGINT, SIGTERM, SIGHUP})
    ::sigaction(signal, &action, nullptr);
}

llvm::Expected<std::unique_ptr<OutputFolder>> OutputFolder::create(llvm::StringRef target,
                                                                   bool force) {
  llvm::Expected<Target> split = splitTarget(target);
  if (!split)
    return split.takeError();
  std::string destination = split->sibling(split->name);
  struct stat info;
  if (::lstat(destination.c_str(), &info) == 0) {
    if (!force)
      return makeError(ErrorCode::EXISTS, target, "a name that is free", "one that exists",
                       "--force replaces it");
    if (!isOurs(destination))
      return makeError(ErrorCode::EXISTS, target, "a folder that moec wrote", "another one",
                       "remove it yourself, or choose another name");
  }
  struct stat parentInfo;
  if (::stat(split->parent.c_str(), &parentInfo) != 0 || !S_ISDIR(parentInfo.st_mode))
    return makeError(ErrorCode::IO, target, "an existing folder to write in",
                     "`" + split->parent + "`, which is none");

  // Leftovers of dead processes go; a live writer holds a lock on its temporary folder.
  std::string prefix = "." + split->name + ".tmp-";
  if (llvm::Expected<std::unique_ptr<InputFolder>> parent = InputFolder::open(split->parent)) {
    for (const std::string &member : (*parent)->members()) {
      if (!llvm::StringRef(member).starts_with(prefix))
        continue;
      std::string stale = split->sibling(member);
      int fd = ::open(stale.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
      if (fd < 0)
        continue;
      bool held = ::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
      if (!held)
        removeTree(AT_FDCWD, stale.c_str());
      ::close(fd);
      if (held)
        return makeError(ErrorCode::LOCKED, target, "to be the only process that writes it",
                         "another one that holds `" + member + "`", "wait for it, or stop it");
    }
  } else {
    return parent.takeError();
  }

  for (int attempt = 0; attempt < 8; ++attempt) {
    std::string temporary = split->sibling(prefix + std::to_string(::getpid()) +
                                           (attempt ? "-" + std::to_string(attempt) : ""));
    if (temporary.size() >= PATH_MAX)
      return makeError(ErrorCode::PATH, target, "a shorter path", temporary);
    if (::mkdir(temporary.c_str(), 0777) != 0) {
      if (errno == EEXIST)
        continue;
      return systemError(temporary, "create the folder", errno);
    }
    int fd = ::open(temporary.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
      continue; // taken for a leftover before it was locked
    struct stat ours, now;
    // A file system without locks still works: only the protection against a second writer is
    // missing there.
    bool lost = (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) ||
                ::fstat(fd, &ours) != 0 || ::lstat(temporary.c_str(), &now) != 0 ||
                ours.st_ino != now.st_ino;
    if (lost) {
      ::close(fd);
      continue;
    }
    std::unique_ptr<OutputFolder> out(
        new OutputFolder(std::move(destination), std::move(temporary), fd, force));
    for (int i = 0; i < slotCount && out->slot < 0; ++i) {
      pid_t free = 0;
      if (!slots[i].owner.compare_exchange_strong(free, -1))
        continue;
      std::strcpy(slots[i].path, out->temporary.c_str());
      slots[i].owner.store(::getpid());
      out->slot = i;
    }
    return out;
  }
  return makeError(ErrorCode::LOCKED, target, "to create a temporary folder",
                   "names that others took first");
}

OutputFolder::~OutputFolder() { discard(); }

void OutputFolder::discard() {
  if (slot >= 0 && slots[slot].owner.load() != ::getpid())
    return; // a forked child; the folder is its parent's
  if (!published)
    removeTree(AT_FDCWD, temporary.c_str());
  if (slot >= 0)
    slots[slot].owner.store(0);
  slot = -1;
  if (lockFd >= 0)
    ::close(lockFd);
  lockFd = -1;
}

llvm::Error OutputFolder::publish() {
  if (int error = syncTree(temporary))
    return systemError(temporary, "flush the folder to the disk", error);
  struct stat info;
  int error;
  if (force && ::lstat(destination.c_str(), &info) == 0) {
    error = renameFlags(temporary, destination, RENAME_EXCHANGE);
    if (error == EINVAL || error == ENOSYS) { // not every file system can exchange
      std::string old = temporary + "-old";
      error = renameFlags(destination, old, 0);
      if (!error)
        error = renameFlags(temporary, destination, 0);
      if (!error)
        removeTree(AT_FDCWD, old.c_str());
    } else if (!error) {
      removeTree(AT_FDCWD, temporary.c_str()); // now the old content
    }
  } else {
    error = renameFlags(temporary, destination, RENAME_NOREPLACE);
    if (error == EINVAL || error == ENOSYS)
      error = ::lstat(destination.c_str(), &info) == 0 ? EEXIST
                                                       : renameFlags(temporary, destination, 0);
  }
  if (error == EEXIST || error == ENOTEMPTY)
    return makeError(ErrorCode::EXISTS, destination, "a name that is free",
                     "one that appeared meanwhile", "--force replaces it");
  if (error)
    return systemError(destination, "publish the folder", error);
  published = true;
  size_t slash = destination.rfind('/');
  if (int result = syncPath(slash == 0 ? "/" : destination.substr(0, slash), O_DIRECTORY))
    return systemError(destination, "flush its folder to the disk", result);
  discard();
  return llvm::Error::success();
}

llvm::Error checkFreeSpace(llvm::StringRef path, uint64_t bytes) {
  std::string at = path.str();
  struct statvfs info;
  while (::statvfs(at.c_str(), &info) != 0) {
    size_t slash = at.rfind('/');
    if (slash == std::string::npos)
      at = at == "." ? "/" : ".";
    else if (at == "/")
      return systemError(path, "read the free space", errno);
    else
      at = slash == 0 ? "/" : at.substr(0, slash);
  }
  uint64_t free = uint64_t(info.f_bavail) * info.f_frsize;
  if (free >= bytes)
    return llvm::Error::success();
  return makeError(ErrorCode::SPACE, path, llvm::formatv("{0} bytes free", bytes).str(),
                   llvm::formatv("{0}", free).str());
}

llvm::Error writeFileAtomically(llvm::StringRef path, llvm::StringRef text) {
  llvm::Expected<Target> split = splitTarget(path);
  if (!split)
    return split.takeError();
  std::string temporary = split->sibling("." + split->name + ".tmp-" + std::to_string(::getpid()));
  ::unlink(temporary.c_str());
  llvm::scope_exit remove([&] { ::unlink(temporary.c_str()); });
  llvm::Expected<std::unique_ptr<OutputFile>> file = OutputFile::create(temporary);
  if (!file)
    return file.takeError();
  if (llvm::Error error = (*file)->write(text))
    return error;
  if (llvm::Error error = (*file)->close())
    return error;
  if (int error = renameFlags(temporary, split->sibling(split->name), 0))
    return systemError(path, "write the file", error);
  remove.release();
  return llvm::Error::success();
}

} // namespace moec
