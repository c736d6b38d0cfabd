"""The code blocks of docs/worked-example.md: what moec prints for docs/example/mixtral.json.

The page is written by hand but for the fenced block after each line `<!-- shown: NAME -->`, which
is a piece of the tool's own output named here. scripts/docs.py replaces the blocks, or with --check
says that they are not what the compiler prints now.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "docs/example/mixtral.json"
BLOCK = re.compile(r"(<!-- shown: ([\w ]+) -->\n```\w*\n).*?(^```$)", re.M | re.S)
LEVEL = "x86-64-v4"
GATE_UP = "moe_gemm_v4_r14_p1_bf16_pf1024_blocked2_"


def function(text: str, name: str) -> list[str]:
    """Lines of a function of a module, signature and end included."""
    found = re.search(rf"(?ms)^  func\.func (?:private )?@{name}.*?^  \}}$", text)
    if not found:
        sys.exit(f"docs/worked-example.md: expected a function {name}, but got none")
    return found.group(0).splitlines()


def between(lines: list[str], first: str, last: str) -> list[str]:
    """From the first line that contains `first` up to the next that contains `last`."""
    begin = next((i for i, line in enumerate(lines) if first in line), None)
    if begin is None:
        sys.exit(f"docs/worked-example.md: expected a line with {first}, but got none")
    end = next((i for i in range(begin + 1, len(lines)) if last in lines[i]), len(lines) - 1)
    return lines[begin : end + 1]


def dedent(lines: list[str]) -> list[str]:
    least = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [line[least:] for line in lines]


def broken(lines: list[str], width: int = 96) -> str:
    """Long lines broken before a clause, for reading."""
    out = []
    for line in dedent(lines):
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        while len(line) > width:
            # Before a clause; where there is none, before any operand or type.
            clause = re.compile(
                r" (?=[a-z]+\(|#moe\.|-> |attributes |combine |[a-z_]+ = |%arg\d+: )"
            )
            places = [m.start() for m in clause.finditer(line, len(indent))]
            places = [p for p in places if p <= width] or [
                m.start()
                for m in re.finditer(r" (?=[%!]|tensor<)", line)
                if m.start() > len(indent)
            ]
            place = max((p for p in places if p <= width), default=min(places, default=0))
            if not place:
                break
            out.append(line[:place])
            line = indent + line[place + 1 :]
        out.append(line)
    return "\n".join(line.rstrip() for line in out)


def shown(compiler: Path) -> dict[str, str]:
    def compile_to(*options: str) -> str:
        command = [compiler, "compile", CONFIG, "--cpu", LEVEL, *options, "-o", "-", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"expected the worked example to compile, but got:\n{done.stderr}")
        return done.stdout

    text = {p: compile_to("--compile-to", p) for p in ("import", "fuse", "strategy")}
    tile = function(compile_to("--compile-to", "tile"), "f0_v4_bf16_bf16")
    kernels = compile_to("--compile-to", "kernels")
    kernel = function(kernels, GATE_UP)

    imported, fused = function(text["import"], "f0"), function(text["fuse"], "f0")
    symbols = [
        line for line in text["import"].splitlines() if re.match(r"  moe\.(weight|layer)", line)
    ]
    up = between(tile, 'moe.stage "up"', 'moe.stage "down"')
    tiles = between(up, "moe.gemm_tile", "moe.yield")
    first = up.index(tiles[0])
    # With the loop over panels around it, without the addresses made there.
    panels = max(i for i, line in enumerate(up[:first]) if "scf.for" in line)
    task = [up[panels], *up[first : first + len(tiles) + 2]]
    # The switch of the up stage is the one that calls the kernels with the activation.
    entry = function(kernels, "f0_v4_bf16_bf16")
    calls = [i for i, line in enumerate(entry) if re.search(r"blocked2_", line)]
    switch = [
        *entry[calls[0] - 2 : calls[1] + 3],
        " " * 14 + "...",
        *entry[calls[-1] - 1 : calls[-1] + 5],
    ]
    loop = [
        re.sub(r"iter_args\(.*\) -> \(.*?\)", "iter_args(...)", line)
        for line in between(kernel, "scf.for", "scf.yield")
    ]
    fences = [i for i, line in enumerate(loop) if "llvm.fence" in line]
    strategies = sorted(set(re.findall(r"#moe\.strategy<.*?>(?:, \w+ = \w+)*>", text["strategy"])))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    llvm = re.search(r"LLVM (\S+?)[,\s]", version).group(1)
    return {
        "import": broken(imported),
        "symbols": broken(symbols),
        "fuse": broken(fused[1:]),
        "strategy": broken(strategies),
        "tile": broken(task),
        "switch": broken(switch),
        "kernel": broken(loop[: fences[0] + 1]),
        "assembly": f"# LLVM {llvm}: " + inner_loop(compile_to("--emit", "asm")),
    }


def inner_loop(assembly: str) -> str:
    """The k loop of the largest tile, its middle left out."""
    body = re.search(rf"(?ms)^{GATE_UP}\w+:.*?^\.Lfunc_end", assembly).group(0).splitlines()
    first = next(i for i, line in enumerate(body) if "vfmadd" in line)
    top = max(i for i in range(first) if re.match(r"\.LBB", body[i]))
    end = next(i for i in range(first, len(body)) if re.match(r"\s+j\w+\s", body[i]))
    lines = [line.split("#")[0].rstrip() for line in body[top + 1 : end]]
    lines = ["    " + " ".join(line.split()) for line in lines if line.strip()]
    adds = sum("vfmadd231ps" in line for line in lines)
    count = f"{len(lines) + 1} instructions, {adds} of them multiply-adds"
    return "\n".join([count, "loop:", *lines[:16], "    ...", *lines[-5:], "    jne loop"])


def page(path: Path, compiler: Path, check: bool) -> str:
    """The page with its blocks as the compiler prints them now. check: assembly of another version
    of LLVM counts as current; its scheduler and registers are not ours."""
    blocks = shown(compiler)
    ours = blocks["assembly"].split(":")[0]

    def block(match: re.Match) -> str:
        if match.group(2) not in blocks:
            sys.exit(f"{path}: expected one of {', '.join(blocks)}, but got {match.group(2)}")
        if match.group(2) == "assembly" and check and ours not in match.group(0):
            return match.group(0)
        return match.group(1) + blocks[match.group(2)] + "\n" + match.group(3)

    return BLOCK.sub(block, path.read_text())


if __name__ == "__main__":
    for name, value in shown(Path(sys.argv[1])).items():
        print(f"== {name}\n{value}")
