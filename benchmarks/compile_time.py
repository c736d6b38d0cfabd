"""Time and size of compiling a whole model's code, weights left out.

    python benchmarks/compile_time.py [--build build] [--rounds 5]

`moec compile` of the configuration of Mixtral-8x7B (32 layers, H 4096, F 14336, E 8): every level
in one library, and single levels. Prints the median and quartiles of the wall time, the
processors' time, and the bytes of the library. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--levels", default="multi,x86-64-v4,avx512-bf16")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    options = parser.parse_args()
    levels = options.levels.split(",")
    times: dict = {level: [] for level in levels}
    used: dict = {level: [] for level in levels}
    sizes = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        config = CONFIG | {"num_hidden_layers": options.layers}
        (folder / "config.json").write_text(json.dumps(config))
        for number in range(options.rounds + 1):  # the first warms the page cache and is left out
            for level in levels:
                out = folder / "out.moec"
                command = [options.build / "bin/moec", "compile", folder / "config.json", "-o", out]
                command += ["--checkpoint", "none", "--cpu", level, "--force", "--quiet"]
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                begin = time.perf_counter()
                subprocess.run(command, check=True)
                seconds = time.perf_counter() - begin
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                if number:
                    times[level].append(seconds)
                    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                    used[level].append(busy)
                sizes[level] = sum(f.stat().st_size for f in out.glob("*.so"))
    print("| levels | seconds (quartiles) | of processors | library, kB |")
    print("| --- | ---: | ---: | ---: |")
    for level in levels:
        ordered = sorted(times[level])
        low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        middle, busy = statistics.median(ordered), statistics.median(used[level])
        print(
            f"| {level} | {middle:.2f} ({low:.2f}-{high:.2f}) | {busy:.2f} "
            f"| {sizes[level] / 1e3:.0f} |"
        )


if __name__ == "__main__":
    main()
