"""Implicit neural codebooks: every vector brings codes of its own.

Lives here: choosing among them. What makes them (usually a network that sees what earlier levels
of a residual quantizer have explained) is the caller's. Memory is N·K·D by definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq import ops


def quantize_to_own_codes(
    x: Tensor, own: Tensor, metric: str, gradient: str, mask: Tensor | None = None
) -> tuple[ops.VectorQuantizeOutput, Tensor]:
    """Quantize x[n] to the nearest of its own codes own[n].

        index[n] = argmin_k ‖x[n] − own[n, k]‖²    ("dot": argmax_k x[n]·own[n, k]/‖own[n, k]‖)

    in x's own precision (float32 at least); gradients and losses as `fastvq.ops.vector_quantize`.

    Args:
        x: (1, N, D).
        own: (1, N, K, D).
        metric: "l2" or "dot".
        gradient: "straight_through" or "rotation".
        mask: (N,) bool, True = counts.
    Returns:
        The op's output, and the chosen rows (1, N, D) with their gradient to `own`.
    Huijben et al. 2024, arXiv:2401.14732.
    """
    rows, own = x[0], own[0]
    if metric == "dot":
        own = F.normalize(own, dim=-1, eps=1e-6)
    with torch.no_grad():
        if metric == "dot":
            distance = -(own @ rows.to(own.dtype)[..., None]).squeeze(-1)
        else:
            distance = (own - rows[:, None]).square().sum(dim=-1)
        indices = distance.argmin(dim=1)
        counted = rows.isfinite().all(dim=1)
        counted = counted if mask is None else counted & mask
    # A codebook of the chosen rows, of which each vector takes its own.
    chosen = own.take_along_dim(indices[:, None, None], dim=1).squeeze(1)
    position = torch.where(counted, torch.arange(len(rows), device=x.device), -1)
    out = ops.quantize_to_indices(x, chosen, position[None], gradient=gradient)
    found = torch.where(counted, indices, -1)[None]
    return out._replace(indices=found), chosen[None]
