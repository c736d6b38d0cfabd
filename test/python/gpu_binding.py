"""The Python binding on CUDA tensors without CUDA: arrays of gpu_call.py whose type has DLPack's
exchange table, as torch's tensors have, on the stub of the driver. A process of its own.

    python gpu_binding.py BUILD LIBRARY KERNELS.mlir
"""

import ctypes
import sys
from ctypes import CFUNCTYPE, POINTER, c_int, c_int32, c_uint32, c_void_p, py_object
from pathlib import Path

import gpu_layers
import moec
import numpy as np
from gpu_call import LAYER, Array, Device, Machine, Tensor
from gpu_layers import to_bf16

STREAM = [0x5700]  # the framework's current stream


class Header(ctypes.Structure):
    _fields_ = [("major", c_uint32), ("minor", c_uint32), ("before", c_void_p)]


@CFUNCTYPE(c_int, py_object, POINTER(Tensor))
def describe(array, out):
    ctypes.memmove(out, ctypes.byref(array.tensor), ctypes.sizeof(Tensor))
    return 0


@CFUNCTYPE(c_int, c_int, c_int32, POINTER(c_void_p))
def current_stream(device_type, device, out):
    out[0] = STREAM[0] + device
    return 0


@CFUNCTYPE(c_int)
def unused():
    return -1


class Table(ctypes.Structure):
    _fields_ = [
        ("header", Header),
        ("allocator", c_void_p),
        ("managed", c_void_p),
        ("to_object", c_void_p),
        ("describe", c_void_p),
        ("stream", c_void_p),
    ]


def address(function):
    return ctypes.cast(function, c_void_p).value


TABLE = Table(Header(1, 3), *[address(unused)] * 3, address(describe), address(current_stream))
ctypes.pythonapi.PyCapsule_New.restype = py_object
ctypes.pythonapi.PyCapsule_New.argtypes = [c_void_p, ctypes.c_char_p, c_void_p]
NAME = b"dlpack_exchange_api"  # the capsule does not copy it
CAPSULE = ctypes.pythonapi.PyCapsule_New(ctypes.addressof(TABLE), NAME, None)


class CudaArray(Array):
    __dlpack_c_exchange_api__ = CAPSULE


def main(build, library, kernels, level):
    machine = Machine(Path(build), kernels, "9.0")
    machine.stub.stub_stream.restype = c_void_p
    layer, wrong = LAYER, []
    rng = np.random.default_rng(1)
    T = 6
    x = to_bf16(rng.standard_normal((T, layer.H)))
    opened = moec.load(library, load="none", device="cuda:0", max_tokens=4, cpu_level=level)
    block = opened.layers[0]
    gate_up = layer.gate_up.reshape(layer.E, -1, layer.H)
    for role, values in {"router": layer.router, "gate_up": gate_up, "down": layer.down}.items():
        block.set_weight(role, np.ascontiguousarray(values, np.float32))
    if block.info.level != level:
        wrong.append(f"level {block.info.level}")
    _, weights, experts = gpu_layers.route(layer, x)
    expected, size = gpu_layers.experts_sum(layer, x, experts, weights)

    def array(values, kind):
        return CudaArray(machine, values, kind)

    def check(what, got, want):
        if not np.abs(got - want).max() <= 4e-3 * size.max():
            wrong.append(f"{what}: {np.abs(got - want).max()}")

    ax, ay = array(x, "bf16"), array(np.zeros((T, layer.H)), "f32")
    contexts = []
    for stream in (0x5700, 0x5800, 0x5700):
        STREAM[0] = stream
        block(ax, out=ay)
        check(f"stream {stream:#x}", ay.read(), expected)
        if machine.stub.stub_stream() != stream:
            wrong.append(f"expected stream {stream:#x}, but got {machine.stub.stub_stream():#x}")
        contexts.append(machine.stub.stub_used())
    # A second stream has a workspace of its own, and the first one's is used again.
    if not (contexts[0] < contexts[1] == contexts[2]):
        wrong.append(f"memory by call: {contexts}")
    ids, w = array(experts, "i64"), array(weights, "f32")
    block.experts(ax, ids, w, out=ay)
    check("experts", ay.read(), expected)
    block.experts(ax, ids, w, out=ay, accumulate=True)
    check("accumulated", ay.read(), 2 * expected)
    opened.check_device()
    ids.view[2, 1] = layer.E
    block.experts(ax, ids, w, out=ay)
    for code in ("E-EXPERT-ID", None):
        try:
            opened.check_device()
            got = None
        except moec.Error as error:
            got = error.name
        if got != code:
            wrong.append(f"check_device: expected {code}, but got {got}")
    other = array(x, "bf16")
    other.tensor.device = Device(2, 1)
    for bad, code in [(other, "E-DEVICE"), (x.astype(np.float32), "E-DEVICE")]:
        try:
            block(bad, out=ay)
            wrong.append(f"expected {code}, but got a result")
        except moec.Error as error:
            if error.name != code:
                wrong.append(f"expected {code}, but got {error}")
    if machine.fault():
        wrong.append(machine.fault())
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
