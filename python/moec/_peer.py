"""transformers' own blocks of a checkpoint, for moec.verify."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from moec._memory import available_bytes, size_text

__all__ = ["Peer", "open_peer"]


def open_peer(folder: str, disk_bytes: int) -> Peer | str:
    """transformers' model of a checkpoint, or why there is none."""
    try:
        import torch
        import transformers
        from transformers.utils import logging
    except ImportError as cause:
        return f"not installed ({cause.name})"
    # What is stored in fewer bits is decoded to bf16 by transformers, too.
    need, have = 2 * disk_bytes, available_bytes()
    if need > have:
        return f"left out: the model needs {size_text(need)}, and {size_text(have)} are free"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = transformers.AutoModelForCausalLM
        if type(config) not in kind._model_mapping:
            kind = transformers.AutoModelForImageTextToText
        model = kind.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            experts_implementation="eager",
        )
    except Exception as cause:  # whatever it meets in a file or a configuration
        return f"left out: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
    return Peer(model.eval().requires_grad_(False), transformers.__version__, torch)


class Peer:
    """A model of transformers whose blocks can be asked one by one."""

    def __init__(self, model: Any, version: str, torch: Any):
        self.model, self.version, self.torch = model, version, torch
        self.names = dict(model.named_modules())

    def bf16(self, x: np.ndarray) -> Any:
        return self.torch.from_numpy(x).bfloat16()

    def _module(self, name: str) -> Any:
        for spelling in (name, name.replace("model.language_model.", "model."), f"model.{name}"):
            if spelling in self.names:
                return self.names[spelling]
        return None

    def block(self, name: str, dense: bool, shared: bool) -> Block | None:
        """The block of a layer; None where transformers has it in another place."""
        module = self._module(name)
        if module is None:
            return None
        experts = module if hasattr(type(module), "_apply_gate") else None
        if experts is None and not dense:
            experts = getattr(module, "experts", None)
            if not hasattr(type(experts), "_apply_gate"):
                experts = None  # of another form: it can only be asked with its router
        whole = module is not experts
        if shared and not any("shared" in path for path, _ in module.named_modules()):
            whole = False  # the shared expert is somebody else's child
        return Block(self.torch, module if whole else None, experts)


class Block:
    """whole: gives y [T,H]; experts: gives y with routing given. Either may be absent."""

    def __init__(self, torch: Any, whole: Any, experts: Any):
        self.torch, self._whole, self._experts = torch, whole, experts

    def _copy(self, module: Any, dtype: str) -> Any:
        torch = self.torch
        wanted = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        if all(p.dtype == wanted for p in module.parameters()):
            return module
        need = sum(p.numel() for p in module.parameters()) * wanted.itemsize
        return copy.deepcopy(module).to(wanted) if need < available_bytes() else None

    def _call(self, module: Any, dtype: str, x: np.ndarray, *given: np.ndarray) -> Any:
        torch = self.torch
        module = self._copy(module, dtype)
        if module is None:
            return None
        wanted = next(module.parameters()).dtype
        x = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(wanted)
        with torch.no_grad():
            if given:
                ids, weights = (torch.from_numpy(np.ascontiguousarray(a)) for a in given)
                y = module(x, ids.long(), weights.float())
            else:
                y = module(x[None])
        y = y[0] if isinstance(y, tuple) else y
        return y.reshape(x.shape).double().numpy()

    def whole(self, x: np.ndarray) -> np.ndarray | None:
        """In f32: what the block computes, not how it rounds."""
        return None if self._whole is None else self._call(self._whole, "f32", x)

    def experts(self, x: np.ndarray, ids: np.ndarray, w: np.ndarray, dtype: str) -> Any:
        """In the library's own type."""
        return None if self._experts is None else self._call(self._experts, dtype, x, ids, w)

    def dense(self, x: np.ndarray, dtype: str) -> np.ndarray | None:
        return None if self._whole is None else self._call(self._whole, dtype, x)
