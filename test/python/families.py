"""Tiny models of the families whose layers are more than softmax and the best k: their decoder
layers' blocks as transformers runs them, and what each block computes, stated by hand.

Nothing here reads the compiler's model table.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import torch
import transformers
from moec.reference import Reference, reference
from safetensors.torch import save_file
from spec_models import ATTENTION, CASES, child, experts_of

H, F, S, E, K = 40, 27, 45, 12, 3
K1 = dict(intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
K2 = dict(moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K)
K3 = dict(moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=K)
QWEN = K2 | dict(shared_expert_intermediate_size=S)

# name: row of the model table, what differs from the configuration of spec_models.CASES (whose
# layer rules are kept: every one of them makes dense and MoE layers where the family has both).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("qwen2_moe", QWEN),
    "qwen2_moe-norm": ("qwen2_moe", QWEN | dict(norm_topk_prob=True, hidden_act="gelu")),
    "qwen3_next": ("qwen3_next", QWEN),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN),
    "granitemoeshared": ("granitemoeshared", K1 | dict(shared_intermediate_size=S)),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        dict(intermediate_size=F, num_experts=E, moe_topk=K),
    ),
    "deepseek_v2": ("deepseek_v2", K3),
    "deepseek_v2-greedy": (
        "deepseek_v2",
        K3 | dict(topk_method="greedy", n_group=None, topk_group=None, routed_scaling_factor=1.0),
    ),
    "deepseek_v3": ("deepseek_v3", K3),
    "kimi_k2": (
        "deepseek_v3",
        K3 | dict(n_group=1, topk_group=1, n_shared_experts=1, routed_scaling_factor=2.827),
    ),
    "glm4_moe": ("glm4_moe", K3),
    "glm4_moe-plain": ("glm4_moe", K3 | dict(norm_topk_prob=False, routed_scaling_factor=1.8)),
    "minimax_m2": ("minimax_m2", K1),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        dict(moe_intermediate_size=F, moe_num_experts=E, moe_k=K),
    ),
    "ernie4_5_moe-min": (
        "ernie4_5_moe",
        dict(moe_intermediate_size=F, moe_num_experts=E, moe_k=K, moe_norm_min=0.6),
    ),
    "lfm2_moe": ("lfm2_moe", K2),
    "lfm2_moe-plain": ("lfm2_moe", K2 | dict(use_expert_bias=False, norm_topk_prob=False)),
    "gpt_oss": ("gpt_oss", K1),
    "gpt_oss-limit": ("gpt_oss", K1 | dict(swiglu_limit=1.0, swiglu_alpha=1.5)),
    "gemma4": (
        "gemma4_text",
        dict(moe_intermediate_size=F, num_experts=E, top_k_experts=K, rms_norm_eps=1e-3),
    ),
    "llama4": ("llama4_text", dict(intermediate_size=F, num_local_experts=E)),
    "phimoe": ("phimoe", K1 | dict(num_experts_per_tok=2, router_jitter_noise=0.1)),
}

_ACTS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def formula(config: Any, row: str) -> dict[str, Any]:
    """Router, expert and combine of a family's MoE layers, as the papers and modules state them."""
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu")
    router: dict[str, Any] = {"score": "softmax", "order": "score_then_select"}
    expert: dict[str, Any] = {"activation": _ACTS[act]}
    combine: dict[str, Any] = {}
    plain = {"score": "sigmoid", "selection_bias": "score"}
    if row.startswith("qwen"):
        normal = row == "qwen3_5_moe_text" or config.norm_topk_prob
        router["renormalize"] = "sum" if normal else "none"
        combine = {"shared": "mlp", "shared_gate": "sigmoid"}
    elif row == "granitemoeshared":
        router["order"] = "select_then_score"
        combine = {"shared": "mlp"}
    elif row == "hunyuan_v1_moe":
        router["renormalize"] = "sum"
        combine = {"shared": "mlp"}
    elif row == "deepseek_v2":
        router["scale_value"] = config.routed_scaling_factor
        if config.topk_method == "group_limited_greedy":
            kept = {"groups": config.n_group, "groups_kept": config.topk_group}
            router |= kept | {"group_reduce": "max", "group_fill": "zero"}
        combine = {"shared": "mlp"}
    elif row in ("deepseek_v3", "glm4_moe"):
        router |= plain | {"scale_value": config.routed_scaling_factor}
        if config.norm_topk_prob:
            router |= {"renormalize": "sum", "epsilon": 1e-20}
        if config.n_group > 1:
            kept = {"groups": config.n_group, "groups_kept": config.topk_group}
            router |= kept | {"group_reduce": "sum_top2", "group_fill": "neg_inf"}
        combine = {"shared": "mlp"}
    elif row == "minimax_m2":
        router |= plain | {"renormalize": "sum"}
    elif row == "ernie4_5_moe":
        router |= {"selection_bias": "score", "renormalize": "clamp_sum"}
        router["epsilon"] = config.moe_norm_min
        combine = {"shared": "mlp"}
    elif row == "lfm2_moe":
        router |= {"score": "sigmoid", "scale_value": config.routed_scaling_factor}
        if config.use_expert_bias:
            router["selection_bias"] = "score"
        if config.norm_topk_prob:
            router |= {"renormalize": "sum", "epsilon": 1e-6}
    elif row == "gpt_oss":
        router |= {"order": "select_then_score", "logit_bias": True}
        limit = getattr(config, "swiglu_limit", 7.0)
        expert |= {"clamp": "oai", "clamp_limit": limit, "bias": True}
        expert["clamp_alpha"] = getattr(config, "swiglu_alpha", 1.702)
    elif row == "gemma4_text":
        router |= {"renormalize": "sum", "scale": "per_expert"}
        router |= {"input": "rms_norm", "router_x": True, "input_epsilon": config.rms_norm_eps}
    elif row == "llama4_text":
        router |= {"score": "sigmoid", "order": "select_then_score"}
        combine = {"shared": "mlp", "apply": "input"}
    elif row == "phimoe":
        router["select"] = "sparse_mixer"
        router["sparse_mixer_jitter"] = config.router_jitter_noise
    else:
        raise ValueError(row)
    return {"router": router, "expert": expert, "combine": combine}


