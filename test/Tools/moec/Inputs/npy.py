"""Writes inputs of `moec run` and checks its outputs, with the standard library alone.

The bytes are those that NumPy 2 writes (format 1.0, and 2.0 once); bfloat16 is '<V2', as NumPy
saves arrays of ml_dtypes.bfloat16.
"""

import ast
import math
import random
import struct
import sys

shape = (2, 3, 64)


def save(path, descr, dims, raw, version=1, fortran=False):
    head = repr({"descr": descr, "fortran_order": fortran, "shape": dims})
    start = 10 if version == 1 else 12
    head += " " * (63 - (start + len(head)) % 64) + "\n"
    length = struct.pack("<H" if version == 1 else "<I", len(head))
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY" + bytes([version, 0]) + length + head.encode() + raw)


def load(path):
    data = open(path, "rb").read()
    assert data[:8] == b"\x93NUMPY\x01\x00", data[:8]
    (length,) = struct.unpack("<H", data[8:10])
    assert (10 + length) % 64 == 0
    head = ast.literal_eval(data[10 : 10 + length].decode())
    assert head["fortran_order"] is False
    return head["descr"], head["shape"], data[10 + length :]


if sys.argv[1] == "write":
    generator = random.Random(0)
    # Values that bf16 holds exactly: the upper halves of floats between 2^-3 and 2.
    bits = [generator.randrange(0x3E00, 0x4000) for _ in range(math.prod(shape))]
    bits = [b | generator.choice((0, 0x8000)) for b in bits]
    wide = struct.pack(f"<{len(bits)}I", *(b << 16 for b in bits))
    narrow = struct.pack(f"<{len(bits)}H", *bits)
    save("x32.npy", "<f4", shape, wide)
    save("x16.npy", "<V2", shape, narrow)
    save("bits.npy", "<u2", shape, narrow)
    save("v2.npy", "|V2", shape, narrow, version=2)
    save("wide.npy", "<f4", (3, 65), bytes(3 * 65 * 4))
    save("f64.npy", "<f8", (3, 64), bytes(3 * 64 * 8))
    save("fortran.npy", "<f4", (3, 64), bytes(3 * 64 * 4), fortran=True)
    save("pickle.npy", "|O", (1,), b"\x80\x04}.")
    open("short.npy", "wb").write(open("x32.npy", "rb").read()[:-1])
else:
    descr, dims, raw = load("y32.npy")
    assert descr == "<f4" and dims == shape, (descr, dims)
    y = struct.unpack(f"<{len(raw) // 4}f", raw)
    largest = max(map(abs, y))
    assert all(map(math.isfinite, y)) and largest > 0
    for name in ("y16.npy", "ybits.npy", "yv2.npy"):
        descr, dims, raw = load(name)
        assert descr == "<V2" and dims == shape, (descr, dims)
        halves = struct.unpack(f"<{len(raw) // 2}H", raw)
        words = struct.pack(f"<{len(halves)}I", *(h << 16 for h in halves))
        got = struct.unpack(f"<{len(halves)}f", words)
        # y is summed in f32 and rounded once, so a bf16 step (2^-8) is the most that differs.
        for a, b in zip(y, got, strict=True):
            assert abs(a - b) <= 2**-7 * abs(a) + 1e-3 * largest, (name, a, b)
