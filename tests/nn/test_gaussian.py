"""DiagonalGaussian: closed forms against numerical integration and torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastvq.nn.gaussian import DiagonalGaussian

U = 2.0**-24


def test_kl_equals_the_integral() -> None:
    mean = torch.tensor([[0.0], [1.5], [-2.0]], dtype=torch.float64)
    log_variance = torch.tensor([[0.0], [-1.0], [0.7]], dtype=torch.float64)
    z = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    q = Normal(mean, torch.exp(0.5 * log_variance))
    density = q.log_prob(z).exp()
    integral = torch.trapezoid(density * (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)), z)
    kl = DiagonalGaussian(mean, log_variance).kl()
    # The trapezoid rule is exact to rounding for a Gaussian that the grid resolves (step 3e-4).
    assert (kl - integral).abs().max() < 1e-12 * 200_001**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kl_sums_all_but_the_first_dimension_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(3, 4, 5, generator=generator).to(dtype) for _ in range(2))
    kl = DiagonalGaussian(mean, log_variance).kl()
    wide = Normal(mean.double(), torch.exp(0.5 * log_variance.double()))
    expected = kl_divergence(wide, Normal(0.0, 1.0)).sum(dim=(1, 2))
    assert kl.dtype == torch.float32
    # 20 terms, each of at most four roundings of mean² + e^v + |v| (expm1 within 2 ulp).
    size = (mean.double() ** 2 + log_variance.double().exp() + log_variance.double().abs()).sum(
        dim=(1, 2)
    )
    assert ((kl - expected).abs() <= (20 + 5) * U * size).all()


def test_kl_near_the_prior_keeps_its_digits() -> None:
    small = torch.full((1, 1), 1e-3)
    kl = DiagonalGaussian(torch.zeros(1, 1), small).kl().item()
    v = small.double().item()
    exact = 0.5 * (v**2 / 2 + v**3 / 6 + v**4 / 24)
    assert abs(kl - exact) <= 4 * U * v  # exp(v) − 1 − v would err by u of 1


def test_sample_has_the_moments_and_the_gradient() -> None:
    torch.manual_seed(0)
    mean = torch.full((100_000, 1), 3.0, requires_grad=True)
    log_variance = torch.full((100_000, 1), -2.0, requires_grad=True)
    z = DiagonalGaussian(mean, log_variance).sample()
    sigma = torch.exp(torch.tensor(-1.0)).item()
    # Five standard errors: σ/√n of the mean, σ²√(2/n) of the variance.
    assert abs(z.mean().item() - 3.0) < 5 * sigma / 100_000**0.5
    assert abs(z.var().item() - sigma**2) < 5 * sigma**2 * (2 / 100_000) ** 0.5
    grad_mean, grad_log_variance = torch.autograd.grad(z.sum(), (mean, log_variance))
    assert (grad_mean == 1).all()
    torch.testing.assert_close(grad_log_variance, 0.5 * (z - mean).detach())
