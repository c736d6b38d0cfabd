"""No layer: reads as many bytes of memory as the chosen experts have. The time cannot be beaten by
whoever reads the weights from memory; moec's time over it is the share of the read rate reached."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from layer import Layer


class ReadLoop:
    """The loop of read_loop.c over a buffer of `size` bytes."""

    def __init__(self, size: int, threads: int):
        self.threads, self.size, self.at = threads, size, 0
        self.folder = tempfile.TemporaryDirectory()
        library = f"{self.folder.name}/read_loop.so"
        source = Path(__file__).with_name("read_loop.c")
        flags = ["-O2", "-march=native", "-pthread", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, source, "-o", library], check=True)
        self.loop = ctypes.CDLL(library)
        self.loop.read_loop_run.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        self.loop.read_loop_run.restype = ctypes.c_double
        self.loop.read_loop_open.argtypes = [ctypes.c_size_t, ctypes.c_int]
        if self.loop.read_loop_open(size, threads):
            raise MemoryError(f"expected {size} bytes, but got none")
        self.way = "prefetch 1 KB ahead" if self.loop.read_loop_prefetches() else "plain loads"

    def run(self, count: int) -> float:
        """Reads the next `count` bytes, from the start again where too few are left; seconds."""
        if self.at + count > self.size:
            self.at = 0
        seconds = self.loop.read_loop_run(self.at, count, self.threads)
        self.at += count // 4096 * 4096
        return seconds


class Peer:
    def __init__(self, name: str, layer: Layer, run: dict):
        self.layer = layer
        self.loop = ReadLoop(layer.E * layer.expert_bytes * layer.banks, run["threads"])
        self.version, self.note = "", f"huge pages, {self.loop.way}"

    def prepare(self, x, ids, weights):
        return len(np.unique(ids)) * self.layer.expert_bytes

    def run(self, item, bank, keep=True):
        self.loop.run(item)
