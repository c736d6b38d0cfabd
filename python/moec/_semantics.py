"""What the experts of a transformers model compute: the model table, asked by class and config.

Nothing is guessed from the code of a class. The configuration goes through the same table as a
checkpoint's config.json does (`moec inspect --spec`), and a class is trusted to be what the table
says only if it is transformers' own.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any, NoReturn

from moec._moec import codes
from moec.compiler import ask_driver
from moec.errors import make_error

__all__ = ["expand_layers", "experts_spec", "refuse", "spec_of_config"]

# A library has room for this many layers of one shape. They share code, so a row costs next to
# nothing, and they share one workspace.
SLOTS = 32


def refuse(
    where: str, expected: str, got: str, hint: str = "", name: str = "E-UNSUPPORTED"
) -> NoReturn:
    """Raises a moec.Error in the usual form."""
    message = f"{name}: {where}: expected {expected}, but got {got}"
    raise make_error(codes[name], message + (f"; {hint}" if hint else ""))


def spec_of_config(config: Any) -> dict[str, Any]:
    """The *.moe.json of a transformers configuration, one entry a layer."""
    d = config.to_dict()
    d.setdefault("model_type", getattr(config, "model_type", ""))
    # The table wants a format; the caller asks for its own, the one of the live weights.
    d["dtype"] = "float32"
    d.pop("torch_dtype", None)
    return json.loads(_spec_text(json.dumps(d, sort_keys=True, default=str)))


@functools.lru_cache(maxsize=64)
def _spec_text(config: str) -> str:
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = os.path.join(folder, "config.json")
        with open(path, "w") as f:
            f.write(config)
        spec = json.loads(ask_driver("inspect", path, "--spec"))
    spec["layers"] = expand_layers(spec)
    return json.dumps(spec)


def expand_layers(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers of a *.moe.json, one entry for each index."""
    return [one for layer in spec["layers"] for one in _expand(layer)]


def _expand(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each index of a layer, with its own name."""
    indices: list[int] = []
    given = layer["index"]
    for part in given if isinstance(given, list) else [given]:
        if isinstance(part, str):
            first, last = part.split("-")
            indices += range(int(first), int(last) + 1)
        else:
            indices.append(part)
    return [{**layer, "index": i, "name": layer["name"].replace("{i}", str(i))} for i in indices]


def check_class(experts: Any) -> None:
    """Refuses experts that are not transformers' own class for their configuration."""
    where = type(experts).__qualname__
    if getattr(experts, "parametrizations", None):
        names = ", ".join(experts.parametrizations)
        refuse(
            where,
            "plain parameters",
            f"parametrized ones ({names}), as LoRA makes them",
            "merge the adapter first",
        )
    module, config = type(experts).__module__, type(experts.config).__module__
    if not module.startswith("transformers.models.") or (
        module.rpartition(".")[0] != config.rpartition(".")[0]
    ):
        refuse(
            where,
            "a class of transformers.models beside its configuration's",
            f"{module}.{where} with {type(experts.config).__qualname__}",
            "its arithmetic is not known",
        )
    if experts._is_expert_parallel:
        refuse(where, "all experts in this process", "experts distributed over processes")
    if experts.has_post_expert_norm:
        refuse(where, "experts without a norm of their own", "experts with one")


def sizes_of(experts: Any) -> tuple[int, int, int]:
    """(E, F, H) of live experts."""
    down = experts._parameters["down_proj"]
    e, a, b = down.shape
    return (e, a, b) if experts.is_transposed else (e, b, a)


def layer_of(experts: Any, index: int | None) -> dict[str, Any]:
    """The table's entry for live experts: that of decoder layer `index`, or, if the index is not
    known, the one all layers of these sizes share."""
    check_class(experts)
    e, f, h = sizes_of(experts)
    where = type(experts).__qualname__
    layers = [layer for layer in spec_of_config(experts.config)["layers"] if layer["kind"] == "moe"]
    fits = [
        layer
        for layer in layers
        if (layer["E"], layer["F"], layer["H"]) == (e, f, h) and index in (None, layer["index"])
    ]
    if not fits:
        have = sorted({(layer["E"], layer["F"], layer["H"]) for layer in layers})
        refuse(where, f"experts of E, F, H in {have}", str((e, f, h)), name="E-CONFIG")
    if len({json.dumps(expert_part(layer), sort_keys=True) for layer in fits}) > 1:
        refuse(
            where,
            "one kind of experts, or a known layer number",
            "layers of equal sizes whose experts differ",
            "call moec.transformers.prepare(model) first",
        )
    layer = fits[0]
    glu = layer["expert"].get("form", "glu") == "glu"
    if glu != experts.has_gate or bool(layer["expert"].get("bias")) != experts.has_bias:
        refuse(
            where,
            f"gate {glu} and bias {bool(layer['expert'].get('bias'))}, as in the model table",
            f"gate {experts.has_gate} and bias {experts.has_bias}",
        )
    return layer


def expert_part(layer: dict[str, Any]) -> dict[str, Any]:
    """What the routed sum depends on: not the router, nor anything around the experts."""
    apply = layer.get("combine", {}).get("apply", "output")
    part: dict[str, Any] = {key: layer[key] for key in ("H", "F", "E", "K", "expert")}
    if apply != "output":
        part["combine"] = {"apply": apply}
    return part


def experts_spec(layer: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A spec of the experts alone. The router is the simplest there is; it is never asked."""
    router = {"score": "softmax", "order": "score_then_select", "renormalize": "none"}
    slots = {"index": f"0-{SLOTS - 1}", "name": "layers.{i}", "kind": "moe", "router": router}
    return {
        "schema": 1,
        "name": "experts",
        "dtype": dtype,
        "layers": [{**expert_part(layer), **slots}],
    }


def dense_spec(layer: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A spec of dense networks. layer: H, F and expert."""
    slots = {"index": f"0-{SLOTS - 1}", "name": "layers.{i}", "kind": "dense"}
    return {"schema": 1, "name": "dense", "dtype": dtype, "layers": [{**layer, **slots}]}


def router_precision(library: Any, name: str) -> str:
    """How the router of a library's layer rounds: "f32" or "model"."""
    with open(os.path.join(library.path, "manifest.json")) as f:
        layers = expand_layers(json.load(f)["spec"])
    layer = next(layer for layer in layers if layer["name"] == name)
    return layer.get("router", {}).get("precision", "f32")


def rounds_nowhere(layer: dict[str, Any]) -> bool:
    """Whether the model's own router is in f32 all through."""
    router = layer["router"]
    in_f32 = router.get("model_arithmetic") == "cast_inputs"
    return in_f32 and router.get("weight_dtype", "model") == "f32"


def block_spec(
    layer: dict[str, Any], dtype: str, router: str, matrix: str | None = None
) -> dict[str, Any]:
    """A spec of whole blocks. router: "model": rounds as transformers' own, which in f32 is the
    same as "f32". matrix: format of the router's, if it is not the experts'."""
    body = {key: value for key, value in layer.items() if key not in ("weights", "origins")}
    if dtype != "f32" and router == "model":
        body["router"] = {**body["router"], "precision": "model"}
    if matrix not in (None, dtype):
        body["weights"] = {"router": {"format": matrix}}
    return {
        "schema": 1,
        "name": "block",
        "dtype": dtype,
        "layers": [{**body, "index": f"0-{SLOTS - 1}", "name": "layers.{i}"}],
    }
