"""Interrupts `moec compile` at different times and looks at what is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

folder, model = Path(sys.argv[1]), sys.argv[2]
os.chdir(folder)
# Large enough that packing takes a moment: 1 layer of 8 experts, 0.5 GB in all.
config = json.load(open(model)) | {"hidden_size": 2048, "intermediate_size": 4096}
config |= {"num_local_experts": 8, "num_hidden_layers": 1}
Path("big.json").write_text(json.dumps(config))
command = ["moec", "compile", "big.json", "--checkpoint", "random:1", "-o", "a.moec"]


def names():
    return sorted(p.name for p in folder.iterdir() if p.name not in ("big.json", "err"))


def heed():
    """A runner in the background may have told us to ignore interrupts; the tool would as well."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start():
    return subprocess.Popen(command, stderr=open("err", "w"), preexec_fn=heed)


def stage():
    found = list(folder.glob(".a.moec.moec-tmp-*"))
    return found[0] if found else None


def wait_for_weights(process):
    """Until the first weight file is being written."""
    for _ in range(20000):
        if stage() and list(stage().glob("output/weights/*.safetensors")):
            return
        assert process.poll() is None, Path("err").read_text()
        time.sleep(0.005)
    raise AssertionError("expected packing to begin within 100 s")


for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
    for early in (True, False):
        process = start()
        if early:
            time.sleep(0.05)
        else:
            wait_for_weights(process)
        begin = time.monotonic()
        process.send_signal(number)
        # Before main has begun there is nobody to turn the signal into an exit code.
        codes = (code, -number) if early else (code,)
        assert process.wait() in codes, (process.returncode, code)
        assert time.monotonic() - begin < 2
        assert names() == [], names()

process = start()
wait_for_weights(process)
second = subprocess.run(command, stderr=subprocess.PIPE, text=True)
assert second.returncode == 5 and "E-LOCKED" in second.stderr, second
process.kill()
process.wait()
left = stage()
assert left is not None
# The child dies with its parent; then the lock is free and the next run removes the rest.
again = subprocess.run([*command, "--quiet"])
assert again.returncode == 0 and names() == ["a.moec"], names()
