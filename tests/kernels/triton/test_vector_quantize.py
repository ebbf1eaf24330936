"""The quantizer's epilogue and its gradient to x, on indices that were found elsewhere."""

from __future__ import annotations

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within, rounding_bound, sum_bound
from torch import Tensor

from fastvq.reference import nearest_code as search
from fastvq.reference import vector_quantize as reference

kernels = pytest.importorskip("fastvq.kernels.triton.vector_quantize", reason="needs triton")

DTYPES = [  # of x and of the codebook
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]
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


@pytest.mark.parametrize("dtypes", DTYPES)
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
    assert torch.equal(
        quantized.nan_to_num(nan=7e4), expected.to(codebook.dtype).nan_to_num(nan=7e4)
    )
    assert torch.equal(distance.isnan(), losses.isnan())
    # A difference and a square round once each, the sum D times: (D + 2)·u of the sum.
    bound = sum_bound(rows[-1] + 2, losses.nan_to_num())
    assert_within(distance.nan_to_num(), losses.nan_to_num(), bound)


def test_strides_and_no_rows(device: str) -> None:
    # Heads woven into the rows of a wider buffer, one code row for all codes, a transposed mask.
    x = torch.randn(40, 2, 6, device=device).transpose(0, 1)[..., ::2]
    codebook = torch.randn(3, device=device).expand(4, 3)
    mask = (torch.rand(40, 2, device=device) > 0.3).T
    found, _ = search.nearest_code(x, codebook)
    quantized, indices, _ = kernels.vector_quantize_forward(x, codebook, mask, found)
    expected, expected_indices, *_ = _truth(x, codebook, mask)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized.double(), expected)
    grad = kernels.vector_quantize_backward_x(x, None, x, codebook, indices, "straight_through")
    assert torch.equal(grad, torch.where((indices >= 0)[..., None], x, 0.0))
    nothing, none = torch.empty(0, 3, device=device), found.new_empty(0)
    outputs = kernels.vector_quantize_forward(nothing, codebook, None, none)
    assert [output.shape for output in outputs] == [(0, 3), (0,), (0,)]
    grad = kernels.vector_quantize_backward_x(nothing, None, nothing, codebook, none, "rotation")
    assert grad.shape == (0, 3)


def _native_gradient(
    x: Tensor, codebook: Tensor, mask: Tensor, gradient: str, grads: tuple[Tensor | None, ...]
) -> Tensor:
    """The reference's own autograd, in float64."""
    leaf = x.double().requires_grad_()
    outputs = reference.vector_quantize(leaf, codebook.double(), mask=mask, gradient=gradient)
    given = [(out, g.double()) for out, g in zip((outputs[0], outputs[2]), grads) if g is not None]
    torch.autograd.backward([out for out, _ in given], [g for _, g in given])
    assert leaf.grad is not None
    return leaf.grad


