"""vector_quantize_mean: the results of vector_quantize, its losses as means."""

from __future__ import annotations

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within
from torch import Tensor

from fastvq import ops
from fastvq.ops.vector_quantize_mean import vector_quantize_mean

U = UNIT_ROUNDOFF[torch.float32]
RAW = torch.ops.fastvq.vector_quantize_mean.default


def make_input(n: int, d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x, codebook = torch.randn(2, n, d, generator=g), torch.randn(2, 7, d, generator=g)
    if n > 2:
        x[0, 1] = torch.nan
    return x, codebook, torch.rand(n, generator=g) > 0.3


@pytest.mark.parametrize("n", [0, 1, 40, 3000])
@pytest.mark.parametrize("masked", [False, True])
def test_means_are_of_the_rows_with_a_code(n: int, masked: bool) -> None:
    x, codebook, mask = make_input(n)
    mask = mask if masked else None
    by_row = ops.vector_quantize(x, codebook, mask=mask)
    found = vector_quantize_mean(x, codebook, mask=mask)
    assert torch.equal(found.indices, by_row.indices)
    assert torch.equal(found.quantized.nan_to_num(9.0), by_row.quantized.nan_to_num(9.0))
    losses = by_row.commitment[by_row.indices >= 0].double()
    truth = losses.sum() / max(1, losses.numel() * x.shape[-1])
    # Added in float64, rounded to float32 once.
    assert_within(found.commitment, truth, U * truth + losses.numel() * 2.0**-52 * truth)
    assert torch.equal(found.codebook, found.commitment)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_mean(gradient: str, masked: bool) -> None:
    x, codebook, mask = make_input(40)
    found = []
    for of_rows in (False, True):
        leaves = [x.clone().requires_grad_(), codebook.clone().requires_grad_()]
        options = {"mask": mask if masked else None, "gradient": gradient}
        if of_rows:
            out = ops.vector_quantize(*leaves, **options)
            counted = out.indices >= 0
            divisor = counted.sum() * x.shape[-1]
            losses = [
                torch.where(counted, loss, 0.0).sum() / divisor
                for loss in (out.commitment, out.codebook)
            ]
        else:
            out = vector_quantize_mean(*leaves, **options)
            losses = [out.commitment, out.codebook]
        kept = torch.where((out.indices >= 0)[..., None], out.quantized, 0.0)
        (kept.sin().sum() + 3.0 * losses[0] + 5.0 * losses[1]).backward()
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found):
        assert a.any()
        assert torch.equal(a, b)


def test_backends_agree() -> None:
    x, codebook, mask = make_input(40)
    _, indices, mean, divisor = RAW(x, codebook, mask, "l2", "cpp")
    other = RAW(x, codebook, mask, "l2", "reference")
    assert torch.equal(indices, other[1])
    assert torch.equal(divisor, other[3])
    # Both losses: D+2 operations a row, then a sum of 80 in any order, and a division.
    assert_within(mean, other[2], 2 * (5 + 2 + 80 + 1) * U * mean.double())


def test_nothing_counts() -> None:
    x, codebook, mask = make_input(4)
    x.requires_grad_()
    out = vector_quantize_mean(x, codebook, mask=torch.zeros_like(mask))
    assert out.commitment == 0
    out.commitment.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck(backend: str) -> None:
    x, codebook, mask = make_input(6)
    x = x.nan_to_num(0.0)
    torch.library.opcheck(RAW, (x, codebook, mask, "l2", backend))
    torch.library.opcheck(RAW, (x[0], codebook[0], None, "dot", backend))


def test_compiles() -> None:
    x, codebook, mask = make_input(6)
    leaves = (x.nan_to_num(0.0).requires_grad_(), codebook.requires_grad_())
    compiled = torch.compile(vector_quantize_mean, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, vector_quantize_mean):
        out = run(*leaves, mask=mask)
        grads = torch.autograd.grad(out.commitment + 2.0 * out.codebook, leaves)
        found.append([*out, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found))
