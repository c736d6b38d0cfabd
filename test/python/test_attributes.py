"""Every attribute of a layer, changed one at a time, against float64; equal bits for each.

One model holds a plain layer and one layer for each change. Expected values come from
moec.reference. A change must matter: with the plain layer's attributes and the same numbers the
reference gives another result, unless the change is an identity (then it must give the same).
"""

import math

import moec
import numpy as np
import oracle
import pytest
import sizes
import torch
from conftest import ALL_LEVELS, LEVELS, driver, moec_command
from moec.reference import reference

H, F, E, K, S = 66, 37, 24, 3, 45
COUNT = 41

SIGMOID = {"score": "sigmoid", "order": "score_then_select"}
BIASED = {**SIGMOID, "selection_bias": "score"}
GROUPS = {"groups": 4, "groups_kept": 2, "group_reduce": "sum_top2"}
SHARED = {"shared": "mlp", "shared_count": 1, "shared_width": S}

# name: the attributes that differ from softmax, the best K, SwiGLU; K where another one is needed.
CHANGES = {
    "plain": {},
    "renormalize": {"router": {"renormalize": "sum"}},
    "clamp_sum": {"router": {"renormalize": "clamp_sum", "epsilon": 0.3}},
    "lp_norm": {"router": {"renormalize": "lp_norm", "norm_power": 2.0}},
    "lp_norm_1": {"router": {"renormalize": "lp_norm", "norm_power": 1.0}},
    "sigmoid": {"router": {**SIGMOID, "renormalize": "none"}},
    "sigmoid_after": {"router": {"score": "sigmoid", "order": "select_then_score"}},
    "epsilon": {"router": {**SIGMOID, "renormalize": "sum", "epsilon": 0.25}},
    "scale": {"router": {**SIGMOID, "scale_value": 2.5}},
    "bias_on_score": {"router": BIASED},
    "bias_on_softmax": {"router": {"selection_bias": "score"}},
    "bias_on_logit": {"router": {"score": "sigmoid", "selection_bias": "logit"}},
    "bias_on_logit_softmax": {"router": {"selection_bias": "logit"}},
    "groups": {"router": {**BIASED, **GROUPS, "renormalize": "sum", "epsilon": 1e-20}},
    "groups_max": {"router": {**GROUPS, "group_reduce": "max"}},
    "groups_zero": {"router": {**BIASED, **GROUPS, "group_fill": "zero"}},
    "groups_of_6": {"router": {**BIASED, **GROUPS, "groups": 3, "groups_kept": 1}},
    "logit_bias": {"router": {"logit_bias": True, "order": "select_then_score"}},
    "logit_scale": {"router": {"logit_transform": "scale", "logit_constant": 0.4}},
    "logit_softcap": {"router": {"logit_transform": "softcap", "logit_constant": 1.5}},
    "per_expert_scale": {"router": {"renormalize": "sum", "scale": "per_expert"}},
    "rms_norm": {"router": {"input": "rms_norm"}},
    "router_x": {"router": {"input": "rms_norm", "router_x": True, "scale": "per_expert"}},
    "sparse_mixer": {"router": {"select": "sparse_mixer", "sparse_mixer_jitter": 0.1}, "K": 2},
    "gelu_tanh": {"expert": {"activation": "gelu_tanh"}},
    "relu2": {"expert": {"activation": "relu2"}},
    "mlp": {"expert": {"form": "mlp", "activation": "relu2"}},
    "mlp_bias": {"expert": {"form": "mlp", "activation": "relu", "bias": True}},
    "bias": {"expert": {"bias": True}},
    "clamp_pre": {"expert": {"clamp": "pre", "clamp_limit": 0.7}},
    "clamp_post": {"expert": {"clamp": "post", "clamp_limit": 0.4}},
    "clamp_oai": {"expert": {"clamp": "oai", "clamp_limit": 0.9, "clamp_alpha": 1.702}},
    "clamp_tanh": {"expert": {"clamp": "tanh", "clamp_limit": 0.8, "clamp_up_limit": 1.1}},
    "gpt_oss": {
        "router": {"logit_bias": True, "order": "select_then_score"},
        "expert": {"bias": True, "clamp": "oai", "clamp_limit": 1.5, "clamp_alpha": 1.702},
    },
    "apply_input": {"router": SIGMOID, "combine": {"apply": "input"}},
    "sum_scale": {"combine": {"sum_scale": 1.75}},
    "shared": {"combine": SHARED},
    "shared_gate": {"combine": {**SHARED, "shared_gate": "sigmoid"}},
    "shared_scaled": {"combine": {**SHARED, "sum_scale": 2.5}},
    "shared_as_wide": {"combine": {**SHARED, "shared_width": F}, "K": 1},
    "average": {"combine": {**SHARED, "join": "average"}},
    "shared_mlp": {"expert": {"form": "mlp", "activation": "relu2"}, "combine": SHARED},
    "deepseek_v3": {
        "router": {**BIASED, **GROUPS, "renormalize": "sum", "epsilon": 1e-20, "scale_value": 2.5},
        "combine": SHARED,
    },
    "llama4": {
        "router": {"score": "sigmoid", "order": "select_then_score"},
        "combine": {**SHARED, "shared_width": F, "apply": "input"},
        "K": 1,
    },
}
# Changes that another spelling of the plain layer would also be.
IDENTITIES = {"lp_norm_1": "renormalize", "sigmoid_after": "sigmoid"}


