"""What is wrong with an input is said in one sentence, with the right exit code, and leaves nothing
behind: neither the output folder nor a temporary one beside it.

By command line, as a user meets it. The formats themselves are tested at their readers.
"""

import json
import os
import re
import resource
import shutil
import signal
import struct

import moec
import oracle
import pytest
import torch
from conftest import driver, moec_command
from safetensors.torch import load_file, save_file

EXIT = {"call": 2, "model": 3, "artefact": 4, "system": 5}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    driver()
    folder = tmp_path_factory.mktemp("bad-input")
    oracle.make_checkpoint("mixtral-gelu", "f32", folder / "checkpoint")
    oracle.make_checkpoint("qwen3_moe", "f32", folder / "other")
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy of a good checkpoint, to be spoilt."""
    shutil.copytree(original / "checkpoint", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused(model, names, kind, *options, text="", **kwargs):
    """`moec compile` refuses the model with one of the names; returns what it said."""
    out = model.parent / "result" / "out.moec"
    out.parent.mkdir(exist_ok=True)
    done = moec_command("compile", model, "-o", out, *options, check=False, **kwargs)
    said = done.stderr
    assert done.returncode == EXIT[kind], f"exit {done.returncode}: {said}"
    lines = [line for line in said.splitlines() if re.search(r"\bE-[A-Z-]+: ", line)]
    assert lines, f"no error line in: {said}"
    found = re.search(r"\b(E-[A-Z-]+): ", lines[0])[1]
    assert found in names.split("|"), said
    assert "expected" in lines[0] and "but got" in lines[0], said
    assert text in said, said
    assert "Stack dump" not in said and "Assertion" not in said, said
    assert not list(out.parent.iterdir()), f"left behind: {list(out.parent.iterdir())}"
    return said


# --- config.json ----------------------------------------------------------------------------------


def edit(checkpoint, **changes):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def test_no_such_model(tmp_path):
    driver()
    refused(tmp_path / "nothing", "E-CONFIG", "model", text="nothing there")


def test_no_config(checkpoint):
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "E-CONFIG", "model", text="config.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"model_type": "mixtral", "hidden_size": 6',
        "model_type: mixtral",
        "[]",
        "null",
        '"mixtral"',
        "{}",
        "[" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        '{"model_type": "mixtral", "model_type": "olmoe"}',
        "\0" * 64,
        b"\xff\xfe{\x00}\x00",
        b'{"model_type": "mixtral", "hidden_size": \xc3\x28}',
    ],
    ids=range(14),
)
def test_config_that_is_none(checkpoint, content):
    content = content if isinstance(content, bytes) else content.encode()
    (checkpoint / "config.json").write_bytes(content)
    refused(checkpoint, "E-CONFIG|E-UNKNOWN-MODEL|E-FILE-FORMAT", "model", text="config.json")


@pytest.mark.parametrize(
    "key, value",
    [
        *(("hidden_size", v) for v in (0, "64", 64.5, None, [64], {}, True, 2**40, 10**30, 1e300)),
        *(("intermediate_size", v) for v in (0, -8, 2**62)),
        *(("num_local_experts", v) for v in (0, -8, 10**9)),
    ],
)
def test_config_with_a_wrong_size(checkpoint, key, value):
    edit(checkpoint, **{key: value})
    refused(checkpoint, "E-CONFIG|E-TENSOR", "model")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"num_experts_per_tok": 6}, "6"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_act": "swish2"}, "swish2"),
        ({"hidden_act": 7}, "hidden_act"),
        ({"model_type": 7}, "model_type"),
        ({"model_type": ...}, "model_type"),
    ],
)
def test_config_with_a_wrong_value(checkpoint, changes, text):
    edit(checkpoint, **changes)
    names = "E-CONFIG|E-UNSUPPORTED|E-UNKNOWN-MODEL|E-TENSOR"
    refused(checkpoint, names, "model", text=text)


def test_unknown_model_type(checkpoint):
    """Names the nearest and the way out."""
    edit(checkpoint, model_type="mixtrall")
    said = refused(checkpoint, "E-UNKNOWN-MODEL", "model", text="mixtrall")
    assert re.search(r"\bmixtral\b", said) and ".moe.json" in said


def test_quantized_checkpoint(checkpoint):
    edit(checkpoint, quantization_config={"quant_method": "awq", "bits": 4})
    refused(checkpoint, "E-UNSUPPORTED", "model", text="awq")


@pytest.mark.parametrize(
    "change, names, kind",
    [
        (lambda s: s.update(schema=99), "E-ABI", "artefact"),
        (lambda s: s.update(schema="one"), "E-CONFIG", "model"),
        (lambda s: s.update(layers=[]), "E-CONFIG", "model"),
        (lambda s: s.update(layers={}), "E-CONFIG", "model"),
        (lambda s: s.update(surprise=1), "E-CONFIG", "model"),
        (lambda s: s.update(name="../up"), "E-CONFIG", "model"),
        (lambda s: s["layers"][0].update(K=9), "E-CONFIG", "model"),
        (lambda s: s["layers"][0].update(H=0), "E-CONFIG", "model"),
        (lambda s: s["layers"][0].pop("router"), "E-CONFIG", "model"),
        (
            lambda s: s["layers"][0]["router"].update(score="sqrt_softplus"),
            "E-UNSUPPORTED",
            "model",
        ),
        (lambda s: s["layers"][0]["router"].update(score="hardmax"), "E-CONFIG", "model"),
        (lambda s: s["layers"][0]["expert"].update(clamp="oai"), "E-UNSUPPORTED|E-CONFIG", "model"),
        (lambda s: s["layers"][0].update(index="3-1"), "E-CONFIG", "model"),
        (lambda s: s["layers"][0].update(name="a" * 201), "E-CONFIG", "model"),
        (lambda s: s["layers"][0].update(name="a" * 5000), "E-CONFIG", "model"),
    ],
)
def test_spec(original, tmp_path, change, names, kind):
    layer = {"name": "a.mlp", "index": 0, "H": 8, "F": 4, "E": 3, "K": 2}
    layer["router"] = {"score": "softmax", "order": "score_then_select", "renormalize": "none"}
    layer["expert"] = {"form": "glu", "activation": "silu"}
    spec = {"schema": 1, "name": "tiny", "dtype": "f32", "layers": [layer]}
    change(spec)
    path = tmp_path / "tiny.moe.json"
    path.write_text(json.dumps(spec))
    refused(path, names, kind, "--checkpoint", "random:1")


# --- safetensors ----------------------------------------------------------------------------------


def read_parts(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_parts(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 10**6) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{\xff\xff}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=range(9),
)
def test_file_that_is_no_safetensors(checkpoint, content):
    (checkpoint / "model.safetensors").write_bytes(content)
    refused(checkpoint, "E-FILE-FORMAT", "model", text="model.safetensors")


def test_truncated_file(checkpoint):
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    for keep in (4, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        refused(checkpoint, "E-FILE-FORMAT", "model", text="model.safetensors")


@pytest.mark.parametrize(
    "entry, names",
    [
        ({"data_offsets": [0, 10**12]}, "E-FILE-FORMAT"),
        ({"data_offsets": [-8, 0]}, "E-FILE-FORMAT"),
        ({"data_offsets": [400, 0]}, "E-FILE-FORMAT"),
        ({"data_offsets": [0, 2**64]}, "E-FILE-FORMAT"),
        ({"data_offsets": [0]}, "E-FILE-FORMAT"),
        ({"data_offsets": "0-400"}, "E-FILE-FORMAT"),
        ({"data_offsets": [0, 7200]}, "E-FILE-FORMAT"),  # over another tensor
        ({"shape": [36, 51]}, "E-FILE-FORMAT|E-TENSOR"),
        ({"shape": [50, 36]}, "E-TENSOR"),
        ({"shape": [1800]}, "E-TENSOR"),
        ({"shape": [-36, -50]}, "E-FILE-FORMAT"),
        ({"shape": [2**33, 2**33]}, "E-FILE-FORMAT|E-TENSOR"),
        ({"dtype": "I32"}, "E-TENSOR|E-UNSUPPORTED"),
        ({"dtype": "F31"}, "E-FILE-FORMAT|E-TENSOR|E-UNSUPPORTED"),
        ({"dtype": 5}, "E-FILE-FORMAT"),
        (None, "E-TENSOR|E-FILE-FORMAT"),  # a hole is one, too
    ],
)
def test_one_wrong_tensor(checkpoint, entry, names):
    path = checkpoint / "model.safetensors"
    header, data = read_parts(path)
    if entry is None:
        del header[EXPERT]
    else:
        header[EXPERT].update(entry)
    write_parts(path, header, data)
    refused(checkpoint, names, "model")


@pytest.mark.parametrize("name", [EXPERT, GATE])
def test_missing_tensor(checkpoint, name):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    refused(checkpoint, "E-TENSOR", "model", text=name)


def test_no_weights_in_the_folder(checkpoint, tmp_path):
    """A folder is a checkpoint: without weights it is refused with the ways out."""
    for file in checkpoint.glob("*.safetensors*"):
        file.unlink()
    said = refused(checkpoint, "E-TENSOR", "model", text="--checkpoint none")
    assert "random:SEED" in said and "PATH" in said
    for model, options in [
        (checkpoint, ("--checkpoint", "none")),
        (checkpoint / "config.json", ()),
    ]:
        moec_command("compile", model, *options, "-o", tmp_path / "out.moec", "--force", "--quiet")
        assert not (tmp_path / "out.moec" / "weights").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [EXPERT, GATE])
def test_weights_that_are_no_numbers(checkpoint, name, value):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[name][-1, -1] = value
    save_file(tensors, path)
    refused(checkpoint, "E-NONFINITE", "model", text=name)


def shard(checkpoint, tmp_path):
    target = oracle.rewrite_sharded(checkpoint, tmp_path / "sharded")
    return target, target / "model.safetensors.index.json"


def test_missing_shard(checkpoint, tmp_path):
    target, _ = shard(checkpoint, tmp_path)
    (target / "model-00002-of-00003.safetensors").unlink()
    refused(target, "E-TENSOR", "model", text="model-00002-of-00003.safetensors")


@pytest.mark.parametrize(
    "file",
    ["../checkpoint/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 5],
)
def test_index_that_leaves_the_folder(checkpoint, tmp_path, file):
    target, index = shard(checkpoint, tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"][EXPERT] = file
    index.write_text(json.dumps(content))
    refused(target, "E-PATH|E-CONFIG|E-FILE-FORMAT", "model")


def test_link_that_leaves_the_folder(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(checkpoint, "E-PATH", "model", text="model.safetensors")


def test_index_that_lies(checkpoint, tmp_path):
    target, index = shard(checkpoint, tmp_path)
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    was = content["weight_map"][EXPERT]
    content["weight_map"][EXPERT] = files[(files.index(was) + 1) % len(files)]
    index.write_text(json.dumps(content))
    refused(target, "E-TENSOR|E-FILE-FORMAT", "model", text=EXPERT)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": []}', "[" * 100_000], ids=range(5)
)
def test_index_that_is_none(checkpoint, tmp_path, content):
    target, index = shard(checkpoint, tmp_path)
    index.write_text(content)
    refused(target, "E-CONFIG|E-FILE-FORMAT", "model", text="index.json")


# --- the output -----------------------------------------------------------------------------------


def test_output_exists(checkpoint, tmp_path):
    out = tmp_path / "out.moec"
    out.mkdir()
    (out / "precious").write_text("mine")
    done = moec_command("compile", checkpoint, "-o", out, check=False)
    assert done.returncode == EXIT["system"] and "E-EXISTS" in done.stderr
    assert "--force" in done.stderr
    assert [f.name for f in out.iterdir()] == ["precious"]


def test_output_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = moec_command("compile", checkpoint, "-o", tmp_path / "file" / "out.moec", check=False)
    assert done.returncode == EXIT["system"] and re.search("E-IO|E-PATH|E-EXISTS", done.stderr)


def test_disk_full(checkpoint, tmp_path):
    """A limit on the size of a file stands in for the full disk: write() fails midway."""
    out = tmp_path / "result" / "out.moec"
    out.parent.mkdir()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = moec_command("compile", checkpoint, "-o", out, check=False, preexec_fn=limit)
    assert done.returncode == EXIT["system"], done.stderr
    assert re.search("E-SPACE|E-IO", done.stderr)
    assert not list(out.parent.iterdir())


def test_interrupted(checkpoint, tmp_path):
    """SIGTERM in the middle leaves nothing."""
    import subprocess

    out = tmp_path / "result" / "out.moec"
    out.parent.mkdir()
    child = subprocess.Popen(
        [driver(), "compile", checkpoint, "-o", out], stderr=subprocess.PIPE, text=True
    )
    try:
        child.wait(0.3)
    except subprocess.TimeoutExpired:
        child.terminate()
        child.communicate(timeout=30)
        assert child.returncode in (143, -signal.SIGTERM)
        assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--cpu", "pentium"],
        ["--dtype", "f16"],
        ["--layers", "7"],
        ["--layers", "x"],
        ["--nonsense"],
        ["--target", "cuda", "--gpu", "sm_80,sm_100"],
        ["--target", "rocm"],
    ],
)
def test_options(checkpoint, options):
    out = checkpoint.parent / "out.moec"
    done = moec_command("compile", checkpoint, "-o", out, *options, check=False)
    assert done.returncode in (2, 3, 4), done.stderr
    assert re.search(r"E-[A-Z]+: ", done.stderr) and not out.exists()


# --- a compiled folder ----------------------------------------------------------------------------


@pytest.fixture
def folder(compiled, copy_of):
    return copy_of(compiled("qwen3_moe", "f32").path)


def weight_file(folder, number=0):
    return sorted((folder / "weights").iterdir())[number]


def load_error(folder, **kwargs):
    """The error of opening the folder, or of the first use of its first layer."""
    with pytest.raises(moec.Error) as caught:
        moec.load(folder, **kwargs)
    assert caught.value.expected and caught.value.got, caught.value
    return caught.value.name


def test_no_library(folder):
    next(folder.glob("lib*.so")).unlink()
    assert load_error(folder) == "E-PATH"


def test_two_libraries(folder):
    shutil.copy(next(folder.glob("lib*.so")), folder / "libsecond.so")
    assert load_error(folder) == "E-PATH"


def test_library_that_is_none(folder):
    library = next(folder.glob("lib*.so"))
    for content in (b"", b"\x7fELF", library.read_bytes()[:5000]):
        library.write_bytes(content)
        assert load_error(folder) in ("E-IO", "E-FILE-FORMAT")


def test_no_weights(folder):
    weight_file(folder).unlink()
    assert load_error(folder) == "E-IO"


@pytest.mark.parametrize("load", ["map", "copy"])
@pytest.mark.parametrize("keep", [0, 7, 4000, 6000, -4096, -1])
def test_truncated_weights(folder, keep, load):
    file = weight_file(folder)
    file.write_bytes(file.read_bytes()[:keep])
    assert load_error(folder, load=load) == "E-FILE-FORMAT"


@pytest.mark.parametrize("at", [8192, 20000, -1])
def test_changed_weights(folder, at):
    """Found when every byte is checked; otherwise the folder opens."""
    file = weight_file(folder)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert load_error(folder, verify=True) == "E-HASH"
    moec.load(folder)


@pytest.mark.parametrize("at", [4096, 4104, 4112, 4144, 4152])
def test_changed_id_block(folder, at):
    file = weight_file(folder)
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)
    assert load_error(folder) in ("E-FILE-FORMAT", "E-WEIGHTS", "E-LAYOUT")


def test_weights_of_another_layer(folder):
    """A dense layer's file under the name of a MoE layer."""
    shutil.copy(weight_file(folder, 1), weight_file(folder, 0))
    assert load_error(folder) in ("E-WEIGHTS", "E-LAYOUT")


