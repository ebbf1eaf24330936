"""Definition of the per-code statistics: how many rows chose a code, and their sum."""

from __future__ import annotations

import torch
from torch import Tensor


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows assigned to each code.

        counts[k] = |{n : indices[n] = k}|,   sums[k] = Σ_{n : indices[n] = k} x[n]

    Rows with index −1 are skipped. Rows are sorted by code (stably) and each run is summed
    in row order in float64, so the result is the same on every run of every device.

    Args:
        x: (N, D) or (heads, N, D), any floating dtype.
        indices: (N,) or (heads, N) int64 in −1 … num_codes − 1.
    Returns:
        counts (K,) or (heads, K), sums (K, D) or (heads, K, D); float32, float64 if `x` is.
    """
    if x.dim() == 3:
        pairs = [code_statistics(rows, index, num_codes) for rows, index in zip(x, indices)]
        return torch.stack([c for c, _ in pairs]), torch.stack([s for _, s in pairs])
    order = indices.sort(stable=True).indices
    order = order[indices[order] >= 0]
    lengths = torch.bincount(indices[order], minlength=num_codes)
    sums = torch.segment_reduce(
        x[order].double(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0
    )
    out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return lengths.to(out_dtype), sums.to(out_dtype)
