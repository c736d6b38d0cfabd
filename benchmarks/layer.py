"""The layer every peer runs: weights, inputs and routing that are the same in every process.

Weights are cheap to make and need no file: one block of random numbers, rotated for each expert.
Imported by the driver (NumPy alone) and by the peers (torch for bfloat16).
"""

from __future__ import annotations

import numpy as np


class Layer:
    """Shapes of one run of a configuration file, and what follows from them."""

    def __init__(self, run: dict):
        self.H, self.F, self.E, self.K = (int(run[key]) for key in "HFEK")
        self.dtype = run["dtype"]  # "f32" | "bf16"
        self.routing = run["routing"]  # "uniform" | "zipf" | "one-expert" | "half-empty"
        self.banks = int(run.get("banks", 1))
        self.element = 4 if self.dtype == "f32" else 2

    @property
    def expert_bytes(self) -> int:
        return 3 * self.H * self.F * self.element

    @property
    def flops_per_token(self) -> int:
        return 6 * self.H * self.F * self.K

    def expert(self, e: int) -> tuple[np.ndarray, np.ndarray]:
        """gate_up [2F, H] (gate first) and down [H, F] of an expert, float32, variance 1 / k."""
        if not hasattr(self, "_blocks"):
            generator = np.random.default_rng(0)
            make = generator.standard_normal
            up = make((2 * self.F, self.H), dtype=np.float32) * self.H**-0.5
            down = make((self.H, self.F), dtype=np.float32) * self.F**-0.5
            # Values that bfloat16 holds: all dtypes compute with the same weights.
            self._blocks = (round_bf16(up), round_bf16(down))
        up, down = self._blocks
        return np.roll(up, 7 * e, axis=0), np.roll(down, 5 * e, axis=0)

    def inputs(self, tokens: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """x [T, H] f32, ids [T, K] i32, weights [T, K] f32: several, to be used in turn."""
        generator = np.random.default_rng(1)
        popularity = np.ones(self.E)
        if self.routing == "zipf":
            popularity = generator.permutation(np.arange(1, self.E + 1) ** -1.2)
        elif self.routing == "half-empty":  # nobody chooses every other expert
            popularity[1::2] = 1e-30
        out = []
        for number in range(16 if tokens < 64 else 4):
            x = round_bf16(generator.standard_normal((tokens, self.H), dtype=np.float32))
            if self.routing == "one-expert":
                ids = (number * self.K + np.arange(self.K)) % self.E
                ids = np.broadcast_to(ids, (tokens, self.K))
            else:
                # The K smallest of exponential times: a weighted draw without replacement.
                times = generator.exponential(size=(tokens, self.E)) / popularity
                ids = np.argpartition(times, self.K - 1, axis=1)[:, : self.K]
            weights = generator.random((tokens, self.K), dtype=np.float32) + 0.5
            weights /= weights.sum(axis=1, keepdims=True)
            out.append((x, np.ascontiguousarray(ids, dtype=np.int32), weights))
        return out

    def reference(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float64, from the formula."""
        y = np.zeros((len(x), self.H))
        for e in np.unique(ids):
            rows, slots = np.nonzero(ids == e)
            up, down = (w.astype(np.float64) for w in self.expert(int(e)))
            gate, value = np.split(x[rows].astype(np.float64) @ up.T, 2, axis=1)
            h = gate / (1 + np.exp(-gate)) * value
            np.add.at(y, rows, (h @ down.T) * weights[rows, slots, None])
        return y


def round_bf16(values: np.ndarray) -> np.ndarray:
    """float32 with bfloat16's precision (to nearest, ties to even)."""
    bits = values.view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32)
