"""Every layer of a compiled model against the float64 reference and transformers.

    moec verify mixtral.moec --against Mixtral-8x7B
    python -m moec.verify mixtral.moec --against mymodule:layer

The checkpoint is read anew, by NumPy alone; each layer of the library runs on seeded tokens, and
what comes out is held against `moec.reference` in float64. Where transformers is installed and the
model fits in memory, its blocks are held against the same numbers: their errors are the measure of
what is a good one. A function is called as function(name, x) with x float32 [T,H]; what it returns
counts as exact.

Two questions are asked of a MoE layer. Which experts did it choose: sets are compared for every
token whose choice is not within rounding (the others are counted, not hidden). And what did it
compute: with the routing given, such that every expert serves, and as a whole with its own choice.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

import moec
from moec._checkpoint import Checkpoint
from moec._moec import codes
from moec._peer import Peer, open_peer
from moec._semantics import rounds_nowhere, router_precision
from moec._verification import LayerResult, Verification
from moec.errors import Error, make_error
from moec.reference import Reference, round_bf16

__all__ = ["LayerResult", "Verification", "verify"]

_DRAWS = 16  # perturbed routers by which near ties are found


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str],
    *,
    tokens: int = 64,
    seed: int = 0,
    layers: str = "all",
    weights: str | os.PathLike[str] | None = None,
    cpu_level: str | None = None,
    threads: Any = None,
    transformers: bool = True,
    options: tuple[str, ...] = (),
    progress: Any = None,
) -> Verification:
    """Compares the layers of a compiled model.

    path          what `moec compile` wrote
    against       a checkpoint folder, a .safetensors file, or "module:function"
    layers        numbers of decoder layers, as "0,3-5"
    transformers  False: do not ask it, even if it is installed
    options       of `moec inspect`, as ("--follow-links",)
    progress      called as progress(layers done, layers in all)

    A layer that differs is in the result (`.ok` is false); an exception is what could not be
    compared at all.
    """
    if tokens < 1:
        _refuse("E-ARGUMENT", "--tokens", "at least 1", str(tokens))
    path, against = os.fspath(path), os.fspath(against)
    library = moec.load(path, weights=weights, cpu_level=cpu_level, threads=threads)
    chosen = _choose(list(library.layers), layers)
    source = _Function(against) if _is_function(against) else _Model(path, against, options)
    peer: Peer | str = "not asked"
    if transformers and isinstance(source, _Model):
        peer = source.peer()
    info = chosen[0].info
    result = Verification(path, against, tokens, seed, info.level, info.compute, "")
    result.transformers = peer.version if isinstance(peer, Peer) else peer
    for number, layer in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen))
        result.layers.append(_check(layer, source, peer, tokens, seed))
    return result


def _refuse(name: str, where: str, expected: str, got: str, hint: str = "") -> Any:
    message = f"{name}: {where}: expected {expected}, but got {got}"
    raise make_error(codes[name], message + (f"; {hint}" if hint else ""))


def _choose(layers: list[Any], text: str) -> list[Any]:
    if text == "all":
        return layers
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            _refuse("E-ARGUMENT", "--layers", "numbers and ranges such as `0,3-5`", f"`{text}`")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    missing = numbers - {layer.index for layer in layers}
    if missing:
        have = ", ".join(str(n) for n in sorted({layer.index for layer in layers}))
        _refuse("E-ARGUMENT", "--layers", f"layers of the library ({have})", str(min(missing)))
    return [layer for layer in layers if layer.index in numbers]


# --- what is compared with ----------------------------------------------------------------------


def _is_function(against: str) -> bool:
    return not os.path.exists(against) and re.fullmatch(r"[\w.]+:[\w.]+", against) is not None


class _Function:
    """The user's own: function(name, x) -> y."""

    def __init__(self, text: str):
        module, _, name = text.partition(":")
        self.text = text
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as cause:
            _refuse(
                "E-ARGUMENT", "--against", "a checkpoint, or a function of a module", str(cause)
            )
        self.function = found

    def exact(self, name: str, x: np.ndarray) -> np.ndarray:
        y = self.function(name, x)
        y = y.detach().double().cpu().numpy() if hasattr(y, "detach") else np.asarray(y, float)
        if y.shape != x.shape:
            _refuse("E-SHAPE", f"{self.text}({name!r}, x)", str(list(x.shape)), str(list(y.shape)))
        return y


