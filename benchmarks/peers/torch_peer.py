"""torch: transformers' experts (grouped_mm, eager) and a dense FFN of equal active parameters."""

from __future__ import annotations

import numpy as np
from layer import Layer
from serve import Absent

try:
    import torch
except ImportError:
    raise Absent("torch is not installed", "pip install torch==2.13.0") from None

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def stacked(layer: Layer, dtype):
    """gate_up [E, 2F, H] and down [E, H, F] as torch holds them."""
    up = torch.empty(layer.E, 2 * layer.F, layer.H, dtype=dtype)
    down = torch.empty(layer.E, layer.H, layer.F, dtype=dtype)
    for e in range(layer.E):
        for tensor, array in zip((up, down), layer.expert(e), strict=True):
            tensor[e] = torch.from_numpy(array)
    return up, down


class Peer:
    def __init__(self, name: str, layer: Layer, run: dict):
        torch.set_num_threads(run["threads"])
        self.layer, self.dtype = layer, DTYPES[layer.dtype]
        self.version = f"torch {torch.__version__}"
        if name == "torch-dense":
            self.banks = [self._dense() for _ in range(layer.banks)]
        else:
            self.banks = [self._experts(name) for _ in range(layer.banks)]

    def _dense(self):
        layer = self.layer
        pairs = [layer.expert(e) for e in range(layer.K)]
        halves = [np.split(up, 2)[half] for half in (0, 1) for up, _ in pairs]
        up = torch.from_numpy(np.concatenate(halves)).to(self.dtype)
        down = torch.from_numpy(np.concatenate([d for _, d in pairs], axis=1)).to(self.dtype)
        linear, silu = torch.nn.functional.linear, torch.nn.functional.silu

        def run(x, ids, weights):
            gate, value = linear(x, up).chunk(2, dim=-1)
            return linear(silu(gate) * value, down)

        return run

    def _experts(self, name):
        try:
            import transformers
            from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        except ImportError:
            raise Absent(
                "transformers is not installed", "pip install transformers==5.23.0"
            ) from None
        layer = self.layer
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        config = transformers.MixtralConfig(
            hidden_size=layer.H,
            intermediate_size=layer.F,
            num_local_experts=layer.E,
            num_experts_per_tok=layer.K,
        )
        config._experts_implementation = {"hf-grouped": "grouped_mm", "hf-eager": "eager"}[name]
        with torch.device("meta"):
            module = MixtralExperts(config)
        up, down = stacked(layer, self.dtype)
        module.gate_up_proj = torch.nn.Parameter(up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(down, requires_grad=False)
        return module.eval()

    def prepare(self, x, ids, weights):
        return (
            torch.from_numpy(x).to(self.dtype),
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(weights).to(self.dtype),
        )

    def run(self, item, bank, keep=True):
        with torch.inference_mode():
            y = self.banks[bank](*item)
        return y.float().numpy() if keep else None