def test_weights_of_another_model(folder, compiled):
    assert load_error(folder, weights=compiled("mixtral", "f32").path / "weights") in (
        "E-IO",
        "E-WEIGHTS",
        "E-LAYOUT",
    )


def test_pack_for_another_model(original, folder, tmp_path):
    done = moec_command(
        "pack", original / "checkpoint", "--for", folder, "-o", tmp_path / "weights", check=False
    )
    assert done.returncode in (3, 4) and re.search("E-[A-Z]+: ", done.stderr)
    assert not (tmp_path / "weights").exists()


def test_level_that_is_not_there(folder, monkeypatch):
    assert load_error(folder, cpu_level="amx-bf16x") == "E-ISA"
    monkeypatch.setenv("MOEC_CPU", "x86-64-v1")
    assert load_error(folder) == "E-ISA"
    monkeypatch.setenv("MOEC_CPU", "x86-64-v3")
    assert moec.load(folder).layers[0].info.level == "x86-64-v3"


def test_moved_and_read_only(folder, tmp_path):
    """No absolute path is inside, nothing is written on opening."""
    other = tmp_path / "moved"
    folder.rename(other)
    for file in other.rglob("*"):
        os.chmod(file, 0o555 if file.is_dir() else 0o444)
    before = sorted((f, f.stat().st_mtime_ns) for f in other.rglob("*"))
    layer = moec.load(other).layers[0]
    assert layer(torch.zeros(2, layer.info.H)).shape == (2, layer.info.H)
    assert before == sorted((f, f.stat().st_mtime_ns) for f in other.rglob("*"))
    library = next(other.glob("lib*.so")).read_bytes()
    assert str(tmp_path).encode() not in library
    assert str(tmp_path) not in (other / "manifest.json").read_text()
