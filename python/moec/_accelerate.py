"""accelerate and restore: whole blocks of a transformers model on moec's kernels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch

from moec import _live, torch_op
from moec._live import Live, take_layer
from moec._memory import available_bytes, size_text
from moec._semantics import block_spec, check_class, experts_spec, layer_of, refuse
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
    router   "model": rounds as transformers does; where the compiler cannot, torch's router stays
             and moec computes the experts. "f32": moec's own router, in f32

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
    from moec.transformers import name_experts

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
        self.whole = False  # the block's forward too, not the experts' alone
        self.what = ""
        self.fallback: tuple[dict[str, Any], str] = ({}, "")  # layer and dtype, for experts_only
        self.hooks: list[Any] = []

    @property
    def packed_bytes(self) -> int:
        return self.live.layer.info.weight_bytes

    def experts_only(self, layer: dict[str, Any], dtype: str, why: str) -> None:
        """Settles for the experts: everything else of the block stays torch's."""
        self.what, self.whole = f"experts; torch's router stays ({why})", False
        taken, shelf = take_layer(experts_spec(layer, dtype), self.experts.config)
        read = functools.partial(experts_weights, self.experts, with_router=True)
        self.live = Live(self.name, taken, shelf, read, watched(self.experts))

    def install(self) -> int:
        """Packs, checks, and replaces; the bytes that were packed."""
        if self.whole and self.live.shelf is not None and _returns_more(self.block, self.experts):
            # gpt_oss: router scores too, which a block's own forward has to make
            self.live.close()
            self.experts_only(*self.fallback, "the block returns more than its hidden states")
        self.live.prepare()
        _probe(self)
        self.experts.forward = _Forward(_experts_forward, self.experts)
        self.experts.__dict__["_moec_block"] = self
        self.experts.__dict__["_moec_name"] = torch_op.add_live(self.live)
        if self.whole:
            self.block.forward = _Forward(_block_forward, self.block, self.experts)
        # What experts_implementation="moec" had packed is not needed twice.
        earlier = self.experts.__dict__.pop("_moec_live", None)
        if earlier is not None:
            earlier.close()
        return self.packed_bytes

    def drop(self) -> int:
        hook = self.experts.register_state_dict_pre_hook(_no_state)
        self.hooks.append(hook)
        return self.live.drop()

    def remove(self) -> None:
        for module in (self.block, self.experts):
            if isinstance(module.__dict__.get("forward"), _Forward):
                del module.forward
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.experts.__dict__.pop("_moec_block", None)
        self.experts.__dict__.pop("_moec_name", None)
        self.live.close()

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
    from moec.transformers import _index_of

    check_class(experts)
    plan = _Plan(name, model.get_submodule(name), experts)
    down = _live.check_tensor(f"{name}.experts.down_proj", experts._parameters.get("down_proj"))
    dtype = _live.DTYPES[down.dtype]
    layer = _own_part(plan.block, layer_of(experts, _index_of(name)))
    if library is not None:
        return _plan_library(plan, library, layer, dtype)
    try:
        around = _around(plan.block, experts, layer)
        taken, shelf = take_layer(block_spec(layer, dtype, router), experts.config)
    except Error as why:
        plan.experts_only(layer, dtype, str(why))
    else:
        plan.what, plan.whole, plan.fallback = "whole block", True, (layer, dtype)
        read = functools.partial(_block_weights, experts, around)
        watch = [place for places in around.values() for place in places]
        plan.live = Live(name, taken, shelf, read, watched(experts) + watch)
    return plan


def _own_part(block: torch.nn.Module, layer: dict[str, Any]) -> dict[str, Any]:
    """Without the shared expert where that is not the block's own: granitemoeshared's is a child of
    the decoder layer, which goes on adding it."""
    combine = layer.get("combine", {})
    if combine.get("shared", "none") == "none":
        return layer
    if any("shared" in path for path, _ in block.named_modules()):
        return layer
    rest = {key: value for key, value in combine.items() if not key.startswith("shared")}
    return {**layer, "combine": rest}


