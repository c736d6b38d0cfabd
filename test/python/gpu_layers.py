"""Layers for the GPU tests: IR as the importer writes it, weights, and a float64 reference."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Layer:
    H: int
    F: int
    E: int
    K: int
    order: str = "score_then_select"
    score: str = "softmax"
    renormalize: str = "none"
    scale: float = 1.0
    activation: str = "silu"
    router_type: str = "bf16"
    x: str = "bf16"  # types of x and y
    y: str = "bf16"
    router_bias: bool = False
    selection_bias: bool = False
    groups: tuple = ()  # count, keep, reduce, fill
    bias: bool = False  # of the experts
    clamp: tuple = ()  # limit, alpha of the kind oai
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.router = to_bf16(rng.standard_normal((self.E, self.H)) * 2 / np.sqrt(self.H))
        self.gate_up = to_bf16(rng.standard_normal((self.E, 2, self.F, self.H)) / np.sqrt(self.H))
        self.down = to_bf16(rng.standard_normal((self.E, self.H, self.F)) / np.sqrt(self.F))
        # Vectors are f32: name, shape [E, parts, rows], in the order of their weight index from 3.
        shapes = {
            "rb": (1, 1, self.E) if self.router_bias else None,
            "sb": (1, 1, self.E) if self.selection_bias else None,
            "ub": (self.E, 2, self.F) if self.bias else None,
            "db": (self.E, 1, self.H) if self.bias else None,
        }
        self.vectors = {
            name: rng.standard_normal(shape).astype(np.float32) / 2
            for name, shape in shapes.items()
            if shape
        }

    def text(self):
        """All entries of the layer: f0, r0, e0 and, for one expert, d0."""
        names = dict(H=self.H, F=self.F, E=self.E, K=self.K, E1=self.E + 1, R=self.router_type)
        names.update(X=self.x, Y=self.y)
        router = f"#moe.router<score = {self.score}, order = {self.order}, top_k = {self.K}"
        if self.renormalize != "none":
            router += f", renormalize = {self.renormalize}"
        if self.scale != 1.0:
            router += f", scale = {self.scale!r}"
        if self.selection_bias:
            router += ", selection_bias = score"
        if self.groups:
            count, keep, reduce, fill = self.groups
            router += f", groups = <count = {count}, keep = {keep}, reduce = {reduce},"
            router += f" fill = {fill}>"
        names["router"] = router + ">" + (" compute = bf16" if self.x == "f32" else "")
        expert = f"#moe.expert<form = glu, activation = {self.activation}"
        if self.clamp:
            limit, alpha = self.clamp
            expert += f", clamp = <kind = oai, limit = {limit!r}, alpha = {alpha!r}>"
        names["expert"] = expert + (", bias = true>" if self.bias else ">")
        types = {
            name: f"!moe.weight<{'x'.join(map(str, v.shape))}x1xf32, vector32>"
            for name, v in self.vectors.items()
        }
        arguments = {
            name: f""",
    %{name}: {types[name]} {{moe.arg = "weight", moe.weight_index = {3 + i} : i64}}"""
            for i, name in enumerate(types)
        }
        clauses = {"rb": "bias", "sb": "selection_bias"}
        names["route"] = "".join(f" {clauses[n]}(%{n} : {types[n]})" for n in types if n in clauses)
        names["rows"] = f" bias(%ub, %db : {types['ub']}, {types['db']})" if self.bias else ""
        for entry, wanted in {"f": "rbsbubdb", "r": "rbsb", "e": "ubdb"}.items():
            names["more_" + entry] = "".join(arguments[n] for n in types if n in wanted)
        text = TEXT + (DENSE if self.E == 1 else "")
        for name, value in names.items():
            text = text.replace("{" + name + "}", str(value))
        return text


TEXT = """
func.func @f0(%x: tensor<?x{H}x{X}> {moe.arg = "x"}, %y: tensor<?x{H}x{Y}> {moe.arg = "y"},
    %w0: tensor<?x{K}xf32> {moe.arg = "weights"}, %e0: tensor<?x{K}xi32> {moe.arg = "experts"},
    %acc: i1 {moe.arg = "accumulate"},
    %wg: !moe.weight<1x1x{E}x{H}x{R}, panel32> {moe.arg = "weight", moe.weight_index = 0 : i64},
    %w1: !moe.weight<{E}x2x{F}x{H}xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1 : i64},
    %w2: !moe.weight<{E}x1x{H}x{F}xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2 : i64}
    {more_f})
    -> (tensor<?x{H}x{Y}>, tensor<?x{K}xf32>, tensor<?x{K}xi32>)
    attributes {moe.compute = bf16, moe.entry = "forward"} {
  %k = arith.constant {K} : index
  %c0 = arith.constant 0 : index
  %t = tensor.dim %x, %c0 : tensor<?x{H}x{X}>
  %n = arith.muli %t, %k : index
  %w, %e = moe.router ins(%x, %wg : tensor<?x{H}x{X}>, !moe.weight<1x1x{E}x{H}x{R}, panel32>)
     {route}
      outs(%w0, %e0 : tensor<?x{K}xf32>, tensor<?x{K}xi32>) {router}
      -> tensor<?x{K}xf32>, tensor<?x{K}xi32>
  %o0 = tensor.empty() : tensor<{E1}xi32>
  %p0 = tensor.empty(%n) : tensor<?xi32>
  %off, %pair = moe.dispatch ins(%e : tensor<?x{K}xi32>) experts = {E}
      outs(%o0, %p0 : tensor<{E1}xi32>, tensor<?xi32>) -> tensor<{E1}xi32>, tensor<?xi32>
  %r0 = tensor.empty(%n) : tensor<?x{H}xbf16>
  %r = moe.experts ins(%x, %off, %pair, %w1, %w2 : tensor<?x{H}x{X}>, tensor<{E1}xi32>,
      tensor<?xi32>, !moe.weight<{E}x2x{F}x{H}xbf16, panel32>,
      !moe.weight<{E}x1x{H}x{F}xbf16, panel32>) slots %k{rows} outs(%r0 : tensor<?x{H}xbf16>)
      {expert} -> tensor<?x{H}xbf16>
  %z = moe.combine ins(%r, %off : tensor<?x{H}xbf16>, tensor<{E1}xi32>)
      via(%pair, %w slots %k : tensor<?xi32>, tensor<?x{K}xf32>) accumulate %acc
      outs(%y : tensor<?x{H}x{Y}>) -> tensor<?x{H}x{Y}>
  return %z, %w, %e : tensor<?x{H}x{Y}>, tensor<?x{K}xf32>, tensor<?x{K}xi32>
}
func.func @r0(%x: tensor<?x{H}x{X}> {moe.arg = "x"}, %w0: tensor<?x{K}xf32> {moe.arg = "weights"},
    %e0: tensor<?x{K}xi32> {moe.arg = "experts"}, %l0: tensor<?x{E}xf32> {moe.arg = "logits"},
    %wg: !moe.weight<1x1x{E}x{H}x{R}, panel32> {moe.arg = "weight", moe.weight_index = 0 : i64}
    {more_r})
    -> (tensor<?x{K}xf32>, tensor<?x{K}xi32>, tensor<?x{E}xf32>)
    attributes {moe.compute = bf16, moe.entry = "route"} {
  %w, %e, %l = moe.router ins(%x, %wg : tensor<?x{H}x{X}>, !moe.weight<1x1x{E}x{H}x{R}, panel32>)
     {route}
      outs(%w0, %e0, %l0 : tensor<?x{K}xf32>, tensor<?x{K}xi32>, tensor<?x{E}xf32>) {router}
      -> tensor<?x{K}xf32>, tensor<?x{K}xi32>, tensor<?x{E}xf32>
  return %w, %e, %l : tensor<?x{K}xf32>, tensor<?x{K}xi32>, tensor<?x{E}xf32>
}
func.func @e0(%x: tensor<?x{H}x{X}> {moe.arg = "x"}, %y: tensor<?x{H}x{Y}> {moe.arg = "y"},
    %w: tensor<?x?xf32> {moe.arg = "weights"}, %e: tensor<?x?xi32> {moe.arg = "experts"},
    %acc: i1 {moe.arg = "accumulate"},
    %w1: !moe.weight<{E}x2x{F}x{H}xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1 : i64},
    %w2: !moe.weight<{E}x1x{H}x{F}xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2 : i64}
    {more_e})
    -> tensor<?x{H}x{Y}> attributes {moe.compute = bf16, moe.entry = "experts"} {
  %c1 = arith.constant 1 : index
  %k = tensor.dim %e, %c1 : tensor<?x?xi32>
  %c0 = arith.constant 0 : index
  %t = tensor.dim %x, %c0 : tensor<?x{H}x{X}>
  %n = arith.muli %t, %k : index
  %o0 = tensor.empty() : tensor<{E1}xi32>
  %p0 = tensor.empty(%n) : tensor<?xi32>
  %off, %pair = moe.dispatch ins(%e : tensor<?x?xi32>) experts = {E}
      outs(%o0, %p0 : tensor<{E1}xi32>, tensor<?xi32>) -> tensor<{E1}xi32>, tensor<?xi32>
  %r0 = tensor.empty(%n) : tensor<?x{H}xbf16>
  %r = moe.experts ins(%x, %off, %pair, %w1, %w2 : tensor<?x{H}x{X}>, tensor<{E1}xi32>,
      tensor<?xi32>, !moe.weight<{E}x2x{F}x{H}xbf16, panel32>,
      !moe.weight<{E}x1x{H}x{F}xbf16, panel32>) slots %k{rows} outs(%r0 : tensor<?x{H}xbf16>)
      {expert} -> tensor<?x{H}xbf16>
  %z = moe.combine ins(%r, %off : tensor<?x{H}xbf16>, tensor<{E1}xi32>)
      via(%pair, %w slots %k : tensor<?xi32>, tensor<?x?xf32>) accumulate %acc
      outs(%y : tensor<?x{H}x{Y}>) -> tensor<?x{H}x{Y}>
  return %z : tensor<?x{H}x{Y}>
}
"""

DENSE = """
func.func @d0(%x: tensor<?x{H}x{X}> {moe.arg = "x"}, %y: tensor<?x{H}x{Y}> {moe.arg = "y"},
    %acc: i1 {moe.arg = "accumulate"},
    %w1: !moe.weight<1x2x{F}x{H}xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1 : i64},
    %w2: !moe.weight<1x1x{H}x{F}xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2 : i64})
    -> tensor<?x{H}x{Y}> attributes {moe.compute = bf16, moe.entry = "forward"} {
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x{H}x{X}>, !moe.weight<1x2x{F}x{H}xbf16, panel32>,
      !moe.weight<1x1x{H}x{F}xbf16, panel32>) accumulate %acc outs(%y : tensor<?x{H}x{Y}>)
      {expert} -> tensor<?x{H}x{Y}>
  return %z : tensor<?x{H}x{Y}>
}
"""


def bf16_bits(values):
    """The bits of float values rounded to bfloat16, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def to_bf16(values):
    return from_bf16(bf16_bits(values)).reshape(np.shape(values))


