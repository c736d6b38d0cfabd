"""torch.ops.moec.run: a layer of a library as an operation that torch.compile keeps in its graph.

    name = moec.torch_op.name_of(library.layers[3])         # "<id>/model.layers.3.mlp"
    y = torch.ops.moec.run(x, name)                         # the whole layer
    y = torch.ops.moec.run(x, name, idx, w)                 # the experts alone, routing given

The id is a hash of code and weights, so a graph that was saved finds the same layer in another
process once `name_of` was called there. Layers over live parameters (moec.transformers) have an id
of this process, so a graph with them cannot be exported.

The operation has a forward only. It may be recorded for autograd; its backward raises.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import weakref
from typing import Any

import torch

from moec._semantics import refuse

__all__ = ["add_live", "name_of", "run"]

_lib = torch.library.Library("moec", "FRAGMENT")
_lib.define(
    "run(Tensor x, str layer, Tensor? experts=None, Tensor? weights=None, Tensor? anchor=None)"
    " -> Tensor"
)
_lib.define("no_backward(Tensor grad, Tensor like, str layer) -> Tensor")

_layers: dict[str, Any] = {}  # layers of libraries: for ever
_lives: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class _Static:
    """A layer of a library whose weights do not change."""

    def __init__(self, layer: Any):
        self.layer = layer

    def block(self, x):
        return self.layer(x.contiguous())

    def experts(self, x, ids, weights):
        return self.layer.experts(x.contiguous(), ids.contiguous(), weights.contiguous())


def name_of(layer: Any) -> str:
    """The name under which torch.ops.moec.run finds a layer; keeps its library open."""
    name = f"{_id_of(layer.library)}/{layer.name}"
    _layers[name] = _Static(layer)
    return name


def add_live(live: Any) -> str:
    """A name for a layer over live parameters, for as long as it lives."""
    name = f"live-{os.getpid()}-{next(_numbers)}/{live.name}"
    _lives[name] = live
    return name


def _id_of(library: Any) -> str:
    if library.changed:
        return f"memory-{os.getpid()}-{id(library):x}"
    with open(os.path.join(library.path, "manifest.json"), "rb") as f:
        text = f.read()
    digest = hashlib.sha256(text)
    folder = library.arguments["weights"] or os.path.join(library.path, "weights")
    for layer in json.loads(text)["layers"]:
        with open(os.path.join(folder, layer["file"]), "rb") as f:
            digest.update(f.read(8192))  # the head: ids and the hash of every tensor
    return digest.hexdigest()[:16]


def _find(name: str) -> Any:
    found = _lives.get(name) or _layers.get(name)
    if found is None:
        refuse(
            "torch.ops.moec.run: layer",
            "a layer that is open in this process",
            repr(name),
            "call moec.torch_op.name_of(layer) for a layer of the same library",
            name="E-ARGUMENT",
        )
    return found


@torch.library.impl(_lib, "run", "CPU")
@torch.library.impl(_lib, "run", "CUDA")
def _run(x, layer, experts=None, weights=None, anchor=None):
    target = _find(layer)
    if (experts is None) != (weights is None):
        refuse(
            "torch.ops.moec.run",
            "experts and weights together, or neither",
            "one of them",
            name="E-ARGUMENT",
        )
    return target.block(x) if experts is None else target.experts(x, experts, weights)


@torch.library.register_fake("moec::run", lib=_lib)
def _run_fake(x, layer, experts=None, weights=None, anchor=None):
    return x.new_empty(x.shape)


@torch.library.impl(_lib, "no_backward", "CPU")
@torch.library.impl(_lib, "no_backward", "CUDA")
def _no_backward(grad, like, layer):
    refuse(
        f"{layer.partition('/')[2]}: backward",
        "inference (torch.no_grad())",
        "a gradient to pass on",
        "for training choose another experts_implementation, such as grouped_mm",
    )


@torch.library.register_fake("moec::no_backward", lib=_lib)
def _no_backward_fake(grad, like, layer):
    return torch.empty_like(like)


def _setup_context(ctx, inputs, output):
    x, ctx.layer, _, weights, anchor = inputs
    ctx.save_for_backward(x, weights, anchor)


def _backward(ctx, grad):
    # An operation that raises when it runs: torch.compile traces backward ahead of time.
    x, weights, anchor = (
        None if t is None or not needed else torch.ops.moec.no_backward(grad, t, ctx.layer)
        for t, needed in zip(
            ctx.saved_tensors,
            (ctx.needs_input_grad[i] for i in (0, 3, 4)),
            strict=True,
        )
    )
    return x, None, None, weights, anchor


torch.library.register_autograd("moec::run", _backward, setup_context=_setup_context, lib=_lib)

# Without the choice between overloads, which takes a microsecond.
run = torch.ops.moec.run.default
