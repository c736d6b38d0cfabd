"""rows.jsonl of run.sh as a page: what every row took, of what this machine can reach.

python table.py ROWS.jsonl
"""

import json
import sys

PEERS = ["grouped_mm", "triton", "transformers"]


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
    for r in rows:
        for key in ("failed", "refused", "absent"):
            if key in r:
                where = f", {r['model']}" if "model" in r else ""
                lines.append(f"\n{key}: {r[key]}{where}: {r['why']}")
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table([json.loads(line) for line in file if line.strip()]))
