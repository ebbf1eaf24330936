"""Arithmetic that several adapters share: code lookup, losses as means, moving averages."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastvq import ops


class QuantizedRows(NamedTuple):
    """What `quantize_rows` returns, in the dtype that x and codes promote to."""

    quantized: Tensor  # (N, D)
    indices: Tensor  # (N,) int64
    commitment: Tensor  # () mean of ‖x − sg[q]‖² per channel
    codebook: Tensor  # () mean of ‖sg[x] − q‖² per channel


def quantize_rows(x: Tensor, codes: Tensor) -> QuantizedRows:
    """Nearest codes of rows x (N, D) with the straight-through gradient, and both mean losses.

    The means divide by the rows that have a code, times D; they are 0 where none has.
    """
    out = ops.vector_quantize(x, codes)
    dtype = torch.promote_types(x.dtype, codes.dtype)
    found = out.indices >= 0
    terms = (found.sum() * x.shape[1]).clamp(min=1)
    commitment = torch.where(found, out.commitment, 0.0).sum() / terms
    codebook = torch.where(found, out.codebook, 0.0).sum() / terms
    return QuantizedRows(
        out.quantized.to(dtype), out.indices, commitment.to(dtype), codebook.to(dtype)
    )


def code_rows(codes: Tensor, indices: Tensor) -> Tensor:
    """codes[indices], any shape of indices; NaN for −1, the index of a row without a code."""
    rows = F.embedding(indices.clamp(min=0), codes)
    return torch.where((indices >= 0)[..., None], rows, torch.nan)


@torch.no_grad()
def moving_averages(
    cluster_size: Tensor,
    embed_avg: Tensor,
    x: Tensor,
    indices: Tensor,
    decay: float,
    eps: float,
) -> Tensor:
    """One EMA step, written into the first two; returns the codes that follow from them.

        N[k] ← γN[k] + (1−γ)n[k],   m[k] ← γm[k] + (1−γ)s[k]
        e[k] = m[k] / Ñ[k],   Ñ[k] = ΣN · (N[k] + ε) / (ΣN + Kε)

    n and s are counts and sums of this batch, of all processes together. A batch without rows
    leaves everything as it is.

    Args:
        cluster_size: (K,) N. embed_avg: (K, D) m, any strides.
        x: (N, D). indices: (N,) int64; −1 is skipped.
    Returns:
        (K, D) float32 (float64 if x is).
    """
    counts, sums = ops.code_statistics(x, indices, len(cluster_size))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        fused = torch.cat([counts[:, None], sums], dim=1)  # one tensor, one collective
        dist.all_reduce(fused)
        counts, sums = fused[:, 0], fused[:, 1:]
    some = counts.sum() > 0
    for average, new in ((cluster_size, counts), (embed_avg, sums)):
        stepped = average.mul(decay).add(new, alpha=1.0 - decay)
        average.copy_(torch.where(some, stepped, average))
    size = cluster_size.to(sums.dtype)
    total = size.sum()
    smoothed = total * (size + eps) / (total + len(size) * eps)
    return embed_avg.to(sums.dtype) / smoothed[:, None]
