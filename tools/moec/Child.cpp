//===- Child.cpp - the compiler works in a child process ------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// The parent makes the stage folder, waits, and publishes or removes it. So
// nothing the child does, dying included, leaves a half-written output.
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "Log.h"

#include "moe/Export/Module.h"
#include "moe/Export/Output.h"

#include "llvm/Support/ErrorHandling.h"
#include "llvm/Support/FileSystem.h"
#include "llvm/Support/MemoryBuffer.h"
#include "llvm/Support/Path.h"
#include "llvm/Support/Signals.h"
#include "llvm/Support/raw_ostream.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

namespace moec::tool {

//===----------------------------------------------------------------------===//
// In the child
//===----------------------------------------------------------------------===//

/// Everything to keep goes under <stage>/crash, which is there from the start: a handler in a
/// process out of memory should not have to make folders.
static std::string crashFile(llvm::StringRef name) {
  // Never destroyed: a process can crash while it exits.
  static const std::string &folder = *new std::string(stageFolder + "/crash/");
  return folder + name.str();
}

void noteForCrash(llvm::StringRef name, llvm::StringRef contents) {
  if (stageFolder.empty())
    return;
  std::error_code error;
  llvm::raw_fd_ostream out(crashFile(name), error);
  if (!error)
    out << contents;
  out.close();
  out.clear_error(); // it is only a note
}

static void writeBacktrace(void *) {
  std::error_code error;
  llvm::raw_fd_ostream out(crashFile("backtrace.txt"), error);
  if (!error)
    llvm::sys::PrintStackTrace(out);
  out.close();
  out.clear_error();
}

static void onFatalError(void *, const char *reason, bool) {
  std::error_code error;
  llvm::raw_fd_ostream out(crashFile("reason.txt"), error);
  if (!error)
    out << reason << "\n";
  out.close();
  out.clear_error();
  std::abort();
}

/// Written with write(2) alone: there is no memory to format anything.
[[noreturn]] static void onNoMemory() {
  static const char text[] =
      "E-MEMORY: expected enough memory to compile, but got none; compile fewer layers at a "
      "time (--layers) or use a machine with more\n";
  static const char json[] =
      "{\"event\":\"error\",\"code\":402,\"name\":\"E-MEMORY\",\"where\":\"\",\"expected\":"
      "\"enough memory to compile\",\"got\":\"none\",\"hint\":\"compile fewer layers at a time "
      "(--layers) or use a machine with more\"}\n";
  ssize_t ignored = Log::get().json ? ::write(STDERR_FILENO, json, sizeof(json) - 1)
                                    : ::write(STDERR_FILENO, text, sizeof(text) - 1);
  (void)ignored;
  _exit(5);
}

void installCrashHandlers() {
  (void)crashFile("");
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  rlimit none = {0, 0};
  ::setrlimit(RLIMIT_CORE, &none);
  llvm::sys::AddSignalHandler(writeBacktrace, nullptr);
  llvm::install_fatal_error_handler(onFatalError);
  llvm::install_bad_alloc_error_handler([](void *, const char *, bool) { onNoMemory(); });
  std::set_new_handler(onNoMemory);
}

//===----------------------------------------------------------------------===//
// In the parent
//===----------------------------------------------------------------------===//

namespace {
struct ChildEnd {
  int status = 0;      ///< of waitpid
  int interrupted = 0; ///< signal that ended it all
  int spawnError = 0;
};
} // namespace

static ChildEnd runChild(const std::string &stage) {
  ChildEnd end;
  sigset_t waited, old;
  sigemptyset(&waited);
  for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGCHLD})
    sigaddset(&waited, signal);
  // A blocked signal that is ignored would never arrive.
  std::signal(SIGCHLD, SIG_DFL);
  sigprocmask(SIG_BLOCK, &waited, &old);

  std::string option = "--moec-stage=" + stage;
  std::vector<char *> arguments = {const_cast<char *>(commandLine[0].c_str()), option.data()};
  for (size_t i = 1; i < commandLine.size(); ++i)
    arguments.push_back(const_cast<char *>(commandLine[i].c_str()));
  arguments.push_back(nullptr);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  posix_spawnattr_setsigmask(&attributes, &old);
  pid_t pid = -1;
  end.spawnError =
      posix_spawn(&pid, "/proc/self/exe", nullptr, &attributes, arguments.data(), environ);
  posix_spawnattr_destroy(&attributes);
  while (!end.spawnError) {
    if (::waitpid(pid, &end.status, WNOHANG) == pid)
      break;
    siginfo_t info;
    int signal = sigwaitinfo(&waited, &info);
    if (signal > 0 && signal != SIGCHLD) {
      end.interrupted = signal;
      ::kill(pid, SIGKILL);
      ::waitpid(pid, &end.status, 0);
      break;
    }
  }
  sigprocmask(SIG_SETMASK, &old, nullptr);
  return end;
}

