"""Definition of residual quantization: each codebook quantizes what the last one left."""

from __future__ import annotations

import torch
from torch import Tensor

from .nearest_code import nearest_code


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows by a sequence of codebooks, each on the residual of those before.

        r₀ = x;  i_q = nearest_code(r_q, codebooks[q]);  r_{q+1} = r_q − codebooks[q, i_q]
        quantized = Σ_q codebooks[q, i_q], straight-through gradient to x

    Residuals and the running sum are float32 (float64 if an input is), each level rounded
    once. A row without a nearest code at some level gets −1 from there on and is NaN.

    Args:
        x: (N, D). codebooks: (Q, K, D).
    Returns:
        quantized (N, D) in the codebooks' dtype, indices (N, Q) int64.
    Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1.
    """
    wide = torch.float64 if torch.float64 in (x.dtype, codebooks.dtype) else torch.float32
    books = codebooks.detach().to(wide)
    residual = x.detach().to(wide)
    total = torch.zeros_like(residual)
    levels = []
    for book in books:
        indices, _ = nearest_code(residual, book)
        chosen = torch.where((indices >= 0)[:, None], book[indices.clamp(min=0)], torch.nan)
        residual = residual - chosen
        total = total + chosen
        levels.append(indices)
    indices = torch.stack(levels, dim=1)
    kept = torch.where((indices >= 0).all(dim=1)[:, None], x, 0.0)
    total = total.to(codebooks.dtype)
    return total + (kept - kept.detach()).to(total.dtype), indices
