"""ema_step: the C++ step against float64, against tensor arithmetic, and alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within
from torch import Tensor

from fastvq.ops.code_statistics import code_statistics
from fastvq.ops.ema_step import ema_step, ema_step_of_rows

U = UNIT_ROUNDOFF[torch.float32]
STEP, STEP_OF_ROWS = (
    torch.ops.fastvq.ema_step.default,
    torch.ops.fastvq.ema_step_of_rows.default,
)
SHAPES = [(1, 1, 1, 1), (1, 5, 3, 40), (3, 64, 16, 64), (2, 300, 33, 50), (1, 700, 130, 3000)]
RULES = list(itertools.product((0.0, 0.2, 0.8, 1.0), (1e-5, 0.3), (False, True)))


def make_state(h: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = 3.0 * torch.rand(h, k, generator=g)
    return sizes, torch.randn(h, k, d, generator=g), torch.randn(h, k, d, generator=g)


def make_rows(h: int, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    indices = torch.randint(-1, k, (h, n), generator=g)
    indices[:, : n // 2] = 0  # a code with many rows is shared out by channels
    return 2.0 * torch.randn(h, n, d, generator=g), indices


def expected(
    state: tuple[Tensor, Tensor, Tensor],
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    unit: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The step in float64, and what float32 may be away from it: bounds of N, m and e.

    A moved average is a difference, a product by a rounded weight and a sum: 6u of the larger end.
    For a total of K of them add (K+2)u, relative, the terms being positive, and for the smoothed
    count four operations and (6 + 6)u of its parts. A code is one division more, of a sum with the
    absolute error of m. Unit length: (D+4)u of the code's own error and of its length, twice.
    """
    sizes, averages, codes = (part.double() for part in state)
    n, s = counts.double(), sums.double()
    some = n.sum(dim=1, keepdim=True) > 0
    new_sizes = torch.where(some, decay * sizes + (1 - decay) * n, sizes)
    moved = torch.where(some[..., None], decay * averages + (1 - decay) * s, averages)
    bound_n = 6 * U * torch.maximum(sizes, n)
    bound_m = 6 * U * torch.maximum(averages.abs(), s.abs())
    total, k, d = new_sizes.sum(dim=1, keepdim=True), sizes.shape[1], averages.shape[2]
    smoothed = (new_sizes + eps) * total / (total + k * eps)
    bound_total = bound_n.sum(dim=1, keepdim=True) / total + (k + 2) * U
    relative = bound_n / (new_sizes + eps) + 2 * bound_total + 5 * U
    moved_codes = moved / smoothed[..., None]
    bound_e = bound_m / smoothed[..., None] + moved_codes.abs() * relative[..., None]
    if unit:
        length = moved_codes.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        bound_e = (bound_e + bound_e.norm(dim=-1, keepdim=True)) / length + (d + 4) * U
        moved_codes = moved_codes / length
    new_codes = torch.where(some[..., None], moved_codes, codes)
    # Second order: all relative errors here are far below a hundredth.
    bounds = (bound_n, bound_m, 1.01 * bound_e)
    return (new_sizes, moved, new_codes), bounds


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("h", "k", "d", "n"), SHAPES)
def test_step_is_its_formula(h: int, k: int, d: int, n: int, backend: str) -> None:
    x, indices = make_rows(h, n, k, d)
    indices[-1] = -1 if h > 1 else indices[-1]  # one codebook without a row
    counts, sums = code_statistics(x, indices, k)
    for decay, eps, unit in RULES:
        state = make_state(h, k, d)
        truth, bounds = expected(state, counts, sums, decay, eps, unit)
        before = [part.clone() for part in state]
        STEP(*state, counts, sums, decay, eps, unit, backend)
        for part, exact, bound in zip(state, truth, bounds):
            assert_within(part, exact, bound)
        if h > 1:
            for part, old in zip(state, before):
                assert torch.equal(part[-1], old[-1])


