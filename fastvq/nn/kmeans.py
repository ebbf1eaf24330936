"""k-means by Lloyd's algorithm, on the exact nearest-code search.

Lives here: the clustering itself, used by `fastvq.kmeans` and to initialise codebooks. Keeping a
codebook up to date during training is `codebook.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq import ops
from fastvq.ops.checks import check_int

# k-means++ draws this many codes one by one; a larger codebook is drawn in this many groups, so
# that the start costs no more than a few Lloyd iterations whatever the number of codes.
_MAX_DRAWS = 1024


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_codes: int,
    iterations: int = 10,
    seed: int = 0,
    *,
    init: str = "kmeans++",
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:
    """Codes that (locally) minimise the squared distance of the rows to their nearest code.

        l2:      index[n] = argmin_k ‖x[n] − c[k]‖²,   c[k] ← mean of the rows with index k
        cosine:  index[n] = argmax_k x̂[n]·c[k],         c[k] ← that mean of x̂ = x/‖x‖, of length 1

    A code without rows moves to the row farthest from its own code (the next empty code to the
    next farthest). Stops early once no index changes. Nothing of size N×K is allocated, and the
    result is a function of the arguments alone, not of the global random state.

    Args:
        x: (N, D), any floating dtype. A row that holds NaN or ±Inf is left out.
        num_codes: K. With fewer finite rows than codes, the codes left over repeat rows, and are
            the index of none.
        iterations: the most Lloyd iterations; 0 returns the start.
        seed: of the random start.
        init: "kmeans++" (rows drawn with probability proportional to their squared distance from
            the rows drawn before; above 1024 codes, in 1024 groups whose members do not see each
            other) or "random" (rows drawn uniformly, without replacement).
        metric: "l2" or "cosine".
    Returns:
        codebook (K, D) float32, rows of unit length for "cosine", and indices (N,) int64 of each
        row's nearest code in it; −1 for rows that were left out.
    Raises:
        ValueError: a bad shape or value, or no finite row at all.
    Lloyd 1982; Arthur & Vassilvitskii 2007 (k-means++); Dhillon & Modha 2001 (cosine).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"kmeans: x must be a torch.Tensor; got {type(x).__name__}.")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"kmeans: x must be a floating (N, D) tensor; got {x.dtype} {tuple(x.shape)}."
        )
    for name, value, least in (("num_codes", num_codes, 1), ("iterations", iterations, 0)):
        check_int("kmeans", name, value, least)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"kmeans: seed must be an int; got {type(seed).__name__}.")
    if init not in ("kmeans++", "random"):
        raise ValueError(f"kmeans: init must be 'kmeans++' or 'random'; got {init!r}.")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"kmeans: metric must be 'l2' or 'cosine'; got {metric!r}.")
    if metric == "cosine":
        # Of unit rows the nearest code of unit length is the one of greatest cosine.
        x = _unit(x.float())
    rows = x[x.isfinite().all(dim=1)].float()
    if rows.shape[0] == 0:
        raise ValueError(f"kmeans: x must have a finite row; none of its {len(x)} rows is.")
    generator = torch.Generator().manual_seed(seed)
    start = _spread_rows if init == "kmeans++" else _random_rows
    codebook = start(rows, num_codes, generator)
    previous = None
    for _ in range(iterations):
        indices, distance = ops.nearest_code(rows, codebook, return_distance=True)
        if previous is not None and torch.equal(indices, previous):
            break
        codebook = _moved(rows, codebook, indices, distance)
        if metric == "cosine":
            codebook = _unit(codebook)
        previous = indices
    return codebook, ops.nearest_code(x, codebook)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-6)


def _random_rows(rows: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """`num_codes` rows in random order; all of them, over and over, where there are fewer."""
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    return rows[order[torch.arange(num_codes, device=rows.device) % len(rows)]]


def _spread_rows(rows: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """The k-means++ start, drawn by inverting the cumulative squared distance."""
    codes = _random_rows(rows, 1, generator)
    nearest = torch.full((len(rows),), torch.inf, device=rows.device)
    drawn = codes
    while len(codes) < num_codes:
        nearest = torch.minimum(nearest, ops.nearest_code(rows, drawn, return_distance=True)[1])
        cumulative = nearest.double().cumsum(dim=0)
        if not 0.0 < cumulative[-1] < torch.inf:
            # Every row is a code already (or distances overflow): no row is better than another.
            rest = _random_rows(rows, num_codes - len(codes), generator)
            return torch.cat([codes, rest])
        group = min(max(1, num_codes // _MAX_DRAWS), num_codes - len(codes))
        uniform = torch.rand(group, dtype=torch.float64, generator=generator).to(rows.device)
        # right=True steps over rows at distance zero, which are codes already.
        position = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        drawn = rows[position.clamp(max=len(rows) - 1)]
        codes = torch.cat([codes, drawn])
    return codes


def _moved(rows: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor) -> Tensor:
    """Codes at the means of their rows; empty ones at the rows farthest from their codes."""
    counts, sums = ops.code_statistics(rows, indices, len(codebook))
    means = sums / counts.clamp(min=1.0)[:, None]
    moved = torch.where(counts[:, None] > 0, means, codebook)
    empty = (counts == 0).nonzero().squeeze(1)[: len(rows)]
    farthest = distance.sort(descending=True, stable=True).indices[: len(empty)]
    moved[empty] = rows[farthest]
    return moved
