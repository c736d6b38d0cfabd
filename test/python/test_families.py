"""Every family of the model table beyond test_oracle.py's, compiled by command line from files
written by transformers, against the family's own blocks and float64.

One CPU level for each run; `--full` compiles and forces all of them (test_attributes.py does so for
every attribute).
"""

import families
import moec
import numpy as np
import oracle
import pytest
import torch
from conftest import LEVELS, driver, moec_command
from moec.verify import verify

TOKENS = (1, 3, 64)


class Compiled:
    def __init__(self, name: str, dtype: str, folder, full: bool):
        driver()
        self.family = families.make_family(name, dtype, folder)
        self.path, self.name, self.dtype = folder / "out.moec", name, dtype
        self.levels = LEVELS if full else LEVELS[-1:]
        only = () if full else ("--cpu", LEVELS[-1])
        moec_command("compile", self.family.path, "-o", self.path, "--quiet", *only)

    def pairs(self, level: str):
        layers = moec.load(self.path, cpu_level=level).layers
        return list(zip(layers, self.family.layers, strict=True))


@pytest.fixture(
    scope="module",
    params=[(n, d) for n in families.FAMILIES for d in ("f32", "bf16")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def compiled(request, tmp_path_factory):
    name, dtype = request.param
    full = request.config.getoption("--full")
    return Compiled(name, dtype, tmp_path_factory.mktemp(name), full)


def test_what_the_layers_are(compiled):
    """Names, kinds and sizes are the modules' own, though keys with default values are missing."""
    assert compiled.family.dropped
    kinds = set()
    for layer, theirs in compiled.pairs(LEVELS[-1]):
        spec, info = theirs.spec, layer.info
        assert layer.name == theirs.name
        assert (info.kind, info.H, info.F) == (theirs.kind, spec["H"], spec["F"])
        assert (info.E, info.K) == (spec.get("E", 1), spec.get("K", 1))
        assert info.S == spec.get("combine", {}).get("shared_width", 0)
        assert info.format == info.compute == compiled.dtype
        asks = theirs.kind == "moe" and bool(spec["router"].get("router_x"))
        assert info.needs == (("router_x",) if asks else ())
        kinds.add(theirs.kind)
    assert "moe" in kinds


@pytest.mark.parametrize("count", TOKENS)
def test_layers(compiled, count):
    for level in compiled.levels:
        for layer, theirs in compiled.pairs(level):
            where = f"{compiled.name} {theirs.name} {compiled.dtype} {level} T={count}"
            check(layer, theirs, compiled.dtype, count, where)


def check(layer, theirs: families.Layer, dtype: str, count: int, where: str) -> None:
    spec, ref = theirs.spec, theirs.reference()
    x = oracle.tokens(count, spec["H"], dtype)
    # Against transformers' own error where there are enough numbers for luck not to decide.
    many = count >= 17

    def close(ours, exact, own, what=""):
        own = own if many else None
        oracle.check_close(ours, exact, own, dtype, spec["H"], spec["F"], where + what)

    if theirs.kind == "dense":
        close(layer(x, out=oracle.poisoned(x.shape, x.dtype)), ref(x), theirs(x))
        return

    extra = {}
    if spec["router"].get("router_x"):
        extra["router_x"] = oracle.tokens(count, spec["H"], dtype, seed=4)
    read = extra.get("router_x", x)
    exact = ref.routing(read)
    clear = exact.gap > 1e-5  # sigmoid scores of loud tokens may all but tie
    assert not many or clear.mean() > 0.8, where
    ids, weights = layer.route(x, **extra)
    ours, best = np.argsort(ids.numpy(), -1), np.argsort(exact.experts, -1)

    def sort(a, order):
        return np.take_along_axis(oracle.wide(a), order, -1)[clear]

    assert (sort(ids, ours) == sort(exact.experts, best)).all(), where
    expected = sort(exact.weights, best)
    np.testing.assert_allclose(sort(weights, ours), expected, 2e-5, 1e-7, err_msg=where)
    if dtype == "f32":  # in bf16 their routers round, and choose others
        ids, weights = theirs.route(read)
        order = np.argsort(ids.numpy(), -1)
        assert (sort(ids, order) == sort(exact.experts, best)).all(), where
        np.testing.assert_allclose(sort(weights, order), expected, 2e-5, 1e-7, err_msg=where)

    # The experts alone, as transformers' Experts computes them.
    ids, weights = theirs.route(read)
    given = layer.experts(x, ids, weights, out=oracle.poisoned(x.shape, x.dtype))
    close(given, ref.experts(x, ids, weights), theirs.experts(x, ids, weights), " experts given")

    # The whole layer. In bf16 their modules get the exact choice.
    y = layer(x, out=oracle.poisoned(x.shape, x.dtype), **extra)
    if dtype == "f32":
        own = theirs(x, **extra)
    else:
        choice = torch.from_numpy(exact.experts).long(), torch.from_numpy(exact.weights).float()
        own = theirs.given(x, *choice)
    keep = torch.from_numpy(clear)
    close(y[keep], ref(x, **extra)[clear], own[keep])


def test_verify(compiled):
    """`moec verify` reads the checkpoint anew and agrees, transformers' own blocks beside."""
    result = verify(compiled.path, compiled.family.path, cpu_level=LEVELS[-1])
    assert result.ok, result.table()
    moe = [layer for layer in result.layers if layer.kind == "moe"]
    assert moe and all(layer.same > (40 if compiled.dtype == "f32" else 16) for layer in moe)
    # llama4's experts are not dispatched by transformers, and it has no class for kimi_k2.
    if compiled.name not in ("llama4", "kimi_k2"):
        assert all(layer.transformers > 0 for layer in moe)


def test_fused_files(compiled, tmp_path):
    """Tensors stored as they lie in memory give the same bits as the files of save_pretrained."""
    moec_command(
        "pack", compiled.family.fused, "--for", compiled.path, "-o", tmp_path / "w", "--quiet"
    )
    other = moec.load(compiled.path, weights=tmp_path / "w", cpu_level=LEVELS[-1]).layers
    for (layer, theirs), two in zip(compiled.pairs(LEVELS[-1]), other, strict=True):
        x = oracle.tokens(17, theirs.spec["H"], compiled.dtype)
        extra = {"router_x": x.flip(0)} if "router_x" in layer.info.needs else {}
        assert torch.equal(layer(x, **extra), two(x, **extra)), layer.name


def test_ties_go_to_the_lowest_id(compiled):
    """Experts with equal router rows and biases: the lowest numbers, in the best groups."""
    layers = moec.load(compiled.path, cpu_level=LEVELS[-1]).layers  # weights of its own
    at = next(i for i, layer in enumerate(compiled.family.layers) if layer.kind == "moe")
    layer, theirs = layers[at], compiled.family.layers[at]
    e, k = theirs.spec["E"], theirs.spec["K"]
    layer.set_weight("router", theirs.weights["router"][:1].expand(e, -1))
    for role in ("router_bias", "selection_bias"):
        if role in theirs.weights:
            layer.set_weight(role, torch.zeros(e))
    x = oracle.tokens(9, theirs.spec["H"], compiled.dtype)
    extra = {"router_x": x} if "router_x" in layer.info.needs else {}
    ids, _ = layer.route(x, **extra)
    assert torch.equal(ids.sort(-1).values, torch.arange(k, dtype=torch.int32).expand(9, k))
