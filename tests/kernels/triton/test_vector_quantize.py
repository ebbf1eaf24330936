"""The quantizer's epilogue and its gradient to x, on indices that were found elsewhere."""

from __future__ import annotations

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within, rounding_bound, sum_bound
from torch import Tensor

from fastvq.reference import nearest_code as search
from fastvq.reference import vector_quantize as reference

kernels = pytest.importorskip("fastvq.kernels.triton.vector_quantize", reason="needs triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # x, codebook: one row, odd sizes; heads with a shared and an own book; a long row
    ((1, 1), (1, 1)),
    ((150, 3), (7, 3)),
    ((2, 70, 20), (5, 20)),
    ((2, 40, 33), (2, 5, 33)),
    ((9, 300), (4, 300)),
]


def _inputs(rows: tuple[int, ...], book: tuple[int, ...], device: str) -> tuple[Tensor, ...]:
    """Rows and codes, one of each not finite, and a mask that misses that row."""
    x, codebook = torch.randn(rows), torch.randn(book)
    mask = torch.arange(rows[-2]) % 3 != 1
    if rows[-2] > 3:
        x[..., 3, 0], x[..., 4, 0] = torch.nan, -torch.inf
        codebook[..., -1, -1] = torch.inf
    return x.to(device), codebook.to(device), mask.to(device)


def _truth(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    return reference.vector_quantize(x.double(), codebook.double(), mask=mask)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a == b or a != DTYPES[1]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "book"), SHAPES)
def test_forward(rows, book, masked, dtypes, device) -> None:
    x, codebook, mask = _inputs(rows, book, device)
    x, codebook = x.to(dtypes[0]), codebook.to(dtypes[1])
    mask = mask if masked else None
    found, _ = search.nearest_code(x, codebook)
    quantized, indices, distance = kernels.vector_quantize_forward(x, codebook, mask, found)
    expected, expected_indices, losses, _ = _truth(x, codebook, mask)
    assert quantized.dtype == codebook.dtype
    assert distance.dtype == torch.float32
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized.nan_to_num(nan=7e4), expected.to(codebook.dtype).nan_to_num(nan=7e4))
    assert torch.equal(distance.isnan(), losses.isnan())
    # A difference and a square round once each, the sum D times: (D + 2)·u of the sum.
    bound = sum_bound(rows[-1] + 2, losses.nan_to_num())
    assert_within(distance.nan_to_num(), losses.nan_to_num(), bound)


def test_strides_and_no_rows(device: str) -> None:
    # Rows of a wider buffer in reverse layout, one code row for all, a column of the mask.
    x = torch.randn(6, 2, 40, device=device).transpose(0, 2)[..., ::2].transpose(1, 2)
    codebook = torch.randn(3, device=device).expand(4, 3)
    mask = torch.rand(40, 3, 3, device=device)[:, ::2].transpose(0, 1)[:, :, 0] > 0.3
    x = x[..., :3].transpose(0, 1)[..., :3]
    assert not x.is_contiguous()
    mask = mask[:1].expand(x.shape[:-1]) if x.shape[1] == 40 else mask[0, : x.shape[1]]
    found, _ = search.nearest_code(x, codebook)
    quantized, indices, _ = kernels.vector_quantize_forward(x, codebook, mask, found)
    expected, expected_indices, *_ = _truth(x, codebook, mask)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized.double(), expected)
    nothing = torch.empty(0, 3, device=device)
    outputs = kernels.vector_quantize_forward(nothing, codebook, None, found.new_empty(0))
    assert [o.shape for o in outputs] == [(0, 3), (0,), (0,)]
    assert kernels.vector_quantize_backward_x(
        nothing, None, nothing, codebook, found.new_empty(0), "rotation"
    ).shape == (0, 3)
