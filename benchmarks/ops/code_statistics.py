"""Rows per code and their sums, against the usual ways to add rows up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.nearest_code import CASES as SEARCHES
from benchmarks.ops.nearest_code import inputs
from benchmarks.suites import Context, Prepared, Work, WrongResult
from fastvq import ops
from fastvq.reference import code_statistics as reference

# `skew` is the fraction of the rows that one code owns.
CASES = {
    device: [{**case, "skew": skew} for case in cases for skew in (0.0, 0.5)]
    for device, cases in SEARCHES.items()
}
QUICK_CASES = [{"N": 4096, "K": 512, "D": 64, "skew": 0.5}]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, _ = inputs(case, context.device)
    count = case["K"]
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(count, (case["N"],), generator=generator).to(context.device)
    indices[: int(case["skew"] * case["N"])] = 0
    exact = reference.code_statistics(x, indices, count)
    ours = ops.code_statistics(x, indices, count)
    # Both sum in float64 and round once; only the CPU kernel adds in the reference's order.
    tolerance = {"rtol": 0.0, "atol": 0.0} if context.device == "cpu" else {"rtol": 2.0**-23}
    for a, b in zip(ours, exact):
        try:
            torch.testing.assert_close(a, b, **{"atol": 1e-9, **tolerance})
        except AssertionError as error:
            raise WrongResult(
                f"fastvq's sums differ from the reference at {case}: no time is reported"
            ) from error
    prepared = Prepared(work(case))
    prepared.candidates["fastvq"] = lambda: ops.code_statistics(x, indices, count)
    prepared.notes["fastvq"] = "sums in float64"
    ways = {"index_add_": index_add, "one-hot matrix product": _one_hot}
    for name, sums in ways.items():
        prepared.rival(name, lambda sums=sums: _checked(sums, x, indices, exact))
    prepared.rival(
        "index_add_, compiled",
        lambda: _checked(torch.compile(index_add, dynamic=False), x, indices, exact),
    )
    return prepared


def work(case: dict[str, Any]) -> Work:
    """One addition per element; rows and indices in, counts and sums out."""
    n, k, d = case["N"], case["K"], case["D"]
    return Work(1.0 * n * d, 4.0 * n * d + 8.0 * n + 4.0 * k * (d + 1))


def _checked(
    sums: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    indices: Tensor,
    exact: tuple[Tensor, Tensor],
) -> Callable[[], object]:
    if sums is _one_hot and len(x) * len(exact[0]) > 2**30:
        raise MemoryError("the one-hot matrix would have more than 2³⁰ elements")
    got = sums(x, indices, len(exact[0]))
    torch.testing.assert_close(got[0], exact[0])
    torch.testing.assert_close(got[1], exact[1], rtol=1e-3, atol=0.1)
    return lambda: sums(x, indices, len(exact[0]))


def index_add(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(num_codes, device=x.device)
    counts.index_add_(0, indices, torch.ones_like(indices, dtype=torch.float32))
    sums = torch.zeros(num_codes, x.shape[1], device=x.device).index_add_(0, indices, x)
    return counts, sums


def _one_hot(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    chosen = F.one_hot(indices, num_codes).float()
    return chosen.sum(dim=0), chosen.T @ x
