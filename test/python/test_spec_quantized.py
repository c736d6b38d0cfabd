"""fp8 and mxfp4 checkpoints: bit for bit what an independent decoder makes of the same bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import moec_command
from safetensors.torch import load_file, save_file
from spec_models import check_weights, make
from spec_tool import load, refused, weight

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}


def set_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def fp8_checkpoint(row: str, folder: Path, scales: torch.dtype, **sizes):
    """A checkpoint whose linear layers are stored as DeepSeek and MiniMax ship them, and a model
    that holds the decoded values. The decoder is torch's own conversion and one product in f32."""
    model = make(row, torch.bfloat16, **sizes)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    state, out, decoded = load_file(file), {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if not re.search(r"\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$", name):
            out[name] = decoded[name] = tensor
            continue
        rows, cols = tensor.shape
        grid = (-(-rows // 128), -(-cols // 128))
        codes = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
        codes[(codes & 127) == 127] = 1  # not NaN, but everything else, subnormals and both zeros
        values = codes.view(torch.float8_e4m3fn)
        scale = (torch.rand(grid, generator=generator) * 0.05 + 1e-3).to(scales)
        out[name], out[name + "_scale_inv"] = values, scale
        wide = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        decoded[name] = (values.float() * wide).to(torch.bfloat16)
    save_file(decoded, file, metadata={"format": "pt"})
    model = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    save_file(out, file, metadata={"format": "pt"})
    set_config(folder, quantization_config=FP8)
    return model


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ["deepseek_v3", "minimax_m2"])
def test_fp8(row, scales, tmp_path):
    sizes = {"hidden_size": 272, "num_hidden_layers": 2}
    sizes["intermediate_size"] = 136 if row == "minimax_m2" else 300
    if row == "deepseek_v3":
        sizes |= {"moe_intermediate_size": 136, "first_k_dense_replace": 1}
    model = fp8_checkpoint(row, tmp_path / "m", scales, **sizes)
    out = load(tmp_path / "m")
    assert "fp8 weights of the checkpoint are decoded to bf16" in out["notes"]
    matrices = [
        w["format"]
        for layer in out["layers"]
        for role, w in layer["semantics"]["weights"].items()
        if not role.endswith("_bias")
    ]
    assert set(matrices) == {"bf16"}
    check_weights(model, tmp_path / "m", tmp_path)


def test_fp8_in_f32_is_the_product(tmp_path):
    """Asked for f32, nothing is rounded to bf16 on the way."""
    fp8_checkpoint("minimax_m2", tmp_path / "m", torch.float32, hidden_size=136)
    state = load_file(tmp_path / "m" / "model.safetensors")
    at = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    want = []
    for e in range(5):
        values, scale = state[at.format(e)], state[at.format(e) + "_scale_inv"]
        rows, cols = values.shape
        wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        want.append((values.float() * wide).numpy())
    layer = "model.layers.1.mlp"
    got = weight(tmp_path / "m", layer, "down", tmp_path / "w.bin", "--dtype=f32")
    assert np.array_equal(got, np.stack(want).ravel())


def test_fp8_refusals(tmp_path):
    folder = tmp_path / "m"
    fp8_checkpoint("minimax_m2", folder, torch.float32)
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    for change, says in [
        ({name + "_scale_inv": None}, (name + "_scale_inv", "none of this name")),
        ({name + "_scale_inv": torch.ones(2, 1)}, ("[1,1]", "[2,1]", "scales")),
        ({name + "_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, ("F32 or BF16", "I32")),
        ({name: state[name].float()}, ("F8_E4M3", "F32")),
    ]:
        changed = {k: v for k, v in (state | change).items() if v is not None}
        save_file(changed, file)
        code = "E-UNSUPPORTED" if "I32" in says or "F32" in says else "E-TENSOR"
        refused(code, folder, says=says)
    save_file(state, file)
    set_config(folder, quantization_config=None)
    refused("E-UNSUPPORTED", folder, says=("F8_E4M3", "quantization_config"))


def mxfp4_decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[..., rows, groups, 16] and [..., rows, groups] to f32 [..., rows, 32 * groups], from the
    format's definition: sign, two bits of exponent with bias 1, one of mantissa."""
    nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], 32)
    exponent, mantissa = nibbles >> 1 & 3, nibbles & 1
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1.0))
    value = np.where(nibbles & 8, -size, size) * 2.0 ** (scales[..., None].astype(float) - 127)
    return value.astype(np.float32).reshape(*scales.shape[:-1], -1)


