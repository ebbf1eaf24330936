"""residual_quantize: exact indices at every level, straight-through gradient."""

import pytest
import torch
from ops.nearest_code_cases import ordered_argmin

from fastvq import ops


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_levels_follow_the_definition(dtype, backend):
    x, books = torch.randn(40, 6).to(dtype), torch.randn(3, 9, 6).to(dtype)
    quantized, indices = ops.residual_quantize(x, books, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    residual, total = x.to(wide), torch.zeros(40, 6, dtype=wide)
    for level, book in enumerate(books):
        assert torch.equal(indices[:, level], ordered_argmin(residual, book))
        residual = residual - book[indices[:, level]].to(wide)
        total = total + book[indices[:, level]].to(wide)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, total.to(dtype))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradient_is_straight_through(backend):
    x = torch.randn(5, 3, requires_grad=True)
    books = torch.randn(2, 4, 3, requires_grad=True)
    weight = torch.randn(5, 3)
    (ops.residual_quantize(x, books, backend=backend).quantized * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert books.grad is None


@pytest.mark.parametrize("backend", [None, "reference"])
def test_rows_without_a_code(backend):
    x, books = torch.randn(4, 3, requires_grad=True), torch.randn(2, 4, 3)
    with torch.no_grad():
        x[1, 0] = torch.inf
    quantized, indices = ops.residual_quantize(x, books, backend=backend)
    assert (indices[1] == -1).all()
    assert quantized[1].isnan().all()
    books[1] = torch.nan
    quantized, indices = ops.residual_quantize(x, books, backend=backend)
    assert (indices[[0, 2, 3], 0] >= 0).all()
    assert (indices[:, 1] == -1).all()
    quantized.sum().backward()
    assert (x.grad == 0).all()
    assert ops.residual_quantize(torch.empty(0, 3), books, backend=backend).indices.shape == (0, 2)


def test_opcheck_and_compile():
    x, books = torch.randn(20, 3), torch.randn(2, 4, 3)
    for backend in ("cpp", "reference"):
        torch.library.opcheck(torch.ops.fastvq.residual_quantize.default, (x, books, backend))
    compiled = torch.compile(ops.residual_quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, books).indices, ops.residual_quantize(x, books).indices)


def test_bad_input():
    with pytest.raises(ValueError, match=r"codebooks \(Q, K, D\) with Q, K ≥ 1; got \(4, 3\)"):
        ops.residual_quantize(torch.ones(4, 3), torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match="with Q, K ≥ 1"):
        ops.residual_quantize(torch.ones(4, 3), torch.ones(0, 5, 3))
