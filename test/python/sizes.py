"""Layers by their sizes: which ones to try, and a spec with all of them for one compile."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from oracle import TORCH, loud
from safetensors.torch import save_file

# Multiples of nothing: below, at and above a vector, a panel, a block.
H = (8, 33, 130, 1000)
F = (1, 7, 96, 347)
E = (1, 2, 5, 64, 257)
K = (1, 2, 3, 8)
ACTIVATION = ("silu", "gelu", "gelu_tanh", "relu")
ROUTER = (
    {"order": "score_then_select", "renormalize": "none"},
    {"order": "score_then_select", "renormalize": "sum"},
    {"order": "score_then_select", "renormalize": "sum", "epsilon": 1e-6, "scale_value": 2.5},
    {"order": "select_then_score", "renormalize": "none"},
)
DTYPES = ("f32", "bf16")
LEVELS = ("x86-64-v3", "x86-64-v4")
# The last two are factors like any other: a layer is compiled for one of them each, not for all.
FACTORS = (H, F, E, K, ACTIVATION, range(len(ROUTER)), DTYPES, LEVELS)

# Weights of one layer, in numbers: what a test run of minutes can make and pack.
LARGEST = 6_000_000


def product() -> list[tuple]:
    """Every H x F x E x K with K <= E; activation and router go round."""
    sizes = [s for s in itertools.product(H, F, E, K) if s[3] <= s[2]]
    return [
        (*s, ACTIVATION[i % len(ACTIVATION)], i // len(ACTIVATION) % len(ROUTER))
        for i, s in enumerate(sizes)
    ]


def pairwise(count: int, seed: int = 0) -> list[tuple]:
    """At least `count` specs in which every two values of different factors meet, as far as K <= E
    and the size allow."""

    def possible(s):
        return s[3] <= s[2] and s[0] * s[1] * s[2] <= LARGEST

    def pairs(s):
        return {((i, s[i]), (j, s[j])) for i, j in itertools.combinations(range(len(s)), 2)}

    rng = random.Random(seed)
    everything = [s for s in itertools.product(*FACTORS) if possible(s)]
    missing = set().union(*map(pairs, everything))
    chosen: list[tuple] = []
    while missing or len(chosen) < count:
        best = max(rng.sample(everything, 300), key=lambda s: len(pairs(s) & missing))
        if not pairs(best) & missing:
            if len(chosen) >= count:  # what is left is rare: look for it
                best = max(everything, key=lambda s: len(pairs(s) & missing))
            elif best in chosen:
                continue
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def layer_spec(s: tuple, name: str, index: int) -> dict[str, Any]:
    """One layer of a *.moe.json; the same mapping is the reference's spec."""
    h, f, e, k, activation, router = s[:6]
    return {
        "name": name,
        "index": index,
        "kind": "moe",
        "H": h,
        "F": f,
        "E": e,
        "K": k,
        "router": {"score": "softmax", **ROUTER[router]},
        "expert": {"form": "glu", "activation": activation},
    }


def dense_spec(h: int, f: int, activation: str, name: str, index: int) -> dict[str, Any]:
    """A dense layer of a *.moe.json."""
    expert = {"form": "glu", "activation": activation}
    return {"name": name, "index": index, "kind": "dense", "H": h, "F": f, "expert": expert}


def model_spec(layers: list[dict[str, Any]], dtype: str, name: str = "sizes") -> dict[str, Any]:
    """A *.moe.json of layers whose weights lie in a checkpoint under `<layer>.<role>`."""
    layers = [
        {
            **layer,
            "weights": {
                role: {"from": [source(layer, role)]}
                for role in (("router",) if layer["kind"] == "moe" else ()) + ("gate_up", "down")
            },
        }
        for layer in layers
    ]
    return {"schema": 1, "name": name, "dtype": dtype, "layers": layers}


def source(layer: dict[str, Any], role: str) -> dict[str, Any]:
    where: dict[str, Any] = {"tensor": f"{layer['name']}.{role}"}
    if layer["kind"] == "moe" and role != "router":
        where["arrangement"] = "stacked"
    if role == "gate_up":
        where["part_count"] = 2
    return where


def make_weights(layer: dict[str, Any], dtype: str, seed: int) -> dict[str, torch.Tensor]:
    """Seeded weights by role under which routing is uneven and outputs are O(1)."""
    g = torch.Generator().manual_seed(seed)
    h, f = layer["H"], layer["F"]
    lead = (layer["E"],) if layer["kind"] == "moe" else ()
    weights = {
        "gate_up": torch.randn(*lead, 2 * f, h, generator=g) * (1.5 / math.sqrt(h)),
        "down": torch.randn(*lead, h, f, generator=g) * (2.0 / math.sqrt(f)),
    }
    if lead:
        lengths = torch.exp(torch.linspace(-0.9, 0.9, layer["E"]))
        lengths = lengths[torch.randperm(layer["E"], generator=g)][:, None]
        router = torch.randn(layer["E"], h, generator=g) * lengths / math.sqrt(h)
        router[:, loud(h)] += lengths.flip(0) / 2
        weights["router"] = router
    return {role: w.to(TORCH[dtype]) for role, w in weights.items()}


def write(folder: Path, spec: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]]) -> Path:
    """Writes spec.moe.json and a checkpoint folder beside it; returns the spec's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.moe.json").write_text(json.dumps(spec))
    tensors = {f"{name}.{role}": w for name, roles in weights.items() for role, w in roles.items()}
    (folder / "checkpoint").mkdir()
    save_file(tensors, folder / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    return folder / "spec.moe.json"
