"""Hostile values for what a person can write in --strategy: refused in words, or compiled."""

import json
import re

import pytest
from conftest import moec_command

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}
FIELDS = ["rows", "panels", "prefetch", "ahead", "k_block", "defer", "chunk_rows"]
FIELDS += ["panels_per_task", "sum_rows", "k_chunk"]
NUMBERS = [-1, 0, 3, 5, 17, 1 << 31, (1 << 63) - 1, -(1 << 63)]
OTHERS = [1.5, 1e300, 1 << 64, "3", "", None, True, [], [3], {}, "a_first", "automatic"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("strategy") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def attempt(spec, folder, strategy, level):
    """Compiles with `strategy`; whatever it holds, the end is code or one sentence."""
    file = folder / "strategy.json"
    file.write_text(strategy if isinstance(strategy, str) else json.dumps(strategy))
    done = moec_command(
        "compile", spec, "--cpu", level, "--strategy", file, "--emit", "obj", "--force",
        "-o", folder / "out.o", check=False,
    )  # fmt: skip
    assert done.returncode in (0, 2), f"{strategy}: exit {done.returncode}\n{done.stderr}"
    if done.returncode:
        assert re.search(r"E-ARGUMENT: .*expected .*, but got ", done.stderr), done.stderr
        assert "moec-crash" not in done.stderr
    return done


@pytest.mark.parametrize("field", FIELDS)
def test_numbers(spec, tmp_path, field):
    for value in NUMBERS:
        attempt(spec, tmp_path, {"*": {"*": {field: value}}}, "x86-64-v3")


@pytest.mark.parametrize("field", [*FIELDS, "order", "hint"])
def test_other_values(spec, tmp_path, field):
    for value in OTHERS:
        done = attempt(spec, tmp_path, {"*": {"*": {field: value}}}, "x86-64-v3")
        good = field == "order" and value == "a_first"
        assert (done.returncode == 0) == good, (value, done.stderr)
        assert good or f"`{field}`" in done.stderr


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["a_first", "b_first"])
def test_panels_and_order(spec, tmp_path, panels, order):
    """An order that does not fit is refused, and never exchanged for the other one."""
    for rows in (1, 3, 14):
        fields = {"panels": panels, "panels_per_task": 12, "rows": rows, "order": order}
        done = attempt(spec, tmp_path, {"*": {"*": fields}}, "avx512-bf16")
        vectors = 2 * panels
        fits = rows * vectors + (vectors if order == "b_first" else rows) + 1 <= 32
        # Pairs of panels share blocks of bf16 between two matmuls.
        legal = fits and panels != 3
        assert (done.returncode == 0) == legal, (fields, done.stderr)
        assert fits or f"order = {order}, which need" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "7", '{"*": 7}', '{"*": {"*": 7}}', '{"*": {"*": null}}', '{"": {}}',
        '{"*": {"": {"rows": 1}}}', '{"*": {"router": {"": 1}}}', '{"no": {"router": {"rows": 1}}}',
        '{"*": {"*": {"rows": 1, "rows": 2}}}', '{"*": {"}": {"rows": 1}}}', "{'*': 1}",
        '{"*": {"*": {"r\\u0000": 1}}}', '{"*": {"*": {"ro}ws": 1}}}',
        '{"*}{": {"*": {"rows": 1}}}', '{"*": {"*": {"order": "}"}}}',
        '{"*": {"gr ouped": {"rows": 1}}}', '{"*": {"\\"": {"rows": 1}}}',
        pytest.param('{"a":' * 500, id="deep"),
    ],
)  # fmt: skip
def test_text(spec, tmp_path, text):
    file = tmp_path / "strategy.json"
    file.write_text(text)
    done = moec_command(
        "compile", spec, "--cpu", "x86-64-v3", "--strategy", file, "--emit", "obj",
        "-o", tmp_path / "out.o", check=False,
    )  # fmt: skip
    harmless = text == '{"": {}}'
    assert done.returncode in ((0,) if harmless else (2, 3)), done.stderr
    assert harmless or re.search(r"E-(ARGUMENT|FILE-FORMAT): .*expected .*, but got ", done.stderr)
