"""The layer, written down from its formula in float64 NumPy.

This is what every other implementation is measured against, so it shares nothing with the compiler:
it imports NumPy and the standard library only, keeps to the order of the formula, and takes no
shortcut for speed. Letters: T tokens, H hidden width, F expert width, E experts, K experts chosen
per token, k slots per token of one call (K unless experts are given).

    ref = moec.reference(spec, weights)
    y = ref(x)                              # [..., H] -> float64 [..., H]
    routing = ref.routing(x)                # ids, weights, logits, how close it was
    y = ref.experts(x, idx, w)              # routing given: sum of w * f_idx(x)

`spec` is one layer as a mapping (see `normalize`), `weights` a mapping from role to array. Arrays
may be NumPy arrays of any float type, `uint16` (read as the bits of bfloat16) or torch tensors;
they are widened to float64 exactly.

    role          shape                    meaning
    router        [E,H]                    logits = x @ router.T
    gate_up       [E,2F,H] or [E,2,F,H]    rows of gate, then rows of up ("mlp": "up", [E,F,H])
    down          [E,H,F]
    router_bias   [E]                      added to the logits
    router_scale  [H]                      factor of a normalised x
    selection_bias [E]                     added for the choice only
    per_expert_scale [E]                   factor of each expert's weight
    gate_up_bias  [E,2F]                   biases of the experts ("mlp": "up_bias"),
    down_bias     [E,H]                    the same of down
    shared_gate_up [2S,H], shared_down [H,S], shared_gate [1,H]: the shared expert, its scalar gate
A dense layer has gate_up [2F,H] and down [H,F] (a leading 1 is accepted).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moec._formula import (
    ACTIVATIONS,
    SCORES,
    normalize,
    round_bf16,
    same,
    sigmoid,
    softmax,
    wide,
)

__all__ = ["Reference", "Routing", "normalize", "reference", "round_bf16"]


class Routing(NamedTuple):
    """What the router decided about T tokens; every array has the leading dimensions of x flattened
    to T."""

    experts: np.ndarray  # int32 [T,K], by falling score, ties by rising id
    weights: np.ndarray  # float64 [T,K], after renormalisation and scale
    logits: np.ndarray  # float64 [T,E]
    scores: np.ndarray  # float64 [T,E]: what the choice was made by
    gap: (
        np.ndarray
    )  # float64 [T]: K-th chosen score minus the best one not chosen; inf where all are chosen
    logit_gap: (
        np.ndarray
    )  # float64 [T]: the same distance measured in logits (nan where order is not the logits')


class Reference:
    """One layer in float64. See the module's text for spec and weights."""

    def __init__(self, spec: Mapping[str, Any], weights: Mapping[str, Any], rounding: str = "none"):
        """rounding: "none", or "bf16": x and every matrix are rounded to bfloat16 first (all
        arithmetic stays float64, but for what a router of precision "model" rounds)."""
        if rounding not in ("none", "bf16"):
            raise ValueError(f"rounding: expected none or bf16, but got {rounding!r}")
        self.spec = normalize(spec)
        self.rounding = rounding
        self.weights = dict(
            weights
        )  # kept as given and widened per use: all of a large layer in float64 may not fit
        s = self.spec
        glu = s["expert"]["form"] == "glu"
        self._up = "gate_up" if glu else "up"
        if not glu:  # both names were ever used
            self.weights = {k.replace("gate_up", "up"): v for k, v in self.weights.items()}
        rows = (2 if glu else 1) * s["F"]
        experts = s["E"] if s["kind"] == "moe" else 1
        self._shapes = {
            self._up: (experts, rows, s["H"]),
            "down": (experts, s["H"], s["F"]),
            self._up + "_bias": (experts, rows),
            "down_bias": (experts, s["H"]),
        }
        if s["kind"] == "moe":
            self._shapes |= {
                "router": (s["E"], s["H"]),
                "router_bias": (s["E"],),
                "selection_bias": (s["E"],),
                "per_expert_scale": (s["E"],),
                "router_scale": (s["H"],),
            }
        needed = [self._up, "down"] + (["router"] if s["kind"] == "moe" else [])
        r = s["router"]
        needed += [
            role
            for role, wanted in {
                "router_bias": r["logit_bias"],
                "selection_bias": r["selection_bias"] != "none",
                "router_scale": r["input"] == "rms_norm",
                "per_expert_scale": r["scale"] == "per_expert",
                self._up + "_bias": s["expert"]["bias"],
                "down_bias": s["expert"]["bias"],
                "shared_" + self._up: s["combine"]["shared"] == "mlp",
                "shared_down": s["combine"]["shared"] == "mlp",
                "shared_gate": s["combine"]["shared_gate"] != "none",
            }.items()
            if wanted
        ]
        for role in needed:
            if role not in self.weights:
                got = ", ".join(self.weights) or "none"
                raise ValueError(f"weights: expected {', '.join(needed)}, but got {got}")
        for role, shape in self._shapes.items():
            if role in self.weights and math.prod(self.weights[role].shape) != math.prod(shape):
                got = list(self.weights[role].shape)
                raise ValueError(f"weights[{role!r}]: expected {list(shape)}, but got {got}")

    # --- reading ----------------------------------------------------------------------------------

    def _read(self, a: Any) -> np.ndarray:
        a = wide(a)
        return round_bf16(a) if self.rounding == "bf16" else a

    def _weight(self, role: str, expert: int | None = None) -> np.ndarray | None:
        """The weight of a role, or its part that belongs to one expert; None where the layer has
        none."""
        if role not in self.weights:
            return None
        a = self.weights[role]
        if role in self._shapes:
            a = a.reshape(self._shapes[role])
        a = a if expert is None else a[expert]
        # Biases and scales are kept in f32 whatever the format of the matrices.
        return wide(a) if role.endswith(("_bias", "_scale")) else self._read(a)

    def _tokens(self, x: Any) -> tuple[np.ndarray, tuple[int, ...]]:
        x = self._read(x)
        if x.ndim < 1 or x.shape[-1] != self.spec["H"]:
            raise ValueError(f"x: expected [..., {self.spec['H']}] (H), but got {list(x.shape)}")
        return x.reshape(-1, self.spec["H"]), x.shape[:-1]

    # --- router -----------------------------------------------------------------------------------

    def routing(self, x: Any) -> Routing:
        """Which experts serve each token, with what weight, and how close the choice was. x is what
        the router reads: router_x in a layer that has it."""
        if self.spec["kind"] != "moe":
            raise ValueError("routing: expected a MoE layer, but got a dense one")
        x, _ = self._tokens(x)
        r, k = self.spec["router"], self.spec["K"]
        models = r["precision"] == "model" and self.rounding == "bf16"
        # What becomes of the logits, of every later result, and of the weights.
        early = round_bf16 if models and r["model_arithmetic"] != "cast_inputs" else same
        step = round_bf16 if models and r["model_arithmetic"] == "model_dtype" else same
        last = round_bf16 if models and r["weight_dtype"] == "model" else same
        with np.errstate(all="ignore"):  # NaN and infinity are data here
            if r["input"] == "rms_norm":
                rms = np.sqrt((x**2).mean(-1, keepdims=True) + r["input_epsilon"])
                x = early(early(x / rms) * self._weight("router_scale"))
                x = early(x * self.spec["H"] ** -0.5)
            z = x @ self._weight("router").T
            if r["logit_bias"]:
                z = z + self._weight("router_bias")
            logits = z = early(z)
            if r["logit_transform"] == "scale":
                z = step(r["logit_constant"] * z)
            elif r["logit_transform"] == "softcap":
                z = step(np.tanh(step(z / r["logit_constant"])))
                z = step(r["logit_constant"] * z)
            scores = z
            if r["order"] == "score_then_select" and r["select"] != "sparse_mixer":
                scores = step(SCORES[r["score"]](z))

            choice = scores
            if r["selection_bias"] == "score":
                choice = scores + self._weight("selection_bias")
            elif r["selection_bias"] == "logit":
                choice = z + self._weight("selection_bias")
            gap = np.full(len(x), np.inf)
            if r["groups"] > 1:
                choice, gap = self._keep_groups(choice, step)

            # A stable sort of the negated scores: falling score, equal scores by rising id.
            order = np.argsort(-choice, axis=-1, kind="stable")
            idx = order[:, :k]
            w = np.take_along_axis(scores, idx, -1)
            if r["select"] == "sparse_mixer":
                w = self._sparse_mixer(z, idx, step)
            elif r["order"] == "select_then_score":
                w = step(SCORES[r["score"]](np.take_along_axis(z, idx, -1)))
            if r["renormalize"] == "sum":
                w = step(w / step(step(w.sum(-1, keepdims=True)) + r["epsilon"]))
            elif r["renormalize"] == "clamp_sum":
                w = step(w / step(np.maximum(step(w.sum(-1, keepdims=True)), r["epsilon"])))
            elif r["renormalize"] == "lp_norm":
                p = r["norm_power"]
                powers = step(step(np.abs(w) ** p).sum(-1, keepdims=True))
                w = step(w / step(powers ** (1.0 / p)))
            w = step(w * r["scale_value"])
            if r["scale"] == "per_expert":
                w = step(w * self._weight("per_expert_scale")[idx])
            w = last(w)

            logit_gap = np.full(len(x), np.inf)
            if k < self.spec["E"]:
                pair = order[:, k - 1 : k + 1]
                lead = -np.diff(np.take_along_axis(choice, pair, -1), axis=-1)[:, 0]
                gap = np.minimum(gap, lead)
                logit_gap = -np.diff(np.take_along_axis(z, pair, -1), axis=-1)[:, 0]
                if r["selection_bias"] != "none" or r["groups"] > 1:
                    logit_gap = np.full(len(x), np.nan)
        return Routing(idx.astype(np.int32), w, logits, choice, gap, logit_gap)

    def _sparse_mixer(self, z: np.ndarray, idx: np.ndarray, step: Any) -> np.ndarray:
        """For each of the two chosen: its softmax over the logits that are close to it, without
        those chosen before it."""
        weights = np.empty(idx.shape)
        left = z.copy()
        for j in range(idx.shape[1]):
            top = np.take_along_axis(z, idx[:, j : j + 1], -1)
            far = step(step(top - z) / np.maximum(np.abs(z), top)) > step(
                2 * self.spec["router"]["sparse_mixer_jitter"]
            )
            close = step(softmax(np.where(far, -math.inf, left)))
            weights[:, j] = np.take_along_axis(close, idx[:, j : j + 1], -1)[:, 0]
            np.put_along_axis(left, idx[:, j : j + 1], -math.inf, -1)
        return weights

    def _keep_groups(self, choice: np.ndarray, step: Any) -> tuple[np.ndarray, np.ndarray]:
        """Experts outside the best groups get the fill score; and by how much the last group that
        is kept leads the first that is not."""
        r = self.spec["router"]
        per_group = choice.reshape(len(choice), r["groups"], -1)
        if r["group_reduce"] == "max":
            best = per_group.max(-1)
        else:
            best = step(np.sort(per_group, -1)[..., -2:].sum(-1))
        ranked = np.argsort(-best, axis=-1, kind="stable")
        kept = ranked[:, : r["groups_kept"]]
        gap = np.full(len(choice), np.inf)
        if r["groups_kept"] < r["groups"]:
            pair = ranked[:, r["groups_kept"] - 1 : r["groups_kept"] + 1]
            gap = -np.diff(np.take_along_axis(best, pair, -1), axis=-1)[:, 0]
        mask = np.zeros(best.shape, bool)
        np.put_along_axis(mask, kept, True, -1)
        fill = 0.0 if r["group_fill"] == "zero" else -math.inf
        return np.where(mask[..., None], per_group, fill).reshape(choice.shape), gap

    def route(self, x: Any, logits: bool = False) -> tuple[np.ndarray, ...]:
        """(ids int32 [T,K], weights float64 [T,K][, logits float64 [T,E]]), best first."""
        r = self.routing(x)
        return (r.experts, r.weights, r.logits) if logits else (r.experts, r.weights)

    # --- experts ----------------------------------------------------------------------------------

    def _expert(self, e: int, rows: np.ndarray) -> np.ndarray:
        """What expert e makes of its rows [n,H]."""
        return self._mlp(
            rows,
            self._weight(self._up, e),
            self._weight("down", e),
            self._weight(self._up + "_bias", e) if self.spec["expert"]["bias"] else None,
            self._weight("down_bias", e) if self.spec["expert"]["bias"] else None,
            self.spec["expert"]["activation"],
        )

    def _mlp(self, rows, gate_up, down, gate_up_bias, down_bias, act_name):
        s = self.spec["expert"]
        act = ACTIVATIONS[act_name]
        h = rows @ gate_up.T
        h = h if gate_up_bias is None else h + gate_up_bias
        if s["form"] == "mlp":
            h = act(h)
        else:
            gate, up = np.split(h, 2, axis=-1)
            if s["clamp"] in ("pre", "oai"):
                gate, up = (
                    np.minimum(gate, s["clamp_limit"]),
                    np.clip(up, -s["clamp_limit"], s["clamp_limit"]),
                )
            if s["clamp"] == "oai":
                h = (up + 1.0) * gate * sigmoid(s["clamp_alpha"] * gate)
            elif s["clamp"] == "tanh":
                g, u = s["clamp_limit"], s["clamp_up_limit"]
                h = g * np.tanh(gate / g) * sigmoid(gate) * u * np.tanh(up / u)
            else:
                gate = act(gate)
                if s["clamp"] == "post":
                    gate = np.minimum(gate, s["clamp_limit"])
                    up = np.clip(up, -s["clamp_limit"], s["clamp_limit"])
                h = gate * up
        y = h @ down.T
        return y if down_bias is None else y + down_bias

    def experts(self, x: Any, idx: Any, w: Any) -> np.ndarray:
        """Sum over the slots of w * f_idx(x) for [T,k] ids and weights; an id of -1 is no expert.
        No shared expert."""
        if self.spec["kind"] != "moe":
            raise ValueError("experts: expected a MoE layer, but got a dense one")
        x, lead = self._tokens(x)
        idx = np.asarray(idx.detach().cpu() if hasattr(idx, "detach") else idx)
        idx = idx.reshape(len(x), -1).astype(np.int64)
        return self._routed(x, idx, wide(w).reshape(idx.shape)).reshape(*lead, self.spec["H"])

    def _routed(self, x: np.ndarray, idx: np.ndarray, w: np.ndarray) -> np.ndarray:
        y = np.zeros((len(x), self.spec["H"]))
        with np.errstate(all="ignore"):
            for e in range(self.spec["E"]):  # ascending, as moec.h promises
                token, slot = np.nonzero(idx == e)
                if not len(token):
                    continue
                weight = w[token, slot][:, None]
                if self.spec["combine"]["apply"] == "input":
                    rows = self._expert(e, x[token] * weight)
                else:
                    rows = self._expert(e, x[token]) * weight
                np.add.at(y, token, rows)  # a token may name one expert twice
        return y

    def given(self, x: Any, idx: Any, w: Any) -> np.ndarray:
        """The whole layer with its routing given: float64, the shape of x."""
        x, lead = self._tokens(x)
        idx = np.asarray(idx).reshape(len(x), -1).astype(np.int64)
        with np.errstate(all="ignore"):
            y = self._joined(x, self._routed(x, idx, wide(w).reshape(idx.shape)))
        return y.reshape(*lead, self.spec["H"])

    def _joined(self, x: np.ndarray, routed: np.ndarray) -> np.ndarray:
        """The routed sum with its factor and the shared expert."""
        c = self.spec["combine"]
        y = routed * c["sum_scale"]
        if c["shared"] != "mlp":
            return y
        act = self.spec["expert"]["activation"]
        gate_up, down = self._weight("shared_" + self._up), self._weight("shared_down")
        shared = self._mlp(x, gate_up, down, None, None, act)
        if c["shared_gate"] == "sigmoid":
            shared = shared * sigmoid(x @ self._weight("shared_gate").reshape(1, -1).T)
        return (y + shared) * (0.5 if c["join"] == "average" else 1.0)

    def __call__(self, x: Any, router_x: Any = None) -> np.ndarray:
        """The whole layer: float64, the shape of x. router_x: what the router of such a layer reads
        instead of x."""
        if (router_x is not None) != self.spec["router"]["router_x"]:
            wanted = "an array" if self.spec["router"]["router_x"] else "None"
            raise ValueError(f"router_x: expected {wanted}, but got another value")
        x, lead = self._tokens(x)
        with np.errstate(all="ignore"):
            if self.spec["kind"] == "dense":
                return self._expert(0, x).reshape(*lead, self.spec["H"])
            r = self.routing(x if router_x is None else router_x)
            y = self._joined(x, self._routed(x, r.experts.astype(np.int64), r.weights))
        return y.reshape(*lead, self.spec["H"])


def reference(
    spec: Mapping[str, Any], weights: Mapping[str, Any], rounding: str = "none"
) -> Reference:
    """`moec.reference(spec, weights)(x)`: the layer in float64 NumPy. See the module's text."""
    return Reference(spec, weights, rounding)
