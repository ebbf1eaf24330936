"""Losses on a codebook beyond commitment: orthogonality, diversity, cross-entropy.

Lives here: their formulas. Those that need every score make them in blocks of rows (see
`code_scores.py`); none allocates N×K. Their weights and where they apply are the modules' matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .code_scores import recomputed, row_blocks, scores


def orthogonal_loss(
    codes: Tensor, active: Tensor | None = None, max_codes: int | None = None
) -> Tensor:
    """How far unit codes are from orthogonal to each other.

        mean over h of  ‖ĈĈᵀ‖²_F / K² − 1/K,   Ĉ the codes at unit length

    Computed from ĈᵀĈ instead where that is the smaller of the two.

    Args:
        codes: (h, K, D).
        active: (h, K) bool, the codes to take; K above is their number.
        max_codes: take a random choice of at most this many of them.
    Returns:
        () float32; 0 if there is no code to take.
    Shin et al. 2021, arXiv:2112.00384, eq. 2.
    """
    if max_codes is not None and codes.shape[1] > max_codes:
        codes, active = _some_codes(codes, active, max_codes)
    unit = F.normalize(codes, dim=-1, eps=1e-6)
    count = codes.new_full((len(codes),), codes.shape[1])
    if active is not None:
        unit = unit * active[..., None]
        count = active.sum(dim=1).clamp(min=1).to(codes.dtype)
    with torch.autocast(codes.device.type, enabled=False):
        product = unit.mT @ unit if unit.shape[1] > unit.shape[2] else unit @ unit.mT
    loss = product.square().sum(dim=(1, 2)) / count.square() - 1.0 / count
    if active is not None:
        loss = torch.where(active.any(dim=1), loss, 0.0)
    return loss.mean()


def codes_in_use(indices: Tensor, num_codes: int) -> Tensor:
    """(h, K) bool: which codes the (h, N) indices name; −1 names none."""
    used = indices.new_zeros((len(indices), num_codes + 1), dtype=torch.bool)
    # −1 goes to a column of its own.
    return used.scatter(1, torch.where(indices < 0, num_codes, indices), True)[:, :num_codes]


def _some_codes(
    codes: Tensor, active: Tensor | None, max_codes: int
) -> tuple[Tensor, Tensor | None]:
    """A random choice of codes, the same for every h; active ones first."""
    if active is None:
        chosen = torch.randperm(codes.shape[1], device=codes.device)[:max_codes]
        return codes[:, chosen], None
    order = torch.rand(codes.shape[1], device=codes.device) - active.any(dim=0).float()
    chosen = order.argsort()[:max_codes]
    return codes[:, chosen], active[:, chosen]


def diversity_loss(
    x: Tensor, codes: Tensor, metric: str, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Minus the entropy (nats) of the mean code distribution at each position.

        p[n] = mean over h, b of softmax(T · score[h, b, n]),   loss = mean_n Σ_k p[n,k] ln p[n,k]

    with ln of at least 1e-5. `temperature` T multiplies the scores here.

    Args:
        x: (h, B, n, D).
        codes: (h, K, D).
        mask: (B, n) bool, True = counts; a position without a counted row is left out.
    Returns:
        () float32.
    """
    heads, examples, positions, _ = x.shape
    counted = torch.isfinite(x).all(dim=-1)
    if mask is not None:
        counted = counted & mask
    x = torch.where(counted[..., None], x, 0.0)
    share = counted / counted.sum(dim=(0, 1)).clamp(min=1)
    total = x.new_zeros((), dtype=torch.float32)
    for block in row_blocks(positions, heads * examples * codes.shape[1]):
        total = total + recomputed(
            _negative_entropy, x[:, :, block], codes, share[:, :, block], metric, temperature
        )
    return total / counted.any(dim=1).any(dim=0).sum().clamp(min=1)


def _negative_entropy(
    x: Tensor, codes: Tensor, share: Tensor, metric: str, temperature: float
) -> Tensor:
    likely = (scores(x, codes[:, None], metric) * temperature).softmax(dim=-1)
    mean = (likely * share[..., None]).sum(dim=(0, 1))
    return (mean * mean.clamp(min=1e-5).log()).sum()


def cross_entropy(x: Tensor, codes: Tensor, indices: Tensor, metric: str) -> Tensor:
    """Cross-entropy (nats) of given codes under softmax(score), a mean over those that count.

    Args:
        x: (h, N, D).
        codes: (h, K, D).
        indices: (h, N) int64; −1 does not count.
    Returns:
        () float32; 0 if none counts.
    """
    counted = (indices >= 0) & torch.isfinite(x).all(dim=-1)
    indices = torch.where(counted, indices, -1)
    x = torch.where(counted[..., None], x, 0.0)
    total = x.new_zeros((), dtype=torch.float32)
    for rows, book, targets in zip(x, codes, indices):
        for block in row_blocks(len(rows), len(book)):
            total = total + recomputed(_surprise, rows[block], book, targets[block], metric)
    return total / counted.sum().clamp(min=1)


def _surprise(rows: Tensor, book: Tensor, targets: Tensor, metric: str) -> Tensor:
    return F.cross_entropy(scores(rows, book, metric), targets, ignore_index=-1, reduction="sum")
