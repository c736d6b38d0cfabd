"""Configurations and checkpoints of every row, against transformers' classes and tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from spec_models import (
    ATTENTION,
    CASES,
    MODELS,
    check_weights,
    child,
    config_file,
    experts_of,
    make,
    rows,
)
from spec_tool import load, refused, tool, weight


@pytest.mark.parametrize("row", rows())
def test_defaults_are_the_class_defaults(row):
    rules = json.loads((MODELS / f"{row}.json").read_text())
    config = transformers.AutoConfig.for_model(rules["model_type"])
    assert type(config).__name__ == rules["config_class"]
    for key, rule in rules["keys"].items():
        for spelling in [key, *rule.get("spellings", [])]:
            if rule["default"] is None:  # derived where it is absent
                assert getattr(type(config), spelling) is None, spelling
            elif hasattr(config, spelling):
                assert getattr(config, spelling) == rule["default"], spelling
            else:  # hard-wired in the class: other values are refused
                assert rule["values"] == [rule["default"]], spelling


@pytest.mark.parametrize("row", rows())
def test_bare_config_takes_defaults(row, tmp_path):
    needed = {"num_experts_per_tok": 6} if row == "deepseek_v2" else {}  # null in the class
    out = load(config_file(tmp_path, model_type=row, **needed), "--origins")
    config = transformers.AutoConfig.for_model(row)
    assert not out["weights"]
    assert len(out["layers"]) == config.num_hidden_layers
    layer = out["spec"]["layers"][0]
    assert layer["H"] == config.hidden_size
    assert layer["origins"]["H"].startswith(f"class default of {type(config).__name__}")
    assert any("dtype" in note for note in out["notes"])


@pytest.mark.parametrize("row", rows())
def test_config_written_by_transformers(row, tmp_path):
    config = transformers.AutoConfig.for_model(row, **ATTENTION, **CASES[row])
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    out = load(tmp_path)
    indices = {layer["name"].split(".layers.")[1].split(".")[0] for layer in out["layers"]}
    assert len(indices) == config.num_hidden_layers
    for layer in out["layers"]:
        name = layer["name"]
        assert name in modules  # the name is the module's own
        number = re.match(r".*\.layers\.\d+", name)[0]
        tensors = experts_of(modules[number], name[len(number) + 1 :])
        want = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
        weights = layer["semantics"]["weights"]
        assert set(weights) == set(want)
        for role, shape in want.items():
            w = weights[role]
            total = w["experts"] * w["parts"] * w["rows"] * w["cols"]
            assert total == int(np.prod(shape))
        assert layer["total"] == sum(int(np.prod(shape)) for shape in want.values())


def test_renormalisation_and_spellings(tmp_path):
    def router(**keys):
        return load(config_file(tmp_path, **keys))["spec"]["layers"][0]

    assert router(model_type="mixtral")["router"]["renormalize"] == "sum"
    assert router(model_type="olmoe")["router"]["renormalize"] == "none"
    assert router(model_type="olmoe", norm_topk_prob=True)["router"]["renormalize"] == "sum"
    assert router(model_type="qwen3_moe", norm_topk_prob=True)["router"]["renormalize"] == "sum"
    for row in ("mixtral", "olmoe", "qwen3_moe"):
        for spelling in ("num_experts", "num_local_experts"):
            assert router(model_type=row, **{spelling: 12})["E"] == 12
    refused(
        "E-CONFIG",
        config_file(tmp_path, model_type="mixtral", num_experts=4, num_local_experts=8),
        says=("num_experts", "num_local_experts"),
    )


def test_origins(tmp_path):
    path = config_file(tmp_path, model_type="olmoe", num_local_experts=12, dtype="bfloat16")
    layer = load(path, "--origins")["spec"]["layers"][0]
    origins = layer["origins"]
    assert origins["E"] == "config key `num_local_experts`"
    assert origins["compute"] == "config key `dtype`"
    assert origins["router.score"] == "rule of row olmoe"
    assert origins["router.renormalize"].startswith("class default of OlmoeConfig")


@pytest.mark.parametrize(
    ("act", "want"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("relu", "relu"),
    ],
)
def test_activations(act, want, tmp_path):
    layer = load(config_file(tmp_path, model_type="llama", hidden_act=act), "--check")
    assert layer["spec"]["layers"][0]["expert"]["activation"] == want


def test_layer_rule_of_qwen3(tmp_path):
    for step, only, count in [(1, [], 4), (2, [], 5), (3, [2, 4], 7), (1, None, 3)]:
        keys = dict(CASES["qwen3_moe"], num_hidden_layers=count)
        keys.update(decoder_sparse_step=step, mlp_only_layers=only)
        config = transformers.AutoConfig.for_model("qwen3_moe", **ATTENTION, **keys)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        want = ["moe" if hasattr(layer.mlp, "experts") else "dense" for layer in model.model.layers]
        out = load(config_file(tmp_path, model_type="qwen3_moe", **keys))
        assert [layer["semantics"]["kind"] for layer in out["layers"]] == want
    out = load(config_file(tmp_path, model_type="qwen3_moe", num_experts=0))
    assert {layer["semantics"]["kind"] for layer in out["layers"]} == {"dense"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", sorted(CASES))
def test_saved_checkpoint(row, dtype, tmp_path):
    model = make(row, dtype)
    model.save_pretrained(tmp_path / "m")
    out = load(tmp_path / "m")
    assert out["weights"]
    want = "bf16" if dtype == torch.bfloat16 else "f32"
    for layer in out["layers"]:
        assert layer["semantics"]["compute"] == want
        for role, w in layer["semantics"]["weights"].items():
            vector = role.endswith(("_bias", "router_scale", "per_expert_scale"))
            assert w["format"] == ("f32" if vector else want), role
    assert any("f16" in note for note in out["notes"]) == (dtype == torch.float16)
    check_weights(model, tmp_path / "m", tmp_path)


@pytest.mark.parametrize("row", sorted(CASES))
def test_sharded_checkpoint(row, tmp_path):
    model = make(row)
    model.save_pretrained(tmp_path / "m", max_shard_size="2KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    check_weights(model, tmp_path / "m", tmp_path)


@pytest.mark.parametrize("row", sorted(set(CASES) - {"llama"}))
def test_fused_form_on_disk(row, tmp_path):
    model = make(row, torch.bfloat16)
    folder = tmp_path / "m"
    model.config.save_pretrained(folder)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    assert any(k.endswith("experts.gate_up_proj") for k in state)
    state = {k: v.clone() for k, v in state.items()}  # tied embeddings share memory
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    check_weights(model, folder, tmp_path)


def test_base_model_without_the_model_prefix(tmp_path):
    model = make("mixtral")
    model.model.save_pretrained(tmp_path / "m")
    assert not any(k.startswith("model.") for k in load_file(tmp_path / "m" / "model.safetensors"))
    check_weights(model, tmp_path / "m", tmp_path)


def test_composite_configuration(tmp_path):
    """A model that wraps a text model: its text_config is read, and tensors lie deeper."""
    model = make("mixtral")
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "some_vl", "text_config": text}))
    file = tmp_path / "m" / "model.safetensors"
    for prefix in ("model.language_model.", "language_model.model."):
        state = load_file(tmp_path / "m" / "model.safetensors")
        state = {prefix + k[k.index("layers.") :]: v for k, v in state.items() if "layers." in k}
        save_file(state, file)
        name = "model.language_model.layers.1.mlp"
        assert load(tmp_path / "m")["layers"][1]["name"] == name
        got = weight(tmp_path / "m", name, "down", tmp_path / "w.bin")
        want = model.model.layers[1].mlp.experts.down_proj.detach().numpy()
        assert np.array_equal(got, want.ravel())
    text["num_local_experts"] = "eight"
    path.write_text(json.dumps({"model_type": "some_vl", "text_config": text}))
    refused("E-CONFIG", tmp_path / "m", says="text_config.num_local_experts")


@pytest.mark.parametrize("row", ["qwen3_5_moe_text", "llama4_text", "gemma4_text"])
def test_composite_models(row, tmp_path):
    """The families that ship as a text model inside another: the layers' names are those of
    transformers' composite class, with and without a model_type of the text model's own."""
    outer = row.removesuffix("_text")
    text = transformers.AutoConfig.for_model(row, **(ATTENTION | CASES[row])).to_dict()
    config = transformers.AutoConfig.for_model(outer, text_config=text)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    modules = dict(model.named_modules())
    for drop in (None, "model_type"):
        text.pop(drop, None)
        layers = load(config_file(tmp_path, model_type=outer, text_config=text))["layers"]
        assert len(layers) >= 2
        assert all(layer["name"] in modules for layer in layers)


def test_aliases(tmp_path):
    """Kimi-K2 says kimi_k2 and is a deepseek_v3."""
    keys = dict(CASES["deepseek_v3"], n_group=1, topk_group=1)
    kimi = load(config_file(tmp_path, model_type="kimi_k2", **keys))
    deepseek = load(config_file(tmp_path, model_type="deepseek_v3", **keys))
    assert kimi["layers"] == deepseek["layers"]
    router = kimi["spec"]["layers"][-1]["router"]
    assert (router["score"], router["selection_bias"]) == ("sigmoid", "score")
    assert router["scale_value"] == 2.5 and router["epsilon"] == 1e-20


def test_values_for_each_layer(tmp_path):
    keys = dict(CASES["hunyuan_v1_moe"], num_experts=[4, 6], moe_topk=[1, 3])
    layers = load(config_file(tmp_path, model_type="hunyuan_v1_moe", **keys))["layers"]
    sizes = [(layer["semantics"]["E"], layer["semantics"]["K"]) for layer in layers]
    assert sizes == [(4, 1), (6, 3)]
    keys["moe_topk"] = [1]
    path = config_file(tmp_path, model_type="hunyuan_v1_moe", **keys)
    refused("E-CONFIG", path, says=("moe_topk", "every layer"))


@pytest.mark.parametrize(
    ("row", "keys", "says"),
    [
        ("deepseek_v3", {"scoring_func": "softmax"}, ("scoring_func", "sigmoid", "softmax")),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, ("topk_method", "greedy")),
        ("deepseek_v2", {"mlp_bias": True}, ("mlp_bias",)),
        ("ernie4_5_moe", {"use_bias": True}, ("use_bias",)),
        ("phimoe", {"num_experts_per_tok": 3}, ("num_experts_per_tok", "2")),
        ("gemma4_text", {"use_double_wide_mlp": True}, ("use_double_wide_mlp",)),
    ],
)
def test_values_a_family_does_not_have(row, keys, says, tmp_path):
    path = config_file(tmp_path, model_type=row, **(CASES[row] | keys))
    refused("E-UNSUPPORTED", path, says=says)


def test_null_where_a_value_is_needed(tmp_path):
    path = config_file(tmp_path, model_type="deepseek_v2", num_experts_per_tok=None)
    refused("E-CONFIG", path, says="num_experts_per_tok")
    path = config_file(tmp_path, model_type="gemma4_text", enable_moe_block=True)
    refused("E-CONFIG", path, says="class default is null")
    layers = load(config_file(tmp_path, model_type="gemma4_text"))["layers"]
    assert {layer["semantics"]["kind"] for layer in layers} == {"dense"}


def layer_kinds(row: str, folder: Path, **keys) -> list[str]:
    """Kinds of all layers, as in transformers' modules; asserted to be ours as well."""
    config = transformers.AutoConfig.for_model(row, **(ATTENTION | CASES[row] | keys))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    want = []
    for layer in model.model.layers:
        block = child(layer, "mlp", "feed_forward")
        want.append("moe" if hasattr(block, "experts") else "dense")
    out = load(config_file(folder, model_type=row, **(CASES[row] | keys)))
    assert [layer["semantics"]["kind"] for layer in out["layers"]] == want
    return want


