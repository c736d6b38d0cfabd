"""Draws a result file of run.py: SVG pictures and a table in Markdown.

    python benchmarks/plots.py benchmarks/results/FILE.json [FILE.json ...] --out docs/plots

Several files must be of one machine; a picture shows the rows of all. For every shape, dtype and
routing: time of a call against T with the roof of the machine (SHAPE-DTYPE-ROUTING-time.svg, from
two T on), other libraries' time over moec's (…-ratio.svg), and moec over its own dense FFN of equal
active parameters with the least that the roof allows (…-dense.svg). The table goes to stdout. Needs
the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import groupby
from pathlib import Path

# Told apart without colour vision as well: Okabe and Ito's palette.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000"]
ORDER = [
    "moec",
    "moec-dense",
    "vllm",
    "vllm-vec",
    "kt",
    "ggml",
    "onnxruntime",
    "hf-grouped",
    "hf-eager",
    "torch-dense",
    "read",
]
DENSE = {"moec-dense", "torch-dense"}


class Picture:
    """An SVG being written, on a white ground for dark pages too."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="12" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]
        self.text(width / 2, 18, title, anchor="middle", size=13)

    def text(self, x, y, text, anchor="start", size=12, fill="#222"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{fill}">{text}</text>'
        )

    def line(self, points, colour, width=2.0, dash=""):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{dashed}/>'
        )

    def dot(self, x, y, colour):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')

    def bar(self, x, y, width, height, colour):
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )

    def save(self, path: Path):
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def place(peer: str) -> tuple[int, str]:
    """`moec@LEVEL` comes last: it is no library beside moec."""
    return (ORDER.index(peer) if peer in ORDER else len(ORDER), peer)


def colour(peer: str) -> str:
    return COLOURS[place(peer)[0] % len(COLOURS)]


def peers_of(rows) -> list[str]:
    return sorted({row["peer"] for row in rows}, key=place)


def time_picture(rows, title: str) -> Picture:
    """Time against T, both logarithmic."""
    width, height, left, right, top, bottom = 720, 420, 70, 150, 40, 50
    picture = Picture(width, height, title)
    tokens = sorted({row["tokens"] for row in rows})
    values = [v for row in rows for v in (row["ms"]["median"], row["roof_ms"])]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = math.log2(tokens[0]), max(math.log2(tokens[-1]), math.log2(tokens[0]) + 1)

    def x(t):
        return left + (math.log2(t) - first) / (last - first) * (width - left - right)

    def y(ms):
        return top + (high - math.log10(ms)) / (high - low) * (height - top - bottom)

    for power in range(low, high + 1):
        at = y(10.0**power)
        picture.line([(left, at), (width - right, at)], "#dddddd", 1)
        picture.text(left - 8, at + 4, f"{10.0**power:g}", anchor="end")
    for t in tokens:
        picture.text(x(t), height - bottom + 18, str(t), anchor="middle")
    picture.text((left + width - right) / 2, height - 12, "tokens T", anchor="middle")
    picture.text(12, top - 8, "ms a call")
    legend = top + 10
    for peer in peers_of(rows):
        line = sorted((r for r in rows if r["peer"] == peer), key=lambda r: r["tokens"])
        points = [(x(r["tokens"]), y(r["ms"]["median"])) for r in line]
        picture.line(points, colour(peer), 2.5 if peer == "moec" else 1.5)
        for point, row in zip(points, line, strict=True):
            picture.dot(*point, colour(peer))
            quartile = [(point[0], y(row["ms"][q])) for q in ("q1", "q3")]
            picture.line(quartile, colour(peer), 1)
        picture.line([(width - right + 12, legend), (width - right + 32, legend)], colour(peer), 3)
        picture.text(width - right + 38, legend + 4, peer)
        legend += 18
    roof = sorted((r for r in rows if r["peer"] not in DENSE), key=lambda r: r["tokens"])
    points = [(x(r["tokens"]), y(r["roof_ms"])) for r in roof]
    picture.line(points, "#222222", 1, dash="5 4")
    picture.line([(width - right + 12, legend), (width - right + 32, legend)], "#222", 1, "5 4")
    picture.text(width - right + 38, legend + 4, "roof of the layer")
    return picture


