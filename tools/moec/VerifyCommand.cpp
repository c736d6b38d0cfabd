//===- VerifyCommand.cpp - moec verify ------------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The comparison is the Python module moec.verify, which shares no code with
// the compiler; this process becomes it.
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "Log.h"

#include "moe/Support/Error.h"

#include "llvm/Support/FileSystem.h"
#include "llvm/Support/Path.h"

#include <cerrno>
#include <cstdlib>
#include <unistd.h>

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string> dirOption(cl::Positional, cl::Required, cl::desc("DIR"),
                                      cl::value_desc("DIR"), cl::sub(verifyParser()));
static cl::opt<std::string>
    againstOption("against", cl::Required,
                  cl::desc("What it was compiled from, or a function of a Python module"),
                  cl::value_desc("CHECKPOINT|MODULE:FUNCTION"), cl::cat(category()),
                  cl::sub(verifyParser()));
static cl::opt<std::string> layersOption("layers", cl::desc("Numbers of decoder layers"),
                                         cl::value_desc("all|0,3-5"), cl::cat(category()),
                                         cl::sub(verifyParser()));
static cl::opt<std::string> tokensOption("tokens", cl::desc("Tokens of a test (default 64)"),
                                         cl::value_desc("T"), cl::cat(category()),
                                         cl::sub(verifyParser()));
static cl::opt<std::string> seedOption("seed", cl::desc("Seed of the tokens (default 0)"),
                                       cl::value_desc("S"), cl::cat(category()),
                                       cl::sub(verifyParser()));
static cl::opt<std::string> weightsOption("weights", cl::desc("Another folder of packed weights"),
                                          cl::value_desc("WEIGHTS"), cl::cat(category()),
                                          cl::sub(verifyParser()));
static cl::opt<std::string> threadsOption("threads", cl::desc("Threads of the library"),
                                          cl::value_desc("N"), cl::cat(category()),
                                          cl::sub(verifyParser()));
static cl::opt<bool> noTransformersOption("no-transformers",
                                          cl::desc("Do not ask transformers, even if installed"),
                                          cl::cat(category()), cl::sub(verifyParser()));
static cl::opt<std::string> formOption("o", cl::desc("Form of the table (default md)"),
                                       cl::value_desc("md|json"), cl::cat(category()),
                                       cl::sub(verifyParser()));

/// Finds the module, or says in the form of our errors what is missing.
static const char bootstrap[] = R"(import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    from moec.verify import main
except ImportError as e:
    print("E-IO: moec verify: expected the Python package moec and NumPy in " + sys.executable
          + ", but got: " + str(e) + "; name another interpreter in MOEC_PYTHON", file=sys.stderr)
    sys.exit(5)
sys.exit(main())
)";

/// The folder that holds the package `moec` if this driver is part of one: moec/bin/moec.
static std::string packageRoot() {
  std::string self = llvm::sys::fs::getMainExecutable(
      nullptr, reinterpret_cast<void *>(reinterpret_cast<intptr_t>(&packageRoot)));
  llvm::StringRef prefix = llvm::sys::path::parent_path(llvm::sys::path::parent_path(self));
  for (llvm::StringRef below : {"", "python/moec"}) { // installed, in a build tree
    llvm::SmallString<256> package(prefix);
    llvm::sys::path::append(package, below);
    llvm::SmallString<256> init(package);
    llvm::sys::path::append(init, "__init__.py");
    if (llvm::sys::fs::exists(init))
      return llvm::sys::path::parent_path(below.empty() ? prefix : llvm::StringRef(package)).str();
  }
  return "";
}

static llvm::Error work() {
  const char *named = std::getenv("MOEC_PYTHON");
  std::string python = named && *named ? named : "python3";
  std::vector<std::string> arguments = {python,    "-c",        bootstrap,
                                        dirOption, "--against", againstOption};
  // The driver has checked the names of the options; values are Python's to judge.
  for (const cl::opt<std::string> *option :
       {&layersOption, &tokensOption, &seedOption, &weightsOption, &threadsOption})
    if (option->getNumOccurrences())
      arguments.push_back("--" + option->ArgStr.str() + "=" + option->getValue());
  if (formOption.getNumOccurrences())
    arguments.insert(arguments.end(), {"-o", formOption});
  if (noTransformersOption)
    arguments.push_back("--no-transformers");
  if (followLinks())
    arguments.push_back("--follow-links");
  for (const std::string &rows : modelRows())
    arguments.push_back("--model-rows=" + rows);
  if (Log::get().quiet)
    arguments.push_back("--quiet");
  if (Log::get().json)
    arguments.push_back("--log=json");

  std::string root = packageRoot();
  if (!root.empty()) {
    const char *before = std::getenv("PYTHONPATH");
    setenv("PYTHONPATH", (before && *before ? std::string(before) + ":" + root : root).c_str(), 1);
  }
  std::vector<char *> argv;
  for (std::string &argument : arguments)
    argv.push_back(argument.data());
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  return makeError(ErrorCode::IO, "moec verify", "a Python interpreter named `" + python + "`",
                   std::strerror(errno), "name one in MOEC_PYTHON");
}

const Command verifyCommand = {
    "verify", "DIR --against CHECKPOINT|MODULE:FUNCTION",
    "Compare every layer with a reference in float64, and with transformers where it is installed.",
    verifyParser, [] { return Log::get().report(work()); }};

} // namespace moec::tool
