"""llama.cpp's MoE graph through libggml: three mul_mat_id, swiglu, weights, sum.

The graph is built by a small program (ggml_layer.cpp, made by setup_peers.sh) that speaks the
protocol of its own: "T calls first" on stdin, seconds on stdout. It lays weights out as llama.cpp's
loader does: in the first buffer type of the CPU device that supports the operation.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from layer import Layer
from serve import Absent


class Peer:
    def __init__(self, name: str, layer: Layer, run: dict):
        program = Path(os.environ.get("MOEC_PEERS", "")) / "ggml_layer"
        if not program.is_file():
            raise Absent(
                f"expected the program {program}, but got none", "benchmarks/setup_peers.sh DIR"
            )
        self.folder = tempfile.TemporaryDirectory()
        self.layer, self.path = layer, Path(self.folder.name)
        with open(self.path / "weights", "wb") as out:
            for e in range(layer.E):
                up, down = layer.expert(e)
                for matrix in (*np.split(up, 2), down):
                    out.write(np.ascontiguousarray(matrix).tobytes())
        sizes = [layer.H, layer.F, layer.E, layer.K, layer.dtype, run["threads"], layer.banks]
        self.process = subprocess.Popen(
            [program, *map(str, sizes), self.path / "weights"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.note = self.process.stdout.readline().strip()
        os.unlink(self.path / "weights")
        if not self.note:
            raise Absent("the program ended early")
        self.version = "ggml of llama-cpp-python 0.3.36"

    def prepare(self, x, ids, weights):
        path = self.path / f"input-{len(list(self.path.iterdir()))}"
        path.write_bytes(x.tobytes() + ids.tobytes() + weights.tobytes())
        return path, len(x)

    def run(self, item, bank, keep=True):
        path, tokens = item
        self.process.stdin.write(f"{path} {tokens} {bank} {int(keep)}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the program ended")
        if keep:
            out = np.fromfile(str(path) + ".out", np.float32)
            return out.reshape(tokens, self.layer.H)
        return None
