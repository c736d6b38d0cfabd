"""Where expected values come from: transformers' own blocks on tiny checkpoints, and error bounds
with their reasons.

Nothing here calls the compiler. A checkpoint is made by transformers' `from_config` and
`save_pretrained`, so what is on disk is what a user would have; the block the layer is compared
with is the very module that was saved.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from moec.reference import ACTIVATIONS, Reference, reference
from safetensors.torch import load_file, save_file

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (1, 2, 3, 17, 64, 257)

_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}

# One entry: a row of the model table under one configuration. The sizes are small and, where the
# attention allows it, no multiple of a vector; activations and renormalisation vary over the rows.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        dict(
            hidden_size=64,
            intermediate_size=96,
            num_local_experts=8,
            num_experts_per_tok=2,
            num_hidden_layers=2,
        ),
    ),
    "mixtral-gelu": (
        "mixtral",
        dict(
            hidden_size=36,
            intermediate_size=50,
            num_local_experts=5,
            num_experts_per_tok=3,
            num_hidden_layers=1,
            hidden_act="gelu",
        ),
    ),
    "olmoe": (
        "olmoe",
        dict(
            hidden_size=64,
            intermediate_size=48,
            num_experts=64,
            num_experts_per_tok=8,
            num_hidden_layers=2,
        ),
    ),
    "olmoe-norm": (
        "olmoe",
        dict(
            hidden_size=40,
            intermediate_size=33,
            num_experts=12,
            num_experts_per_tok=3,
            num_hidden_layers=1,
            norm_topk_prob=True,
            hidden_act="gelu_pytorch_tanh",
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            hidden_size=72,
            intermediate_size=112,
            moe_intermediate_size=40,
            num_experts=16,
            num_experts_per_tok=4,
            num_hidden_layers=3,
            mlp_only_layers=[1],
            norm_topk_prob=True,
            head_dim=16,
        ),
    ),
    "qwen3_moe-step2": (
        "qwen3_moe",
        dict(
            hidden_size=34,
            intermediate_size=57,
            moe_intermediate_size=21,
            num_experts=9,
            num_experts_per_tok=2,
            num_hidden_layers=4,
            decoder_sparse_step=2,
            hidden_act="relu",
            head_dim=16,
        ),
    ),
    "granitemoe": (
        "granitemoe",
        dict(
            hidden_size=40,
            intermediate_size=33,
            num_local_experts=9,
            num_experts_per_tok=3,
            num_hidden_layers=1,
        ),
    ),
    "jamba": (
        "jamba",
        dict(
            hidden_size=36,
            intermediate_size=50,
            num_experts=6,
            num_experts_per_tok=2,
            num_hidden_layers=3,
            expert_layer_period=3,
            expert_layer_offset=1,
            attn_layer_period=1,
            attn_layer_offset=0,
            hidden_act="gelu_pytorch_tanh",
        ),
    ),
    "llama": (
        "llama",
        dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, head_dim=16),
    ),
    "llama-gelu": (
        "llama",
        dict(
            hidden_size=34,
            intermediate_size=61,
            num_hidden_layers=1,
            head_dim=16,
            hidden_act="gelu_pytorch_tanh",
        ),
    ),
}

_ACTS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass
class Block:
    """One feed-forward block of a model: its transformers module, and the same thing as a
    reference."""

    name: str  # "model.layers.3.mlp"
    index: int
    kind: str  # "moe" | "dense"
    module: torch.nn.Module
    spec: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @property
    def hidden(self) -> int:
        return self.spec["H"]

    @property
    def router(self) -> torch.nn.Module | None:
        """transformers' router module, where the block has one."""
        return getattr(self.module, "gate", None) or getattr(self.module, "router", None)

    def reference(self, rounding: str = "none") -> Reference:
        return reference(self.spec, self.weights, rounding)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """transformers' own block on [T,H], in the dtype of the model."""
        return self.module(x[None])[0]

    @torch.no_grad()
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' own ids [T,K] and weights [T,K]; for a router it does not have, the exact
        ones."""
        if self.router is None:
            exact = self.reference().routing(x)
            return torch.from_numpy(exact.experts).long(), torch.from_numpy(exact.weights).float()
        _, weights, ids = self.router(x)
        return ids, weights

    @torch.no_grad()
    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """transformers' own experts with routing given."""
        return self.module.experts(x, ids, weights)


