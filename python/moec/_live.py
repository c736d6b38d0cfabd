"""Layers of a library whose weights are the live parameters of torch modules.

A `Live` packs the parameters when it is first called and again whenever they changed: at each call
it compares, for every parameter, the object, its version counter (every in-place operation that
autograd can see counts it up) and the address of its data. What that cannot see, writes through
`p.data` and through NumPy, `moec.transformers.refresh` is for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

import moec
from moec import _threads
from moec._cache import library_folder
from moec._semantics import refuse

__all__ = ["DTYPES", "Live", "take_layer"]

log = logging.getLogger("moec.transformers")

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

# (role, tensor): what moec_set_weight is given. The tensor may be a view of a parameter.
Weights = Iterator[tuple[str, torch.Tensor]]


class _Shelf:
    """Layers without weights, of one library folder, for the modules of one model.

    The layers of a library share its workspace, so a model's modules should share libraries; a
    library is opened when the layers of the one before are all in use.
    """

    def __init__(self, folder: Any, device: str):
        self.folder, self.device = folder, device
        self.free: list[moec.Layer] = []
        self.lock = threading.Lock()

    def take(self) -> moec.Layer:
        with self.lock:
            if not self.free:
                threads = _threads.executor() if self.device == "cpu" else None
                library = moec.load(self.folder, load="none", device=self.device, threads=threads)
                self.free = list(library.layers)[::-1]
            return self.free.pop()

    def give(self, layer: moec.Layer) -> None:
        layer.release_weights()
        with self.lock:
            self.free.append(layer)


# (folder, device, id of the model's configuration) -> shelf; an entry goes with its configuration.
_shelves: dict[tuple[str, str, int], _Shelf] = {}
_shelves_lock = threading.Lock()


def take_layer(spec: dict[str, Any], owner: Any, like: torch.Tensor) -> tuple[moec.Layer, _Shelf]:
    """A layer without weights of the library for `spec` on the device of the tensor `like`,
    compiled if need be. Layers taken for one owner (a configuration) share libraries."""
    device = device_of(like)
    folder = str(library_folder(spec, device))
    key = (folder, device, id(owner))
    with _shelves_lock:
        if key not in _shelves:
            _shelves[key] = _Shelf(folder, device)
            weakref.finalize(owner, _shelves.pop, key, None).atexit = False
        shelf = _shelves[key]
    return shelf.take(), shelf


def device_of(tensor: torch.Tensor) -> str:
    """As moec.load names it: "cpu" or "cuda:0"."""
    if tensor.device.type == "cpu":
        return "cpu"
    return f"cuda:{tensor.device.index or 0}"


def check_tensor(where: str, tensor: Any) -> torch.Tensor:
    """Refuses what is not a plain tensor of the CPU or a CUDA device in a format we have."""
    if tensor is None:
        refuse(where, "a parameter", "none")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        refuse(
            where,
            "a plain tensor",
            f"{type(tensor).__module__}.{type(tensor).__qualname__}",
            "distributed and quantized weights are not supported",
        )
    if tensor.dtype not in DTYPES:
        refuse(where, "float32 or bfloat16", str(tensor.dtype).removeprefix("torch."))
    if tensor.device.type == "meta":
        refuse(where, "weights in memory", "a tensor on the meta device", name="E-WEIGHTS")
    if tensor.device.type not in ("cpu", "cuda"):
        refuse(where, "weights on the CPU or a CUDA device", f"weights on {tensor.device}")
    return tensor


_lives: weakref.WeakSet[Live] = weakref.WeakSet()


class Live:
    """One layer over live parameters.

    read     () -> (role, tensor) pairs to pack
    watched  dicts (module._parameters, module._buffers) with the names whose change matters
    fixed    the layer has weights of its own, which cannot follow: a change is refused
    """

    def __init__(
        self,
        name: str,
        layer: moec.Layer,
        shelf: _Shelf | None,
        read: Callable[[], Weights],
        watched: list[tuple[dict[str, Any], str]],
        fixed: bool = False,
    ):
        self.layer, self.shelf, self.read, self.watched = layer, shelf, read, watched
        self.fixed = fixed
        self.name = layer.label = name
        # (dict, key, tensor, version, address) of what was packed; None: pack at the next call
        self.seen: list[tuple[Any, ...]] | None = None
        self.dropped: list[tuple[Any, ...]] | None = None
        self.home = torch.device("cpu")  # of what was dropped
        self.running = 0
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock)
        _lives.add(self)

    # --- what is packed -----------------------------------------------------------------------

    def rename(self, name: str) -> None:
        self.name = self.layer.label = name

    def _current(self) -> bool:
        if self.seen is None:
            return False
        for holder, key, tensor, version, address in self.seen:
            if holder.get(key) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return True

    def _pack(self) -> None:
        """Called with the lock held and nothing running."""
        if self.dropped is not None:
            return
        again = self.seen is not None
        if again and self.fixed:
            refuse(
                self.name,
                "parameters that stay as they are: the given library has weights of its own",
                "parameters that changed",
                "call moec.transformers.restore(model), then accelerate(model)",
                name="E-WEIGHTS",
            )
        self.seen = None
        seen = []
        for holder, key in self.watched:
            tensor = check_tensor(f"{self.name}.{key}", holder.get(key))
            if self.shelf is not None and device_of(tensor) != self.shelf.device:
                refuse(
                    f"{self.name}.{key}",
                    f"weights on {self.shelf.device}, where this layer was made",
                    f"weights on {device_of(tensor)}",
                    "move the model first; set_experts_implementation or accelerate after that",
                    name="E-DEVICE",
                )
            # Tensors made in inference mode count no versions.
            version = None if tensor.is_inference() else tensor._version
            seen.append((holder, key, tensor, version, tensor.data_ptr()))
        begin = time.monotonic()
        with torch.no_grad():
            for role, tensor in self.read():
                # Packed on the host, whatever the layer runs on.
                self.layer.set_weight(role, tensor.detach().cpu())
        self.seen = seen
        log.info(
            "%s: %s in %.0f ms",
            self.name,
            "weights changed, packed again" if again else "weights packed",
            1e3 * (time.monotonic() - begin),
        )

    def prepare(self) -> None:
        """Packs now what a call would pack."""
        self._enter()
        self._leave()

    def refresh(self) -> None:
        """Packs at the next call, whatever the counters say."""
        with self.lock:
            if self.dropped is None and self.seen is not None:
                self.seen = [(*entry[:4], -1) for entry in self.seen]

    # --- calls --------------------------------------------------------------------------------

    def _enter(self) -> None:
        with self.lock:
            if not self._current():
                while self.running:
                    self.idle.wait()
                if not self._current():
                    self._pack()
            self.running += 1

    def _leave(self) -> None:
        with self.lock:
            self.running -= 1
            if not self.running:
                self.idle.notify_all()

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of weights * experts, as transformers' Experts module computes it."""
        self._enter()
        try:
            return self.layer.experts(_plain(x), _plain(ids), _plain(weights))
        finally:
            self._leave()

    def block(self, x: torch.Tensor, routing: bool = False) -> Any:
        """The whole layer, router and all; routing: (y, ids, weights)."""
        self._enter()
        try:
            return self.layer(_plain(x), routing=routing)
        finally:
            self._leave()

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, weights, logits) of a layer whose router reads x alone."""
        self._enter()
        try:
            return self.layer.route(_plain(x), logits=True, router_x=_plain(x))
        finally:
            self._leave()

    # --- weights that live here alone ---------------------------------------------------------

    def drop(self) -> int:
        """Packs, then puts meta tensors in the place of the experts' matrices; their bytes."""
        self.prepare()
        with self.lock:
            assert self.seen is not None
            kept, dropped = [], []
            freed = 0
            for holder, key, tensor, version, address in self.seen:
                if tensor.dim() < 3:  # router, biases, shared experts stay: small, and torch's
                    kept.append((holder, key, tensor, version, address))
                    continue
                self.home = tensor.device
                shape = tuple(tensor.shape), tensor.dtype, tensor.requires_grad
                freed += tensor.nbytes
                ghost = torch.empty(shape[0], dtype=shape[1], device="meta")
                holder[key] = torch.nn.Parameter(ghost, requires_grad=shape[2])
                dropped.append((holder, key, *shape))
            self.dropped, self.seen = dropped, kept
        return freed

    def bring_back(self, unpack: Callable[[Live, dict[str, torch.Tensor]], None]) -> None:
        """Undoes `drop`: unpack(self, tensors by key) fills new tensors from the packed ones."""
        with self.lock:
            while self.running:
                self.idle.wait()
            if self.dropped is None:
                return
            tensors = {
                key: torch.empty(shape, dtype=dtype) for _, key, shape, dtype, _ in self.dropped
            }
            unpack(self, tensors)
            for holder, key, _, _, requires_grad in self.dropped:
                tensor = tensors.pop(key).to(self.home)
                holder[key] = torch.nn.Parameter(tensor, requires_grad=requires_grad)
            self.dropped = self.seen = None

    def close(self) -> None:
        """Gives the layer back; its packed weights are freed."""
        shelf, self.shelf = self.shelf, None
        if shelf is not None:
            shelf.give(self.layer)

    def __del__(self):
        try:
            self.close()
        except Exception:  # at the end of the interpreter anything may be gone already
            pass

    def __reduce__(self):
        # Packed weights are made anew from the parameters wherever the module arrives.
        if self.dropped is not None:
            refuse(
                f"{self.name}: pickle or copy",
                "weights that torch has",
                "weights that were dropped",
                "call moec.transformers.restore(model) first",
                name="E-ARGUMENT",
            )
        return _nothing, ()


def _nothing() -> None:
    """What a pickled or copied Live becomes: its module makes another when it is called."""


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _after_fork() -> None:
    """In the child: a lock another thread of the parent held would stay locked for ever."""
    global _shelves_lock
    _shelves_lock = threading.Lock()
    for shelf in list(_shelves.values()):
        shelf.lock = threading.Lock()
    for live in list(_lives):
        if live.lock.locked():
            live.seen = None if live.dropped is None else live.seen
        live.running = 0
        live.lock = threading.Lock()
        live.idle = threading.Condition(live.lock)


os.register_at_fork(after_in_child=_after_fork)
