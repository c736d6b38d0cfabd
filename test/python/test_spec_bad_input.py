"""Bad input: every kind has its code, says where it is, and ends without a crash."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from spec_tool import batch, load, refused, safetensors, weight

# H 6, F 5, E 4, K 2, two layers.
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "dtype": "float32",
}


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    out = {"model.embed_tokens.weight": random.normal(size=(9, 6)).astype(np.float32)}
    for i in range(2):
        at = f"model.layers.{i}.block_sparse_moe."
        out[at + "gate.weight"] = random.normal(size=(4, 6)).astype(np.float32)
        for e in range(4):
            for w, shape in (("w1", (5, 6)), ("w3", (5, 6)), ("w2", (6, 5))):
                values = random.normal(size=shape).astype(np.float32)
                out[at + f"experts.{e}.{w}.weight"] = values
    return out


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    load(folder, "--check")
    return folder


@pytest.fixture
def sharded(model):
    """Two shards and their index."""
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {}
    for shard in (0, 1):
        name = f"model-0000{shard + 1}-of-00002.safetensors"
        part = {k: v for k, v in state.items() if (".layers.1." in k) == bool(shard)}
        save_file(part, model / name)
        index.update(dict.fromkeys(part, name))
    write_index(model, index)
    load(model, "--check")
    return model


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def cases(*rows: tuple) -> list:
    """Parameters under short names: what they hold is no text for a terminal."""
    return [pytest.param(*row, id=f"{i}-{row[-1]}") for i, row in enumerate(rows)]


def config(folder: Path, **changes) -> Path:
    keys = {k: v for k, v in (CONFIG | changes).items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(keys))
    return folder / "config.json"


# ---------------------------------------------------------------------------------------------
# config.json


def test_no_config(tmp_path):
    refused("E-CONFIG", tmp_path, says="config.json")
    refused("E-CONFIG", tmp_path / "nothing", says="nothing there")
    refused("E-CONFIG", tmp_path / "nothing.json", says="nothing there")
    refused("E-CONFIG", tmp_path / "nothing.moe.json", says="nothing there")


@pytest.mark.parametrize(
    ("text", "says"),
    cases(
        ("", "an empty file"),
        ("  \n", "only blanks"),
        (json.dumps(CONFIG)[:-1], "closing bracket"),
        (json.dumps(CONFIG)[:40], "closing"),
        ("model_type: mixtral", "a JSON value"),
        ("[1, 2]", "an object"),
        ("3", "an object"),
        ("null", "an object"),
        (json.dumps(CONFIG) + "x", "JSON"),
        (json.dumps(CONFIG) + "}", "match"),
        ('{"model_type": "mixtral", "model_type": "olmoe"}', "twice"),
        ('{"model_type": "mixtral", "hidden_size": 8, "hidden_\\u0073ize": 9}', "twice"),
        ('{"model_type": "mixtral", "x": {"a": [{"b": 1, "b": 1}]}}', "x.a[0].b"),
        ('{"model_type": "mixtral", "hidden_size": 08}', "a JSON value"),
        ('{"model_type": "mixtral", "hidden_size": +8}', "a JSON value"),
        ('{"model_type": "mixtral", "hidden_size": 8,}', "JSON"),
        ("{'model_type': 'mixtral'}", "a JSON value"),
        ('{"model_type": "mixtral" // comment\n}', "a JSON value"),
        ("[" * 10_000_000, "nested brackets"),
        ('{"a":' * 100_000, "nested brackets"),
        ('{"model_type": "mixtral", "x": "' + "a" * 1_100_000 + '"}', "at most 1048576 bytes"),
        ('{"model_type": "mixtral", "x": "\\ud800"}', "surrogates"),
    ),
)
def test_config_that_is_no_json(text, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    error = refused("E-CONFIG", path, says=says, limit=10)
    assert error.exit == 3
    assert str(path) in error.where


def test_config_with_foreign_bytes(tmp_path):
    path = tmp_path / "config.json"
    for data in (b"\xff\xfe{\x00}\x00", b"\x00" * 100, os.urandom(1000), b'{"model_type": "\xff"}'):
        path.write_bytes(data)
        refused("E-CONFIG", path)


def test_config_cut_everywhere(tmp_path):
    text = config(tmp_path).read_bytes()
    paths = [tmp_path / f"{length}.json" for length in range(len(text))]
    for length, path in enumerate(paths):
        path.write_bytes(text[:length])
    assert {result["name"] for result in batch(paths)} == {"E-CONFIG"}


def test_python_writes_nan_and_infinity(tmp_path):
    path = config(tmp_path, time_step_limit=[0.0, float("inf")], x=float("nan"), y=float("-inf"))
    assert "Infinity" in path.read_text()
    load(path)


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok"]
)
def test_sizes(key, tmp_path):
    values = ["8", 8.5, 8.0, True, None, [8], {"a": 8}, 0, -1, -(2**31), 2**31, 2**63, 2**64]
    paths = []
    for i, value in enumerate([*values, 10**400]):
        (tmp_path / str(i)).mkdir()
        paths.append(config(tmp_path / str(i), **{key: "@"}))
        paths[-1].write_text(paths[-1].read_text().replace('"@"', json.dumps(value)))
    for result in batch(paths):
        assert result["name"] == "E-CONFIG", result
        assert result["where"].endswith(key), result
        assert "an integer from 1 to" in result["expected"], result


@pytest.mark.parametrize("value", [0, -1, 2**40, "2", None, 1.0, 100_000])
def test_layer_count(value, tmp_path):
    path = config(tmp_path, num_hidden_layers=value)
    refused("E-CONFIG", path, says="num_hidden_layers")


def test_more_chosen_than_there_are(tmp_path):
    path = config(tmp_path, num_experts_per_tok=5)
    error = refused("E-CONFIG", path, says=("at most E = 4", "num_experts_per_tok"))
    assert error.where.startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": 3}, "hidden_act"),
        ({"model_type": "absent"}, "model_type"),
        ({"model_type": 7}, "model_type"),
        ({"model_type": ""}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"dtype": 16}, "dtype"),
        ({"model_type": "olmoe", "norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"model_type": "olmoe", "norm_topk_prob": 1}, "norm_topk_prob"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0, -1]}, "mlp_only_layers[1]"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": ["0"]}, "mlp_only_layers[0]"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step"),
    ],
)
def test_wrong_types(changes, says, tmp_path):
    refused("E-CONFIG", config(tmp_path, **changes), says=says)


@pytest.mark.parametrize(
    ("model_type", "says"),
    cases(
        ("mixtrall", "`mixtral`"),
        ("qwen_3_moe", "`qwen3_moe`"),
        ("Mixtral", "`mixtral`"),
        ("gpt2", "the table has"),
        ("x" * 5000, "the table has"),
        ("\x00\x1b[31m", "the table has"),
    ),
)
def test_unknown_model_type(model_type, says, tmp_path):
    path = config(tmp_path, model_type=model_type)
    error = refused("E-UNKNOWN-MODEL", path, says=(says, ".moe.json", "--model-rows"))
    assert len(str(error)) < 1500
    config(tmp_path, model_type="my_vl", text_config={"model_type": "mixtrall"})
    refused("E-UNKNOWN-MODEL", path, says=("`mixtral`", "text_config"))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "mxfp4"},
        {"quant_method": "awq"},
        {"format": "pack-quantized"},
        {"bits": 4},
        "gptq",
    ],
)
def test_quantized(quantization, model):
    config(model, quantization_config=quantization)
    name = next(iter(quantization.values())) if isinstance(quantization, dict) else ""
    error = refused("E-UNSUPPORTED", model, says=name if isinstance(name, str) else ())
    assert error.where.endswith("quantization_config")
    config(model, quantization_config=None)
    load(model)
    (model / "hf_quant_config.json").write_text("{}")
    refused("E-UNSUPPORTED", model, says=("hf_quant_config.json", "from_pretrained"))


def test_unsupported_values(tmp_path):
    refused("E-UNSUPPORTED", config(tmp_path, hidden_act="quick_gelu"), says="quick_gelu")
    refused("E-UNSUPPORTED", config(tmp_path, dtype="float8_e4m3fn"), says="float8_e4m3fn")


def test_other_kinds_of_files(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    refused("E-ARGUMENT", path, says="another kind")
    (tmp_path / "config.json").mkdir()
    refused("E-CONFIG", tmp_path / "config.json")
    refused("E-PATH", tmp_path, says="a folder")


# ---------------------------------------------------------------------------------------------
# safetensors files


def one(**changes) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


DATA = bytes(8)


@pytest.mark.parametrize(
    ("data", "says"),
    cases(
        (b"", "at least 8 bytes"),
        (b"\x01\x02", "at least 8 bytes"),
        (safetensors(b"", b"", 0), "JSON"),
        (b"PK\x03\x04" + bytes(100), "header"),
        (b"\x80\x02}q\x00" + bytes(100), "header"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "header"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "header of at most 100000000"),
        (safetensors({"a": one()}, DATA, 10**9), "at most 100000000"),
        (safetensors({"a": one()}, DATA, 2**63), "at most 100000000"),
        (safetensors({"a": one()}, DATA, 2**64 - 1), "at most 100000000"),
        (safetensors({"a": one()}, DATA, 1000), "inside the file"),
        (safetensors({"a": one()}, DATA, 20), "closing"),
        (safetensors(json.dumps({"a": one()}).encode() + b"\0", DATA), "JSON"),
        (safetensors(b"[]"), "an object"),
        (safetensors(b"not JSON at all"), "JSON"),
        (safetensors({"a": one()}, DATA[:-1]), "from 0 to 7"),
        (safetensors({"a": one()}, DATA + b"x"), "end with the file"),
        (safetensors({}, b"x"), "end with the file"),
        (safetensors({"a": one(data_offsets=[8, 0])}, DATA), "in this order"),
        (safetensors({"a": one(data_offsets=[0, 9])}, DATA), "from 0 to 8"),
        (safetensors({"a": one(data_offsets=[-1, 7])}, DATA), "from 0 to 8"),
        (safetensors({"a": one(data_offsets=[0, 2**63])}, DATA), "from 0 to 8"),
        (safetensors({"a": one(data_offsets=[2**64, 8])}, DATA), "from 0 to 8"),
        (safetensors({"a": one(data_offsets=[0])}, DATA), "an array of 2"),
        (safetensors({"a": one(data_offsets=[0, 8, 8])}, DATA), "an array of 2"),
        (safetensors({"a": one(), "b": one()}, DATA), "overlap"),
        (safetensors({"a": one(), "b": one(data_offsets=[4, 12])}, DATA + DATA[:4]), "overlap"),
        (safetensors({"a": one(), "b": one(data_offsets=[9, 17])}, bytes(17)), "hole"),
        (safetensors({"a": one(data_offsets=[1, 9])}, bytes(9)), "hole"),
        (safetensors({"a": one(shape=[3])}, DATA), "12 bytes"),
        (safetensors({"a": one(shape=[1])}, DATA), "4 bytes"),
        (safetensors({"a": one(shape=[2**33, 2**33])}, DATA), "fewer than 2^6"),
        (safetensors({"a": one(shape=[2**62])}, DATA), "fewer than 2^6"),
        (safetensors({"a": one(shape=[2**62, 4, 0])}, b""), "fewer than 2^6"),
        (safetensors({"a": one(shape=[-2])}, DATA), "an integer from 0"),
        (safetensors({"a": one(shape=[2.0])}, DATA), "an integer from 0"),
        (safetensors({"a": one(shape=["2"])}, DATA), "an integer from 0"),
        (safetensors({"a": one(shape=2)}, DATA), "an array"),
        (safetensors({"a": one(dtype="F33")}, DATA), "a dtype of the format"),
        (safetensors({"a": one(dtype="f32")}, DATA), "a dtype of the format"),
        (safetensors({"a": one(dtype=4)}, DATA), "dtype"),
        (safetensors({"a": {"dtype": "F32", "shape": [2]}}, DATA), "data_offsets"),
        (safetensors({"a": [1]}, DATA), "an object"),
        (safetensors({"a": one(dtype="F4", shape=[3], data_offsets=[0, 2])}, DATA[:2]), "whole"),
        (safetensors({"a": one(), "__metadata__": {"x": 1}}, DATA), "__metadata__.x"),
        (safetensors({"a": one(), "__metadata__": [1]}, DATA), "__metadata__"),
        (
            safetensors(f'{{"a":{json.dumps(one())},"a":{json.dumps(one())}}}'.encode(), DATA),
            "twice",
        ),
        (safetensors(b'{"\xff":' + json.dumps(one()).encode() + b"}", DATA), "UTF-8"),
        (safetensors(b'{"a":' * 1000), "nested"),
    ),
)
def test_broken_safetensors(data, says, tmp_path, model):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    error = refused("E-FILE-FORMAT", "--safetensors", path, says=says, limit=10)
    assert str(path) in error.where
    (model / "model.safetensors").write_bytes(data)
    refused("E-FILE-FORMAT", model)


def test_safetensors_that_lie_about_the_header_allocate_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # sparse: claims and has a header of 200 MB
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    refused("E-FILE-FORMAT", "--safetensors", path, limit=5)


def test_safetensors_cut_everywhere(model, tmp_path):
    path = model / "model.safetensors"
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    paths = []
    for cut in [*range(header), *range(header, len(data), 13), len(data) - 1]:
        paths.append(tmp_path / f"{cut}.safetensors")
        paths[-1].write_bytes(data[:cut])
    for options in (["--safetensors"], []):
        if not options:  # as a whole model: a few of them
            paths = paths[::200]
            folders = []
            for i, path in enumerate(paths):
                folders.append(tmp_path / f"cut{i}")
                folders[-1].mkdir()
                shutil.copy(model / "config.json", folders[-1])
                shutil.copy(path, folders[-1] / "model.safetensors")
            paths = folders
        results = batch(paths, *options)
        assert {result["name"] for result in results} == {"E-FILE-FORMAT"}


def test_safetensors_with_one_bit_flipped(model, tmp_path):
    """A header with a flipped bit is refused or still valid; nothing crashes."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(5)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    folders = []
    for i, bit in enumerate(random.integers(0, 8 * header, 300)):
        data[bit // 8] ^= 1 << (bit % 8)
        folders.append(tmp_path / f"flip{i}")
        folders[-1].mkdir()
        shutil.copy(model / "config.json", folders[-1])
        (folders[-1] / "model.safetensors").write_bytes(data)
        data[bit // 8] ^= 1 << (bit % 8)
    for result in batch(folders):
        name = result if result == "ok" else result["name"]
        assert name in ("ok", "E-FILE-FORMAT", "E-TENSOR", "E-UNSUPPORTED"), result


# ---------------------------------------------------------------------------------------------
# tensors that do not fit the model


def test_every_missing_tensor_is_named(model, tmp_path):
    state = tensors()
    needed = [name for name in state if "layers" in name]
    assert len(needed) == 26
    folders = []
    for name in needed:
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        shutil.copy(model / "config.json", folders[-1])
        kept = {k: v for k, v in state.items() if k != name}
        save_file(kept, folders[-1] / "model.safetensors")
    for name, result in zip(needed, batch(folders), strict=True):
        assert result["name"] == "E-TENSOR" and name in result["expected"], result


def test_missing_tensor_hints(model):
    state = tensors()
    name = "model.layers.1.block_sparse_moe.gate.weight"
    state[name + "s"] = state.pop(name)
    save_file(state, model / "model.safetensors")
    refused("E-TENSOR", model, says=(f"`{name}`", f"`{name}s`"))
    save_file({"a": np.zeros(1, np.float32)}, model / "model.safetensors")
    refused("E-TENSOR", model, says="1 tensors")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate.weight", (3, 6)),
        ("gate.weight", (4, 5)),
        ("gate.weight", (24,)),
        ("experts.2.w1.weight", (6, 5)),
        ("experts.3.w2.weight", (6, 5, 1)),
        ("experts.0.w3.weight", (0, 6)),
    ],
)
def test_wrong_shape(name, shape, model):
    state = tensors()
    name = "model.layers.1.block_sparse_moe." + name
    state[name] = np.zeros(shape, np.float32)
    save_file(state, model / "model.safetensors")
    text = "[" + ",".join(map(str, shape)) + "]"
    refused("E-TENSOR", model, says=(name, text, "H from config key `hidden_size`"))


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.uint8, np.int32])
def test_wrong_dtype(dtype, model):
    state = tensors()
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    state[name] = state[name].astype(dtype)
    save_file(state, model / "model.safetensors")
    refused("E-UNSUPPORTED", model, says=(name, "F32, BF16 or F16"))
    state = tensors()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].astype(dtype)
    save_file(state, model / "model.safetensors")
    load(model)  # a tensor that no layer needs may have any dtype


