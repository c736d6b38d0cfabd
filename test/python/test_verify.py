"""moec verify: what is right passes, what is wrong is named; tried as a new user would."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import LEVELS, driver, moec_command
from moec._checkpoint import Checkpoint
from moec.verify import main, verify
from safetensors.torch import load_file, save_file
from test_spec_quantized import fp8_checkpoint, mxfp4_checkpoint

PACKAGE = str(Path(__file__).resolve().parents[2] / "build/python")


def environment(**more):
    return {**os.environ, "MOEC_PYTHON": sys.executable, **more}


def spoiled(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with `change(tensors)` applied."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "row, dtype",
    [
        *itertools.product(("mixtral", "qwen3_moe", "granitemoe"), ("f32", "bf16")),
        ("jamba", "f32"),
        ("olmoe", "f32"),  # the other rows: test_families.py
    ],
)
def test_what_was_compiled(row, dtype, compiled):
    model = compiled(row, dtype)
    result = verify(model.path, model.checkpoint.path)
    assert result.ok, result.table()
    assert [layer.layer for layer in result.layers] == [b.name for b in model.checkpoint.blocks]
    for layer in result.layers:
        assert 0 < layer.whole <= layer.bound and layer.whole <= layer.worst < 100 * layer.bound
        assert layer.transformers > 0
        if layer.kind == "moe":
            assert layer.same + layer.near == 64 and layer.near < 8
    assert "| ok " in result.table() and result.table().count("| ok ") == len(result.layers)


def test_routers_that_round_as_the_model_does(compiled, tmp_path, monkeypatch):
    checkpoint = compiled("qwen3_moe", "bf16").checkpoint.path
    options = ("--router", "model", "--cpu", LEVELS[-1], "--quiet")
    moec_command("compile", checkpoint, "-o", tmp_path / "m.moec", *options)
    result = verify(tmp_path / "m.moec", checkpoint)
    assert result.ok, result.table()
    assert all(layer.same >= 16 for layer in result.layers if layer.kind == "moe")
    monkeypatch.setattr("moec.verify.router_precision", lambda *_: "f32")
    assert "off by" in verify(tmp_path / "m.moec", checkpoint).table()


def test_other_files_of_the_same_weights(compiled, tmp_path):
    model = compiled("mixtral", "f32")
    fused = oracle.rewrite_fused(model.checkpoint.path, tmp_path / "fused")
    sharded = oracle.rewrite_sharded(model.checkpoint.path, tmp_path / "sharded")
    for against in (fused, sharded, model.checkpoint.path / "model.safetensors"):
        assert verify(model.path, against, transformers=False).ok


EXPERT = "model.layers.1.block_sparse_moe.experts.6.{}.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("one row of one expert", "experts: error"),
        ("gate and up of one expert", "experts: error"),
        ("router rows", "tokens chose others"),
        ("router factor", "weights of"),
    ],
)
@pytest.mark.parametrize("peer", [False, True])
def test_wrong_weights_are_found(what, says, peer, compiled, tmp_path):
    model = compiled("mixtral", "f32")

    def change(tensors):
        if what == "one row of one expert":
            tensors[EXPERT.format("w2")][5] *= 1.001
        elif what == "gate and up of one expert":
            w1, w3 = EXPERT.format("w1"), EXPERT.format("w3")
            tensors[w1], tensors[w3] = tensors[w3].clone(), tensors[w1].clone()
        elif what == "router rows":
            tensors[GATE] = tensors[GATE].flip(0).contiguous()
        else:
            tensors[GATE] *= 1.001

    other = spoiled(model.checkpoint.path, tmp_path / "other", change)
    result = verify(model.path, other, transformers=peer)
    assert result.layers[0].ok and not result.layers[1].ok
    assert any(says in problem for problem in result.layers[1].problems), result.table()


def test_another_model(compiled, tmp_path):
    model = compiled("mixtral", "f32")
    wide = oracle.make_checkpoint("mixtral", "f32", tmp_path / "wide", intermediate_size=80)
    result = verify(model.path, wide.path, transformers=False)
    assert all("F 96, there 80" in layer.problems[0] for layer in result.layers)
    one = oracle.make_checkpoint("mixtral", "f32", tmp_path / "one", num_hidden_layers=1)
    result = verify(model.path, one.path, transformers=False)
    assert result.layers[0].ok and "no such layer" in result.layers[1].problems[0]


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_reads_encoded_weights(form, tmp_path):
    """Its own decoder against torch's conversion (fp8) and the format's definition (mxfp4)."""
    if form == "fp8":
        model = fp8_checkpoint("minimax_m2", tmp_path / "m", torch.float32, hidden_size=136)
        experts = model.model.layers[1].mlp.experts
        want = {"gate_up": experts.gate_up_proj.float(), "down": experts.down_proj.float()}
    else:
        decoded = mxfp4_checkpoint(tmp_path / "m")
        at = "model.layers.1.mlp.experts."
        gate_up = decoded[at + "gate_up_proj"]
        gate_up = np.concatenate([gate_up[:, ::2], gate_up[:, 1::2]], 1)
        want = {"gate_up": torch.from_numpy(gate_up)}
        want["down"] = torch.from_numpy(decoded[at + "down_proj"])
    from moec._semantics import expand_layers

    spec = json.loads(moec_command("inspect", tmp_path / "m", "--spec").stdout)
    layer = next(one for one in expand_layers(spec) if one["index"] == 1)
    got = Checkpoint(tmp_path / "m").weights(layer, dict.fromkeys(layer["weights"], "bf16"))
    for role, tensor in want.items():
        assert got[role].shape == tuple(tensor.shape)
        for e in range(tensor.shape[0]):
            assert np.array_equal(np.asarray(got[role][e], np.float32), tensor[e].detach().numpy())


# --- a function -------------------------------------------------------------------------------


def test_against_a_function(compiled, tmp_path, monkeypatch):
    model = compiled("mixtral", "f32")
    monkeypatch.syspath_prepend(tmp_path)
    tmp_path.joinpath("mine_for_verify.py").write_text(
        "import moec, numpy as np\n"
        f"library = moec.load({str(model.path)!r}, threads=1)\n"
        "named = {layer.name: layer for layer in library.layers}\n"
        "def right(name, x): return named[name](x)\n"
        "def wrong(name, x): return named[name](x) * np.float32(1.0001)\n"
        "def short(name, x): return x[:1]\n"
    )
    assert verify(model.path, "mine_for_verify:right").ok
    assert not verify(model.path, "mine_for_verify:wrong").ok
    for name, error in (("short", "E-SHAPE"), ("none", "E-ARGUMENT")):
        with pytest.raises(ValueError, match=error):
            verify(model.path, f"mine_for_verify:{name}")


# --- as a new user ------------------------------------------------------------------------------


def test_command(compiled, tmp_path, capsys):
    model = compiled("mixtral", "f32")
    arguments = [str(model.path), "--against", str(model.checkpoint.path), "--no-transformers"]
    assert main([*arguments, "-o", "json", "--layers", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "moec-verify" and record["schema"] == 1
    assert [layer["layer"] for layer in record["layers"]] == ["model.layers.1.mlp"]
    for bad, code in (
        (["--layers", "7"], 2),
        (["--layers", "x"], 2),
        (["--tokens", "0"], 2),
        (["--nothing"], 2),
    ):
        assert main([*arguments, *bad]) == code
        assert capsys.readouterr().err.startswith("E-ARGUMENT: ")
    assert main([str(tmp_path / "none"), "--against", "none"]) != 0
    assert main([str(model.path), "--against", str(tmp_path / "none"), "--log", "json"]) == 5
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["name"] == "E-IO"


def test_mismatch_is_exit_code_7(compiled, tmp_path):
    model = compiled("mixtral", "f32")
    key = EXPERT.format("w2")
    other = spoiled(model.checkpoint.path, tmp_path / "other", lambda t: t[key].neg_())
    done = moec_command(
        "verify", model.path, "--against", other, "--no-transformers", check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 7
    assert "E-MISMATCH" in done.stderr and "model.layers.1.mlp" in done.stderr
    assert "| model.layers.0.mlp |" in done.stdout


def test_hub_folder_without_terminal(compiled, tmp_path):
    """Links into blobs, as the hub's cache has them; transformers is not installed."""
    model = compiled("mixtral", "f32")
    repository = tmp_path / "models--tiny--mixtral"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.checkpoint.path.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (tmp_path / "absent").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'transformers'\", name='transformers')\n"
    (tmp_path / "absent" / "transformers.py").write_text(missing)
    path = os.pathsep.join([str(tmp_path / "absent"), os.environ.get("PYTHONPATH", PACKAGE)])
    done = moec_command(
        "verify", model.path, "--against", snapshot, env=environment(PYTHONPATH=path)
    )
    assert "not installed (transformers)" in done.stdout and done.stdout.count("| ok ") == 2
    assert not done.stderr and "\033" not in done.stdout
    # A link that leaves the repository is refused, as everywhere.
    (tmp_path / "linked").mkdir()
    for file in model.checkpoint.path.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    arguments = ("verify", model.path, "--against", tmp_path / "linked", "--no-transformers")
    done = moec_command(*arguments, check=False, env=environment())
    assert done.returncode == 3 and "E-PATH" in done.stderr
    moec_command(*arguments, "--follow-links", env=environment())


