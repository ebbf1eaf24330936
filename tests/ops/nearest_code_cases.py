"""Hostile inputs for the search, and the brute-force answer in numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ordered_argmin(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """The index promise word for word: float64, d = 0 … D−1, lowest index on ties."""
    rows, codes = x.double().numpy(), codebook.double().numpy()
    score = np.zeros((len(rows), len(codes)))
    with np.errstate(all="ignore"):
        for d in range(rows.shape[1]):
            if metric == "l2":
                difference = rows[:, d, None] - codes[None, :, d]
                score = score + difference * difference
            else:
                score = score - rows[:, d, None] * codes[None, :, d]
    score[:, ~np.isfinite(codes).all(axis=1)] = np.inf
    index = score.argmin(axis=1)
    index[~np.isfinite(rows).all(axis=1)] = -1
    if not np.isfinite(codes).all(axis=1).any():
        index[:] = -1
    return torch.from_numpy(index)


def hostile(kind: str, n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 rows and codes of a named kind."""
    g = torch.Generator().manual_seed(seed)
    x, c = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    if kind == "near-duplicates":
        c = c[:1] + 1e-7 * c
    elif kind == "collapsed":
        c = c[:1].expand(k, d).clone()
    elif kind == "duplicates":
        c = c[torch.randint(0, max(1, k // 3), (k,), generator=g)]
    elif kind == "offset":
        x, c = x + 1e5, c + 1e5
    elif kind == "denormal":
        x, c = x * 1e-42, c * 1e-42
    elif kind == "huge":
        x, c = x * 1e37, c * 1e37
    elif kind == "mixed":
        x = x * 10.0 ** torch.randint(-18, 18, (n, 1), generator=g)
        c = c * 10.0 ** torch.randint(-18, 18, (k, 1), generator=g)
    elif kind == "integers":
        x, c = x.mul(2).round(), c.mul(2).round()
    elif kind == "broken":
        x[::3, 0], c[::2, -1] = torch.nan, torch.inf
    else:
        assert kind == "random"
    return x, c


KINDS = (
    "random",
    "near-duplicates",
    "collapsed",
    "duplicates",
    "offset",
    "denormal",
    "huge",
    "mixed",
    "integers",
    "broken",
)
