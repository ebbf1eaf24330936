"""Tiles of the search on this device: the shipped ones and those one change away from them.

What is found is written down with its device and versions, never used by itself: a better choice
is copied into kernels/triton/configs/nearest_code.json together with where it was measured.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from fastvq.kernels.triton.nearest_code import nearest_code_forward
from fastvq.kernels.triton.nearest_code_tiles import Tiles, choose_tiles
from torch import Tensor

from benchmarks.ops.nearest_code import inputs
from benchmarks.timing import interleaved

# Each change of one field that a neighbour makes; values outside these are left out.
CHANGES: dict[str, tuple[int, ...]] = {
    "block_n": (64, 128),
    "block_k": (64, 128),
    "group": (4, 8, 16),
    "warps": (4, 8),
    "stages": (2, 3, 4),
    "chunk": (64, 128),
}


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """The tiles themselves, then every other value of one field."""
    yield tiles
    for name, values in CHANGES.items():
        for value in values:
            if value != getattr(tiles, name):
                yield dataclasses.replace(tiles, **{name: value})


def tune(sizes: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The quickest tiles of each size, with times in ms, and where that was measured.

    Args:
        sizes: cases of the search, by name.
        seconds: of compiling and timing in all, dealt out evenly.
    """
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    results = {}
    for name, case in sizes.items():
        x, codebook = inputs(case, "cuda")
        tiles = choose_tiles(case["D"], capability)
        runs, refused = _compiled(x, codebook, tiles, seconds / len(sizes) / 2)
        timings = interleaved(runs, device="cuda", seconds=seconds / len(sizes) / 4, least=3)
        medians = {who: timing.p50 for who, timing in timings.items()}
        best = min(medians, key=lambda who: medians[who])
        results[name] = {"case": case, "best": best, "ms": medians, "refused": refused}
        print(
            f"{name}: {best} {medians[best]:.3f} ms, shipped {medians['shipped']:.3f} ms",
            flush=True,
        )
    return {
        "sizes": results,
        "provenance": f"measured on {properties.name} (sm_{capability[0]}{capability[1]}), torch "
        f"{torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}",
    }


def _compiled(
    x: Tensor, codebook: Tensor, shipped: Tiles, seconds: float
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Searches by tiles that compile and agree with the shipped ones; the reasons of the others."""
    runs: dict[str, Callable[[], object]] = {}
    refused = {}
    start = time.monotonic()
    expected = None
    for tiles in neighbours(shipped):
        name = _difference(tiles, shipped)
        if expected is not None and time.monotonic() - start > seconds:
            refused[name] = "no time left to compile it"
            continue

        def run(tiles: Tiles = tiles) -> Tensor:
            rows, books = x[None], codebook[None]
            return nearest_code_forward(rows, books, metric="l2", distance=False, tiles=tiles)[0]

        try:
            found = run()
            torch.cuda.synchronize()
        except Exception as error:  # a neighbour may need more shared memory than there is
            refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if expected is None:
                raise
            continue
        expected = found if expected is None else expected
        if torch.equal(found, expected):
            runs[name] = run
        else:
            refused[name] = "its index differs from the shipped tiles'"
    return runs, refused


def _difference(tiles: Tiles, shipped: Tiles) -> str:
    changed = [name for name in CHANGES if getattr(tiles, name) != getattr(shipped, name)]
    return ", ".join(f"{name}={getattr(tiles, name)}" for name in changed) or "shipped"
