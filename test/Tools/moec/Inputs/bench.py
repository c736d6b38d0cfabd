"""Checks the records of moec bench: a JSON array, JSON lines and CSV of the same facts."""

import csv
import json
import sys

records = json.load(open(sys.argv[1]))
assert [(r["routing"], r["tokens"]) for r in records] == [
    (routing, tokens) for routing in ("uniform", "zipf", "one-expert", "model") for tokens in (1, 5)
]
for record in records:
    assert record["schema"] == 1 and record["kind"] == "moec-bench"
    assert (record["H"], record["F"], record["E"], record["K"]) == (64, 96, 4, 2)
    assert record["banks"] == 2 and record["blocks"] == 5
    us = record["us"]
    assert 0 < us["q1"] <= us["median"] <= us["q3"]
    # What is printed follows from what was measured.
    flops = record["gflops"] * us["median"] * 1e3
    expected = 2 * record["tokens"] * (2 * 3 * 64 * 96 + 4 * 64)
    assert abs(flops / expected - 1) < 0.01, (flops, expected)
    one = 3 * 64 * 96 * 2
    assert record["weight_bytes"] >= one * 2
    assert abs(record["gbs"] / (record["weight_bytes"] / us["median"] / 1e3) - 1) < 0.01
    share = record["gflops"] / record["peak"]["gflops"]
    assert abs(record["peak"]["share"] - share) < 0.01 * share + 1e-3
    assert record["dense"]["F"] == 192 and record["dense"]["us"]["median"] > 0
    stages = [stage["stage"] for stage in record["stages"]]
    assert stages[0] == "route" and stages[-2:] == ["up", "down"], stages
    assert abs(sum(stage["share"] for stage in record["stages"]) - 1) < 0.01
    assert ("route_us" in record) == (record["routing"] != "model")
by_routing = {(r["routing"], r["tokens"]): r for r in records}
one = by_routing["one-expert", 5]
assert one["experts_used"] == 2 and one["largest_expert"] == 5
assert by_routing["uniform", 5]["experts_used"] > 2

lines = [json.loads(line) for line in open(sys.argv[2])]
assert [r["tokens"] for r in lines] == [1, 5]
assert all(r["compute"] == "f32" and r["threads"] == 1 for r in lines)
assert all([s["stage"] for s in r["stages"]][-1] == "down" for r in lines)

rows = list(csv.DictReader(open(sys.argv[3])))
assert [row["tokens"] for row in rows] == ["1", "5"]
assert all(float(row["us.median"]) > 0 and "dense.F" not in row for row in rows)
assert all("down=" in row["stages"] for row in rows)
