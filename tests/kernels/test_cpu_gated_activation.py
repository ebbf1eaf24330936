"""The gate's tanh, σ and slopes on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq.kernels import load_cpu_extension

EXTENSION, _ = load_cpu_extension()
U = 2.0**-24
pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ core is not built")


def _features() -> tuple[Tensor, Tensor]:
    """Values (a, b), dense near zero, where tanh bends, and out to where both are flat."""
    a = torch.cat(
        [
            torch.linspace(-12, 12, 40_001),
            torch.linspace(0.6249, 0.6251, 1001),
            *(sign * torch.logspace(-30, 1.9, 2001) for sign in (-1, 1)),
        ]
    )
    return a, a.flip(0)[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))]


def _gates(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gated values, their gradients to a and b, by the pass of one picture of one channel."""
    features, gated = torch.stack([a, b], dim=1).contiguous(), torch.empty_like(a)
    grads, again = torch.empty_like(features), torch.empty_like(a)
    sums = torch.empty(-(-len(a) // 128), 2)
    call = (features.data_ptr(), 0, 2, 0, 2, 0, 1, len(a), 1, 0, 0, 1.0)
    EXTENSION.gated_activation(*call, gated.data_ptr(), 1)
    pointers = (tensor.data_ptr() for tensor in (grad, grads, sums, again))
    EXTENSION.gated_activation_backward(*call, *pointers, 1)
    assert torch.equal(again, gated) or a.isnan().any()
    assert grads.isnan().any() or torch.allclose(sums.sum(0), grads.sum(0), rtol=1e-3, atol=1e-3)
    return gated, grads[:, 0], grads[:, 1]


@pytest.mark.parametrize("isa", EXTENSION.isa_available() if EXTENSION else [])
def test_errors_are_a_few_roundings(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
    a, b = _features()
    exact_a, exact_b = a.double(), b.double()
    tanh, sigmoid = exact_a.tanh(), exact_b.sigmoid()
    # cosh and not 1 − tanh²: near ±1 that would cancel.
    slope_a, slope_b = exact_a.cosh().square().reciprocal(), sigmoid * (-exact_b).sigmoid()
    truths = (tanh * sigmoid, slope_a * sigmoid, tanh * slope_b)
    for found, truth in zip(_gates(a, b, torch.ones_like(a)), truths):
        # Below this, one factor is smaller than the exponential goes.
        normal = truth.abs() > 1e-35
        error = (found.double() - truth).abs()
        assert (error[normal] <= 8 * U * truth[normal].abs()).all()
        assert (error[~normal] <= 1e-35).all()


@pytest.mark.parametrize("isa", EXTENSION.isa_available() if EXTENSION else [])
def test_limits_and_nan(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([inf, -inf, 0.0, 1.0, nan, 1.0, inf, -0.0])
    b = torch.tensor([inf, inf, inf, -inf, 0.0, nan, 0.0, 3.0])
    gated, grad_a, grad_b = _gates(a, b, torch.ones_like(a))
    expected = torch.tanh(a) * torch.sigmoid(b)
    torch.testing.assert_close(gated, expected, rtol=0, atol=1e-30, equal_nan=True)
    assert grad_a[4:6].isnan().all()
    assert grad_b[4:6].isnan().all()
    assert grad_a[[0, 1, 6]].abs().max() < 1e-30
    assert grad_b[[0, 1, 2, 3]].abs().max() < 1e-30
