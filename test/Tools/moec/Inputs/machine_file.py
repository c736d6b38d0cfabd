"""Writes a machine file: machine_file.py FILE L2_BYTES LEVEL... [slow]"""

import json
import sys

file, l2, *levels = sys.argv[1:]
slow = "slow" in levels
levels = [level for level in levels if level != "slow"]
flops = {"fma_f32_256": 1e11, "fma_f32_512": 2e11, "dpbf16_512": 2e11 if slow else 4e11}
machine = {
    "schema": 1,
    "kind": "moec-machine",
    "moec": "0.1.0",
    "cpu": "test machine",
    "threads": 2,
    "caches": {"line": 64, "l1d": 32768, "l2": int(l2), "l3": 0, "l3_total": 0},
    "levels": levels,
    "flops": flops,
    "flops_one": flops,
    "read": {"plain": 1e10},
    "read_one": {"plain": 1e10},
    "fork_ns": 1000,
}
with open(file, "w") as out:
    json.dump(machine, out)
