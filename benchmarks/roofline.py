"""What the machine can do, measured in the run that uses it: copying and matrix products."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch

from .suites import Work

# Larger than the caches of the machines in use.
_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
_REPEATS = 7


class Ceiling(NamedTuple):
    """Best of several runs: bytes read and written by a copy, FLOPs of a square matrix product."""

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    dtype: str

    def floor_ms(self, work: Work) -> float:
        """The least time for the work: the longer of its products and its traffic."""
        seconds = max(work.flops / self.matrix_flops_per_s, work.bytes / self.copy_bytes_per_s)
        return 1e3 * seconds


@functools.cache
def measure(device: str, dtype: str, threads: int) -> Ceiling:
    """The ceilings of this device now, at this many CPU threads (the current number)."""
    source = torch.zeros(_COPIED_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    copying = _best_seconds(lambda: target.copy_(source), device)
    size = _MATRIX_SIZE[device]
    a, b = (torch.ones(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    multiplying = _best_seconds(lambda: a @ b, device)
    return Ceiling(2 * _COPIED_BYTES[device] / copying, 2 * size**3 / multiplying, dtype)


def _best_seconds(run: object, device: str) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()  # type: ignore[operator]
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
