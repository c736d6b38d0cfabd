"""Where the layers of transformers models run.

By default on torch's own threads. Between two layers torch's OpenMP threads spin, waiting for
torch's next operation; a second pool beside them gets half of each core, and a model decodes a
sixth to a third slower (docs/transformers.md has the numbers).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from moec._semantics import refuse

__all__ = ["executor", "torch_executor", "use_threads"]

_wanted: Any = None
_forked = False


def use_threads(threads: Any) -> None:
    """Where layers that are made from now on run: None: on torch's threads, as many as
    torch.get_num_threads() says; a number or an executor: see moec.load."""
    global _wanted
    _wanted = threads


def executor() -> Any:
    """What moec.load takes as threads for a layer that is made now."""
    if _wanted is not None:
        return _wanted
    lanes = torch.get_num_threads()
    if lanes == 1:
        return 1
    # Threads of OpenMP do not live on in a child of fork, and GNU's runtime waits for them there.
    return None if _forked or _openmp() is None else _shared(lanes)


def torch_executor(lanes: int = 0) -> Any:
    """An executor on the OpenMP threads that torch uses; lanes: tasks at once, 0: as torch."""
    from moec._moec import OpenMP

    path = _openmp()
    if path is None:
        refuse("torch_executor", "GNU OpenMP, loaded by torch", "none", name="E-ARGUMENT")
    return OpenMP(path, lanes)


@functools.cache
def _shared(lanes: int) -> Any:
    return torch_executor(lanes)


@functools.cache
def _openmp() -> str | None:
    """The GNU OpenMP runtime of torch, which it has loaded; None: it uses another."""
    with open("/proc/self/maps") as f:
        paths = {line.split(maxsplit=5)[5].strip() for line in f if "libgomp" in line}
    # Several copies: torch's own lies in torch's folder or in torch.libs beside it.
    return min(paths, key=lambda path: ("torch" not in path, path), default=None)


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