def test_layer_rules(tmp_path):
    for keys in ({}, {"expert_layer_offset": 0}, {"expert_layer_period": 4}, {"num_experts": 1}):
        layer_kinds("jamba", tmp_path, **keys)
    for keys in ({}, {"moe_layer_end_index": -1}, {"moe_layer_start_index": 3}):
        assert "moe" in layer_kinds("ernie4_5_moe", tmp_path, **keys)
    for keys in ({}, {"moe_layers": [0, 3]}, {"moe_layers": []}, {"interleave_moe_layer_step": 3}):
        layer_kinds("llama4_text", tmp_path, **keys)
    for first in (0, 1, 4):
        layer_kinds("deepseek_v3", tmp_path, first_k_dense_replace=first)
    for first in (0, 2):
        layer_kinds("lfm2_moe", tmp_path, num_dense_layers=first)


def test_dtype_on_the_command_line(tmp_path):
    model = make("mixtral", torch.bfloat16)
    state = {
        k: v.float() if k.endswith("gate.weight") else v for k, v in model.state_dict().items()
    }
    folder = tmp_path / "m"
    model.config.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")

    def formats(*options):
        weights = load(folder, *options)["layers"][0]["semantics"]["weights"]
        return weights["router"]["format"], weights["gate_up"]["format"]

    assert formats() == ("f32", "bf16")  # an f32 router stays f32 beside bf16 experts
    assert formats("--dtype=bf16") == ("f32", "bf16")
    assert formats("--dtype=f32") == ("f32", "f32")


