"""Parameters of an Experts module as the matrices that moec_set_weight takes.

transformers has them as [E, 2F, H] or transposed, with gate above up or in alternating rows; all of
these are views, so nothing is copied, and the same views take unpacked weights back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["experts_weights", "matrix_views", "watched"]

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
_BIASES = ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def names_of(experts: Any) -> list[str]:
    """Names of the parameters the experts compute with."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [first, "down_proj"]
    return names + [f"{name}_bias" for name in names] if experts.has_bias else names


def watched(experts: Any) -> list[tuple[dict[str, Any], str]]:
    return [(experts._parameters, name) for name in names_of(experts)]


def matrix_views(
    experts: Any, name: str, tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """(role, view) of a matrix parameter."""
    matrix = tensor.mT if experts.is_transposed else tensor
    if name == "gate_up_proj" and not experts.is_concatenated:
        yield "gate", matrix[:, 0::2]
        yield "up", matrix[:, 1::2]
    else:
        yield {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}[name], matrix


def _bias(experts: Any, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    role = {"gate_up_proj_bias": "gate_up_bias", "up_proj_bias": "up_bias"}.get(name, "down_bias")
    if role == "gate_up_bias" and not experts.is_concatenated:
        tensor = torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
    return role, tensor


def experts_weights(experts: Any, with_router: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(role, tensor) pairs of the experts. with_router: and a router of zeros, which code that was
    compiled for the experts alone has, too, and never reads."""
    down = experts._parameters["down_proj"]
    if with_router:
        e, h = down.shape[0], down.shape[2 if experts.is_transposed else 1]
        yield "router", torch.zeros(e, h, dtype=down.dtype)
    for name in names_of(experts):
        tensor = experts._parameters[name]
        if name in _MATRICES:
            yield from matrix_views(experts, name, tensor)
        else:
            yield _bias(experts, name, tensor)


def unpack(live: Any, tensors: dict[str, torch.Tensor], experts: Any) -> None:
    """Fills new tensors of the experts' matrices from the packed weights."""
    for name, tensor in tensors.items():
        for role, view in matrix_views(experts, name, tensor):
            live.layer.get_weight(role, view)
