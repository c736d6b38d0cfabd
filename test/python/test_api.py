"""The Python interface: tensors in and out, errors, threads, pickling, weights from memory.

The library under test is the hand-written module of test/Runtime, so none of this needs the
compiler. Expected numbers come from the float64 reference.
"""

import copy
import multiprocessing
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import moec
import numpy as np
import oracle
import pytest
import sizes
import torch

ROOT = Path(__file__).resolve().parents[2]

# test/Runtime/mock.h: experts with relu, softmax over all experts, then top-k, no renormalisation.
SIZES = [
    (40, 23, 5, 2, "f32"),
    (40, 23, 5, 2, "f32"),
    (33, 48, 9, 3, "bf16"),
    (40, 70, 1, 1, "bf16"),
]


def make_block(number: int) -> oracle.Block:
    h, f, e, k, dtype = SIZES[number]
    spec = {"kind": "moe", "H": h, "F": f, "E": e, "K": k, "expert": {"activation": "relu"}}
    if number == 3:
        spec = {**spec, "kind": "dense"}
    return oracle.block_of(spec, sizes.make_weights(spec, dtype, number))


BLOCKS = [make_block(i) for i in range(4)]


def set_weights(library):
    for layer, block in zip(library.layers, BLOCKS, strict=True):
        for role, weight in block.weights.items():
            layer.set_weight(role, weight)
    return library


@pytest.fixture(scope="module")
def library(mock):
    return set_weights(moec.load(mock, load="none", threads=2))


@pytest.fixture
def layer(library):
    return library.layers[0]


def x_of(layer, count=6, dtype=torch.float32, seed=0):
    return oracle.tokens(count, layer.info.H, "f32", seed).to(dtype)


# --- what a library is ----------------------------------------------------------------------------


def test_layers_are_a_sequence(library):
    assert len(library) == len(library.layers) == 4
    assert [layer.index for layer in library.layers] == [0, 1, 2, 3]
    assert [layer.kind for layer in library.layers] == ["moe", "moe", "moe", "dense"]
    assert library.layers[-1] == library.layers[3] != library.layers[2]
    assert library.layers[1:3] == [library.layers[1], library.layers[2]]
    assert len({library.layers[0], library.layers[0], library.layers[1]}) == 2
    with pytest.raises(IndexError, match="expected a layer below 4, but got 4"):
        library.layers[4]
    assert library.layers[2].library is library


def test_info(library):
    info = library.layers[2].info
    assert info.name == library.layers[2].name == "model.layers.2.mlp"
    assert (info.H, info.F, info.E, info.K, info.S, info.W) == (33, 48, 9, 3, 0, 0)
    assert (info.kind, info.compute, info.format, info.layout) == (
        "moe",
        "bf16",
        "bf16",
        "panel32-1",
    )
    assert info.needs == () and info.level.startswith("x86-64-v") and info.active_flops > 0
    assert repr(info).startswith("LayerInfo(model.layers.2.mlp: moe H=33 F=48 E=9 K=3 bf16")
    assert "4 of them" in repr(library.layers)
    assert "4 layers" in repr(library) and "model.layers.3.mlp dense" in repr(library.layers[3])


def test_a_layer_keeps_its_library(mock):
    layer = set_weights(moec.load(mock, load="none", threads=1)).layers[0]
    x = x_of(layer)
    assert oracle.relative(layer(x), BLOCKS[0].reference()(x)) < 2e-6


# --- tensors --------------------------------------------------------------------------------------