def test_weights_from_elsewhere(tmp_path):
    model = make("olmoe")
    model.save_pretrained(tmp_path / "m")
    config = config_file(tmp_path, **json.loads((tmp_path / "m" / "config.json").read_text()))
    out = load(config, f"--checkpoint={tmp_path / 'm'}")
    assert out["weights"]
    out = load(tmp_path / "m", "--shapes-only")
    assert not out["weights"]


def test_hugging_face_cache(tmp_path):
    """Snapshots are links into blobs of the same repository; the repository names its snapshot."""
    make("mixtral").save_pretrained(tmp_path / "m")
    repo = tmp_path / "snapshots" / "models--org--Mixtral-Tiny"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted((tmp_path / "m").iterdir())):
        path.rename(repo / "blobs" / f"blob{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
    out = load(snapshot)
    assert out["weights"]
    assert out["spec"]["name"] == "mixtral_tiny"
    assert refused("E-CONFIG", repo).hint.endswith(f"`{snapshot}`")
    error = refused("E-TENSOR", snapshot, f"--checkpoint={repo}")
    assert error.hint.endswith(f"`{snapshot}`")
    other = repo / "snapshots" / "4567def"
    other.mkdir()
    assert refused("E-CONFIG", repo).hint.endswith(f"`{snapshot}` or `{other}`")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("4567def\n")
    assert refused("E-CONFIG", repo).hint.endswith(f"in `{other}`")
    (repo / "refs" / "main").write_text("../../x")
    assert refused("E-CONFIG", repo).hint.endswith(f"`{snapshot}` or `{other}`")
    (repo / "snapshots").rename(tmp_path / "elsewhere")
    (repo / "snapshots").mkdir()
    refused("E-CONFIG", repo, says="not complete")


def test_user_rows(tmp_path):
    rules = json.loads((MODELS / "mixtral.json").read_text())
    rules["model_type"] = "my_moe"
    rules["keys"]["num_local_experts"]["spellings"] = ["n_exp"]
    (tmp_path / "my_moe.json").write_text(json.dumps(rules))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "my_moe", "n_exp": 3}))
    refused("E-UNKNOWN-MODEL", path, says=("my_moe", ".moe.json", "--model-rows"))
    assert load(path, f"--model-rows={tmp_path / 'my_moe.json'}")["spec"]["layers"][0]["E"] == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["blocks"][0]["router"].update(score="sofmax"), "router.score"),
        (lambda r: r["blocks"][0]["router"].update(scor="softmax"), "scor"),
        (lambda r: r["blocks"][0].update(H={"key": "hiden_size"}), "hiden_size"),
        (lambda r: r["blocks"][0]["weights"].pop("down"), "down"),
        (lambda r: r["blocks"][0]["weights"]["gate_up"][0].pop(), "every part once"),
        (lambda r: r.update(blocks=[]), "blocks"),
        (lambda r: r.update(schema=2), "newer"),
        (lambda r: r.pop("keys"), "keys"),
        (lambda r: r["keys"]["hidden_act"].update(type="act"), "type"),
        (lambda r: r["blocks"][0].update(when={"keys": "x"}), "when"),
    ],
)
def test_malformed_rows(change, says, tmp_path):
    rules = json.loads((MODELS / "mixtral.json").read_text())
    change(rules)
    row = tmp_path / "row.json"
    row.write_text(json.dumps(rules))
    name = "E-ABI" if says == "newer" else "E-CONFIG"
    path = config_file(tmp_path, model_type="mixtral")
    error = refused(name, path, f"--model-rows={row}", says=says)
    assert "row.json" in error.where


def test_unread_keys_are_said(tmp_path):
    path = config_file(tmp_path, model_type="mixtral", n_shared_experts=2, router_jitter_noise=0.1)
    notes = load(path)["notes"]
    assert any("n_shared_experts" in note for note in notes)
    assert not any("router_jitter_noise" in note for note in notes)


def test_biases_and_activations_of_a_dense_model(tmp_path):
    path = config_file(tmp_path, model_type="llama", mlp_bias=True, hidden_act="relu2")
    expert = load(path, "--check")["layers"][0]["semantics"]["expert"]
    assert expert == {"form": "glu", "activation": "relu2", "bias": True}


def test_compare_names_the_attribute(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = config_file(tmp_path / "a", model_type="olmoe")
    b = config_file(tmp_path / "b", model_type="olmoe", norm_topk_prob=True, hidden_act="relu")
    differences = json.loads(tool(a, f"--against={b}"))["differences"]
    assert ["router.renormalize", "none", "sum"] in differences
    assert ["expert.activation", "silu", "relu"] in differences
    assert len(differences) == 2
