"""rows.jsonl of run.sh as a page: what every row took, of what this machine can reach.

python table.py ROWS.jsonl
"""

import json
import sys


def table(rows):
    """The page. `rows`: what the programs printed, in any order."""
    device = next((r for r in rows if "device" in r), {"device": "no device", "copy_gbs": 0})
    dense = max((r["tflops"] for r in rows if r.get("peer") == "dense matmul"), default=None)
    grouped = {(r["model"], r["T"]): r["us"] for r in rows if r.get("peer") == "torch grouped_mm"}
    lines = [f"{device['device']}: copies at {device['copy_gbs']:.0f} GB/s"]
    if dense:
        lines[0] += f", dense bf16 matmul at {dense:.0f} TFLOP/s (cuBLAS)"
    lines += [
        "",
        "| model | T | us | quartiles | no graph | TFLOP/s | of cuBLAS | of memory floor"
        " | x torch grouped_mm | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        if "us_without_graph" not in r:
            continue
        share = f"{r['tflops'] / dense:.0%}" if dense else "-"
        floor = f"{r['floor_us'] / r['us']:.0%}" if r["floor_us"] and r["us"] else "-"
        other = grouped.get((r["model"], r["T"]))
        ratio = f"{other / r['us']:.2f}" if other and r["us"] else "-"
        error = f"{r['error']:.1e}" if r["error"] >= 0 else "-"
        lines.append(
            f"| {r['model']} | {r['T']} | {r['us']:.1f} | {r['us_low']:.1f}-{r['us_high']:.1f} |"
            f" {r['us_without_graph']:.1f} | {r['tflops']:.1f} | {share} | {floor} | {ratio} |"
            f" {error} |"
        )
    for r in rows:
        for key in ("failed", "refused", "absent"):
            if key in r:
                lines.append(f"\n{key}: {r[key]}: {r['why']}")
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table([json.loads(line) for line in file if line.strip()]))