def spec_of(name: str, index: int) -> dict:
    change = CHANGES[name]
    router = {"score": "softmax", "order": "score_then_select", "renormalize": "none"}
    return {
        "name": name,
        "index": index,
        "kind": "moe",
        "H": H,
        "F": F,
        "E": E,
        "K": change.get("K", K),
        "router": {**router, **change.get("router", {})},
        "expert": {"form": "glu", "activation": "silu", **change.get("expert", {})},
        "combine": change.get("combine", {}),
    }


def weights_of(layer: dict, dtype: str) -> dict[str, torch.Tensor]:
    """Seeded weights, the same numbers for every layer; vectors are f32 as in checkpoints."""
    h, f, e = layer["H"], layer["F"], layer["E"]
    weights = sizes.make_weights(layer, dtype, seed=5)
    g = torch.Generator().manual_seed(6)

    def random(*shape, size=1.0):
        return torch.randn(*shape, generator=g) * size

    vectors = {
        "router_bias": random(e, size=0.7),
        "selection_bias": random(e, size=0.3),
        "per_expert_scale": random(e).exp(),
        "router_scale": random(h).exp() * 3,
        "gate_up_bias": random(e, 2 * f, size=0.5),
        "down_bias": random(e, h, size=0.5),
    }
    width = layer["combine"].get("shared_width", S)
    matrices = {
        "shared_gate_up": random(2 * width, h, size=1.5 / math.sqrt(h)),
        "shared_down": random(h, width, size=2.0 / math.sqrt(width)),
        "shared_gate": random(1, h, size=1.0 / math.sqrt(h)),
    }
    weights |= {role: w.to(oracle.TORCH[dtype]) for role, w in matrices.items()} | vectors
    if layer["expert"]["form"] == "mlp":
        rows = {"gate_up": f, "gate_up_bias": f, "shared_gate_up": width}
        for role, count in rows.items():
            one = weights.pop(role)
            weights[role.replace("gate_up", "up")] = (
                one[:count].contiguous()
                if role.startswith("shared")
                else one[:, :count].contiguous()
            )
    router, expert, combine = layer["router"], layer["expert"], layer["combine"]
    up = "gate_up" if expert["form"] == "glu" else "up"
    roles = ["router", up, "down"]
    roles += ["router_bias"] * bool(router.get("logit_bias"))
    roles += ["selection_bias"] * (router.get("selection_bias", "none") != "none")
    roles += ["router_scale"] * (router.get("input") == "rms_norm")
    roles += ["per_expert_scale"] * (router.get("scale") == "per_expert")
    roles += [up + "_bias", "down_bias"] * bool(expert.get("bias"))
    if combine.get("shared") == "mlp":
        roles += ["shared_" + up, "shared_down"]
        roles += ["shared_gate"] * (combine.get("shared_gate") == "sigmoid")
    return {role: weights[role] for role in roles}


