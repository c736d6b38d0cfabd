"""Schedules of one layer against each other: compiled folders alternate call by call.

    moec compile olmoe.json --layers 0 --checkpoint random:1 -o a.moec
    moec compile olmoe.json --layers 0 --checkpoint none --strategy b.json -o b.moec
    python benchmarks/variants.py a.moec b.moec [--tokens 1,8,64,512] [--seconds 4]

All have the same layer and take the weights of the first unless they have their own, each as a copy
in huge pages or, after `=map`, as the mapped file:

    python benchmarks/variants.py a.moec a.moec=map --tokens 1

Experts are given, uniform, others in every call. In a block every folder runs the same calls, and a
loop that only reads reads as many bytes as the chosen experts have. Printed: median time, quartiles
of the ratio to the first folder block by block, share of the loop's rate, and whether the bits of
the results are those of the first folder.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import moec
import numpy as np
import torch
from layer import Layer
from peers.read_peer import ReadLoop


def quartiles(values):
    ordered = sorted(values)
    n = len(ordered)
    return ordered[n // 4], statistics.median(ordered), ordered[n - 1 - n // 4]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER[=copy|map]")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--routing", default="uniform", help="uniform, zipf or one-expert")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=4, help="for each number of tokens")
    parser.add_argument("--load", default="copy", help="where a folder does not say: copy or map")
    options = parser.parse_args()
    tokens = [int(t) for t in options.tokens.split(",")]
    layers = []
    pool = moec.Pool(options.threads)
    first = Path(options.folders[0].partition("=")[0])
    for text in options.folders:
        folder, _, load = text.partition("=")
        own = Path(folder) / "weights"
        library = moec.load(
            folder,
            weights=own if own.is_dir() else first / "weights",
            load=load or options.load,
            threads=pool,
            max_tokens=max(tokens),
        )
        layers.append(library.layers[0])
    info = layers[0].info
    dtype = "bf16" if info.format == "bf16" else "f32"
    sizes = {"H": info.H, "F": info.F, "E": info.E, "K": info.K}
    shape = Layer(sizes | {"dtype": dtype, "routing": options.routing})
    loop = ReadLoop(info.E * shape.expert_bytes, options.threads)
    order = np.random.default_rng(0)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    print(f"{sizes} {dtype}, {options.threads} threads, level {info.level}; read loop: {loop.way}")
    for count in tokens:
        inputs = [
            (torch.from_numpy(x).to(kind), torch.from_numpy(ids), torch.from_numpy(weights))
            for x, ids, weights in shape.inputs(count)
        ]
        used = [len(np.unique(ids)) * shape.expert_bytes for _, ids, _ in inputs]
        want = layers[0].experts(*inputs[0])
        same = [torch.equal(layer.experts(*inputs[0]), want) for layer in layers]
        y = torch.empty_like(want)
        times = [[] for _ in range(len(layers) + 1)]
        begin, block = time.perf_counter(), 0
        while time.perf_counter() - begin < options.seconds or block < 5:
            calls = 1 if count > 8 else 3  # of each, before the next one's turn
            for who in order.permutation(len(times)):
                items = [(block * calls + call) % len(inputs) for call in range(calls)]
                if who:
                    start = time.perf_counter()
                    for item in items:
                        layers[who - 1].experts(*inputs[item], out=y)
                    times[who].append((time.perf_counter() - start) / calls)
                else:
                    times[0].append(statistics.mean(loop.run(used[item]) for item in items))
            block += 1
        read = statistics.median(times[0])
        rate = statistics.mean(used) / read / 1e9
        print(f"T = {count}: {block} blocks; reading alone {read * 1e3:.3f} ms, {rate:.1f} GB/s")
        for folder, mine, equal in zip(options.folders, times[1:], same, strict=True):
            low, middle, high = quartiles([a / b for a, b in zip(mine, times[1], strict=True)])
            share = statistics.median([r / m for r, m in zip(times[0], mine, strict=True)])
            gflops = shape.flops_per_token * count / statistics.median(mine) / 1e9
            print(
                f"  {Path(folder).name:24} {statistics.median(mine) * 1e3:9.3f} ms  "
                f"{middle:.3f} ({low:.3f}-{high:.3f}) of the first  "
                f"{share:4.0%} of the read rate  {gflops:4.0f} GFLOP/s"
                + ("" if equal else "  OTHER BITS"),
                flush=True,
            )


if __name__ == "__main__":
    main()
