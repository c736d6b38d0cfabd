"""One peer in a process of its own: answers "run n calls of T tokens", one JSON line each.

    python serve.py PEER '{"H": …, "F": …, …}'

A process for each, so that thread pools do not disturb each other; blocks of the processes take
turns (run.py), so that whatever else the machine does meets all of them. The protocol:

    <- {"ready": true, "name": …, "version": …, "note": …}   or {"absent": why, "install": how}
    -> {"tokens": 64, "calls": 3}    <- {"seconds": per call, "calls": 3}
    -> {"tokens": 4, "check": path}  <- {"done": true}       writes y of the first input as .npy
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from layer import Layer


class Absent(Exception):
    """This peer cannot run here: why, and the command that installs it."""


def main() -> int:
    # Libraries print on stdout as they like; the protocol keeps a copy of it for itself.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields):
        channel.write(json.dumps(fields) + "\n")
        channel.flush()

    name, run = sys.argv[1], json.loads(sys.argv[2])
    layer = Layer(run)
    try:
        module = importlib.import_module("peers." + run["module"])
        peer = module.Peer(name, layer, run)
    except Absent as why:
        answer(absent=str(why.args[0]), install=why.args[1] if len(why.args) > 1 else "")
        return 0
    except Exception as error:  # a peer that fails is reported, the others go on
        answer(absent=f"{type(error).__name__}: {error}"[:300], install="")
        return 0
    answer(ready=True, version=peer.version, note=getattr(peer, "note", ""))

    prepared = {}
    for line in sys.stdin:
        request = json.loads(line)
        tokens = request["tokens"]
        if tokens not in prepared:
            prepared[tokens] = [peer.prepare(*item) for item in layer.inputs(tokens)]
        inputs = prepared[tokens]
        if "check" in request:
            np.save(request["check"], np.asarray(peer.run(inputs[0], 0), dtype=np.float32))
            answer(done=True)
            continue
        calls, first = request["calls"], request.get("first", 0)
        begin = time.perf_counter()
        for number in range(first, first + calls):
            peer.run(inputs[number % len(inputs)], number % layer.banks, keep=False)
        answer(seconds=(time.perf_counter() - begin) / calls, calls=calls)
    return 0


if __name__ == "__main__":
    # Peers raise the Absent of this module, not of a second copy of it.
    sys.modules["serve"] = sys.modules["__main__"]
    sys.exit(main())