def source(layer: dict, role: str) -> dict:
    where = {"tensor": f"{layer['name']}.{role}"}
    if role in ("gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias"):
        where["arrangement"] = "stacked"
    if "gate_up" in role:
        where["part_count"] = 2
    return {"from": [where]}


class Model:
    def __init__(self, folder, dtype: str):
        self.dtype, self.path = dtype, folder / "out.moec"
        self.specs = [spec_of(name, i) for i, name in enumerate(CHANGES)]
        self.weights = {s["name"]: weights_of(s, dtype) for s in self.specs}
        layers = [
            {**s, "weights": {role: source(s, role) for role in self.weights[s["name"]]}}
            for s in self.specs
        ]
        spec = {"schema": 1, "name": "attributes", "dtype": dtype, "layers": layers}
        path = sizes.write(folder, spec, self.weights)
        checkpoint = ("--checkpoint", folder / "checkpoint")
        levels = ",".join(LEVELS)
        moec_command("compile", path, *checkpoint, "-o", self.path, "--quiet", "--cpu", levels)
        # What this machine does not run: up to the IR of its code.
        others = ",".join(level for level in ALL_LEVELS if level not in LEVELS)
        if dtype == "bf16" and others:
            stop = ("--checkpoint", "none", "--compile-to", "codegen", "-o", folder / "code.mlir")
            moec_command("compile", path, *stop, "--cpu", others)

    def triples(self, level: str, **kwargs):
        library = moec.load(self.path, cpu_level=level, **kwargs)
        for layer, spec in zip(library.layers, self.specs, strict=True):
            assert layer.name == spec["name"]
            yield layer, spec, reference(spec, self.weights[spec["name"]])


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture(params=sizes.DTYPES)
def model(request, tmp_path_factory, models):
    """Compiled once for all tests, in whatever order they run."""
    driver()
    if request.param not in models:
        models[request.param] = Model(tmp_path_factory.mktemp("attributes"), request.param)
    return models[request.param]


def inputs(spec: dict, dtype: str, count: int = COUNT):
    x = oracle.tokens(count, H, dtype)
    extra = {}
    if spec["router"].get("router_x"):
        extra["router_x"] = oracle.tokens(count, H, dtype, seed=4)
    return x, extra


def bound(dtype: str) -> float:
    # Three roundings to bf16 (x given exactly): h is f32, the row, y; doubled.
    return 3e-6 if dtype == "f32" else 6 * 2**-9


def clear_tokens(routing) -> np.ndarray:
    """Tokens whose choice is not within rounding: no kept and dropped score closer than 1e-5."""
    return routing.gap > 1e-5


def same(a, b) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