def test_more_experts_than_the_config_says(model):
    config(model, num_local_experts=3)
    state = tensors()
    for i in range(2):
        name = f"model.layers.{i}.block_sparse_moe.gate.weight"
        state[name] = state[name][:3].copy()
    save_file(state, model / "model.safetensors")
    refused("E-TENSOR", model, says=("3 experts", "experts.3.w1.weight"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite(value, dtype, model, tmp_path):
    state = tensors()
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    state[name][3, 4] = state[name][4, 5] = value
    if dtype == "bfloat16":
        import torch
        from safetensors.torch import save_file as save_torch

        values = {k: torch.from_numpy(v).bfloat16() for k, v in state.items()}
        save_torch(values, model / "model.safetensors")
    else:
        save_file({k: v.astype(dtype) for k, v in state.items()}, model / "model.safetensors")
    out = f"-o={tmp_path / 'w.bin'}"
    error = refused(
        "E-NONFINITE", model, "--weight=model.layers.1.mlp:gate_up", out, says=(name, "2 NaN", "22")
    )
    assert error.exit == 3
    weight(model, "model.layers.0.mlp", "gate_up", tmp_path / "w.bin")


# ---------------------------------------------------------------------------------------------
# shards and paths


def test_shards(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(index.values()))

    (sharded / second).rename(sharded / "aside")
    refused("E-TENSOR", sharded, says=(second, first))
    (sharded / "aside").rename(sharded / second)

    moved = dict(index)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    moved[name] = first
    write_index(sharded, moved)
    refused("E-TENSOR", sharded, says=(name, first))

    write_index(sharded, {k: v for k, v in index.items() if "layers.1" not in k})
    refused("E-TENSOR", sharded, says="layers.1")

    shutil.copy(sharded / second, sharded / "third.safetensors")
    write_index(sharded, index | {name: "third.safetensors"})
    refused("E-TENSOR", sharded, says=("third.safetensors", second))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("{", "closing"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map.a"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
    ],
)
def test_broken_index(text, says, sharded):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused("E-FILE-FORMAT", sharded, says=says)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/secret.safetensors",
        "./secret.safetensors",
        "..",
        ".",
        "",
        "a/../secret.safetensors",
        "secret.safetensors\x00.safetensors",
        "x" * 300,
        "..\\secret" + "/x",
    ],
)
def test_paths_that_leave_the_folder(path, sharded, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"")
    write_index(sharded, {"model.layers.0.block_sparse_moe.gate.weight": path})
    refused("E-PATH", sharded, says="plain name")


