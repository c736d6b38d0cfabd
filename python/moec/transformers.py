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
import gc
import logging
import threading
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from moec import _live, torch_op
from moec._accelerate import Report, accelerate, restore
from moec._live import Live, take_layer
from moec._semantics import check_class, experts_spec, layer_of, refuse
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
        return torch.ops.moec.run(
            hidden_states,
            _name_of(experts),
            top_k_index,
            top_k_weights,
            experts.down_proj if experts.down_proj.requires_grad else None,
        )
    live = experts.__dict__.get("_moec_live") or _make_live(experts)
    return live.experts(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register("moec", experts_forward)


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
            _name_modules()
        path = experts.__dict__.get("_moec_path")
        check_class(experts)
        down = _live.check_tensor("down_proj", experts._parameters.get("down_proj"))
        layer = layer_of(experts, _index_of(path))
        spec = experts_spec(layer, _live.DTYPES[down.dtype])
        taken, shelf = take_layer(spec, experts.config)
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


def _index_of(path: str | None) -> int | None:
    """The decoder layer's number in "model.layers.3.mlp"."""
    numbers = [int(part) for part in (path or "").split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def _name_modules() -> None:
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


def use_threads(threads: Any) -> None:
    """Where layers that are made from now on run: None, a number, or an executor (moec.load)."""
    _live.executor = threads


def torch_executor(lanes: int = 0) -> Any:
    """An executor that runs on the OpenMP threads torch uses, instead of on threads beside them."""
    from moec._moec import OpenMP

    with open("/proc/self/maps") as f:
        paths = {line.split(maxsplit=5)[5].strip() for line in f if "libgomp" in line}
    if not paths:
        refuse("torch_executor", "GNU OpenMP, loaded by torch", "none", name="E-ARGUMENT")
    # Several copies: torch's own lies in torch's folder or in torch.libs beside it.
    ours = sorted(paths, key=lambda path: "torch" not in path)
    return OpenMP(ours[0], lanes)
