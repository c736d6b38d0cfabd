//===- Commands.h - the commands of the driver ------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_TOOL_COMMANDS_H
#define MOEC_TOOL_COMMANDS_H

#include "moe/Spec/ModelSpec.h"
#include "moe/Support/Error.h"
#include "moec.h"

#include "llvm/ADT/ArrayRef.h"
#include "llvm/Support/CommandLine.h"

#include <string>
#include <vector>

namespace moec::tool {

/// The whole driver: returns the exit code.
int runDriver(int argc, char **argv);

/// One command. Objects of this type are the table of commands, in order of definition.
struct Command {
  const char *name;
  const char *usage;    ///< "MODEL -o DIR"
  const char *sentence; ///< what it does
  llvm::cl::SubCommand &(*parser)();
  int (*run)(); ///< returns the exit code; errors have been reported
};
extern const Command compileCommand, packCommand, runCommand, benchCommand, inspectCommand,
    verifyCommand, doctorCommand, completionCommand;
llvm::ArrayRef<const Command *> commands();

// Functions, because options in several files need them before main.
llvm::cl::SubCommand &compileParser(), &packParser(), &runParser(), &benchParser(),
    &inspectParser(), &verifyParser(), &doctorParser(), &completionParser();
llvm::cl::OptionCategory &category();

bool followLinks();
/// --model-rows, or empty.
std::vector<std::string> modelRows();

/// The stage folder when this process is the working child (--moec-stage), else empty.
extern std::string stageFolder;
/// The command line without hidden options, for reproducers.
extern std::vector<std::string> commandLine;

/// Runs this command again in a child process with a stage folder for `target`, and publishes what
/// it made. A crash of the child becomes E-INTERNAL and a folder to reproduce it. Returns the exit
/// code.
int runInChild(llvm::StringRef target, bool isFile, bool isWeights, bool force);
/// The same without an output.
int runInChildWithoutOutput();

/// The runtime's error as ours. Its message already reads "E-NAME: where: expected …".
llvm::Error runtimeError(const moec_error &error);

/// Called in the child: what it is doing and what to keep if it crashes.
void noteForCrash(llvm::StringRef file, llvm::StringRef contents);
void installCrashHandlers();

/// "all" or "0,3-5": numbers in rising order. E-ARGUMENT names `option`.
llvm::Expected<std::vector<int64_t>> parseNumberList(llvm::StringRef text, llvm::StringRef option);

} // namespace moec::tool

#endif // MOEC_TOOL_COMMANDS_H
