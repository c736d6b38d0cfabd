"""A disk that is really full: a tmpfs of a few hundred kB in a mount namespace of its own.

Wherever the last byte goes, the end is E-SPACE, exit code 5, and nothing half-written.
"""

import subprocess

import pytest
from conftest import driver, moec_command

CONFIG = """{"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96,
"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "dtype": "float32"}"""


def in_namespace(*command, **kwargs):
    return subprocess.run(
        ["unshare", "-rm", *command], capture_output=True, text=True, check=False, **kwargs
    )


@pytest.fixture(scope="module", autouse=True)
def may_mount(tmp_path_factory):
    folder = tmp_path_factory.mktemp("may-mount")
    try:
        done = in_namespace("mount", "-t", "tmpfs", "none", folder)
    except FileNotFoundError as error:
        pytest.skip(f"no real full disk here: {error}")
    if done.returncode:
        pytest.skip(f"no real full disk here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(CONFIG)
    weights = ("--checkpoint", "random:1", "--cpu", "x86-64-v3", "--quiet")
    moec_command("compile", folder / "config.json", *weights, "-o", folder / "a.moec")
    return folder


def on_disk(tmp_path, size, command, before="true"):
    """Runs `before` and then moec on a disk of `size`; returns exit code, stderr and what is there.

    TMPDIR and the current folder stay on the large disk.
    """
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    script = (
        f"mount -t tmpfs -o size={size} none {disk} && {before} && {{ ls -A {disk}; "
        f"{driver()} {command}; echo exit $?; ls -A {disk}; }}"
    )
    done = in_namespace("bash", "-c", script, cwd=tmp_path)
    left, _, rest = done.stdout.partition("exit ")
    code, *found = rest.split()
    return int(code), done.stderr, sorted(left.split()), sorted(found)


def check_full(tmp_path, size, command, before="true"):
    code, said, was, found = on_disk(tmp_path, size, command, before)
    assert code == 5 and "E-SPACE: " in said, f"{size}: exit {code}: {said}"
    assert found == was, f"{size}: left {found}"
    assert not list(tmp_path.glob("moec-crash*"))


@pytest.mark.parametrize("size", ["4k", "20k", "60k", "90k", "120k", "200k", "500k"])
def test_compile(tmp_path, model, size):
    options = "--checkpoint random:1 --cpu x86-64-v3"
    check_full(tmp_path, size, f"compile {model}/config.json {options} -o {tmp_path}/disk/b.moec")


@pytest.mark.parametrize("size", ["4k", "20k"])
@pytest.mark.parametrize("emit", ["obj", "asm"])
def test_one_file(tmp_path, model, size, emit):
    command = f"compile {model}/config.json --cpu x86-64-v3 --emit {emit}"
    check_full(tmp_path, size, f"{command} -o {tmp_path}/disk/out")


@pytest.mark.parametrize("size", ["4k", "100k", "300k"])
def test_pack(tmp_path, model, size):
    check_full(tmp_path, size, f"pack random:1 --for {model}/a.moec -o {tmp_path}/disk/w")


def test_run(tmp_path, model):
    run = f"run {model}/a.moec --layer 0"
    check_full(tmp_path, "16k", f"{run} --tokens 100 -o {tmp_path}/disk/y.npy")
    # What was there before stays as it was.
    old = f"echo precious >{tmp_path}/disk/y.npy"
    check_full(tmp_path, "16k", f"{run} --tokens 100 --force -o {tmp_path}/disk/y.npy", before=old)
    check_full(
        tmp_path, "4k", f"{run} --tokens 3000 -o y.npy --trace {tmp_path}/disk/usage.safetensors"
    )


def test_room_enough(tmp_path, model):
    """The same commands on the same kind of disk, with room."""
    disk = tmp_path / "disk"
    weights = f"pack random:1 --for {model}/a.moec -o {disk}/w"
    code, said, _, found = on_disk(tmp_path, "20m", weights)
    assert code == 0 and found == ["w"], said
    y = f"run {model}/a.moec --layer 0 --tokens 100 -o {disk}/y.npy"
    code, said, _, found = on_disk(tmp_path, "16m", y)
    assert code == 0 and found == ["y.npy"], said
