"""Writes a Mixtral checkpoint folder with the standard library alone: name, H, F, E, K.

A folder called `nan` gets a NaN in layer 1, expert 2, w2 at [5, 7]; one called `hub` is laid out as
the Hugging Face cache does it, with links into blobs.
"""

import json
import os
import random
import struct
import sys
from pathlib import Path

name = sys.argv[1]
H, F, E, K = map(int, sys.argv[2:])
layers = 3
config = {
    "model_type": "mixtral",
    "hidden_size": H,
    "intermediate_size": F,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "num_hidden_layers": layers,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
generator = random.Random(0)
tensors = {}
for layer in range(layers):
    prefix = f"model.layers.{layer}.block_sparse_moe"
    shapes = {f"{prefix}.gate.weight": (E, H)}
    for expert in range(E):
        for part, shape in (("w1", (F, H)), ("w3", (F, H)), ("w2", (H, F))):
            shapes[f"{prefix}.experts.{expert}.{part}.weight"] = shape
    for tensor, (rows, cols) in shapes.items():
        # bf16 of magnitudes 2^-4 to 2^-2
        values = [
            generator.randrange(0x3D80, 0x3E80) | generator.choice((0, 0x8000))
            for _ in range(rows * cols)
        ]
        if name == "nan" and tensor.endswith("layers.1.block_sparse_moe.experts.2.w2.weight"):
            values[5 * cols + 7] = 0x7FC0
        tensors[tensor] = (rows, cols, struct.pack(f"<{len(values)}H", *values))
header, data = {}, b""
for tensor, (rows, cols, raw) in tensors.items():
    header[tensor] = {
        "dtype": "BF16",
        "shape": [rows, cols],
        "data_offsets": [len(data), len(data) + len(raw)],
    }
    data += raw
text = json.dumps(header).encode()
files = {
    "config.json": json.dumps(config).encode(),
    "model.safetensors": struct.pack("<Q", len(text)) + text + data,
}
if name == "hub":
    base = Path("models--tiny--mixtral")
    folder = base / "snapshots" / "0123abcd"
    (base / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, (file, content) in enumerate(files.items()):
        (base / "blobs" / f"blob{number}").write_bytes(content)
        os.symlink(f"../../blobs/blob{number}", folder / file)
else:
    Path(name).mkdir()
    for file, content in files.items():
        (Path(name) / file).write_bytes(content)