def _plan_library(plan: _Plan, library: Any, layer: dict[str, Any], dtype: str) -> _Plan:
    """A layer of the user's own library, weights and all."""
    named = {one.name: one for one in library.layers}
    where = f"{plan.name}: library"
    if plan.name not in named:
        refuse(where, f"a layer {plan.name}", ", ".join(named) or "none", name="E-ARGUMENT")
    ours = named[plan.name]
    sizes = tuple(layer[key] for key in "HFEK")
    got = tuple(getattr(ours.info, key) for key in "HFEK")
    if sizes != got or ours.info.compute != dtype:
        expected = f"H, F, E, K = {sizes} in {dtype}"
        refuse(where, expected, f"{got} in {ours.info.compute}", name="E-ARGUMENT")
    plan.live = Live(plan.name, ours, None, lambda: iter(()), watched(plan.experts), fixed=True)
    plan.what, plan.whole = "whole block of the given library", True
    return plan


# --- what is around the experts ---------------------------------------------------------------

# Where a tensor is held: (module._parameters or module._buffers, key).
Place = tuple[dict[str, Any], str]


def _around(
    block: torch.nn.Module, experts: torch.nn.Module, layer: dict[str, Any]
) -> dict[str, list[Place]]:
    """The block's tensors besides the experts' own, by role. They are told apart by shape and name,
    and every one must be understood; whether rightly, `_probe` finds out."""
    inside = {id(module) for module in experts.modules()}
    found: dict[str, list[Place]] = {}
    unknown = []
    for path, module in block.named_modules():
        if id(module) in inside:
            continue
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is None:
                    continue
                role = _role_of(f"{path}.{key}", tuple(tensor.shape), layer)
                if role is None:
                    unknown.append(f"{path}.{key} {list(tensor.shape)}")
                else:
                    found.setdefault(role, []).append((holder, key))
    expected = _expected_roles(layer)
    got = {role: len(places) for role, places in found.items()}
    if unknown or got != expected:
        text = ", ".join([f"{n} x {role}" for role, n in sorted(got.items())] + unknown)
        wanted = ", ".join(f"{n} x {role}" for role, n in sorted(expected.items()))
        refuse(type(block).__qualname__, f"tensors {wanted} beside the experts", text or "none")
    dtype = experts._parameters["down_proj"].dtype
    for role in ("router", "shared_gate_up", "shared_down", "shared_gate"):
        for holder, key in found.get(role, ()):
            if holder[key].dtype != dtype:
                refuse(f"{type(block).__qualname__}: {role}", str(dtype), str(holder[key].dtype))
    return found


def _expected_roles(layer: dict[str, Any]) -> dict[str, int]:
    """How many tensors make up each role, as the model table has it."""
    router, combine = layer["router"], layer.get("combine", {})
    roles = {"router": 1}
    if router.get("logit_bias"):
        roles["router_bias"] = 1
    if router.get("selection_bias", "none") != "none":
        roles["selection_bias"] = 1
    if combine.get("shared", "none") != "none":
        roles |= {"shared_gate_up": 2, "shared_down": 1}
    if combine.get("shared_gate", "none") != "none":
        roles["shared_gate"] = 1
    return roles


def _role_of(name: str, shape: tuple[int, ...], layer: dict[str, Any]) -> str | None:
    e, h = layer["E"], layer["H"]
    if "shared" in name:
        if shape == (1, h):
            return "shared_gate"
        if name.endswith((".gate_proj.weight", ".up_proj.weight")):  # in this order in every class
            return "shared_gate_up"
        return "shared_down" if name.endswith(".down_proj.weight") else None
    if shape == (e, h):
        return "router"
    if shape in ((e,), (1, e)):
        plain = layer["router"].get("logit_bias") and name.endswith(".bias")
        return "router_bias" if plain else "selection_bias"
    return None


