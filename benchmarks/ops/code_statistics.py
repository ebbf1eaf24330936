"""Rows per code and their sums: fastvq against the usual ways to add rows up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.nearest_code import CASES as SEARCHES
from benchmarks.ops.nearest_code import inputs
from benchmarks.suites import Context, Prepared
from fastvq import ops
from fastvq.reference import code_statistics as reference

# `skew` is the fraction of the rows that one code owns.
CASES = {
    device: [{**case, "skew": skew} for case in cases for skew in (0.0, 0.5)]
    for device, cases in SEARCHES.items()
}
QUICK_CASES = [{"N": 512, "K": 64, "D": 16, "skew": 0.5}]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, codebook = inputs(case, context.device)
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(case["K"], (case["N"],), generator=generator).to(context.device)
    indices[: int(case["skew"] * case["N"])] = 0
    exact = reference.code_statistics(x, indices, case["K"])
    prepared = Prepared()
    ours = ops.code_statistics(x, indices, case["K"])
    # Both sum in float64 and round once; only the CPU kernel adds in the reference's order.
    tolerance = {"rtol": 0.0, "atol": 0.0} if context.device == "cpu" else {"rtol": 2.0**-23}
    for a, b in zip(ours, exact):
        try:
            torch.testing.assert_close(a, b, **{"atol": 1e-9, **tolerance})
        except AssertionError as error:
            raise RuntimeError(
                f"fastvq's sums differ from the reference at {case}: no time is reported"
            ) from error
    prepared.candidates["fastvq"] = lambda: ops.code_statistics(x, indices, case["K"])
    for name, sums in {"index_add_": _index_add, "one-hot matrix product": _one_hot}.items():

        def checked(sums: Callable = sums) -> Callable[[], object]:
            if sums is _one_hot and case["N"] * case["K"] > 2**30:
                raise MemoryError("the one-hot matrix would have more than 2³⁰ elements")
            got = sums(x, indices, codebook)
            torch.testing.assert_close(got[0], exact[0])
            torch.testing.assert_close(got[1], exact[1], rtol=1e-3, atol=0.1)
            return lambda: sums(x, indices, codebook)

        prepared.rival(name, checked)
    return prepared


def _index_add(x: Tensor, indices: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(len(codebook), device=x.device)
    counts.index_add_(0, indices, torch.ones_like(indices, dtype=torch.float32))
    return counts, torch.zeros_like(codebook).index_add_(0, indices, x)


def _one_hot(x: Tensor, indices: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    chosen = F.one_hot(indices, len(codebook)).float()
    return chosen.sum(dim=0), chosen.T @ x
