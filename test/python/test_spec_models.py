"""Configurations and checkpoints of every row, against transformers' classes and tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from spec_tool import ROOT, load, refused, tool, weight

MODELS = ROOT / "share" / "moec" / "models"
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
CASES = {
    "mixtral": dict(
        hidden_size=16,
        intermediate_size=12,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=2,
    ),
    "olmoe": dict(
        hidden_size=16,
        intermediate_size=7,
        num_experts=6,
        num_experts_per_tok=3,
        num_hidden_layers=2,
        norm_topk_prob=True,
    ),
    "qwen3_moe": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=5,
        head_dim=8,
        mlp_only_layers=[3],
        decoder_sparse_step=2,
    ),
    "llama": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3),
}


def rows() -> list[str]:
    return sorted(path.stem for path in MODELS.glob("*.json"))


def make(name: str, dtype: torch.dtype = torch.float32, **more) -> torch.nn.Module:
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **ATTENTION, **(CASES[name] | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


def config_file(folder: Path, **keys) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return path


def experts_of(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a block in moec's order, taken from the module's memory."""
    if hasattr(block, "experts"):
        return {
            "router": block.gate.weight,
            "gate_up": block.experts.gate_up_proj,
            "down": block.experts.down_proj,
        }
    return {
        "gate_up": torch.cat([block.gate_proj.weight, block.up_proj.weight]),
        "down": block.down_proj.weight,
    }


def check_weights(model: torch.nn.Module, folder: Path, tmp_path: Path, *options: str) -> None:
    for i, layer in enumerate(model.model.layers):
        for role, want in experts_of(layer.mlp).items():
            got = weight(folder, f"model.layers.{i}.mlp", role, tmp_path / "w.bin", *options)
            assert np.array_equal(got, want.detach().float().numpy().ravel()), (i, role)


@pytest.mark.parametrize("row", rows())
def test_defaults_are_the_class_defaults(row):
    rules = json.loads((MODELS / f"{row}.json").read_text())
    config = transformers.AutoConfig.for_model(rules["model_type"])
    assert type(config).__name__ == rules["config_class"]
    for key, rule in rules["keys"].items():
        for spelling in [key, *rule.get("spellings", [])]:
            assert getattr(config, spelling) == rule["default"], spelling


@pytest.mark.parametrize("row", rows())
def test_bare_config_takes_defaults(row, tmp_path):
    out = load(config_file(tmp_path, model_type=row), "--check", "--origins")
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
    out = load(tmp_path, "--check")
    assert len(out["layers"]) == config.num_hidden_layers
    for layer in out["layers"]:
        block = modules[layer["name"]]  # the name is the module's own
        want = {role: tuple(tensor.shape) for role, tensor in experts_of(block).items()}
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
    out = load(tmp_path / "m", "--check")
    assert out["weights"]
    want = "bf16" if dtype == torch.bfloat16 else "f32"
    for layer in out["layers"]:
        assert layer["semantics"]["compute"] == want
        assert {w["format"] for w in layer["semantics"]["weights"].values()} == {want}
    assert any("f16" in note for note in out["notes"]) == (dtype == torch.float16)
    check_weights(model, tmp_path / "m", tmp_path)


@pytest.mark.parametrize("row", sorted(CASES))
def test_sharded_checkpoint(row, tmp_path):
    model = make(row)
    model.save_pretrained(tmp_path / "m", max_shard_size="4KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    check_weights(model, tmp_path / "m", tmp_path)


@pytest.mark.parametrize("row", ["mixtral", "olmoe", "qwen3_moe"])
def test_fused_form_on_disk(row, tmp_path):
    model = make(row, torch.bfloat16)
    folder = tmp_path / "m"
    model.config.save_pretrained(folder)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    assert any(k.endswith("experts.gate_up_proj") for k in state)
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
    """Snapshots are links into blobs of the same repository."""
    make("mixtral").save_pretrained(tmp_path / "m")
    repo = tmp_path / "hub" / "models--org--Mixtral-Tiny"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted((tmp_path / "m").iterdir())):
        path.rename(repo / "blobs" / f"blob{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
    out = load(snapshot)
    assert out["weights"]
    assert out["spec"]["name"] == "mixtral_tiny"


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


def test_attributes_that_are_not_implemented(tmp_path):
    path = config_file(tmp_path, model_type="llama", mlp_bias=True)
    load(path)  # inspecting it is fine
    error = refused("E-UNSUPPORTED", path, "--check", says=("expert.bias", "mlp_bias"))
    assert error.exit == 3
    path = config_file(tmp_path, model_type="llama", hidden_act="relu2")
    refused("E-UNSUPPORTED", path, "--check", says=("expert.activation", "relu2", "hidden_act"))


def test_compare_names_the_attribute(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = config_file(tmp_path / "a", model_type="olmoe")
    b = config_file(tmp_path / "b", model_type="olmoe", norm_topk_prob=True, hidden_act="relu")
    differences = json.loads(tool(a, f"--against={b}"))["differences"]
    assert ["router.renormalize", "none", "sum"] in differences
    assert ["expert.activation", "silu", "relu"] in differences
    assert len(differences) == 2
