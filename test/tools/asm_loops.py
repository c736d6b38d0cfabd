#!/usr/bin/env python3
"""Reads x86 assembly (AT&T, as LLVM prints it) and reports the innermost loops of each function.

usage: asm_loops.py FILE [--function REGEX] [--json]
                    [--max-spills N] [--registers zmm|ymm] [--no-calls] [--min-functions N]
                    [--max-ratio X] [--only MNEMONIC] [--count MNEMONIC=N] [--first]

For every innermost loop: instructions, fused multiply-adds, vector loads, prefetches, calls, spills
and reloads (LLVM's own comments: a memory operand on the stack may be something else), and the
widest vector register. --first keeps each function's first loop with multiply-adds, which in a
kernel is the k loop (the next is the polynomial of its activation). With a limit the exit code is
1 if a loop with multiply-adds breaks it, and the loop is printed. --min-functions fails when fewer
functions with such a loop were found than expected, so that an empty file cannot pass. --only:
every multiply-add is this instruction. --count: so many of this instruction in a loop.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass, field

LABEL = re.compile(r"^([\w.$@]+):")
JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
FMA = re.compile(r"^\s+vfn?m(add|sub)\d*[ps][sdh]\b|^\s+v?dpbf16ps|^\s+tdp")


@dataclass
class Loop:
    function: str
    label: str
    instructions: int = 0
    fma: int = 0
    loads: int = 0
    prefetches: int = 0
    calls: int = 0
    mnemonics: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)
    spills: int = 0
    reloads: int = 0
    register: str = ""
    text: list = field(default_factory=list, repr=False)

    @property
    def ratio(self):
        """Instructions per multiply-add."""
        return self.instructions / self.fma if self.fma else float("inf")


def functions(lines):
    """Yields (name, lines) of every function."""
    name, body, types = None, [], set()
    for line in lines:
        match = re.match(r"\s+\.type\s+([\w.$]+),@function", line)
        if match:
            types.add(match.group(1))
        match = LABEL.match(line)
        if match and match.group(1) in types:
            name, body = match.group(1), []
        elif name is not None:
            if line.startswith(".Lfunc_end"):
                yield name, body
                name = None
            else:
                body.append(line)


def innermost_loops(name, body):
    """Loops of a function that contain no other: the text between a label and a jump back to it."""
    labels = {}
    spans = []
    for at, line in enumerate(body):
        match = LABEL.match(line)
        if match:
            labels[match.group(1)] = at
        match = JUMP.match(line)
        if match and match.group(1) in labels:
            spans.append((labels[match.group(1)], at, match.group(1)))
    for begin, end, label in spans:
        inner = any(
            begin <= b and e <= end and (b, e) != (begin, end) and b != begin for b, e, _ in spans
        )
        # Two jumps back to one label are one loop: keep the longer.
        longer = any(b == begin and e > end for b, e, _ in spans)
        if not inner and not longer:
            yield scan(name, label, body[begin : end + 1])


def scan(name, label, lines):
    loop = Loop(name, label)
    widest = 0
    for line in lines:
        code, _, comment = line.partition("#")
        if not code.startswith("\t") or code.strip().startswith(".") or not code.strip():
            continue
        loop.text.append(line.rstrip())
        loop.instructions += 1
        mnemonic = code.split()[0]
        if FMA.match(code):
            loop.fma += 1
            loop.mnemonics = sorted({*loop.mnemonics, mnemonic})
            loop.counts[mnemonic] = loop.counts.get(mnemonic, 0) + 1
        loop.calls += mnemonic.startswith("call")
        loop.prefetches += mnemonic.startswith("prefetch")
        loop.spills += "Spill" in comment
        loop.reloads += "Reload" in comment
        for i, register in enumerate(("%xmm", "%ymm", "%zmm")):
            if register in code:
                widest = max(widest, i + 1)
        # The destination comes last: a memory operand before it is a load.
        sources = code.rsplit(",", 1)[0] if "," in code else ""
        if mnemonic.startswith("v") and "(" in sources and not code.rstrip().endswith(")"):
            loop.loads += 1
    loop.register = ("", "xmm", "ymm", "zmm")[widest]
    return loop


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file")
    parser.add_argument("--function", default="", help="functions whose name matches")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--max-spills", type=int)
    parser.add_argument("--registers", choices=("zmm", "ymm"))
    parser.add_argument("--no-calls", action="store_true")
    parser.add_argument("--min-functions", type=int, default=0)
    parser.add_argument("--max-ratio", type=float, help="instructions per multiply-add")
    parser.add_argument("--only", help="the mnemonic of every multiply-add")
    parser.add_argument("--count", help="MNEMONIC=N: so many of this multiply-add in a loop")
    parser.add_argument("--first", action="store_true", help="the first such loop of a function")
    args = parser.parse_args()

    with open(args.file, encoding="utf-8") as file:
        lines = file.read().splitlines()
    loops = [
        loop
        for name, body in functions(lines)
        if re.search(args.function, name)
        for loop in innermost_loops(name, body)
        if loop.fma
    ]
    if args.first:
        loops = list({loop.function: loop for loop in reversed(loops)}.values())[::-1]
    bad = []
    for loop in loops:
        why = []
        if args.max_spills is not None and loop.spills + loop.reloads > args.max_spills:
            why.append(f"{loop.spills} spills and {loop.reloads} reloads")
        if args.registers and loop.register != args.registers:
            why.append(f"expected {args.registers}, but got {loop.register}")
        if args.no_calls and loop.calls:
            why.append(f"{loop.calls} calls")
        if args.count:
            mnemonic, _, number = args.count.partition("=")
            if loop.counts.get(mnemonic, 0) != int(number):
                got = loop.counts.get(mnemonic, 0)
                why.append(f"expected {number} {mnemonic}, but got {got}")
        if args.only and loop.mnemonics != [args.only]:
            why.append(f"expected {args.only} alone, but got {', '.join(loop.mnemonics)}")
        if args.max_ratio and loop.ratio > args.max_ratio:
            why.append(f"{loop.ratio:.2f} instructions per multiply-add")
        if why:
            bad.append((loop, why))
    if args.json:
        keep = [{k: v for k, v in asdict(loop).items() if k != "text"} for loop in loops]
        json.dump(keep, sys.stdout, indent=1)
        print()
    else:
        for loop in loops:
            print(
                f"{loop.function} {loop.label}: {loop.instructions} instructions, {loop.fma} fma "
                f"({loop.ratio:.2f}), {loop.loads} loads, {loop.prefetches} prefetches, "
                f"{loop.calls} calls, {loop.spills} spills, {loop.reloads} reloads, {loop.register}"
            )
    for loop, why in bad:
        print(f"FAILED: {loop.function} {loop.label}: {', '.join(why)}", file=sys.stderr)
        for line in loop.text:
            print(f"  {line}", file=sys.stderr)
    found = len({loop.function for loop in loops})
    if found < args.min_functions:
        print(
            f"FAILED: expected at least {args.min_functions} functions with a loop of multiply-adds"
            f", but got {found}",
            file=sys.stderr,
        )
        return 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
