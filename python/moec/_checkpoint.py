"""Weights of a layer read from a checkpoint, for the reference: NumPy and the file format alone.

    source = Checkpoint("Mixtral-8x7B")                # a folder, or one .safetensors file
    weights = source.weights(layer, formats)           # role -> array, or one that reads by expert

`layer` is one layer of a *.moe.json (whose `weights` say which tensors make up a role), `formats`
says to what each role was rounded when it was packed. Where tensors lie comes from the model table;
reading, arranging and decoding are written anew here, so that an error of the compiler's reader
shows. An expert's matrices are read when they are asked for: a layer need not fit in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec._moec import codes
from moec.errors import make_error
from moec.reference import round_bf16

__all__ = ["Checkpoint"]

# bfloat16 and e4m3 have no NumPy type: their bits.
_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "U8": np.dtype("u1"),
}

# Roles with one matrix or vector for each expert.
_BY_EXPERT = {"gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias"}


def _refuse(name: str, where: str, expected: str, got: str) -> Any:
    raise make_error(codes[name], f"{name}: {where}: expected {expected}, but got {got}")


def _e4m3() -> np.ndarray:
    """The 256 values of float8_e4m3fn: sign, four bits of exponent with bias 7, three of mantissa;
    no infinity, all ones are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent.astype(float) - 10)
    )
    size[(code & 127) == 127] = math.nan
    return np.where(code & 128, -size, size)


def _e2m1() -> np.ndarray:
    """The 16 values of a nibble: sign, two bits of exponent with bias 1, one of mantissa."""
    code = np.arange(16)
    exponent, mantissa = code >> 1 & 3, code & 1
    size = np.where(exponent == 0, mantissa / 2, (2 + mantissa) * np.exp2(exponent - 2.0))
    return np.where(code & 8, -size, size)


class Checkpoint:
    """The tensors of a folder of safetensors files, or of one file."""

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        index = path / "model.safetensors.index.json"
        if path.is_dir():
            names = ["model.safetensors"]
            if index.exists():
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            elif not (path / names[0]).exists():
                names = sorted(file.name for file in path.glob("*.safetensors"))
            files = [path / name for name in names]
        else:
            files = [path]
        if not files:
            _refuse("E-IO", str(path), "*.safetensors files", "none")
        self.bytes = 0
        self.tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in files:
            for name, entry in self._read_header(file):
                self.tensors[name] = entry

    def _read_header(self, file: Path):
        try:
            size = file.stat().st_size
            with open(file, "rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(length) if 8 + length <= size else b"")
        except OSError as cause:
            _refuse("E-IO", str(file), "a file that can be read", str(cause.strerror))
        except (ValueError, struct.error):
            _refuse("E-FILE-FORMAT", str(file), "a safetensors file", "another")
        self.bytes += size
        header.pop("__metadata__", None)
        for name, entry in header.items():
            yield name, (file, 8 + length, entry)

    def _tensor(self, name: str, part: int | None = None) -> tuple[np.ndarray, str]:
        """A tensor's elements, or those of one index of its first dimension, and its dtype."""
        if name not in self.tensors:
            _refuse("E-TENSOR", name, "a tensor of the checkpoint", "none of this name")
        file, base, entry = self.tensors[name]
        shape, (begin, end) = list(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in _TYPES:
            _refuse("E-TENSOR", name, "one of " + ", ".join(_TYPES), entry["dtype"])
        if part is not None:
            size = (end - begin) // shape[0]
            begin, shape = begin + part * size, shape[1:]
            end = begin + size
        with open(file, "rb") as f:
            data = os.pread(f.fileno(), end - begin, base + begin)
            while len(data) < end - begin:  # one read of Linux gives at most 2 GiB
                more = os.pread(f.fileno(), end - begin - len(data), base + begin + len(data))
                if not more:
                    _refuse("E-FILE-FORMAT", str(file), "all bytes of its tensors", "fewer")
                data += more
        return np.frombuffer(data, _TYPES[entry["dtype"]]).reshape(shape), entry["dtype"]

    def weights(self, layer: Mapping[str, Any], formats: Mapping[str, str]) -> dict[str, Any]:
        """role -> array [rows, cols] or [rows], or for roles of experts something that has a shape
        and gives expert e's array as [e]."""
        experts = layer["E"] if layer["kind"] == "moe" else 1
        out: dict[str, Any] = {}
        for role, rule in layer["weights"].items():
            sources = [_Source(self, source, layer["index"], role) for source in rule["from"]]
            stack = _Stack(sources, experts, formats.get(role, "f32"))
            out[role] = stack if role in _BY_EXPERT else stack[0]
        return out


class _Source:
    """One entry of `from`: a tensor, or one for each expert."""

    def __init__(self, checkpoint: Checkpoint, rule: Mapping[str, Any], index: int, role: str):
        self.checkpoint, self.rule, self.index = checkpoint, rule, index
        self.vector = role.endswith(("_bias", "_scale"))
        self.stacked = rule.get("arrangement") == "stacked"
        self.parts = rule.get("part_count", 1)

    def _read(self, key: str, expert: int) -> tuple[np.ndarray, str]:
        name = self.rule[key].replace("{i}", str(self.index)).replace("{e}", str(expert))
        return self.checkpoint._tensor(name, expert if self.stacked else None)

    def read(self, expert: int) -> list[np.ndarray]:
        """The parts it holds, each [rows, cols] or [rows], as bits of bfloat16 or as floats."""
        values, dtype = self._read("tensor", expert)
        encoding = self.rule.get("encoding", "plain")
        if encoding == "fp8":
            scales, kind = self._read("scales", expert)
            if kind == "BF16":
                scales = (scales.astype(np.uint32) << 16).view(np.float32)
            rows, cols = values.shape
            wide = scales.repeat(128, 0)[:rows].repeat(128, 1)[:, :cols]
            values = _e4m3().astype(np.float32)[values] * wide.astype(np.float32)
        elif encoding == "mxfp4":
            scales, _ = self._read("scales", expert)
            nibbles = np.stack([values & 15, values >> 4], -1).reshape(*scales.shape, 32)
            values = _e2m1()[nibbles] * np.exp2(scales[..., None].astype(float) - 127)
            values = values.reshape(scales.shape[0], -1)
        elif dtype in ("F8_E4M3", "U8"):
            _refuse("E-UNSUPPORTED", self.rule["tensor"], "floats, or an encoding", dtype)
        if self.vector:
            values = values.reshape(-1)  # dimensions of 1 may be there or not
        elif self.rule.get("transposed"):
            values = values.T
        if self.rule.get("interleaved"):
            return [values[part :: self.parts] for part in range(self.parts)]
        return np.split(values, self.parts)


class _Stack:
    """A role's weights; [e] reads those of expert e. Has what the reference asks of an array."""

    def __init__(self, sources: list[_Source], experts: int, form: str):
        self.sources = sorted(sources, key=lambda source: source.rule.get("first_part", 0))
        self.experts, self.form = experts, form

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.experts, *self[0].shape)

    def reshape(self, shape: tuple[int, ...]) -> _Stack:
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"expected {shape}, but got {self.shape}")
        return self

    def __getitem__(self, expert: int) -> np.ndarray:
        parts = [part for source in self.sources for part in source.read(expert)]
        if len({part.dtype for part in parts}) > 1:
            parts = [_floats(part) for part in parts]
        whole = np.concatenate(parts)
        if self.form == "bf16" and whole.dtype != np.uint16:
            return round_bf16(whole)
        return whole


def _floats(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << 16).view(np.float32) if a.dtype == np.uint16 else a
