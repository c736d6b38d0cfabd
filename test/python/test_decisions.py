"""Decisions are attributes: a fuse pass left out, or one number of the schedule changed, gives
other code and the same bits.
"""

from __future__ import annotations

import json
import subprocess

import moec
import oracle
import pytest
from conftest import LEVELS, moec_command
from test_bits import same

FUSE_PASSES = (
    "moe-fuse-router-dispatch",
    "moe-fuse-gather",
    "moe-fuse-activation",
    "moe-fuse-combine",
)


def code_of(folder) -> bytes:
    """The instructions of the library of a compiled folder; not its tables, which hold ids."""
    (library,) = folder.glob("lib*.so")
    text = folder / "text"
    command = ["objcopy", "-O", "binary", "--only-section=.text", library, text]
    subprocess.run(command, check=True)
    code = text.read_bytes()
    text.unlink()
    assert len(code) > 10_000
    return code


@pytest.fixture
def compile_again(compiled, tmp_path):
    """compile_again(row, dtype, *options): the row's checkpoint once more, with other options."""

    def again(row, dtype, *options):
        base = compiled(row, dtype)
        folder = tmp_path / base.path.name
        moec_command("compile", base.checkpoint.path, "-o", folder, "--quiet", *options)
        return base, folder

    return again


def check_same_results(base, folder):
    for level in LEVELS:
        other = moec.load(folder, cpu_level=level)
        for ours, theirs in zip(other.layers, base.load(level).layers, strict=True):
            for count in (1, 33):
                x = oracle.tokens(count, ours.info.H, "f32")
                assert same(ours(x), theirs(x)), f"{ours.name} at {level}, T = {count}"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", FUSE_PASSES)
def test_a_fuse_pass_left_out_gives_other_code_and_the_same_bits(compile_again, name, dtype):
    base, folder = compile_again("mixtral", dtype, "--disable-pass", name)
    assert code_of(folder) != code_of(base.path)
    check_same_results(base, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 2},
        {"prefetch": 512},
        {"panels_per_task": 1},
        {"chunk_rows": 16},
        {"sum_rows": 8},
        # Blocks of a chunk take 16 or 32 k, then the next ones; or all panels of a task do.
        {"k_block": 1, "rows": 2},
        {"k_block": 1, "k_chunk": 1, "rows": 2, "panels_per_task": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_change_of_the_schedule_changes_the_code_and_no_bit(
    compile_again, compiled, tmp_path, changes
):
    manifest = json.loads((compiled("mixtral", "f32").path / "manifest.json").read_text())
    schedule = manifest["strategy"]
    for function in schedule.values():
        for name, operation in function.items():
            # The router sums in f64 here, whose registers hold one row at x86-64-v3.
            if name != "router":
                operation |= changes
    edited = tmp_path / "strategy.json"
    edited.write_text(json.dumps(schedule))
    base, folder = compile_again("mixtral", "f32", "--strategy", edited)
    assert code_of(folder) != code_of(base.path)
    check_same_results(base, folder)