@dataclass
class Checkpoint:
    """A folder written by save_pretrained and the model it was written from."""

    path: Path
    row: str
    dtype: str
    model: torch.nn.Module
    blocks: list[Block] = field(default_factory=list)


def make_checkpoint(row: str, dtype: str, folder: Path, seed: int = 0, **overrides) -> Checkpoint:
    """A tiny seeded model of one row of ROWS, saved by transformers. dtype: "f32" | "bf16"."""
    model_type, arguments = ROWS[row]
    arguments = {**_ATTENTION, **arguments, **overrides}
    config = transformers.AutoConfig.for_model(model_type, **arguments)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = model.eval().requires_grad_(False)
    scale_weights(model, seed)
    model.to(TORCH[dtype])
    model.save_pretrained(folder)
    return Checkpoint(Path(folder), row, dtype, model, blocks_of(model))


def scale_weights(model: torch.nn.Module, seed: int) -> None:
    """Fresh weights under which routing is uneven and outputs are O(1).

    The default initialisation has a deviation of 0.02: its outputs are ~1e-4 and its experts all
    equally likely, so an error in a rarely taken path would drown. Router rows get lengths from 0.4
    to 2.5 and lean differently on the loud channels of `tokens`, so that some experts are
    favourites and some serve hardly anybody.
    """
    g = torch.Generator().manual_seed(seed + 1)

    def fill(p, deviation):
        p.copy_(torch.randn(p.shape, generator=g) * deviation)

    for block in blocks_of(model):
        h, f = block.spec["H"], block.spec["F"]
        for role, p in block.weights.items():
            if role == "router":
                lengths = torch.exp(torch.linspace(-0.9, 0.9, p.shape[0]))
                fill(p, lengths[torch.randperm(p.shape[0], generator=g)][:, None] / math.sqrt(h))
                p[:, loud(h)] += lengths[torch.randperm(p.shape[0], generator=g)][:, None] / 2
            elif role != "down":
                fill(p, 1.5 / math.sqrt(h))
            else:
                fill(p, 2.0 / math.sqrt(f))
        if block.kind == "dense":  # gate_up above is a copy there: write the module's own
            fill(block.module.gate_proj.weight, 1.5 / math.sqrt(h))
            fill(block.module.up_proj.weight, 1.5 / math.sqrt(h))


def blocks_of(model: torch.nn.Module) -> list[Block]:
    """Every feed-forward block of a mixtral, olmoe, qwen3_moe, granitemoe, jamba or llama model,
    with its formula as the paper has it.

    The formula is stated here by hand for each row; it is not read from the compiler's model table.
    """
    config, blocks = model.config, []
    act = _ACTS[config.hidden_act]
    for index, layer in enumerate(model.model.layers):
        child = next(c for c in ("mlp", "feed_forward", "block_sparse_moe") if hasattr(layer, c))
        mlp, name = getattr(layer, child), f"model.layers.{index}.{child}"
        if not hasattr(mlp, "experts"):
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            spec = {
                "kind": "dense",
                "H": config.hidden_size,
                "F": gate_up.shape[0] // 2,
                "expert": {"activation": act},
            }
            weights = {"gate_up": gate_up, "down": mlp.down_proj.weight}
            blocks.append(Block(name, index, "dense", mlp, spec, weights))
            continue
        renorm = config.model_type == "mixtral" or getattr(config, "norm_topk_prob", False)
        granite = config.model_type == "granitemoe"
        order = "select_then_score" if granite else "score_then_select"
        spec = {
            "kind": "moe",
            "H": config.hidden_size,
            "F": mlp.experts.down_proj.shape[2],
            "E": mlp.experts.down_proj.shape[0],
            "K": config.num_experts_per_tok,
            "router": {"renormalize": "sum" if renorm else "none", "order": order},
            "expert": {"activation": act},
        }
        weights = {
            "router": (mlp.gate if hasattr(mlp, "gate") else mlp.router).weight,
            "gate_up": mlp.experts.gate_up_proj,
            "down": mlp.experts.down_proj,
        }
        blocks.append(Block(name, index, "moe", mlp, spec, weights))
    return blocks


