"""Peak memory of accelerate(model, weights="drop") on a model that fills half of memory.

    python benchmarks/drop_memory.py [--gb 11] [--model olmoe]

A random bf16 model of OLMoE's width with as many layers as fill the wanted part of memory. Printed:
resident memory before, the peak while it is accelerated (the kernel's own count, reset before),
after, after a generate and after restore; pages that the system swapped out meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import time

import moec.transformers as mt
import torch
from transformers_speed import MODELS, make


def resident() -> tuple[float, float]:
    """(now, peak since it was reset) in GB."""
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return tuple(int(fields[key].split()[0]) * 1024 / 1e9 for key in ("VmRSS", "VmHWM"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def swapped() -> int:
    with open("/proc/vmstat") as f:
        return int(dict(line.split() for line in f)["pswpout"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gb", type=float, help="size of the model; default: half of memory")
    p.add_argument("--model", choices=MODELS, default="olmoe")
    a = p.parse_args()
    with open("/proc/meminfo") as f:
        total = int(dict(line.split(":", 1) for line in f)["MemTotal"].split()[0]) * 1024
    wanted = a.gb * 1e9 if a.gb else total / 2
    sizes = MODELS[a.model][1]
    experts = sizes.get("num_experts") or sizes["num_local_experts"]
    layer = 3 * experts * sizes["hidden_size"] * sizes["intermediate_size"] * 2
    layers = max(1, round(wanted / layer))
    model = make(a.model, layers)
    weights = sum(p.nbytes for p in model.parameters()) / 1e9
    print(f"memory {total / 1e9:.1f} GB, model {weights:.2f} GB, {layers} layers")
    print(f"one layer's experts: {layer / 1e9:.2f} GB")
    before, _ = resident()
    pages = swapped()
    reset_peak()
    begin = time.monotonic()
    report = mt.accelerate(model, weights="drop")
    seconds = time.monotonic() - begin
    if not report.done:
        sys.exit(str(report))
    now, peak = resident()
    print(f"before   {before:6.2f} GB")
    print(f"peak     {peak:6.2f} GB: {peak - before:.2f} more, in {seconds:.1f} s")
    print(f"after    {now:6.2f} GB")
    with torch.inference_mode():
        ids = torch.arange(16)[None]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    print(f"generate {resident()[0]:6.2f} GB")
    reset_peak()
    mt.restore(model)
    now, peak = resident()
    print(f"restore  {now:6.2f} GB, peak {peak:.2f}")
    print(f"pages swapped out: {swapped() - pages}")


if __name__ == "__main__":
    main()
