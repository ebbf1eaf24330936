"""Calls of the C++ search by address, the answer promised for them, and hostile numbers."""

from __future__ import annotations

import numpy as np
import torch

try:
    import _fastvq_C as _C
except ImportError:  # the tests that call it skip themselves
    _C = None

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
METRICS = {"l2": 0, "dot": 1}
INT8, INT16, FLOAT32 = 1, 2, 4  # searches a call may use besides float64
ALL_SEARCHES = INT8 + INT16 + FLOAT32


def nearest_code(
    x: torch.Tensor,
    codebook: torch.Tensor,
    metric: str = "l2",
    threads: int = 1,
    searches: int = ALL_SEARCHES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, distance) of the kernel on contiguous x (N, D) and codebook (K, D)."""
    assert x.is_contiguous()
    assert codebook.is_contiguous()
    indices = torch.full((len(x),), -7)
    distance = torch.full((len(x),), -7.0)
    _C.nearest_code(
        *(x.data_ptr(), DTYPES[x.dtype], codebook.data_ptr(), DTYPES[codebook.dtype]),
        *(indices.data_ptr(), distance.data_ptr(), *x.shape[:1], *codebook.shape),
        *(METRICS[metric], threads, searches),
    )
    return indices, distance


def scores(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> np.ndarray:
    """The (N, K) canonical scores: float64, in the order d = 0 … D-1, each product rounded."""
    rows, codes = x.double().numpy(), codebook.double().numpy()
    total = np.zeros((len(rows), len(codes)))
    with np.errstate(invalid="ignore"):
        for d in range(rows.shape[1]):
            a, b = rows[:, d, None], codes[None, :, d]
            total += (a - b) * (a - b) if metric == "l2" else a * b
    return total


def promised(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> np.ndarray:
    """The index the promise names: lowest index of the best score, -1 where there is none."""
    cost = scores(x, codebook, metric) * (1 if metric == "l2" else -1)
    cost[:, ~torch.isfinite(codebook).all(1).numpy()] = np.inf
    index = cost.argmin(1)
    nowhere = ~torch.isfinite(x).all(1).numpy() | ~torch.isfinite(codebook).all(1).any().numpy()
    return np.where(nowhere, -1, index)


def check(
    x: torch.Tensor, codebook: torch.Tensor, metric: str = "l2", searches: int = ALL_SEARCHES
) -> None:
    """Holds indices and distances of a call to the promise."""
    expected = promised(x, codebook, metric)
    indices, distance = nearest_code(x, codebook, metric, searches=searches)
    np.testing.assert_array_equal(indices.numpy(), expected)
    found = expected >= 0
    assert np.isnan(distance.numpy()[~found]).all()
    with np.errstate(over="ignore"):
        winner = scores(x[found], codebook, metric)[np.arange(found.sum()), expected[found]]
        np.testing.assert_array_equal(distance.numpy()[found], winner.astype(np.float32))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hostile(name: str, N: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Data on which a float32 search alone goes wrong."""
    x, codes = normal(N, D), normal(K, D, seed=1)
    one, at = codes[:1], torch.arange(N)
    far = codes.clone()
    far[K // 2] *= 1e8
    return {
        "offset": lambda: (x + 1e4, codes + 1e4),
        "offset of x alone": lambda: (x + 1e6, codes),
        "offset of the codes alone": lambda: (x, codes + 1e6),
        "great offset, few distinct values": lambda: (x + 3e7, codes + 3e7),
        "collapsed": lambda: (x, one * (1 + 2**-23 * codes.round())),
        "last bits": lambda: (one + 1e-7 * x, one + 1e-7 * codes),
        "equal codes": lambda: (x, one.expand(K, D).contiguous()),
        "pairs of equal codes": lambda: (x, codes[: (K + 1) // 2].repeat(2, 1)[:K].contiguous()),
        "lattice ties": lambda: (x.round(), codes.round()),
        "all codes tie": lambda: (x * 0, codes.sign()),
        "nearly equal norms": lambda: (x * 0, torch.nn.functional.normalize(codes, dim=1)),
        "ties that rounding decides": lambda: (
            torch.full((N, D), 0.1) * (1 + x.round()[:, :1]),
            torch.stack([one[0, normal(D, seed=k).argsort()] for k in range(K)]),
        ),
        "rows on codes": lambda: (codes[at % K].contiguous(), codes),
        "halfway between codes": lambda: ((codes[at % K] + codes[(at + 1) % K]) / 2, codes),
        "subnormal": lambda: (x * 1e-40, codes * 1e-40),
        "products underflow": lambda: (x * 1e-22, codes * 1e-22),
        "subnormal against ordinary": lambda: (x * 1e-40, codes),
        "squares overflow": lambda: (x * 1e25, codes * 1e25),
        "near the greatest float": lambda: (x.sign() * 3.4e38, codes.sign() * 3.4e38),
        "far code": lambda: (x, far),
        "two clusters": lambda: (x, codes[torch.arange(K) % 2] + 1e-7 * codes),
        "near copies": lambda: (x, codes[torch.arange(K) // 16] * (1 + 1e-7 * codes)),
        "tiny rows, codes of one length": lambda: (
            x * 1e-6,
            torch.nn.functional.normalize(codes, dim=1),
        ),
        "mixed channels": lambda: (x * 10 ** normal(D), codes * 10 ** normal(D)),
        "outlying elements": lambda: (
            torch.where(normal(N, D, seed=2) > 2.5, 1e4 * x, x),
            torch.where(normal(K, D, seed=3) > 2.5, 1e4 * codes, codes),
        ),
        "every magnitude": lambda: (
            x * 10 ** (30 * normal(N, 1).tanh()),
            codes * 10 ** (30 * normal(K, D).tanh()),
        ),
    }[name]()


HOSTILE = [
    *("offset", "offset of x alone", "offset of the codes alone"),
    *("great offset, few distinct values", "collapsed", "last bits", "equal codes"),
    *("pairs of equal codes", "lattice ties", "all codes tie", "nearly equal norms"),
    *(
        "ties that rounding decides",
        "rows on codes",
        "halfway between codes",
        "subnormal",
        "products underflow",
    ),
    *("subnormal against ordinary", "squares overflow", "near the greatest float", "far code"),
    *("every magnitude", "two clusters", "near copies", "tiny rows, codes of one length"),
    *("mixed channels", "outlying elements"),
]
