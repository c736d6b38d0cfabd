"""*.moe.json: round trip, and the same verdict as the published JSON Schema."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file
from spec_tool import BUILD, ROOT, SpecError, batch, load, refused, tool, weight

SCHEMA = json.loads((ROOT / "share" / "moec" / "moe-spec.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def spec(**changes) -> dict:
    layer = {
        "index": 0,
        "name": "model.layers.{i}.mlp",
        "H": 6,
        "F": 5,
        "E": 4,
        "K": 2,
        "router": {"score": "softmax", "order": "score_then_select", "renormalize": "sum"},
        "expert": {"form": "glu", "activation": "silu"},
    }
    return {"schema": 1, "name": "m", "dtype": "f32", "layers": [layer | changes]}


def write(folder: Path, value: object) -> Path:
    path = folder / "m.moe.json"
    path.write_text(json.dumps(value))
    return path


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def documented(at, node):
        for name, child in node.get("properties", {}).items():
            if isinstance(child, dict):
                assert "description" in child or "$ref" in child, (at, name)
                documented(f"{at}.{name}", child)

    documented("", SCHEMA)
    for name, node in SCHEMA["$defs"].items():
        documented(name, node)


def test_smallest_spec(tmp_path):
    out = load(write(tmp_path, spec()), "--check")
    assert out["spec"]["layers"][0]["E"] == 4
    assert out["layers"][0]["name"] == "model.layers.0.mlp"
    assert out["layers"][0]["total"] == 4 * 6 + 4 * 3 * 6 * 5
    assert out["layers"][0]["active"] == 4 * 6 + 2 * 3 * 6 * 5
    VALIDATOR.validate(spec())
    VALIDATOR.validate(out["spec"])


# Values that another attribute must come with.
NEEDS = {
    ("shared", "mlp"): {"shared_width": 8},
    ("shared_gate", "sigmoid"): {"shared": "mlp", "shared_width": 8},
    ("extra_rows", "identity"): {"extra_row_count": 3},
    **{("clamp", kind): {"clamp_limit": 7.0} for kind in ("pre", "oai", "post")},
    ("clamp", "tanh"): {"clamp_limit": 7.0, "clamp_up_limit": 7.0},
}


@pytest.mark.parametrize("group", ["router", "expert", "combine"])
def test_schema_and_reader_know_the_same_attributes(group, tmp_path):
    properties = SCHEMA["$defs"][group]["properties"]
    value = spec(combine={})
    value["layers"][0][group]["qqqqqqqqqqqqqqqqqqqqqqqqqqq"] = 1
    error = refused("E-CONFIG", write(tmp_path, value), says="known are")
    known = set(error.fields["hint"].split("`")[1::2])
    assert known == set(properties)
    # Every value of every enumeration is read, another one is not; defaults are not written back.
    base = load(write(tmp_path, spec(combine={})))["spec"]["layers"][0]
    for key, rule in properties.items():
        for choice in rule.get("enum", []):
            value = spec(combine={})
            value["layers"][0][group].update(NEEDS.get((key, choice), {}), **{key: choice})
            out = load(write(tmp_path, value))["spec"]["layers"][0].get(group, {})
            assert out.get(key, rule.get("default")) == choice, key
        if "default" in rule:
            value = spec(combine={})
            value["layers"][0][group][key] = rule["default"]
            if key != "groups":
                assert load(write(tmp_path, value))["spec"]["layers"][0] == base, key
        else:
            assert key in SCHEMA["$defs"][group]["required"]
        value["layers"][0][group][key] = ["?"]
        refused("E-CONFIG", write(tmp_path, value), says=f"{group}.{key}")


def everything() -> dict:
    """A spec in which every attribute differs from its default."""

    def other(name, rule):
        if "enum" in rule:
            return [v for v in rule["enum"] if v != rule.get("default")][-1]
        if rule["type"] == "boolean":
            return not rule["default"]
        return 2 if rule["type"] == "integer" else 1.0e-20

    groups = {
        group: {k: other(k, r) for k, r in SCHEMA["$defs"][group]["properties"].items()}
        for group in ("router", "expert", "combine")
    }
    groups["expert"]["form"] = "glu"
    groups["combine"]["shared"] = "mlp"
    sources = {
        "router": {"format": "f32", "from": [{"tensor": "l.{i}.gate"}]},
        "gate_up": {
            "from": [
                {
                    "tensor": "l.{i}.gu",
                    "arrangement": "stacked",
                    "part_count": 2,
                    "transposed": True,
                    "interleaved": True,
                }
            ]
        },
        "down": {"from": [{"tensor": "l.{i}.e.{e}.down"}]},
        "gate_up_bias": {"from": [{"tensor": "l.{i}.e.{e}.bias", "part_count": 2}]},
        "shared_gate": {"from": [{"tensor": "l.{i}.sg"}]},
    }
    out = spec(index="3-7", compute="bf16", format="bf16", weights=sources, **groups)
    out["layers"][0]["origins"] = {"H": "tensor l.{i}.gate", "router.epsilon": "elsewhere"}
    out["layers"].append(
        {
            "index": 9,
            "name": "model.layers.{i}.mlp",
            "kind": "dense",
            "H": 6,
            "F": 5,
            "expert": {"form": "mlp", "activation": "relu2"},
        }
    )
    out["model_type"] = "x"
    return out


def test_round_trip(tmp_path):
    value = everything()
    VALIDATOR.validate(value)
    first = load(write(tmp_path, value), "--origins")
    assert [layer["name"] for layer in first["layers"]][-2:] == [
        "model.layers.7.mlp",
        "model.layers.9.mlp",
    ]
    got, want = copy.deepcopy(first["spec"]), copy.deepcopy(value)
    got.pop("$schema")
    got["layers"][1].pop("origins")
    for layer in (got["layers"][0], want["layers"][0]):
        layer.setdefault("kind", "moe")
    assert got == want
    second = load(write(tmp_path, first["spec"]), "--origins")
    assert second == first


def test_round_trip_of_checkpoints(tmp_path):
    """A spec written for a checkpoint reads the same weights without the configuration."""
    state = {}
    random = np.random.default_rng(1)
    for i in range(12):
        at = f"model.layers.{i}.mlp."
        state[at + "gate.weight"] = random.normal(size=(4, 6))
        for e in range(4):
            for name, shape in (("gate", (5, 6)), ("up", (5, 6)), ("down", (6, 5))):
                state[at + f"experts.{e}.{name}_proj.weight"] = random.normal(size=shape)
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({k: v.astype(np.float32) for k, v in state.items()}, folder / "model.safetensors")
    config = {
        "model_type": "olmoe",
        "hidden_size": 6,
        "intermediate_size": 5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    first = load(folder, "--origins")
    assert len(first["spec"]["layers"]) == 1  # equal layers become one entry
    VALIDATOR.validate(first["spec"])
    path = write(tmp_path, first["spec"])
    second = load(path, f"--checkpoint={folder}", "--origins")
    assert second["weights"]
    assert second["spec"] == first["spec"]
    name = "model.layers.11.mlp"
    for role in ("router", "gate_up", "down"):
        a = weight(folder, name, role, tmp_path / "a")
        b = weight(path, name, role, tmp_path / "b", f"--checkpoint={folder}")
        assert np.array_equal(a, b)
    want = np.stack(
        [
            np.stack([state[f"{name}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")])
            for e in range(4)
        ]
    )
    got = weight(folder, name, "gate_up", tmp_path / "a")
    assert np.array_equal(got, want.astype(np.float32).ravel())


def test_weights_of_attributes(tmp_path):
    """Which weights a layer has follows from its attributes; vectors are f32 beside bf16."""
    value = spec(
        router={
            "score": "sigmoid",
            "order": "score_then_select",
            "renormalize": "sum",
            "input": "rms_norm",
            "logit_bias": True,
            "selection_bias": "score",
            "scale": "per_expert",
        },
        expert={"form": "glu", "activation": "silu", "bias": True},
        combine={"shared": "mlp", "shared_width": 7, "shared_gate": "sigmoid"},
    )
    value["dtype"] = "bf16"
    layer = load(write(tmp_path, value))["layers"][0]
    weights = {
        role: ([w["experts"], w["parts"], w["rows"], w["cols"]], w["format"])
        for role, w in layer["semantics"]["weights"].items()
    }
    assert weights == {
        "router": ([1, 1, 4, 6], "bf16"),
        "gate_up": ([4, 2, 5, 6], "bf16"),
        "down": ([4, 1, 6, 5], "bf16"),
        "router_bias": ([1, 1, 4, 1], "f32"),
        "selection_bias": ([1, 1, 4, 1], "f32"),
        "router_scale": ([1, 1, 6, 1], "f32"),
        "per_expert_scale": ([1, 1, 4, 1], "f32"),
        "gate_up_bias": ([4, 2, 5, 1], "f32"),
        "down_bias": ([4, 1, 6, 1], "f32"),
        "shared_gate_up": ([1, 2, 7, 6], "bf16"),
        "shared_down": ([1, 1, 6, 7], "bf16"),
        "shared_gate": ([1, 1, 1, 6], "bf16"),
    }
    routed = 3 * 5 * 6 + 2 * 5 + 6  # of one expert
    rest = 4 * 6 + 4 + 4 + 6 + 4 + 3 * 7 * 6 + 6
    assert layer["total"] == rest + 4 * routed
    assert layer["active"] == rest + 2 * routed
    value["layers"][0]["weights"] = {"selection_bias": {"format": "bf16"}}
    refused("E-CONFIG", write(tmp_path, value), says=("selection_bias", "`format`"))


def test_vectors_on_disk(tmp_path):
    """Vectors are read with and without dimensions of 1, from any dtype, per expert and stacked."""
    value = spec(
        E=4,
        router={
            "score": "softmax",
            "order": "score_then_select",
            "renormalize": "sum",
            "selection_bias": "score",
        },
        expert={"form": "glu", "activation": "silu", "bias": True},
    )
    random = np.random.default_rng(5)
    state = {
        "router": random.normal(size=(4, 6)),
        "gu": random.normal(size=(4, 10, 6)),
        "down": random.normal(size=(4, 6, 5)),
        "sel": random.normal(size=(1, 4)),
        "gub": random.normal(size=(4, 10)),
    }
    state |= {f"db.{e}": random.normal(size=(6,)) for e in range(4)}
    state = {k: v.astype(np.float16) for k, v in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    stacked = {"arrangement": "stacked"}
    both = stacked | {"part_count": 2}
    value["layers"][0]["weights"] = {
        "router": {"from": [{"tensor": "router"}]},
        "gate_up": {"from": [{"tensor": "gu"} | both]},
        "down": {"from": [{"tensor": "down"} | stacked]},
        "selection_bias": {"from": [{"tensor": "sel"}]},
        "gate_up_bias": {"from": [{"tensor": "gub", "interleaved": True} | both]},
        "down_bias": {"from": [{"tensor": "db.{e}"}]},
    }
    path = write(tmp_path, value)
    name, option = "model.layers.0.mlp", f"--checkpoint={tmp_path / 'x.safetensors'}"

    def got(role):
        return weight(path, name, role, tmp_path / "w", option)

    assert np.array_equal(got("selection_bias"), state["sel"].ravel())
    gate_up = state["gub"].reshape(4, 5, 2).transpose(0, 2, 1)
    assert np.array_equal(got("gate_up_bias"), gate_up.ravel())
    assert np.array_equal(got("down_bias"), np.stack([state[f"db.{e}"] for e in range(4)]).ravel())
    value["layers"][0]["weights"]["selection_bias"]["from"][0]["tensor"] = "gub"
    refused("E-TENSOR", write(tmp_path, value), option, says=("gub", "[4]", "[4,10]"))


@pytest.mark.parametrize("arrangement", ["per_expert", "stacked"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["apart", "joined", "interleaved"])
def test_every_arrangement_of_tensors(arrangement, transposed, form, tmp_path):
    random = np.random.default_rng(2)
    logical = random.normal(size=(4, 2, 5, 6)).astype(np.float32)  # [E, parts, F, H]
    down = random.normal(size=(4, 6, 5)).astype(np.float32)
    gate = random.normal(size=(4, 6)).astype(np.float32)
    options = {"arrangement": arrangement, "transposed": transposed}
    if form == "apart":
        stored = {f"p{p}": logical[:, p] for p in range(2)}
        sources = [{"tensor": f"p{p}", "first_part": p} | options for p in range(2)]
    else:
        order = (0, 1, 2, 3) if form == "joined" else (0, 2, 1, 3)
        stored = {"gu": logical.transpose(order).reshape(4, 10, 6)}
        sources = [{"tensor": "gu", "part_count": 2} | options]
        sources[0]["interleaved"] = form == "interleaved"
    stored["down"] = down
    if transposed:
        stored = {k: v.transpose(0, 2, 1) for k, v in stored.items()}
    state = {"gate": gate}
    per_expert = arrangement == "per_expert"
    for name, value in stored.items():
        if per_expert:
            state.update({f"{name}.{e}": np.ascontiguousarray(value[e]) for e in range(4)})
        else:
            state[name] = np.ascontiguousarray(value)
    save_file(state, tmp_path / "x.safetensors")
    sources = [*sources, {"tensor": "down"} | options]
    for source in sources:
        source["tensor"] += ".{e}" if per_expert else ""
    weights = {
        "router": {"from": [{"tensor": "gate"}]},
        "gate_up": {"from": sources[:-1]},
        "down": {"from": sources[-1:]},
    }
    path = write(tmp_path, spec(weights=weights))
    checkpoint = f"--checkpoint={tmp_path / 'x.safetensors'}"
    name = "model.layers.0.mlp"
    assert load(path, checkpoint)["notes"] == []
    rounded = load(path, checkpoint, "--dtype=bf16")["notes"]
    assert rounded == ["f32 weights of the checkpoint are rounded to bf16"]
    for role, want in (("router", gate), ("gate_up", logical), ("down", down)):
        got = weight(path, name, role, tmp_path / "w", checkpoint)
        assert np.array_equal(got, want.ravel()), role
    # And through moe IR, which names every part by itself.
    back = tmp_path / "back.moe.json"
    back.write_text(imported(path, "--back"))
    for role, want in (("router", gate), ("gate_up", logical), ("down", down)):
        got = weight(back, name, role, tmp_path / "w", checkpoint)
        assert np.array_equal(got, want.ravel()), role


def imported(*arguments) -> str:
    import subprocess

    done = subprocess.run(
        [BUILD / "bin" / "moe-import-dump", *map(str, arguments)], check=True, capture_output=True
    )
    return done.stdout.decode()


BAD = [
    (lambda s: s.pop("schema"), "schema"),
    (lambda s: s.update(schema="1"), "schema"),
    (lambda s: s.update(schema=0), "schema"),
    (lambda s: s.pop("name"), "name"),
    (lambda s: s.update(name="a b"), "name"),
    (lambda s: s.update(name="3x"), "name"),
    (lambda s: s.update(name="../x"), "name"),
    (lambda s: s.update(name=""), "name"),
    (lambda s: s.update(dtype="f16"), "dtype"),
    (lambda s: s.update(dtype="fp32"), "dtype"),
    (lambda s: s.update(layers=[]), "layers"),
    (lambda s: s.update(layers={}), "layers"),
    (lambda s: s.pop("layers"), "layers"),
    (lambda s: s.update(layer=[]), "`layers`"),
    (lambda s: s.update(layers=[3]), "layers[0]"),
    (lambda s: s["layers"][0].pop("H"), "layers[0].H"),
    (lambda s: s["layers"][0].update(H=0), "layers[0].H"),
    (lambda s: s["layers"][0].update(H=2.5), "layers[0].H"),
    (lambda s: s["layers"][0].update(H=2**40), "layers[0].H"),
    (lambda s: s["layers"][0].update(F="5"), "layers[0].F"),
    (lambda s: s["layers"][0].pop("E"), "layers[0].E"),
    (lambda s: s["layers"][0].pop("K"), "layers[0].K"),
    (lambda s: s["layers"][0].pop("router"), "layers[0].router"),
    (lambda s: s["layers"][0].pop("expert"), "layers[0].expert"),
    (lambda s: s["layers"][0].pop("name"), "layers[0].name"),
    (lambda s: s["layers"][0].update(name=".x"), "name"),
    (lambda s: s["layers"][0].update(name="a/b"), "name"),
    (lambda s: s["layers"][0].pop("index"), "layers[0].index"),
    (lambda s: s["layers"][0].update(index=-1), "layers[0].index"),
    (lambda s: s["layers"][0].update(index=10000), "layers[0].index"),
    (lambda s: s["layers"][0].update(index="0-"), "layers[0].index"),
    (lambda s: s["layers"][0].update(index="x-3"), "layers[0].index"),
    (lambda s: s["layers"][0].update(index=[]), "layers[0].index"),
    (lambda s: s["layers"][0].update(index=[[0]]), "layers[0].index"),
    (lambda s: s["layers"][0].update(kind="sparse"), "layers[0].kind"),
    (lambda s: s["layers"][0].update(kind="dense"), "layers[0]"),
    (lambda s: s["layers"][0].update(compute="f64"), "layers[0].compute"),
    (lambda s: s["layers"][0]["router"].pop("score"), "router.score"),
    (lambda s: s["layers"][0]["router"].pop("order"), "router.order"),
    (lambda s: s["layers"][0]["router"].pop("renormalize"), "router.renormalize"),
    (lambda s: s["layers"][0]["router"].update(score="softmaxx"), "router.score"),
    (lambda s: s["layers"][0]["router"].update(epsilon=-1), "epsilon"),
    (lambda s: s["layers"][0]["router"].update(groups=0), "groups"),
    (lambda s: s["layers"][0]["expert"].pop("form"), "expert.form"),
    (lambda s: s["layers"][0]["expert"].update(bias=1), "expert.bias"),
    (lambda s: s["layers"][0].update(weights=[]), "layers[0].weights"),
    (lambda s: s["layers"][0].update(weights={"gate": {}}), "gate"),
    (lambda s: s["layers"][0].update(weights={"down": {"from": []}}), "weights.down.from"),
    (lambda s: s["layers"][0].update(weights={"down": {"from": [{}]}}), "tensor"),
    (lambda s: s["layers"][0].update(origins={"a": 1}), "origins.a"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_specs_are_refused_by_reader_and_schema(number, tmp_path):
    change, says = BAD[number]
    value = spec()
    change(value)
    refused("E-CONFIG", write(tmp_path, value), says=says)
    assert not VALIDATOR.is_valid(value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"K": 5}, "at most E = 4"),
        ({"index": "3-1"}, "index"),
        ({"index": "0-3", "name": "mlp"}, "{i}"),
        ({"weights": {"down": {"from": [{"tensor": "a"}]}}}, "{e}"),
        (
            {"weights": {"down": {"from": [{"tensor": "a{e}", "arrangement": "stacked"}]}}},
            "without {e}",
        ),
        ({"weights": {"gate_up": {"from": [{"tensor": "a{e}"}]}}}, "part 1 from 0"),
        ({"weights": {"gate_up": {"from": [{"tensor": "a{e}", "part_count": 2}] * 2}}}, "part 0"),
        ({"router": spec()["layers"][0]["router"] | {"groups": 3}}, "divisor of E"),
        ({"expert": spec()["layers"][0]["expert"] | {"clamp": "oai"}}, "clamp_limit"),
    ],
)
def test_what_a_schema_cannot_say(changes, says, tmp_path):
    VALIDATOR.validate(spec(**changes))
    refused("E-CONFIG", write(tmp_path, spec(**changes)), says=says)


def test_newer_schema(tmp_path):
    value = spec()
    value["schema"] = 2
    error = refused("E-ABI", write(tmp_path, value), says=("newer", "at most 1", "2"))
    assert error.exit == 4


def test_layers_are_sorted_and_unique(tmp_path):
    value = spec()
    value["layers"] += spec(index=[5, "1-2"])["layers"]
    out = load(write(tmp_path, value), "--check")
    assert [layer["name"].split(".")[2] for layer in out["layers"]] == ["0", "1", "2", "5"]
    value["layers"] += spec(index=2)["layers"]
    refused("E-CONFIG", write(tmp_path, value), "--check", says="twice")


NOT_IMPLEMENTED = [
    ("router", "input", "mlp"),
    ("router", "score", "sqrt_softplus"),
    ("router", "select", "table"),
    ("router", "scale", "learned"),
    ("router", "renormalize", "joint_shared"),
    ("router", "extra_rows", "identity"),
    ("router", "capacity", "per_sequence"),
    ("expert", "act_dtype", "f32"),
    ("expert", "latent", 3),
    ("expert", "latent_norm", True),
    ("expert", "expert_norm", True),
    ("combine", "accumulate", "f32"),
    ("combine", "shared", "separate"),
    ("combine", "join", "average"),
    ("combine", "output", "bias"),
    ("combine", "pools", 2),
]
# Each of these works alone, but not with what stands beside it.
NOT_TOGETHER = [
    ("expert", "clamp", "oai", {"clamp_limit": 7.0}, {"shared": "mlp", "shared_width": 4}),
    ("expert", "bias", True, {}, {"shared": "mlp", "shared_width": 4}),
    ("expert", "form", "mlp", {"clamp": "pre", "clamp_limit": 7.0}, {}),
]


def test_attributes_that_are_not_implemented_are_refused_by_name(tmp_path):
    for group, key, choice in NOT_IMPLEMENTED:
        value = spec(combine={})
        value["layers"][0][group].update(NEEDS.get((key, choice), {}), **{key: choice})
        path = write(tmp_path, value)
        load(path)
        text = json.dumps(choice).strip('"')
        refused("E-UNSUPPORTED", path, "--check", says=(f"{group}.{key}", text, "m.moe.json"))


@pytest.mark.parametrize(("group", "key", "choice", "more", "combine"), NOT_TOGETHER)
def test_combinations_that_are_not_implemented(tmp_path, group, key, choice, more, combine):
    value = spec(combine=combine)
    layer = value["layers"][0]
    layer[group].update(more, **{key: choice})
    text = json.dumps(choice).strip('"')
    refused("E-UNSUPPORTED", write(tmp_path, value), "--check", says=(f"{group}.{key}", text))


def test_attributes_that_are_implemented(tmp_path):
    """Nothing of the list that must work is refused."""
    paths = []
    for order in ("score_then_select", "select_then_score"):
        for renormalize in ("none", "sum"):
            for act in ("silu", "gelu", "gelu_tanh", "relu"):
                for epsilon, scale in ((0, 1), (1e-20, 2.5)):
                    router = dict(score="softmax", order=order, renormalize=renormalize)
                    router.update(epsilon=epsilon, scale_value=scale)
                    value = spec(router=router, expert={"form": "glu", "activation": act})
                    paths.append(tmp_path / f"{len(paths)}.moe.json")
                    paths[-1].write_text(json.dumps(value))
    assert set(batch(paths, "--check")) == {"ok"}


def test_spec_without_sources_takes_no_checkpoint(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    path = write(tmp_path, spec())
    refused("E-CONFIG", path, f"--checkpoint={tmp_path / 'x.safetensors'}", says="`from`")


def test_dtype_option(tmp_path):
    path = write(tmp_path, spec())
    assert load(path, "--dtype=bf16")["layers"][0]["semantics"]["compute"] == "bf16"
    with pytest.raises(SpecError):
        tool(tmp_path / "missing.moe.json")