@dataclass
class Layer:
    """One feed-forward block of a model as transformers runs it, and its reference."""

    name: str  # "model.layers.3.mlp"
    row: str
    spec: dict[str, Any]
    weights: dict[str, torch.Tensor]
    block: torch.nn.Module  # what has the experts; the dense network itself
    holder: torch.nn.Module  # the decoder layer

    @property
    def kind(self) -> str:
        return self.spec["kind"]

    def reference(self) -> Reference:
        return reference(self.spec, self.weights)

    @torch.no_grad()
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        router = child(self.block, "gate", "router")
        if self.row == "llama4_text":
            scores, logits = router(x)
            ids = logits.topk(self.spec["K"]).indices
            return ids, scores.gather(1, ids)
        more = ()
        if self.row == "minimax_m2":
            more = (self.block.e_score_correction_bias,)
        elif self.row == "lfm2_moe":
            more = (self.block.expert_bias if self.block.use_expert_bias else None,)
        _, weights, ids = router(x, *more)
        return ids, weights

    @torch.no_grad()
    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.row != "llama4_text":
            return self.block.experts(x, ids, weights)
        scores = torch.zeros(len(x), self.spec["E"]).scatter_(1, ids, weights.float())
        rows = x[None] * scores.T[..., None].to(x.dtype)  # every expert reads every token
        return self.block.experts(rows.flatten(0, 1)).view(rows.shape).sum(0)

    @torch.no_grad()
    def shared(self, x: torch.Tensor) -> torch.Tensor:
        for holder in (self.block, self.holder):
            mlp = child(holder, "shared_expert", "shared_experts", "shared_mlp")
            if mlp is not None:
                gate = child(self.block, "shared_expert_gate")
                return mlp(x) if gate is None else torch.sigmoid(gate(x)) * mlp(x)
        return torch.zeros_like(x)

    @torch.no_grad()
    def given(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The whole layer with its routing given, by transformers' modules."""
        return self.experts(x, ids, weights) + self.shared(x)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, router_x: torch.Tensor | None = None) -> torch.Tensor:
        """transformers' own block. Two families have none: their decoder layer holds the parts."""
        if router_x is not None:
            return self.given(x, *self.route(router_x))
        if self.row == "granitemoeshared":
            return self.block(x[None])[0] + self.shared(x)
        y = self.block(x[None])
        return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


def layers_of(model: torch.nn.Module, row: str) -> list[Layer]:
    layers = []
    for index, holder in enumerate(model.model.layers):
        # gemma4: a decoder layer has experts itself, and a dense network.
        for name in ("experts", "block_sparse_moe", "feed_forward", "mlp"):
            if child(holder, name) is not None:
                layers.append(layer_of(model.config, row, index, holder, name))
    return layers