def _block_weights(
    experts: torch.nn.Module, around: dict[str, list[Place]]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from experts_weights(experts)
    for role, places in around.items():
        tensors = [holder[key] for holder, key in places]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        yield role, tensor.reshape(-1) if role.endswith("_bias") else tensor


# --- before anything is replaced --------------------------------------------------------------


def _check_memory(plans: list[_Plan], weights: str) -> None:
    """Refuses, with both sizes, what does not fit."""
    if not plans:
        return
    sizes = [plan.packed_bytes for plan in plans if plan.live.shelf is not None]
    need = sum(sizes) if weights == "keep" else max(sizes, default=0)
    have = available_bytes()
    if need > have:
        for plan in plans:
            plan.live.close()
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


def _own_result(block: torch.nn.Module, experts: torch.nn.Module, x: torch.Tensor) -> Any:
    """What torch's block makes of x [T,H]."""
    training, block.training = block.training, False
    experts.forward = _eager(experts)
    try:
        return block.forward(x[None])
    finally:
        block.training = training
        del experts.forward


@torch.no_grad()
def _returns_more(block: torch.nn.Module, experts: torch.nn.Module) -> bool:
    down = experts._parameters["down_proj"]
    h = down.shape[2 if experts.is_transposed else 1]
    return not isinstance(
        _own_result(block, experts, torch.zeros(1, h, dtype=down.dtype)), torch.Tensor
    )


@torch.no_grad()
def _probe(plan: _Plan) -> None:
    """Holds the packed layer against torch's block on a few tokens: the mapping of parameters to
    roles is told from shapes, and a given library may hold anybody's weights."""
    block, experts = plan.block, plan.experts
    down = experts._parameters["down_proj"]
    if down.device.type == "meta":
        return
    h = down.shape[2 if experts.is_transposed else 1]
    x = torch.randn(16, h, generator=torch.Generator().manual_seed(0)).to(down.dtype)
    if plan.whole:
        want = _own_result(block, experts, x)
        if not isinstance(want, torch.Tensor) or want.shape != x[None].shape:
            refuse(plan.name, "a block that returns its hidden states", type(want).__name__)
        want, got = want[0], plan.live.block(x)
    else:
        e = down.shape[0]
        ids = torch.arange(16)[:, None].mul(3).add(torch.arange(2)).remainder(e)
        part = torch.rand(16, 2, generator=torch.Generator().manual_seed(1)).to(down.dtype)
        want, got = _eager(experts)(x, ids, part), plan.live.experts(x, ids, part)
    error = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1).clamp_min(1e-30)
    bound = 1e-3 if down.dtype == torch.float32 else 5e-2
    # A near tie may be decided the other way in a few rows; a wrong weight shows in all of them.
    wrong = int((~(error <= bound)).sum())
    if wrong > 4:
        refuse(
            f"{plan.name}: check before replacing",
            f"results within {bound:g} of torch's",
            f"{wrong} of 16 tokens further off, by {error.max().item():.2g}",
            name="E-MISMATCH",
        )


# --- what runs afterwards ---------------------------------------------------------------------


class _Forward:
    """Stands in a module for its forward. A copy or a pickle of the module has its own again."""

    def __init__(self, function: Any, *modules: torch.nn.Module):
        self.function, self.modules = function, modules

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.function(*self.modules, *args, **kwargs)

    def __reduce__(self):
        return _own_forward, (self.modules[0],)


def _own_forward(module: torch.nn.Module) -> Any:
    return functools.partial(type(module).forward, module)


def _experts_forward(experts: torch.nn.Module, x: Any, ids: Any, weights: Any) -> torch.Tensor:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        name = experts.__dict__["_moec_name"]
        return torch.ops.moec.run(x, name, ids, weights, _anchor(experts))
    return experts.__dict__["_moec_block"].live.experts(x, ids, weights)


def _block_forward(
    block: torch.nn.Module, experts: torch.nn.Module, hidden_states: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if args or kwargs or block.training or _watched(block):
        return type(block).forward(block, hidden_states, *args, **kwargs)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        name = experts.__dict__["_moec_name"]
        return torch.ops.moec.run(hidden_states, name, None, None, _anchor(experts))
    return experts.__dict__["_moec_block"].live.block(hidden_states)


def _anchor(experts: torch.nn.Module) -> torch.Tensor | None:
    down = experts._parameters["down_proj"]
    return down if down.requires_grad and down.device.type == "cpu" else None


_NOT_INSIDE = {"hidden_states", "attentions", "cross_attentions"}


def _watched(block: torch.nn.Module) -> bool:
    """Whether anybody wants to see what happens inside the block."""
    for module in block.modules():
        if module is block:
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