class _Model:
    """A checkpoint: what its layers are by the model table, and its weights."""

    def __init__(self, path: str, against: str, options: tuple[str, ...]):
        from moec._semantics import expand_layers
        from moec.compiler import ask_driver

        if not os.path.exists(against):
            _refuse("E-IO", "--against", "a checkpoint, or module:function", f"`{against}`")
        with open(os.path.join(path, "manifest.json")) as f:
            self.manifest = json.load(f)
        self.path = against
        # Weights alone, without a configuration: the library says what they are.
        config = os.path.join(against, "config.json")
        spec = self.manifest["spec"]
        if os.path.exists(config):
            spec = json.loads(ask_driver("inspect", against, "--spec", *options))
        self.layers = {layer["name"]: layer for layer in expand_layers(spec)}
        self.checkpoint = Checkpoint(against)
        self.formats = {}
        for layer in self.manifest["layers"]:
            code = self.manifest["code"][layer["code"]]
            self.formats[layer["name"]] = {w["role"]: w["format"] for w in code["weights"]}

    def peer(self) -> Peer | str:
        if not os.path.exists(os.path.join(self.path, "config.json")):
            return "left out: no config.json"
        return open_peer(self.path, self.checkpoint.bytes)

    def reference(self, name: str) -> Reference:
        layer = self.layers[name]
        weights = self.checkpoint.weights(layer, self.formats[name])
        return moec.reference(layer, weights)


# --- one layer ----------------------------------------------------------------------------------


