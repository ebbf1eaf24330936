"""What lies between the searches of a residual quantizer: residuals and sums, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq.reference import nearest_code as search
from fastvq.reference import residual_quantize as reference

kernels = pytest.importorskip("fastvq.kernels.triton.residual_quantize", reason="needs triton")


def _quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Level by level, with the reference's search."""
    residual = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    levels = []
    source = x
    for book in codebooks:
        levels.append(search.nearest_code(source, book)[0])
        kernels.subtract_codes(source, book, levels[-1], residual)
        source = residual
    indices = torch.stack(levels, dim=1)
    return kernels.sum_of_codes(codebooks, indices), indices


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize(("n", "q", "k", "d"), [(1, 1, 1, 1), (77, 4, 5, 3), (9, 2, 3, 300)])
def test_equals_the_reference(n, q, k, d, dtypes, device) -> None:
    x = torch.randn(n, d).to(device, dtypes[0])
    codebooks = torch.randn(q, k, d).to(device, dtypes[1])
    if n > 4:
        x[2, 0] = torch.nan
        codebooks[1, 0, -1] = torch.inf
    quantized, indices = _quantize(x, codebooks)
    expected, expected_indices = reference.residual_quantize(x, codebooks)
    assert torch.equal(indices, expected_indices)
    assert quantized.dtype == expected.dtype
    assert torch.equal(quantized.nan_to_num(nan=7e4), expected.nan_to_num(nan=7e4))


def test_a_level_without_codes_loses_every_row(device: str) -> None:
    x, codebooks = torch.randn(6, 3, device=device), torch.randn(3, 2, 3, device=device)
    codebooks[1] = torch.nan
    quantized, indices = _quantize(x, codebooks)
    assert (indices[:, 0] >= 0).all()
    assert (indices[:, 1:] == -1).all()
    assert quantized.isnan().all()


def test_strides_and_no_rows(device: str) -> None:
    x = torch.randn(5, 12, device=device).T[::2]
    codebooks = torch.randn(5, 3, 2, device=device).permute(2, 1, 0)
    quantized, indices = _quantize(x, codebooks)
    assert not codebooks.is_contiguous()
    assert torch.equal(quantized, reference.residual_quantize(x, codebooks)[0])
    assert torch.equal(kernels.sum_of_codes(codebooks, indices[:, :].T.contiguous().T), quantized)
    assert _quantize(x[:0], codebooks)[0].shape == (0, 5)


@pytest.mark.cuda
def test_large(device: str) -> None:
    x, codebooks = torch.randn(50_001, 128, device=device), torch.randn(8, 64, 128, device=device)
    quantized, indices = _quantize(x, codebooks)
    expected, expected_indices = reference.residual_quantize(x, codebooks)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized, expected)
