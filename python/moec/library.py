"""Opening compiled models."""

from __future__ import annotations

import os
import re
from typing import Any

from moec import _moec
from moec.errors import make_error

__all__ = ["load"]

_LOAD = {"map": 0, "copy": 1, "none": 2}
_DEVICES = {"cpu": 0, "cuda": 2}

# The pool of all libraries that were opened with threads=None: two models that run in turn do not
# need two sets of threads. Created when first needed; it survives fork.
_default_pool: _moec.Pool | None = None


def load(
    dir: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    load: str = "map",
    device: str = "cpu",
    threads: Any = None,
    *,
    verify: bool = False,
    cpu_level: str | None = None,
    max_tokens: int = 0,
) -> _moec.Library:
    """Opens what `moec compile` wrote.

    dir         the folder
    weights     another folder of packed weights for the same code; None: those in dir
    load        "map": the files are mapped, starts at once, shared between processes; "copy": read
                into huge pages of this process, decodes up to 15 % faster (docs/performance.md);
                "none": no files, every weight comes by layer.set_weight
    device      "cpu", "cuda" or "cuda:1": a library for GPUs (moec compile --target cuda) takes
                torch's CUDA tensors of that device and runs on torch's current stream
    threads     None: all this process may use, in a pool shared by all libraries; a number: a pool
                of its own; or an executor, as moec.Pool(8). No result depends on it
    verify      check the hash of every weight byte
    cpu_level   highest level to use, as "x86-64-v3"; None: the best there is. The environment
                variable MOEC_CPU is a second cap. On a GPU: the level to use, as "sm_80"
    max_tokens  bounds the workspace: more tokens are run in chunks, with the same bits; 0: 512

    A library may be pickled (it is opened again by its path) and used after fork.
    """
    # An absolute path, so that a pickle opens the same folder from another directory.
    arguments = {
        "dir": os.path.abspath(os.fsdecode(dir)),
        "weights": None if weights is None else os.path.abspath(os.fsdecode(weights)),
        "load": load,
        "device": device,
        "threads": threads,
        "verify": bool(verify),
        "cpu_level": cpu_level,
        "max_tokens": max_tokens,
    }
    return _load(arguments)


def _load(arguments: dict[str, Any]) -> _moec.Library:
    a = arguments
    if a["load"] not in _LOAD:
        _refuse("load", ", ".join(f'"{k}"' for k in _LOAD), repr(a["load"]))
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", str(a["device"]))
    if not match or match[1] not in _DEVICES:
        _refuse("device", '"cpu", "cuda" or "cuda:1"', repr(a["device"]))
    if match[1] == "cuda" and a["threads"] is not None:
        _refuse("threads", "None for a GPU", repr(a["threads"]))
    return _moec.Library(
        a["dir"],
        a["weights"],
        _LOAD[a["load"]],
        a["verify"],
        _DEVICES[match[1]] + (match[1] == "cpu"),  # DLPack numbers the CPU 1, CUDA 2
        int(match[2] or 0),
        a["cpu_level"],
        _executor(a["threads"]) if match[1] == "cpu" else None,
        a["max_tokens"],
        arguments,
    )


def _executor(threads: Any) -> Any:
    global _default_pool
    if threads is None:
        if _default_pool is None:
            _default_pool = _moec.Pool()
        return _default_pool
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        if not hasattr(threads, "__moec_executor__"):
            _refuse("threads", "a number, an executor or None", repr(threads))
        return threads
    if threads == 1:
        return None  # the calling thread alone
    if threads < 1:
        _refuse("threads", "at least 1", str(threads))
    return _moec.Pool(int(threads))


def _refuse(where: str, expected: str, got: str) -> None:
    message = f"E-ARGUMENT: load: {where}: expected {expected}, but got {got}"
    raise make_error(_moec.codes["E-ARGUMENT"], message)


def _layer(library: _moec.Library, number: int) -> _moec.Layer:
    """What a pickled layer becomes."""
    return library.layers[number]
