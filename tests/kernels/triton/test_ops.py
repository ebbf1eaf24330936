"""The ops on the Triton kernels: the whole way from arguments to gradients."""

from __future__ import annotations

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within
from torch import Tensor

from fastvq import ops

pytest.importorskip("triton")


def _leaves(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def _gradients(output, weights, leaves) -> tuple[Tensor, ...]:
    a, b, c = weights
    loss = (output.quantized * a).sum() + (output.commitment * b).sum()
    return torch.autograd.grad(loss + (output.codebook * c).sum(), leaves)


@pytest.mark.parametrize(("gradient", "masked"), [("straight_through", True), ("rotation", False)])
@pytest.mark.parametrize(
    ("rows", "book", "metric"),
    [((90, 6), (9, 6), "l2"), ((2, 40, 5), (7, 5), "dot"), ((2, 40, 5), (2, 7, 5), "l2")],
)
def test_vector_quantize_equals_the_reference(rows, book, metric, gradient, masked, device) -> None:
    x, codebook = _leaves(device, rows, book)
    weights = [torch.randn(shape, device=device) for shape in (rows, rows[:-1], rows[:-1])]
    mask = (torch.arange(rows[-2]) % 3 > 0).to(device) if masked else None
    options = {"mask": mask, "metric": metric, "gradient": gradient}
    ours = ops.vector_quantize(x, codebook, backend="triton", **options)
    grads = _gradients(ours, weights, (x, codebook))
    wide = [t.detach().double().requires_grad_() for t in (x, codebook)]
    truth = ops.vector_quantize(*wide, backend="reference", **options)
    expected = _gradients(truth, [w.double() for w in weights], wide)
    assert torch.equal(ours.indices, truth.indices)
    assert torch.equal(ours.quantized.double(), truth.quantized)
    # float32 against float64 on numbers of order one, at most 80 rows to a code. How tight each
    # kernel is, its own tests say; here a wrong sign, head or row would show.
    for a, b in zip((*grads, ours.commitment), (*expected, truth.commitment)):
        size = 1e3 * (1 + b.detach().abs())
        assert_within(a, b.detach(), UNIT_ROUNDOFF[torch.float32] * size)


def test_code_statistics_equals_the_reference(device: str) -> None:
    (x,) = _leaves(device, (2, 70, 5))
    indices = torch.randint(-1, 6, (2, 70), device=device)
    ours = ops.code_statistics(x, indices, 6, backend="triton")
    truth = ops.code_statistics(x.double(), indices, 6, backend="reference")
    assert torch.equal(ours[0].double(), truth[0])
    # Summed in float64: rounded once.
    assert_within(ours[1], truth[1], 1.01 * UNIT_ROUNDOFF[torch.float32] * truth[1].abs())
    (grad,) = torch.autograd.grad(ours[1].square().sum(), x)
    (expected,) = torch.autograd.grad(truth[1].square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_quantize_equals_the_reference(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(60, 5, device=device).to(dtype).requires_grad_()
    codebooks = torch.randn(3, 9, 5, device=device)
    ours = ops.residual_quantize(x, codebooks, backend="triton")
    truth = ops.residual_quantize(x, codebooks, backend="reference")
    assert torch.equal(ours.indices, truth.indices)
    assert torch.equal(ours.quantized, truth.quantized)
    (grad,) = torch.autograd.grad(ours.quantized.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    assert ops.residual_quantize(x[:0], codebooks, backend="triton").indices.shape == (0, 3)


def test_raw_ops(device: str) -> None:
    raw = torch.ops.fastvq
    x, codebook = torch.randn(20, 3, device=device), torch.randn(4, 3, device=device)
    indices = torch.randint(-1, 4, (20,), device=device)
    weight = torch.rand(20, device=device)
    calls = {
        raw.code_statistics: (x, indices, 4, "triton"),
        raw.vector_quantize: (x, codebook, None, "l2", "triton"),
        raw.vector_quantize_backward_x: (x, None, x, codebook, indices, "rotation", "triton"),
        raw.vector_quantize_backward_codebook: (weight, x, codebook, indices, "triton"),
        raw.residual_quantize: (x, codebook[None], "triton"),
    }
    tests = ("test_schema", "test_faketensor")
    for op, arguments in calls.items():
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_a_training_step_compiles_to_one_graph(device: str) -> None:
    x, codebook = _leaves(device, (40, 4), (5, 4))

    def loss(x: Tensor, codebook: Tensor) -> Tensor:
        output = ops.vector_quantize(x, codebook, gradient="rotation", backend="triton")
        _, sums = ops.code_statistics(x, output.indices, 5, backend="triton")
        return output.quantized.square().sum() + output.codebook.sum() + sums.square().sum()

    eager = torch.autograd.grad(loss(x, codebook), (x, codebook))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(torch.autograd.grad(compiled(x, codebook), (x, codebook)), eager):
        torch.testing.assert_close(ours, expected)


def test_an_index_outside_the_codebook_is_refused() -> None:
    # On CUDA a device-side assertion says so, which would end this process's use of the GPU.
    if torch.cuda.is_available():
        pytest.skip("the assertion on the device cannot be survived")
    with pytest.raises(ValueError, match="indices must be −1 or in 0 … 3; got 4"):
        ops.code_statistics(torch.ones(2, 3), torch.tensor([0, 4]), 4, backend="triton")
