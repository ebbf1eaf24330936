"""Definition of vector quantization with a straight-through or rotated gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .nearest_code import nearest_code


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "l2",
    gradient: str = "straight_through",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace each row by its nearest code; losses and gradients as in VQ-VAE.

        i = nearest_code(x),  q = codebook[i]
        quantized = q,  ∂quantized/∂x = 1 (straight-through) or λR (rotation)
        commitment[n] = ‖x[n] − sg[q[n]]‖²,   codebook[n] = ‖sg[x[n]] − q[n]‖²

    A masked row gets index −1, zeros, zero losses and no gradient. A row without a nearest
    code gets index −1, NaN in its outputs and no gradient.

    Returns:
        quantized (N, D) in the codebook's dtype, indices (N,), commitment (N,) and codebook
        (N,) in float32 (float64 if an input is). `x` may have a leading heads dimension.
    van den Oord et al. 2017, arXiv:1711.00937, eq. 1–3; the rotation: Fifty et al. 2024,
    arXiv:2410.06424, eq. 4.
    """
    indices, _ = nearest_code(x, codebook, metric=metric)
    counted = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    counted = counted.expand_as(indices)
    indices = torch.where(counted, indices, -1)
    found = (indices >= 0)[..., None]
    lost = (counted & (indices < 0))[..., None]

    wide = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    rows = torch.where(found, x, 0.0).to(wide)
    chosen = torch.where(found, _gather(codebook, indices.clamp(min=0)), 0.0)
    q = chosen.to(wide)
    commitment = ((rows - q.detach()) ** 2).sum(dim=-1)
    codebook_loss = ((rows.detach() - q) ** 2).sum(dim=-1)

    surrogate = rows if gradient == "straight_through" else _rotate(rows, q.detach())
    # surrogate − sg[surrogate] is exactly zero: the value is the code row, to the bit.
    quantized = chosen.detach() + (surrogate - surrogate.detach()).to(chosen.dtype)
    nan = float("nan")
    return (
        torch.where(lost, nan, quantized),
        indices,
        torch.where(lost[..., 0], nan, commitment),
        torch.where(lost[..., 0], nan, codebook_loss),
    )


def _gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook[indices], per head where the codebook has heads; repeatable gradient."""
    if codebook.dim() == 2:
        return F.embedding(indices, codebook)
    heads, num_codes, width = codebook.shape
    offset = torch.arange(heads, device=indices.device)[:, None] * num_codes
    return F.embedding(indices + offset, codebook.reshape(heads * num_codes, width))


def _rotate(x: Tensor, q: Tensor) -> Tensor:
    """λRx, which equals q: R turns x's direction into q's, λ = ‖q‖/‖x‖, both held constant.

    R = 1 − 2wwᵀ + 2q̂x̂ᵀ with w = (x̂ + q̂)/‖x̂ + q̂‖. Lengths below 1e-6 count as 1e-6.
    """
    with torch.no_grad():
        x_length = x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        q_length = q.norm(dim=-1, keepdim=True)
        x_unit = x / x_length
        q_unit = q / q_length.clamp(min=1e-6)
        w = F.normalize(x_unit + q_unit, dim=-1, eps=1e-12)
        scale = q_length / x_length
    reflected = 2 * (x * w).sum(dim=-1, keepdim=True) * w
    turned = 2 * (x * x_unit).sum(dim=-1, keepdim=True) * q_unit
    return scale * (x - reflected + turned)
