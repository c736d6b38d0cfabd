"""Sizes that are multiples of nothing, experts without tokens, tokens with one expert, NaN.

pytest test/python/test_sizes.py            # every pair of sizes, activations and routers
pytest test/python/test_sizes.py --full     # also the whole product; hours
"""

import numpy as np
import oracle
import pytest
import sizes
import torch
from conftest import LEVELS, driver, moec_command

DENSE = [(8, 1, "relu"), (33, 7, "gelu"), (130, 96, "gelu_tanh"), (1000, 347, "silu")]
COUNTS = (1, 3, 40)


class Model:
    """Layers of many sizes, compiled at once for one level, and transformers' blocks with the same
    weights."""

    def __init__(self, folder, specs, dense, dtype, level):
        layers = [sizes.layer_spec(s, f"moe{i}", i) for i, s in enumerate(specs)]
        layers += [sizes.dense_spec(*s, f"dense{i}", len(specs) + i) for i, s in enumerate(dense)]
        weights = {
            layer["name"]: sizes.make_weights(layer, dtype, seed)
            for seed, layer in enumerate(layers)
        }
        spec = sizes.write(folder, sizes.model_spec(layers, dtype), weights)
        self.path, self.dtype, self.level = folder / "out.moec", dtype, level
        arguments = ["--checkpoint", folder / "checkpoint", "-o", self.path, "--cpu", level]
        moec_command("compile", spec, *arguments, "--quiet")
        self.blocks = [oracle.block_of(layer, weights[layer["name"]]) for layer in layers]

    def pairs(self):
        import moec

        library = moec.load(self.path)
        assert {layer.info.level for layer in library.layers} == {self.level}
        return list(zip(library.layers, self.blocks, strict=True))


COMBINATIONS = [(d, v) for d in sizes.DTYPES for v in LEVELS]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=["-".join(c) for c in COMBINATIONS])
def model(request, tmp_path_factory):
    driver()
    folder = tmp_path_factory.mktemp("sizes")
    dtype, level = request.param
    specs = [s for s in sizes.pairwise(60) if s[6:] == (dtype, level)]
    dense = DENSE[COMBINATIONS.index(request.param) % len(DENSE) :][:1]
    return Model(folder, specs, dense, dtype, level)


def label(block, model, count):
    s = block.spec
    return f"{ {k: s.get(k) for k in 'HFEK'} } {s['expert']} {model.dtype} {model.level} T={count}"


@pytest.mark.parametrize("count", COUNTS)
def test_every_pair_of_sizes(model, count):
    for layer, block in model.pairs():
        x = oracle.tokens(count, block.hidden, model.dtype)
        what = label(block, model, count)
        oracle.check_layer(layer, block, x, model.dtype, what)


def test_experts_without_tokens_and_tokens_with_one_expert(model):
    count = 23
    for layer, block in model.pairs():
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
            what = label(block, model, count)
            s = block.spec
            call = (x, *kept)
            oracle.check_close(y, exact, own, model.dtype, s["H"], s["F"], what, block, call)


def test_nan_and_infinity_stay_in_their_rows(model):
    count = 19
    for layer, block in model.pairs():
        x = oracle.tokens(count, block.hidden, model.dtype)
        clean = layer(x)
        bad = x.clone()
        bad[3, 0] = torch.nan
        bad[7, -1] = torch.inf
        bad[8] = -torch.inf
        y = layer(bad, out=oracle.poisoned(x.shape, x.dtype))
        good = torch.ones(count, dtype=torch.bool)
        good[[3, 7, 8]] = False
        what = label(block, model, count)
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


@pytest.mark.full
@pytest.mark.parametrize("combination", COMBINATIONS, ids=["-".join(c) for c in COMBINATIONS])
@pytest.mark.parametrize("part", range(16))
def test_the_whole_product(tmp_path, combination, part):
    model = Model(tmp_path, sizes.product()[part::16], [], *combination)
    for layer, block in model.pairs():
        for count in COUNTS:
            x = oracle.tokens(count, block.hidden, model.dtype)
            oracle.check_layer(layer, block, x, model.dtype, label(block, model, count))


def test_accumulate_adds_to_what_is_there(model):
    for layer, block in model.pairs()[:12]:
        x = oracle.tokens(9, block.hidden, model.dtype)
        before = oracle.tokens(9, block.hidden, model.dtype, seed=3)
        y = layer(x, out=before.clone(), accumulate=True)
        exact = oracle.wide(before) + block.reference()(x)
        unit = 1e-5 if model.dtype == "f32" else 6 * 2**-9
        assert oracle.relative(y, exact) < unit, label(block, model, 9)
        np.testing.assert_equal(np.isfinite(oracle.wide(y)).all(), True)