def _rotation_bound(x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """Error of λRᵀg in float32, per row.

    Lengths err by η = (D + 8)·u of themselves, so x̂ and q̂ do, and s = x̂ + q̂ by 2η; w = s/‖s‖ errs
    by 4η/‖s‖ and 2w(w·g) by 16η/‖s‖ of ‖g‖, its dot product by 4η more; 2x̂(q̂·g) by 8η, and λ
    times at most 5‖g‖ by 15η. With ‖s‖ ≤ 2 all of it is below 70·η·λ‖g‖/‖s‖. Where s is zero so is
    w, in both, and the terms without it remain.
    """
    x, q, g = x.double(), q.double(), g.double()
    x_length = x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    q_length = q.norm(dim=-1, keepdim=True)
    s = (x / x_length + q / q_length.clamp(min=1e-6)).norm(dim=-1, keepdim=True)
    eta = (x.shape[-1] + 8) * UNIT_ROUNDOFF[torch.float32]
    size = q_length / x_length * g.norm(dim=-1, keepdim=True)
    return 70 * eta * size / torch.where(s == 0, 2.0, s)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("given", ["quantized", "commitment", "both"])
@pytest.mark.parametrize(("rows", "book"), SHAPES)
def test_backward(rows, book, given, gradient, device) -> None:
    x, codebook, mask = _inputs(rows, book, device)
    grads = (
        None if given == "commitment" else torch.randn(rows, device=device),
        None if given == "quantized" else torch.randn(rows[:-1], device=device),
    )
    _, indices, _, _ = _truth(x, codebook, mask)
    grad = kernels.vector_quantize_backward_x(*grads, x, codebook, indices, gradient)
    truth = _native_gradient(x, codebook, mask, gradient, grads)
    kept = (indices >= 0)[..., None]
    assert torch.equal(grad * ~kept, torch.zeros_like(grad))
    rows_kept = torch.where(kept, x, 0.0)
    q = reference._gather(codebook, indices.clamp(min=0))
    q = torch.where(kept, q, 0.0)
    pull = 0.0 if grads[1] is None else (2 * grads[1][..., None] * (rows_kept - q)).double().abs()
    # The commitment rounds a difference, a product and the sum.
    bound = 3 * UNIT_ROUNDOFF[torch.float32] * pull + rounding_bound(truth, torch.float32)
    if grads[0] is not None and gradient == "rotation":
        bound = bound + _rotation_bound(rows_kept, q, grads[0])
    assert_within(grad, truth, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backward_of_half_precision(dtype: torch.dtype, device: str) -> None:
    x, codebook = torch.randn(60, 9).to(device, dtype), torch.randn(5, 9, device=device)
    grads = torch.randn(60, 9, device=device), torch.ones((), device=device).expand(60)
    indices, _ = search.nearest_code(x, codebook)
    grad = kernels.vector_quantize_backward_x(*grads, x, codebook, indices, "straight_through")
    assert grad.dtype == dtype
    everything = torch.ones(60, dtype=torch.bool, device=device)
    truth = _native_gradient(x, codebook, everything, "straight_through", grads)
    # The interpreter casts to bfloat16 towards zero, twice the error of rounding.
    float32 = 3 * UNIT_ROUNDOFF[torch.float32] * (truth.abs() + 2 * grads[0].double().abs())
    assert_within(grad, truth, 2 * rounding_bound(truth, dtype) + float32)


def test_gradient_of_a_row_onto_its_opposite_code(device: str) -> None:
    # D = 1 and opposite signs: x̂ + q̂ is zero, and the mirror must be left out, not guessed. For
    # some whole numbers, 41 among them, x·(1/x) is not 1 in float32.
    x = torch.arange(1.0, 100.0, device=device)[:, None]
    codebook = torch.full((1, 1), -0.7, device=device)
    indices, g = torch.zeros(99, dtype=torch.int64, device=device), torch.ones_like(x)
    grad = kernels.vector_quantize_backward_x(g, None, x, codebook, indices, "rotation")
    truth = _native_gradient(x, codebook, g[:, 0] > 0, "rotation", (g, None))
    assert_within(grad, truth, 8 * rounding_bound(truth, torch.float32))


@pytest.mark.cuda
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_large(gradient: str, device: str) -> None:
    x, codebook = torch.randn(100_003, 64, device=device), torch.randn(512, 64, device=device)
    indices = torch.randint(-1, 512, (len(x),), device=device)
    quantized, _, distance = kernels.vector_quantize_forward(x, codebook, None, indices)
    found = indices >= 0
    assert torch.equal(quantized[found], codebook[indices[found]])
    truth = (x[found].double() - codebook[indices[found]].double()).square().sum(1)
    assert_within(distance[found], truth, sum_bound(66, truth))
    g = torch.randn_like(x)
    first = kernels.vector_quantize_backward_x(g, distance, x, codebook, indices, gradient)
    for _ in range(3):
        again = kernels.vector_quantize_backward_x(g, distance, x, codebook, indices, gradient)
        assert torch.equal(again, first)
