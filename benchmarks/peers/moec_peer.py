"""moec itself, experts given, and its own dense FFN of equal active parameters; `moec@LEVEL` is
held to that CPU level."""

from __future__ import annotations

import tempfile

import moec
import numpy as np
import torch
from layer import Layer

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Peer:
    def __init__(self, name: str, layer: Layer, run: dict):
        name, _, level = name.partition("@")
        self.layer, self.dense = layer, name == "moec-dense"
        self.dtype = DTYPES[layer.dtype]
        self.version = moec.__version__
        width = layer.F * layer.K if self.dense else layer.F
        one = {
            "H": layer.H,
            "F": width,
            "name": "bench.{i}",
            "index": f"0-{layer.banks - 1}" if layer.banks > 1 else 0,
        }
        one["expert"] = {"form": "glu", "activation": "silu"}
        if self.dense:
            one["kind"] = "dense"
        else:
            one |= {
                "E": layer.E,
                "K": layer.K,
                "router": {"score": "softmax", "order": "score_then_select", "renormalize": "sum"},
            }
        spec = {"schema": 1, "name": "bench", "dtype": layer.dtype, "layers": [one]}
        self.folder = tempfile.TemporaryDirectory()
        library = moec.compile(
            spec,
            out=self.folder.name + "/bench.moec",
            options={"cpu": level or "native", "checkpoint": "none"},
            load={"load": "none", "threads": run["threads"], "max_tokens": max(run["tokens"])},
        )
        self.banks = [library.layers[i] for i in range(layer.banks)]
        self.note = f"level {self.banks[0].info.level}"
        for bank in self.banks:
            self._fill(bank)

    def _fill(self, bank):
        layer = self.layer
        cast = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(self.dtype)  # noqa: E731
        if self.dense:
            pairs = [layer.expert(e) for e in range(layer.K)]
            ups = [part for half in (0, 1) for up, _ in pairs for part in [np.split(up, 2)[half]]]
            bank.set_weight("gate_up", cast(np.concatenate(ups)))
            bank.set_weight("down", cast(np.concatenate([down for _, down in pairs], axis=1)))
            return
        bank.set_weight("router", cast(np.zeros((layer.E, layer.H), np.float32)))
        for e in range(layer.E):
            up, down = layer.expert(e)
            bank.set_weight("gate_up", cast(up), expert=e)
            bank.set_weight("down", cast(down), expert=e)

    def prepare(self, x, ids, weights):
        x = torch.from_numpy(x).to(self.dtype)
        return x, torch.from_numpy(ids), torch.from_numpy(weights), torch.empty_like(x)

    def run(self, item, bank, keep=True):
        x, ids, weights, y = item
        if self.dense:
            self.banks[bank](x, out=y)
        else:
            self.banks[bank].experts(x, ids, weights, out=y)
        return y.float().numpy() if keep else None
