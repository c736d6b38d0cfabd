"""moec: the feed-forward layers of Mixture-of-Experts models as native libraries.

    lib = moec.compile("Mixtral-8x7B", out="mixtral.moec")
    y = lib.layers[3](x)

Importing this package needs NumPy only. What needs more is loaded when it is first used: the
runtime by `load`, the compiler, a program of its own, by `compile`.
"""

from moec.reference import reference

__all__ = ["reference"]
