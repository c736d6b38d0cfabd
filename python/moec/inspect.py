"""Which experts served which tokens, as a picture in a notebook.

    from moec.inspect import read_usage
    usage = read_usage("usage.safetensors")      # from moec run --trace or moec.trace
    usage                                        # a notebook shows the heat map
    usage.layers[0].entropy, usage.layers[0].counts
    open("usage.svg", "w").write(usage.svg())    # the same picture as moec inspect --usage --svg

Needs NumPy only. The file is described in docs/measuring.md.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from html import escape as _escape

import numpy as np

from moec import _moec
from moec.errors import make_error

__all__ = ["LayerUsage", "Usage", "read_usage"]

_TYPES = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class LayerUsage:
    """One layer's trace."""

    layer: str
    experts: np.ndarray  #: int32 [T, K], best first
    weights: np.ndarray  #: float32 [T, K]
    counts: np.ndarray  #: int64 [E], rows each expert got

    @property
    def entropy(self) -> float:
        """Of the counts, divided by log E: 1 is even, 0 one expert."""
        total = self.counts.sum()
        if not total:
            return 0.0
        if len(self.counts) == 1:
            return 1.0
        share = self.counts[self.counts > 0] / total
        # + 0.0: no minus before zero
        return float(-(share * np.log(share)).sum() / math.log(len(self.counts))) + 0.0

    @property
    def imbalance(self) -> float:
        """Largest count over mean count."""
        total = self.counts.sum()
        return float(self.counts.max() / (total / len(self.counts))) if total else 0.0


@dataclass(frozen=True)
class Usage:
    """The traces of a model's layers, in model order."""

    model: str
    layers: list[LayerUsage]

    def svg(self) -> str:
        """A heat map: a row for each layer, a column for each expert."""
        experts = max([1, *(len(layer.counts) for layer in self.layers)])
        cell = 6 if experts > 128 else 10 if experts > 32 else 16
        left, top, right = 220, 40, 190
        width, height = left + cell * experts + right, top + cell * len(self.layers) + 30
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="{min(cell, 12)}">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="8" y="20" font-size="14">Expert usage of {_text(self.model)} '
            f"(rows: layers, columns: experts 0 to {experts - 1})</text>",
        ]
        for row, layer in enumerate(self.layers):
            y = top + cell * row
            name = _text(layer.layer)
            out.append(f'<text x="{left - 6}" y="{y + cell - 2}" text-anchor="end">{name}</text>')
            largest = max(int(layer.counts.max(initial=0)), 1)
            for expert, count in enumerate(layer.counts.tolist()):
                heat = count / largest
                # White over blue to dark blue: readable in grey as well.
                colour = [int(247 - 239 * heat), int(251 - 203 * heat), int(255 - 148 * heat)]
                fill = "".join(f"{part:02x}" for part in colour)
                out.append(
                    f'<rect x="{left + cell * expert}" y="{y}" width="{cell}" height="{cell}" '
                    f'fill="#{fill}"><title>{name}, expert {expert}: {count} rows</title></rect>'
                )
            out.append(
                f'<text x="{left + cell * experts + 6}" y="{y + cell - 2}">'
                f"entropy {layer.entropy:.3f}, max/mean {layer.imbalance:.2f}</text>"
            )
        return "\n".join([*out, "</svg>"]) + "\n"

    def _repr_svg_(self) -> str:
        return self.svg()

    def _repr_html_(self) -> str:
        """What notebooks show: the picture, scrolled where it is wide."""
        return f'<div style="overflow-x:auto">{self.svg()}</div>'


def read_usage(path: str | os.PathLike[str]) -> Usage:
    """Reads a usage file, schema 1. moec.Error: E-IO, E-FILE-FORMAT, E-ABI (a higher schema)."""
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        _refuse("E-IO", path, "a file that can be read", error.strerror or str(error))
    header = None
    if len(data) >= 8:
        (length,) = struct.unpack_from("<Q", data)
        if length <= len(data) - 8:
            try:
                header = json.loads(data[8 : 8 + length])
            except ValueError:
                header = None
    meta = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(meta, dict) or meta.get("format") != "moec-usage":
        _refuse("E-FILE-FORMAT", path, 'a usage file (format "moec-usage")', "another file")
    if meta.get("schema") != "1":
        _refuse("E-ABI", path, "schema 1", f"schema {meta.get('schema')}")
    body = memoryview(data)[8 + length :]

    def tensor(name: str, dtype: str, rank: int) -> np.ndarray:
        entry = header.get(name)
        try:
            begin, end = entry["data_offsets"]
            shape = [int(size) for size in entry["shape"]]
            kind = _TYPES[dtype]
            good = entry["dtype"] == dtype and len(shape) == rank and min(shape, default=0) >= 0
            good = good and 0 <= begin <= end <= len(body)
            good = good and end - begin == math.prod(shape) * kind.itemsize
        except (TypeError, KeyError, ValueError):
            good = False
        if not good:
            _refuse("E-FILE-FORMAT", path, f"{dtype} of rank {rank} in `{name}`", repr(entry))
        return np.frombuffer(body[begin:end], kind).reshape(shape)

    names = [name[: -len(".counts")] for name in header if name.endswith(".counts")]
    if not names:
        _refuse("E-FILE-FORMAT", path, "at least one layer (`NAME.counts`)", "none")
    layers = [
        LayerUsage(
            name,
            tensor(name + ".experts", "I32", 2),
            tensor(name + ".weights", "F32", 2),
            tensor(name + ".counts", "I64", 1),
        )
        for name in sorted(names, key=_model_order)
    ]
    return Usage(str(meta.get("model", "")), layers)


def _model_order(name: str) -> list[tuple[int, int | str]]:
    """model.layers.10 comes after model.layers.9."""
    return [(0, int(p)) if p.isdecimal() else (1, p) for p in name.replace(".", " . ").split()]


def _text(text: str) -> str:
    return _escape(text, quote=False)


def _refuse(code: str, where: str, expected: str, got: str) -> None:
    message = f"{code}: {where}: expected {expected}, but got {got}"
    raise make_error(_moec.codes[code], message)
