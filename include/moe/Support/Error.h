//===- Error.h - coded errors of the compiler -------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Every error a user can meet has a code of moec/errors.def and says where it
// happened, what was expected, what was found and, if known, what to do.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_SUPPORT_ERROR_H
#define MOE_SUPPORT_ERROR_H

#include "llvm/ADT/StringRef.h"
#include "llvm/ADT/Twine.h"
#include "llvm/Support/Error.h"
#include "llvm/Support/JSON.h"

#include <optional>
#include <string>
#include <vector>

namespace moec {

/// The codes of moec/errors.def. The value is the number shown by the C interface.
enum class ErrorCode : int {
#define MOEC_ERROR(number, ENUM, name, sentence) ENUM = number,
#include "moec/errors.def"
#undef MOEC_ERROR
};

/// "E-SHAPE". Never empty: an unknown number gives "E-INTERNAL".
llvm::StringRef errorName(ErrorCode code);

/// The one sentence of errors.def.
llvm::StringRef errorSentence(ErrorCode code);

/// The code of a name ("E-SHAPE"), or nothing.
std::optional<ErrorCode> errorCodeOf(llvm::StringRef name);

/// The process exit code of an error's class: call 2, model 3, artefact 4, system 5, device 6,
/// check 7, bug 70.
int exitCode(ErrorCode code);

/// One error. Reads as `E-SHAPE: <where>: expected <expected>, but got <got>; <hint>`; parts that
/// are empty are left out.
class Error : public llvm::ErrorInfo<Error> {
public:
  static char ID;

  Error(ErrorCode code, std::string where, std::string expected, std::string got, std::string hint)
      : code(code), where(std::move(where)), expected(std::move(expected)), got(std::move(got)),
        hint(std::move(hint)) {}

  void log(llvm::raw_ostream &os) const override;
  std::error_code convertToErrorCode() const override;

  /// {"code": 101, "name": "E-SHAPE", "where", "expected", "got", "hint", "message"}: the fields
  /// of `--log json`.
  llvm::json::Object toJSON() const;

  ErrorCode code;
  std::string where;    ///< file, tensor, option or JSON path
  std::string expected; ///< noun phrase that follows "expected"
  std::string got;      ///< noun phrase that follows "but got"
  std::string hint;     ///< what to do, a clause without a full stop
};

/// Makes an error. `where` is a file, tensor, option or JSON path; `expected` and `got` are noun
/// phrases; `hint` says what to do.
llvm::Error makeError(ErrorCode code, const llvm::Twine &where, const llvm::Twine &expected,
                      const llvm::Twine &got, const llvm::Twine &hint = "");

/// Takes any llvm::Error apart into coded ones: an error of another kind becomes E-INTERNAL with
/// its text in `got`. The vector is never empty for a failure.
std::vector<Error> takeErrors(llvm::Error error);

/// The nearest of `candidates` to `name` by edit distance (at most `limit` of them, best first,
/// only those near enough to be a slip of the pen or that share a long beginning).
std::vector<std::string>
nearestNames(llvm::StringRef name, const std::vector<std::string> &candidates, unsigned limit = 3);

/// `a`, `b` and `c` in back quotes, for messages.
std::string quoteList(const std::vector<std::string> &names, llvm::StringRef last = "and");

} // namespace moec

#endif // MOE_SUPPORT_ERROR_H
