"""The sorted segment sum, for the statistics and for the codebook's gradient."""

from __future__ import annotations

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within, rounding_bound
from torch import Tensor

from fastvq.reference import code_statistics as reference

kernels = pytest.importorskip("fastvq.kernels.triton.code_statistics", reason="needs triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [  # N, K, D: one row; ragged; more codes than rows; D over one tile; four levels
    (1, 1, 1, torch.float32),
    (300, 7, 3, torch.float16),
    (130, 1000, 33, torch.bfloat16),
    (70, 5, 300, torch.float32),
    (4200, 3, 2, torch.float32),
]


def _rows(n: int, k: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Rows of mixed magnitudes; one code owns half of them, some belong to none."""
    x = torch.randn(n, d) * 10.0 ** torch.randint(-3, 4, (n, 1))
    indices = torch.randint(-1, k, (n,))
    indices[: n // 2] = k - 1
    shuffled = torch.randperm(n)
    return x.to(dtype).to(device), indices[shuffled].to(device)


def _sums(terms: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    kept = indices >= 0
    total = torch.zeros(num_codes, terms.shape[-1], dtype=torch.float64, device=terms.device)
    return total.index_add_(0, indices[kept], terms[kept].double())


def _float64_bound(truth: Tensor, size: Tensor, n: int) -> Tensor:
    """Summed in float64 in any order, rounded to float32 once: u·|y| + n·2⁻⁵³·Σ|terms|."""
    return rounding_bound(truth, torch.float32) + 2 * n * UNIT_ROUNDOFF[torch.float64] * size


@pytest.mark.parametrize(("n", "k", "d", "dtype"), CASES)
def test_counts_and_sums(n: int, k: int, d: int, dtype: torch.dtype, device: str) -> None:
    x, indices = _rows(n, k, d, dtype, device)
    counts, sums = kernels.code_statistics_forward(x, indices, k)
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts.long(), torch.bincount(indices[indices >= 0], minlength=k))
    truth, size = _sums(x, indices, k), _sums(x.abs(), indices, k)
    assert_within(sums, truth, _float64_bound(truth, size, n))


def test_no_rows(device: str) -> None:
    for rows in (torch.empty(0, 3), torch.ones(5, 3)):
        indices = torch.full((len(rows),), -1, device=device)
        counts, sums = kernels.code_statistics_forward(rows.to(device), indices, 4)
        assert counts.tolist() == [0.0] * 4
        assert sums.tolist() == [[0.0] * 3] * 4


def test_a_skipped_row_may_hold_anything(device: str) -> None:
    x, indices = torch.ones(200, 3, device=device), torch.zeros(200, dtype=torch.int64)
    x[::3], indices[::3] = torch.nan, -1
    _, sums = kernels.code_statistics_forward(x, indices.to(device), 2)
    assert sums.tolist() == [[133.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("heads_apart", [True, False])
def test_heads_and_strides(heads_apart: bool, device: str) -> None:
    n, k, d = 150, 4, 5
    # Every other channel of a wider buffer; rows of the two heads apart or woven together.
    buffer = torch.randn(2, n, 2 * d) if heads_apart else torch.randn(n, 2, 2 * d).transpose(0, 1)
    x = buffer.to(device)[..., ::2]
    indices = torch.randint(-1, k, (n, 2)).to(device).T
    counts, sums = kernels.code_statistics_forward(x, indices, k)
    expected_counts, expected_sums = reference.code_statistics(x, indices, k)
    assert torch.equal(counts, expected_counts)
    for head in range(2):
        truth, size = (_sums(v, indices[head], k) for v in (x[head], x[head].abs()))
        assert_within(sums[head], truth, _float64_bound(truth, size, n))
    assert_within(sums, expected_sums, 2 * rounding_bound(expected_sums, torch.float32))


def test_wide_keys(device: str) -> None:
    # From 2¹⁵ codes on the keys of the sort are four bytes long.
    for k in (2**15 - 1, 2**15, 2**16 + 1):
        x, indices = torch.randn(90, 2, device=device), torch.randint(-1, k, (90,), device=device)
        indices[:3] = torch.tensor([k - 1, 0, k - 1])
        counts, sums = kernels.code_statistics_forward(x, indices, k)
        expected = reference.code_statistics(x, indices, k)
        assert torch.equal(counts, expected[0])
        assert_within(sums, expected[1], 2 * rounding_bound(expected[1], torch.float32))


def test_the_bits_do_not_depend_on_the_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices = _rows(450, 4, 3, torch.float32, device)
    first = kernels.code_statistics_forward(x, indices, 4)
    for tile, lanes, width in ((512, 64, 128), (8, 4, 2)):
        monkeypatch.setattr(kernels, "TILE_ELEMENTS", tile)
        monkeypatch.setattr(kernels, "MAX_LANES", lanes)
        monkeypatch.setattr(kernels, "MAX_BLOCK_D", width)
        again = kernels.code_statistics_forward(x, indices, 4)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_numbers_near_the_limits_of_float32(device: str) -> None:
    # Partial sums pass 3.4e38 on the way; the truth is 0, and a denormal.
    x = torch.full((256, 2), 3e38, device=device)
    x[128:] = -3e38
    x[:, 1] = 2.0**-149
    _, sums = kernels.code_statistics_forward(x, torch.zeros(256, dtype=torch.int64).to(device), 1)
    assert sums.tolist() == [[0.0, 256 * 2.0**-149]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("book", ["plain", "shared", "separate"])
def test_codebook_gradient(book: str, dtype: torch.dtype, device: str) -> None:
    n, k, d = 150, 4, 5
    rows = (n,) if book == "plain" else (2, n)
    x = torch.randn(*rows, d).to(device, dtype)
    codebook = torch.randn(*((2,) if book == "separate" else ()), k, d).to(device, dtype)
    weight = torch.randn(rows).to(device)
    indices = torch.randint(-1, k, rows).to(device)
    grad = kernels.codebook_gradient(weight, x, codebook, indices)
    assert grad.dtype == dtype
    assert grad.shape == codebook.shape

    books = codebook if book == "separate" else codebook.expand(*rows[:-1], k, d)
    flat = indices.clamp(min=0)[..., None].expand(*rows, d)
    pull = 2 * weight[..., None].double() * (books.double().gather(-2, flat) - x.double())
    key = indices
    if book == "separate":
        key = torch.where(indices >= 0, indices + torch.arange(0, 2 * k, k)[:, None].to(device), -1)
    pull, key, keys = pull.reshape(-1, d), key.reshape(-1), codebook.shape[:-1].numel()
    truth, size = (_sums(v, key, keys).view(codebook.shape) for v in (pull, pull.abs()))
    # Each term rounds a difference and a product: 2u of itself, and second orders in the third.
    bound = 3 * UNIT_ROUNDOFF[torch.float32] * size + _float64_bound(truth, size, 2 * n)
    # The interpreter casts to bfloat16 towards zero, twice the error of rounding.
    assert_within(grad, truth, bound + 2 * rounding_bound(truth, dtype))


def test_codebook_gradient_takes_expanded_weights(device: str) -> None:
    x, codebook = torch.randn(90, 3, device=device), torch.randn(2, 3, device=device)
    indices = torch.randint(-1, 2, (90,), device=device)
    one = torch.ones((), device=device)
    grad = kernels.codebook_gradient(one.expand(90), x, codebook, indices)
    assert torch.equal(
        grad, kernels.codebook_gradient(torch.ones(90, device=device), x, codebook, indices)
    )


@pytest.mark.cuda
@pytest.mark.parametrize(("n", "k", "d"), [(131072, 512, 64), (100_003, 8192, 256), (2**20, 3, 8)])
def test_large(n: int, k: int, d: int, device: str) -> None:
    x, indices = _rows(n, k, d, torch.float32, device)
    counts, sums = kernels.code_statistics_forward(x, indices, k)
    assert torch.equal(counts.long(), torch.bincount(indices[indices >= 0], minlength=k))
    truth, size = _sums(x, indices, k), _sums(x.abs(), indices, k)
    # The truth is itself summed in float64 by atomics: its error is within the same bound.
    assert_within(sums, truth, _float64_bound(truth, size, n))
    for _ in range(3):
        again = kernels.code_statistics_forward(x, indices, k)
        assert torch.equal(again[0], counts)
        assert torch.equal(again[1], sums)
