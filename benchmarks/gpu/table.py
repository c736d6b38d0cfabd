"""rows.jsonl of run.sh as a page: what every row took, of what this machine can reach.

python table.py ROWS.jsonl
"""

import json
import sys

PEERS = ["grouped_mm", "triton", "transformers"]


def ladder(ours, times, dense):
    """The rungs of the ladder: what is wanted, and by how many of the rows that could say so."""
    routed = {key: r for key, r in ours.items() if not key[0].startswith("dense-") and r["K"] > 0}

    def rung(name, wanted, values):
        values = [(value, key) for value, key in values if value]
        if not values:
            return f"{name}: not measured"
        good = sum(value >= wanted for value, _ in values)
        least, (model, T) = min(values)
        verdict = "pass" if good == len(values) else "fail"
        return f"{name}: {verdict}, {good} of {len(values)}; least {least:.2f} ({model}, T = {T})"

    def rate(key, r):
        return r["tflops"] / dense if dense else None

    def peer(key, r):
        other = times.get(("grouped_mm", *key))
        return other / r["us"] if other and r["us"] else None

    many = {k: r for k, r in routed.items() if k[1] * r["K"] >= 512 * r["E"]}
    checked = [(1.0 if r["error"] <= 8e-3 else 0.0, k) for k, r in ours.items() if r["error"] >= 0]
    verdict = "pass" if checked and min(checked)[0] else "fail" if checked else "not measured"
    lines = [
        f"correct: {verdict}, {len(checked)} rows checked",
        rung("dense at T >= 2048, of cuBLAS >= 0.85", 0.85, [
            (rate(k, r), k) for k, r in ours.items() if k[0].startswith("dense-") and k[1] >= 2048
        ]),
        rung("layer with >= 512 rows an expert, of cuBLAS >= 0.80", 0.80,
             [(rate(k, r), k) for k, r in many.items()]),
        rung("layer at T >= 2048, of torch's grouped_mm >= 1.2", 1.2,
             [(peer(k, r), k) for k, r in routed.items() if k[1] >= 2048]),
        rung("layer at T from 8 to 256, of the memory floor >= 0.80", 0.80, [
            (r["floor_us"] / r["us"] if r["us"] else None, k)
            for k, r in routed.items() if 8 <= k[1] <= 256
        ]),
    ]  # fmt: skip
    return ["", "Ladder:", "", *(f"- {line}" for line in lines)]


def table(rows):
    """The page. `rows`: what the programs printed, in any order."""
    device = next((r for r in rows if "device" in r), {"device": "no device", "copy_gbs": 0})
    dense = max((r["tflops"] for r in rows if r.get("peer") == "dense matmul"), default=None)
    times = {(r["peer"], r["model"], r["T"]): r["us"] for r in rows if "peer" in r and "T" in r}
    ours = {(r["model"], r["T"]): r for r in rows if "us_without_graph" in r}
    lines = [f"{device['device']}: copies at {device['copy_gbs']:.0f} GB/s"]
    if dense:
        lines[0] += f", dense bf16 matmul at {dense:.0f} TFLOP/s (cuBLAS)"
    heads = ["model", "T", "us", "quartiles", "no graph", "TFLOP/s", "of cuBLAS"]
    heads += ["of memory floor", *(f"x {peer}" for peer in PEERS), "MoE / dense", "error"]
    lines += ["", f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]

    def ratio(a, b):
        return f"{a / b:.2f}" if a and b else "-"

    for (model, T), r in ours.items():
        if model.startswith("dense-"):
            continue
        twin = ours.get((f"dense-{model}", T))
        cells = [model, T, f"{r['us']:.1f}", f"{r['us_low']:.1f}-{r['us_high']:.1f}"]
        cells += [f"{r['us_without_graph']:.1f}", f"{r['tflops']:.1f}"]
        cells.append(f"{r['tflops'] / dense:.0%}" if dense else "-")
        cells.append(f"{r['floor_us'] / r['us']:.0%}" if r["floor_us"] and r["us"] else "-")
        cells += [ratio(times.get((peer, model, T)), r["us"]) for peer in PEERS]
        cells.append(ratio(r["us"], twin and twin["us"]))
        cells.append(f"{r['error']:.1e}" if r["error"] >= 0 else "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ladder(ours, times, dense)
    for r in rows:
        for key in ("failed", "refused", "absent"):
            if key in r:
                where = f", {r['model']}" if "model" in r else ""
                lines.append(f"\n{key}: {r[key]}{where}: {r['why']}")
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table([json.loads(line) for line in file if line.strip()]))
