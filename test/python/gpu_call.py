"""A compiled library through the C interface on a GPU that is none: the stub of the CUDA driver
(test/Runtime) with the SIMT executor behind it. A process of its own: the stub is its CUDA driver.

    python gpu_call.py BUILD LIBRARY KERNELS.mlir [DEVICE [LEVEL]]

on a device of compute capability DEVICE (8.0), of which the library's code has to take LEVEL
(sm_80). Exits with 1 and a sentence for everything that is wrong. The model is LAYER, whose router
knows the first two layers; see test_gpu_call.py.
"""

import ctypes
import sys
from ctypes import (
    POINTER,
    byref,
    c_char,
    c_char_p,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import gpu_layers
import numpy as np
from gpu_layers import Layer, bf16_bits, from_bf16, to_bf16

LAYER = Layer(H=40, F=24, E=5, K=2, order="select_then_score", seed=3)
CUDA = 2


class Device(ctypes.Structure):
    _fields_ = [("type", c_int32), ("id", c_int32)]


class DType(ctypes.Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", Device),
        ("ndim", c_int32),
        ("dtype", DType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class Error(ctypes.Structure):
    _fields_ = [("code", c_int32), ("message", c_char * 508)]


class Open(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("weights", c_char_p),
        ("device", Device),
        ("load", c_int32),
        ("verify", c_int32),
        ("cpu_level", c_char_p),
    ]


class LayerInfo(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("name", c_char_p),
        ("index", c_int32),
        ("kind", c_int32),
        ("sizes", c_int64 * 6),
        ("needs", c_uint32),
        ("compute", DType),
        *((name, c_char_p) for name in ("format", "layout", "level")),
        ("weight_bytes", c_uint64),
        ("active_flops", c_uint64),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("max_tokens", c_int64),
        ("executor", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_uint64),
    ]


INPUTS = ["x", "experts", "weights", "router_x", "token_ids", "token_types", "sequences", "state"]
OUTPUTS = ["y", "experts_out", "weights_out", "logits_out", "counts_out", "state_out"]


class Call(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("flags", c_uint32),
        ("stream", c_void_p),
        *((name, POINTER(Tensor)) for name in INPUTS + OUTPUTS),
    ]


class Hooks(ctypes.Structure):
    _fields_ = [("memory", c_void_p), ("launch", c_void_p), ("map", c_void_p)]


class StubMachine(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("devices", "major", "minor", "version", "shared")),
        ("memory", c_size_t),
    ]


TYPES = {
    "f32": (np.float32, 2, 32),
    "bf16": (np.uint16, 4, 16),
    "f16": (np.float16, 2, 16),
    "i32": (np.int32, 0, 32),
    "i64": (np.int64, 0, 64),
}


class Array:
    """An array on the stub's device, with `padding` elements between rows."""

    def __init__(self, machine, values, kind, padding=0):
        dtype, code, bits = TYPES[kind]
        values = np.asarray(bf16_bits(values) if kind == "bf16" else values, dtype)
        self.shape, self.kind = values.shape, kind
        width = values.shape[-1] + padding
        rows = values.shape[0] if values.ndim == 2 else 1
        count = max(1, (rows - 1) * width + values.shape[-1])
        place = c_uint64()
        assert machine.stub.cuMemAlloc_v2(byref(place), c_size_t(count * values.itemsize)) == 0
        self.machine, self.place = machine, place.value
        memory = (c_char * (count * values.itemsize)).from_address(self.place)
        flat = np.frombuffer(memory, dtype)
        strides = (width * values.itemsize, values.itemsize)[-values.ndim :]
        self.view = np.lib.stride_tricks.as_strided(flat, values.shape, strides)
        self.view[...] = values
        self.extents = (c_int64 * 2)(*values.shape)
        self.steps = (c_int64 * 2)(*(s // values.itemsize for s in strides))
        self.tensor = Tensor(
            self.place, Device(CUDA, 0), values.ndim, DType(code, bits, 1), self.extents, self.steps
        )

    def read(self):
        return from_bf16(self.view).reshape(self.shape) if self.kind == "bf16" else self.view.copy()

    def __del__(self):
        self.view = None
        self.machine.stub.cuMemFree_v2(c_uint64(self.place))


class Machine:
    """The driver's stub, the executor and the runtime."""

    def __init__(self, build, kernels=None, device="8.0"):
        self.stub = ctypes.CDLL(str(build / "test/Runtime/cuda_stub/libcuda.so.1"))
        self.simt = ctypes.CDLL(str(build / "test/lib/Target/GPU/libmoe_simt_driver.so"))
        self.moec = ctypes.CDLL(str(build / "lib/libmoec.so.1"))
        self.simt.moe_simt_error.restype = c_char_p
        self.simt.moe_simt_hooks.restype = POINTER(Hooks)
        self.simt.moe_simt_launches.restype = c_uint64
        self.stub.stub_used.restype = c_size_t
        major, minor = map(int, device.split("."))
        shared = 166912 if major < 9 else 232448
        self.stub.stub_reset(byref(StubMachine(1, major, minor, 12080, shared, 0)))
        self.stub.stub_hook(self.simt.moe_simt_hooks())
        self.simt.moe_simt_load.restype = ctypes.c_bool
        if kernels is not None:
            self.load(kernels)

    def load(self, kernels):
        assert self.simt.moe_simt_load(str(kernels).encode()), self.fault()

    def ok(self, code):
        assert code == 0, f"{code} {self.fault()}"

    def fault(self):
        return self.simt.moe_simt_error().decode()


class Model:
    def __init__(self, machine, library, load=2):
        self.machine, self.error = machine, Error()
        options = Open(ctypes.sizeof(Open), None, Device(CUDA, 0), load)
        self.model, self.contexts = c_void_p(), {}
        self.ok(
            machine.moec.moec_open(
                str(library).encode(), byref(options), byref(self.model), byref(self.error)
            )
        )

    def ok(self, code):
        if code:
            raise RuntimeError(f"{self.error.message.decode()} {self.machine.fault()}")

    def set_weight(self, role, values):
        values = np.ascontiguousarray(values, np.float32)
        shape = (c_int64 * 3)(*values.shape)
        tensor = Tensor(
            values.ctypes.data, Device(1, 0), values.ndim, DType(2, 32, 1), shape, None, 0
        )
        self.ok(
            self.machine.moec.moec_set_weight(
                self.model, 0, role.encode(), c_int64(-1), byref(tensor), 0, byref(self.error)
            )
        )

    def get_weight(self, role, shape):
        values = np.zeros(shape, np.float32)
        extents = (c_int64 * 3)(*shape)
        tensor = Tensor(values.ctypes.data, Device(1, 0), 3, DType(2, 32, 1), extents, None, 0)
        self.ok(
            self.machine.moec.moec_get_weight(
                self.model, 0, role.encode(), byref(tensor), byref(self.error)
            )
        )
        return values

    def context(self, max_tokens):
        if max_tokens not in self.contexts:
            options = Options(ctypes.sizeof(Options), max_tokens)
            context = c_void_p()
            self.ok(
                self.machine.moec.moec_context_create(
                    self.model, byref(options), byref(context), byref(self.error)
                )
            )
            self.contexts[max_tokens] = context
        return self.contexts[max_tokens]

    def run(self, max_tokens=64, flags=0, **arrays):
        call = Call(ctypes.sizeof(Call), flags, 0x5700)
        for name, array in arrays.items():
            setattr(call, name, ctypes.pointer(array.tensor))
        context = self.context(max_tokens)
        self.ok(self.machine.moec.moec_run(context, 0, byref(call), byref(self.error)))

    def level(self):
        info = LayerInfo(ctypes.sizeof(LayerInfo))
        self.ok(
            self.machine.moec.moec_get_layer_info(self.model, 0, byref(info), byref(self.error))
        )
        return info.level.decode()

    def status(self, max_tokens=64):
        """0, or the error's number, with its message in self.error."""
        return self.machine.moec.moec_context_status(self.context(max_tokens), byref(self.error))

    def close(self):
        for context in self.contexts.values():
            self.machine.moec.moec_context_destroy(context)
        self.machine.moec.moec_close(self.model)


def main(build, library, kernels, device="8.0", level="sm_80"):
    machine = Machine(Path(build), kernels, device)
    layer, rng, wrong = LAYER, np.random.default_rng(0), []
    T, H, E, K = 19, layer.H, layer.E, layer.K
    x = to_bf16(rng.standard_normal((T, H)))
    logits, weights, experts = gpu_layers.route(layer, x)
    expected, size = gpu_layers.experts_sum(layer, x, experts, weights)

    def check(what, got, want, bound):
        error = np.abs(got - want).max() if got.size else 0
        if not (got.shape == want.shape and error <= bound):
            wrong.append(f"{what}: {error} > {bound}")

    def array(values, kind, padding=0):
        return Array(machine, values, kind, padding)

    model = Model(machine, library)
    if model.level() != level:
        wrong.append(f"expected level {level} on {device}, but got {model.level()}")
    for role, values in {
        "router": layer.router,
        "gate": layer.gate_up[:, 0],
        "up": layer.gate_up[:, 1],
        "down": layer.down,
    }.items():
        model.set_weight(role, values)

    # The whole layer, for every pair of types, whole and in chunks, in three orders of the warps.
    bound = 4e-3 * size.max()
    for kx, ky in [("bf16", "bf16"), ("f32", "f32"), ("bf16", "f32"), ("f32", "bf16")]:
        results = []
        for order, max_tokens in [(0, 64), (1, 7), (2, 1)] if kx == ky == "bf16" else [(0, 8)]:
            machine.simt.moe_simt_order(order, c_uint64(5), order == 1)
            ax, ay = array(x, kx, 3), array(np.zeros((T, H)), ky, 5)
            model.run(max_tokens, x=ax, y=ay)
            results.append(ay.read())
            check(f"x {kx}, y {ky}, chunks of {max_tokens}", results[-1], expected, bound)
        if any(not np.array_equal(results[0], r) for r in results):
            wrong.append(f"x {kx}, y {ky}: chunks change the bits")
    machine.simt.moe_simt_order(0, c_uint64(0), False)

    # A call that is captured runs as often as its graph is launched, on what x holds then; tensor
    # maps are made while it is captured, and kept by the graph.
    ax, ay = array(np.zeros((T, H)), "bf16"), array(np.zeros((T, H)), "f32")
    model.context(8)
    launches, graph, stream = machine.simt.moe_simt_launches(), c_void_p(), c_void_p(0x5700)
    machine.ok(machine.stub.cuStreamBeginCapture_v2(stream, 2))
    model.run(8, x=ax, y=ay)
    machine.ok(machine.stub.cuStreamEndCapture(stream, byref(graph)))
    if machine.simt.moe_simt_launches() != launches:
        wrong.append("a captured call has run")
    for values in (x, np.roll(x, 1, axis=0)):
        ax.view[...] = bf16_bits(values)
        machine.ok(machine.stub.cuGraphLaunch(graph, stream))
        shift = 0 if values is x else 1
        check(f"replayed, {shift}", ay.read(), np.roll(expected, shift, axis=0), bound)
    if machine.simt.moe_simt_launches() == launches:
        wrong.append("a graph has run nothing")
    machine.ok(machine.stub.cuGraphDestroy(graph))

    # Routing that is given, of every type and with gaps between rows; -1 and foreign ids.
    given = rng.integers(-1, E, (T, 3))
    w = to_bf16(rng.random((T, 3)))
    want, size = gpu_layers.experts_sum(layer, x, given, w)
    ax, ay, bound = array(x, "bf16"), array(np.zeros((T, H)), "f32"), 4e-3 * size.max()
    counts = array(np.zeros(E + 1), "i32")
    found = np.bincount(np.where(given < 0, E, given).ravel(), minlength=E + 1)
    for ki, kw, padding in [("i64", "f32", 0), ("i32", "bf16", 2), ("i64", "f16", 1)]:
        ids, aw = array(given, ki, padding), array(w, kw, padding)
        model.run(8, x=ax, y=ay, experts=ids, weights=aw, counts_out=counts)
        check(f"given as {ki}, {kw}", ay.read(), want, bound)
        if not np.array_equal(counts.read(), found):
            wrong.append(f"counts: {counts.read()} and not {found}")
    model.run(8, flags=2, x=ax, y=ay, experts=ids, weights=aw)
    check("accumulated", ay.read(), 2 * want, 2 * bound)
    if model.status(8):
        wrong.append(f"status: {model.error.message.decode()}")
    foreign = given.copy()
    foreign[11, 2], foreign[13, 0] = E, -7
    skipped = np.where((foreign < 0) | (foreign >= E), -1, foreign)
    want, _ = gpu_layers.experts_sum(layer, x, skipped, w)
    for flags, code in [(4, 0), (0, 106)]:
        model.run(8, flags=flags, x=ax, y=ay, experts=array(foreign, "i64"), weights=aw)
        check(f"foreign ids, flags {flags}", ay.read(), want, bound)
        if model.status(8) != code or (code and b"experts[11, 2]" not in model.error.message):
            wrong.append(f"foreign ids, flags {flags}: {model.error.message.decode()}")
        if model.status(8):
            wrong.append("foreign ids are reported twice")

    # Routing alone, and with logits (route, then experts).
    ids, aw = array(np.zeros((T, K)), "i64", 1), array(np.zeros((T, K)), "f32", 2)
    al = array(np.zeros((T, E)), "f32", 4)
    outputs = {"experts_out": ids, "weights_out": aw, "logits_out": al, "counts_out": counts}
    for what, more in [("route", {}), ("logits", {"y": ay})]:
        for output in outputs.values():
            output.view[...] = 0
        model.run(8, x=ax, **outputs, **more)
        if not np.array_equal(ids.read(), experts):
            wrong.append(f"{what}: ids")
        check(f"{what}: weights", aw.read(), weights, 1e-5)
        check(f"{what}: logits", al.read(), logits, 1e-5)
        if not np.array_equal(counts.read(), np.bincount(experts.ravel(), minlength=E + 1)):
            wrong.append(f"{what}: counts {counts.read()}")
    check("with logits", ay.read(), expected, 4e-3 * np.abs(expected).max() * K)
    ids32 = array(np.zeros((T, K)), "i32")
    model.run(8, x=ax, experts_out=ids32)
    if not np.array_equal(ids32.read(), experts):
        wrong.append("ids as i32")

    # No slots: zeros; no tokens: nothing.
    ay.view[...] = 7
    none = array(np.zeros((T, 0)), "i32"), array(np.zeros((T, 0)), "f32")
    model.run(8, x=ax, y=ay, experts=none[0], weights=none[1])
    check("no slots", ay.read(), np.zeros((T, H)), 0)
    empty = array(np.zeros((0, H)), "bf16"), array(np.zeros((0, H)), "f32")
    launches = machine.simt.moe_simt_launches()
    model.run(8, x=empty[0], y=empty[1])
    if machine.simt.moe_simt_launches() != launches:
        wrong.append("launches without tokens")
    model.close()

    # Weights from the packed file: read back, they are what the layer computes with.
    model = Model(machine, library, load=0)
    layer.gate_up = model.get_weight("gate_up", (E, 2 * layer.F, H)).reshape(layer.gate_up.shape)
    layer.down = model.get_weight("down", (E, H, layer.F))
    given, w = rng.integers(0, E, (T, 2)), rng.random((T, 2)).astype(np.float32)
    want, size = gpu_layers.experts_sum(layer, x, given, w)
    model.run(8, x=ax, y=ay, experts=array(given, "i32"), weights=array(w, "f32"))
    check("packed weights", ay.read(), want, 4e-3 * size.max())
    if not np.abs(want).max() > 0:
        wrong.append("packed weights: expected some that are not zero")
    model.close()

    if machine.fault():
        wrong.append(machine.fault())
    print(f"{machine.simt.moe_simt_launches()} launches")
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