def mxfp4_checkpoint(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """A gpt-oss checkpoint as released; returns the decoded weights [E, rows, cols]."""
    model = make("gpt_oss", torch.bfloat16, hidden_size=64, intermediate_size=32)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    random, decoded = np.random.default_rng(seed), {}
    state = load_file(file)
    for name in [k for k in state if re.search(r"experts\.(gate_up|down)_proj$", k)]:
        e, cols, rows = state.pop(name).shape
        blocks = random.integers(0, 256, (e, rows, cols // 32, 16), np.uint8)
        scales = random.integers(100, 140, (e, rows, cols // 32), np.uint8)
        scales.flat[:4] = (0, 1, 60, 250)  # far out, but bf16 holds them
        state[name + "_blocks"] = torch.from_numpy(blocks)
        state[name + "_scales"] = torch.from_numpy(scales)
        decoded[name] = mxfp4_decode(blocks, scales)
    save_file(state, file, metadata={"format": "pt"})
    set_config(folder, quantization_config=MXFP4)
    return decoded


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_mxfp4(dtype, tmp_path):
    decoded = mxfp4_checkpoint(tmp_path / "m")
    out = load(tmp_path / "m", f"--dtype={dtype}")
    assert f"mxfp4 weights of the checkpoint are decoded to {dtype}" in out["notes"]
    for i in range(2):
        layer = f"model.layers.{i}.mlp"
        for role, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            want = decoded[f"{layer}.experts.{name}"]
            if role == "gate_up":  # gate and up alternate on disk
                want = np.concatenate([want[:, ::2], want[:, 1::2]], 1)
            # e2m1 times a power of two fits bf16 exactly, so both formats hold the same.
            got = weight(tmp_path / "m", layer, role, tmp_path / "w", f"--dtype={dtype}")
            assert np.array_equal(got, want.ravel()), (layer, role)


def test_mxfp4_as_transformers_decodes_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    mxfp4_checkpoint(tmp_path / "m", seed=1)
    state = load_file(tmp_path / "m" / "model.safetensors")
    at = "model.layers.0.mlp.experts.down_proj"
    want = convert_moe_packed_tensors(state[at + "_blocks"], state[at + "_scales"])
    want = want.float().transpose(1, 2).numpy()
    got = weight(tmp_path / "m", "model.layers.0.mlp", "down", tmp_path / "w")
    assert np.array_equal(got, want.ravel())


def test_mxfp4_refusals(tmp_path):
    folder = tmp_path / "m"
    mxfp4_checkpoint(folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({k: v for k, v in state.items() if k != name}, file)
    refused("E-TENSOR", folder, says=name)
    save_file(state | {name: state[name][:, :-1].contiguous()}, file)
    refused("E-TENSOR", folder, says=("[5,64,1]", "[5,63,1]"))
    make("mixtral").save_pretrained(tmp_path / "other")
    set_config(tmp_path / "other", quantization_config=MXFP4)
    refused("E-UNSUPPORTED", tmp_path / "other", says=("mxfp4", "no form"))


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("gptq", "bits 4")),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, ("awq", "bits 4")),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            ("compressed-tensors", "pack-quantized"),
        ),
        ({"quant_method": "fp8", "weight_block_size": None}, ("fp8", "weight_block_size null")),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, ("fp8", "[64,128]")),
        ({"quant_method": "fp8"}, ("`fp8`",)),
        (
            {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]},
            ("fp8", 'fmt "e5m2"'),
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes",)),
    ],
)
def test_other_quantizations_are_refused_by_name(quantization, says, tmp_path):
    make("minimax_m2").save_pretrained(tmp_path / "m")
    set_config(tmp_path / "m", quantization_config=quantization)
    refused("E-UNSUPPORTED", tmp_path / "m", says=("quantization_config", *says))


def packed(source: Path, out: Path, *options: object) -> bytes:
    """The bytes of the packed weights of a compiled model."""
    options = ("--cpu", "x86-64-v3", "--quiet", "--name", "m", *options)
    moec_command("compile", source, "-o", out, *options)
    return b"".join(file.read_bytes() for file in sorted((out / "weights").iterdir()))


def test_packing_fp8(tmp_path):
    """Packed in pieces as they are decoded: the same file as from the decoded checkpoint."""
    model = fp8_checkpoint("mixtral", tmp_path / "a", torch.float32, hidden_size=272)
    model.save_pretrained(tmp_path / "b")
    a, b = packed(tmp_path / "a", tmp_path / "a.moec"), packed(tmp_path / "b", tmp_path / "b.moec")
    assert a == b and len(a) > 8192


def test_packing_mxfp4_and_transposed(tmp_path):
    """The same weights in mxfp4, as plain rows and transposed, parts alternating, give one file."""
    random = np.random.default_rng(8)
    e, h, f = 3, 64, 96
    stored, plain = {}, {"router": torch.randn(e, h).bfloat16()}
    for name, rows, cols in (("gate_up", 2 * f, h), ("down", h, f)):
        blocks = random.integers(0, 256, (e, rows, cols // 32, 16), np.uint8)
        scales = random.integers(110, 130, (e, rows, cols // 32), np.uint8)
        stored |= {f"{name}_blocks": torch.from_numpy(blocks)}
        stored |= {f"{name}_scales": torch.from_numpy(scales)}
        plain[name] = torch.from_numpy(mxfp4_decode(blocks, scales)).bfloat16()
    turned = {k: v.mT.contiguous() if v.ndim == 3 else v for k, v in plain.items()}
    stored["router"] = plain["router"]
    files = []
    for name, state in (("mxfp4", stored), ("plain", plain), ("transposed", turned)):
        weights = {"router": {"from": [{"tensor": "router"}]}}
        for role in ("gate_up", "down"):
            at = {"tensor": role, "arrangement": "stacked"}
            if name == "mxfp4":
                at |= {"tensor": f"{role}_blocks", "scales": f"{role}_scales", "encoding": name}
            if role == "gate_up":
                at |= {"part_count": 2, "interleaved": True}
            at["transposed"] = name == "transposed"
            weights[role] = {"from": [at]}
        router = {"score": "softmax", "order": "score_then_select", "renormalize": "sum"}
        layer = {"index": 0, "name": "model.layers.{i}.mlp", "H": h, "F": f, "E": e, "K": 2}
        layer |= {"router": router, "expert": {"form": "glu", "activation": "silu"}}
        spec = {"schema": 1, "name": "m", "dtype": "bf16", "layers": [layer | {"weights": weights}]}
        path = tmp_path / f"{name}.moe.json"
        path.write_text(json.dumps(spec))
        save_file(state, tmp_path / f"{name}.safetensors")
        checkpoint = tmp_path / f"{name}.safetensors"
        files.append(packed(path, tmp_path / f"{name}.moec", "--checkpoint", checkpoint))
    assert files[0] == files[1] == files[2]
