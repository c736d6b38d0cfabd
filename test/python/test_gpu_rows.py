"""Every family of the model table compiles for GPUs, and every kernel of it assembles for both
architectures without a spill, out of the instructions that it should be made of."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import driver, moec_command
from families import FAMILIES
from spec_models import ATTENTION, CASES

ROOT = Path(__file__).resolve().parents[2]
PTXAS = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
pytestmark = pytest.mark.skipif(not Path(PTXAS).exists(), reason="no ptxas")


def layers_of(name, row, changes, folder):
    """MoE and dense layers of a family's configuration, one of each kind, as a spec has them."""
    config = transformers.AutoConfig.for_model(row, **(ATTENTION | CASES[row] | changes))
    config.save_pretrained(folder / name)
    text = moec_command("inspect", folder / name, "--spec").stdout
    found = {}
    for layer in json.loads(text)["layers"]:
        found.setdefault(layer["kind"], layer)
    return found.values()


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """All of them as one model, so that kernels that are equal are made once: its IR in PTX."""
    driver()
    folder = tmp_path_factory.mktemp("gpu_rows")
    known = {row for row, _ in FAMILIES.values()}
    cases = {name: (name, {}) for name in CASES if name not in known} | FAMILIES
    layers = [
        {**layer, "name": f"{name}.{layer['kind']}"}
        for name, (row, changes) in cases.items()
        for layer in layers_of(name, row, changes, folder)
    ]
    spec = {"schema": 1, "name": "rows", "dtype": "bf16"}
    spec["layers"] = [{**layer, "index": i} for i, layer in enumerate(layers)]
    (folder / "rows.moe.json").write_text(json.dumps(spec))
    options = ["--target", "cuda", "--dtype", "bf16", "--checkpoint", "none"]
    options += ["--compile-to", "codegen", "-o", folder / "code.mlir"]
    moec_command("compile", folder / "rows.moe.json", *options)
    return folder / "code.mlir"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_assemble(code, arch):
    script = ROOT / "test/Target/GPU/Inputs/ptxas.py"
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:{Path(PTXAS).parent}"}
    with open(code) as ir:
        done = subprocess.run(
            [sys.executable, script, arch, f"kernels_{arch}"],
            stdin=ir, capture_output=True, text=True, check=False, env=env,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = set()
    for line in done.stdout.splitlines():
        kernel, facts = line.split(": ")
        numbers = dict(re.findall(r"([A-Z]\w+|registers) (\d+)", facts))
        kind = re.sub(
            r"_?\d+$", "", re.sub(r"^(call_|\w\d+_sm_\w+?_(bf16|f32)(_(bf16|f32))?_)", "", kernel)
        )
        seen.add(kind)
        assert facts.startswith("stack 0 spills 0 0 "), line
        matmul = kind in ("up", "down", "shared_up", "shared_down")
        made_of = {"sm_80": ("HMMA", "LDSM", "LDGSTS"), "sm_90a": ("HGMMA", "UTMALDG", "LDGSTS")}
        for instruction in {"HMMA", "LDSM", "LDGSTS", *made_of[arch]}:
            used = matmul and instruction in made_of[arch]
            # Routers of bf16 multiply there too.
            if kind in ("route", "logits", "logits_whole") and instruction in ("HMMA", "LDSM"):
                continue
            assert (int(numbers[instruction]) > 0) == used, line
        # Two blocks of 256 threads share a processor in matmuls, on sm_90a one of 384, and blocks
        # of one warp a token of 1024 experts hold all their scores in registers.
        most = 255 if not matmul else 128 if arch == "sm_80" else 168
        assert int(numbers["registers"]) <= most, line
    assert {"route", "logits", "select", "sort", "weigh", "up", "gate", "shared_down"} <= seen
    assert "combine" in seen