def test_numbers(library):
    for layer, block in zip(library.layers, BLOCKS, strict=True):
        x = x_of(layer, 17)
        x = x.bfloat16() if layer.info.compute == "bf16" else x
        y = layer(x)
        assert y.dtype == x.dtype and y.shape == x.shape
        bound = 2e-6 if x.dtype == torch.float32 else 6 * 2**-9
        assert oracle.relative(y, block.reference()(x)) < bound
        if layer.kind == "moe":
            ids, weights, logits = layer.route(x, logits=True)
            exact = block.reference().routing(x)
            np.testing.assert_array_equal(ids.numpy(), exact.experts)
            np.testing.assert_allclose(weights.numpy(), exact.weights, rtol=1e-5)
            np.testing.assert_allclose(logits.numpy(), exact.logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(layer.experts(x, ids, weights), y)


def test_leading_dimensions(layer):
    x = x_of(layer, 12)
    y = layer(x)
    assert torch.equal(layer(x.reshape(3, 4, 40)), y.reshape(3, 4, 40))
    assert torch.equal(layer(x.reshape(2, 1, 6, 40)), y.reshape(2, 1, 6, 40))
    assert torch.equal(layer(x[0]), y[0])
    assert torch.equal(layer(x[None, 2:3]), y[None, 2:3])
    ids, weights = layer.route(x.reshape(3, 4, 40))
    assert ids.shape == weights.shape == (12, 2)  # [T,K], whatever the leading dimensions
    given = layer.experts(x.reshape(3, 4, 40), ids.reshape(3, 4, 2), weights)
    assert torch.equal(given, y.reshape(3, 4, 40))
    assert layer(x.reshape(3, 4, 40)[:, :0]).shape == (3, 0, 40)


def test_numpy_gives_numpy(layer):
    x = x_of(layer)
    y = layer(x.numpy())
    assert type(y) is np.ndarray and y.dtype == np.float32
    np.testing.assert_array_equal(y, layer(x).numpy())
    ids, weights = layer.route(x.numpy())
    assert type(ids) is np.ndarray and ids.dtype == np.int32 and weights.dtype == np.float32
    np.testing.assert_array_equal(layer.experts(x.numpy(), ids.astype(np.int64), weights), y)
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(layer(read_only), y)


def test_a_buffer_that_is_no_array(layer):
    x = x_of(layer).numpy()
    y = layer(memoryview(x))
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, layer(x))


def test_uint16_is_the_bits_of_bfloat16(layer):
    x = x_of(layer, dtype=torch.bfloat16)
    bits = x.view(torch.uint16).numpy()
    y = layer(bits)
    assert y.dtype == np.uint16
    assert torch.equal(torch.from_numpy(y).view(torch.bfloat16), layer(x))


