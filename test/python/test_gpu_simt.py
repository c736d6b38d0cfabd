"""GPU kernels on the SIMT executor (no GPU): whole layers against float64, and planted faults."""

import os
import pathlib
import re
import subprocess

import gpu_layers
import numpy as np
import pytest
from gpu_layers import Layer, bf16_bits, from_bf16, to_bf16

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = pathlib.Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build")) / "bin" / "moe-simt"

# Small tiles, so that small sizes have many, with every shape of a warp's part.
TILES = (
    "[#moe.gpu_tile<cols = 64, rows = 8, k = 64, stages = 3, warps_cols = 2, warps_rows = 1,"
    " up_to = 8>, #moe.gpu_tile<cols = 64, rows = 32, k = 32, stages = 2, warps_cols = 1,"
    " warps_rows = 2, raster = columns>]"
)


def stored(values, kind):
    return bf16_bits(values) if kind == "bf16" else values.astype(np.float32)


def call(
    layer, tmp_path, tokens, *options, function="f0", slots=None, given=None, start=None, x=None
):
    """Runs one case; returns the finished process and its outputs."""
    slots = layer.K if slots is None else slots
    rng = np.random.default_rng(layer.seed + 1 + tokens)
    if x is None:
        x = to_bf16(rng.standard_normal((tokens, layer.H)))
    (tmp_path / "layer.mlir").write_text(layer.text())
    stored(x, layer.x).tofile(tmp_path / "x.bin")
    weights = (layer.router, layer.gate_up, layer.down, *layer.vectors.values())
    for i, weight in enumerate(weights):
        weight.astype(np.float32).tofile(tmp_path / f"w{i}.bin")
    options = list(options)
    if start is not None:
        stored(start, layer.y).tofile(tmp_path / "y.bin")
        options.append("--accumulate")
    if given is not None:
        given[0].astype(np.int32).tofile(tmp_path / "experts.bin")
        given[1].astype(np.float32).tofile(tmp_path / "weights.bin")
    command = [TOOL, tmp_path / "layer.mlir", f"--function={function}", *options]
    command += [f"{tmp_path}:{tokens}:{slots}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        return process, x, None

    def read(name, dtype, width):
        return np.fromfile(tmp_path / f"{name}.out", dtype).reshape(tokens, width)

    out = {
        "experts": read("experts", np.int32, slots),
        "weights": read("weights", np.float32, slots),
        "offsets": np.fromfile(tmp_path / "offsets.out", np.int32),
    }
    if function == "r0":
        out["logits"] = read("logits", np.float32, layer.E)
    else:
        bits = layer.y == "bf16"
        out["y"] = read("y", np.uint16 if bits else np.float32, layer.H)
        out["y"] = from_bf16(out["y"]) if bits else out["y"]
    return process, x, out


def close(got, want, size):
    """Within two roundings to bf16 of the terms: hidden and rows may round to the other side."""
    if np.isnan(got).any():
        return False
    error = np.abs(got - want)
    bound = 2.0**-7 * size.max(1, keepdims=True, initial=0) * 0.5 + 2.0**-8 * np.abs(want) + 1e-6
    norm = np.linalg.norm(error) / max(np.linalg.norm(want), 1e-30)
    return bool((error <= bound).all()) and norm < 4e-3


def check_routing(layer, x, out):
    logits, weights, experts = gpu_layers.route(layer, x)
    # Where float64 sees a gap, the choice is the same.
    keys = -np.sort(-logits, 1)
    gap = (keys[:, : layer.K] - keys[:, 1 : layer.K + 1]).min(1) if layer.E > layer.K else None
    sure = np.ones(len(x), bool) if gap is None else gap > 1e-4
    assert sure.mean() > 0.8 or len(x) < 4
    np.testing.assert_array_equal(out["experts"][sure], experts[sure])
    np.testing.assert_allclose(out["weights"][sure], weights[sure], rtol=2e-5, atol=1e-7)
    return logits


LAYERS = [
    Layer(64, 32, 4, 2, renormalize="sum"),
    Layer(72, 40, 5, 2, order="select_then_score"),
    Layer(200, 72, 8, 3, activation="gelu_tanh", scale=2.5),
    Layer(33, 7, 40, 33, score="sigmoid", renormalize="sum", router_type="f32"),
    Layer(544, 96, 70, 1),
    # As gpt_oss: biases of router and experts, clamped.
    Layer(72, 40, 5, 2, order="select_then_score", router_bias=True, bias=True, clamp=(1.0, 1.7)),
    # As minimax_m2, and with groups as deepseek_v3.
    Layer(64, 32, 40, 3, score="sigmoid", renormalize="sum", selection_bias=True, scale=2.5),
    Layer(
        64, 32, 72, 5, score="sigmoid", renormalize="sum", selection_bias=True,
        groups=(12, 4, "sum_top2", "zero"),
    ),
    Layer(64, 32, 64, 6, groups=(8, 3, "max", "neg_inf"), bias=True),
]  # fmt: skip


@pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda layer: f"H{layer.H}F{layer.F}E{layer.E}K{layer.K}"
)
@pytest.mark.parametrize("tokens", [1, 2, 19, 70])
def test_layer(layer, tokens, tmp_path):
    if tokens * layer.K > 400:
        tokens = 6
    process, x, out = call(layer, tmp_path, tokens, f"--tiles={TILES}", "--order=shuffled:3")
    assert process.returncode == 0, process.stderr
    check_routing(layer, x, out)
    counts = np.bincount(out["experts"].ravel(), minlength=layer.E)
    np.testing.assert_array_equal(out["offsets"], np.concatenate([[0], counts.cumsum()]))
    want, size = gpu_layers.experts_sum(layer, x, out["experts"], out["weights"].astype(np.float64))
    assert close(out["y"], want, size)
    numbers = dict(re.findall(r"(\w+) (\d+)", process.stdout.split(" ", 1)[1]))
    assert numbers["launches"] == ("4" if tokens <= 8 else "6") and int(numbers["products"]) > 0