def layer_of(config: Any, row: str, index: int, holder: torch.nn.Module, name: str) -> Layer:
    weights = experts_of(holder, name)
    spec: dict[str, Any] = {"H": weights["down"].shape[-2], "F": weights["down"].shape[-1]}
    rules = formula(config, row)
    if "router" in weights:
        spec |= {"kind": "moe", "E": weights["router"].shape[0], **rules}
        spec["K"] = next(
            k
            for n in ("moe_k", "moe_topk", "top_k_experts", "num_experts_per_tok")
            if isinstance(k := getattr(config, n, None), int)
        )
        if spec["combine"].get("shared"):
            spec["combine"]["shared_count"] = 1
            spec["combine"]["shared_width"] = weights["shared_down"].shape[1]
    else:
        spec |= {"kind": "dense", "expert": {"activation": rules["expert"]["activation"]}}
    block = holder if name == "experts" else getattr(holder, name)
    return Layer(f"model.layers.{index}.{name}", row, spec, weights, block, holder)


def fill(layer: Layer, g: torch.Generator) -> None:
    """Weights under which routing is uneven and outputs are O(1); see oracle.scale_weights."""

    def random(p: torch.Tensor, deviation: float) -> torch.Tensor:
        return torch.randn(p.shape, generator=g) * deviation

    parts = [layer.block]
    if layer.row == "granitemoeshared":
        parts.append(layer.holder.shared_mlp)
    transposed = layer.row in ("gpt_oss", "llama4_text")
    for part in parts:
        for name, p in [*part.named_parameters(), *part.named_buffers()]:
            last = name.split(".")[-1]
            if part is layer.holder and name.split(".")[0] not in ("router", "experts"):
                continue
            if "bias" in last:
                p.copy_(random(p, 0.4))
            elif last in ("scale", "per_expert_scale"):
                p.copy_(random(p, 0.5).exp())
            elif p.shape == (layer.spec.get("E"), layer.spec["H"]):  # the router
                lengths = torch.exp(torch.linspace(-0.9, 0.9, len(p)))
                shuffled = lengths[torch.randperm(len(p), generator=g)][:, None]
                p.copy_(random(p, 1) * shuffled / math.sqrt(layer.spec["H"]))
                shuffled = lengths[torch.randperm(len(p), generator=g)][:, None]
                p[:, oracle.loud(layer.spec["H"])] += shuffled / 2
            elif p.ndim >= 2:
                inputs = p.shape[-2] if transposed and "experts" in name else p.shape[-1]
                p.copy_(random(p, 1.7 / math.sqrt(inputs)))


@dataclass
class Family:
    path: Path  # as save_pretrained writes it, but keys that say the class default are left out
    fused: Path  # the tensors as they lie in memory
    model: torch.nn.Module
    layers: list[Layer]
    dropped: list[str]  # the keys that were left out


def make_family(name: str, dtype: str, folder: Path) -> Family:
    row, changes = FAMILIES[name]
    sizes = {"hidden_size": H}
    arguments = ATTENTION | CASES[row] | sizes | changes
    config = transformers.AutoConfig.for_model(row, **arguments)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = model.eval().requires_grad_(False)
    g = torch.Generator().manual_seed(4)
    for layer in layers_of(model, row):
        fill(layer, g)
    if dtype == "bf16":
        # As in released files: what the class keeps in f32 stays so.
        kept = [*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())]
        f32 = [
            p
            for n, p in [*model.named_parameters(), *model.named_buffers()]
            if any(k in n.split(".") for k in kept)
        ]
        values = [p.clone() for p in f32]
        model.to(torch.bfloat16)
        for p, value in zip(f32, values, strict=True):
            p.data = value
    source, fused = folder / "checkpoint", folder / "fused"
    model.save_pretrained(source)
    model.config.save_pretrained(fused)
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})

    path = source / "config.json"
    keys = json.loads(path.read_text())
    defaults = type(config)().to_dict()
    said = ("model_type", "architectures", "dtype", "transformers_version")
    dropped = [k for k in keys if k not in said and k in defaults and keys[k] == defaults[k]]
    keys = {k: v for k, v in keys.items() if k not in dropped}
    if name == "kimi_k2":
        keys["model_type"] = "kimi_k2"
    path.write_text(json.dumps(keys))
    return Family(source, fused, model, layers_of(model, row), dropped)
