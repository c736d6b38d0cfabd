"""The cache of compiled code under many processes at once, and after one that died."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import moec
import numpy as np
import pytest
from moec import _cache

SPEC = {
    "schema": 1,
    "name": "experts",
    "dtype": "f32",
    "layers": [
        {
            "index": 0,
            "name": "layers.{i}",
            "kind": "moe",
            "H": 32,
            "F": 32,
            "E": 4,
            "K": 2,
            "expert": {"form": "glu", "activation": "silu"},
            "router": {"score": "softmax", "order": "score_then_select", "renormalize": "none"},
        }
    ],
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from conftest import driver

    monkeypatch.setenv("MOEC_COMPILER", driver())
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def result(folder) -> np.ndarray:
    layer = moec.load(folder, load="none", threads=1).layers[0]
    layer.set_weight("router", np.zeros((4, 32), np.float32))
    layer.set_weight("gate_up", np.full((4, 64, 32), 0.01, np.float32))
    layer.set_weight("down", np.ones((4, 32, 32), np.float32))
    return layer(np.ones((3, 32), np.float32))


def ask(barrier, queue):
    barrier.wait()
    queue.put((os.getpid(), result(_cache.library_folder(SPEC)).tolist()))


def test_processes_at_once(cache):
    """One compiles, the others wait for it, and all have the same library."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    children = [context.Process(target=ask, args=(barrier, queue)) for _ in range(3)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert answers[0][1] == answers[1][1] == answers[2][1]
    folders = [path for path in cache.iterdir() if path.suffix == ".moec"]
    assert len(folders) == 1
    before = os.stat(folders[0] / "manifest.json").st_mtime_ns
    assert _cache.library_folder(SPEC) == folders[0]
    assert os.stat(folders[0] / "manifest.json").st_mtime_ns == before  # not compiled again


def test_one_that_was_killed(cache):
    """The lock goes with the process; what it left is no library and is made anew."""

    def die():
        os.environ["MOEC_COMPILER"] = str(slow)
        _cache.library_folder(SPEC)

    cache.mkdir()
    # Answers no question and never ends: the child hangs in it with the lock held.
    slow = cache / "compiler"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n")
    slow.chmod(0o755)
    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.lock")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    folder = _cache.library_folder(SPEC)
    again = result(folder)
    # A folder without its manifest was never published.
    (folder / "manifest.json").rename(cache / "manifest.json")
    assert _cache.library_folder(SPEC) == folder
    assert np.array_equal(result(folder), again)


def test_other_semantics_are_other_code(cache):
    first = _cache.library_folder(SPEC)
    other = json.loads(json.dumps(SPEC))
    other["layers"][0]["expert"]["activation"] = "gelu"
    second = _cache.library_folder(other)
    assert first != second
    assert not np.array_equal(result(first), result(second))


def test_a_folder_that_cannot_be_written(cache, monkeypatch):
    cache.write_text("a file")
    with pytest.raises(OSError, match=r"E-IO: .*MOEC_CACHE"):
        _cache.library_folder(SPEC)
