"""Tokens per second of whole models through transformers: eager, grouped_mm and moec, in turn.

    python benchmarks/transformers_speed.py mixtral --out benchmarks/results/FILE.json
    python benchmarks/transformers_speed.py olmoe

A random bf16 model of real width with a few layers (all that this machine's memory holds twice).
One process, one set of torch weights; every block runs all ways in turn, so that whatever else the
machine does meets all of them:

    eager, grouped_mm   transformers' own experts
    moec                experts_implementation="moec": torch's router, our experts
    accelerate          whole blocks by mt.accelerate, on torch's own threads
    accelerate-pool     the same on a pool of other threads, with --executors

prefill: one forward of a prompt, without the head (torch copies its whole matrix for the last token
of many, which takes longer than two layers). decode: generate(n + 1 tokens) less generate(1 token),
greedy.
Numbers are medians over blocks with quartiles; ratios are taken block by block.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date

import moec
import moec.transformers as mt
import torch
import transformers

MODELS = {
    "mixtral": (
        "mixtral",
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_local_experts=8,
            num_experts_per_tok=2,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
        ),
        2,
    ),
    "olmoe": (
        "olmoe",
        dict(
            hidden_size=2048,
            intermediate_size=1024,
            num_experts=64,
            num_experts_per_tok=8,
            num_attention_heads=16,
            num_key_value_heads=16,
            vocab_size=50304,
        ),
        4,
    ),
    "tiny": (
        "mixtral",
        dict(
            hidden_size=64,
            intermediate_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
        ),
        2,
    ),
}


def make(name: str, layers: int) -> torch.nn.Module:
    """A seeded model whose weights are one block of random numbers over and over: what they are
    does not matter here, and drawing billions takes minutes."""
    kind, sizes, _ = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **sizes, num_hidden_layers=layers)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator).bfloat16()
    for parameter in model.parameters():
        flat, scale = (
            parameter.view(-1),
            1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5,
        )
        for begin in range(0, flat.numel(), len(noise)):
            part = flat[begin : begin + len(noise)]
            part.copy_(noise[: len(part)]).mul_(scale)
    for module in model.modules():  # what to_empty left unset
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = getattr(fresh, "original_inv_freq", fresh.inv_freq)
        if "norm" in type(module).__name__.lower() and hasattr(module, "weight"):
            module.weight.fill_(1.0)
    return model


class Ways:
    """The ways to run one model. An accelerated block is switched off by taking its forward out of
    the modules, and its packed weights serve experts_implementation="moec" as well: there would be
    no room for a third copy."""

    def __init__(self, model: torch.nn.Module, executors: bool):
        self.model, self.plans = model, {}
        self._install("accelerate", None)
        if executors:
            self._install("accelerate-pool", moec.Pool())

    def _install(self, name: str, executor: object) -> None:
        mt.use_threads(executor)
        mt._live._shelves.clear()  # libraries of the executor before
        report = mt.accelerate(self.model)
        if not report.done:
            sys.exit(str(report))
        mt.use_threads(None)
        found = []
        for module in self.model.modules():
            plan = module.__dict__.get("_moec_block")
            if plan is not None:
                found.append((plan, [(one, one.forward) for one in plan.replaced]))
                del plan.experts.__dict__["_moec_block"]
        self.plans[name] = found
        self._off(name)

    def _off(self, name: str) -> None:
        for plan, replaced in self.plans[name]:
            for module, _ in replaced:
                module.__dict__.pop("forward", None)
            plan.experts.__dict__.pop("_moec_live", None)
            plan.experts.__dict__.pop("_moec_block", None)

    def names(self) -> list[str]:
        return ["eager", "grouped_mm", "moec", *self.plans]

    def choose(self, name: str) -> None:
        for other in self.plans:
            self._off(other)
        if name in self.plans:
            for plan, replaced in self.plans[name]:
                for module, forward in replaced:
                    module.forward = forward
                plan.experts.__dict__["_moec_block"] = plan
            return
        if name == "moec":
            for plan, *_ in self.plans["accelerate"]:
                plan.experts.__dict__["_moec_live"] = plan.live
        self.model.set_experts_implementation(name)


@torch.inference_mode()
def measure(model: torch.nn.Module, prompt: torch.Tensor, short: torch.Tensor, new: int):
    """(prefill seconds, seconds of `new` decoded tokens)."""
    begin = time.perf_counter()
    model.model(prompt)
    prefill = time.perf_counter() - begin
    times = []
    for count in (1, new + 1):
        begin = time.perf_counter()
        out = model.generate(
            short, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            attention_mask=torch.ones_like(short),
        )  # fmt: skip
        times.append(time.perf_counter() - begin)
        assert out.shape[1] == short.shape[1] + count
    return prefill, times[1] - times[0]


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def text(q: list[float], digits: int) -> str:
    return f"{q[1]:.{digits}f} ({q[0]:.{digits}f}-{q[2]:.{digits}f})"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model", choices=MODELS)
    p.add_argument("--layers", type=int)
    p.add_argument("--prompt", type=int, default=256, help="tokens of a prefill")
    p.add_argument("--new", type=int, default=16, help="decoded tokens")
    p.add_argument("--blocks", type=int, default=5)
    p.add_argument("--executors", action="store_true", help="also on a pool of our own")
    p.add_argument("--out", help="JSON")
    a = p.parse_args()
    layers = a.layers or MODELS[a.model][2]
    transformers.logging.set_verbosity_error()
    model = make(a.model, layers)
    ways = Ways(model, a.executors)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (1, a.prompt), generator=generator)
    short = prompt[:, :32]
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways.names()}
    logits = {}
    for block in range(-1, a.blocks):  # the first one warms up, and compares
        for name in ways.names():
            ways.choose(name)
            if block < 0:
                with torch.inference_mode():
                    logits[name] = model(short).logits.float()
                measure(model, short, short, 1)
            else:
                seen[name].append(measure(model, prompt, short, a.new))
    rows = []
    for name, times in seen.items():
        record = {"way": name}
        for key, tokens, at in (("prefill", a.prompt, 0), ("decode", a.new, 1)):
            record[key] = quartiles([tokens / t[at] for t in times])
            base = seen["grouped_mm"]
            ratio = [b[at] / t[at] for b, t in zip(base, times, strict=True)]
            record[f"{key}_over_grouped_mm"] = quartiles(ratio)
        error = (logits[name] - logits["eager"]).norm() / logits["eager"].norm()
        record["logits_off_eager"] = error.item()
        rows.append(record)
    lines = [
        "| way | prefill tokens/s | / grouped_mm | decode tokens/s | / grouped_mm | logits off |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        cells = [r["way"], text(r["prefill"], 0), text(r["prefill_over_grouped_mm"], 2)]
        cells += [text(r["decode"], 1), text(r["decode_over_grouped_mm"], 2)]
        lines.append("| " + " | ".join([*cells, f"{r['logits_off_eager']:.1e}"]) + " |")
    print("\n".join(lines))
    if a.out:
        with open("/proc/cpuinfo") as f:
            cpu = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
        result = {
            "schema": 1, "kind": "moec-transformers-speed", "date": str(date.today()), "cpu": cpu,
            "threads": torch.get_num_threads(), "moec": moec.__version__,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "model": a.model, "layers": layers, "dtype": "bf16", "prompt": a.prompt, "new": a.new,
            "blocks": a.blocks, "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""), "rows": rows,
            "level": ways.plans["accelerate"][0][0].live.layer.info.level,
        }  # fmt: skip
        with open(a.out, "w") as f:
            json.dump(result, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
