"""accelerate and restore: whole blocks of a transformers model on moec's kernels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch

from moec import _forwards, _live, torch_op
from moec._blocks import (
    Place,
    around,
    beside,
    block_weights,
    dense_weights,
    own_part,
    router_of,
)
from moec._live import Live, take_layer
from moec._memory import available_bytes, size_text
from moec._modules import index_of, name_experts
from moec._semantics import (
    block_spec,
    check_class,
    dense_spec,
    experts_spec,
    layer_of,
    refuse,
    rounds_nowhere,
    router_precision,
)
from moec._views import experts_weights, unpack, watched
from moec.errors import Error

__all__ = ["Report", "accelerate", "restore"]

log = logging.getLogger("moec.transformers")


class Report(dict):
    """Layer -> "done: ..." or why not. `done` is true if every layer was."""

    freed = 0  # bytes of torch's weights that were dropped
    packed = 0  # bytes of packed weights

    @property
    def done(self) -> bool:
        return bool(self) and all(text.startswith("done") for text in self.values())

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.items())


def accelerate(
    model: torch.nn.Module, weights: str = "keep", library: Any = None, router: str = "model"
) -> Report:
    """Runs the model's MoE blocks, router and all, on moec; returns what was done for each layer.

    weights  "keep": torch's weights stay and are followed, as experts_implementation="moec" does;
             "drop": the experts' matrices are taken out of the model once they are packed, layer by
             layer, so that the peak is one layer more than the model. Until `restore`, parameters
             are on the meta device and state_dict() raises
    library  a library of this model (moec.load): its own weights are used, and its results are held
             against torch's before anything is replaced. None: code from the cache, this model's
             weights
    router   "model": rounds where transformers does; "f32": nothing is rounded to less than f32. A
             block whose tensors are not in the formats that the model table knows keeps torch's
             router, and moec computes its experts

    Only `forward` of blocks and experts is replaced; modules and hooks stay. When router logits are
    asked for, or a module inside a block has hooks, or the model is in training mode, the block's
    own forward runs, and moec computes its experts.
    """
    if weights == "borrow":
        refuse(
            "accelerate: weights",
            '"keep" or "drop"',
            '"borrow"',
            "weights used in place (layout rows-1) are not built yet",
        )
    if weights not in ("keep", "drop"):
        refuse("accelerate: weights", '"keep" or "drop"', repr(weights), name="E-ARGUMENT")
    if router not in ("model", "f32"):
        refuse("accelerate: router", '"model" or "f32"', repr(router), name="E-ARGUMENT")

    report = Report()
    plans = []
    for block_name, experts in _blocks(model, report):
        try:
            plans.append(_plan(model, block_name, experts, library, router))
        except Error as why:
            report[block_name] = str(why)
    _check_memory(plans, weights)
    for plan in plans:
        try:
            report.packed += plan.install()
            if weights == "drop":
                report.freed += plan.drop()
            report[plan.name] = f"done: {plan.what}"
        except Error as why:
            plan.remove()
            report[plan.name] = str(why)
        log.info("%s: %s", plan.name, report[plan.name])
    return report


def _blocks(model: torch.nn.Module, report: Report) -> Iterator[tuple[str, torch.nn.Module]]:
    found = name_experts(model)
    for name, experts in found.items():
        if experts.__dict__.get("_moec_block") is not None:
            report[name] = "done: before"
        else:
            yield name, experts
    ours = set(map(id, found.values()))
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts") and id(module) not in ours:
            report[name.rpartition(".")[0] or name] = (
                f"E-UNSUPPORTED: {type(module).__name__}: expected experts that transformers "
                "dispatches (use_experts_implementation), but got a class that is not"
            )


class _Plan:
    """What will be done with one block."""

    def __init__(self, name: str, block: torch.nn.Module, experts: torch.nn.Module):
        self.name, self.block, self.experts = name, block, experts
        self.live: Live | None = None
        # What of the block is replaced: "block", all of it; "scores", the same, and it returns the
        # chosen experts' weights, too; "apart", router and experts one by one; "experts".
        self.way = "experts"
        self.what = ""
        self.fallback: tuple[dict[str, Any], str] = ({}, "")  # layer and dtype, for experts_only
        self.beside: tuple[torch.nn.Module, Live] | None = None  # a dense network
        self.replaced: list[torch.nn.Module] = []
        self.hooks: list[Any] = []

    @property
    def lives(self) -> list[Live]:
        return [self.live] + ([self.beside[1]] if self.beside else [])

    @property
    def packed_bytes(self) -> int:
        return sum(live.layer.info.weight_bytes for live in self.lives)

    def experts_only(self, layer: dict[str, Any], dtype: str, why: str) -> None:
        """Settles for the experts: everything else of the block stays torch's."""
        self.what, self.way = f"experts; torch's router stays ({why})", "experts"
        down = self.experts._parameters["down_proj"]
        taken, shelf = take_layer(experts_spec(layer, dtype), self.experts.config, down)
        read = functools.partial(experts_weights, self.experts, with_router=True)
        self.live = Live(self.name, taken, shelf, read, watched(self.experts))

    def install(self) -> int:
        """Packs, checks, and replaces; the bytes that were packed."""
        if self.way == "block" and _has_weights(self.experts):
            returned = _own_result(self.block, self.experts, _tokens(self.experts, 1))
            if isinstance(returned, tuple) and _is_scores(returned, self.live):
                self.way = "scores"
            elif not isinstance(returned, torch.Tensor) and self.live.shelf is not None:
                self.live.close()
                self.experts_only(*self.fallback, "the block returns more than is known")
        for live in self.lives:
            live.prepare()
        _probe(self)
        down = self.experts._parameters
        name = torch_op.add_live(self.live)
        self._replace(_forwards.experts, self.experts, self.live, name, (down, "down_proj"))
        if self.way in ("block", "scores"):
            function = _forwards.block if self.way == "block" else _forwards.block_and_scores
            self._replace(function, self.block, self.live, name, (down, "down_proj"))
        elif self.way == "apart":
            router = router_of(self.block)
            self._replace(_forwards.router, router, self.live, name, (down, "down_proj"))
        if self.beside:
            module, live = self.beside
            name = torch_op.add_live(live)
            self._replace(_forwards.dense, module, live, name, live.watched[-1])
        self.experts.__dict__["_moec_block"] = self
        # What experts_implementation="moec" had packed is not needed twice.
        earlier = self.experts.__dict__.pop("_moec_live", None)
        if earlier is not None:
            earlier.close()
        return self.packed_bytes

    def _replace(
        self, function: Any, module: torch.nn.Module, live: Live, name: str, anchor: Place
    ) -> None:
        anchored = functools.partial(_forwards.anchor_of, *anchor)
        module.forward = _forwards.Forward(function, module, live, name, anchored)
        self.replaced.append(module)

    def drop(self) -> int:
        hook = self.experts.register_state_dict_pre_hook(_no_state)
        self.hooks.append(hook)
        return self.live.drop()

    def remove(self) -> None:
        for module in self.replaced:
            del module.forward
        for hook in self.hooks:
            hook.remove()
        self.replaced.clear()
        self.hooks.clear()
        self.experts.__dict__.pop("_moec_block", None)
        for live in self.lives:
            live.close()

    def __reduce__(self):
        # A pickled or copied model is torch's own again; a Live without weights refuses.
        if self.live.dropped is not None:
            self.live.__reduce__()
        return _live._nothing, ()


