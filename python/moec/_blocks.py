"""What a block of a transformers model has beside its experts: the tensors of its router and shared
expert by role, and dense networks that the decoder layer holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moec._semantics import refuse, spec_of_config
from moec._views import experts_weights

__all__ = ["Place", "around", "beside", "block_weights", "dense_weights", "own_part", "router_of"]

# Where a tensor is held: (module._parameters or module._buffers, key).
Place = tuple[dict[str, Any], str]


def own_part(block: torch.nn.Module, layer: dict[str, Any]) -> dict[str, Any]:
    """Without the shared expert where that is not the block's own: granitemoeshared's is a child of
    the decoder layer."""
    if not _shares(layer) or any("shared" in path for path, _ in block.named_modules()):
        return layer
    combine = layer["combine"]
    rest = {key: value for key, value in combine.items() if not key.startswith("shared")}
    return {**layer, "combine": rest}


def _shares(layer: dict[str, Any]) -> bool:
    return layer.get("combine", {}).get("shared", "none") != "none"


def router_of(block: torch.nn.Module) -> torch.nn.Module | None:
    """The router of a block whose experts do not read what it reads (gemma4): a child of the same
    decoder layer."""
    return getattr(block, "router", None)


def around(
    block: torch.nn.Module, experts: torch.nn.Module, layer: dict[str, Any]
) -> dict[str, list[Place]]:
    """The block's tensors besides the experts' own, by role. They are told apart by shape and name,
    and every one must be understood; whether rightly, the check before replacing finds out."""
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
    _check_dtypes(type(block).__qualname__, found, experts._parameters["down_proj"].dtype, layer)
    return found


def _check_dtypes(
    where: str, found: dict[str, list[Place]], dtype: torch.dtype, layer: dict[str, Any]
) -> None:
    """The formats under which a block rounds as the model table has it."""
    wanted = {role: [dtype] for role in ("shared_gate_up", "shared_down", "shared_gate")}
    arithmetic = layer["router"].get("model_arithmetic")
    wanted["router"] = [dtype, torch.float32] if arithmetic == "cast_inputs" else [dtype]
    if "HunYuan" in where:  # casts its inputs only if its matrix is f32
        wanted["router"] = [torch.float32]
    if arithmetic == "model_dtype":
        wanted["selection_bias"] = [torch.float32]
    for role, formats in wanted.items():
        for holder, key in found.get(role, ()):
            if holder[key].dtype not in formats:
                text = " or ".join(map(str, formats))
                refuse(f"{where}: {role}", text, str(holder[key].dtype))


def _expected_roles(layer: dict[str, Any]) -> dict[str, int]:
    """How many tensors make up each role, as the model table has it."""
    router, combine = layer["router"], layer.get("combine", {})
    roles = {"router": 1}
    if router.get("logit_bias"):
        roles["router_bias"] = 1
    if router.get("selection_bias", "none") != "none":
        roles["selection_bias"] = 1
    if router.get("input") == "rms_norm":
        roles["router_scale"] = 1
    if router.get("scale") == "per_expert":
        roles["per_expert_scale"] = 1
    if _shares(layer):
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
    if name.endswith("scale"):
        return {(e,): "per_expert_scale", (h,): "router_scale"}.get(shape)
    if shape == (e, h):
        return "router"
    if shape in ((e,), (1, e)):
        plain = layer["router"].get("logit_bias") and name.endswith(".bias")
        return "router_bias" if plain else "selection_bias"
    return None


def block_weights(
    experts: torch.nn.Module, around: dict[str, list[Place]]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from experts_weights(experts)
    for role, places in around.items():
        tensors = [holder[key] for holder, key in places]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        yield role, tensor.reshape(-1) if role.endswith(("_bias", "_scale")) else tensor


# --- dense networks that the decoder layer holds --------------------------------------------------

# Names of their matrices in transformers' classes: gate and up in one, or apart.
_DENSE = (
    {"gate_up": "input_linear", "down": "output_linear"},
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
)


def beside(
    model: torch.nn.Module, name: str, experts: torch.nn.Module, layer: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Place]] | None:
    """(name, layer of a spec, places by role) of the dense network that the decoder layer adds to
    the block `name`: a shared expert outside of it (granitemoeshared), or gemma4's parallel one.
    None where there is none, or it is not transformers' own, plain one: then it stays torch's."""
    if layer["router"].get("router_x"):
        path, dense = f"{name}.mlp", _parallel(experts, layer)
    elif _shares(layer) and own_part(model.get_submodule(name), layer) is not layer:
        holder = name.rpartition(".")[0]
        path = f"{holder}.shared_mlp"
        kept = {key: layer["expert"][key] for key in ("form", "activation")}
        dense = {"H": layer["H"], "F": layer["combine"]["shared_width"], "expert": kept}
    else:
        return None
    module = dict(model.named_modules()).get(path)
    if dense is None or type(module).__module__ != type(experts).__module__:
        return None
    roles = next((r for r in _DENSE if all(hasattr(module, n) for n in r.values())), None)
    if roles is None:
        return None
    linears = {role: getattr(module, child) for role, child in roles.items()}
    plain = all(type(one) is torch.nn.Linear and one.bias is None for one in linears.values())
    dtype = experts._parameters["down_proj"].dtype
    if not plain or any(one.weight.dtype != dtype for one in linears.values()):
        return None
    if sum(p.numel() for p in module.parameters()) != 3 * dense["H"] * dense["F"]:
        return None
    return path, dense, {role: (one._parameters, "weight") for role, one in linears.items()}


def _parallel(experts: torch.nn.Module, layer: dict[str, Any]) -> dict[str, Any] | None:
    """The table's dense layer of the same number."""
    for other in spec_of_config(experts.config)["layers"]:
        if other["kind"] == "dense" and other["index"] == layer["index"]:
            return {key: other[key] for key in ("H", "F", "expert")}
    return None


def dense_weights(places: dict[str, Place]) -> Iterator[tuple[str, torch.Tensor]]:
    for role, (holder, key) in places.items():
        yield role, holder[key][None]
