"""The C++ code_statistics, called by address, against a float64 loop in row order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

_C = pytest.importorskip("_fastvq_C", reason="the C++ kernels are not built")

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def code_statistics(
    x: torch.Tensor, indices: torch.Tensor, num_codes: int, threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.full((num_codes,), -7.0)
    sums = torch.full((num_codes, x.shape[1]), -7.0)
    _C.code_statistics(
        *(x.data_ptr(), DTYPES[x.dtype], indices.data_ptr(), counts.data_ptr(), sums.data_ptr()),
        *(1, x.shape[0], num_codes, x.shape[1], threads),
    )
    return counts, sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "D"), [(0, 3, 4), (1, 1, 1), (1000, 17, 5), (50_001, 40, 33), (300, 512, 64)]
)
def test_equals_row_order_sums_for_every_thread_count(
    dtype: torch.dtype, N: int, K: int, D: int
) -> None:
    generator = torch.Generator().manual_seed(N)
    x = (1e3 + torch.randn(N, D, generator=generator)).to(dtype)
    indices = torch.randint(-1, K, (N,), generator=generator)
    indices[: N // 2] = K - 1  # one code owns half of the rows
    counts = np.bincount(indices[indices >= 0].numpy(), minlength=K)
    sums = np.zeros((K, D))
    np.add.at(sums, indices[indices >= 0].numpy(), x[indices >= 0].double().numpy())
    for threads in (1, 2, 3, 64):
        got_counts, got_sums = code_statistics(x, indices, K, threads)
        np.testing.assert_array_equal(got_counts.numpy(), counts)
        np.testing.assert_array_equal(got_sums.numpy(), sums.astype(np.float32))


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_refuses_an_index_outside_the_codebook(bad: int) -> None:
    indices = torch.tensor([0, 3, bad, -1])
    with pytest.raises(ValueError, match=rf"indices must be −1 or in 0 … 3; got {bad} at row 2"):
        code_statistics(torch.ones(4, 2), indices, 4)