def _no_state(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    refuse(
        f"{prefix.rstrip('.')}: state_dict",
        "weights that torch has",
        "weights that were dropped",
        "call moec.transformers.restore(model) first",
        name="E-WEIGHTS",
    )


def _plan(
    model: torch.nn.Module, name: str, experts: torch.nn.Module, library: Any, router: str
) -> _Plan:
    check_class(experts)
    plan = _Plan(name, model.get_submodule(name), experts)
    down = _live.check_tensor(f"{name}.experts.down_proj", experts._parameters.get("down_proj"))
    dtype = _live.DTYPES[down.dtype]
    table = layer_of(experts, index_of(name))
    layer = own_part(plan.block, table)
    apart = layer["router"].get("router_x", False)
    if library is not None:
        return _plan_library(plan, library, layer, dtype, router)
    try:
        places = around(router_of(plan.block) if apart else plan.block, experts, layer)
        holder, key = places["router"][0]
        spec = block_spec(layer, dtype, router, _live.DTYPES.get(holder[key].dtype))
        taken, shelf = take_layer(spec, experts.config, down)
    except Error as why:
        plan.experts_only(layer, dtype, str(why))
        return plan
    plan.way = "apart" if apart else "block"
    plan.what = "router and experts" if apart else "whole block"
    plan.fallback = (layer, dtype)
    read = functools.partial(block_weights, experts, places)
    watch = [place for several in places.values() for place in several]
    plan.live = Live(name, taken, shelf, read, watched(experts) + watch)
    found = beside(model, name, experts, table)
    if found is not None:
        path, dense, roles = found
        taken, shelf = take_layer(dense_spec(dense, dtype), experts.config, down)
        read = functools.partial(dense_weights, roles)
        live = Live(path, taken, shelf, read, list(roles.values()))
        plan.beside = model.get_submodule(path), live
        plan.what += f", {path.rpartition('.')[2]}"
    return plan


def _plan_library(
    plan: _Plan, library: Any, layer: dict[str, Any], dtype: str, router: str
) -> _Plan:
    """A layer of the user's own library, weights and all."""
    named = {one.name: one for one in library.layers}
    where = f"{plan.name}: library"
    name = plan.name if plan.name in named else f"{plan.name}.experts"
    if name not in named:
        refuse(where, f"a layer {plan.name}", ", ".join(named) or "none", name="E-ARGUMENT")
    ours = named[name]
    sizes = tuple(layer[key] for key in "HFEK")
    got = tuple(getattr(ours.info, key) for key in "HFEK")
    if sizes != got or ours.info.compute != dtype:
        expected = f"H, F, E, K = {sizes} in {dtype}"
        refuse(where, expected, f"{got} in {ours.info.compute}", name="E-ARGUMENT")
    rounds = router_precision(library, name)
    if dtype != "f32" and rounds != router and not rounds_nowhere(layer):
        hint = f'compile it with --router {router}, or call accelerate with router="{rounds}"'
        refuse(where, f"a router of precision {router}", rounds, hint, name="E-ARGUMENT")
    plan.live = Live(plan.name, ours, None, lambda: iter(()), watched(plan.experts), fixed=True)
    apart = "router_x" in ours.info.needs
    plan.way = "apart" if apart else "block"
    plan.what = ("router and experts" if apart else "whole block") + " of the given library"
    return plan


# --- before anything is replaced --------------------------------------------------------------


def _check_memory(plans: list[_Plan], weights: str) -> None:
    """Refuses, with both sizes, what does not fit."""
    if not plans:
        return
    sizes = [plan.packed_bytes for plan in plans if plan.live.shelf is not None]
    need = sum(sizes) if weights == "keep" else max(sizes, default=0)
    device = plans[0].experts._parameters["down_proj"].device
    have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if need > have:
        for plan in plans:
            plan.remove()
        refuse(
            f'accelerate: weights="{weights}"',
            f"{size_text(need)} of free memory for "
            + ("a second copy of the experts" if weights == "keep" else "one layer more"),
            size_text(have),
            f'weights="drop" needs {size_text(max(sizes))} at a time' if weights == "keep" else "",
            name="E-MEMORY",
        )


def _eager(experts: torch.nn.Module) -> Any:
    """transformers' own loop over the experts."""
    return functools.partial(type(experts).forward.__wrapped__, experts)


def _has_weights(experts: torch.nn.Module) -> bool:
    return experts._parameters["down_proj"].device.type != "meta"


def _tokens(experts: torch.nn.Module, count: int) -> torch.Tensor:
    down = experts._parameters["down_proj"]
    h = down.shape[2 if experts.is_transposed else 1]
    x = torch.randn(count, h, generator=torch.Generator().manual_seed(0))
    return x.to(down.device, down.dtype)


@torch.no_grad()
def _own_result(block: torch.nn.Module, experts: torch.nn.Module, x: torch.Tensor) -> Any:
    """What torch's block makes of x [T,H]."""
    training, block.training = block.training, False
    experts.forward = _eager(experts)
    try:
        return block.forward(x[None])
    finally:
        block.training = training
        del experts.forward


def _is_scores(returned: tuple[Any, ...], live: Live) -> bool:
    """Whether a block's results are its hidden states and the weights of the chosen experts."""
    if len(returned) != 2 or not all(isinstance(one, torch.Tensor) for one in returned):
        return False
    return tuple(returned[1].shape) == (returned[0].shape[1], live.layer.info.K)


@torch.no_grad()
def _probe(plan: _Plan) -> None:
    """Holds the packed layers against torch's modules on a few tokens: the mapping of parameters to
    roles is told from shapes, and a given library may hold anybody's weights."""
    experts = plan.experts
    if not _has_weights(experts):
        return
    x = _tokens(experts, 16)
    if plan.way in ("block", "scores"):
        want = _own_result(plan.block, experts, x)
        got = plan.live.block(x, routing=plan.way == "scores")
        if plan.way == "scores":
            _compare(plan.name, got[2], want[1])
            want, got = want[0], got[0]
        if not isinstance(want, torch.Tensor) or want.shape != x[None].shape:
            refuse(plan.name, "a block that returns its hidden states", type(want).__name__)
        _compare(plan.name, got, want[0])
    else:
        e = experts._parameters["down_proj"].shape[0]
        ids = torch.arange(16)[:, None].mul(3).add(torch.arange(2)).remainder(e)
        part = torch.rand(16, 2, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        _compare(plan.name, plan.live.experts(x, ids, part), _eager(experts)(x, ids, part))
    if plan.way == "apart":
        router = router_of(plan.block)
        _, weights, chosen = type(router).forward(router, x)
        want = torch.zeros(16, e).scatter_(1, chosen, weights.float())
        chosen, weights, _ = plan.live.route(x)
        _compare(plan.name, torch.zeros(16, e).scatter_(1, chosen.long(), weights), want)
    if plan.beside:
        module, live = plan.beside
        _compare(live.name, live.block(x), type(module).forward(module, x))


def _compare(where: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1).clamp_min(1e-30)
    bound = 1e-3 if want.dtype == torch.float32 else 5e-2
    # A near tie may be decided the other way in a few rows; a wrong weight shows in all of them.
    wrong = int((~(error <= bound)).sum())
    if wrong > 4:
        refuse(
            f"{where}: check before replacing",
            f"results within {bound:g} of torch's",
            f"{wrong} of 16 tokens further off, by {error.max().item():.2g}",
            name="E-MISMATCH",
        )


def restore(model: torch.nn.Module) -> Report:
    """Undoes `accelerate`: torch's forward, and torch's weights where they were dropped, bit by
    bit and layer by layer. Frees what was packed."""
    report = Report()
    for module in model.modules():
        plan = module.__dict__.get("_moec_block")
        if plan is not None:
            plan.live.bring_back(functools.partial(unpack, experts=module))
            plan.remove()
            report[plan.name] = "done: restored"
        live = module.__dict__.pop("_moec_live", None)
        if live is not None:
            module.__dict__.pop("_moec_name", None)
            live.close()
            report[live.name] = "done: packed copy freed"
    return report