@pytest.mark.parametrize(("h", "k", "d", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_their_statistics_give_the_same_bits(
    h: int, k: int, d: int, n: int, dtype: torch.dtype
) -> None:
    x, indices = make_rows(h, n, k, d)
    x = x.to(dtype)
    counts, sums = code_statistics(x, indices, k)
    for decay, eps, unit in RULES:
        by_rows, by_sums = make_state(h, k, d), make_state(h, k, d)
        found = ema_step_of_rows(*by_rows, x, indices, decay=decay, eps=eps, unit=unit)
        ema_step(*by_sums, counts, sums, decay=decay, eps=eps, unit=unit)
        assert torch.equal(found, counts)
        for a, b in zip(by_rows, by_sums):
            assert torch.equal(a, b)


def test_threads_give_the_same_bits() -> None:
    x, indices = make_rows(1, 20_000, 500, 100)
    counts, sums = code_statistics(x, indices, 500)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            by_rows, by_sums = make_state(1, 500, 100), make_state(1, 500, 100)
            ema_step_of_rows(*by_rows, x, indices, decay=0.9, eps=1e-5, unit=True)
            ema_step(*by_sums, counts, sums, decay=0.9, eps=1e-5, unit=True)
            results.append((*by_rows, *by_sums))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("n", [0, 6])
def test_a_batch_without_rows_is_no_step(n: int) -> None:
    indices = torch.full((2, n), -1)
    state, before = make_state(2, 4, 3), make_state(2, 4, 3)
    counts = ema_step_of_rows(*state, torch.randn(2, n, 3), indices, decay=0.5, eps=0.1)
    assert not counts.any()
    ema_step(*state, counts, torch.zeros(2, 4, 3), decay=0.5, eps=0.1)
    for a, b in zip(state, before):
        assert torch.equal(a, b)


def test_codes_may_stay() -> None:
    x, indices = make_rows(1, 40, 5, 3)
    counts, sums = code_statistics(x, indices, 5)
    (sizes, averages, _), whole = make_state(1, 5, 3), make_state(1, 5, 3)
    ema_step(sizes, averages, None, counts, sums, decay=0.8, eps=1e-5)
    ema_step(*whole, counts, sums, decay=0.8, eps=1e-5)
    assert torch.equal(sizes, whole[0])
    assert torch.equal(averages, whole[1])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_huge_sums_are_cut_off(backend: str) -> None:
    state = make_state(1, 2, 3)
    sums = torch.full((1, 2, 3), 3e38)
    sums[0, 1] = -torch.inf
    STEP(*state, torch.ones(1, 2), sums, 0.0, 1e-5, False, backend)
    assert torch.equal(state[1][0, 0], torch.full((3,), 2.0**125))
    assert torch.equal(state[1][0, 1], torch.full((3,), -(2.0**125)))
    assert not state[2].isnan().any()


def test_refuses_an_index_out_of_range() -> None:
    with pytest.raises(ValueError, match="indices must be −1 or in 0 … 3; got 4"):
        ema_step_of_rows(
            *make_state(1, 4, 3), torch.randn(1, 2, 3), torch.tensor([[0, 4]]), decay=0.5, eps=0.1
        )


def test_opcheck() -> None:
    x, indices = make_rows(2, 20, 5, 3)
    counts, sums = code_statistics(x, indices, 5)
    for backend in ("cpp", "reference"):
        torch.library.opcheck(STEP, (*make_state(2, 5, 3), counts, sums, 0.8, 1e-5, True, backend))
    torch.library.opcheck(STEP_OF_ROWS, (*make_state(2, 5, 3), x, indices, 0.8, 1e-5, False))


def test_autograd_sees_the_change() -> None:
    x, indices = make_rows(1, 20, 5, 3)
    state = make_state(1, 5, 3)
    weight = torch.ones(1, 5, 3, requires_grad=True)
    product = weight * state[2]
    ema_step_of_rows(*state, x, indices, decay=0.8, eps=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