def test_full_disk_and_closed_pipe(compiled):
    model = compiled("mixtral", "f32")
    command = [driver(), "verify", model.path, "--against", model.checkpoint.path]
    command.append("--no-transformers")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
        )
    assert done.returncode == 5 and done.stderr.startswith("E-SPACE: stdout"), done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment()
    )
    os.close(writer)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_interrupted(compiled, tmp_path):
    """Ctrl-C in the middle ends it at once, without a traceback."""
    model = compiled("mixtral", "f32")
    (tmp_path / "slow.py").write_text(
        "import time\ndef layer(name, x):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", PACKAGE)])
    child = subprocess.Popen(
        [driver(), "verify", model.path, "--against", "slow:layer"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=path),
    )
    assert child.stdout.readline() == "ready\n"
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    # Ended by the signal itself, which a shell shows as 130.
    assert child.returncode == -signal.SIGINT and not err
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("command", [["bench", "CONFIG", "--tokens", "1,8,64"], ["doctor"]])
def test_other_tools_are_interrupted(command, compiled, tmp_path):
    """Both work for seconds; nothing of bench's own folder is left."""
    config = str(compiled("mixtral", "f32").checkpoint.path / "config.json")
    child = subprocess.Popen(
        [driver(), *(config if word == "CONFIG" else word for word in command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(tmp_path)),
        # A shell starts its background jobs, and all below them, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(0.7)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert child.returncode in (130, -signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_no_python(compiled):
    model = compiled("mixtral", "f32")
    arguments = ("verify", model.path, "--against", model.checkpoint.path)
    done = moec_command(*arguments, check=False, env=environment(MOEC_PYTHON="/none/python"))
    assert done.returncode == 5 and "E-IO: moec verify" in done.stderr
    assert "MOEC_PYTHON" in done.stderr
