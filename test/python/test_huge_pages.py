"""Weights lie in huge pages where the system has them: copied always, mapped where the file system
caches files in large pages. What a system cannot do is tried first, without moec, and then said."""

from __future__ import annotations

import json
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import moec_command

HUGE = 2 << 20
# 50 MB of weights in one layer.
LAYER = {"name": "l", "index": 0, "H": 512, "F": 1024, "E": 8, "K": 2}
LAYER |= {
    "router": {"score": "softmax", "order": "score_then_select", "renormalize": "sum"},
    "expert": {"form": "glu", "activation": "silu"},
}
WEIGHTS = 3 * 512 * 1024 * 8 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("huge")
    spec = path / "spec.moe.json"
    spec.write_text(json.dumps({"schema": 1, "name": "m", "dtype": "f32", "layers": [LAYER]}))
    moec_command("compile", spec, "-o", path / "m.moec", "--checkpoint", "random:1", "--quiet")
    return path / "m.moec"


def huge_bytes(field: str) -> int:
    """Bytes of this process that are mapped by huge pages: AnonHugePages or FilePmdMapped."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.M)[1]) << 10


def call(library) -> None:
    """Touches every weight: all experts serve."""
    x = np.ones((64, LAYER["H"]), np.float32)
    ids = np.arange(128, dtype=np.int32).reshape(64, 2) % LAYER["E"]
    y = library.layers[0].experts(x, ids, np.full((64, 2), 0.5, np.float32))
    assert np.isfinite(y).all()


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_copied_weights_lie_in_huge_pages(folder):
    import moec

    probe = mmap.mmap(-1, 16 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = huge_bytes("AnonHugePages")
    probe.madvise(mmap.MADV_HUGEPAGE)
    probe.write(b"\1" * len(probe))
    if huge_bytes("AnonHugePages") - before < 8 * HUGE:
        pytest.skip("this system gives no huge pages to a program that asks for them")
    probe.close()

    before = huge_bytes("AnonHugePages")
    library = moec.load(folder, load="copy", threads=1)
    call(library)
    gained = huge_bytes("AnonHugePages") - before
    # The ends of the arena are smaller than a huge page.
    assert gained >= WEIGHTS - 2 * HUGE, (gained, WEIGHTS)


def test_mapped_weights_lie_in_huge_pages_of_the_file(folder, tmp_path):
    import moec

    other = tmp_path / "probe"
    other.write_bytes(b"\1" * (16 * HUGE))
    with open(other, "rb") as file:
        os.fsync(file.fileno())
        drop_from_cache(other)
        probe = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        before = huge_bytes("FilePmdMapped")
        probe.madvise(mmap.MADV_HUGEPAGE)
        assert sum(probe[i] for i in range(0, len(probe), 4096)) == len(probe) // 4096
        if huge_bytes("FilePmdMapped") - before < 8 * HUGE:
            pytest.skip("this file system does not cache files in huge pages")
        probe.close()

    (packed,) = (folder / "weights").iterdir()
    drop_from_cache(packed)
    before = huge_bytes("FilePmdMapped")
    library = moec.load(folder, load="map", threads=1)
    call(library)
    gained = huge_bytes("FilePmdMapped") - before
    assert gained >= WEIGHTS // 2, (gained, WEIGHTS)
