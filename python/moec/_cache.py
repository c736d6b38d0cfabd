"""Compiled code of layers without weights, kept in the user's cache folder.

    folder = library_folder(spec)       # compiles the first time

A folder is named by a hash of everything its code depends on: what the layers compute, the version
of this package, the compiler's file, and the features of this CPU or the architecture of the GPU
(code is made for it alone, which halves the time). Any number of processes may ask at once: one
compiles, the others wait, and a folder appears whole or not at all. Deleting the cache folder is
safe.

The folder is $MOEC_CACHE, else $XDG_CACHE_HOME/moec, else ~/.cache/moec.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moec
from moec.compiler import find_compiler
from moec.errors import make_error

__all__ = ["cache_folder", "library_folder"]

log = logging.getLogger("moec.transformers")


def cache_folder() -> Path:
    named = os.environ.get("MOEC_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moec"


def library_folder(spec: Mapping[str, Any], device: str = "cpu") -> Path:
    """The folder of code for this spec (a *.moe.json as a dict) and device ("cpu", "cuda:0"),
    compiled if it is not there."""
    target = _target(device)
    folder = cache_folder() / f"{spec['name']}-{_key(spec, target)}.moec"
    if (folder / "manifest.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_suffix(".lock"), "w")
    except OSError as cause:
        raise make_error(
            400,
            f"E-IO: {folder.parent}: expected a folder for compiled code that can be written, "
            f"but got: {cause}; name another in MOEC_CACHE",
        ) from cause
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the kernel, whatever becomes of us
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is no library
            _compile(spec, folder, target, device)
    return folder


def _target(device: str) -> dict[str, str]:
    """The options of the compiler that say what it makes code for."""
    if device == "cpu":
        return {"cpu": os.environ.get("MOEC_CPU") or "native"}
    # The driver takes PTX on devices that have no name here.
    import torch

    number = int(device.partition(":")[2] or 0)
    known = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability(number) if known else (8, 0)
    name = f"sm_{major}{minor}"
    # A 9.0 has a level of its own, which needs a driver for CUDA 12.
    names = {"sm_90": "sm_90,sm_90a"}.get(name, name if name in _ARCHITECTURES else "sm_80")
    return {"target": "cuda", "gpu": names}


# What moec compile --gpu assembles the kernels of sm_80 for.
_ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89")


def _compile(spec: Mapping[str, Any], folder: Path, target: Mapping[str, str], device: str) -> None:
    begin = time.monotonic()
    where = {"threads": 1} if device == "cpu" else {"device": device}
    log.info("compiling %s into %s", _describe(spec), folder)
    moec.compile(
        spec,
        out=folder,
        options={"checkpoint": "none", **target},
        load={"load": "none", **where},
    )
    log.info("compiled in %.1f s", time.monotonic() - begin)


def _describe(spec: Mapping[str, Any]) -> str:
    first = spec["layers"][0]
    sizes = " ".join(f"{key}={first[key]}" for key in ("H", "F", "E", "K") if key in first)
    return f"{spec['name']} {sizes} {spec['dtype']}"


def _key(spec: Mapping[str, Any], target: Mapping[str, str]) -> str:
    compiler = shutil.which(find_compiler()) or ""
    about = os.stat(compiler)
    parts = [
        json.dumps(spec, sort_keys=True),
        moec.__version__,
        f"{about.st_size} {about.st_mtime_ns}",
        " ".join(_cpu_features()) if "cpu" in target else "",
        json.dumps(target, sort_keys=True),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> list[str]:
    """The features of this CPU, as the kernel names them."""
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("flags"):
                return sorted(line.split(":", 1)[1].split())
    return []
