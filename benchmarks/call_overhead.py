"""What one call from Python costs beside the arithmetic: calls of no tokens return at once.

    python benchmarks/call_overhead.py

layer             library.layers[0](x)
experts           library.layers[0].experts(x, ids, w)
live              the same through weights that are compared at each call (moec.transformers)
operation         torch.ops.moec.run(x, name, ids, w), as autograd and torch.compile see it
"""

from __future__ import annotations

import statistics
import timeit

import moec.transformers as mt
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts


def main() -> None:
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
        "operation": lambda: torch.ops.moec.run(x, name, ids, w),
        "empty function": lambda: None,
    }
    seen: dict[str, list[float]] = {key: [] for key in calls}
    with torch.no_grad():
        for _ in range(31):
            for key, call in calls.items():
                seen[key].append(timeit.timeit(call, number=2000) / 2000 * 1e6)
    print("| call | us, median | lower quartile |\n| --- | ---: | ---: |")
    for key, values in seen.items():
        low = statistics.quantiles(values, n=4)[0]
        print(f"| {key} | {statistics.median(values):.2f} | {low:.2f} |")


if __name__ == "__main__":
    main()
