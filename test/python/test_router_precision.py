"""router.precision = model: the numbers and the choices of transformers' routers in bfloat16.

Each family of families.py is compiled as a checkpoint would be, with `--router model`, and held
against the router module of the same model in bf16. Two things make a choice open, and are counted:
equal scores, which torch.topk lists in no promised order, and logits so close to the middle between
two bf16 numbers that the order of a sum decides how they round.
"""

import copy
import json

import families
import moec
import moec.transformers as mt
import numpy as np
import oracle
import pytest
import torch
from conftest import LEVELS, driver, moec_command
from moec._semantics import expand_layers
from moec.reference import Reference, round_bf16
from test_transformers import cache, ids_of, logits  # noqa: F401
from test_transformers_rows import PARTS, make

TOKENS = 256
# Every arithmetic, order and kind of weights once; --full takes all families.
FAMILIES = ("qwen2_moe-norm", "minimax_m2", "granitemoeshared", "deepseek_v3", "ernie4_5_moe")
FAMILIES += ("lfm2_moe", "gpt_oss", "gemma4", "llama4", "phimoe")
# Each has tensors or a structure of its own around the experts.
ROWS = ("gpt_oss", "gemma4_text", "granitemoeshared", "ernie4_5_moe")
MORE_ROWS = ("qwen2_moe", "lfm2_moe", "hunyuan_v1_moe")
# Families whose routers compute in f32 from inputs of any format: both precisions are the same.
IN_F32 = ("deepseek", "kimi", "glm4", "hunyuan", "ernie")


class Router:
    """One compiled layer, transformers' router of the same weights, and the reference."""

    def __init__(self, path, family, row):
        # As transformers loads it: what a class keeps in f32 is f32.
        kind, config = type(family.model), family.model.config
        model = kind.from_pretrained(family.path, config=config, dtype=torch.bfloat16).eval()
        layers = moec.load(path, cpu_level=LEVELS[-1]).layers
        named = {layer.name: layer for layer in layers}
        theirs = families.layers_of(model, row)
        self.theirs = next(t for t in theirs if t.kind == "moe" and t.name in named)
        self.ours = named[self.theirs.name]
        spec = json.loads((path / "manifest.json").read_text())["spec"]
        self.spec = next(s for s in expand_layers(spec) if s["name"] == self.ours.name)
        self.x = oracle.tokens(TOKENS, self.theirs.spec["H"], "bf16")
        self.reference = Reference(self.spec, self.theirs.weights, rounding="bf16")

    def route(self):
        more = {"router_x": self.x} if "router_x" in self.ours.info.needs else {}
        return self.ours.route(self.x, logits=True, **more)

    def settled(self):
        """Tokens none of whose logits may round in two ways."""
        r, w = self.spec["router"], {k: oracle.wide(v) for k, v in self.theirs.weights.items()}
        x = oracle.wide(self.x)
        if r.get("input") == "rms_norm":
            x = round_bf16(x / np.sqrt((x**2).mean(-1, keepdims=True) + r["input_epsilon"]))
            x = round_bf16(round_bf16(x * w["router_scale"]) * x.shape[-1] ** -0.5)
        z = x @ w["router"].T + (w["router_bias"] if r.get("logit_bias") else 0)
        margin = 2.0**-21 * (np.abs(x) @ np.abs(w["router"]).T + np.abs(z))
        return (round_bf16(z - margin) == round_bf16(z + margin)).all(-1)


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    if "router" in metafunc.fixturenames:
        names = list(families.FAMILIES) if full else FAMILIES
        metafunc.parametrize("router", names, indirect=True, scope="module")
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", (*ROWS, *MORE_ROWS) if full else ROWS)


@pytest.fixture(scope="module")
def router(request, tmp_path_factory):
    driver()
    folder = tmp_path_factory.mktemp(request.param)
    family = families.make_family(request.param, "bf16", folder)
    path = folder / "out.moec"
    index = next(i.name.split(".")[2] for i in family.layers if i.kind == "moe")
    options = ("--router", "model", "--quiet", "--cpu", LEVELS[-1], "--layers", index)
    moec_command("compile", family.path, "-o", path, *options)
    made = Router(path, family, families.FAMILIES[request.param][0])
    made.name = request.param
    return made


def dense(ids, weights, experts):
    out = np.zeros((len(ids), experts))
    np.put_along_axis(out, oracle.wide(ids).astype(np.int64), oracle.wide(weights), -1)
    return out