def test_ml_dtypes(layer):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = x_of(layer, dtype=torch.bfloat16)
    y = layer(x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
    assert y.dtype == ml_dtypes.bfloat16
    assert torch.equal(torch.from_numpy(y.view(np.uint16)).view(torch.bfloat16), layer(x))


def test_out(layer):
    x = x_of(layer)
    y = layer(x)
    for out in (
        oracle.poisoned(x.shape, torch.float32),
        oracle.poisoned((6, 50), torch.float32)[:, 4:44],
        np.full((6, 40), np.nan, np.float32),
    ):
        assert layer(x, out=out) is out
        np.testing.assert_array_equal(np.asarray(out), y.numpy())
    half = oracle.poisoned(x.shape, torch.bfloat16)
    layer(x, out=half)
    assert torch.equal(half, y.bfloat16())


def test_accumulate(layer):
    x, out = x_of(layer), x_of(layer, seed=1)
    before = out.clone()
    assert layer(x, out=out, accumulate=True) is out
    assert oracle.relative(out, oracle.wide(before) + BLOCKS[0].reference()(x)) < 2e-6


def test_nothing_is_copied(layer):
    """Rows with a gap and a view into the middle of a buffer are read where they lie."""
    big = torch.full((9, 60), torch.nan)
    big[2:8, 11:51] = x_of(layer)
    assert torch.equal(layer(big[2:8, 11:51]), layer(x_of(layer)))
    assert torch.equal(layer(big[2:8, 11:51][::2]), layer(x_of(layer)[::2].contiguous()))
    np.testing.assert_array_equal(layer(big.numpy()[2:8, 11:51]), layer(x_of(layer)).numpy())


def test_parameters_and_tensors_that_need_grad(layer):
    x = x_of(layer)
    y = layer(torch.nn.Parameter(x))
    assert torch.equal(y, layer(x)) and not y.requires_grad


def test_another_librarys_tensor_through_dlpack(layer):
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    x = x_of(layer)
    out = np.full((6, 40), np.nan, np.float32)
    layer(Foreign(x.numpy()), out=out)
    np.testing.assert_array_equal(out, layer(x).numpy())


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_has_its_parts(layer):
    with pytest.raises(moec.Error) as caught:
        layer(torch.zeros(4, 41))
    e = caught.value
    assert isinstance(e, ValueError)
    assert (e.code, e.name) == (101, "E-SHAPE")
    assert "x" in e.where and "40" in e.expected and "41" in e.got
    assert str(e).startswith("E-SHAPE: ") and "expected" in str(e) and "but got" in str(e)
    again = pickle.loads(pickle.dumps(e))
    assert type(again) is type(e) and again.code == 101 and str(again) == str(e)


X = torch.zeros(4, 40)
IDS, W = torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 2)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda f: f(torch.zeros(4, 41)), "E-SHAPE"),
        (lambda f: f(torch.tensor(1.0)), "E-SHAPE"),
        (lambda f: f(X, out=torch.zeros(5, 40)), "E-SHAPE"),
        (lambda f: f(X, out=torch.zeros(2, 2, 40)), "E-SHAPE"),
        (lambda f: f(X, out=torch.zeros(4, 39)), "E-SHAPE"),
        (lambda f: f(X.double()), "E-DTYPE"),
        (lambda f: f(X.half()), "E-DTYPE"),
        (lambda f: f(X.int()), "E-DTYPE"),
        (lambda f: f(np.zeros((4, 40), ">f4")), "E-DTYPE"),
        (lambda f: f(np.zeros((4, 40), object)), "E-DTYPE"),
        (lambda f: f(X, out=X.double()), "E-DTYPE"),
        (lambda f: f(torch.zeros(40, 4).t()), "E-STRIDE"),
        (lambda f: f(torch.zeros(3, 4, 40).transpose(0, 1)), "E-STRIDE"),
        (lambda f: f(torch.zeros(1, 40).expand(4, 40), out=X), "E-STRIDE"),
        (lambda f: f(X, out=X), "E-OVERLAP"),
        (lambda f: f(X[:2], out=X[1:3]), "E-OVERLAP"),
        (lambda f: f([[1.0] * 40]), "E-ARGUMENT"),
        (lambda f: f(None), "E-ARGUMENT"),
        (lambda f: f("x"), "E-ARGUMENT"),
        (lambda f: f(X, accumulate=True), "E-ARGUMENT"),
        (lambda f: f(X.to_sparse()), "E-ARGUMENT"),
        (lambda f: f(X, router_x=X.clone()), "E-ARGUMENT"),
        (lambda f: f(X, token_ids=torch.zeros(4, dtype=torch.int64)), "E-ARGUMENT"),
        (lambda f: f.experts(X, IDS + 5, W), "E-EXPERT-ID"),
        (lambda f: f.experts(X, IDS - 2, W), "E-EXPERT-ID"),
        (lambda f: f.experts(X, IDS[:3], W), "E-SHAPE"),
        (lambda f: f.experts(X, IDS, W[:, :1]), "E-SHAPE"),
        (lambda f: f.experts(X, IDS.float(), W), "E-DTYPE"),
        (lambda f: f.experts(X, IDS, W.double()), "E-DTYPE"),
        (lambda f: f.library.layers[3].route(X), "E-ARGUMENT"),
        (lambda f: f.set_weight("sideways", W), "E-ARGUMENT"),
        (lambda f: f.set_weight("down", W), "E-SHAPE"),
        (lambda f: f.set_weight("down", torch.zeros(5, 40, 23), expert=5), "E-ARGUMENT"),
        (lambda f: f.set_weight("down", torch.zeros(5, 40, 23).int()), "E-DTYPE"),
        (lambda f: f.set_weight("router", torch.full((5, 40), torch.nan)), "E-NONFINITE"),
    ],
)
def test_calls_that_are_refused(layer, call, name):
    before = layer(x_of(layer))
    with pytest.raises(moec.Error) as caught:
        call(layer)
    assert caught.value.name == name, caught.value
    assert isinstance(caught.value, ValueError)
    assert caught.value.expected and caught.value.got, caught.value
    assert torch.equal(layer(x_of(layer)), before)


def test_meta_and_read_only_tensors(layer):
    for strange in (torch.zeros(4, 40, device="meta"), torch.zeros(4, 40).to_sparse()):
        with pytest.raises(moec.Error, match="E-ARGUMENT: x: expected a dense tensor") as caught:
            layer(strange)
        assert "\n" not in str(caught.value)  # nor the framework's own stack
    out = np.zeros((4, 40), np.float32)
    out.flags.writeable = False
    with pytest.raises(moec.Error, match="expected a writable array") as caught:
        layer(X, out=out)
    assert caught.value.name == "E-ARGUMENT"


def test_foreign_ids_are_skipped_when_asked(layer):
    ids = torch.tensor([[7, 1], [-9, -1]] * 3, dtype=torch.int64)
    x, w = x_of(layer), torch.rand(6, 2)
    y = layer.experts(x, ids, w, skip_foreign=True)
    kept = torch.where(ids == 1, ids, -1)
    assert oracle.relative(y, BLOCKS[0].reference().experts(x, kept, w)) < 2e-6
    assert not y[1::2].any()


