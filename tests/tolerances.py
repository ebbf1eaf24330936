"""Error bounds derived from arithmetic, each with its formula.

u is the unit roundoff: half the distance from 1 to the next number of a dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def sum_bound(terms: int, magnitude: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A sum of n terms, in any order: |error| ≤ n·u·Σ|terms|."""
    return terms * UNIT_ROUNDOFF[dtype] * magnitude


def rounding_bound(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding the result to `dtype`: u·|y|, and half the least subnormal where it underflows."""
    tiny = torch.finfo(dtype).smallest_normal * UNIT_ROUNDOFF[dtype]
    return UNIT_ROUNDOFF[dtype] * y.abs() + tiny


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Every element lies within its own bound of the float64 truth."""
    error = (actual.double() - truth.double()).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"error exceeds its bound by {worst.item():.3g}"
