"""k-means: Lloyd's invariants by brute force, determinism, and inputs that hurt."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastvq.nn.kmeans import kmeans


def _blobs(spread: float = 0.01) -> tuple[Tensor, Tensor]:
    """400 rows in 8 well separated blobs, and the blobs' centres (8, 3)."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]).float() * 10
    noise = torch.randn(8, 50, 3, generator=generator) * spread
    return (corners[:, None] + noise).reshape(-1, 3), corners


def _inertia(x: Tensor, codebook: Tensor) -> float:
    return (torch.cdist(x.double(), codebook.double()).min(dim=1).values ** 2).sum().item()


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_result_is_a_fixed_point(init: str) -> None:
    x, _ = _blobs(spread=2.0)
    codebook, indices = kmeans(x, 5, iterations=100, seed=3, init=init)
    assert torch.equal(indices, torch.cdist(x.double(), codebook.double()).argmin(dim=1))
    for k in range(5):
        mine = x[indices == k].double()
        # A float32 mean of n exactly summed terms: rounding of the sum and of the quotient.
        bound = 2 * 2.0**-24 * mine.abs().mean(dim=0)
        assert ((codebook[k].double() - mine.mean(dim=0)).abs() <= bound).all()


def test_spread_start_finds_every_blob() -> None:
    x, corners = _blobs()
    codebook, _ = kmeans(x, 8, iterations=1)
    distance, owner = torch.cdist(corners, codebook).min(dim=1)
    assert sorted(owner.tolist()) == list(range(8))
    assert distance.max() < 0.1  # a blob's width is 0.01, its neighbours are 10 away


def test_iterations_never_raise_the_inertia() -> None:
    x, _ = _blobs(spread=3.0)
    values = [_inertia(x, kmeans(x, 20, iterations=i, seed=1)[0]) for i in range(8)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))
    assert values[-1] < values[0]


def test_empty_codes_move_to_the_farthest_rows() -> None:
    # "random" starts inside the big blob with near certainty; only reseeding reaches the others.
    far = torch.tensor([[100.0, 0.0], [0.0, 200.0], [-300.0, 0.0]])
    x = torch.cat([torch.zeros(500, 2), far])
    codebook, indices = kmeans(x, 4, iterations=5, init="random")
    assert _inertia(x, codebook) == 0.0
    assert len(indices.unique()) == 4


def test_is_a_function_of_its_arguments() -> None:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = kmeans(x, 16, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = kmeans(x, 16, seed=5)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], kmeans(x, 16, seed=6)[0])


def test_rows_that_are_not_finite_are_left_out() -> None:
    x, _ = _blobs()
    broken = x.clone()
    broken[7, 1], broken[30, 0] = float("nan"), float("inf")
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[[7, 30]] = False
    codebook, indices = kmeans(broken, 8)
    expected_codebook, expected = kmeans(x[keep], 8)
    assert torch.equal(codebook, expected_codebook)
    assert torch.equal(indices[keep], expected)
    assert indices[~keep].tolist() == [-1, -1]


@pytest.mark.parametrize("init", ["kmeans++", "random"])
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (3, 8), (5, 5)])
def test_fewer_rows_than_codes(rows: int, codes: int, init: str) -> None:
    x = torch.arange(rows * 2.0).reshape(rows, 2)
    codebook, indices = kmeans(x, codes, init=init)
    assert codebook.shape == (codes, 2)
    assert torch.equal(codebook[indices], x)
    assert {tuple(row) for row in codebook.tolist()} == {tuple(row) for row in x.tolist()}


def test_constant_rows() -> None:
    codebook, indices = kmeans(torch.full((40, 3), 2.5), 4)
    assert torch.equal(codebook, torch.full((4, 3), 2.5))
    assert indices.tolist() == [0] * 40


def test_more_codes_than_draws_are_drawn_in_groups() -> None:
    x = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    codebook, _ = kmeans(x, 2100, iterations=0)
    assert codebook.shape == (2100, 2)
    assert _inertia(x, codebook) < _inertia(x, kmeans(x, 2100, iterations=0, init="random")[0])


def test_half_precision_rows_give_float32_codes() -> None:
    x, _ = _blobs()
    codebook, indices = kmeans(x.bfloat16(), 8)
    expected, expected_indices = kmeans(x.bfloat16().float(), 8)
    assert codebook.dtype == torch.float32
    assert torch.equal(codebook, expected)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(3), {}, r"x must be a floating \(N, D\) tensor"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, "int64"),
        (torch.zeros(0, 2), {}, "finite row"),
        (torch.full((3, 2), torch.nan), {}, "none of its 3 rows"),
        (torch.zeros(3, 2), {"num_codes": 0}, "num_codes must be at least 1; got 0"),
        (torch.zeros(3, 2), {"iterations": -1}, "iterations must be at least 0; got -1"),
        (torch.zeros(3, 2), {"init": "forgy"}, "init must be .*'forgy'"),
    ],
)
def test_refuses(x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(x, **{"num_codes": 2, **options})


def test_cosine_clusters_directions() -> None:
    """Unit codes at the mean direction of their rows, whatever the rows' lengths."""
    x, _ = _blobs(spread=0.3)
    x = (x - 5.0)[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    lengths = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(1)) + 0.1
    codebook, indices = kmeans(x * lengths, 8, iterations=100, metric="cosine")
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    assert torch.equal(indices, (unit @ codebook.double().T).argmax(dim=1))
    for k in range(8):
        mean = unit[indices == k].mean(dim=0)
        # Unit rows in float32, their mean and its length: some ten roundings of values below 1.
        assert ((mean / mean.norm() - codebook[k].double()).abs() <= 16 * 2.0**-24).all()
    assert len(indices.unique()) == 8


def test_refuses_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match="metric must be 'l2' or 'cosine'; got 'dot'"):
        kmeans(torch.zeros(3, 2), 2, metric="dot")
