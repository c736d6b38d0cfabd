"""A library for GPUs through the C interface, on the SIMT executor behind a stub of the driver."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import moec_command
from gpu_call import LAYER

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build"))
EXECUTOR = BUILD / "test/lib/Target/GPU/libmoe_simt_driver.so"
pytestmark = [
    pytest.mark.skipif(not EXECUTOR.exists(), reason=f"{EXECUTOR} is not built"),
    pytest.mark.skipif(
        not (shutil.which("ptxas") or Path("/usr/local/cuda/bin/ptxas").exists()),
        reason="no ptxas",
    ),
]

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": LAYER.H,
    "intermediate_size": LAYER.F,
    "num_local_experts": LAYER.E,
    "num_experts_per_tok": LAYER.K,
    "num_hidden_layers": 1,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    options = ["--target", "cuda", "--checkpoint", "random:4", "--quiet"]
    options += ["--dump-phases", folder / "phases", "-o", folder / "gpu.moec"]
    moec_command("compile", folder / "config.json", *options)
    return folder / "gpu.moec", folder / "phases" / "07-kernels.mlir"


def run(library, kernels, script="gpu_call.py"):
    command = [sys.executable, ROOT / "test/python" / script, BUILD, library, kernels]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_layer_through_the_c_interface(library):
    done = run(*library)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 100


def test_python_binding(library):
    done = run(*library, "gpu_binding.py")
    assert done.returncode == 0, done.stderr


def test_benchmark_runs_through(library, tmp_path):
    """Every driver call of benchmarks/gpu on the stub, where nothing takes time or is computed. The
    stub refuses in a capture what would wait."""
    source, program = ROOT / "benchmarks/gpu/layer.c", tmp_path / "gpu_layer"
    link = ["-L", BUILD / "lib", "-lmoec", "-lm", "-ldl", f"-Wl,-rpath,{BUILD / 'lib'}"]
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "include"]
    subprocess.run(["cc", *flags, source, "-o", program, *link], check=True)
    stub = BUILD / "test/Runtime/cuda_stub"
    env = {**os.environ, "LD_LIBRARY_PATH": str(stub), "MOEC_STUB_MEMORY": str(300 << 20)}
    command = [program, library[0], "--tokens", "1,5", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("T") for row in rows] == [None, 1, 5]
    assert rows[0]["device"] == "Stub 0" and rows[1]["us"] == 125
    # With --check what nobody computed is found.
    done = subprocess.run([*command, "--check", "1"], capture_output=True, text=True, env=env)
    assert done.returncode == 7 and "logits[0, 0]: expected" in done.stderr, done.stderr
    path = tmp_path / "rows.jsonl"
    more = [{"peer": "dense matmul", "tflops": 500.0}, {"failed": "step", "why": "because"}]
    path.write_text("\n".join(json.dumps(row) for row in rows + more))
    table = [sys.executable, ROOT / "benchmarks/gpu/table.py", path]
    page = subprocess.run(table, capture_output=True, text=True, check=True).stdout
    assert "| gpu.moec | 5 | 125.0 |" in page and "failed: step: because" in page


@pytest.mark.parametrize(
    "before, after, says",
    [
        # call_in: the smallest foreign id is kept, not the largest; bf16 weights are widened.
        ("llvm.atomicrmw umin", "llvm.atomicrmw umax", "foreign ids"),
        # call_counts: without its barrier.
        ("nvvm.barrier\n", "\n", "race"),
    ],
)
def test_planted_faults(library, tmp_path, before, after, says):
    text = library[1].read_text()
    begin = text.index("llvm.func @call_in(")
    spoilt = text[begin:].replace(before, after)
    assert spoilt != text[begin:]
    (tmp_path / "kernels.mlir").write_text(text[:begin] + spoilt)
    done = run(library[0], tmp_path / "kernels.mlir")
    assert done.returncode == 1 and says in done.stderr, done.stderr
