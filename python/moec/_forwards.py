"""What stands in modules for their forward while a model is accelerated.

Modules and their hooks stay. Where somebody wants to see the inside of a block, or the model is in
training mode, the block's own forward runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from moec import torch_op
from moec._live import Live

__all__ = ["Forward", "block", "block_and_scores", "dense", "experts", "router"]


class Forward:
    """Stands in a module for its forward. A copy or a pickle of the module has its own again."""

    def __init__(self, function: Any, module: torch.nn.Module, live: Live, name: str, anchor: Any):
        self.function, self.module, self.live = function, module, live
        self.name = name  # of the operation
        self.anchor = anchor  # () -> the parameter by which autograd knows of the weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)

    def __reduce__(self):
        return _own_forward, (self.module,)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def run(self, x: Any, ids: Any = None, weights: Any = None) -> torch.Tensor:
        """As the operation."""
        return torch_op.run(x, self.name, ids, weights, self.anchor())

    def as_operation(self, *tensors: Any) -> bool:
        """Whether somebody but the caller wants to know what runs: dynamo or autograd."""
        if torch.compiler.is_compiling():
            return True
        if not torch.is_grad_enabled():
            return False
        return self.anchor() is not None or any(t.requires_grad for t in tensors)


def _own_forward(module: torch.nn.Module) -> Any:
    return functools.partial(type(module).forward, module)


def anchor_of(holder: dict[str, Any], key: str) -> torch.Tensor | None:
    weight = holder[key]
    return weight if weight.requires_grad and weight.device.type == "cpu" else None


def experts(self: Forward, x: Any, ids: Any, weights: Any) -> torch.Tensor:
    if self.as_operation(x, weights):
        return self.run(x, ids, weights)
    return self.live.experts(x, ids, weights)


def block(self: Forward, hidden_states: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or self.module.training or _watched(self.module):
        return self.own(hidden_states, *args, **kwargs)
    if self.as_operation(hidden_states):
        return self.run(hidden_states)
    return self.live.block(hidden_states)


dense = block


def block_and_scores(self: Forward, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """gpt_oss returns the chosen experts' weights, too, which the operation does not."""
    known = not args and not kwargs and not self.module.training and not _watched(self.module)
    if not known or self.as_operation(hidden_states):
        return self.own(hidden_states, *args, **kwargs)
    y, _, weights = self.live.block(hidden_states, routing=True)
    return y, weights.to(hidden_states.dtype)


def router(self: Forward, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """A router beside its experts: probabilities of all experts, weights and numbers of the
    chosen."""
    module = self.module
    known = not args and not kwargs and not module.training and not _watched(module, itself=True)
    if not known or self.as_operation(hidden_states):
        return self.own(hidden_states, *args, **kwargs)
    ids, weights, logits = self.live.route(hidden_states)
    return torch.softmax(logits, -1), weights, ids.long()


_NOT_INSIDE = {"hidden_states", "attentions", "cross_attentions"}


def _watched(block: torch.nn.Module, itself: bool = False) -> bool:
    """Whether anybody wants to see what happens inside the block (or what it returns)."""
    for module in block.modules():
        if module is block and not itself:
            continue
        if module._forward_pre_hooks:
            return True
        if module._forward_hooks and any(map(_listens, module._forward_hooks.values())):
            return True
    return False


def _listens(hook: Any) -> bool:
    """transformers' own recorders stay on their modules for ever and listen when asked to."""
    if not getattr(hook, "__qualname__", "").startswith("install_output_capuring_hook"):
        return True
    from transformers.utils.output_capturing import _active_collector

    wanted = _active_collector.get()
    return wanted is not None and not _NOT_INSIDE.issuperset(wanted)
