"""Checks the shape of what `moec doctor --save` wrote; no speed, only orders of magnitude."""

import json
import sys

machine = json.load(open(sys.argv[1]))
assert machine["kind"] == "moec-machine" and machine["schema"] == 1
assert machine["threads"] >= 1 and machine["cpu"]
assert set(machine["caches"]) == {"line", "l1d", "l2", "l3", "l3_total"}
flops, read = machine["flops"], machine["read"]
assert set(flops) == set(machine["flops_one"]) and set(read) == set(machine["read_one"])
assert all(isinstance(rate, int) and rate > 0 for rate in [*flops.values(), *read.values()])
assert {"plain", "prefetch"} <= set(read)
# A core that multiplies less than once a nanosecond, or a loop that was optimized away.
assert all(1e9 < rate < 1e16 for rate in flops.values()), flops
if "x86-64-v3" in machine["levels"]:
    assert {"fma_f32_128", "fma_f32_256"} <= set(flops)
if "x86-64-v4" in machine["levels"]:
    assert "fma_f32_512" in flops
