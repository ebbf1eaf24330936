"""The training step of a whole VQ-VAE as the batch grows."""

from __future__ import annotations

from typing import Any

from benchmarks.end_to_end import stage1_step
from benchmarks.suites import Context, Prepared

_BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 4, 16, 64, 256)}
CASES = {
    device: [{**stage1_step.CASES[device][0], "K": 1024, "B": batch} for batch in batches]
    for device, batches in _BATCHES.items()
}
QUICK_CASES = [{**stage1_step.QUICK_CASES[0], "B": 2}]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    prepared = stage1_step.prepare(case, context)
    prepared.keep({"fastvq.Codebook", "vector-quantize-pytorch", "one-hot quantizer"})
    return prepared
