"""Fixtures of the Python tests: compiled checkpoints, and the CPU levels this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import oracle
import pytest
import torch

# Bits must not depend on it, and the tests share two cores with builds.
torch.set_num_threads(1)

_FEATURES = {
    "x86-64-v3": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "avx512-bf16": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"},
    "amx-bf16": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"}
    | {"amx_tile", "amx_bf16"},
}


def machine_levels() -> list[str]:
    """The levels this machine can run, read from the kernel, not from moec."""
    with open("/proc/cpuinfo") as f:
        flags = next((set(line.split()) for line in f if line.startswith("flags")), set())
    levels = [level for level, needed in _FEATURES.items() if needed <= flags]
    return levels if "x86-64-v3" in levels else []


ALL_LEVELS = list(_FEATURES)
LEVELS = machine_levels()


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="the whole product of sizes, not its pairwise cover"
    )


def pytest_collection_modifyitems(config, items):
    """What is only for --full is not there without it, rather than skipped."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_generate_tests(metafunc):
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", LEVELS)


def driver() -> str:
    """The compiler driver: $MOEC_COMPILER, the one in the package, or the one on PATH."""
    from moec.compiler import find_compiler
    from moec.errors import Error

    try:
        return find_compiler()
    except Error as e:
        if "MOEC_COMPILER" in os.environ:
            raise
        pytest.skip(str(e))  # a build of the runtime alone (MOE_ENABLE_COMPILER=OFF)


def moec_command(*arguments: object, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Runs `moec` with the arguments; a failure shows what it printed."""
    command = [driver(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


class Compiled:
    """A tiny checkpoint of one row, and the library the command line made of it."""

    def __init__(self, checkpoint: oracle.Checkpoint, path: Path):
        self.checkpoint, self.path = checkpoint, path
        self._open: dict = {}

    def load(self, level: str, **kwargs):
        import moec

        key = (level, tuple(sorted(kwargs.items())))
        if key not in self._open:
            self._open[key] = moec.load(self.path, cpu_level=level, **kwargs)
        return self._open[key]

    def pairs(self, level: str, **kwargs):
        """(layer of the library, block of transformers), in model order."""
        return list(zip(self.load(level, **kwargs).layers, self.checkpoint.blocks, strict=True))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled(row, dtype): compiled once for all tests of the run."""
    made: dict[tuple[str, str], Compiled] = {}

    def get(row: str, dtype: str) -> Compiled:
        driver()
        if (row, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{row}-{dtype}")
            checkpoint = oracle.make_checkpoint(row, dtype, folder / "checkpoint")
            moec_command("compile", checkpoint.path, "-o", folder / "out.moec", "--quiet")
            made[row, dtype] = Compiled(checkpoint, folder / "out.moec")
        return made[row, dtype]

    return get


@pytest.fixture(scope="session")
def mock(tmp_path_factory):
    """A folder with the hand-written module of test/Runtime as a library."""
    folder = tmp_path_factory.mktemp("mock") / "mock.moec"
    folder.mkdir()
    root = Path(__file__).resolve().parents[2]
    command = ["cc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{root / 'include'}"]
    source = root / "test" / "Runtime" / "mock.c"
    subprocess.run([*command, source, "-o", folder / "libmock.so", "-lm"], check=True)
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(folder): a copy that a test may spoil."""

    def copy(folder: Path) -> Path:
        target = tmp_path / "copy.moec"
        shutil.copytree(folder, target)
        for file in target.rglob("*"):
            os.chmod(file, 0o755 if file.is_dir() else 0o644)
        return target

    return copy
