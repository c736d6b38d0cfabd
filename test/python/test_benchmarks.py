"""The benchmarks, small: every process starts, answers rightly, and the result can be drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build"))


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_small_run(tmp_path):
    run_one = {"shape": "tiny", "H": 64, "F": 32, "E": 4, "K": 2, "routing": "zipf"}
    run_one |= {"dtype": "bf16", "tokens": [1, 5], "peers": ["moec", "moec-dense", "torch-dense"]}
    second = run_one | {"dtype": "f32", "routing": "one-expert", "tokens": [3]}
    second["peers"] = ["moec", "vllm", "hf-eager"]
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({"blocks": 3, "runs": [run_one, second]}))
    out = tmp_path / "out.json"
    environment = dict(os.environ, PYTHONPATH=str(BUILD / "python"))
    arguments = ["--config", config, "--out", out, "--threads", 1, "--moec", BUILD / "bin/moec"]
    done = run(ROOT / "benchmarks/run.py", *arguments, env=environment)
    assert done.returncode == 0, done.stderr

    result = json.loads(out.read_text())
    assert result["kind"] == "moec-benchmarks" and result["schema"] == 1
    assert result["machine"]["kind"] == "moec-machine"
    rows = {(r["dtype"], r["tokens"], r["peer"]): r for r in result["rows"]}
    for tokens in (1, 5):
        for peer in run_one["peers"]:
            ms = rows["bf16", tokens, peer]["ms"]
            assert 0 < ms["q1"] <= ms["median"] <= ms["q3"]
        assert "over_moec" in rows["bf16", tokens, "torch-dense"]
        assert rows["bf16", tokens, "moec"]["error"] < 2e-2
    assert rows["f32", 3, "moec"]["error"] < 1e-5
    # What is not there, or not for this dtype, is named.
    absent = {entry["peer"]: entry for entry in result["absent"]}
    assert "vllm" in absent and absent["vllm"]["why"]

    pictures = tmp_path / "plots"
    drawn = run(ROOT / "benchmarks/plots.py", out, "--out", pictures)
    assert drawn.returncode == 0, drawn.stderr
    assert "| 5 | moec |" in drawn.stdout
    for name in ("time", "ratio", "dense"):
        if name != "ratio":
            text = (pictures / f"tiny-bf16-zipf-{name}.svg").read_text()
            assert text.startswith("<svg") and text.rstrip().endswith("</svg>")


def test_a_layer_from_checkpoint_to_checked_numbers(tmp_path):
    """The command for Mixtral's real size, at a small one."""
    environment = dict(os.environ, PYTHONPATH=str(BUILD / "python"), PYTHONUNBUFFERED="1")
    sizes = ["--hidden", 72, "--width", 56, "--experts", 5, "--tokens", "1,9", "--threads", 1]
    arguments = [*sizes, "--out", tmp_path / "layer"]
    done = run(ROOT / "benchmarks/real_layer.py", *arguments, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("Within every bound.")
    assert "| 9 | x86-64-v3 |" in done.stdout and "| run, T = 9 |" in done.stdout
    # A wrong output is seen.
    y = tmp_path / "layer/y9.npy"
    bad = np.load(y)
    bad[3] *= 1.02
    np.save(y, bad)
    stage = ["--stage", "compare"]
    done = run(ROOT / "benchmarks/real_layer.py", *arguments, *stage, env=environment)
    assert done.returncode == 0, done.stderr
    assert not json.loads((tmp_path / "layer/compare.json").read_text())["good"]


def test_refusals(tmp_path):
    done = run(ROOT / "benchmarks/run.py")
    assert done.returncode == 2 and "expected one of --quick, --full and --config" in done.stderr
    done = run(ROOT / "benchmarks/run.py", "--quick", "--peers", "best")
    assert done.returncode == 2 and "but got best" in done.stderr
    other = tmp_path / "x.json"
    other.write_text("{}")
    done = run(ROOT / "benchmarks/plots.py", other, "--out", tmp_path)
    assert done.returncode == 1 and "expected a result of run.py" in done.stderr


def test_levels_and_empty_experts(tmp_path):
    """A level below the machine's, one that no machine of today runs, half the experts empty."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from layer import Layer

    one = {"shape": "tiny", "H": 64, "F": 32, "E": 8, "K": 2, "dtype": "f32", "tokens": [9]}
    one |= {"routing": "half-empty", "peers": ["moec", "moec@x86-64-v3", "moec@x86-64-v9"]}
    used = np.unique([ids for _, ids, _ in Layer(one).inputs(9)])
    assert used.tolist() == [0, 2, 4, 6]
    config, out = tmp_path / "tiny.json", tmp_path / "out.json"
    config.write_text(json.dumps({"blocks": 2, "runs": [one]}))
    environment = dict(os.environ, PYTHONPATH=str(BUILD / "python"))
    arguments = ["--config", config, "--out", out, "--threads", 1, "--moec", BUILD / "bin/moec"]
    done = run(ROOT / "benchmarks/run.py", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {row["peer"]: row for row in result["rows"]}
    assert rows["moec@x86-64-v3"]["note"] == "level x86-64-v3"
    assert rows["moec@x86-64-v3"]["error"] < 1e-5
    (absent,) = result["absent"]
    assert absent["peer"] == "moec@x86-64-v9" and "does not run" in absent["why"]


def test_compile_time_and_size():
    """The code of all levels stays below 1 MB (the layers of a model share it)."""
    arguments = ["--build", BUILD, "--rounds", 1, "--layers", 2, "--levels", "multi"]
    done = run(ROOT / "benchmarks/compile_time.py", *arguments)
    assert done.returncode == 0, done.stderr
    size = int(done.stdout.rsplit("|", 2)[1])
    assert 50 < size <= 1000, done.stdout


def test_fixed_cost():
    """The program compiles without a warning and measures every kind of call."""
    done = run(ROOT / "benchmarks/fixed_cost.py", "--build", BUILD, "--calls", 1)
    assert done.returncode == 0, done.stderr
    for kind in ("whole layer", "experts given", "route only"):
        assert done.stdout.count(kind) == 2


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        (
            "transformers_speed.py",
            ("tiny", "--blocks", 2, "--new", 2, "--prompt", 8, "--executors"),
            ("| grouped_mm |", "| moec |", "| accelerate |", "| accelerate-pool |"),
        ),
        (
            "drop_memory.py",
            ("--model", "tiny", "--gb", 0.0003),
            ("2 layers", "peak", "restore", "pages swapped out: "),
        ),
        (
            "call_overhead.py",
            ("--blocks", 3, "--calls", 10),
            ("| layer |", "| live |", "| operation |", "| empty operation |"),
        ),
    ],
)
def test_scripts_of_transformers(script, arguments, says, tmp_path):
    """Every script of the measurements through transformers runs to its end."""
    environment = dict(os.environ, PYTHONPATH=str(BUILD / "python"), MOEC_CACHE=str(tmp_path))
    more = ("--out", tmp_path / "speed.json") if script == "transformers_speed.py" else ()
    done = run(ROOT / "benchmarks" / script, *arguments, *more, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in says), done.stdout
    if more:
        assert "accelerate-pool" in (tmp_path / "speed.json").read_text()
