#!/usr/bin/env python3
"""The main job on a real Mixtral-type checkpoint: compile, run, check, time, look at the experts.

The checkpoint is written here by transformers with random weights (nothing is downloaded); its
configuration is a Mixtral in every respect but size. Every layer runs on the activations that the
model itself produces, and is compared with transformers' block and with float64 NumPy.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import moec
import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM


def say(text=""):
    print(text, flush=True)


def command(*arguments):
    say("$ " + " ".join(str(argument) for argument in arguments))
    subprocess.run([str(argument) for argument in arguments], check=True)


def megabytes(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def machine():
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs"


def write_checkpoint(folder, arguments):
    torch.manual_seed(arguments.seed)
    config = MixtralConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_local_experts=arguments.experts,
        num_experts_per_tok=2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=2048,
    )
    model = MixtralForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()
    with torch.no_grad():
        # Routers of a trained model prefer some experts; freshly drawn ones hardly do.
        for block in model.model.layers:
            gate = block.mlp.gate.weight
            gate.mul_(8.0 / (gate.float().norm(dim=1).mean() + 1e-6))
    model.save_pretrained(folder)
    return model


def recorded_inputs(model, tokens, seed):
    """What each layer's block gets when the model reads `tokens` random tokens."""
    inputs = []
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda _, given: inputs.append(given[0].detach().reshape(-1, given[0].shape[-1]))
        )
        for block in model.model.layers
    ]
    ids = torch.randint(
        0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        model.model(ids)
    for hook in hooks:
        hook.remove()
    return inputs


def call_block(block, x):
    with torch.no_grad():
        y = block(x[None])
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


def distance(got, want):
    """Norm of the difference over the norm of what was wanted, in float64."""
    got, want = got.double(), want.double()
    return (torch.linalg.norm(got - want) / torch.linalg.norm(want)).item()


def exact(block, x, ids, weights):
    """The block in float64 NumPy from its formula, with the routing given."""
    up = block.experts.gate_up_proj.detach().double().numpy()
    down = block.experts.down_proj.detach().double().numpy()
    x = x.double().numpy()
    y = np.zeros_like(x)
    for expert in range(up.shape[0]):
        token, slot = np.nonzero(ids == expert)
        if token.size:
            gate, value = np.split(x[token] @ up[expert].T, 2, axis=1)
            rows = (gate / (1 + np.exp(-gate)) * value) @ down[expert].T
            np.add.at(y, token, rows * weights[token, slot, None])
    return torch.from_numpy(y)


def check(library, model, inputs):
    """Worst errors over the layers: moec and transformers, both against float64, same routing."""
    say("layer                          moec vs float64   transformers vs float64   same experts")
    good = True
    for layer, block, x in zip(library.layers, model.model.layers, inputs, strict=True):
        ids, weights = (np.asarray(a) for a in layer.route(x))
        with torch.no_grad():
            _, their_weights, their_ids = block.mlp.gate(x)
        theirs = their_ids.numpy()
        # Where two scores are nearly equal, rounding may choose either; those tokens are counted.
        same = (np.sort(ids, axis=1) == np.sort(theirs, axis=1)).all(axis=1)
        truth = exact(block.mlp, x, theirs, their_weights.double().numpy())
        ours = layer.experts(x, their_ids.int().contiguous(), their_weights.float())
        peer = call_block(block.mlp, x)
        a, b = distance(ours, truth), distance(peer, truth)
        whole = distance(layer(x)[same], peer[same])
        floor = 2e-6 if x.dtype == torch.float32 else 0.0
        fine = a <= max(floor, 1.5 * b) and same.mean() > 0.98 and whole <= 4 * max(a, b) + floor
        good &= fine
        say(
            f"{layer.name:<30} {a:15.2e}   {b:23.2e}   {same.sum()} of {same.size}"
            + ("" if fine else "   EXCEEDS THE BOUND")
        )
    return good


def seconds(function, least=0.5):
    """Median over repetitions that last at least `least` seconds together, and their spread."""
    function()
    taken = []
    while sum(taken) < least or len(taken) < 5:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    middle = statistics.median(taken)
    return middle, (max(taken) - min(taken)) / middle


def compare(library, model, inputs, counts, threads):
    torch.set_num_threads(threads)
    modes = ["eager", "grouped_mm", "batched_mm"]
    say(f"time of layer 0 in ms (median), {threads} threads, {inputs[0].dtype}, same process:")
    say("tokens        moec   " + "".join(f"{mode:>14}" for mode in modes) + "   best / moec")
    block = model.model.layers[0].mlp
    before = model.config._experts_implementation
    for tokens in counts:
        x = inputs[0][:tokens].contiguous()
        ours, _ = seconds(lambda x=x: library.layers[0](x))
        theirs = {}
        for mode in modes:
            # batched_mm copies the chosen experts' weights for every token: only for few tokens.
            if mode == "batched_mm" and tokens > 16:
                continue
            model.set_experts_implementation(mode)
            theirs[mode], _ = seconds(lambda x=x: call_block(block, x))
        cells = "".join(f"{theirs[m] * 1e3:14.3f}" if m in theirs else f"{'-':>14}" for m in modes)
        say(f"{tokens:6d} {ours * 1e3:11.3f}   {cells}   {min(theirs.values()) / ours:11.2f}")
    model.set_experts_implementation(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for all files")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=3584, help="width of one expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", default="1,16,128,512", help="token counts to time")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.tokens.split(",")]

    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    checkpoint, compiled = arguments.out / "mixtral", arguments.out / "mixtral.moec"
    say(f"Machine: {machine()}; torch {torch.__version__}")
    say(f"\n1. A Mixtral checkpoint by transformers, {arguments.dtype}, in {checkpoint}")
    model = write_checkpoint(checkpoint, arguments)
    say(f"   {megabytes(checkpoint):.0f} MB")

    say("\n2. Compile")
    start = time.perf_counter()
    command("moec", "compile", checkpoint, "-o", compiled)
    taken = time.perf_counter() - start
    weights = megabytes(compiled / "weights")
    code = megabytes(compiled) - weights
    say(f"   {taken:.1f} s; code {code:.2f} MB, packed weights {weights:.0f} MB")

    say("\n3. Check every layer on the model's own activations")
    library = moec.load(str(compiled), threads=arguments.threads)
    inputs = recorded_inputs(model, max(512, *counts), arguments.seed + 1)
    good = check(library, model, inputs)

    say("\n4. Time")
    compare(library, model, inputs, counts, arguments.threads)

    say("\n5. Which experts served which tokens")
    x, usage = arguments.out / "x.npy", arguments.out / "usage.safetensors"
    np.save(x, inputs[0].float().numpy())
    y = arguments.out / "y.npy"
    command("moec", "run", compiled, "--layer", "0", "-i", x, "-o", y, "--trace", usage)
    command("moec", "inspect", compiled, "--usage", usage)
    say("\nEvery layer agrees." if good else "\nA layer exceeds its bound.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
