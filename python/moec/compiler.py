"""Compiling models: runs the driver `moec` as a child process and shows how far it is.

The compiler is LLVM and MLIR, some 250 MB of shared libraries, and a crash of it must not be a
crash of Python: so it never enters this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from moec import _driver
from moec.errors import make_error

__all__ = ["compile", "find_compiler"]


def find_compiler() -> str:
    """The driver: $MOEC_COMPILER, else the one in this package, else `moec` on PATH."""
    named = os.environ.get("MOEC_COMPILER")
    if named:
        if shutil.which(named) is None:
            raise _io_error("MOEC_COMPILER", "the path of the compiler driver", repr(named))
        return named
    found = _driver.driver_path() or shutil.which("moec")
    if found is None or _is_console_script(found):
        raise _io_error(
            "moec.compile",
            "the compiler driver `moec` in MOEC_COMPILER, in this package or on PATH",
            "none",
            "this package was installed without the compiler",
        )
    return found


def _is_console_script(path: str) -> bool:
    """Whether `moec` on PATH is only this package's own entry point, which would find nothing."""
    with open(path, "rb") as f:
        return f.read(2) == b"#!" and _driver.driver_path() is None and b"_driver" in f.read(4096)


def compile(
    model: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    options: Sequence[str] | Mapping[str, Any] = (),
    progress: bool | TextIO | None = None,
    load: Mapping[str, Any] | None = None,
):
    """Compiles a model and opens the result.

    model     a checkpoint folder, a config.json, a *.moe.json or .mlir file, or a spec as a dict
    out       the folder to write; it must not exist, unless options say force
    options   of `moec compile`: a list as on the command line, or a dict such as
              {"layers": "0,3-5", "cpu": "x86-64-v4", "force": True}
    progress  True, or a stream: draws how far it is; False: nothing; None: if stderr is a terminal
    load      keyword arguments for moec.load

    Ctrl-C ends the compiler, which leaves nothing half-written. Failures are moec.Error.
    """
    with contextlib.ExitStack() as scratch:
        if isinstance(model, Mapping):
            spec = tempfile.NamedTemporaryFile("w", prefix="moec-", suffix=".moe.json")
            json.dump(model, scratch.enter_context(spec))
            spec.flush()
            model = spec.name
        command = [find_compiler(), "compile", "-o", os.fspath(out), *_as_arguments(options)]
        command += ["--log", "json", "--", os.fspath(model)]  # a name may begin with a dash
        run_driver(command, progress)
    from moec.library import load as open_library

    return open_library(out, **(load or {}))


def _as_arguments(options: Sequence[str] | Mapping[str, Any]) -> list[str]:
    if isinstance(options, str):
        raise TypeError(f"options: expected a list or a dict, but got {options!r}")
    if not isinstance(options, Mapping):
        return [str(o) for o in options]
    arguments = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is not False and value is not None:
            arguments += [flag, os.fspath(value) if hasattr(value, "__fspath__") else str(value)]
    return arguments


def ask_driver(*arguments: str) -> str:
    """What a quick command of the driver (`inspect`) prints; its error becomes a moec.Error."""
    with tempfile.TemporaryFile("w+") as answer:
        run_driver([find_compiler(), *arguments, "--log", "json"], False, answer)
        answer.seek(0)
        return answer.read()


def run_driver(
    command: Sequence[str],
    progress: bool | TextIO | None = None,
    answer: TextIO | int = subprocess.DEVNULL,
) -> None:
    """Runs the driver to its end; its error becomes a moec.Error. answer: where its stdout goes."""
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Out of the terminal's group: Ctrl-C reaches Python alone, which passes it on once.
            start_new_session=True,
        )
    except OSError as cause:
        raise _io_error("moec.compile", f"to run {command[0]}", str(cause)) from cause
    drawing = _Drawing(progress)
    error, loose = None, []
    try:
        assert child.stderr is not None
        for line in child.stderr:
            event = _parse(line)
            if event is None:
                loose.append(line.rstrip())
            elif event.get("event") == "error":
                error = error or event
            else:
                drawing.show(event)
        child.wait()
    except BaseException:  # KeyboardInterrupt above all
        _end(child)
        raise
    finally:
        drawing.close()
    if error is not None:
        raise _error_of(error)
    if child.returncode:
        status = child.returncode
        how = f"signal {-status}" if status < 0 else f"exit code {status}"
        tail = "\n".join(loose[-20:])
        raise make_error(
            900,
            f"E-INTERNAL: {os.path.basename(command[0])} compile: expected success or an error "
            f"line, but got {how}" + (f"\n{tail}" if tail else ""),
        )
    for line in loose:
        print(line, file=sys.stderr)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _error_of(event: Mapping[str, Any]) -> Exception:
    fields = {k: str(event.get(k) or "") for k in ("name", "where", "expected", "got", "hint")}
    message = event.get("message")
    if not message:
        message = f"{fields['name']}: " + (f"{fields['where']}: " if fields["where"] else "")
        message += f"expected {fields['expected']}, but got {fields['got']}"
        message += f"; {fields['hint']}" if fields["hint"] else ""
    return make_error(
        int(event.get("code", 900)), message, **{k: v for k, v in fields.items() if v}
    )


def _end(child: subprocess.Popen[str]) -> None:
    """Asks the child to stop, and makes it."""
    for sign, patience in ((signal.SIGINT, 5.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, None)):
        if child.poll() is not None:
            return
        try:
            os.killpg(child.pid, sign)  # its own children too: the compiler works in one
            child.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _io_error(where: str, expected: str, got: str, hint: str = "") -> Exception:
    message = f"E-IO: {where}: expected {expected}, but got {got}" + (f"; {hint}" if hint else "")
    return make_error(400, message)


class _Drawing:
    """One line that is redrawn, in a terminal or a notebook cell; notes stay above it."""

    def __init__(self, progress: bool | TextIO | None):
        if progress is None:
            progress = sys.stderr is not None and sys.stderr.isatty()
        self.stream = None if progress is False else sys.stderr if progress is True else progress
        self.width = 0
        self.last = 0.0
        self.phase: str | None = None
        self.begin = 0.0

    def show(self, event: Mapping[str, Any]) -> None:
        if self.stream is None:
            return
        if event["event"] in ("note", "warning"):
            self._line(str(event.get("text", "")))
            self.stream.write("\n")
            self.width = 0
        elif event["event"] == "progress":
            self._progress(event)

    def _progress(self, event: Mapping[str, Any]) -> None:
        now = time.monotonic()
        phase = str(event.get("phase", ""))
        if phase != self.phase:
            self.phase, self.begin = phase, now
        done, total = event.get("done"), event.get("total")
        if now - self.last < 0.1 and done != total:
            return
        self.last = now
        if not isinstance(done, (int, float)) or not isinstance(total, (int, float)) or not total:
            self._line(phase)
            return
        part = min(max(done / total, 0.0), 1.0)
        bar = "#" * round(24 * part)
        text = f"{phase} [{bar:<24}] {100 * part:3.0f} %"
        if 0 < part < 1 and now - self.begin > 1:
            text += f", {(now - self.begin) * (1 - part) / part:.0f} s left"
        self._line(text)

    def _line(self, text: str) -> None:
        assert self.stream is not None
        self.stream.write("\r" + text + " " * max(0, self.width - len(text)))
        self.stream.flush()
        self.width = len(text)

    def close(self) -> None:
        if self.stream is not None and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0
