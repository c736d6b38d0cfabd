"""What `moec.verify` found, as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field

import moec


@dataclass
class LayerResult:
    """One layer. Errors are norms of differences over norms, against float64; None: not there."""

    layer: str
    kind: str
    tokens: int
    same: int | None = None  #: tokens whose set of experts is the reference's, of the clear ones
    near: int | None = None  #: tokens whose choice is within rounding
    experts: float | None = None  #: error with routing given
    whole: float = math.nan  #: error of the whole layer
    worst: float = math.nan  #: largest error of one token of the whole layer
    bound: float = math.nan
    transformers: float | None = None  #: transformers' own error with routing given
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass
class Verification:
    """What `verify` found."""

    path: str
    against: str
    tokens: int
    seed: int
    level: str
    compute: str
    transformers: str  #: its version, or why it was not asked
    layers: list[LayerResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.layers) and all(layer.ok for layer in self.layers)

    def table(self) -> str:
        """Markdown, a row for each layer."""
        rows = [("layer", "kind", "same experts", "near", "experts", "whole", "worst token")]
        rows[0] += ("bound", "transformers", "verdict")
        for r in self.layers:
            clear = "-" if r.same is None else f"{r.same} of {r.tokens - r.near}"
            near = "-" if r.near is None else str(r.near)
            numbers = map(_number, (r.experts, r.whole, r.worst, r.bound, r.transformers))
            verdict = "ok" if r.ok else "; ".join(r.problems)
            rows.append((r.layer, r.kind, clear, near, *numbers, verdict))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = [
            "| " + " | ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        head = (
            f"{self.path} against {self.against}: {self.tokens} tokens, seed {self.seed}, "
            f"{self.compute}, level {self.level}; transformers: {self.transformers}"
        )
        return "\n".join([head, "", *lines]) + "\n"

    def json(self) -> str:
        out = {"schema": 1, "kind": "moec-verify", "moec": moec.__version__, **asdict(self)}
        for record, layer in zip(out["layers"], self.layers, strict=True):
            record["verdict"] = "ok" if layer.ok else "mismatch"
            for key, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[key] = None
        return json.dumps(out, indent=1) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
