"""The same layers in torch on the same GPU: dense matmul (the rate of cuBLAS), grouped_mm, and the
block of transformers. One JSON row each; what is not installed is a row that says so.

    python peers.py FOLDER_OF_CONFIGS [--tokens 1,8,64,512,2048,8192,16384] [--seconds 120]
"""

import argparse
import json
import pathlib
import time

TOKENS = "1,8,64,512,2048,8192,16384"


def row(**fields):
    print(json.dumps(fields), flush=True)


def shape(config):
    """H, F, E, K of a config.json."""
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    return config["hidden_size"], width, experts, config.get("num_experts_per_tok", 1)


def measure(torch, run, repeats=30):
    """Median microseconds of calls with a cold L2, by events."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(-3, repeats):
        flush.fill_(i & 255)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 0:
            times.append(begin.elapsed_time(end) * 1000)
    return sorted(times)[len(times) // 2]


def experts(torch, x, ids, weights, gate_up, down):
    """torch's grouped_mm as transformers' grouped_mm experts use it."""
    T, K = ids.shape
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=len(down)).cumsum(0).to(torch.int32)
    rows = x[order // K]
    gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    result = torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    result = result * weights.flatten()[order, None]
    y = torch.zeros(T, K, x.shape[1], dtype=x.dtype, device=x.device)
    y.view(T * K, -1)[order] = result
    return y.sum(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        return row(absent="torch", why="not installed")
    if not torch.cuda.is_available():
        return row(absent="torch", why=f"torch {torch.__version__} sees no CUDA device")
    stop = time.monotonic() + options.seconds
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    for n in (4096, 8192):
        a, b = torch.randn(n, n, **bf16), torch.randn(n, n, **bf16)
        us = measure(torch, lambda a=a, b=b: a @ b)
        row(peer="dense matmul", n=n, us=us, tflops=2 * n**3 / us * 1e-6, torch=torch.__version__)
    for path in sorted(options.folder.glob("*.json")):
        H, F, E, K = shape(json.loads(path.read_text()))
        gate_up = torch.randn(E, 2 * F, H, **bf16) * H**-0.5
        down = torch.randn(E, H, F, **bf16) * F**-0.5
        router = torch.randn(E, H, **bf16) * H**-0.5
        for T in map(int, options.tokens.split(",")):
            if time.monotonic() > stop:
                return row(absent=path.stem, why=f"no time left from T = {T} on")
            x = torch.randn(T, H, **bf16)

            def layer(x=x, K=K, router=router, gate_up=gate_up, down=down):
                scores = torch.softmax((x @ router.T).float(), -1)
                weights, ids = scores.topk(K, -1)
                return experts(torch, x, ids, weights.to(x.dtype), gate_up, down)

            try:
                us = measure(torch, layer, 15)
            except (RuntimeError, AttributeError) as error:
                row(absent="torch grouped_mm", model=path.stem, T=T, why=str(error)[:200])
                break
            row(peer="torch grouped_mm", model=path.stem, T=T, us=us)
        del gate_up, down, router
        torch.cuda.empty_cache()
    return None


if __name__ == "__main__":
    main()
