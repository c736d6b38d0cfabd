"""Where the experts of a transformers model are."""

from __future__ import annotations

import gc

import torch
from transformers import PreTrainedModel

__all__ = ["index_of", "name_experts", "name_modules"]


def index_of(path: str | None) -> int | None:
    """The decoder layer's number in "model.layers.3.mlp"."""
    numbers = [int(part) for part in (path or "").split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def name_modules() -> None:
    """Tells all experts of all models where they are: a module does not know its own name."""
    for model in [o for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)]:
        name_experts(model)


def name_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's dispatched experts by the name of their block."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(type(module), "_apply_gate") and "_is_expert_parallel" in module.__dict__:
            block = path.rpartition(".")[0] or path
            found[block] = module
            # The outermost model that holds them knows the longest name.
            if len(block) > len(module.__dict__.get("_moec_path", "")):
                module.__dict__["_moec_path"] = block
    return found
