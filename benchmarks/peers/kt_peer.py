"""kt-kernel: its AMX class where the machine has AMX, else the AVX2 one."""

from __future__ import annotations

import numpy as np
import torch
from layer import Layer
from serve import Absent

from peers.torch_peer import DTYPES, stacked


class Peer:
    def __init__(self, name: str, layer: Layer, run: dict):
        if layer.dtype != "bf16":
            raise Absent("its classes here are for bf16")
        try:
            import kt_kernel
            from kt_kernel import kt_kernel_ext as extension
        except ImportError as error:
            raise Absent(
                f"kt-kernel does not load: {error}", "pip install --no-deps kt-kernel==0.7.2 gguf"
            ) from None
        self.version = f"kt-kernel {getattr(kt_kernel, '__version__', '?')}"
        amx = torch.cpu._is_amx_tile_supported()
        kind = "AMXBF16_MOE" if amx else "AVX2BF16_MOE"
        if not hasattr(extension.moe, kind):
            raise Absent(f"this build of kt-kernel has no {kind}")
        self.note = kind
        pool = extension.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [run["threads"]]
        self.infer = extension.CPUInfer(pool)
        self.layer, self.keep, self.banks = layer, [pool], []
        for _ in range(layer.banks):
            up, down = stacked(layer, DTYPES[layer.dtype])
            gate, up = (half.contiguous() for half in up.chunk(2, dim=1))
            config = extension.moe.MOEConfig(layer.E, layer.K, layer.H, layer.F, 0)
            config.layer_idx, config.pool = 0, self.infer.backend_
            config.max_len = max(16, *run["tokens"])
            config.gate_projs, config.up_projs, config.down_projs = (
                [[tensor[e].data_ptr() for e in range(layer.E)]] for tensor in (gate, up, down)
            )
            moe = getattr(extension.moe, kind)(config)
            order = torch.arange(layer.E, dtype=torch.int64)
            self.infer.submit(moe.load_weights_task(order.data_ptr()))
            self.infer.sync()
            self.keep += [gate, up, down, order]
            self.banks.append(moe)

    def prepare(self, x, ids, weights):
        x = torch.from_numpy(x).to(torch.bfloat16)
        count = torch.tensor([len(ids)], dtype=torch.int32)
        ids = torch.from_numpy(ids.astype(np.int64))
        return x, ids, torch.from_numpy(weights), torch.empty_like(x), count

    def run(self, item, bank, keep=True):
        x, ids, weights, y, count = item
        task = self.banks[bank].forward_task(
            count.data_ptr(),
            self.layer.K,
            ids.data_ptr(),
            weights.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            False,
        )
        self.infer.submit(task)
        self.infer.sync()
        return y.float().numpy() if keep else None
