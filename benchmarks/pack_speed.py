#!/usr/bin/env python3
"""`moec pack` against `cp` of the same bytes, with a warm page cache.

    python benchmarks/pack_speed.py [--out FOLDER] [--hidden 4096 --width 14336 --experts 8]

Writes a checkpoint of one Mixtral layer with random bf16 weights (2.8 GB at the default size, three
times that on disk in all), compiles it once without weights, reads the checkpoint until it is in
the page cache, and then lets both take turns. Two ways of counting: until the command ends, and
until the bytes are on the disk (`sync` of the output folder belongs to the time). Prints a table
of medians and quartiles; numbers are for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent


def write_checkpoint(folder: Path, hidden: int, width: int, experts: int) -> None:
    folder.mkdir()
    config = {
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_local_experts": experts,
        "num_experts_per_tok": min(2, experts),
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 32,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    # Packing looks at no value but for being finite: one matrix serves all experts, shifted.
    block = (torch.randn(width * hidden + experts * 64) / hidden**0.5).to(torch.bfloat16)
    layer = "model.layers.0.block_sparse_moe"
    index = {}
    for e in range(experts):
        some = block[e * 64 :][: width * hidden]
        tensors = {
            f"{layer}.experts.{e}.w1.weight": some.view(width, hidden).clone(),
            f"{layer}.experts.{e}.w3.weight": some.flip(0).view(width, hidden),
            f"{layer}.experts.{e}.w2.weight": some.view(hidden, width).clone(),
        }
        if not e:
            tensors[f"{layer}.gate.weight"] = block[: experts * hidden].view(experts, hidden)
        name = f"model-{e + 1:05}-of-{experts:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def warm(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb") as f:
            while f.read(1 << 24):
                pass


def timed(command: list, made: Path) -> tuple[float, float]:
    """Seconds until the command ends, and until what it made is on the disk."""
    shutil.rmtree(made, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    begin = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True)
    ended = time.perf_counter()
    subprocess.run(["sync", "-f", str(made)], check=True)
    return ended - begin, time.perf_counter() - begin


def row(name: str, values: list[float], base: float) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {middle / base:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,0", help="of moec pack; 0: all (default 1,0)")
    parser.add_argument("--out", type=Path, help="keep the files here and use what is there")
    parser.add_argument("--moec", type=Path, default=ROOT / "build/bin/moec")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        out = options.out or Path(temporary)
        out.mkdir(exist_ok=True)
        source, code = out / "checkpoint", out / "code.moec"
        if not source.exists():
            write_checkpoint(source, options.hidden, options.width, options.experts)
        if not code.exists():
            command = [options.moec, "compile", source, "--checkpoint", "none", "-o", code]
            subprocess.run([*map(str, command), "--quiet"], check=True)
        warm(source)
        commands = {"cp": ["cp", "-r", source, out / "copy"]}
        for n in options.threads.split(","):
            name = "moec pack" if n == "0" else f"moec pack --threads {n}"
            pack = [options.moec, "pack", source, "--for", code, "-o", out / "packed"]
            commands[name] = [*pack, "--threads", n, "--quiet"]
        ended: dict[str, list[float]] = {name: [] for name in commands}
        on_disk: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                made = out / ("copy" if name == "cp" else "packed")
                first, second = timed(command, made)
                ended[name].append(first)
                on_disk[name].append(second)
        size = sum(file.stat().st_size for file in (out / "packed").iterdir())
        for made in ("copy", "packed"):
            shutil.rmtree(out / made)
    print(f"{size / 1e9:.2f} GB, {options.rounds} rounds\n")
    for title, times in (("until the end", ended), ("until on the disk", on_disk)):
        print(f"| {title} | median s | quartiles | of cp |\n| --- | ---: | ---: | ---: |")
        for name, values in times.items():
            print(row(name, values, statistics.median(times["cp"])))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