def activate(name, gate):
    if name == "silu":
        return gate / (1 + np.exp(-gate))
    if name == "gelu_tanh":
        return gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    raise ValueError(name)


def route(layer, x):
    """logits, weights, experts by the formula, in float64."""
    logits = x.astype(np.float64) @ layer.router.astype(np.float64).T
    if layer.router_bias:
        logits = logits + layer.vectors["rb"][0, 0]
    if layer.score == "softmax":
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        scores = shifted / shifted.sum(1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    keys = scores if layer.order == "score_then_select" else logits
    if layer.selection_bias:
        keys = keys + layer.vectors["sb"][0, 0]
    if layer.groups:
        count, keep, reduce, fill = layer.groups
        best = -np.sort(-keys.reshape(len(x), count, -1), 2)
        of_group = best[..., 0] + (best[..., 1] if reduce == "sum_top2" else 0)
        kept = np.argsort(-of_group, 1, kind="stable")[:, :keep]
        inside = np.zeros((len(x), count), bool)
        np.put_along_axis(inside, kept, True, 1)
        out = 0.0 if fill == "zero" else -np.inf
        keys = np.where(np.repeat(inside, layer.E // count, 1), keys, out)
    experts = np.argsort(-keys, 1, kind="stable")[:, : layer.K]
    if layer.order == "score_then_select" or layer.score == "sigmoid":
        weights = np.take_along_axis(scores, experts, 1)
    else:
        chosen = np.take_along_axis(logits, experts, 1)
        weights = np.exp(chosen - chosen.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
    if layer.renormalize == "sum":
        weights = weights / weights.sum(1, keepdims=True)
    return logits, weights * layer.scale, experts


def experts_sum(layer, x, experts, weights, start=None):
    """Σ w · row, rows rounded to bf16 before they are weighted, and hidden rows too (a GPU's
    choice); with the part of |y| that comes from terms, for error bounds."""
    y = np.zeros(x.shape) if start is None else start.astype(np.float64).copy()
    size = np.abs(y)
    for t in range(len(x)):
        for e, w in zip(experts[t], weights[t], strict=True):
            if not 0 <= e < layer.E:
                continue
            gate, up = layer.gate_up[e].astype(np.float64) @ x[t].astype(np.float64)
            if layer.bias:
                bias = layer.vectors["ub"][e].astype(np.float64)
                gate, up = gate + bias[0], up + bias[1]
            if layer.clamp:
                limit, alpha = layer.clamp
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                hidden = to_bf16((up + 1) * gate / (1 + np.exp(-alpha * gate)))
            else:
                hidden = to_bf16(activate(layer.activation, gate) * up)
            row = layer.down[e].astype(np.float64) @ hidden.astype(np.float64)
            if layer.bias:
                row = row + layer.vectors["db"][e, 0]
            row = to_bf16(row).astype(np.float64)
            y[t] += w * row
            size[t] += np.abs(w * row)
    return y, size
