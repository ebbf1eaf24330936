"""Linear maps around a quantizer, that a row which is not finite passes by.

Its product with a gradient of zero would be NaN, in the gradient of every weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def all_finite(rows: Tensor) -> bool:
    """Whether every number is known to be finite; asked only where the answer costs no wait.

    A sum is finite only if its terms are. One that overflows asks for care that is not needed.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return math.isfinite(rows.detach().sum(dtype=torch.promote_types(rows.dtype, torch.float32)))


def projected(projection: nn.Module, rows: Tensor) -> Tensor:
    """projection(rows) for rows (…, D); NaN where a row is not finite, without a gradient."""
    if isinstance(projection, nn.Identity):
        return rows
    if all_finite(rows):
        out: Tensor = projection(rows)
        return out
    finite = rows.isfinite().all(dim=-1, keepdim=True)
    return torch.where(finite, projection(torch.where(finite, rows, 0.0)), torch.nan)


def linear_projections(
    dim: int, width: int, needed: bool, bias: bool = True
) -> tuple[nn.Module, nn.Module]:
    """A quantizer's `project_in` (dim → width) and `project_out`; identities where not needed."""
    if not needed:
        return nn.Identity(), nn.Identity()
    return nn.Linear(dim, width, bias=bias), nn.Linear(width, dim, bias=bias)