@pytest.mark.parametrize(
    "arguments, name, builtin",
    [
        ({"dir": "/nonexistent"}, "E-IO", OSError),
        ({"load": "borrow"}, "E-ARGUMENT", ValueError),
        ({"device": "tpu"}, "E-ARGUMENT", ValueError),
        ({"device": "cuda"}, "E-ARCH", RuntimeError),
        ({"threads": 0}, "E-ARGUMENT", ValueError),
        ({"threads": "many"}, "E-ARGUMENT", ValueError),
        ({"cpu_level": "x86-64-v9"}, "E-ISA", RuntimeError),
        ({"load": "map"}, "E-IO", OSError),
        ({"weights": "/nonexistent", "load": "copy"}, "E-IO", OSError),
    ],
)
def test_loads_that_are_refused(mock, arguments, name, builtin):
    with pytest.raises(builtin) as caught:
        moec.load(**{"dir": mock, "load": "none", **arguments})
    assert isinstance(caught.value, moec.Error)
    assert caught.value.name == name, caught.value


def test_a_folder_without_a_library(tmp_path):
    with pytest.raises(moec.Error) as caught:
        moec.load(tmp_path)
    assert caught.value.name == "E-PATH"


def test_weights_that_were_never_set(mock):
    library = moec.load(mock, load="none")
    with pytest.raises(moec.Error) as caught:
        library.layers[0](X)
    assert caught.value.name == "E-WEIGHTS" and isinstance(caught.value, RuntimeError)


def test_messages_of_every_form():
    from moec.errors import make_error

    e = make_error(403, "E-EXISTS: out: expected a new folder, but got a.moec; use --force")
    assert (e.where, e.expected, e.got) == ("out", "a new folder", "a.moec")
    assert e.hint == "use --force" and isinstance(e, OSError)
    e = make_error(402, "E-MEMORY: expected 5 GB, but got 1 GB")
    assert isinstance(e, MemoryError) and (e.where, e.hint) == ("", "")
    e = make_error(200, 'E-CONFIG: config.json: layers[0]: K: expected 1, but got "a: b"')
    assert e.where == "config.json: layers[0]: K" and e.got == '"a: b"'
    e = make_error(900, "something else")
    assert e.name == "E-INTERNAL" and isinstance(e, RuntimeError)


# --- weights from memory --------------------------------------------------------------------------


def test_weights_come_back(mock):
    library = set_weights(moec.load(mock, load="none"))
    for layer, block in zip(library.layers, BLOCKS, strict=True):
        for role in ("gate_up", "down"):
            want = block.weights[role]
            if layer.kind == "dense" and want.dim() == 2:
                want = want[None]
            got = torch.full_like(want, torch.nan)
            layer.get_weight(role, got)
            assert torch.equal(got, want)
            across = torch.full_like(want.mT.contiguous(), torch.nan)
            layer.get_weight(role, across.mT)
            assert torch.equal(across.mT, want)
    layer = library.layers[0]
    with pytest.raises(moec.Error) as caught:
        layer.get_weight("router", torch.zeros(5, 40))
    assert caught.value.name == "E-ARGUMENT"
    before = layer(x_of(layer))
    layer.release_weights()
    with pytest.raises(moec.Error, match="never set"):
        layer(x_of(layer))
    for role, weight in BLOCKS[0].weights.items():
        layer.set_weight(role, weight)
    assert torch.equal(layer(x_of(layer)), before)


def test_set_weight(mock):
    library = set_weights(moec.load(mock, load="none"))
    for layer, block in zip(library.layers, BLOCKS, strict=True):
        x = x_of(layer, 9)
        x = x.bfloat16() if layer.info.compute == "bf16" else x
        bound = 2e-6 if x.dtype == torch.float32 else 6 * 2**-9
        # One part of one expert, as NumPy; then the whole of another, as torch.
        weights = {k: v.clone() for k, v in block.weights.items()}
        last = max(layer.info.E - 1, 0)
        fresh = torch.randn(layer.info.F, layer.info.H).to(weights["down"].dtype) * 0.3
        if layer.kind == "moe":
            weights["gate_up"][last, : layer.info.F] = fresh
            weights["down"][0] = weights["down"][0].flip(0)
            layer.set_weight("down", weights["down"][0], expert=0)
        else:
            weights["gate_up"][: layer.info.F] = fresh
        layer.set_weight("gate", fresh.float().numpy(), expert=last)
        exact = oracle.reference(block.spec, weights)(x)
        assert oracle.relative(layer(x), exact) < bound
        assert oracle.relative(exact, block.reference()(x)) > 0.01


