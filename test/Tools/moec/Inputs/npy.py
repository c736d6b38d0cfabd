"""Writes inputs of `moec run` with NumPy, and checks its outputs: shapes, types, bf16 rounding."""

import sys

import numpy as np

shape = (2, 3, 64)


def to_bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


if sys.argv[1] == "write":
    x = from_bf16(to_bf16(np.random.default_rng(0).standard_normal(shape, dtype=np.float32)))
    np.save("x32.npy", x)
    np.save("bits.npy", to_bf16(x))
    np.save("v2.npy", to_bf16(x).view("V2"))
    with open("x16.npy", "wb") as file:
        # As ml_dtypes saves bfloat16: the type has no name of its own in the format.
        np.lib.format.write_array_header_2_0(
            file, {"descr": "<V2", "fortran_order": False, "shape": shape}
        )
        file.write(to_bf16(x).tobytes())
    np.save("wide.npy", np.zeros((3, 65), np.float32))
    np.save("f64.npy", np.zeros((3, 64)))
    np.save("fortran.npy", np.asfortranarray(np.zeros((3, 64), np.float32)))
    np.save("pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    raw = open("x32.npy", "rb").read()
    open("short.npy", "wb").write(raw[:-1])
else:
    y = np.load("y32.npy")
    assert (
        y.shape == shape and y.dtype == np.float32 and np.isfinite(y).all() and np.abs(y).max() > 0
    )
    for name in ("y16.npy", "ybits.npy", "yv2.npy"):
        bits = np.load(name)
        assert bits.shape == shape and bits.dtype == np.dtype("V2"), (bits.shape, bits.dtype)
        got = from_bf16(bits.view(np.uint16))
        # y is summed in f32 and rounded once, so one bf16 step (2^-8) is the most that differs.
        assert np.allclose(got, y, rtol=2**-7, atol=1e-3 * np.abs(y).max()), name
