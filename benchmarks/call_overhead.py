"""What one call from Python costs beside the arithmetic: calls of no tokens return at once.

    python benchmarks/call_overhead.py

layer             library.layers[0](x)
experts           library.layers[0].experts(x, ids, w)
live              the same through weights that are compared at each call (moec.transformers)
operation         torch.ops.moec.run(x, name, ids, w), as autograd and torch.compile see it
empty operation   an operation of torch.library of the same form that makes an empty tensor
"""

from __future__ import annotations

import argparse
import statistics
import timeit

import moec.transformers as mt
import torch
from moec import torch_op
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts


def make_empty() -> torch._ops.OpOverload:
    """What torch takes for any operation that Python implements and that has a backward."""
    library = torch.library.Library("moec_empty", "DEF")
    form = "(Tensor x, str layer, Tensor? experts=None, Tensor? weights=None, Tensor? anchor=None)"
    library.define(f"run{form} -> Tensor")
    library.impl("run", lambda x, *_: x.new_empty(x.shape), "CPU")
    torch.library.register_autograd("moec_empty::run", lambda *_: None, lib=library)
    make_empty.library = library  # lives as long as the program
    return torch.ops.moec_empty.run.default


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--blocks", type=int, default=31)
    p.add_argument("--calls", type=int, default=2000, help="in a block, of each kind")
    a = p.parse_args()
    empty = make_empty()
    config = MixtralConfig(hidden_size=32, intermediate_size=32, num_local_experts=8)
    config._experts_implementation = "moec"
    experts = MixtralExperts(config).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    x, w = torch.zeros(0, 32), torch.zeros(0, 2)
    mt._make_live(experts).prepare()
    live = experts.__dict__["_moec_live"]
    name, layer = experts.__dict__["_moec_name"], live.layer
    calls = {
        "layer": lambda: layer(x),
        "experts": lambda: layer.experts(x, ids, w),
        "live": lambda: live.experts(x, ids, w),
        "operation": lambda: torch_op.run(x, name, ids, w),
        "empty operation": lambda: empty(x, name, ids, w),
        "empty function": lambda: None,
    }
    seen: dict[str, list[float]] = {key: [] for key in calls}
    with torch.no_grad():
        for _ in range(a.blocks):
            for key, call in calls.items():
                seen[key].append(timeit.timeit(call, number=a.calls) / a.calls * 1e6)
    print("| call | us, median | lower quartile |\n| --- | ---: | ---: |")
    for key, values in seen.items():
        low = statistics.quantiles(values, n=4)[0]
        print(f"| {key} | {statistics.median(values):.2f} | {low:.2f} |")


if __name__ == "__main__":
    main()
