"""Writes a usage file by hand (not by moec): layers 2 and 10, four experts."""

import json
import struct
import sys

layers = {
    "model.layers.2.mlp": ([2, 2, 2, 2], [[0, 1], [2, 3], [0, 1], [2, 3]]),
    "model.layers.10.mlp": ([8, 0, 0, 0], [[0, 0]] * 4),
}
schema = sys.argv[2] if len(sys.argv) > 2 else "1"
header = {"__metadata__": {"format": "moec-usage", "schema": schema, "model": "tiny"}}
data = b""
for name, (counts, experts) in layers.items():
    flat = [e for row in experts for e in row]
    for suffix, dtype, shape, raw in (
        ("counts", "I64", [4], struct.pack("<4q", *counts)),
        ("experts", "I32", [4, 2], struct.pack("<8i", *flat)),
        ("weights", "F32", [4, 2], struct.pack("<8f", *[0.5] * 8)),
    ):
        header[f"{name}.{suffix}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
text = json.dumps(header).encode()
with open(sys.argv[1], "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + data)
