"""cmake --install and pip install ., each used by a project that knows nothing of this tree."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build"))
CONSUMER = ROOT / "test/package/consumer"


def run(*command, **options):
    # The build tree's package must not stand in for an installed one.
    environment = dict(options.pop("env", os.environ))
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The installed tree, moved once after installation: nothing in it may name its place."""
    first = tmp_path_factory.mktemp("install") / "first"
    run("cmake", "--install", BUILD, "--prefix", first)
    moved = first.parent / "moved to here"
    shutil.move(first, moved)
    return moved


def check_consumer(text):
    version, message = text.splitlines()
    header = (ROOT / "include/moec.h").read_text()
    abi = int(re.search(r"#define MOEC_ABI (0x\w+)u", header)[1], 16)
    assert version == f"{abi >> 16}.{abi & 0xFFFF} E-IO", text
    assert message.startswith("E-IO: ") and "/nonexistent.moec" in message, text
    assert ": expected " in message and ", but got" in message, text


def test_cmake_package(prefix, tmp_path):
    run("cmake", "-G", "Ninja", "-S", CONSUMER, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path)
    check_consumer(run(tmp_path / "consumer_c"))
    check_consumer(run(tmp_path / "consumer_static"))
    assert run(tmp_path / "consumer_cxx") == "2 lanes\n"


def test_cmake_package_refuses_another_version(prefix, tmp_path):
    source = tmp_path / "CMakeLists.txt"
    source.write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(p C)\nfind_package(moec 9.0 REQUIRED)\n"
    )
    done = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "9.0" in done.stderr


def test_pkg_config(prefix, tmp_path):
    environment = dict(os.environ, PKG_CONFIG_PATH=str(prefix / "lib/pkgconfig"))
    flags = run("pkg-config", "--cflags", "--libs", "moec", env=environment)
    # The prefix holds a blank, which pkg-config escapes for a shell.
    program = tmp_path / "consumer"
    source = CONSUMER / "consumer.c"
    run("sh", "-c", f"cc -std=c99 {source} -o {program} {flags}")
    environment["LD_LIBRARY_PATH"] = str(prefix / "lib")
    check_consumer(run(program, env=environment))


def test_runtime_needs_only_the_c_library(prefix):
    dynamic = run("objdump", "-p", prefix / "lib/libmoec.so.1")
    needed = set(re.findall(r"NEEDED\s+(\S+)", dynamic))
    assert needed <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}, needed
    assert re.search(r"SONAME\s+libmoec\.so\.1$", dynamic, re.M)


def test_tools_run_from_the_moved_tree(prefix):
    for tool in ("moe-opt", "moe-reduce", "moec"):
        assert "22.1" in run(prefix / "bin" / tool, "--version"), tool
    assert (prefix / "share/moec/models/mixtral.json").exists()


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory):
    """The Python of a fresh environment in which `pip install .` was run."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True, system_site_packages=True)
    python = folder / "bin/python"
    # The tests' own environment lends the build requirements and numpy.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "lent.pth").write_text("\n".join(packages) + "\n")
    run(python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", ROOT)
    return python


def test_wheel_imports_and_finds_the_compiler(wheel_python, tmp_path):
    where = run(wheel_python, "-c", "import moec; print(moec.__file__)", cwd=tmp_path).strip()
    assert where.startswith(str(wheel_python.parent.parent)), where
    text = run(wheel_python.parent / "moec", "--version", cwd=tmp_path)
    assert "0.1.0" in text, text


def test_wheel_compiles_and_runs_a_layer(wheel_python, tmp_path):
    program = tmp_path / "use.py"
    program.write_text(
        """
import json
import numpy as np
import moec

config = dict(model_type="mixtral", architectures=["MixtralForCausalLM"], hidden_size=33,
              intermediate_size=20, num_local_experts=4, num_experts_per_tok=2,
              num_hidden_layers=1, hidden_act="silu", torch_dtype="float32")
json.dump(config, open("config.json", "w"))
library = moec.compile("config.json", out="tiny.moec", options={"checkpoint": "random:1"})
layer = library.layers[0] if hasattr(library, "layers") else moec.load("tiny.moec").layers[0]
x = np.random.default_rng(0).standard_normal((5, 33)).astype(np.float32)
y = layer(x)
assert y.shape == (5, 33) and np.isfinite(y).all() and np.abs(y).max() > 0
print("done")
"""
    )
    assert run(wheel_python, program, cwd=tmp_path).strip().endswith("done")
