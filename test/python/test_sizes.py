"""Sizes that are multiples of nothing, experts without tokens, tokens with one expert, NaN.

pytest test/python/test_sizes.py            # every pair of sizes, activations and routers
pytest test/python/test_sizes.py --full     # also the whole product; about half an hour
"""

import numpy as np
import oracle
import pytest
import sizes
import torch
from conftest import driver, moec_command

DTYPES = ("f32", "bf16")
DENSE = [(8, 1, "relu"), (33, 7, "gelu"), (130, 96, "gelu_tanh"), (1000, 347, "silu")]
COUNTS = (1, 3, 40)


class Model:
    """Layers of many sizes, compiled at once, and transformers' blocks with the same weights."""

    def __init__(self, folder, specs, dtype):
        layers = [sizes.layer_spec(s, f"moe{i}", i) for i, s in enumerate(specs)]
        layers += [sizes.dense_spec(*s, f"dense{i}", len(specs) + i) for i, s in enumerate(DENSE)]
        weights = {
            layer["name"]: sizes.make_weights(layer, dtype, seed)
            for seed, layer in enumerate(layers)
        }
        spec = sizes.write(folder, sizes.model_spec(layers, dtype), weights)
        self.path, self.dtype = folder / "out.moec", dtype
        arguments = ["--checkpoint", folder / "checkpoint", "-o", self.path, "--quiet"]
        moec_command("compile", spec, *arguments)
        self.blocks = [oracle.block_of(layer, weights[layer["name"]]) for layer in layers]

    def pairs(self, level):
        import moec

        library = moec.load(self.path, cpu_level=level)
        return list(zip(library.layers, self.blocks, strict=True))


@pytest.fixture(scope="module", params=DTYPES)
def model(request, tmp_path_factory):
    driver()
    folder = tmp_path_factory.mktemp(f"sizes-{request.param}")
    return Model(folder, sizes.pairwise(60), request.param)


def label(block, dtype, level, count):
    s = block.spec
    return f"{ {k: s.get(k) for k in 'HFEK'} } {s['expert']} {dtype} {level} T={count}"


@pytest.mark.parametrize("count", COUNTS)
def test_every_pair_of_sizes(model, level, count):
    for layer, block in model.pairs(level):
        x = oracle.tokens(count, block.hidden, model.dtype)
        what = label(block, model.dtype, level, count)
        oracle.check_layer(layer, block, x, model.dtype, what)


def test_experts_without_tokens_and_tokens_with_one_expert(model, level):
    count = 23
    for layer, block in model.pairs(level):
        if block.kind == "dense":
            continue
        x = oracle.tokens(count, block.hidden, model.dtype)
        for ids in (
            torch.full((count, 1), block.spec["E"] - 1),
            torch.full((count, 2), 0),  # the same expert twice
            torch.full((count, 3), -1),  # nobody
            torch.randint(-1, block.spec["E"], (count, 5)),  # more than K, some of them nobody
        ):
            w = torch.rand(ids.shape)
            y = layer.experts(x, ids, w, out=oracle.poisoned(x.shape, x.dtype))
            exact = block.reference().experts(x, ids, w)
            if (ids < 0).all():
                assert not y.any()
                continue
            kept = ids.clamp(min=0), w * (ids >= 0)  # what transformers' loop can express
            own = block.experts(x, *kept)
            what = label(block, model.dtype, level, count)
            s = block.spec
            oracle.check_close(y, exact, own, model.dtype, s["H"], s["F"], what)


def test_nan_and_infinity_stay_in_their_rows(model, level):
    count = 19
    for layer, block in model.pairs(level):
        x = oracle.tokens(count, block.hidden, model.dtype)
        clean = layer(x)
        bad = x.clone()
        bad[3, 0] = torch.nan
        bad[7, -1] = torch.inf
        bad[8] = -torch.inf
        y = layer(bad, out=oracle.poisoned(x.shape, x.dtype))
        good = torch.ones(count, dtype=torch.bool)
        good[[3, 7, 8]] = False
        what = label(block, model.dtype, level, count)
        assert torch.equal(y[good], clean[good]), what
        assert y[3].isnan().all(), what
        if block.kind == "moe":
            ids = layer.route(bad)[0].numpy()
            assert ((ids >= 0) & (ids < block.spec["E"])).all(), what
            assert all(len(set(row)) == len(row) for row in ids), what


def test_the_cover_covers():
    """60 specs, and every two values of two factors that can meet do."""
    chosen = sizes.pairwise(60)
    assert len(set(chosen)) >= 60
    for k, e in ((1, 1), (2, 2), (8, 64), (8, 257), (3, 5)):
        assert any(s[2] == e and s[3] == k for s in chosen)
    for h in sizes.H:
        for f in sizes.F:
            assert any(s[:2] == (h, f) for s in chosen)
    assert len(sizes.product()) == 16 * (1 + 2 + 3 + 4 + 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", range(16))
def test_the_whole_product(request, tmp_path, dtype, part):
    if not request.config.getoption("--full"):
        pytest.skip("only with --full")
    from conftest import LEVELS

    model = Model(tmp_path, sizes.product()[part::16], dtype)
    for level in LEVELS:
        for layer, block in model.pairs(level):
            for count in COUNTS:
                x = oracle.tokens(count, block.hidden, dtype)
                what = label(block, dtype, level, count)
                oracle.check_layer(layer, block, x, dtype, what)


def test_accumulate_adds_to_what_is_there(model, level):
    for layer, block in model.pairs(level)[:12]:
        x = oracle.tokens(9, block.hidden, model.dtype)
        before = oracle.tokens(9, block.hidden, model.dtype, seed=3)
        y = layer(x, out=before.clone(), accumulate=True)
        exact = oracle.wide(before) + block.reference()(x)
        unit = 2e-6 if model.dtype == "f32" else 6 * 2**-9
        assert oracle.relative(y, exact) < unit, label(block, model.dtype, level, 9)
        np.testing.assert_equal(np.isfinite(oracle.wide(y)).all(), True)
