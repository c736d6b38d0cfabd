//===- Ptxas.cpp - machine code of a GPU ----------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Ptxas.h"

#include "moe/Export/Output.h"
#include "moe/Support/Error.h"

#include "llvm/ADT/ScopeExit.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/MemoryBuffer.h"
#include "llvm/Support/Program.h"

#include <cstdlib>

namespace moec {

llvm::Expected<std::string> findPtxas() {
  bool named = false;
  for (const char *variable : {"CUDA_ROOT", "CUDA_HOME", "CUDA_PATH"})
    if (const char *root = ::getenv(variable)) {
      named = true;
      std::string path = std::string(root) + "/bin/ptxas";
      if (llvm::sys::fs::can_execute(path))
        return path;
    }
  if (auto path = llvm::sys::findProgramByName("ptxas"))
    return *path;
  std::string path = "/usr/local/cuda/bin/ptxas";
  if (!named && llvm::sys::fs::can_execute(path))
    return path;
  return makeError(ErrorCode::TARGET, "--target cuda",
                   "ptxas, the assembler of the CUDA toolkit, in CUDA_HOME/bin, on PATH or in "
                   "/usr/local/cuda/bin",
                   "none", "install the toolkit (no GPU is needed), or set CUDA_HOME");
}

/// The text of a file, or nothing.
static std::string contents(const std::string &path) {
  auto file = llvm::MemoryBuffer::getFile(path, /*IsText=*/false,
                                          /*RequiresNullTerminator=*/false);
  return file ? (*file)->getBuffer().str() : std::string();
}

llvm::Expected<std::string> assemble(llvm::StringRef ptx, llvm::StringRef arch,
                                     llvm::StringRef scratch) {
  auto program = findPtxas();
  if (!program)
    return program.takeError();
  std::string input = (scratch + "/kernels.ptx").str(), output = (scratch + "/kernels.cubin").str();
  std::string log = (scratch + "/ptxas.log").str();
  llvm::scope_exit remove([&] {
    for (const std::string &file : {input, output, log})
      llvm::sys::fs::remove(file);
  });
  if (llvm::Error error = writeFile(input, ptx, "kernels.ptx"))
    return std::move(error);
  std::string option = ("-arch=" + arch).str();
  llvm::StringRef arguments[] = {*program, option, "-O3", input, "-o", output};
  std::optional<llvm::StringRef> streams[] = {llvm::StringRef(""), llvm::StringRef(log),
                                              llvm::StringRef(log)};
  std::string failure;
  int status = llvm::sys::ExecuteAndWait(*program, arguments, std::nullopt, streams,
                                         /*SecondsToWait=*/600, /*MemoryLimit=*/0, &failure);
  std::string text = llvm::StringRef(contents(log)).trim().str();
  if (status < 0)
    return makeError(ErrorCode::TARGET, *program, "a program that runs",
                     failure.empty() ? text : failure);
  if (status && llvm::StringRef(text).contains("gpu-name"))
    return makeError(ErrorCode::TARGET, *program, "a toolkit that knows `" + arch + "`", text,
                     "install a CUDA toolkit of version 11.8 or later");
  if (status)
    return makeError(ErrorCode::INTERNAL, *program, "kernels that assemble for `" + arch + "`",
                     text);
  std::string cubin = contents(output);
  if (cubin.empty())
    return makeError(ErrorCode::IO, *program, "a cubin", "an empty file");
  return cubin;
}

} // namespace moec