def test_deadlock_in_words(tmp_path):
    """Threads that wait for ever are named, with what they wait at."""
    layer = Layer(64, 32, 4, 2)
    process, _, _ = call(layer, tmp_path, 3, "--order=reverse", "--mutate=combine:extra-barrier:0")
    assert process.returncode == 1
    assert re.search(
        r"deadlock: from thread 32 .* wait at .*nvvm.barrier #0; 32 of 128 threads have ended",
        process.stderr,
    ), process.stderr


def test_no_tokens(tmp_path):
    process, _, out = call(LAYERS[0], tmp_path, 0)
    assert process.returncode == 0, process.stderr
    assert "launches 0" in process.stdout and out["y"].size == 0


def test_chosen_tiles(tmp_path):
    """The tiles of the cost model, a few rows and many."""
    layer = Layer(96, 64, 4, 2, renormalize="sum")
    for tokens in (3, 300):
        process, x, out = call(layer, tmp_path, tokens)
        assert process.returncode == 0, process.stderr
        want, size = gpu_layers.experts_sum(layer, x, out["experts"], out["weights"])
        assert close(out["y"], want, size)


def test_route(tmp_path):
    layer = Layer(300, 16, 70, 6)
    process, x, out = call(layer, tmp_path, 21, "--padding=5", "--shift=1", function="r0")
    assert process.returncode == 0, process.stderr
    logits = check_routing(layer, x, out)
    np.testing.assert_allclose(out["logits"], logits, rtol=1e-5, atol=1e-5)


def test_equal_scores(tmp_path):
    """Equal scores go to the lowest ids; -0 is 0; a row of NaN takes the first K."""
    layer = Layer(32, 16, 40, 4)
    layer.router[:] = 0
    layer.router[7] = layer.router[35] = 1
    x = np.zeros((2, 32), np.float32)
    x[0] = -0.0
    x[1] = 1
    process, _, out = call(layer, tmp_path, 2, function="r0", x=x)
    assert process.returncode == 0, process.stderr
    np.testing.assert_array_equal(out["experts"], [[0, 1, 2, 3], [7, 35, 0, 1]])


