"""The spine's speed floor: one MoE layer, moec against transformers in the same process.

    python benchmarks/speed_floor.py [--shape olmoe|qwen3-30b|mixtral] [--tokens 512] [--blocks 15]

For each dtype the layer of the shape gets random weights (from a fixed seed), is written as a
spec with safetensors weights, compiled, and timed interleaved with transformers' `grouped_mm`
experts on the same inputs and the same two threads. One block is: a few calls of one side, a
pause that lets torch's spinning workers fall asleep, a few calls of the other side. The figure is
the median over blocks of (transformers time / moec time), with its quartiles; above 1 moec is
faster. Next to it stand the useful GFLOP/s of both sides and the relative difference of the two
outputs, so that a fast wrong answer cannot pass.

On a machine with AMX the bf16 floor is held against AVX-512: run with ONEDNN_MAX_CPU_ISA set to
AVX512_CORE_BF16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import moec
import numpy as np
import torch
import transformers

SHAPES = {  # H, F, E, K
    "olmoe": (2048, 1024, 64, 8),
    "qwen3-30b": (2048, 768, 128, 8),
    "mixtral": (4096, 14336, 8, 2),
    "tiny": (256, 128, 8, 2),
}
PAUSE_S = 0.25  # longer than torch's OpenMP spin, so that the two pools do not share the cores


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def build_model(shape, dtype):
    """A one-layer OLMoE model of the shape whose experts run through `grouped_mm`."""
    hidden, width, experts, top_k = shape
    config = transformers.OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        block = model.model.layers[0].mlp
        for parameter in block.parameters():
            parameter.normal_(0, 1 / parameter.shape[-1] ** 0.5)
    return model.eval()


def timed(call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def quartiles(values):
    ordered = sorted(values)
    return ordered[len(ordered) // 4], statistics.median(ordered), ordered[-1 - len(ordered) // 4]


def run(shape_name, dtype_name, tokens, blocks, threads, workdir):
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    hidden, width, _, top_k = SHAPES[shape_name]
    model = build_model(SHAPES[shape_name], dtype)
    block = model.model.layers[0].mlp
    checkpoint = Path(workdir) / f"{shape_name}-{dtype_name}"
    model.save_pretrained(checkpoint)
    moec.compile(str(checkpoint), out=str(checkpoint) + ".moec")
    layer = moec.load(str(checkpoint) + ".moec", threads=threads).layers[0]

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, tokens, hidden, generator=generator).to(dtype)
    y = torch.empty_like(x[0])

    def theirs():
        with torch.inference_mode():
            return block(x)

    def ours():
        return layer(x[0], out=y)

    expected = theirs()
    expected = (expected[0] if isinstance(expected, tuple) else expected)[0].float()
    ours()
    difference = ((y.float() - expected).norm() / expected.norm()).item()
    repeats = max(1, int(0.4 / max(timed(ours, 1), 1e-4)))
    pairs = []
    for _ in range(blocks):
        theirs_s = timed(theirs, repeats)
        time.sleep(PAUSE_S)
        ours_s = timed(ours, repeats)
        pairs.append((theirs_s, ours_s))
    low, ratio, high = quartiles([a / b for a, b in pairs])
    flops = 6.0 * hidden * width * top_k * tokens
    theirs_s, ours_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "shape": shape_name,
        "dtype": dtype_name,
        "tokens": tokens,
        "threads": threads,
        "blocks": blocks,
        "ratio_q1": low,
        "ratio": ratio,
        "ratio_q3": high,
        "moec_ms": ours_s * 1e3,
        "grouped_mm_ms": theirs_s * 1e3,
        "moec_gflops": flops / ours_s / 1e9,
        "grouped_mm_gflops": flops / theirs_s / 1e9,
        "difference": difference,
        "level": getattr(layer.info, "level", None),
        "cpu": cpu_name(),
        "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="olmoe", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="append one JSON line a row to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| shape | dtype | T | moec ms | grouped_mm ms | GFLOP/s | theirs | ratio (q1–q3) | diff |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    slower = False
    for dtype in options.dtypes.split(","):
        with tempfile.TemporaryDirectory() as workdir:
            row = run(
                options.shape, dtype, options.tokens, options.blocks, options.threads, workdir
            )
        print(
            f"| {row['shape']} | {dtype} | {row['tokens']} | {row['moec_ms']:.1f} "
            f"| {row['grouped_mm_ms']:.1f} | {row['moec_gflops']:.0f} "
            f"| {row['grouped_mm_gflops']:.0f} "
            f"| {row['ratio']:.2f} ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f}) "
            f"| {row['difference']:.1e} |",
            flush=True,
        )
        slower |= row["ratio"] < 1 or not np.isfinite(row["difference"])
        if options.json:
            with open(options.json, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
    return 7 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
