"""The C++ passes over rows: the same to the bit on every instruction set and thread count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq import ops

_C = pytest.importorskip("_fastvq_C", reason="the C++ kernels are not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 3, 7, 8, 9, 16, 31, 33, 64, 100, 130)


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _step(x: Tensor, codebook: Tensor, mask: Tensor | None, gradient: str) -> list[Tensor]:
    """Everything a training step computes beside the search."""
    x, codebook = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    output = ops.vector_quantize(x, codebook, mask=mask, gradient=gradient, backend="cpp")
    weight = torch.linspace(-1, 1, x.shape[-1])
    loss = (output.quantized.float() * weight).nansum() + output.commitment.nansum()
    loss = loss + (output.codebook * torch.linspace(0, 1, x.shape[-2])).nansum()
    loss.backward()
    counts, sums = ops.code_statistics(x.detach(), output.indices, codebook.shape[-2])
    assert x.grad is not None
    assert codebook.grad is not None
    return [*output, x.grad, codebook.grad, counts, sums]


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("heads", [False, True])
def test_same_on_every_instruction_set(heads, gradient, monkeypatch) -> None:
    for d in WIDTHS:
        for x_dtype in DTYPES:
            for dtype in DTYPES if d in (7, 16, 33) else (torch.float32,):
                shape = ((2, 20, d), (2, 6, d)) if heads else ((40, d), (6, d))
                x, codebook = torch.randn(shape[0]).to(x_dtype), torch.randn(shape[1]).to(dtype)
                x[..., 3, 0] = torch.nan
                mask = torch.arange(x.shape[-2]) % 5 > 0
                results = []
                for isa in _C.isa_available():
                    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
                    results.append(_step(x, codebook, mask, gradient))
                assert all(_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("n", "k", "d"), [(9000, 40, 100), (60_000, 300, 8), (3000, 2500, 64)])
def test_same_on_every_thread_count(n, k, d) -> None:
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    x[: n // 2] = codebook[1]  # one code owns half of the rows
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(_step(x, codebook, None, "rotation"))
        results[-1] += ops.residual_quantize(x, torch.stack([codebook, codebook]))
    assert _equal(results[0], results[1])
    assert _equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_half_precision_as_torch_does(dtype) -> None:
    # grad_x without a commitment is grad_quantized rounded to x's dtype: every exponent, and
    # mantissas at, just below and just above the ties of both dtypes.
    exponents = torch.arange(256, dtype=torch.int32)[:, None] << 23
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000])
    high = torch.tensor([0, 0x2000, 0x10000, 0x400000, 0x7E0000])
    mantissas = (low[:, None] | high).flatten().to(torch.int32)
    values = (exponents | mantissas).view(torch.float32)
    values = torch.cat([values, -values], dim=1)
    x = torch.zeros(values.shape, dtype=dtype, requires_grad=True)
    output = ops.vector_quantize(x, torch.zeros(1, values.shape[1]), backend="cpp")
    output.quantized.backward(values)
    expected = values.to(dtype)
    number = ~expected.isnan()
    assert torch.equal(x.grad.isnan(), ~number)
    assert torch.equal(x.grad.view(torch.int16)[number], expected.view(torch.int16)[number])


def test_a_shared_codebook_sees_the_heads_as_one_batch() -> None:
    x, codebook = torch.randn(3, 50, 5), torch.randn(7, 5, requires_grad=True)
    ops.vector_quantize(x, codebook).codebook.sum().backward()
    flat = codebook.detach().clone().requires_grad_()
    ops.vector_quantize(x.flatten(0, 1), flat).codebook.sum().backward()
    assert torch.equal(codebook.grad, flat.grad)