static std::string readText(const std::string &file) {
  auto buffer = llvm::MemoryBuffer::getFile(file);
  return buffer ? (*buffer)->getBuffer().str() : "";
}

/// Moves what the child noted into a folder of its own and says where it is. `how` is empty if the
/// child found its own mistake and has reported it.
static int reportBug(const std::string &stage, const std::string &how) {
  std::string from = stage + "/crash";
  std::string command;
  for (const std::string &argument : commandLine) {
    bool plain = !argument.empty() &&
                 argument.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                            "0123456789_-./=:,+@") == std::string::npos;
    std::string quoted = argument;
    if (!plain) {
      quoted = "'";
      for (char c : argument)
        quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
      quoted += "'";
    }
    command += (command.empty() ? "" : " ") + quoted;
  }
  std::string phase = llvm::StringRef(readText(from + "/phase.txt")).trim().str();
  std::string reason = llvm::StringRef(readText(from + "/reason.txt")).trim().str();
  std::string notes =
      "moec " + versionString().str() + "\nended by: " + (how.empty() ? "an internal error" : how) +
      "\nphase: " + (phase.empty() ? "before the first" : phase) +
      (reason.empty() ? "" : "\nreason: " + reason) + "\n\nThe command was:\n  " + command + "\n";
  if (llvm::sys::fs::exists(from + "/input.mlir"))
    notes += "\nThe same from this folder alone, without the model:\n  moec compile input.mlir "
             "--checkpoint none -o /tmp/crash.moec\n"
             "input.mlir holds no weights. moe-reduce makes it smaller.\n";
  llvm::consumeError(writeFile(from + "/README.txt", notes));

  std::string folder;
  for (const char *base : {".", "/tmp"}) {
    folder = std::string(base) + "/moec-crash-XXXXXX";
    if (!::mkdtemp(folder.data())) {
      folder.clear();
      continue;
    }
    std::error_code error;
    for (llvm::sys::fs::directory_iterator it(from, error), last; it != last && !error;
         it.increment(error))
      llvm::sys::fs::copy_file(it->path(),
                               folder + "/" + llvm::sys::path::filename(it->path()).str());
    break;
  }
  if (how.empty()) {
    if (!folder.empty())
      Log::get().warning("this is a bug in moec; please report it with the folder `" + folder +
                         "`");
    return 70;
  }
  return Log::get().report(makeError(ErrorCode::INTERNAL, phase.empty() ? "moec" : "phase " + phase,
                                     "no crash", how + (reason.empty() ? "" : ": " + reason),
                                     folder.empty()
                                         ? "no folder to reproduce it could be written"
                                         : "please report it with the folder `" + folder + "`"));
}

static int finish(const ChildEnd &end, const std::string &stage) {
  if (end.spawnError)
    return Log::get().report(osError("moec", "a child process", end.spawnError));
  if (end.interrupted) {
    Log::get().warning(llvm::Twine("interrupted (") + strsignal(end.interrupted) +
                       "); nothing was written");
    return 128 + end.interrupted;
  }
  if (WIFEXITED(end.status))
    return WEXITSTATUS(end.status) == 70 ? reportBug(stage, "") : WEXITSTATUS(end.status);
  int signal = WTERMSIG(end.status);
  // Ctrl-C reaches the child as well and may end it first.
  if (signal == SIGINT || signal == SIGTERM || signal == SIGHUP)
    return 128 + signal;
  if (signal == SIGKILL)
    return Log::get().report(makeError(ErrorCode::MEMORY, "moec", "a process that is left alone",
                                       "SIGKILL, as the kernel sends it when memory runs out",
                                       "compile fewer layers at a time (--layers)"));
  return reportBug(stage, strsignal(signal));
}

int runInChild(llvm::StringRef target, bool isFile, bool isWeights, bool force) {
  auto staged = StagedOutput::create(target,
                                     isFile      ? OutputKind::File
                                     : isWeights ? OutputKind::Weights
                                                 : OutputKind::Folder,
                                     force);
  if (!staged)
    return Log::get().report(staged.takeError());
  if (std::error_code error = llvm::sys::fs::create_directory((*staged)->folder() + "/crash"))
    return Log::get().report(osError(target, "a folder that can be created", error.value()));
  int code = finish(runChild((*staged)->folder()), (*staged)->folder());
  if (code)
    return code;
  return Log::get().report((*staged)->publish());
}

int runInChildWithoutOutput() {
  std::string stage = "/tmp/moec-XXXXXX";
  if (const char *tmp = ::getenv("TMPDIR"))
    stage = std::string(tmp) + "/moec-XXXXXX";
  if (!::mkdtemp(stage.data()))
    return Log::get().report(osError(stage, "a temporary folder", errno));
  ::mkdir((stage + "/crash").c_str(), 0777);
  int code = finish(runChild(stage), stage);
  removeTree(stage);
  return code;
}

} // namespace moec::tool