def given_cases():
    rng = np.random.default_rng(5)
    one = np.full((40, 2), 3)
    yield "one hot expert, twice for a token", one
    ids = rng.integers(-1, 6, (23, 3))
    yield "missing and foreign ids", ids
    yield "nothing at all", np.full((9, 2), -1)
    yield "more slots than experts", rng.integers(0, 5, (4, 9))


@pytest.mark.parametrize("name,ids", given_cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_given_experts(name, ids, tmp_path):
    layer = Layer(72, 40, 5, 2)
    weights = np.random.default_rng(6).random(ids.shape).astype(np.float32)
    process, x, out = call(
        layer,
        tmp_path,
        len(ids),
        f"--tiles={TILES}",
        "--order=reverse",
        "--padding=3",
        "--shift=1",
        function="e0",
        slots=ids.shape[1],
        given=(ids, weights),
    )
    assert process.returncode == 0, process.stderr
    want, size = gpu_layers.experts_sum(layer, x, ids, weights)
    assert close(out["y"], want, size)


def test_dense_and_accumulate(tmp_path):
    layer = Layer(72, 40, 1, 1)
    start = to_bf16(np.random.default_rng(9).standard_normal((37, 72)))
    process, x, out = call(layer, tmp_path, 37, f"--tiles={TILES}", function="d0", start=start)
    assert process.returncode == 0, process.stderr
    ones = np.ones((37, 1))
    want, size = gpu_layers.experts_sum(layer, x, np.zeros((37, 1), int), ones, start)
    assert close(out["y"], want, size)


@pytest.mark.parametrize("shift", [0, 1])
def test_f32_tensors(shift, tmp_path):
    """x in f32 is rounded to bf16 when it is read; y in f32 is not rounded."""
    layer = Layer(72, 40, 5, 2, renormalize="sum", x="f32", y="f32")
    x = np.random.default_rng(3).standard_normal((11, 72)).astype(np.float32)
    start = np.random.default_rng(4).standard_normal((11, 72)).astype(np.float32)
    process, _, out = call(
        layer, tmp_path, 11, f"--tiles={TILES}", f"--shift={shift}", x=x, start=start
    )
    assert process.returncode == 0, process.stderr
    x = to_bf16(x)
    check_routing(layer, x, out)
    want, size = gpu_layers.experts_sum(layer, x, out["experts"], out["weights"], start)
    assert close(out["y"], want, size)
    assert (from_bf16(bf16_bits(out["y"])) != out["y"]).any()


def test_nan_stays_in_its_row(tmp_path):
    layer = Layer(72, 40, 5, 2, renormalize="sum")
    x = to_bf16(np.random.default_rng(8).standard_normal((9, 72)))
    _, _, clean = call(layer, tmp_path, 9, f"--tiles={TILES}", x=x)
    dirty = stored(x, "bf16").reshape(9, 72)
    dirty[4, 50] = 0x7FC0
    dirty.tofile(tmp_path / "x.bin")
    command = [TOOL, tmp_path / "layer.mlir", f"--tiles={TILES}", f"{tmp_path}:9:2"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    y = from_bf16(np.fromfile(tmp_path / "y.out", np.uint16).reshape(9, 72))
    assert np.isnan(y[4]).all()
    others = np.arange(9) != 4
    np.testing.assert_array_equal(y[others], clean["y"][others])


def test_same_bits(tmp_path):
    """One token's bits are the same in every batch, tile, order of warps and time of copies."""
    layer = Layer(200, 72, 8, 3, renormalize="sum")
    x = to_bf16(np.random.default_rng(2).standard_normal((40, 200)))
    runs = []
    for tokens, options in [
        (40, [f"--tiles={TILES}"]),
        (40, [f"--tiles={TILES}", "--order=reverse", "--early-copies"]),
        (40, ["--order=shuffled:11"]),
        (2, ["--shift=1"]),
    ]:
        process, _, out = call(layer, tmp_path, tokens, *options, x=x[:tokens])
        assert process.returncode == 0, process.stderr
        runs.append(out["y"])
    for y in runs[1:]:
        np.testing.assert_array_equal(y, runs[0][: len(y)])


FAULTS = [
    ("sort:extra-barrier:0", "expected all threads at one barrier"),
    ("combine:extra-barrier:0", "ended"),
    ("up_1:drop-barrier:0", "race"),
    ("up_1:drop-barrier:2", "race"),
    ("down_1:drop-barrier:0", "race"),
    ("sort:drop-barrier:0", "race"),
    ("logits:drop-barrier:0", "race"),
    ("up_1:drop-wait:0", "copy in flight"),
    ("up_1:late-wait:0", "copy in flight"),
    ("down_1:drop-commit:1", "copy in flight"),
    ("up_1:transpose:0", "numbers"),
    ("up_1:swap-operands:0", "numbers"),
    ("down_1:drop-product:0", "numbers"),
    ("up_1:swizzle:0", None),
    ("down_1:swizzle:1", None),
    ("up_1:shuffle-far:0", None),
    ("sort:drop-vote:0", None),
    ("sort:drop-store:0", None),
    ("sort:drop-store:4", None),
    ("select:drop-store:0", None),
    ("logits:drop-store:0", None),
    ("combine:drop-store:0", None),
    ("up_1:flip-compare:1", None),
    ("select:flip-compare:0", None),
    ("combine:flip-compare:0", None),
    # Blocks that exchange bytes: an atomic orders them beside a fence on either side of it.
    ("route:drop-fence:0", "expected a fence, an atomic and a fence in between"),
    ("route:drop-fence:1", "expected a fence, an atomic and a fence in between"),
    ("route:more-blocks:0", "nobody wrote"),
    ("route:fewer-blocks:0", "nobody wrote"),
    ("route:drop-barrier:0", "race"),
    ("route:drop-barrier:1", "expected a fence, an atomic and a fence in between"),
    ("route:drop-barrier:2", "race"),
    ("route:drop-barrier:3", "race"),
    ("route:drop-barrier:4", "race"),
    ("route:drop-product:0", "numbers"),
    ("route:drop-store:0", None),
]


def test_router_on_tensor_cores(tmp_path):
    """The same bits of routing whatever launches made it: one, slices, or all slices in a block."""
    layer = Layer(300, 16, 70, 3)
    x = to_bf16(np.random.default_rng(2).standard_normal((4100, 300)))
    routes = []
    for tokens in (4100, 40, 3):
        process, _, out = call(layer, tmp_path, tokens, function="r0", x=x[:tokens])
        assert process.returncode == 0, process.stderr
        numbers = dict(re.findall(r"(\w+) (\d+)", process.stdout.split(" ", 1)[1]))
        assert numbers["launches"] == ("1" if tokens == 3 else "2") and int(numbers["products"]) > 0
        routes.append(out)
    for out in routes[1:]:
        for name in ("experts", "weights", "logits"):
            np.testing.assert_array_equal(out[name], routes[0][name][: len(out[name])])
    check_routing(layer, x[:40], routes[1])


@pytest.mark.parametrize("fault,how", FAULTS, ids=[fault for fault, _ in FAULTS])
def test_planted_fault(fault, how, tmp_path):
    """Each fault is found: by the executor in words, or by the numbers."""
    few = fault.startswith("route:")
    layer = Layer(600 if few else 200, 72, 8, 3, renormalize="sum")
    tokens = 5 if few else 19
    process, x, out = call(
        layer, tmp_path, tokens, f"--tiles={TILES}", "--order=shuffled:1", f"--mutate={fault}"
    )
    assert process.returncode in (0, 1), process.stderr
    if process.returncode:
        assert "kernel `" in process.stderr
        assert how is None or how in process.stderr, process.stderr
        return
    assert how in (None, "numbers"), "the executor did not report the fault"
    logits, weights, experts = gpu_layers.route(layer, x)
    want, size = gpu_layers.experts_sum(layer, x, experts, weights)
    same = np.array_equal(out["experts"], experts)
    assert not (same and close(out["y"], want, size))
