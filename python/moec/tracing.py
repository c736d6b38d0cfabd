"""moec.trace: which experts served which tokens, over everything that runs inside.

    with moec.trace("usage.safetensors") as t:
        out = model.generate(ids)
        t.tokens = out                      # optional: the tokens, as they are known afterwards

Every MoE layer that is called inside is recorded, from Python, from transformers and from the
torch operation, in every thread. The file is the one `moec run --trace` writes (schema 1:
NAME.experts I32 [T,K], NAME.weights F32 [T,K], NAME.counts I64 [E]); `moec inspect --usage` shows
it. Nothing is written when the block inside raises.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import numpy as np

from moec import _moec
from moec.errors import make_error

__all__ = ["trace"]


class trace:
    """A context manager; see the text of this module.

    path    file to write, replaced if it exists
    tokens  token ids of all rows in the order in which they were read, or None; one id more, the
            last that generate chose and nobody read, is left out
    """

    def __init__(self, path: str | os.PathLike[str], tokens: Any = None, model: str = "model"):
        self.path, self.tokens, self.model = os.fspath(path), tokens, model
        self._lock = threading.Lock()
        self._calls: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._experts: dict[str, int] = {}

    def __enter__(self) -> trace:
        self._before = _moec.set_recorder(self._record)
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        _moec.set_recorder(self._before)
        if kind is None:
            self._write()

    def _record(self, label: str, ids: Any, weights: Any, experts: int) -> None:
        k = ids.shape[-1]
        ids = _numpy(ids).astype(np.int32).reshape(-1, k)  # a copy: the caller may reuse its own
        weights = _numpy(weights).astype(np.float32).reshape(-1, k).copy()
        with self._lock:
            self._calls.setdefault(label, []).append((ids, weights))
            self._experts[label] = experts

    def _write(self) -> None:
        tensors: dict[str, np.ndarray] = {}
        rows = set()
        for label, calls in self._calls.items():
            width = max(ids.shape[1] for ids, _ in calls)
            # A call with fewer slots is filled with "no expert".
            ids = np.concatenate([_fill(ids, width, -1) for ids, _ in calls])
            weights = np.concatenate([_fill(w, width, 0) for _, w in calls])
            counts = np.bincount(ids[ids >= 0].ravel(), minlength=self._experts[label])
            tensors[label + ".counts"] = counts.astype(np.int64)
            tensors[label + ".experts"] = ids
            tensors[label + ".weights"] = weights
            rows.add(len(ids))
        if not tensors:
            _refuse("E-ARGUMENT", "trace", "a MoE layer called inside", "none")
        if self.tokens is not None:
            given = _numpy(self.tokens).astype(np.int32).ravel()
            fits = [n for n in (len(given), len(given) - 1) if rows == {n}]
            if not fits:
                read = ", ".join(map(str, sorted(rows)))
                _refuse("E-SHAPE", "trace: tokens", f"{read} tokens, as layers read", len(given))
            tensors["tokens"] = given[: fits[0]]
        _save(self.path, tensors, self.model)


def _numpy(a: Any) -> np.ndarray:
    return a.detach().float().numpy() if hasattr(a, "detach") else np.asarray(a)


def _fill(a: np.ndarray, width: int, value: int) -> np.ndarray:
    return np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=value)


_DTYPES = {"int64": "I64", "int32": "I32", "float32": "F32"}


def _save(path: str, tensors: dict[str, np.ndarray], model: str) -> None:
    header: dict[str, Any] = {
        "__metadata__": {"format": "moec-usage", "model": model, "schema": "1"}
    }
    # 8-byte elements first, so that every tensor is aligned to its element.
    order = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    offset = 0
    for name, a in order:
        span = [offset, offset + a.nbytes]
        header[name] = {
            "dtype": _DTYPES[a.dtype.name],
            "shape": list(a.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _, a in order:
                f.write(np.ascontiguousarray(a).tobytes())
        os.replace(temporary, path)
    except OSError as cause:
        if os.path.exists(temporary):
            os.unlink(temporary)
        _refuse("E-IO", path, "to write the trace", cause)


def _refuse(name: str, where: str, expected: str, got: Any) -> None:
    raise make_error(_moec.codes[name], f"{name}: {where}: expected {expected}, but got {got}")
