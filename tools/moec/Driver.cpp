//===- Driver.cpp - commands, common options, help ------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "Log.h"

#include "moe/Export/Module.h"
#include "moe/Export/Output.h"
#include "moec.h"

#include "llvm/Config/llvm-config.h"
#include "llvm/Support/raw_ostream.h"

#include <csignal>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace cl = llvm::cl;

namespace moec::tool {

cl::OptionCategory &category() {
  static cl::OptionCategory all("moec options");
  return all;
}
cl::SubCommand &compileParser() {
  static cl::SubCommand parser(compileCommand.name, compileCommand.sentence);
  return parser;
}
cl::SubCommand &packParser() {
  static cl::SubCommand parser(packCommand.name, packCommand.sentence);
  return parser;
}
cl::SubCommand &runParser() {
  static cl::SubCommand parser(runCommand.name, runCommand.sentence);
  return parser;
}
cl::SubCommand &inspectParser() {
  static cl::SubCommand parser(inspectCommand.name, inspectCommand.sentence);
  return parser;
}

cl::SubCommand &benchParser() {
  static cl::SubCommand parser(benchCommand.name, benchCommand.sentence);
  return parser;
}
cl::SubCommand &doctorParser() {
  static cl::SubCommand parser(doctorCommand.name, doctorCommand.sentence);
  return parser;
}
cl::SubCommand &verifyParser() {
  static cl::SubCommand parser(verifyCommand.name, verifyCommand.sentence);
  return parser;
}
cl::SubCommand &completionParser() {
  static cl::SubCommand parser(completionCommand.name, completionCommand.sentence);
  return parser;
}

std::string stageFolder;
std::vector<std::string> commandLine;

static cl::opt<bool> quietOption("quiet", cl::desc("Print no notes and no progress"),
                                 cl::cat(category()), cl::sub(cl::SubCommand::getAll()));
static cl::opt<std::string> logOption("log", cl::desc("How to report on stderr: text or json"),
                                      cl::value_desc("text|json"), cl::init("text"),
                                      cl::cat(category()), cl::sub(cl::SubCommand::getAll()));
static cl::opt<bool>
    followLinksOption("follow-links", cl::desc("Follow symbolic links that leave a model's folder"),
                      cl::cat(category()), cl::sub(compileParser()), cl::sub(packParser()),
                      cl::sub(benchParser()), cl::sub(inspectParser()), cl::sub(verifyParser()));
static cl::list<std::string>
    modelRowsOption("model-rows", cl::desc("A further row of the model table, or a folder of them"),
                    cl::value_desc("FILE|DIR"), cl::cat(category()), cl::sub(compileParser()),
                    cl::sub(packParser()), cl::sub(benchParser()), cl::sub(inspectParser()),
                    cl::sub(verifyParser()));

bool followLinks() { return followLinksOption; }
std::vector<std::string> modelRows() { return modelRowsOption; }

llvm::ArrayRef<const Command *> commands() {
  static const Command *const all[] = {&compileCommand, &packCommand,      &runCommand,
                                       &benchCommand,   &inspectCommand,   &verifyCommand,
                                       &doctorCommand,  &completionCommand};
  return all;
}

static void printVersion(llvm::raw_ostream &os) {
  os << "moec " << versionString() << "\n  ABI " << (MOEC_ABI >> 16) << "." << (MOEC_ABI & 0xffff)
     << ", weight layout " << packedLayout << ", LLVM " << LLVM_VERSION_STRING << "\n";
}

static void printHelp(llvm::raw_ostream &os) {
  os << "moec compiles the Mixture-of-Experts layers of a model into one native library.\n\n"
        "Commands (moec COMMAND --help lists the options):\n";
  for (const Command *command : commands())
    os << "  moec " << command->name << " " << command->usage << "\n      " << command->sentence
       << "\n";
  os << "\nOther:\n  moec --help       this page\n  moec --version    versions\n\n"
        "Exit codes: 0 everything asked for exists; 2 a wrong call; 3 a model that cannot be "
        "used;\n4 a wrong library or wrong weights; 5 the system refused; 6 a device; 7 a check "
        "failed;\n70 a bug in moec; 130 and 143 interrupted. Errors carry a code, E-NAME.\n";
}

llvm::Error runtimeError(const moec_error &error) {
  llvm::StringRef message = error.message;
  message.consume_front((llvm::StringRef(moec_error_name(error.code)) + ": ").str());
  return makeError(static_cast<ErrorCode>(error.code), "", "", message);
}

llvm::Expected<std::vector<int64_t>> parseNumberList(llvm::StringRef text, llvm::StringRef option) {
  std::vector<int64_t> out;
  llvm::SmallVector<llvm::StringRef> pieces;
  text.split(pieces, ',');
  for (llvm::StringRef piece : pieces) {
    auto [low, high] = piece.split('-');
    int64_t first, last;
    bool bad = low.getAsInteger(10, first);
    last = first;
    if (piece.contains('-'))
      bad |= high.getAsInteger(10, last);
    if (bad || first < 0 || last < first || last > Limits::layers)
      return makeError(ErrorCode::ARGUMENT, option, "numbers and ranges such as `0,3-5`",
                       "`" + text + "`");
    for (int64_t i = first; i <= last; ++i)
      out.push_back(i);
  }
  llvm::sort(out);
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

namespace {
/// What is written to stderr until `end`: cl says there, whatever stream it is given, what is wrong
/// with the value of an option.
class CapturedErrors {
public:
  CapturedErrors() : file(::memfd_create("moec-options", MFD_CLOEXEC)), saved(::dup(2)) {
    if (file >= 0 && saved >= 0)
      ::dup2(file, 2);
  }
  std::string end() {
    std::string text;
    if (file >= 0 && saved >= 0) {
      ::dup2(saved, 2);
      char buffer[4096];
      ssize_t n = ::pread(file, buffer, sizeof buffer, 0);
      text.assign(buffer, n > 0 ? n : 0);
    }
    ::close(saved);
    ::close(file);
    return text;
  }

private:
  int file, saved;
};
} // namespace

/// What cl says about the options, as one error. `self`: the name under which it knows us.
static llvm::Error wrongOptions(const Command &command, llvm::StringRef text,
                                llvm::StringRef self) {
  llvm::SmallVector<llvm::StringRef> lines;
  text.trim().split(lines, '\n', -1, /*KeepEmpty=*/false);
  std::string joined;
  for (llvm::StringRef line : lines) {
    line.consume_front("moec: ");
    line = line.trim();
    // "for the --tokens option: 'x' value invalid for long argument!"
    if (auto [option, wrong] = line.split(" option: "); option.consume_front("for the ")) {
      auto [value, kind] = wrong.split(" value invalid for ");
      if (!kind.empty())
        return makeError(ErrorCode::ARGUMENT, option, "a number", "`" + value.trim('\'') + "`");
      if (wrong.starts_with("must be specified"))
        return makeError(ErrorCode::ARGUMENT, option,
                         "a value, as moec " + llvm::Twine(command.name) + " needs it", "nothing",
                         "see moec " + llvm::Twine(command.name) + " --help");
    }
    joined += (joined.empty() ? "" : " ") + line.str();
  }
  // cl names the program as it was started; what helps is the command's own help.
  for (size_t at; (at = joined.find((self + " --help").str())) != std::string::npos;)
    joined.replace(at, self.size(), std::string("moec ") + command.name);
  return makeError(ErrorCode::ARGUMENT, llvm::Twine("moec ") + command.name, "", joined);
}

static int drive(int argc, char **argv) {
  // A reader that goes away, and a limit on file sizes, are errors of write() and not deaths.
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);

  std::vector<const char *> arguments(argv, argv + argc);
  if (arguments.size() > 1 && llvm::StringRef(arguments[1]).starts_with("--moec-stage=")) {
    stageFolder = llvm::StringRef(arguments[1]).split('=').second.str();
    arguments.erase(arguments.begin() + 1);
    installCrashHandlers();
  }
  commandLine.assign(arguments.begin(), arguments.end());
  // Errors in the options are reported in the form the options ask for.
  for (size_t i = 1; i < arguments.size(); ++i) {
    llvm::StringRef argument = arguments[i];
    if (argument == "--log=json" ||
        (argument == "--log" && i + 1 < arguments.size() && !strcmp(arguments[i + 1], "json")))
      Log::get().json = true;
  }

  llvm::StringRef first = arguments.size() > 1 ? arguments[1] : "";
  if (first.empty()) {
    printHelp(llvm::errs());
    return 2;
  }
  if (first == "--help" || first == "-h" || first == "help" || first == "-help") {
    printHelp(llvm::outs());
    return 0;
  }
  if (first == "--version" || first == "-version" || first == "version") {
    printVersion(llvm::outs());
    return 0;
  }
  const Command *chosen = nullptr;
  std::vector<std::string> names;
  for (const Command *command : commands()) {
    names.push_back(command->name);
    if (first == command->name)
      chosen = command;
  }
  if (!chosen) {
    std::vector<std::string> near = nearestNames(first, names);
    return Log::get().report(makeError(
        ErrorCode::ARGUMENT, "moec", "a command (" + quoteList(names, "or") + ")",
        "`" + first + "`",
        near.empty() ? "see moec --help" : "did you mean " + quoteList(near, "or") + "?"));
  }

  cl::SetVersionPrinter(printVersion);
  cl::HideUnrelatedOptions(category(), chosen->parser());
  std::string text;
  llvm::raw_string_ostream errors(text);
  CapturedErrors captured;
  bool good = cl::ParseCommandLineOptions(static_cast<int>(arguments.size()), arguments.data(),
                                          chosen->sentence, &errors);
  text += captured.end();
  if (!good)
    return Log::get().report(wrongOptions(*chosen, text, arguments[0]));
  if (logOption != "text" && logOption != "json")
    return Log::get().report(
        makeError(ErrorCode::ARGUMENT, "--log", "`text` or `json`", "`" + logOption + "`"));
  Log::get().json = logOption == "json";
  Log::get().quiet = quietOption;
  int code = chosen->run();
  llvm::outs().flush();
  // Results that did not reach stdout are not there.
  if (llvm::outs().has_error()) {
    std::error_code error = llvm::outs().error();
    llvm::outs().clear_error();
    if (!code && error != std::errc::broken_pipe)
      code = Log::get().report(osError("stdout", "all bytes to be written", error.value()));
  }
  return code;
}

int runDriver(int argc, char **argv) {
  int code = drive(argc, argv);
  // A stderr that takes nothing changes no result, and LLVM would abort over it at exit.
  llvm::errs().clear_error();
  return code;
}

} // namespace moec::tool