def test_against_float64(model, level):
    wrong = []
    for layer, spec, ref in model.triples(level):
        x, extra = inputs(spec, model.dtype)
        routing = ref.routing(extra.get("router_x", x))
        clear = clear_tokens(routing)
        assert clear.mean() > 0.8, spec["name"]
        ids, weights = layer.route(x, **extra)
        for t in np.nonzero(clear)[0]:
            if set(ids[t].tolist()) != set(routing.experts[t].tolist()):
                wrong.append(f"{spec['name']}: token {t}: {ids[t]} for {routing.experts[t]}")
                break
        order, exact_order = np.argsort(ids.numpy(), -1), np.argsort(routing.experts, -1)
        got = np.take_along_axis(weights.double().numpy(), order, -1)[clear]
        exact = np.take_along_axis(routing.weights, exact_order, -1)[clear]
        if not np.allclose(got, exact, rtol=2e-5, atol=1e-7):
            wrong.append(f"{spec['name']}: weights differ by {np.abs(got - exact).max()}")
        y = layer(x, out=oracle.poisoned(x.shape, x.dtype), **extra)
        exact = ref(x, **extra)[clear]
        error = oracle.relative(y[torch.from_numpy(clear)], exact)
        if not error <= bound(model.dtype):
            wrong.append(f"{spec['name']}: relative error {error:.3g}")
        # The sum alone, as transformers' Experts computes it, with any ids.
        some = torch.randint(-1, E, (COUNT, 4), generator=torch.Generator().manual_seed(1))
        w = torch.rand(COUNT, 4, generator=torch.Generator().manual_seed(2))
        y = layer.experts(x, some, w, out=oracle.poisoned(x.shape, x.dtype))
        error = oracle.relative(y, ref.experts(x, some, w))
        if not error <= bound(model.dtype):
            wrong.append(f"{spec['name']}: experts given: relative error {error:.3g}")
    assert not wrong, "\n".join(wrong)


def test_same_bits(model, level):
    """Threads, batches, order of the rows, chunks, logits asked for: equal bits."""
    alone = {layer.name: layer for layer, _, _ in model.triples(level, threads=1)}
    chunked = {layer.name: layer for layer, _, _ in model.triples(level, threads=3, max_tokens=7)}
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    for layer, spec, _ in model.triples(level, threads=2):
        x, extra = inputs(spec, model.dtype)
        y = layer(x, **extra)
        name = spec["name"]
        assert y.isfinite().all(), name
        assert same(alone[name](x, **extra), y), name
        assert same(chunked[name](x, **extra), y), name
        moved = {k: v[order] for k, v in extra.items()}
        assert same(layer(x[order], **moved), y[order]), name
        for t in (0, 17, COUNT - 1):
            one = {k: v[t : t + 1] for k, v in extra.items()}
            assert same(layer(x[t : t + 1], **one), y[t : t + 1]), name
        # bf16 and f32 tensors around the same arithmetic.
        wide = {k: v.float() for k, v in extra.items()}
        full = layer(x.float(), out=oracle.poisoned(x.shape, torch.float32), **wide)
        assert same(full.to(x.dtype), y), name


def test_accumulate(model):
    for layer, spec, ref in model.triples(LEVELS[-1]):
        x, extra = inputs(spec, model.dtype)
        clear = clear_tokens(ref.routing(extra.get("router_x", x)))
        before = oracle.tokens(COUNT, H, model.dtype, seed=3)
        y = layer(x, out=before.clone(), accumulate=True, **extra)
        exact = (oracle.wide(before) + ref(x, **extra))[clear]
        error = oracle.relative(y[torch.from_numpy(clear)], exact)
        assert error <= bound(model.dtype), f"{spec['name']}: {error:.3g}"


def test_every_change_matters():
    """The reference with one attribute changed gives another result on the same numbers."""
    x = oracle.tokens(COUNT, H, "f32")
    results = {}
    for i, name in enumerate(CHANGES):
        spec = spec_of(name, i)
        extra = {"router_x": x.flip(0)} if spec["router"].get("router_x") else {}
        results[name] = reference(spec, weights_of(spec, "f32"))(x, **extra)
    for name, y in results.items():
        if name in IDENTITIES:
            assert oracle.relative(y, results[IDENTITIES[name]]) < 1e-12, name
            continue
        for other, z in results.items():
            if other != name and IDENTITIES.get(other) != name:
                assert oracle.relative(y, z) > 1e-4, f"{name} is {other}"


def test_router_x_is_asked_for(model):
    for layer, spec, _ in model.triples(LEVELS[-1]):
        x, _ = inputs(spec, model.dtype)
        if spec["router"].get("router_x"):
            with pytest.raises(moec.Error, match=r"E-NEEDS.*router_x"):
                layer(x)
        else:
            with pytest.raises(moec.Error, match=r"E-ARGUMENT.*router_x"):
                layer(x, router_x=x)
