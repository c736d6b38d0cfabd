"""A library for GPUs through the C interface, on the SIMT executor behind a stub of the driver."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import moec_command
from gpu_call import LAYER
from gpu_layers import from_bf16
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build"))
EXECUTOR = BUILD / "test/lib/Target/GPU/libmoe_simt_driver.so"
pytestmark = pytest.mark.skipif(
    not (shutil.which("ptxas") or Path("/usr/local/cuda/bin/ptxas").exists()), reason="no ptxas"
)

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
    """For the GPUs of --gpu's default: two levels."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    options = ["--target", "cuda", "--checkpoint", "random:4", "--quiet"]
    options += ["--dump-phases", folder / "phases", "-o", folder / "gpu.moec"]
    moec_command("compile", folder / "config.json", *options)
    return folder / "gpu.moec", folder / "phases" / "07-kernels.mlir"


def run(library, kernels, *more, script="gpu_call.py"):
    command = [sys.executable, ROOT / "test/python" / script, BUILD, library, kernels, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("device, taken", [("8.0", "sm_80"), ("9.0", "sm_90a"), ("10.0", "sm_80")])
def test_layer_through_the_c_interface(library, device, taken):
    """One library, and the level that the device takes of it (10.0: by PTX)."""
    manifest = json.loads((library[0] / "manifest.json").read_text())
    images = [image["arch"] for image in manifest["images"]]
    assert images == ["sm_80", "compute_80", "sm_90a"] and manifest["abi"] == "1.3"
    done = run(*library, device, taken)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 100


@pytest.mark.parametrize("taken", ["sm_80", "sm_90a"])
def test_python_binding(library, taken):
    done = run(*library, taken, script="gpu_binding.py")
    assert done.returncode == 0, done.stderr


def test_models_of_transformers(tmp_path):
    script = ROOT / "test/python/gpu_transformers.py"
    done = subprocess.run(
        [sys.executable, script, BUILD, tmp_path],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "MOEC_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 40


def stubbed(kernels=None):
    """Where a program finds the stub as its driver, and behind it the executor."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(BUILD / "test/Runtime/cuda_stub")}
    env["MOEC_STUB_MEMORY"] = str(300 << 20)
    if kernels:
        env["MOEC_STUB_EXECUTOR"] = f"{EXECUTOR}:{kernels}"
    return env


def test_run_is_what_the_cpu_computes(library, tmp_path):
    """moec run --device cuda, on random weights that a library for the CPU has too."""
    config = library[0].parent / "config.json"
    options = [
        "--cpu",
        "native",
        "--checkpoint",
        "random:4",
        "--quiet",
        "-o",
        tmp_path / "cpu.moec",
    ]
    moec_command("compile", config, *options)
    results = {}
    for where, folder in {"cuda": library[0], "cpu": tmp_path / "cpu.moec"}.items():
        files = ["-o", tmp_path / f"{where}.npy", "--trace", tmp_path / f"{where}.safetensors"]
        moec_command(
            "run", folder, "--device", where, "--tokens", "9", *files, env=stubbed(library[1])
        )
        results[where] = from_bf16(np.load(tmp_path / f"{where}.npy").view(np.uint16))
    assert np.abs(results["cuda"] - results["cpu"]).max() <= 0.02 * np.abs(results["cpu"]).max()
    assert np.abs(results["cpu"]).max() > 0.1
    used = [load_file(tmp_path / f"{where}.safetensors") for where in ("cuda", "cpu")]
    for name, values in used[0].items():
        np.testing.assert_allclose(values, used[1][name], rtol=1e-5, err_msg=name)
    # Without the executor nothing is computed, and without a device there is a sentence.
    done = moec_command(
        "run", library[0], "--device", "cuda:3", "--tokens", "1", check=False, env=stubbed()
    )
    assert done.returncode == 6 and "E-NO-DEVICE" in done.stderr
    done = moec_command(
        "run",
        tmp_path / "cpu.moec",
        "--device",
        "cuda",
        "--tokens",
        "1",
        check=False,
        env=stubbed(),
    )
    assert done.returncode == 6 and "E-ARCH" in done.stderr


def test_bench_on_a_device(library):
    """Every step runs on the stub, where a call takes 125 us and nothing is computed."""
    options = ["--device", "cuda", "--blocks", "2"]
    tests = ["--tokens", "1,8", "--routing", "uniform,zipf"]
    done = moec_command(
        "bench", library[0], *options, *tests, "--no-dense", "-o", "jsonl", env=stubbed()
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["tokens"], r["routing"]) for r in rows] == [
        (1, "uniform"), (8, "uniform"), (1, "zipf"), (8, "zipf")
    ]  # fmt: skip
    for row in rows:
        assert row["cpu"] == "Stub 0" and row["level"] == "sm_80" and row["threads"] == 108
        assert row["enqueued_us"]["median"] == 125
        # Routing that is given does not run the router: it is timed apart and added.
        assert row["us"]["median"] == 250 and row["route_us"]["median"] == 125
        assert row["peak"]["gflops"] == 311900 and 0 < row["experts_used"] <= LAYER.E
    # Graphs replay what they recorded, here on the executor; the dense FFN is compiled on the fly.
    tests = ["--tokens", "1", "--routing", "model"]
    done = moec_command("bench", library[0], *options, *tests, env=stubbed(library[1]), check=False)
    assert done.returncode == 6 and "kernel" in done.stderr and "719" in done.stderr, done.stderr
    done = moec_command("bench", library[0], *options, *tests, env=stubbed())
    assert "| 1.00 (" in done.stdout and "by its clock" in done.stderr
    done = moec_command("bench", library[0], "--device", "cuda", "--threads", "2", check=False)
    assert done.returncode == 2 and "none with --device cuda" in done.stderr


def test_strategy_of_a_library(library, tmp_path):
    """The section of the manifest, edited: tiles and the atomic combine; slips are refused."""
    config = library[0].parent / "config.json"
    manifest = json.loads((library[0] / "manifest.json").read_text())
    assert (
        manifest["strategy"]["f0_sm_80_bf16_bf16"]["grouped_matmul.1"]["gpu_combine"] == "ordered"
    )
    tile = "#moe.gpu_tile<cols = 64, rows = 16, k = 32, stages = 3, warps_cols = 2, warps_rows = 1>"
    change = {"f0_*": {"grouped_matmul.*": {"gpu_tiles": [tile]},
                       "grouped_matmul.1": {"gpu_combine": "atomic"}}}  # fmt: skip

    def compile_with(change, check=True):
        (tmp_path / "s.json").write_text(json.dumps(change))
        options = ["--target", "cuda", "--checkpoint", "none", "--strategy", tmp_path / "s.json"]
        options += ["--compile-to", "kernels", "-o", tmp_path / "k.mlir", "--force"]
        return moec_command("compile", config, *options, check=check)

    compile_with(change)
    text = (tmp_path / "k.mlir").read_text()
    assert "atomicrmw fadd" in text
    assert re.search(r"@f0_\w+_down_0\(", text) and not re.search(r"@f0_\w+_down_1\(", text)
    for slip, says in [
        ({"f0_*": {"grouped_matmul.7": {}}}, "matches none"),
        ({"f0_*": {"grouped_matmul.0": {"gpu_combine": "atomic"}}}, "combines rows of experts"),
        ({"f0_*": {"grouped_matmul.0": {"rows": 3}}}, "expected a strategy field"),
        ({"f0_*": {"grouped_matmul.0": {"gpu_tiles": [tile.replace("k = 32", "k = 48")]}}}, "k"),
    ]:
        done = compile_with(slip, check=False)
        assert done.returncode == 2 and says in done.stderr, done.stderr


def test_doctor_names_the_device():
    done = moec_command("doctor", "--no-measure", env=stubbed())
    assert "Stub 0, sm_80" in done.stdout and "cuda: `sm_80`" in done.stdout


SMALL = {"num_hidden_layers": 1, "torch_dtype": "bfloat16", "hidden_size": 40}
MODELS = {
    "tails": SMALL
    | dict(model_type="mixtral", intermediate_size=24, num_local_experts=5, num_experts_per_tok=2),
    "next": SMALL
    | dict(model_type="qwen3_next", intermediate_size=24, moe_intermediate_size=24, num_experts=5)
    | dict(shared_expert_intermediate_size=20, num_experts_per_tok=2, decoder_sparse_step=1)
    | dict(mlp_only_layers=[]),
}


def test_benchmark_as_a_whole(tmp_path):
    """build.sh and run.sh of benchmarks/gpu: every step on the stub, kernels on the executor, where
    they are checked; nothing takes time. Steps that fail are rows, and run again."""
    folder, out, results = ROOT / "benchmarks/gpu", tmp_path / "out", tmp_path / "results"
    (tmp_path / "models").mkdir()
    for name, config in MODELS.items():
        (tmp_path / "models" / f"{name}.json").write_text(json.dumps(config))
    build = ["bash", folder / "build.sh", BUILD, tmp_path / "models", out]
    env = {**os.environ, "GPUS": "sm_80", "CPU": "native"}
    subprocess.run(build, check=True, env=env, stdout=subprocess.DEVNULL)
    # Every process of gpu_layer finds the kernels of its library in the executor.
    for library in [*(path for path in out.iterdir() if (path / "manifest.json").exists())]:
        config = tmp_path / "models" / f"{library.name}.json"
        if config.exists():
            ir = ["--checkpoint", "none", "--compile-to", "kernels", "-o", f"{library}.mlir"]
            moec_command("compile", config, "--target", "cuda", *ir)
    (out / "gpu_layer").rename(out / "gpu_layer.real")
    (out / "gpu_layer").write_text(
        f'#!/bin/sh\n[ -e "$1.mlir" ] && export MOEC_STUB_EXECUTOR="{EXECUTOR}:$1.mlir"\n'
        'exec "$0.real" "$@"\n'
    )
    (out / "gpu_layer").chmod(0o755)
    env = stubbed() | {"TOKENS": "1,5", "CHECKED": "1,9", "REPEATS": "2", "DEVICE": "cpu"}
    env |= {"SIZE": "32", "OMP_NUM_THREADS": "1"}
    run = ["bash", folder / "run.sh", results, out]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=env)
    log = (results / "log.txt").read_text()
    rows = [json.loads(line) for line in (results / "rows.jsonl").read_text().splitlines()]
    assert done.returncode == 0, (rows, log)
    timed = {(r["model"], r["T"]): r for r in rows if "us_without_graph" in r}
    wanted = {(name, t) for name in ("next", "dense-next") for t in (1, 5)}
    assert set(timed) == wanted | {("tails", 1), ("tails", 9)}
    for (name, _), row in timed.items():
        assert row["error"] < 8e-3 and (row["error"] >= 0) == (not name.startswith("dense"))
    assert {r.get("peer") for r in rows} >= {"dense matmul", "grouped_mm", "transformers"}
    page = (results / "table.md").read_text()
    assert "| next | 5 | 125.0 |" in page and "MoE / dense" in page and page == done.stdout
    assert "- correct: pass, 4 rows checked" in page
    assert "- layer at T >= 2048, of torch's grouped_mm >= 1.2: not measured" in page
    # A step that ends badly is a row, and so is what is not here; finished steps are not run again.
    (out / "next.mlir").write_text("no kernels")
    (results / "steps" / "next.jsonl").unlink()
    (results / "steps" / "transformers.jsonl").unlink()
    env["PYTHONPATH"] = str(tmp_path)
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')")
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1 and "failed: next: exit" in done.stdout, done.stdout
    assert "absent: transformers, tails: ImportError: not here" in done.stdout
    assert "| tails | 9 | 125.0 |" in done.stdout


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
