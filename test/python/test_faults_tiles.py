"""Planted faults in the code of tiles (AMX), whose instructions are executed in software: IR after
`kernels` with one mistake, against the check of moe-amx-run (see test_faults.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import LEVELS, moec_command

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build")) / "bin/moe-amx-run"
LEVEL_NAMES = "x86-64-v4,amx-bf16"

pytestmark = [
    pytest.mark.skipif("x86-64-v4" not in LEVELS, reason="the code around tiles is AVX-512"),
    pytest.mark.skipif("amx-bf16" in LEVELS, reason="this processor executes the tiles itself"),
]

# (what went wrong, functions, pattern, replacement). Layers of 17 to 131 rows for an expert.
FAULTS = [
    (
        "leaves 28 of the 32 rows of the block before",
        r"moe_gemm_amx_r32_.*_defer\d_.*blocked2",
        r"(%c32_i64 = arith\.constant )32( : i64)",
        r"\g<1>28\2",
    ),
    (
        "takes the sums of the block itself for those of the block before",
        r"moe_gemm_amx_r32_.*_defer\d_.*blocked2",
        r"llvm\.getelementptr (%\w+)\[-4096\]",
        r"llvm.getelementptr \1[0]",
    ),
    (
        "forgets the sums of earlier steps",
        r"moe_gemm_amx_r32_.*_steps",
        r'llvm\.call_intrinsic "llvm\.x86\.tileloaddt164"\((%\w+), %\w+, %c128_i64\)'
        r" : \(i8, !llvm\.ptr, i64\) -> \(\)",
        r'llvm.call_intrinsic "llvm.x86.tilezero"(\1) : (i8) -> ()',
    ),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A layer of 552 x 520 whose two experts take all tokens, after `kernels`."""
    folder = tmp_path_factory.mktemp("tiles")
    layer = {"name": "l", "index": 0, "H": 552, "F": 520, "E": 2, "K": 2}
    layer |= {
        "router": {"score": "softmax", "order": "score_then_select", "renormalize": "sum"},
        "expert": {"form": "glu", "activation": "silu"},
    }
    spec = folder / "spec.moe.json"
    spec.write_text(json.dumps({"schema": 1, "name": "m", "dtype": "bf16", "layers": [layer]}))
    moec_command(
        "compile", spec, "--cpu", LEVEL_NAMES, "--compile-to", "kernels", "-o", folder / "k.mlir"
    )
    return (folder / "k.mlir").read_text()


def verdict(text, folder) -> int:
    (folder / "fault.mlir").write_text(text)
    options = ["--compile-from", "kernels", "--cpu", LEVEL_NAMES, "--checkpoint", "random:1"]
    moec_command("compile", folder / "fault.mlir", *options, "-o", folder / "m.moec", "--quiet")
    done = subprocess.run([RUNNER, folder / "m.moec"], capture_output=True, text=True, timeout=120)
    assert done.returncode <= 1, done.stdout
    return done.returncode


def test_code_without_a_fault_passes(text, tmp_path):
    assert verdict(text, tmp_path) == 0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].replace(" ", "-"))
def test_a_fault_is_found(text, tmp_path, fault):
    _, functions, pattern, replacement = fault
    pieces = re.split(r"(?m)^(?=  func\.func )", text)
    changed = 0
    for i, piece in enumerate(pieces):
        if re.match(rf"  func\.func private @{functions}", piece):
            pieces[i], n = re.subn(pattern, replacement, piece)
            changed += n
    assert changed, "the fault's pattern matches nothing"
    assert verdict("".join(pieces), tmp_path) == 1
