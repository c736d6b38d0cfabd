"""Models of transformers on moec's kernels.

    import moec.transformers as mt                          # registers "moec"
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moec")
    model.set_experts_implementation("moec")                # the same, later

    report = mt.accelerate(model, weights="drop")           # whole blocks, router too
    mt.restore(model)                                       # torch's weights back

With experts_implementation="moec" torch keeps the weights and the router; the experts run on a
packed copy, which follows the parameters: they are compared at each call and packed again when
they changed. `accelerate` replaces the forward of whole blocks and can free torch's copy.

Code is compiled for the shape of the experts when it is first needed (seconds) and kept in a cache
folder. What cannot be run is refused with moec.Error, in one sentence; nothing falls back silently.
Messages go to the logger "moec.transformers".
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any, NoReturn

import torch
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moec import _live, torch_op
from moec._accelerate import Report, accelerate, restore
from moec._live import Live, take_layer
from moec._modules import index_of, name_experts, name_modules
from moec._semantics import check_class, experts_spec, layer_of, refuse
from moec._threads import torch_executor, use_threads
from moec._views import experts_weights, watched

__all__ = ["Report", "accelerate", "prepare", "refresh", "restore", "torch_executor", "use_threads"]

log = logging.getLogger("moec.transformers")

_creating = threading.RLock()


def experts_forward(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What an Experts module calls under experts_implementation="moec"."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        anchor = experts.down_proj if experts.down_proj.requires_grad else None
        wanted = anchor is not None or hidden_states.requires_grad or top_k_weights.requires_grad
        if wanted or torch.compiler.is_compiling():
            name = _name_of(experts)
            return torch_op.run(hidden_states, name, top_k_index, top_k_weights, anchor)
    live = experts.__dict__.get("_moec_live") or _make_live(experts)
    return live.experts(hidden_states, top_k_index, top_k_weights)


def quantized_experts_forward(experts: torch.nn.Module, *args: Any) -> NoReturn:
    """What experts that transformers has quantized call."""
    formats = {str(p.dtype).removeprefix("torch.") for p in experts.parameters()}
    refuse(
        type(experts).__qualname__,
        "weights in float32 or bfloat16",
        f"quantized ones ({', '.join(sorted(formats))})",
        "load the model with dequantize=True in its quantization configuration, or compile the "
        "checkpoint with moec compile, which decodes fp8 and mxfp4",
    )


ExpertsInterface.register("moec", experts_forward)
FP8ExpertsInterface.register("moec", quantized_experts_forward)


def _name_of(experts: torch.nn.Module) -> str:
    """The operation's name for these experts."""
    if torch.compiler.is_compiling():
        # Nothing can be compiled or packed while dynamo is looking.
        if "_moec_name" not in experts.__dict__:
            refuse(
                "torch.compile",
                "a model whose code and weights are ready",
                "one that was never run",
                "call moec.transformers.prepare(model) first",
                name="E-NEEDS",
            )
    elif experts.__dict__.get("_moec_live") is None:
        _make_live(experts)
    return experts.__dict__["_moec_name"]


def _make_live(experts: torch.nn.Module) -> Live:
    """Compiles (or finds) the code of the experts' shape and takes a layer of it."""
    with _creating:
        live = experts.__dict__.get("_moec_live")
        if live is not None:
            return live
        if "_moec_path" not in experts.__dict__:
            name_modules()
        path = experts.__dict__.get("_moec_path")
        check_class(experts)
        down = _live.check_tensor("down_proj", experts._parameters.get("down_proj"))
        layer = layer_of(experts, index_of(path))
        spec = experts_spec(layer, _live.DTYPES[down.dtype])
        taken, shelf = take_layer(spec, experts.config, down)
        live = Live(
            path or type(experts).__name__,
            taken,
            shelf,
            functools.partial(experts_weights, experts, with_router=True),
            watched(experts),
        )
        experts.__dict__["_moec_live"] = live
        experts.__dict__["_moec_name"] = torch_op.add_live(live)
        return live


def prepare(model: torch.nn.Module) -> Report:
    """Compiles and packs now what the first forward would; says for each layer what was done.

    Needed before torch.compile, which cannot do it on its way."""
    report = Report()
    for block, experts in name_experts(model).items():
        if experts.__dict__.get("_moec_block") is not None:
            report[block] = "accelerated already"
            continue
        _make_live(experts).prepare()
        report[block] = "done: experts packed"
    return report


def refresh(model: torch.nn.Module) -> None:
    """Packs all weights again at the next call: after writes that torch does not count, such as
    through `parameter.data` or NumPy."""
    for module in model.modules():
        plan = module.__dict__.get("_moec_block")
        for live in (module.__dict__.get("_moec_live"), plan and plan.live):
            if live is not None:
                live.refresh()
