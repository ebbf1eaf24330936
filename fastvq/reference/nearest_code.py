"""Definition of the nearest-code search: the index promise, in float64.

The score that decides is, for "l2", Σ_d (x_d − c_d)² and, for "dot", Σ_d x_d·c_d,
in float64, added in the order d = 0 … D−1, each term rounded before it is added.
`ordered_scores` is that sentence in code. `nearest_code` returns its argmin
(argmax) without scoring every pair so slowly: a float64 matrix product leaves a
shortlist that provably holds the winner, and the shortlist alone is scored in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
SMALLEST_NORMAL = 2.0**-1022
# Pairs scored at a time: 2²⁰ float64 scores are 8 MiB, whatever N and K are.
PAIRS_PER_BLOCK = 1 << 20


def ordered_scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The score of each pair of rows, one term after the other.

        l2:  score[p] = Σ_d (x[p, d] − codebook[p, d])²      (smaller is nearer)
        dot: score[p] = −Σ_d x[p, d]·codebook[p, d]          (negated: smaller is nearer)

    Args:
        x: (..., D) float64.
        codebook: (..., D) float64, broadcast against `x`.
    Returns:
        (...) float64.
    """
    total = torch.zeros(
        torch.broadcast_shapes(x.shape, codebook.shape)[:-1], dtype=torch.float64, device=x.device
    )
    for d in range(x.shape[-1]):
        if metric == "l2":
            difference = x[..., d] - codebook[..., d]
            term = difference * difference
        else:
            term = -(x[..., d] * codebook[..., d])
        total = total + term
    return total


def nearest_code(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Index of the nearest code, and how far it is.

        index[n] = argmin_k Σ_d (x[n, d] − codebook[k, d])²    ("dot": argmax_k Σ_d x·c)

    Equal scores go to the lowest index. A row that holds NaN or ±Inf gets −1; a code
    row that does is never chosen.

    Args:
        x: (N, D) or (heads, N, D), any floating dtype.
        codebook: (K, D) or (heads, K, D).
        metric: "l2" or "dot".
    Returns:
        indices (N,) or (heads, N) int64; distance of the same shape: the winner's Σ(x−c)²
        (its dot product for "dot"), float32 (float64 if an input is), NaN where the index is −1.
    """
    if x.dim() == 3:
        books = codebook if codebook.dim() == 3 else codebook.expand(x.shape[0], -1, -1)
        pairs = [nearest_code(rows, book, metric=metric) for rows, book in zip(x, books)]
        return torch.stack([i for i, _ in pairs]), torch.stack([d for _, d in pairs])
    wide = torch.float64 in (x.dtype, codebook.dtype)
    codes = codebook.detach().double()
    alive = codes.isfinite().all(dim=1).nonzero().squeeze(1)
    indices = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    scores = torch.full((x.shape[0],), torch.nan, dtype=torch.float64, device=x.device)
    rows_per_block = max(1, PAIRS_PER_BLOCK // codebook.shape[0])
    for start in range(0, x.shape[0] if len(alive) else 0, rows_per_block):
        block = slice(start, start + rows_per_block)
        rows = x[block].detach().double()
        finite = rows.isfinite().all(dim=1)
        rows = torch.where(finite[:, None], rows, 0.0)
        local = _search_block(rows, codes[alive], metric)
        winner = alive[local]
        indices[block] = torch.where(finite, winner, -1)
        score = ordered_scores(rows, codes[winner], metric)
        scores[block] = torch.where(finite, score, torch.nan)
    distance = scores if metric == "l2" else -scores
    return indices, distance if wide else distance.float()


def _search_block(rows: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Exact argmin over finite codes for a block of finite rows, all float64."""
    expanded = -(rows @ codes.T)
    if metric == "l2":
        # The |x|² term is constant over k: it cannot move the argmin.
        expanded = (codes * codes).sum(dim=1) + 2.0 * expanded
    band = 2.0 * _error_bound(rows, codes, metric)
    lowest = expanded.min(dim=1).values
    # "not greater" rather than "less or equal": where an overflow has made NaN or Inf
    # nothing is known, and every code stays on the shortlist.
    shortlist = ~(expanded > (lowest + band)[:, None])
    best = expanded.argmin(dim=1)
    unsure = (shortlist.sum(dim=1) > 1).nonzero().squeeze(1)
    if len(unsure):
        row, code = shortlist[unsure].nonzero(as_tuple=True)
        scores = torch.full_like(expanded[unsure], torch.inf)
        scores[row, code] = _scores_by_pair(rows[unsure], codes, row, code, metric)
        # A score that overflowed to +Inf ties with what is off the shortlist; both lose to
        # any finite score, and the lowest index of the shortlist must win among themselves.
        overflowed = scores.isinf().all(dim=1)
        first = shortlist[unsure].to(torch.uint8).argmax(dim=1)
        best[unsure] = torch.where(overflowed, first, scores.argmin(dim=1))
    return best


def _scores_by_pair(rows: Tensor, codes: Tensor, row: Tensor, code: Tensor, metric: str) -> Tensor:
    """`ordered_scores` of listed pairs, gathered one channel at a time to stay small."""
    total = torch.zeros(len(row), dtype=torch.float64, device=rows.device)
    for d in range(rows.shape[1]):
        term = ordered_scores(rows[row, d, None], codes[code, d, None], metric)
        total = total + term
    return total


def _error_bound(rows: Tensor, codes: Tensor, metric: str) -> Tensor:
    """How far an expanded score may lie from the ordered one, per row.

    With u = 2⁻⁵³ and γ ≈ (D + small)·u, any order of summation and fused or unfused
    products: the matrix product errs by at most D·u·|x||c|, |c|² by D·u·|c|², their sum by
    u of itself, and the ordered score by (D+2)·u·Σ(x−c)² ≤ (D+2)·u·(|x|+|c|)². Together
    below 2·(D+4)·u·(|x|+|c|)²; doubled once more for the rounding of the norms and the
    second-order terms. Products that underflow err by less than the smallest normal each.
    """
    width = rows.shape[1]
    longest = torch.linalg.vector_norm(codes, dim=1).max()
    lengths = torch.linalg.vector_norm(rows, dim=1)
    size = (lengths + longest) ** 2 if metric == "l2" else lengths * longest
    return 4.0 * (width + 4) * (UNIT_ROUNDOFF * size + SMALLEST_NORMAL)
