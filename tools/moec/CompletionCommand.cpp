//===- CompletionCommand.cpp - moec completion ----------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Written from the tables of commands and options, so that it cannot fall
// behind them.
//
//===----------------------------------------------------------------------===//

#include "Commands.h"
#include "Log.h"

#include "llvm/ADT/StringExtras.h"
#include "llvm/Support/raw_ostream.h"

namespace cl = llvm::cl;

namespace moec::tool {

static cl::opt<std::string> shellOption(cl::Positional, cl::Required, cl::desc("bash|zsh|fish"),
                                        cl::value_desc("bash|zsh|fish"),
                                        cl::sub(completionParser()));

namespace {
struct Option {
  std::string flag; ///< "--emit", "-o"
  std::string help;
  bool takesValue = false, takesFile = false;
  std::vector<std::string> words; ///< values that can be named
};
} // namespace

/// "auto|f32|bf16" are three words; "PATH|random:SEED|none" is a file or the word `none`.
static void readValues(llvm::StringRef text, Option &option) {
  llvm::SmallVector<llvm::StringRef> pieces;
  text.split(pieces, '|');
  for (llvm::StringRef piece : pieces) {
    bool word = !piece.empty() && llvm::all_of(piece, [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
    });
    if (word && pieces.size() > 1)
      option.words.push_back(piece.str());
    // Placeholders that name a file or folder; the others (N, T, LEVEL, …) are typed.
    else if (piece.contains('.') ||
             llvm::is_contained({"FILE", "DIR", "PATH", "WEIGHTS", "D"}, piece))
      option.takesFile = true;
  }
}

static std::vector<Option> optionsOf(const Command &command) {
  std::vector<Option> out;
  for (const auto &entry : command.parser().OptionsMap) {
    const cl::Option &from = *entry.second;
    if (!llvm::is_contained(from.Categories, &category()) ||
        from.getOptionHiddenFlag() != cl::NotHidden)
      continue;
    Option option;
    option.flag = (from.ArgStr.size() == 1 ? "-" : "--") + from.ArgStr.str();
    option.help = from.HelpStr.str();
    option.takesValue =
        from.getValueExpectedFlag() != cl::ValueDisallowed && !from.ValueStr.empty();
    if (option.takesValue)
      readValues(from.ValueStr, option);
    out.push_back(std::move(option));
  }
  llvm::sort(out, [](const Option &a, const Option &b) { return a.flag < b.flag; });
  return out;
}

static std::string joined(const std::vector<std::string> &words) { return llvm::join(words, " "); }

static std::string bashText() {
  std::string names, values, flags;
  for (const Command *command : commands()) {
    names += std::string(command->name) + " ";
    std::string all, files;
    for (const Option &option : optionsOf(*command)) {
      all += option.flag + " ";
      if (!option.takesValue)
        continue;
      std::string key = "    \"" + std::string(command->name) + " " + option.flag + "\") ";
      values += key + "COMPREPLY=($(compgen " + (option.takesFile ? "-f " : "") + "-W \"" +
                joined(option.words) + "\" -- \"$cur\")); return ;;\n";
    }
    flags += "    " + std::string(command->name) + ") flags=\"" + all + "--help\" ;;\n";
  }
  return "# bash completion of moec: moec completion bash > "
         "~/.local/share/bash-completion/completions/moec\n"
         "_moec() {\n"
         "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n"
         "  local command=${COMP_WORDS[1]} flags=--help\n"
         "  COMPREPLY=()\n"
         "  if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
         "    COMPREPLY=($(compgen -W \"" +
         names +
         "--help --version\" -- \"$cur\"))\n"
         "    return\n"
         "  fi\n"
         "  # --option=value arrives as three words.\n"
         "  if [ \"$cur\" = \"=\" ]; then\n"
         "    cur=\n"
         "  elif [ \"$prev\" = \"=\" ]; then\n"
         "    prev=${COMP_WORDS[COMP_CWORD-2]}\n"
         "  fi\n"
         "  case \"$command $prev\" in\n" +
         values +
         "  esac\n"
         "  case \"$command\" in\n" +
         flags +
         "  esac\n"
         "  case \"$cur\" in\n"
         "    -*) COMPREPLY=($(compgen -W \"$flags\" -- \"$cur\")) ;;\n"
         "    *) COMPREPLY=($(compgen -f -- \"$cur\")) ;;\n"
         "  esac\n"
         "}\n"
         "complete -o filenames -F _moec moec\n";
}

/// Text within single quotes of a shell.
static std::string quoted(llvm::StringRef text, llvm::StringRef escape = "") {
  std::string out;
  for (char c : text) {
    if (c == '\'')
      out += "'\\''";
    else if (escape.contains(c))
      out += std::string("\\") + c;
    else
      out += c;
  }
  return "'" + out + "'";
}

static std::string zshText() {
  std::string names, cases;
  for (const Command *command : commands()) {
    names += "    " + quoted(std::string(command->name) + ":" + command->sentence) + "\n";
    cases += std::string("    ") + command->name + ")\n      _arguments \\\n";
    for (const Option &option : optionsOf(*command)) {
      bool isLong = llvm::StringRef(option.flag).starts_with("--");
      std::string text = option.flag + (option.takesValue && isLong ? "=" : "") + "[";
      for (char c : option.help)
        text += c == '[' || c == ']' ? std::string("\\") + c : std::string(1, c);
      text += "]";
      if (option.takesValue)
        text += ":value:" + (option.words.empty() ? option.takesFile ? std::string("_files") : " "
                                                  : "(" + joined(option.words) + ")");
      cases += "        " + quoted(text) + " \\\n";
    }
    cases += "        '*:file:_files' ;;\n";
  }
  return "#compdef moec\n"
         "# zsh completion of moec: moec completion zsh > a folder of $fpath, as _moec\n"
         "_moec() {\n"
         "  local -a commands=(\n" +
         names +
         "  )\n"
         "  if (( CURRENT == 2 )); then\n"
         "    _describe command commands\n"
         "    return\n"
         "  fi\n"
         "  local command=$words[2]\n"
         "  shift words\n"
         "  (( CURRENT-- ))\n"
         "  case $command in\n" +
         cases +
         "  esac\n"
         "}\n"
         "_moec \"$@\"\n";
}

static std::string fishText() {
  std::string out = "# fish completion of moec: moec completion fish > "
                    "~/.config/fish/completions/moec.fish\n"
                    "complete -c moec -n __fish_use_subcommand -f\n";
  for (const Command *command : commands()) {
    std::string name = command->name;
    out += "complete -c moec -n __fish_use_subcommand -a " + name + " -d " +
           quoted(command->sentence) + "\n";
    for (const Option &option : optionsOf(*command)) {
      llvm::StringRef flag = option.flag;
      out += "complete -c moec -n '__fish_seen_subcommand_from " + name + "' " +
             (flag.consume_front("--") ? "-l " : "-s ") + flag.ltrim('-').str();
      if (option.takesValue)
        out += option.takesFile ? " -r" : " -x";
      if (!option.words.empty())
        out += " -a " + quoted(joined(option.words));
      out += " -d " + quoted(option.help) + "\n";
    }
  }
  return out;
}

static llvm::Error work() {
  if (shellOption == "bash")
    llvm::outs() << bashText();
  else if (shellOption == "zsh")
    llvm::outs() << zshText();
  else if (shellOption == "fish")
    llvm::outs() << fishText();
  else
    return makeError(ErrorCode::ARGUMENT, "moec completion", "`bash`, `zsh` or `fish`",
                     "`" + shellOption + "`");
  return llvm::Error::success();
}

const Command completionCommand = {"completion", "bash|zsh|fish",
                                   "Print the completion script of a shell.", completionParser,
                                   [] { return Log::get().report(work()); }};

} // namespace moec::tool
