"""Tiny models of every row of the model table: configurations, weights, and where they lie."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from spec_tool import ROOT, load, weight

MODELS = ROOT / "share" / "moec" / "models"
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
LINEAR = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
LINEAR |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")} | {"head_dim": 8}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8}
MLA |= {f"{part}_head_dim": 8 for part in ("qk_nope", "qk_rope", "v")}
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
    "qwen2_moe": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        shared_expert_intermediate_size=11,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=5,
        mlp_only_layers=[3],
        decoder_sparse_step=2,
    ),
    "qwen3_next": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        shared_expert_intermediate_size=11,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        mlp_only_layers=[1],
        **LINEAR,
    ),
    "qwen3_5_moe_text": dict(
        hidden_size=16,
        moe_intermediate_size=9,
        shared_expert_intermediate_size=11,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        **LINEAR,
    ),
    "granitemoe": dict(
        hidden_size=16,
        intermediate_size=9,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=2,
    ),
    "granitemoeshared": dict(
        hidden_size=16,
        intermediate_size=9,
        shared_intermediate_size=11,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=2,
    ),
    "jamba": dict(
        hidden_size=16,
        intermediate_size=9,
        num_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=7,
        expert_layer_period=3,
        expert_layer_offset=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_d_conv=2,
    ),
    "hunyuan_v1_moe": dict(
        hidden_size=16,
        intermediate_size=9,
        num_experts=5,
        moe_topk=2,
        num_hidden_layers=2,
        head_dim=8,
    ),
    "deepseek_v2": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        **MLA,
    ),
    "deepseek_v3": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=2,
        num_hidden_layers=4,
        **MLA,
    ),
    "glm4_moe": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        n_routed_experts=8,
        num_experts_per_tok=3,
        num_hidden_layers=3,
        head_dim=8,
    ),
    "minimax_m2": dict(
        hidden_size=16,
        intermediate_size=9,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        head_dim=8,
    ),
    "ernie4_5_moe": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        moe_num_experts=5,
        moe_k=2,
        moe_layer_start_index=1,
        moe_layer_end_index=4,
        moe_layer_interval=2,
        num_hidden_layers=7,
    ),
    "lfm2_moe": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        num_experts=5,
        num_experts_per_tok=2,
        num_dense_layers=1,
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "gpt_oss": dict(
        hidden_size=16,
        intermediate_size=9,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        head_dim=8,
    ),
    "gemma4_text": dict(
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=9,
        num_experts=5,
        top_k_experts=2,
        enable_moe_block=True,
        num_hidden_layers=2,
        head_dim=8,
        vocab_size_per_layer_input=32,
        hidden_size_per_layer_input=0,
    ),
    "llama4_text": dict(
        hidden_size=16,
        intermediate_size=9,
        intermediate_size_mlp=20,
        num_local_experts=5,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        num_hidden_layers=4,
        head_dim=8,
    ),
    "phimoe": dict(
        hidden_size=16,
        intermediate_size=9,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=2,
    ),
}


def rows() -> list[str]:
    return sorted(path.stem for path in MODELS.glob("*.json"))


def make(name: str, dtype: torch.dtype = torch.float32, **more) -> torch.nn.Module:
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **ATTENTION, **(CASES[name] | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor)
    return model.to(dtype).eval()


def config_file(folder: Path, **keys) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return path


def child(module: torch.nn.Module, *names: str) -> torch.nn.Module | None:
    return next((getattr(module, n) for n in names if getattr(module, n, None) is not None), None)


def experts_of(layer: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The weights of a block in moec's order and shapes, taken from the modules' memory. `layer` is
    the decoder layer, `name` the block's name in it."""
    block = layer.get_submodule(name)
    if name == "experts":
        block = layer  # gemma4: router and experts are the layer's own
    if child(block, "experts") is None:
        gate, up = child(block, "gate_proj", "w1").weight, child(block, "up_proj", "w3").weight
        return {"gate_up": torch.cat([gate, up]), "down": child(block, "down_proj", "w2").weight}
    experts, router = block.experts, child(block, "gate", "router")
    matrix = child(router, "wg", "proj")
    out = {"router": (router if matrix is None else matrix).weight}
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if type(experts).__name__ in ("GptOssExperts", "Llama4TextExperts"):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    bias = child(experts, "gate_up_proj_bias")
    if bias is not None:  # gpt_oss: gate and up alternate
        gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
        out["router_bias"] = router.bias
        out["gate_up_bias"] = torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
        out["down_bias"] = experts.down_proj_bias
    out |= {"gate_up": gate_up, "down": down}
    statics = child(router, "moe_statics") or router
    for holder in (statics, block):
        selection = child(holder, "e_score_correction_bias", "expert_bias")
        if selection is not None:
            out["selection_bias"] = selection
    if name == "experts":
        out["router_scale"], out["per_expert_scale"] = router.scale, router.per_expert_scale
    for holder in (block, layer):
        shared = child(holder, "shared_expert", "shared_experts", "shared_mlp")
        if shared is None:
            continue
        if child(shared, "input_linear") is not None:
            out["shared_gate_up"] = shared.input_linear.weight
            out["shared_down"] = shared.output_linear.weight
        else:
            both = [shared.gate_proj.weight, shared.up_proj.weight]
            out["shared_gate_up"] = torch.cat(both)
            out["shared_down"] = shared.down_proj.weight
    if child(block, "shared_expert_gate") is not None:
        out["shared_gate"] = block.shared_expert_gate.weight
    return out


def check_weights(model: torch.nn.Module, folder: Path, tmp_path: Path, *options: str) -> None:
    """Every weight of every layer is found, and is the module's own."""
    modules = dict(model.named_modules())
    for layer in load(folder, *options)["layers"]:
        name = layer["name"]
        if name not in modules:
            name = name.replace("model.language_model.", "model.")
        number = re.match(r".*\.layers\.\d+", name)[0]
        want = experts_of(modules[number], name[len(number) + 1 :])
        assert set(layer["semantics"]["weights"]) == set(want)
        for role, tensor in want.items():
            got = weight(folder, layer["name"], role, tmp_path / "w.bin", *options)
            assert np.array_equal(got, tensor.detach().float().numpy().ravel()), (name, role)
