//===- Link.cpp - from one object to a library ----------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Link.h"

#include "moe/Export/Output.h"
#include "moe/Support/Error.h"

#include "lld/Common/Driver.h"
#include "llvm/Object/ArchiveWriter.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/MemoryBuffer.h"
#include "llvm/Support/raw_ostream.h"

LLD_HAS_DRIVER(elf)

namespace moec {

/// LLD maps its output, where a full disk is a signal (SIGBUS) and no error: so the room is taken
/// first, given back, and then used.
static llvm::Error findRoom(llvm::ArrayRef<std::string> objects, llvm::StringRef scratch,
                            llvm::StringRef shown) {
  uint64_t bytes = 0;
  for (const std::string &object : objects) {
    uint64_t size = 0;
    if (std::error_code error = llvm::sys::fs::file_size(object, size))
      return osError(object, "the object file", error.value());
    bytes += size;
  }
  std::string room = (scratch + "/room").str();
  auto file = StagedFile::create(room, shown);
  if (!file)
    return file.takeError();
  llvm::Error error = (*file)->reserve(bytes + (64u << 10)); // headers, tables and padding
  llvm::sys::fs::remove(room);
  return error;
}

llvm::Error linkShared(llvm::ArrayRef<std::string> objects, llvm::StringRef library,
                       llvm::StringRef soname, llvm::StringRef exported, llvm::StringRef scratch) {
  std::string script = (scratch + "/exports.map").str();
  if (llvm::Error error =
          writeFile(script, ("{ global: " + exported + "; local: *; };\n").str(), "exports.map"))
    return error;
  if (llvm::Error error = findRoom(objects, scratch, soname))
    return error;
  std::string sonameOption = ("-soname=" + soname).str();
  std::string scriptOption = "--version-script=" + script;
  std::string output = library.str();
  std::vector<const char *> arguments = {
      "ld.lld",
      "-shared",
      "-m",
      "elf_x86_64",
      "--build-id=none",  // equal inputs, equal bytes
      "--hash-style=gnu", //
      "-z",
      "relro",
      "-z",
      "now", // nothing is resolved during a call
      "-z",
      "noexecstack",
      "--gc-sections",
      "--threads=1",
      sonameOption.c_str(),
      scriptOption.c_str(),
      "-o",
      output.c_str(),
  };
  for (const std::string &object : objects)
    arguments.push_back(object.c_str());
  std::string out, err;
  llvm::raw_string_ostream outStream(out), errStream(err);
  lld::Result result = lld::lldMain(arguments, outStream, errStream, {{lld::Gnu, &lld::elf::link}});
  llvm::sys::fs::remove(script);
  if (result.retCode == 0)
    return llvm::Error::success();
  llvm::StringRef text = llvm::StringRef(err).trim();
  if (text.contains("No space left") || text.contains("quota exceeded") ||
      text.contains("File too large"))
    return makeError(ErrorCode::SPACE, soname, "room for the library", "no space left on the disk",
                     "free some space or choose another folder");
  return makeError(ErrorCode::INTERNAL, soname, "an object that links", text);
}

llvm::Error writeArchive(llvm::StringRef object, llvm::StringRef archive, llvm::StringRef member) {
  auto buffer = llvm::MemoryBuffer::getFile(object);
  if (!buffer)
    return osError(archive, "the object file", buffer.getError().value());
  llvm::NewArchiveMember entry((*buffer)->getMemBufferRef());
  entry.MemberName = member;
  std::vector<llvm::NewArchiveMember> members;
  members.push_back(std::move(entry));
  auto bytes = llvm::writeArchiveToBuffer(members, llvm::SymtabWritingMode::NormalSymtab,
                                          llvm::object::Archive::K_GNU, /*Deterministic=*/true,
                                          /*Thin=*/false);
  if (!bytes)
    return bytes.takeError();
  return writeFile(archive, (*bytes)->getBuffer());
}

} // namespace moec
