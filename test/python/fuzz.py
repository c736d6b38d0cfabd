"""Random layers until the time is over: sizes, attributes, numbers of tokens that no test lists.

    PYTHONPATH=build/python python3 test/python/fuzz.py [--seconds 600] [--seed S] [--rounds N]

A round is one model of random layers, compiled by the command line for every level and run on each
that this machine has: against float64 and transformers' experts within the project's bounds
(oracle.check_layer), and against itself, bit for bit (threads, chunks, order of the rows, a token
alone, rows added in order). What fails is printed with the seed of its round, and `--seed S
--rounds 1` does that round again. The last line counts; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import moec
import oracle
import sizes
import test_attributes as attributes
import torch
from conftest import LEVELS, moec_command
from moec.reference import reference
from test_bits import same

LAYERS = 10
LARGEST = 2_500_000  # weights of one part of a layer: a round stays below a minute


def number(rng: random.Random, most: int) -> int:
    """1 to `most`: small ones, ones around a multiple of a vector, any."""
    kind = rng.random()
    if kind < 0.3:
        return rng.randint(1, min(most, 40))
    if kind < 0.6:
        return min(most, max(1, 16 * rng.randint(1, most // 16) + rng.randint(-1, 1)))
    return rng.randint(1, most)


def plain(rng: random.Random) -> tuple:
    """A spec as sizes.layer_spec takes it."""
    while True:
        h, f, e = number(rng, 1100), number(rng, 1100), number(rng, 257)
        if h * f * e <= LARGEST:
            k = rng.randint(1, min(8, e))
            return h, f, e, k, rng.choice(sizes.ACTIVATION), rng.randrange(len(sizes.ROUTER))


def changed(rng: random.Random, index: int) -> dict:
    """One of the layers of test_attributes.py with other sizes."""
    spec = attributes.spec_of(rng.choice(list(attributes.CHANGES)), index)
    groups = spec["router"].get("groups", 1)
    while True:
        e = groups * number(rng, 128 // groups) if groups > 1 else number(rng, 128)
        h, f = number(rng, 600), number(rng, 600)
        kept = spec["router"].get("groups_kept", 1)
        room = e // groups * kept if groups > 1 else e
        if h * f * e <= LARGEST and room >= spec["K"] and (groups == 1 or e // groups >= 2):
            break
    k = spec["K"] if spec["K"] < 3 else rng.randint(1, min(8, room))
    spec |= {"name": f"layer{index}.{spec['name']}", "H": h, "F": f, "E": e, "K": k}
    return spec


class Round:
    """One model: layers, weights, the compiled folder."""

    def __init__(self, seed: int, folder: Path):
        rng = random.Random(seed)
        self.rng, self.dtype = rng, rng.choice(sizes.DTYPES)
        self.layers, self.weights = [], {}
        for i in range(LAYERS):
            draw = rng.random()
            if draw < 0.1:
                spec = sizes.dense_spec(
                    number(rng, 1100), number(rng, 1100), "silu", f"layer{i}", i
                )
            elif draw < 0.6:
                spec = sizes.layer_spec(plain(rng), f"layer{i}", i)
            else:
                spec = changed(rng, i)
            made = attributes.weights_of if "combine" in spec else sizes.make_weights
            arguments = (spec, self.dtype) if "combine" in spec else (spec, self.dtype, seed + i)
            self.weights[spec["name"]] = made(*arguments)
            self.layers.append(spec)
        described = [
            {**s, "weights": {r: attributes.source(s, r) for r in self.weights[s["name"]]}}
            if "combine" in s
            else s
            for s in self.layers
        ]
        model = sizes.model_spec([s for s in described if "weights" not in s], self.dtype)
        known = {s["name"]: s for s in model["layers"]}
        model["layers"] = [known.get(s["name"], s) for s in described]
        spec = sizes.write(folder, model, self.weights)
        self.path = folder / "out.moec"
        checkpoint = folder / "checkpoint"
        moec_command("compile", spec, "--checkpoint", checkpoint, "-o", self.path, "--quiet")

    def check(self, report) -> int:
        """Reports what is wrong; returns the number of checks."""
        done = 0
        counts = [1, self.rng.randint(2, 9), self.rng.randint(10, 90)]
        order = torch.randperm(counts[-1], generator=torch.Generator().manual_seed(counts[-1]))
        for level in LEVELS:
            libraries = [
                moec.load(self.path, cpu_level=level, **options)
                for options in ({"threads": 1}, {"threads": 3, "max_tokens": 7})
            ]
            for i, spec in enumerate(self.layers):
                layer, other = (library.layers[i] for library in libraries)
                for count in counts:
                    done += 1
                    sizes_of = {k: spec.get(k) for k in "HFEK"}
                    what = f"{spec['name']} {sizes_of} {self.dtype} {level} T={count}"
                    try:
                        self.check_numbers(layer, spec, count, what)
                        self.check_bits(layer, other, spec, count, order, what)
                    except Exception:
                        report(what)
        return done

    def inputs(self, spec, count):
        x = oracle.tokens(count, spec["H"], self.dtype)
        wanted = spec.get("router", {}).get("router_x")
        return x, {"router_x": oracle.tokens(count, spec["H"], self.dtype, 4)} if wanted else {}

    def check_numbers(self, layer, spec, count, what):
        weights = self.weights[spec["name"]]
        x, extra = self.inputs(spec, count)
        if "combine" not in spec:
            block = oracle.block_of(spec, weights)
            oracle.check_layer(layer, block, x, self.dtype, what)
            if spec["kind"] == "moe" and spec["E"] <= 16:
                oracle.check_combine(layer, block, x[:3], self.dtype, what)
            return
        ref = reference(spec, weights)
        clear = attributes.clear_tokens(ref.routing(extra.get("router_x", x)))
        if clear.any():
            y = layer(x, out=oracle.poisoned(x.shape, x.dtype), **extra)
            error = oracle.relative(y[torch.from_numpy(clear)], ref(x, **extra)[clear])
            # Where few numbers make the result it may nearly vanish; whole errors are larger.
            few = 20 if min(spec["F"], count, spec["H"]) < 4 else 3
            assert error <= few * attributes.bound(self.dtype), (
                f"{what}: relative error {error:.3g}"
            )

    def check_bits(self, layer, other, spec, count, order, what):
        x, extra = self.inputs(spec, count)
        y = layer(x, **extra)
        assert same(other(x, **extra), y), f"{what}: threads and chunks"
        if count == len(order):
            moved = {k: v[order] for k, v in extra.items()}
            assert same(other(x[order], **moved), y[order]), f"{what}: order of rows"
        t = count // 2
        one = {k: v[t : t + 1] for k, v in extra.items()}
        assert same(layer(x[t : t + 1], **one), y[t : t + 1]), f"{what}: a token alone"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--rounds", type=int, default=10**9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, failed, checks, rounds = time.monotonic(), 0, 0, 0
    while time.monotonic() - start < options.seconds and rounds < options.rounds:
        seed = options.seed + rounds
        rounds += 1

        def report(what, seed=seed):
            nonlocal failed
            failed += 1
            print(f"FAILED seed {seed}: {what}\n{traceback.format_exc()}", flush=True)

        with tempfile.TemporaryDirectory() as folder:
            try:
                checks += Round(seed, Path(folder) / "model").check(report)
            except KeyboardInterrupt:
                raise
            except BaseException:  # pytest's own failure of a command is one
                report("model")
    print(f"{rounds} models from seed {options.seed}, {checks} checks, {failed} failed")
    return 1 if failed or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
