"""The search as N, K, D or the threads grow, the others at 16384, 1024, 64 and `--threads`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from benchmarks.ops import nearest_code
from benchmarks.suites import Context, Prepared

BASE = {"N": 16384, "K": 1024, "D": 64}
SWEEPS = {
    "N": tuple(4**power for power in range(3, 9)),
    "K": tuple(4**power for power in range(2, 8)),
    "D": (4, 8, 16, 32, 64, 128, 256, 512),
}
CANDIDATES = {
    "fastvq",
    "FAISS IndexFlatL2",
    "torch.cdist + argmin",
    "vector-quantize-pytorch, eval",
    "flash-kmeans",
}
# Rivals of more N×K pairs than this would take most of a run's time.
_MOST_PAIRS = 2**27


def _threads() -> list[int]:
    """1, 2, 4 … and all the cores."""
    cores = os.cpu_count() or 1
    return sorted({2**power for power in range(cores.bit_length())} | {cores})


_CURVES = [{"along": axis, **BASE, axis: size} for axis, sizes in SWEEPS.items() for size in sizes]
CASES = {
    "cpu": [*_CURVES, *({"along": "threads", **BASE, "threads": t} for t in _threads())],
    "cuda": _CURVES,
}
QUICK_CASES = [{"along": "N", **BASE, "N": 1024}]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    threads = case.get("threads", context.threads)
    torch.set_num_threads(threads)  # every case sets its own
    prepared = nearest_code.prepare(case, dataclasses.replace(context, threads=threads))
    pairs = case["N"] * case["K"]
    few = pairs <= _MOST_PAIRS
    prepared.keep(CANDIDATES if few else CANDIDATES - {"vector-quantize-pytorch, eval"})
    if not few:
        prepared.absent["vector-quantize-pytorch, eval"] = "left out above 2²⁷ pairs, for time"
    return prepared
