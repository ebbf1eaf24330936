"""Linear maps that a row which is not finite passes by.

Its product with a gradient of zero would be NaN, in the gradient of every weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def projected(projection: nn.Module, rows: Tensor) -> Tensor:
    """projection(rows) for rows (…, D); NaN where a row is not finite, without a gradient."""
    if isinstance(projection, nn.Identity):
        return rows
    finite = rows.isfinite().all(dim=-1, keepdim=True)
    return torch.where(finite, projection(torch.where(finite, rows, 0.0)), torch.nan)
