"""Calls moe-spec-dump, the test tool over lib/Spec, and writes safetensors files by hand."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build"))
TOOL = BUILD / "bin" / "moe-spec-dump"

# Exit codes of the classes of include/moec/errors.def.
EXIT = {"1": 2, "2": 3, "3": 4, "4": 5, "5": 6, "7": 7, "9": 70}


class SpecError(Exception):
    """What the tool refused: the fields of its error."""

    def __init__(self, fields: dict[str, Any], code: int):
        super().__init__(fields["message"])
        self.fields = fields
        self.name = fields["name"]
        self.where = fields["where"]
        self.hint = fields["hint"]
        self.exit = code


def tool(*arguments: object, limit: float = 60.0) -> str:
    """stdout of a call; SpecError for a coded failure, AssertionError for any other."""
    done = subprocess.run([TOOL, *map(str, arguments)], capture_output=True, timeout=limit)
    if done.returncode == 0:
        return done.stdout.decode()
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    try:
        fields = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise AssertionError(f"exit code {done.returncode}: {lines}") from None
    assert done.returncode == EXIT[str(fields["code"])[0]], fields
    raise SpecError(fields, done.returncode)


def load(*arguments: object, **options: Any) -> dict[str, Any]:
    """{"spec", "notes", "weights", "layers"} of a model."""
    return json.loads(tool(*arguments, **options))


def weight(model: object, layer: str, role: str, out: Path, *arguments: object) -> np.ndarray:
    """A logical weight [E][parts][rows][cols] as flat f32."""
    tool(model, f"--weight={layer}:{role}", "-o", out, *arguments)
    return np.fromfile(out, dtype=np.float32)


def safetensors(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from its parts; `length` overrides the true header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def batch(paths: list[Path], *options: str) -> list[str | dict[str, Any]]:
    """For each path "ok" or the fields of its error, by one call."""
    out = tool("--batch", *options, *paths, limit=300).splitlines()
    assert len(out) == len(paths)
    return [json.loads(line) for line in out]


def refused(
    name: str, *arguments: object, says: str | tuple[str, ...] = (), limit: float = 60.0
) -> SpecError:
    """Asserts that a call fails with a code, and that the message holds every phrase of `says`."""
    try:
        out = tool(*arguments, limit=limit)
    except SpecError as error:
        assert error.name == name, error
        for phrase in [says] if isinstance(says, str) else says:
            assert phrase in str(error), error
        return error
    raise AssertionError(f"expected {name}, but got success: {out[:400]}")
