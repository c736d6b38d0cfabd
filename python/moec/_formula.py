"""The parts of the formula in reference.py: functions of one number, and the attributes of a layer
with their defaults. NumPy and the standard library only, as there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["ACTIVATIONS", "SCORES", "normalize", "round_bf16", "same", "sigmoid", "softmax", "wide"]


def round_bf16(a: Any) -> np.ndarray:
    """Rounds to the nearest bfloat16, ties to even, and returns float64. NaN stays NaN, overflow
    becomes infinity."""
    # Straight from float64, in one rounding: going through float32 first would round twice.
    a = np.asarray(a, np.float64)
    mantissa, exponent = np.frexp(a)  # |mantissa| in [0.5, 1)
    exponent = np.maximum(exponent, -125)  # below 2**-126 the spacing no longer shrinks
    ulp = np.ldexp(1.0, exponent - 8)
    with np.errstate(invalid="ignore"):
        r = np.where(np.isfinite(a), np.rint(a / ulp) * ulp, a)
    largest = np.ldexp(255 / 256, 128)
    return np.where(np.abs(r) > largest, np.copysign(np.inf, r), r)


def same(a: Any) -> Any:
    return a


def wide(a: Any) -> np.ndarray:
    """Any accepted array as float64, exactly."""
    if hasattr(a, "detach"):  # a torch tensor, without importing torch
        a = a.detach().cpu().double().numpy()
    a = np.asarray(a)
    if a.dtype == np.uint16:  # the bits of bfloat16
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


_erf = np.frompyfunc(math.erf, 1, 1)


def sigmoid(z: np.ndarray) -> np.ndarray:
    # The form whose exponential cannot overflow, chosen by sign.
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _gelu_tanh(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


ACTIVATIONS = {
    "silu": lambda z: z * sigmoid(z),
    "gelu": lambda z: 0.5 * z * (1.0 + _erf(z / math.sqrt(2.0)).astype(np.float64)),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda z: np.where(np.isnan(z), z, np.maximum(z, 0.0)),
    "relu2": lambda z: np.where(np.isnan(z), z, np.maximum(z, 0.0)) ** 2,
}

SCORES = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sqrt_softplus": lambda z: np.sqrt(np.logaddexp(0.0, z)),
}

# Every attribute of a layer's spec (the keys of a *.moe.json), its default, and the values that the
# formula below has. An attribute without a list of values is a number or a flag.
_ATTRIBUTES: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "router": {
        "input": ("plain", ("plain", "rms_norm")),  # x | x / rms(x) * router_scale * H^-1/2
        "router_x": (False, ()),  # the router reads another tensor than the experts
        "input_epsilon": (1e-6, ()),
        "logit_bias": (False, ()),
        # model, with rounding = "bf16": rounded where the model's own code rounds
        "precision": ("f32", ("f32", "model")),
        # what it rounds: nothing | normalised x and logits | the result of every step but the sum
        # with the selection bias, which models keep in f32
        "model_arithmetic": ("upcast_logits", ("cast_inputs", "upcast_logits", "model_dtype")),
        "weight_dtype": ("model", ("f32", "model")),  # model: also the weights at the end
        "logit_transform": ("none", ("none", "scale", "softcap")),  # c * z | c * tanh(z / c)
        "logit_constant": (1.0, ()),  # c
        "score": ("softmax", tuple(SCORES)),
        # score all E, then choose K | choose K logits, then score those
        "order": ("score_then_select", ("score_then_select", "select_then_score")),
        "selection_bias": ("none", ("none", "score", "logit")),  # what it is added to
        "groups": (1, ()),
        "groups_kept": (1, ()),
        "group_reduce": ("max", ("max", "sum_top2")),
        "group_fill": ("neg_inf", ("zero", "neg_inf")),
        "select": ("top_k", ("top_k", "sparse_mixer")),
        "sparse_mixer_jitter": (0.0, ()),
        # w / (sum + epsilon) | w / max(sum, epsilon) | w / (sum of |w|^p)^(1/p)
        "renormalize": ("none", ("none", "sum", "clamp_sum", "lp_norm")),
        "epsilon": (0.0, ()),
        "norm_power": (1.0, ()),  # p
        "scale": ("constant", ("constant", "per_expert")),
        "scale_value": (1.0, ()),
        "extra_rows": ("none", ("none",)),
        "capacity": ("none", ("none",)),
    },
    "expert": {
        "form": ("glu", ("glu", "mlp")),  # down(act(gate) * up) | down(act(up))
        "activation": ("silu", tuple(ACTIVATIONS)),
        "clamp": ("none", ("none", "pre", "post", "oai", "tanh")),
        "clamp_limit": (math.inf, ()),
        "clamp_up_limit": (math.inf, ()),
        "clamp_alpha": (1.702, ()),
        "bias": (False, ()),
        "latent": (0, (0,)),
        "latent_norm": (False, (False,)),
        "expert_norm": (False, (False,)),
    },
    "combine": {
        "apply": ("output", ("output", "input")),  # w * f(x) | f(w * x)
        "sum_scale": (1.0, ()),
        "shared": ("none", ("none", "mlp")),
        "shared_gate": ("none", ("none", "sigmoid")),
        "join": ("add", ("add", "average")),
        "output": ("none", ("none",)),
        "pools": (1, (1,)),
    },
}

# Attributes that say how experts round or how wide something is; a formula has no use for them.
_IGNORED = {
    "router": {
        "extra_row_count",
        "capacity_tokens",
    },
    "expert": {"act_dtype"},
    "combine": {"accumulate", "shared_count", "shared_width"},
}


def normalize(spec: Mapping[str, Any]) -> dict[str, Any]:
    """One layer's spec with every default filled in.

    Keys: kind ("moe" | "dense"), H, F, E, K, and the groups router, expert and combine with the
    attributes above; what else a layer of a *.moe.json has is left alone. An unknown attribute, or
    a value the formula does not have, is refused by name.
    """
    out: dict[str, Any] = {"kind": spec.get("kind", "moe")}
    if out["kind"] not in ("moe", "dense"):
        raise ValueError(f"kind: expected moe or dense, but got {out['kind']!r}")
    for key in ("H", "F") + (("E", "K") if out["kind"] == "moe" else ()):
        out[key] = int(spec[key])
        if out[key] < 1:
            raise ValueError(f"{key}: expected at least 1, but got {out[key]}")
    if out["kind"] == "moe" and out["K"] > out["E"]:
        raise ValueError(f"K: expected at most E = {out['E']}, but got {out['K']}")
    for group, attributes in _ATTRIBUTES.items():
        given = dict(spec.get(group) or {})
        for key in sorted(set(given) - set(attributes) - _IGNORED[group]):
            known = ", ".join(attributes)
            raise ValueError(f"{group}.{key}: expected one of {known}, but got this name")
        out[group] = {key: given.get(key, default) for key, (default, _) in attributes.items()}
        for key, (_, values) in attributes.items():
            if values and out[group][key] not in values:
                known = ", ".join(map(str, values))
                got = out[group][key]
                raise ValueError(f"{group}.{key}: expected one of {known}, but got {got!r}")
    return out
