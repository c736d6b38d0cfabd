"""Errors: one class with the fields of the message, one subclass for each class of codes.

    try:
        y = layer(x)
    except moec.Error as e:
        e.code, e.name, e.where, e.expected, e.got, e.hint

The message is always "E-NAME: where: expected ..., but got ...; hint". Every error is also the
built-in exception a Python user would expect, so `except ValueError` catches a wrong shape.
"""

from __future__ import annotations

import re

__all__ = [
    "ArtefactError",
    "CallError",
    "CheckError",
    "DeviceError",
    "Error",
    "InternalError",
    "ModelError",
    "OutOfMemory",
    "SystemFailure",
    "make_error",
]


class Error(Exception):
    """Anything moec refuses or fails at.

    code      number, as in moec.h (101)
    name      its name ("E-SHAPE")
    where     what was wrong ("moec_run: x"), may be empty
    expected  what would have been right
    got       what was there
    hint      what to do about it, may be empty
    """

    code: int = 900
    name: str = "E-INTERNAL"
    where: str = ""
    expected: str = ""
    got: str = ""
    hint: str = ""

    def __reduce__(self):
        return _restore, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        return self.args[0] if self.args else ""


class CallError(Error, ValueError):
    """100-199: what the caller handed over."""


class ModelError(Error, ValueError):
    """200-299: the model or its checkpoint."""


class ArtefactError(Error, RuntimeError):
    """300-399: a compiled library or its weights."""


class SystemFailure(Error, OSError):
    """400-499: files, disk, processes."""


class OutOfMemory(Error, MemoryError):
    """402: E-MEMORY."""


class DeviceError(Error, RuntimeError):
    """500-599: the accelerator."""


class CheckError(Error, RuntimeError):
    """700-799: a comparison failed."""


class InternalError(Error, RuntimeError):
    """900: a bug of moec."""


_CLASSES = {1: CallError, 2: ModelError, 3: ArtefactError, 4: SystemFailure, 5: DeviceError}
_CLASSES |= {7: CheckError, 9: InternalError}

_FORM = re.compile(
    r"(?P<name>E-[A-Z0-9-]+): (?:(?P<where>.*?): )?"
    r"expected (?P<expected>.*?), but got:? (?P<got>.*?)(?:; (?P<hint>.*))?",
    re.DOTALL,
)


def _restore(cls, args, fields):
    error = cls(*args)
    error.__dict__.update(fields)
    return error


def make_error(code: int, message: str, **fields: str) -> Error:
    """The exception of an error code. Fields that are not given are read from the message."""
    cls = OutOfMemory if code == 402 else _CLASSES.get(code // 100, InternalError)
    error = cls(message)
    error.code = code
    match = _FORM.fullmatch(message)
    found = {k: v for k, v in match.groupdict().items() if v} if match else {}
    if not match and message.startswith("E-"):
        found["name"] = message.split(":", 1)[0]
    for key, value in {**found, **fields}.items():
        setattr(error, key, value)
    return error
