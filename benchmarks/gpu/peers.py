"""The same layers in other programs on the same GPU, one JSON row each:

    python peers.py PEER FOLDER_OF_CONFIGS [--tokens 1,8,...] [--seconds 120] [--device cuda]

PEER   dense         a square bf16 matmul: the rate of cuBLAS
       grouped_mm    router and experts by torch's grouped_mm
       triton        the same experts by a fused Triton kernel (triton_moe.py)
       transformers  the whole block as transformers runs it

What is not installed, refuses a layer or finds no time is a row that says so.
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


class Timer:
    """Median microseconds of calls with a cold L2: by events on a GPU, by the clock elsewhere."""

    def __init__(self, torch, device, repeats):
        self.torch, self.device, self.repeats = torch, device, repeats
        self.flush = torch.empty(1 << 28 if device == "cuda" else 1 << 10, dtype=torch.uint8)
        self.flush = self.flush.to(device)

    def __call__(self, run):
        times = []
        with self.torch.inference_mode():
            for i in range(-3, self.repeats):
                self.flush.fill_(i & 255)
                us = self.events(run) if self.device == "cuda" else self.clock(run)
                if i >= 0:
                    times.append(us)
        return sorted(times)[len(times) // 2]

    def events(self, run):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        self.torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1000

    def clock(self, run):
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6


def grouped_experts(torch):
    """torch's grouped_mm as transformers' grouped_mm experts use it."""

    def experts(x, ids, weights, gate_up, down):
        T, K = ids.shape
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=len(down)).cumsum(0).to(torch.int32)
        rows = x[order // K]
        gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        result = torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        result = result * weights.flatten()[order, None]
        y = torch.zeros(T * K, x.shape[1], dtype=x.dtype, device=x.device)
        y[order] = result
        return y.view(T, K, -1).sum(1)

    return experts


def layers_of_experts(torch, name, config, device):
    """A function of T that makes a call of router and experts."""
    if name == "triton":
        from triton_moe import experts
    else:
        experts = grouped_experts(torch)
    H, F, E, K = shape(config)
    bf16 = {"dtype": torch.bfloat16, "device": device}
    gate_up = torch.randn(E, 2 * F, H, **bf16) * H**-0.5
    down = torch.randn(E, H, F, **bf16) * F**-0.5
    router = torch.randn(E, H, **bf16) * H**-0.5

    def prepare(tokens):
        x = torch.randn(tokens, H, **bf16)

        def run():
            scores = torch.softmax((x @ router.T).float(), -1)
            weights, ids = scores.topk(K, -1)
            return experts(x, ids, weights.to(x.dtype), gate_up, down)

        return run

    return prepare, {}


def blocks_of_transformers(torch, name, config, device):
    """The same for the block of a model of one layer."""
    import transformers

    small = {"num_hidden_layers": 1, "vocab_size": 128, "num_attention_heads": 8}
    small |= {"num_key_value_heads": 8, "head_dim": 64, "pad_token_id": 0}
    known = {k: v for k, v in config.items() if k not in ("torch_dtype", "model_type")}
    full = transformers.AutoConfig.for_model(config["model_type"], **(known | small))
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(full, dtype=torch.bfloat16).eval()
    layer = model.model.layers[0]
    block = next(
        getattr(layer, part)
        for part in ("block_sparse_moe", "feed_forward", "mlp")
        if hasattr(layer, part)
    )

    def prepare(tokens):
        x = torch.randn(1, tokens, full.hidden_size, dtype=torch.bfloat16, device=device)
        return lambda: block(x)

    chosen = str(getattr(model.config, "_experts_implementation", None))
    return prepare, {"implementation": chosen, "version": transformers.__version__}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["dense", "grouped_mm", "triton", "transformers"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--size", default="4096,8192", help="of the dense matmuls")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    stop = time.monotonic() + options.seconds
    try:
        import torch
    except ImportError:
        return row(absent=options.peer, why="torch is not installed")
    if options.device == "cuda" and not torch.cuda.is_available():
        return row(absent=options.peer, why=f"torch {torch.__version__} sees no CUDA device")
    torch.manual_seed(0)
    timer = Timer(torch, options.device, options.repeats)
    if options.peer == "dense":
        for n in map(int, options.size.split(",")):
            a, b = (torch.randn(n, n).to(options.device, torch.bfloat16) for _ in range(2))
            us = timer(lambda a=a, b=b: a @ b)
            version = torch.__version__
            row(peer="dense matmul", n=n, us=us, tflops=2 * n**3 / us * 1e-6, torch=version)
        return None
    make = blocks_of_transformers if options.peer == "transformers" else layers_of_experts
    for path in sorted(options.folder.glob("*.json")):
        try:
            config = json.loads(path.read_text())
            prepare, facts = make(torch, options.peer, config, options.device)
            for tokens in map(int, options.tokens.split(",")):
                if time.monotonic() > stop:
                    return row(absent=options.peer, model=path.stem, T=tokens, why="no time left")
                us = timer(prepare(tokens))
                row(peer=options.peer, model=path.stem, T=tokens, us=us, **facts)
        except Exception as error:  # whatever a peer does, the others go on
            why = f"{type(error).__name__}: {error}"[:200]
            row(absent=options.peer, model=path.stem, why=why)
        prepare = None
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return None


if __name__ == "__main__":
    main()
