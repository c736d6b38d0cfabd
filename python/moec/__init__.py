"""moec: the feed-forward layers of Mixture-of-Experts models as native libraries.

    lib = moec.compile("Mixtral-8x7B", out="mixtral.moec")
    lib = moec.load("mixtral.moec")
    y = lib.layers[3](x)                        # NumPy or torch in, the same out
    idx, w = lib.layers[3].route(x)
    y = lib.layers[3].experts(x, idx, w)
    y = moec.reference(spec, weights)(x)        # float64 NumPy, to compare with

Importing this package needs NumPy only. What needs more is loaded when it is first used: the
runtime by `load`, the compiler, a program of its own, by `compile`.
"""

from moec.errors import Error
from moec.reference import reference

__version__ = "0.1.0"
__all__ = ["Error", "Layer", "Library", "Pool", "Serial", "compile", "load", "reference", "trace"]

_LAZY = {
    "load": "moec.library",
    "trace": "moec.tracing",
    "compile": "moec.compiler",
    "Library": "moec._moec",
    "Layer": "moec._moec",
    "Pool": "moec._moec",
    "Serial": "moec._moec",
}


def __getattr__(name):
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'moec' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