def _check(layer: Any, source: Any, peer: Peer | str, tokens: int, seed: int) -> LayerResult:
    info = layer.info
    result = LayerResult(layer.name, layer.kind, tokens)
    random = np.random.default_rng([seed, layer.index])
    bf16 = info.compute == "bf16"

    def draw() -> np.ndarray:
        x = random.standard_normal((tokens, info.H)).astype(np.float32)
        return round_bf16(x).astype(np.float32) if bf16 else x

    def run(call: Any, x: np.ndarray, *given: Any, **more: Any) -> np.ndarray:
        """In bf16 tensors where there is torch, as a model would; NumPy has no such type."""
        if bf16 and isinstance(peer, Peer):
            x, more = peer.bf16(x), {key: peer.bf16(value) for key, value in more.items()}
            return call(x, *map(peer.torch.from_numpy, given), **more).double().numpy()
        return np.asarray(call(x, *given, **more), float)

    x = draw()
    if isinstance(source, _Function):
        result.bound = _bound(info, None, None)
        _judge(result, run(layer, x), source.exact(layer.name, x), "the whole layer")
        return result
    if layer.name not in source.layers:
        names = ", ".join(source.layers)
        result.problems.append(f"{source.path} has no such layer ({names})")
        return result
    spec = source.layers[layer.name]
    wrong = [
        f"{key} {getattr(info, key)}, there {spec[key]}"
        for key in ("H", "F", "E", "K")
        if key in spec and spec[key] != getattr(info, key)
    ]
    if spec["kind"] != layer.kind or wrong:
        result.problems.append(f"another layer: {layer.kind} {', '.join(wrong)}")
        return result
    ref = source.reference(layer.name)
    shared = spec.get("combine", {}).get("shared", "none") != "none"
    block = None
    if isinstance(peer, Peer):
        block = peer.block(layer.name, layer.kind == "dense", shared)
    if layer.kind == "dense":
        exact = ref(x)
        own = block and block.dense(x, info.compute)
        result.transformers = None if own is None else _relative(own, exact)
        result.bound = _bound(info, result.transformers, exact)
        _judge(result, run(layer, x), exact, "the layer")
        return result

    # The router, on tokens of its own where the layer has it so.
    r = draw() if "router_x" in info.needs else x
    more = {"router_x": r} if "router_x" in info.needs else {}
    precision = router_precision(layer.library, layer.name)
    rounds = bf16 and precision == "model" and not rounds_nowhere(spec)
    rounding = {"router": {**ref.spec["router"], "precision": "model"}} if rounds else {}
    router = Reference({**ref.spec, **rounding}, ref.weights, "bf16" if rounding else "none")
    ids, weights, near = _check_routing(result, layer, router, x, r, more)

    # The experts: these tokens as they were routed, and others such that every expert serves.
    slots = max(tokens, -(-info.E // info.K))
    spread = (np.arange(slots * info.K) % info.E).reshape(slots, info.K)
    given_x = np.concatenate([x, np.resize(x[::-1], (slots, info.H))])
    given_ids = np.concatenate([ids, spread.astype(np.int32)])
    part = random.uniform(0.1, 1, (slots, info.K)).astype(np.float32)
    given_w = np.concatenate([weights, part])
    exact = ref.experts(given_x, given_ids, given_w)
    own = block and block.experts(given_x, given_ids, given_w, info.compute)
    result.transformers = None if own is None else _relative(own, exact)
    result.bound = _bound(info, result.transformers, exact)
    result.experts = _relative(run(layer.experts, given_x, given_ids, given_w), exact)
    if not result.experts <= result.bound:
        result.problems.append(f"experts: error {result.experts:.1e} above {result.bound:.1e}")
    if result.transformers is not None and not result.transformers <= (3e-2 if bf16 else 1e-4):
        result.problems.append(f"transformers' experts are {result.transformers:.1e} off")

    # The whole layer, by its own choice.
    whole = ref.given(x, ids, weights)
    _judge(result, run(layer, x, **more), whole, "the whole layer")

    # What the block is, by transformers: in f32, where no choice is within rounding.
    own = block and not more and block.whole(x)
    if isinstance(own, np.ndarray) and not near.all():
        error = _relative(own[~near], ref(x)[~near])
        if not error <= 1e-4:
            result.problems.append(f"transformers' block is {error:.1e} off the reference")
    return result


def _check_routing(
    result: LayerResult,
    layer: Any,
    ref: Reference,
    x: np.ndarray,
    r: np.ndarray,
    more: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, weights) of the library, and which tokens' choice is within rounding.

    A logit is a sum of H products; rounded sums are as good as exact ones of slightly other
    weights. So the reference is asked again with routers that are that much off: where its choice
    changes, either is right, and its weights move as far as they may. f32 sums of coherent terms
    are off by up to sqrt(H) / 2 roundings of their size.
    """
    ids, weights = layer.route(x, **more)
    exact = ref.routing(r)
    rounds = ref.rounding == "bf16"  # as the model's own code does
    unit = 2.0**-11 if rounds else 2.0**-24
    router = ref._weight("router")
    size = unit * max(4.0, math.sqrt(router.shape[1]) / 2)
    size *= np.linalg.norm(router, axis=1).max()
    random = np.random.default_rng(0)
    want = np.sort(exact.experts, -1)
    with np.errstate(invalid="ignore"):
        # Scores that f32 cannot tell apart.
        largest = np.abs(np.where(np.isfinite(exact.scores), exact.scores, 0)).max(-1)
        near = ~(exact.gap > 4 * 2.0**-24 * largest)
    ours, theirs = _scatter(ids, weights, router), _scatter(exact.experts, exact.weights, router)
    slack = (2.0**-8 if rounds else 2e-6) * np.abs(theirs)
    for _ in range(_DRAWS):
        other = {**ref.weights, "router": router + size * random.standard_normal(router.shape)}
        moved = Reference(ref.spec, other, ref.rounding).routing(r)
        near |= (np.sort(moved.experts, -1) != want).any(-1)
        change = np.abs(_scatter(moved.experts, moved.weights, router) - theirs)
        slack = np.maximum(slack, 4 * change)
    clear = ~near
    same = (np.sort(ids, -1) == want).all(-1)
    result.near, result.same = int(near.sum()), int((same & clear).sum())
    if (clear & ~same).any():
        result.problems.append(f"routing: {int((clear & ~same).sum())} tokens chose others")
    off = (np.abs(ours - theirs) > slack) & (clear & same)[:, None]
    if off.any():
        worst = np.abs(ours - theirs)[off].max()
        result.problems.append(f"weights of {int(off.any(-1).sum())} tokens off by {worst:.1e}")
    return ids, weights, near


def _scatter(ids: np.ndarray, weights: np.ndarray, router: np.ndarray) -> np.ndarray:
    out = np.zeros((len(ids), len(router)))
    np.put_along_axis(out, ids.astype(np.int64), np.asarray(weights, float), -1)
    return out


def _relative(a: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(a - exact) / max(np.linalg.norm(exact), 1e-300))


def _bound(info: Any, theirs: float | None, exact: np.ndarray | None) -> float:
    """The project's bound (docs/measuring.md): theirs is transformers' own error."""
    if info.compute == "f32":
        bound = max(2e-6, 4e-8 * math.sqrt(max(info.H, info.F, info.S)))
        return bound if theirs is None else min(bound, max(4 * theirs, 5e-7))
    if theirs is None:
        return 6 * 2.0**-9
    return 1.5 * max(theirs, _relative(round_bf16(exact), exact))


def _judge(result: LayerResult, y: np.ndarray, exact: np.ndarray, what: str) -> None:
    """Error of the whole layer, and of the token that is furthest off."""
    result.whole = _relative(y, exact)
    size = np.linalg.norm(exact, axis=-1)
    error = np.linalg.norm(y - exact, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result.worst = float((error / np.where(size > 0, size, 1)).max())
    if not result.whole <= result.bound:
        result.problems.append(f"{what}: error {result.whole:.1e} above {result.bound:.1e}")


# --- the command --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        _refuse("E-ARGUMENT", "moec verify", "options as --help lists them", message)


def _parser() -> argparse.ArgumentParser:
    p = _Parser("moec verify", description="Compare every layer with the reference in float64.")
    p.add_argument("dir", metavar="DIR", help="what moec compile wrote")
    p.add_argument("--against", required=True, metavar="CHECKPOINT|MODULE:FUNCTION")
    p.add_argument("--layers", default="all", metavar="all|0,3-5")
    p.add_argument("--tokens", type=int, default=64, metavar="T")
    p.add_argument("--seed", type=int, default=0, metavar="S")
    p.add_argument("--weights", metavar="WEIGHTS", help="another folder of packed weights")
    p.add_argument("--threads", type=int, metavar="N")
    p.add_argument("--no-transformers", action="store_true", help="do not ask transformers")
    p.add_argument("-o", dest="form", choices=("md", "json"), default="md", metavar="md|json")
    p.add_argument("--follow-links", action="store_true")
    p.add_argument("--model-rows", action="append", default=[], metavar="FILE|DIR")
    p.add_argument("--quiet", action="store_true", help="no progress")
    p.add_argument("--log", choices=("text", "json"), default="text", metavar="text|json")
    return p


def main(arguments: list[str] | None = None) -> int:
    """The exit code, as the driver's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Errors in the options are reported in the form the options ask for.
    pairs = itertools.pairwise(arguments)
    as_json = "--log=json" in arguments or ("--log", "json") in pairs
    try:
        return _run(_parser().parse_args(arguments))
    except Error as error:
        _report(error, as_json)
        return _exit_code(error.code)


def _run(a: argparse.Namespace) -> int:
    drawn = None if a.quiet or a.log == "json" or not sys.stderr.isatty() else _draw
    options = ["--follow-links"] if a.follow_links else []
    for rows in a.model_rows:
        options += ["--model-rows", rows]
    result = verify(
        a.dir,
        a.against,
        tokens=a.tokens,
        seed=a.seed,
        layers=a.layers,
        weights=a.weights,
        threads=a.threads,
        transformers=not a.no_transformers,
        options=tuple(options),
        progress=drawn,
    )
    if drawn is not None:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    try:
        sys.stdout.write(result.json() if a.form == "json" else result.table())
        sys.stdout.flush()
    except OSError as cause:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to fail at exit
        if not isinstance(cause, BrokenPipeError):
            full = cause.errno in (28, 122)
            _refuse(
                "E-SPACE" if full else "E-IO", "stdout", "all bytes to be written", cause.strerror
            )
    if result.ok:
        return 0
    bad = [layer.layer for layer in result.layers if not layer.ok]
    _refuse(
        "E-MISMATCH",
        a.dir,
        f"{len(result.layers)} layers as in {a.against}",
        f"{len(bad)} that differ: {', '.join(bad)}",
    )
    return 7


def _draw(done: int, total: int) -> None:
    print(f"\r\033[Kverifying layer {done + 1} of {total}", end="", file=sys.stderr, flush=True)


def _exit_code(code: int) -> int:
    return {1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 7: 7}.get(code // 100, 70)


def _report(error: Error, as_json: bool) -> None:
    if not as_json:
        print(error, file=sys.stderr)
        return
    fields = ("code", "name", "where", "expected", "got", "hint")
    event = {"event": "error", **{key: getattr(error, key) for key in fields}}
    print(json.dumps({**event, "message": str(error)}), file=sys.stderr)


if __name__ == "__main__":
    # Nothing is written that would have to be cleaned up: Ctrl-C ends the process at once, in the
    # middle of a large product, too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