def test_choices_and_weights_are_transformers(router):
    e = router.ours.info.E
    ids, weights, z = router.route()
    their_ids, their_weights = router.theirs.route(router.x)
    exact = router.reference.routing(router.x)
    r = router.spec["router"]
    settled = router.settled() if r.get("model_arithmetic") != "cast_inputs" else exact.gap > 1e-5
    assert settled.mean() > 0.8, settled.mean()
    tied = settled & (exact.gap == 0)
    same = (np.sort(ids, -1) == np.sort(their_ids, -1)).all(-1)
    print(f"{router.name}: {TOKENS} tokens, {(~settled).sum()} open, {tied.sum()} tied,", end=" ")
    print(f"{(~same).sum()} differ")

    # Logits, as the model has them.
    if r.get("model_arithmetic") != "cast_inputs":
        np.testing.assert_array_equal(z.numpy()[settled], exact.logits[settled])
    # The same choice; where scores are equal, one that is as good.
    clear = settled & ~tied
    assert same[clear].all(), np.flatnonzero(clear & ~same)
    for chosen in (ids, their_ids):
        scores = np.take_along_axis(exact.scores, oracle.wide(chosen).astype(np.int64), -1)
        best = np.take_along_axis(exact.scores, exact.experts.astype(np.int64), -1)
        np.testing.assert_array_equal(np.sort(scores[settled]), np.sort(best[settled]))
    # Weights: bit for bit where they are bf16, but for a rounding here and there.
    got, want = dense(ids, weights, e), dense(their_ids, their_weights, e)
    rows = settled & same
    if their_weights.dtype == torch.bfloat16:
        assert (got == round_bf16(got)).all()
        off = got[rows] != want[rows]
        assert off.mean() < 2e-3
        np.testing.assert_allclose(got[rows], want[rows], 2.0**-7, 1e-9)
    else:
        np.testing.assert_allclose(got[rows], want[rows], 4e-6, 1e-7)
    np.testing.assert_allclose(
        got[rows], dense(exact.experts, exact.weights, e)[rows], 2.0**-7, 1e-7
    ) if not tied.any() else None


def test_f32_chooses_others(router, tmp_path):
    """The check above can fail: without the model's rounding other experts are chosen."""
    if router.name.startswith(IN_F32):
        pytest.skip("the model's router is in f32")
    their_ids, _ = router.theirs.route(router.x)
    spec = copy.deepcopy(router.reference.spec)
    spec["router"]["precision"] = "f32"
    exact = Reference(spec, router.theirs.weights, rounding="bf16").routing(router.x)
    other = (np.sort(exact.experts, -1) != np.sort(their_ids, -1)).any(-1)
    _, _, z = router.route()
    assert other.any() or (np.abs(exact.logits - z.numpy()) > 2.0**-11).any()
    assert (exact.logits != router.reference.routing(router.x).logits).any()


@torch.no_grad()
def test_accelerate_chooses_as_the_model_does(row, tmp_path):
    """Whole bf16 models as from_pretrained loads them: no router stays torch's, and each chooses
    what torch's would from the same numbers, but for ties."""
    kind = type(made := make(row))
    made.save_pretrained(tmp_path / "m")
    options = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    model = kind.from_pretrained(tmp_path / "m", **options).eval()
    ids = ids_of(model, 2, 30)
    own = logits(model, ids)
    wanted = {}
    for layer in families.layers_of(model, row):
        if layer.kind == "moe":
            x = oracle.tokens(TOKENS, layer.spec["H"], "bf16")
            wanted[layer.name.removesuffix(".experts")] = (x, *layer.route(x))
    report = mt.accelerate(model, weights="drop")
    assert set(report) == set(wanted)
    assert set(report.values()) == {PARTS.get(row, "done: whole block")}, str(report)
    plans = [m.__dict__["_moec_block"] for m in model.modules() if "_moec_block" in m.__dict__]
    for plan in plans:
        x, ids_, weights = wanted[plan.name]
        more = {"router_x": x} if "router_x" in plan.live.layer.info.needs else {}
        chosen, got = plan.live.layer.route(x, **more)
        e = plan.live.layer.info.E
        same = (np.sort(chosen, -1) == np.sort(ids_, -1)).all(-1)
        assert same.mean() > 0.97, f"{plan.name}: {(~same).sum()} of {TOKENS} differ"
        a, b = dense(chosen, got, e)[same], dense(ids_, weights, e)[same]
        np.testing.assert_allclose(a, b, 2.0**-7, 1e-6)
    assert oracle.relative(logits(model, ids), own) < 0.1


def test_precision_of_a_given_library(compiled, tmp_path):
    """A library whose router rounds otherwise is refused, by name and with a way out."""
    checkpoint = compiled("mixtral", "bf16").checkpoint
    model = copy.deepcopy(checkpoint.model)
    library = compiled("mixtral", "bf16").load(None)
    report = mt.accelerate(model, library=library)
    text = report["model.layers.0.mlp"]
    assert "expected a router of precision model, but got f32" in text and "--router model" in text
    assert mt.accelerate(model, library=library, router="f32").done
    mt.restore(model)
    path = tmp_path / "model.moec"
    moec_command(
        "compile", checkpoint.path, "-o", path, "--router", "model", "--quiet", "--cpu", LEVELS[-1]
    )
    assert mt.accelerate(model, library=moec.load(path)).done
    mt.restore(model)
    assert "--router f32" in str(mt.accelerate(model, library=moec.load(path), router="f32"))
    # The weights are the same ones: a checkpoint is packed for code of either precision.
    moec_command("pack", checkpoint.path, "--for", path, "-o", tmp_path / "w", "--quiet")
    assert moec.load(path, weights=tmp_path / "w").layers[0].info.E


def test_the_option(compiled, tmp_path):
    folder = compiled("mixtral", "bf16").checkpoint.path
    stop = ("--compile-to", "import")
    done = moec_command("compile", folder, "--router", "half", "-o", "x", check=False)
    assert done.returncode == 2 and "--router: expected `f32` or `model`, but got `half`" in (
        done.stderr
    )
    text = moec_command("compile", folder, "--router", "model", *stop).stdout
    assert "precision = model" in text and "weight_dtype = f32" in text
    assert "precision" not in moec_command("compile", folder, *stop).stdout
