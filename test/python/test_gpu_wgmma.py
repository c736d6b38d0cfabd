"""The kernels of sm_90a (TMA, mbarriers, wgmma) on the SIMT executor: layers against float64, and
planted faults."""

import re

import gpu_layers
import numpy as np
import pytest
from gpu_layers import Layer, to_bf16
from test_gpu_simt import call, check_routing, close, given_cases


def tile(rows, stages, up_to=0, raster="rows"):
    return (
        f"#moe.gpu_tile<cols = 128, rows = {rows}, k = 64, stages = {stages}, warps_cols = 8,"
        f" warps_rows = 1, raster = {raster}, up_to = {up_to}, unit = wgmma>"
    )


# Small tiles, so that small sizes have many; a ring of two, and one that is longer than the work.
TILES = f"[{tile(8, 2, 8)}, {tile(24, 3, 60, 'columns')}, {tile(72, 2)}]"
HOPPER = ("--gpu=sm_90a", f"--tiles={TILES}")

# Widths that end within a tile, a panel, a stage: as 704, 1408 and 2880 do in their larger tiles.
LAYERS = [
    Layer(64, 32, 4, 2, renormalize="sum"),
    Layer(72, 88, 5, 2, order="select_then_score"),
    Layer(360, 176, 8, 3, activation="gelu_tanh", scale=2.5),
    Layer(33, 7, 40, 33, score="sigmoid", renormalize="sum", router_type="f32"),
    Layer(96, 72, 70, 1),
    Layer(72, 40, 5, 2, order="select_then_score", router_bias=True, bias=True, clamp=(1.0, 1.7)),
]


@pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda layer: f"H{layer.H}F{layer.F}E{layer.E}K{layer.K}"
)
@pytest.mark.parametrize("tokens", [1, 19, 70])
def test_layer(layer, tokens, tmp_path):
    if tokens * layer.K > 400:
        tokens = 6
    process, x, out = call(layer, tmp_path, tokens, *HOPPER, "--order=shuffled:3")
    assert process.returncode == 0, process.stderr
    check_routing(layer, x, out)
    want, size = gpu_layers.experts_sum(layer, x, out["experts"], out["weights"].astype(np.float64))
    assert close(out["y"], want, size)
    numbers = dict(re.findall(r"(\w+) (\d+)", process.stdout.split(" ", 1)[1]))
    assert numbers["launches"] == ("4" if tokens <= 8 else "6")
    assert int(numbers["wgmmas"]) > 0 and int(numbers["boxes"]) > 0


def test_no_tokens(tmp_path):
    process, _, out = call(LAYERS[0], tmp_path, 0, *HOPPER)
    assert process.returncode == 0, process.stderr
    assert "launches 0" in process.stdout and out["y"].size == 0


@pytest.mark.parametrize("name,ids", given_cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_given_experts(name, ids, tmp_path):
    layer = Layer(72, 40, 5, 2)
    weights = np.random.default_rng(6).random(ids.shape).astype(np.float32)
    process, x, out = call(
        layer,
        tmp_path,
        len(ids),
        *HOPPER,
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
    process, x, out = call(layer, tmp_path, 37, *HOPPER, function="d0", start=start)
    assert process.returncode == 0, process.stderr
    ones = np.ones((37, 1))
    want, size = gpu_layers.experts_sum(layer, x, np.zeros((37, 1), int), ones, start)
    assert close(out["y"], want, size)


def test_chosen_tiles(tmp_path):
    """The tiles of the cost model: a few rows, and the largest tile."""
    layer = Layer(96, 64, 2, 2, renormalize="sum")
    for tokens in (3, 280):
        process, x, out = call(layer, tmp_path, tokens, "--gpu=sm_90a")
        assert process.returncode == 0, process.stderr
        want, size = gpu_layers.experts_sum(layer, x, out["experts"], out["weights"])
        assert close(out["y"], want, size)


def test_same_bits(tmp_path):
    """One token's bits are the same in every batch, tile, order of warps and time of copies."""
    layer = Layer(200, 72, 8, 3, renormalize="sum")
    x = to_bf16(np.random.default_rng(2).standard_normal((40, 200)))
    runs = []
    for tokens, options in [
        (40, HOPPER),
        (40, (*HOPPER, "--order=reverse", "--early-copies")),
        (40, ("--gpu=sm_90a", "--order=shuffled:11")),
        (2, ("--gpu=sm_90a", "--shift=1")),
    ]:
        process, _, out = call(layer, tmp_path, tokens, *options, x=x[:tokens])
        assert process.returncode == 0, process.stderr
        runs.append(out["y"])
    for y in runs[1:]:
        np.testing.assert_array_equal(y, runs[0][: len(y)])


FAULTS = [
    ("up_1:more-bytes:0", "bytes are missing"),
    ("up_1:drop-arrive:0", "deadlock"),  # of those that fill
    ("up_1:drop-arrive:2", "deadlock"),  # of those that multiply: nobody says that a place is empty
    ("up_1:drop-mbarrier-wait:0", "race"),  # nobody waits until the place is empty
    ("up_1:drop-mbarrier-wait:1", "race"),  # … until it is full
    ("up_1:flip-phase:0", None),
    ("up_1:flip-phase:1", None),
    ("up_1:drop-proxy-fence:0", "fence.proxy.async"),
    ("up_1:drop-init-fence:0", "fence.mbarrier.init"),
    ("up_1:drop-barrier:0", None),
    ("up_1:drop-barrier:1", "race"),  # between writing a piece of the result and reading it
    ("down_1:drop-wait:0", "race"),
    ("down_1:late-wait:0", None),
    ("up_1:drop-wgmma-fence:0", "wgmma.fence"),
    ("up_1:late-wgmma-wait:0", "wgmma in flight"),
    ("up_1:late-wgmma-wait:4", None),
    ("up_1:swap-left:0", "numbers"),
    ("up_1:descriptor:0", None),
    ("up_1:box-place:0", "numbers"),
    ("down_1:swizzle:1", None),
]


@pytest.mark.parametrize("fault,how", FAULTS, ids=[fault for fault, _ in FAULTS])
def test_planted_fault(fault, how, tmp_path):
    """Each fault is found: by the executor in words, or by the numbers."""
    layer = Layer(200, 104, 8, 3, renormalize="sum")
    process, x, out = call(layer, tmp_path, 19, *HOPPER, "--order=shuffled:1", f"--mutate={fault}")
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
