"""A quick look at the module of test/Runtime through Python, without torch: exits with 1 and a
sentence at the first number that is wrong. test_faults.py runs it on runtimes with a mistake.

    python probe.py FOLDER_WITH_LIBMOCK
"""

import sys

import moec
import numpy as np
from moec.reference import reference, round_bf16

SPEC = {"kind": "moe", "H": 40, "F": 23, "E": 5, "K": 2, "expert": {"activation": "relu"}}


def bits(a):
    """The bits of bfloat16 of values that have one."""
    return (np.asarray(a, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def main(folder):
    rng = np.random.default_rng(0)
    weights = {
        "router": rng.standard_normal((5, 40), np.float32) / 4,
        "gate_up": rng.standard_normal((5, 46, 40), np.float32) / 6,
        "down": rng.standard_normal((5, 40, 23), np.float32) / 4,
    }
    ref = reference(SPEC, weights)
    x = round_bf16(rng.standard_normal((29, 40))).astype(np.float32)
    wrong = []

    def check(what, y, exact, bound=2e-6):
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        if not error <= bound:
            wrong.append(f"{what}: {error}")

    for what, options in {
        "one thread": {"threads": 1},
        "two threads": {"threads": 2},
        "no gang": {"threads": moec.Serial(3)},
        "chunks": {"threads": 1, "max_tokens": 4},
    }.items():
        layer = moec.load(folder, load="none", **options).layers[0]
        for role, weight in weights.items():
            layer.set_weight(role, weight)
        y = layer(x, out=np.full_like(x, np.nan))
        check(what, y, ref(x))
        idx, w = layer.route(x)
        exact = ref.routing(x)
        if not (idx == exact.experts).all():
            wrong.append(f"{what}: ids")
        check(f"{what}: weights", w, exact.weights)
        ids = rng.integers(-1, 5, (29, 6))[:, 1:4]  # with a row stride
        w = round_bf16(rng.random((29, 3))).astype(np.float32)
        expected = ref.experts(x, ids, w)
        check(f"{what}: experts", layer.experts(x, ids, w), expected)
        check(f"{what}: bf16 weights", layer.experts(x, ids, bits(w)), expected)
        check(f"{what}: i32", layer.experts(x, ids.astype(np.int32), w), expected)
        check(f"{what}: accumulate", layer(x, out=x + 1, accumulate=True), x + 1 + ref(x))
        if not np.array_equal(layer(bits(x)), bits(round_bf16(y))):
            wrong.append(f"{what}: bf16")
    sys.exit("\n".join(wrong) if wrong else 0)


main(sys.argv[1])
