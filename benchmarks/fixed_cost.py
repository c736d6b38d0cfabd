"""The fixed cost of a call: the smallest layer through the C interface, warm threads.

    python benchmarks/fixed_cost.py [--build build] [--threads 1,2]

H = F = 32, E = 8, K = 2, T = 1, f32. Compiles the layer and fixed_cost.c, runs them, and prints the
median over 101 blocks of 1000 calls. Run it with nothing else on the machine.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "dtype": "float32",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--calls", type=int, default=1000, help="calls a block")
    options = parser.parse_args()
    libraries = options.build.resolve() / "lib"
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        moec = [options.build / "bin" / "moec", "compile", folder / "config.json", "--quiet"]
        subprocess.run([*moec, "--checkpoint=random:1", "-o", folder / "tiny.moec"], check=True)
        program = folder / "fixed_cost"
        source = ROOT / "benchmarks" / "fixed_cost.c"
        flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic"]
        where = [f"-I{ROOT / 'include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lmoec"]
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *flags, source, *where, "-o", program], check=True)
        for threads in options.threads.split(","):
            print(f"{threads} thread{'s' if threads != '1' else ''}", flush=True)
            subprocess.run([program, folder / "tiny.moec", threads, str(options.calls)], check=True)


if __name__ == "__main__":
    main()