def loud(hidden: int) -> slice:
    """The channels that `tokens` makes loud: three or four of them."""
    return slice(None, None, max(1, hidden // 3))


def block_of(spec: dict[str, Any], weights: dict[str, torch.Tensor]) -> Block:
    """transformers' experts, or its dense block, with sizes and weights of our choosing."""
    act = {ours: theirs for theirs, ours in _ACTS.items()}[spec["expert"]["activation"]]
    dtype = weights["down"].dtype
    if spec["kind"] == "dense":
        from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

        sizes = {"hidden_size": spec["H"], "intermediate_size": spec["F"]}
        module = LlamaMLP(LlamaConfig(**sizes, hidden_act=act, num_attention_heads=1, head_dim=16))
        gate, up = weights["gate_up"].chunk(2)
        state = {
            "gate_proj.weight": gate,
            "up_proj.weight": up,
            "down_proj.weight": weights["down"],
        }
        module.load_state_dict(state)
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import (
            Qwen3MoeConfig,
            Qwen3MoeExperts,
        )

        config = Qwen3MoeConfig(
            hidden_size=spec["H"],
            moe_intermediate_size=spec["F"],
            num_experts=spec["E"],
            hidden_act=act,
        )
        config._experts_implementation = "eager"
        module = torch.nn.Module()
        module.experts = Qwen3MoeExperts(config)
        state = {"gate_up_proj": weights["gate_up"], "down_proj": weights["down"]}
        module.experts.load_state_dict(state)
    module = module.to(dtype).eval().requires_grad_(False)
    return Block(spec.get("name", ""), spec.get("index", 0), spec["kind"], module, spec, weights)


def tokens(count: int, hidden: int, dtype: str = "f32", seed: int = 0) -> torch.Tensor:
    """Seeded activations [count, hidden], O(1), with a few loud channels off centre as real ones
    have."""
    g = torch.Generator().manual_seed(1000 * seed + count)
    x = torch.randn(count, hidden, generator=g)
    x[:, loud(hidden)] = 2.0 * x[:, loud(hidden)] + 1.0
    return x.to(TORCH[dtype])


@torch.no_grad()
def capture(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    """What every feed-forward block of a whole model saw and gave back while it read the token ids:
    name -> (x, y)."""
    seen, hooks = {}, []
    for block in blocks_of(model):

        def hook(module, inputs, output, name=block.name):
            seen[name] = (inputs[0].flatten(0, -2).clone(), output.flatten(0, -2).clone())

        hooks.append(block.module.register_forward_hook(hook))
    try:
        model(ids)
    finally:
        for h in hooks:
            h.remove()
    return seen


# --- the same weights, stored differently ---------------------------------------------------------


def rewrite_fused(source: Path, target: Path) -> Path:
    """The checkpoint with its experts stacked on disk as transformers has them in memory:
    `experts.gate_up_proj [E,2F,H]`, gate rows first, and `experts.down_proj [E,H,F]`."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    out, experts = {}, {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            out[name.replace("block_sparse_moe", "mlp")] = tensor
            continue
        prefix, rest = name.split(".experts.")
        number, projection, _ = rest.split(".")
        projection = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(
            projection, projection
        )
        prefix = prefix.replace("block_sparse_moe", "mlp")
        experts.setdefault(prefix, {})[projection, int(number)] = tensor
    for prefix, parts in experts.items():
        count = 1 + max(number for _, number in parts)
        gate_up = [torch.cat([parts["gate_proj", e], parts["up_proj", e]]) for e in range(count)]
        out[prefix + ".experts.gate_up_proj"] = torch.stack(gate_up)
        down = [parts["down_proj", e] for e in range(count)]
        out[prefix + ".experts.down_proj"] = torch.stack(down)
    save_file(out, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rewrite_sharded(source: Path, target: Path, shards: int = 3) -> Path:
    """The checkpoint dealt out over several files with an index; the experts of one layer lie in
    different files."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        mine = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(mine, target / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


# --- how far apart is too far ---------------------------------------------------------------------


def wide(a: Any) -> np.ndarray:
    """float64 NumPy of an array or tensor."""
    return a.detach().double().numpy() if hasattr(a, "detach") else np.asarray(a, np.float64)


def relative(a: Any, exact: Any) -> float:
    """Norm of the difference over the norm of the exact value, over the whole tensor."""
    a, exact = wide(a), wide(exact)
    if not exact.size:
        return 0.0
    return float(np.linalg.norm(a - exact) / max(np.linalg.norm(exact), 1e-300))


def condition(block: Block, x: Any, ids: Any = None, weights: Any = None) -> float:
    """How much larger than the result its rounding errors are made: the norm of what one unit of
    roundoff in every product sum adds up to, over the norm of the result.

    Usually 1 to 3. Where few numbers make the result (F = 1, one token) a sum near zero can decide
    all of it, and then any arithmetic of finite precision is as far off as this says.
    """
    ref = block.reference()
    x = wide(x)
    if block.kind == "dense":
        ids, weights = np.zeros((len(x), 1), int), np.ones((len(x), 1))
    ids, weights = wide(ids).astype(int), wide(weights)
    act = ACTIVATIONS[block.spec["expert"]["activation"]]
    noise, signal = np.zeros_like(x), np.zeros_like(x)
    for e in np.unique(ids[ids >= 0]):
        token, slot = np.nonzero(ids == e)
        rows, w = x[token], weights[token, slot][:, None]
        gate_w, up_w = np.split(ref._weight("gate_up", e), 2)
        down = ref._weight("down", e)
        gate, up = rows @ gate_w.T, rows @ up_w.T
        slope = (act(gate + 1e-6) - act(gate - 1e-6)) / 2e-6
        h_noise = np.hypot(
            slope * up * np.sqrt(rows**2 @ (gate_w**2).T),
            act(gate) * np.sqrt(rows**2 @ (up_w**2).T),
        )
        # gelu is 0.5 * z * (1 + erf): left of zero 1 and erf cancel, and what is left of the
        # roundings is as large as z, not as gelu(z).
        h_noise = np.hypot(h_noise, gate * up)
        np.add.at(noise, token, w**2 * (h_noise**2 @ (down**2).T))
        np.add.at(signal, token, w * ((act(gate) * up) @ down.T))
    return float(np.sqrt(noise.sum()) / max(np.linalg.norm(signal), 1e-300))


def typical(block: Block, dtype: str) -> float:
    """transformers' own error on 64 tokens: what its error on one token scatters about."""
    x = tokens(64, block.hidden, dtype, seed=9)
    if block.kind == "dense":
        return relative(block(x), block.reference()(x))
    ids, weights = block.route(x)
    exact = block.reference().experts(x, ids, weights)
    return relative(block.experts(x, ids, weights), exact)


def check_close(
    ours: Any,
    exact: Any,
    own: Any,
    dtype: str,
    hidden: int,
    width: int,
    what: str = "",
    block: Block | None = None,
    call: tuple = (),
) -> None:
    """Asserts the project's error bound. exact: float64; own: what transformers computed in the
    same dtype, or None.

    f32. Error is norm over norm against float64. Adding n terms in any fixed order makes an error
    that grows like sqrt(n) roundings of 6e-8 at worst in practice, so 4e-8 * sqrt(max(H, F)); below
    2500 terms the activation and the weighting dominate, hence the floor of 2e-6. Independently of
    sizes we may not be worse than 4 times transformers' own error (5e-7 is the floor where theirs
    happens to be tiny): a kernel that is merely sloppy passes the first, not the second.

    bf16. The exact value is float64 over the bf16 weights and inputs with the same routing, so all
    that differs is where values are rounded to 8 bits. transformers rounds after every product; we
    round less often, hence at most 1.5 times its error. Rounding the exact result once is the least
    anybody can have and is the floor: with one token of few numbers their error can fall under it
    by luck.

    block, call: the layer and what it was called with. Asked only when a bound is exceeded, they
    widen it where it does not apply: both bounds are for ordinary problems and grow with
    `condition` beyond 2; and their error on a few tokens of few numbers (F = 1) may be tiny by
    luck, so it counts for no less than what is `typical` of that layer.
    """
    y = wide(ours)
    assert y.shape == wide(exact).shape, f"{what}: shape {y.shape} for {wide(exact).shape}"
    assert np.isfinite(y).all(), f"{what}: {np.count_nonzero(~np.isfinite(y))} elements not finite"
    error = relative(y, exact)
    theirs = relative(own, exact) if own is not None else None
    if dtype == "f32":
        bound = max(2e-6, 4e-8 * math.sqrt(max(hidden, width)))
        if theirs is not None:
            bound = min(bound, max(4 * theirs, 5e-7))
    else:
        once = relative(torch.from_numpy(wide(exact)).bfloat16(), exact)
        # Without a peer: the chain of three roundings (row, weighting, sum) of 2**-9 each, doubled.
        bound = 1.5 * max(theirs, once) if theirs is not None else 6 * 2**-9
    if error > bound and block is not None:
        if theirs is not None:
            usual = typical(block, dtype)
            if dtype == "f32":
                bound = min(max(2e-6, 4e-8 * math.sqrt(max(hidden, width))), max(bound, 4 * usual))
            else:
                bound = max(bound, 1.5 * usual)
        bound = bound * max(1.0, condition(block, *call) / 2)
    assert error <= bound, f"{what}: relative error {error:.3g}, allowed {bound:.3g}, own {theirs}"


def check_routing(ids: Any, exact: Any, router: Any, x: Any, unit: float, what: str = "") -> Any:
    """Asserts that the same experts were chosen wherever the choice was not within rounding;
    returns those tokens.

    exact: the reference's Routing. A logit is a sum of H products; its error is below unit *
    sqrt(H) * |x| * |w| for any order of adding (unit: 2**-24 for f32 arithmetic; 2**-9 when logits
    are rounded to bf16). Where the K-th logit leads the next by less than twice that, either choice
    is right and only the set of the others is compared.
    """
    x, router = wide(x), wide(router)
    size = np.linalg.norm(x, axis=-1) * np.linalg.norm(router, axis=-1).max()
    clear = exact.logit_gap > 2 * unit * math.sqrt(x.shape[-1]) * size
    ours = np.sort(wide(ids)[clear], -1)
    theirs = np.sort(exact.experts[clear], -1)
    wrong = np.nonzero((ours != theirs).any(-1))[0]
    assert not len(wrong), (
        f"{what}: token {np.nonzero(clear)[0][wrong[0]]} chose {ours[wrong[0]]}, "
        f"expected {theirs[wrong[0]]}"
    )
    return clear


def poisoned(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """An output that nobody has written yet: all NaN."""
    return torch.full(tuple(shape), math.nan, dtype=dtype)


def check_layer(layer: Any, block: Block, x: torch.Tensor, dtype: str, what: str) -> None:
    """One layer of a library on x [T,H] in the model's dtype: routing, experts with routing given,
    and the whole, against float64 and transformers."""
    ref, h, f = block.reference(), block.spec["H"], block.spec["F"]
    y = layer(x, out=poisoned(x.shape, x.dtype))
    if block.kind == "dense":
        check_close(y, ref(x), block(x), dtype, h, f, what, block, (x,))
        return

    exact = ref.routing(x)
    ids, weights, logits = layer.route(x, logits=True)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    router = block.weights["router"]
    # The router computes in f32 from exact inputs, whatever the model's dtype.
    clear = check_routing(ids, exact, router, x, 2**-24, what)
    size = np.linalg.norm(wide(x), axis=-1) * np.linalg.norm(wide(router), axis=-1).max()
    slack = 2**-24 * math.sqrt(h) * size[:, None] + 1e-6
    # With f32 weights the sum is one of f64, rounded once.
    unit = 2**-24 * np.abs(exact.logits) + 1e-9 if router.dtype == torch.float32 else slack
    assert (np.abs(wide(logits) - exact.logits) <= unit).all(), f"{what}: logits"
    assert (np.diff(wide(weights)) <= 0).all(), f"{what}: weights do not fall"
    # A weight is at most as far off, relatively, as the logits of a row are from each other.
    where, there = np.argsort(wide(ids), -1), np.argsort(exact.experts, -1)
    ours = np.take_along_axis(wide(weights), where, -1)[clear]
    theirs = np.take_along_axis(exact.weights, there, -1)[clear]
    assert (np.abs(ours - theirs) <= 4 * slack[clear] * theirs).all(), f"{what}: weights"

    # The experts alone, with transformers' own choice.
    ids, weights = block.route(x)
    given = layer.experts(x, ids, weights, out=poisoned(x.shape, x.dtype))
    expected, own = ref.experts(x, ids, weights), block.experts(x, ids, weights)
    call = (x, ids, weights)
    check_close(given, expected, own, dtype, h, f, what + " experts given", block, call)

    # The whole layer, where the choice is not within rounding.
    keep, clear = clear, torch.from_numpy(clear)
    if dtype == "f32" and block.router is not None:
        own = block(x)
    else:  # transformers rounds its logits to bf16 and chooses others: it gets the exact choice
        ids, weights = torch.from_numpy(exact.experts), torch.from_numpy(exact.weights)
        own = block.experts(x, ids.long(), weights.float())
    call = (x[clear], exact.experts[keep], exact.weights[keep])
    check_close(y[clear], ref(x)[keep], own[clear], dtype, h, f, what, block, call)


def fused(w: np.ndarray, row: np.ndarray, y: np.ndarray) -> np.ndarray:
    """f32 fma(w, row, y): the product is exact in 64 bits of mantissa, the sum is rounded there and
    then to f32, which differs from one rounding about once in 2**40 sums."""
    wide = np.longdouble
    return (w.astype(wide) * row.astype(wide) + y.astype(wide)).astype(np.float32)


def check_combine(layer: Any, block: Block, x: torch.Tensor, dtype: str, what: str) -> None:
    """Asserts how rows become sums: an expert's row is rounded to the compute dtype before it is
    weighted, and y is a chain of fused multiply-adds in ascending order of experts, bit for bit.
    """
    count, experts = len(x), block.spec["E"]

    def call(ids, weights):
        y = layer.experts(x, ids, weights, out=poisoned(x.shape, torch.float32))
        return y.numpy()

    ones = torch.ones(count, 1)
    rows = np.stack([call(torch.full((count, 1), e), ones) for e in range(experts)])
    if dtype == "bf16":
        assert not (rows.view(np.uint32) & 0xFFFF).any(), f"{what}: a row is not rounded to bf16"
        if layer.info.level != "avx512-bf16":  # which rounds h, too
            exact = [
                block.reference().experts(x, torch.full((count, 1), e), ones)
                for e in range(experts)
            ]
            half = np.ldexp(1.0, np.frexp(exact)[1] - 9)  # half a unit in the last place of bf16
            slack = half + 1e-5 * np.abs(exact).max()
            assert (np.abs(rows - exact) <= slack).all(), f"{what}: rows not rounded to nearest"
    g = torch.Generator().manual_seed(count)
    ids = torch.stack([torch.randperm(experts, generator=g)[:8] for _ in range(count)])
    weights = torch.rand(ids.shape, generator=g) - 0.25
    y = np.zeros(x.shape, np.float32)
    for e in range(experts):
        token, slot = np.nonzero(ids.numpy() == e)
        y[token] = fused(weights.numpy()[token, slot][:, None], rows[e, token], y[token])
    assert np.array_equal(call(ids, weights), y), f"{what}: not a chain in order of experts"
