#!/usr/bin/env python3
"""One layer of real size from a checkpoint on disk to numbers that are checked.

    python benchmarks/real_layer.py [--out FOLDER] [--hidden 4096 --width 14336 --experts 8]

transformers writes a one-layer Mixtral with random bf16 weights (save_pretrained, 2.9 GB at the
default size, three times that on disk with what is made of it). It is compiled, packed and run for
each number of tokens by the command line, each command in a process of its own whose anonymous
memory is watched. Then every row of every output is compared with float64 NumPy, one expert after
the other, and with transformers' block in bf16, within the project's bounds:

- the same experts as float64 wherever the choice is not within rounding;
- with the same routing, an error of at most 1.5 times transformers' own;
- anonymous memory of at most the largest group of tensors (gate and up of an expert) and
  500 MB; files that are mapped do not count, the system can drop their pages.

Exits with 1 if one of them does not hold. Minutes, and 14 GB of memory for the comparison.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BOUND = 500e6  # what a process may need beside the largest group of tensors
LEVELS = ("x86-64-v3", "x86-64-v4", "avx512-bf16")
STAGES = ("checkpoint", "compare")  # run by this file in a process of their own


# --- processes and their memory -------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """The process and all that it started."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                pass  # ended meanwhile
    return found


def anonymous(pid: int) -> int:
    """Bytes of a process that no file stands behind."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return 1024 * sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem"))
    except (OSError, KeyError):
        return 0  # ended meanwhile


def command(*arguments: object) -> tuple[float, float]:
    """Runs a command; returns its seconds and the most anonymous memory of it and its children."""
    words = [str(argument) for argument in arguments]
    print("$", " ".join(words), flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(words)
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, sum(map(anonymous, family(process.pid))))
            done.wait(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    taken = time.perf_counter() - start
    done.set()
    watcher.join()
    if code:
        sys.exit(f"expected exit code 0, but got {code}")
    return taken, most


def size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


# --- stages ---------------------------------------------------------------------------------------


def load_oracle():
    """What the tests compare with."""
    sys.path.insert(0, str(ROOT / "test" / "python"))
    return importlib.import_module("oracle")


def write_checkpoint(options) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(options.seed)
    config = MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_local_experts=options.experts,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.set_default_dtype(torch.bfloat16)  # never as f32 in memory
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        block = model.model.layers[0].mlp
        # Outputs of size 1, and a router that has favourites.
        block.experts.gate_up_proj.normal_(0, 1.5 / options.hidden**0.5)
        block.experts.down_proj.normal_(0, 2.0 / options.width**0.5)
        block.gate.weight.normal_(0, 2.0 / options.hidden**0.5)
    model.save_pretrained(options.out / "checkpoint", max_shard_size="1GB")


def median_time(call) -> float:
    """Seconds of a call: the median of five after one that warms up."""
    call()
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def compare(options) -> None:
    """Checks the outputs that the command line wrote, and times both sides in this process."""
    import moec
    import torch
    from transformers import MixtralForCausalLM

    oracle = load_oracle()
    torch.set_num_threads(options.threads)
    model = MixtralForCausalLM.from_pretrained(options.out / "checkpoint", dtype=torch.bfloat16)
    block = oracle.blocks_of(model.eval().requires_grad_(False))[0]
    reference = block.reference()
    layers = {}
    for level in LEVELS:
        try:
            library = moec.load(
                options.out / "layer.moec", threads=options.threads, cpu_level=level
            )
        except moec.Error as error:
            if error.name != "E-ISA":
                raise
            print(f"not on this machine: {level}")
            continue
        layers[level] = library.layers[0]
        assert layers[level].info.level == level
    best = moec.load(options.out / "layer.moec").layers[0].info.level

    def bf16(values) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values)).bfloat16()

    rows, good = [], True
    for count in options.counts:
        x = bf16(np.load(options.out / f"x{count}.npy"))
        written = bf16(np.load(options.out / f"y{count}.npy"))
        # transformers rounds its logits to bf16 and chooses others: it gets the exact choice.
        exact = reference.routing(x)
        truth = reference.experts(x, exact.experts, exact.weights)
        chosen = torch.from_numpy(exact.experts).long()
        peer = block.experts(x, chosen, torch.from_numpy(exact.weights).float())
        peer_ms = 1e3 * median_time(lambda x=x: block(x))
        for level, layer in layers.items():
            ids, _ = layer.route(x)
            clear = oracle.check_routing(
                ids, exact, block.weights["router"], x, 2**-24, f"{level}, T = {count}"
            )
            y = layer(x)
            ours = oracle.relative(y[clear], truth[clear])
            theirs = oracle.relative(peer[clear], truth[clear])
            # The command line took the best level: the same bits.
            fine = ours <= 1.5 * theirs and (level != best or torch.equal(y, written))
            fine = fine and bool(clear.any())
            good &= fine
            rows.append(
                {
                    "level": level,
                    "tokens": count,
                    "error": ours,
                    "transformers": theirs,
                    "clear": int(clear.sum()),
                    "ok": fine,
                    "ms": 1e3 * median_time(lambda layer=layer, x=x: layer(x)),
                    "transformers_ms": peer_ms,
                }
            )
    result = {"rows": rows, "good": good}
    (options.out / "compare.json").write_text(json.dumps(result))


# --- all of it ------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for all files, and of a checkpoint from before (default: a temporary one)",
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", default="1,17,512")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.counts = [int(count) for count in options.tokens.split(",")]
    if options.stage:
        {"checkpoint": write_checkpoint, "compare": compare}[options.stage](options)
        return 0
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        return run(options)
    with tempfile.TemporaryDirectory() as folder:
        options.out = Path(folder)
        return run(options)


def run(options) -> int:
    from moec.compiler import find_compiler

    out, moec = options.out, find_compiler()
    shape = ["--hidden", options.hidden, "--width", options.width, "--experts", options.experts]
    more = ["--tokens", options.tokens, "--threads", options.threads, "--seed", options.seed]
    stage = [sys.executable, __file__, "--out", out, *shape, *more, "--stage"]
    checkpoint, compiled = out / "checkpoint", out / "layer.moec"
    if not checkpoint.exists():
        command(*stage, "checkpoint")

    figures = {}
    figures["compile"] = command(
        moec, "compile", checkpoint, "--checkpoint", "none", "-o", compiled, "--quiet"
    )
    figures["pack"] = command(
        moec, "pack", checkpoint, "--for", compiled, "-o", compiled / "weights", "--quiet"
    )
    generator = np.random.default_rng(options.seed + 1)
    for count in options.counts:
        x = generator.standard_normal((count, options.hidden), dtype=np.float32)
        x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # exact in bf16
        np.save(out / f"x{count}.npy", x)
        arguments = ["-i", out / f"x{count}.npy", "-o", out / f"y{count}.npy", "--quiet"]
        figures[f"run, T = {count}"] = command(
            moec, "run", compiled, *arguments, "--threads", options.threads
        )
    command(*stage, "compare")
    result = json.loads((out / "compare.json").read_text())

    group = 2 * 2 * options.width * options.hidden  # gate and up of an expert, bf16
    good = result["good"]
    print(f"\nMachine: {cpu_name()}, {options.threads} threads")
    print(
        f"Layer: H {options.hidden}, F {options.width}, E {options.experts}, K 2, bf16; checkpoint "
        f"{size(checkpoint) / 1e9:.2f} GB, packed {size(compiled / 'weights') / 1e9:.2f} GB, "
        f"library {size(next(compiled.glob('lib*.so'))) / 1e3:.0f} kB"
    )
    print("\n| command | seconds | peak anonymous memory, MB |\n| --- | --- | --- |")
    for name, (seconds, most) in figures.items():
        fine = most <= group + BOUND
        good &= fine
        print(f"| {name} | {seconds:.2f} | {most / 1e6:.0f} {'' if fine else 'EXCEEDS '}|")
    print(f"\nAllowed: {(group + BOUND) / 1e6:.0f} MB.\n")
    print(
        "| T | level | error | transformers' | compared | ms | transformers' ms | GFLOP/s |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for row in result["rows"]:
        flops = 6.0 * options.hidden * options.width * 2 * row["tokens"]
        bad = "" if row["ok"] else " EXCEEDS"
        print(
            f"| {row['tokens']} | {row['level']} | {row['error']:.2e}{bad} "
            f"| {row['transformers']:.2e} | {row['clear']} of {row['tokens']} | {row['ms']:.1f} "
            f"| {row['transformers_ms']:.1f} | {flops / row['ms'] / 1e6:.0f} |"
        )
    print("\nWithin every bound." if good else "\nA bound is exceeded.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