def bars(title: str, unit: str, groups, mark=None) -> Picture:
    """groups: (label, [(name, value, low, high, colour)]). A line at 1."""
    count = sum(len(items) for _, items in groups) + len(groups)
    height = 60 + 18 * count
    width, left, right = 720, 200, 70
    picture = Picture(width, height, title)
    most = max(high for _, items in groups for _, _, _, high, _ in items)
    most = max(1.2, most)

    def x(value):
        return left + value / most * (width - left - right)

    at = 34
    for label, items in groups:
        picture.text(12, at + 13, label)
        for name, value, low, high, fill in items:
            picture.text(left - 8, at + 13, name, anchor="end")
            picture.bar(left, at + 3, max(1, x(value) - left), 12, fill)
            picture.line([(x(low), at + 9), (x(high), at + 9)], "#222222", 1)
            picture.text(max(x(value), x(high)) + 5, at + 13, f"{value:.2f}", size=11)
            if mark and (label, name) in mark:
                bound = x(mark[label, name])
                picture.line([(bound, at + 1), (bound, at + 17)], "#d55e00", 2)
            at += 18
        at += 18
    picture.line([(x(1), 28), (x(1), at - 10)], "#222222", 1, dash="3 3")
    picture.text(left, height - 8, unit, size=11)
    return picture


def ratio_picture(rows, title: str) -> Picture | None:
    groups = []
    for tokens in sorted({row["tokens"] for row in rows}):
        items = []
        for peer in peers_of(rows):
            for row in rows:
                if row["tokens"] == tokens and row["peer"] == peer and "over_moec" in row:
                    if peer in DENSE or peer == "read":
                        continue
                    r = row["over_moec"]
                    items.append((peer, r["median"], r["q1"], r["q3"], colour(peer)))
        if items:
            groups.append((f"T = {tokens}", items))
    unit = "their time over moec's: right of the line moec is faster (line on a bar: quartiles)"
    return bars(title, unit, groups) if groups else None


def dense_picture(rows, title: str) -> Picture | None:
    groups, mark = [], {}
    for tokens in sorted({row["tokens"] for row in rows}):
        at = {row["peer"]: row for row in rows if row["tokens"] == tokens}
        items = []
        for dense in ("moec-dense", "torch-dense"):
            if dense not in at or "over_moec" not in at[dense]:
                continue
            r = at[dense]["over_moec"]
            name = "over " + dense
            items.append((name, 1 / r["median"], 1 / r["q3"], 1 / r["q1"], colour(dense)))
            mark[f"T = {tokens}", name] = at["moec"]["roof_ms"] / at[dense]["ms"]["median"]
        if items:
            groups.append((f"T = {tokens}", items))
    unit = "moec's layer over the dense FFN; the tick is the least that the roof allows"
    return bars(title, unit, groups, mark) if groups else None


def table(rows) -> str:
    lines = [
        "| T | library | ms (quartiles) | GFLOP/s | of roof | over moec (quartiles) | error |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda r: (r["tokens"], r["ms"]["median"])):
        ms, ratio = row["ms"], row.get("over_moec")
        over = f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else "-"
        error = f"{row['error']:.1e}" if row.get("error") is not None else "-"
        lines.append(
            f"| {row['tokens']} | {row['peer']} | {ms['median']:.4g} ({ms['q1']:.4g}-"
            f"{ms['q3']:.4g}) | {row['gflops']:.0f} | {100 * row['roof_share']:.0f} % | {over} "
            f"| {error} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of benchmarks/results")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    for path, result in zip(options.results, results, strict=True):
        if result.get("kind") != "moec-benchmarks" or result.get("schema") != 1:
            sys.exit(f"expected a result of run.py, schema 1, but got {path}")
        for what, first, other in (
            ("machine", results[0]["machine"]["cpu"], result["machine"]["cpu"]),
            ("threads", results[0]["threads"], result["threads"]),
        ):
            if first != other:
                sys.exit(f"{path}: expected the {what} of the first file, {first}, but got {other}")
    result = results[0]
    rows = [row for part in results for row in part["rows"]]
    absent = [entry for part in results for entry in part["absent"]]
    options.out.mkdir(parents=True, exist_ok=True)

    def key(row):
        return row["shape"], row["dtype"], row["routing"]

    for (shape, dtype, routing), group in groupby(sorted(rows, key=key), key):
        shown = list(group)
        one = shown[0]
        name = f"{shape} {dtype} {routing}"
        sizes = (
            f"H {one['H']}, F {one['F']}, E {one['E']}, K {one['K']}, {result['threads']} threads"
        )
        title = f"{name}: {sizes}, {result['machine']['cpu']}, {result['date']}"
        stem = f"{shape}-{dtype}-{routing}"
        several = len({row["tokens"] for row in shown}) > 1
        pictures = [("time", time_picture)] if several else []
        for kind, draw in [*pictures, ("ratio", ratio_picture), ("dense", dense_picture)]:
            picture = draw(shown, title)
            if picture:
                picture.save(options.out / f"{stem}-{kind}.svg")
        print(f"### {name}\n\n{sizes}\n\n{table(shown)}\n")
    for entry in absent:
        print(f"absent: {entry['peer']} ({entry['shape']}, {entry['dtype']}): {entry['why']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