def test_links(model, tmp_path):
    outside = tmp_path / "outside.safetensors"
    file = model / "model.safetensors"
    file.rename(outside)
    for target in (outside, "../outside.safetensors"):
        file.symlink_to(target)
        refused("E-PATH", model, says=("stays inside", "--follow-links"))
        load(model, "--follow-links")
        file.unlink()
    # Through a folder that is itself a link, and through a link to a link.
    (model / "inner").symlink_to(tmp_path)
    file.symlink_to("inner/outside.safetensors")
    refused("E-PATH", model, says="stays inside")
    file.unlink()
    (model / "step").symlink_to(outside)
    file.symlink_to("step")
    refused("E-PATH", model, says="stays inside")
    file.unlink()
    file.symlink_to("nowhere")
    refused("E-PATH", model, says="leads nowhere")
    file.unlink()
    file.symlink_to("model.safetensors")
    refused("E-IO", model)
    file.unlink()
    # Inside the folder a link is fine.
    outside.rename(model / "data")
    file.symlink_to("data")
    load(model)
    # The prefix of a name is not its folder.
    shutil.copytree(model, tmp_path / "model-other", symlinks=True)
    file.unlink()
    file.symlink_to("../model-other/data")
    refused("E-PATH", model, says="stays inside")


def test_links_of_another_cache_repository(model, tmp_path):
    for repo in ("models--a--b", "models--c--d"):
        (tmp_path / "hub" / repo / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    snapshot.parent.mkdir()
    model.rename(snapshot)
    file = snapshot / "model.safetensors"
    file.rename(tmp_path / "hub" / "models--c--d" / "blobs" / "x")
    file.symlink_to("../../../models--c--d/blobs/x")
    refused("E-PATH", snapshot, says="stays inside")


def test_things_that_are_no_files(model):
    file = model / "model.safetensors"
    file.unlink()
    os.mkfifo(file)
    refused("E-PATH", model, says="pipe", limit=5)
    file.unlink()
    file.symlink_to("/dev/zero")
    refused("E-PATH", model, limit=5)
    refused("E-PATH", model, "--follow-links", says="device", limit=5)
    file.unlink()
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(model)  # the names of sockets are short
    server.bind("model.safetensors")
    os.chdir(here)
    refused("E-PATH", model, limit=5)
    server.close()
    file.unlink()
    file.mkdir()
    refused("E-PATH", model, says="a folder")
    file.rmdir()
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    refused("E-PATH", model, limit=5)


def test_layers_beyond_the_configuration_are_said(model):
    config(model, num_hidden_layers=1)
    assert any("model.layers.1." in note for note in load(model)["notes"])
    config(model)
    assert not load(model)["notes"]


def test_foreign_weights(model):
    file = model / "model.safetensors"
    file.unlink()
    load(model)  # no weights at all: shapes only
    (model / "pytorch_model.bin").write_bytes(b"x")
    refused("E-UNSUPPORTED", model, says=("pytorch_model.bin", "safetensors"))
    (model / "a.safetensors").write_bytes(safetensors({}))
    (model / "b.safetensors").write_bytes(safetensors({}))
    refused("E-TENSOR", model, says="2 safetensors files without an index")


def test_odd_but_valid_paths(model, tmp_path):
    for name in ("with space", "ünïcödé-文", "-dash", "x" * 200, "models--x--y"):
        target = tmp_path / name
        model.rename(target)
        load(f"{target}/")
        model = target