def test_set_weight_reads_any_strides(mock):
    library = set_weights(moec.load(mock, load="none"))
    layer, block = library.layers[0], BLOCKS[0]
    x = x_of(layer)
    y = layer(x)
    layer.set_weight("down", block.weights["down"].transpose(1, 2).contiguous().transpose(1, 2))
    layer.set_weight("router", block.weights["router"].repeat(1, 2)[:, :40].numpy())
    assert torch.equal(layer(x), y)


# --- threads, processes ---------------------------------------------------------------------------


def test_executors(mock):
    pool = moec.Pool(3, spin_us=10)
    assert pool.lanes == 3 and moec.Serial(5).lanes == 5
    x = oracle.tokens(50, 40)
    results = [
        set_weights(moec.load(mock, load="none", threads=t)).layers[0](x)
        for t in (None, 1, 2, 7, pool, pool, moec.Serial(1), moec.Serial(7))
    ]
    assert all(torch.equal(results[0], r) for r in results)


def test_many_threads_call_one_layer(library):
    x = [oracle.tokens(31, layer.info.H) for layer in library.layers]
    y = [layer(a) for layer, a in zip(library.layers[:3:2], x[:3:2], strict=True)]
    wrong = []

    def work():
        for _ in range(20):
            for layer, a, b in zip(library.layers[:3:2], x[:3:2], y, strict=True):
                if not torch.equal(layer(a), b):
                    wrong.append(layer.name)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_the_gil_is_released(library):
    """Another thread makes progress while a layer runs."""
    layer, x = library.layers[0], oracle.tokens(20000, 40)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(1)

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = len(ticks)
    layer(x)
    during = len(ticks) - before
    done.set()
    ticker.join()
    assert during >= 3


def _in_child(queue, layer, x):
    queue.put(layer(x).numpy())


def test_fork(library):
    layer, x = library.layers[0], oracle.tokens(40, 40)
    y = layer(x)  # the pool is running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, layer, x))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=30), y.numpy())
    child.join(30)
    assert child.exitcode == 0
    assert torch.equal(layer(x), y)


def test_pickle(mock, tmp_path, monkeypatch):
    monkeypatch.chdir(mock.parent)
    library = moec.load(mock.name, load="none", threads=moec.Pool(2), max_tokens=8)
    text = pickle.dumps((library, library.layers[2]))
    monkeypatch.chdir(tmp_path)  # the path that was relative then must not be now
    again, layer = pickle.loads(text)
    assert again.path == library.path == str(mock)
    assert layer.library is again and layer.name == "model.layers.2.mlp"
    assert len(copy.deepcopy(again)) == 4
    x = x_of(library.layers[0])
    assert torch.equal(set_weights(again).layers[0](x), set_weights(library).layers[0](x))


def test_a_library_with_weights_from_memory_is_not_pickled(library):
    with pytest.raises(moec.Error, match="expected a library as it lies on disk"):
        pickle.dumps(library)


def test_import_needs_numpy_only():
    """Neither torch nor the extension nor the compiler is touched by `import moec`."""
    code = (
        "import sys, moec, moec.reference; "
        "bad = {'torch', 'transformers', 'moec._moec', 'ml_dtypes'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_extension_does_not_import_torch(mock):
    code = (
        "import sys, numpy, moec; "
        f"lib = moec.load({str(mock)!r}, load='none'); "
        "[lib.layers[0].set_weight(r, numpy.ones(s, numpy.float32)) for r, s in "
        "{'router': (5, 40), 'gate_up': (5, 46, 40), 'down': (5, 40, 23)}.items()]; "
        "y = lib.layers[0](numpy.ones((3, 40), numpy.float32)); "
        "assert y.shape == (3, 40) and y[0, 0] > 0; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_needed_libraries(mock):
    """The extension brings in libmoec and the C and C++ runtimes, nothing of torch or LLVM."""
    from moec import _moec

    out = subprocess.run(["readelf", "-d", _moec.__file__], capture_output=True, text=True)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", out.stdout))
    allowed = {"libmoec.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    assert "libmoec.so.1" in needed and needed <= allowed
