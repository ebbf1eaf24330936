"""VAE: the bound's definition, sizes, sampling, errors, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastvq.models.vae import VAE

U = 2.0**-24


def _pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_terms_are_nats_of_the_stated_densities(likelihood: str) -> None:
    torch.manual_seed(0)
    model = VAE(2, (9, 6), 8, 3, likelihood=likelihood, variance=0.25)
    x = _pictures(5, 2, 9, 6)
    out = model(x)
    wide, mean = x.double(), out.reconstruction.double()
    if likelihood == "bernoulli":
        terms = -(wide * mean.log() + (1 - wide) * (1 - mean).log())
    else:
        terms = (wide - mean) ** 2 / 0.5 + 0.5 * math.log(2 * math.pi * 0.25)
    expected = terms.flatten(1).sum(dim=1)
    # 108 terms; each, and the sigmoid, a few roundings, amplified at most by 1/min(p̂, 1 − p̂).
    edge = torch.minimum(mean, 1 - mean).min().item()
    bound = (108 + 8 / edge) * U * terms.abs().flatten(1).sum(dim=1)
    assert ((out.reconstruction_loss - expected).abs() <= bound).all()
    assert torch.equal(out.loss, (out.reconstruction_loss + out.kl).mean())
    assert out.mean.shape == out.log_variance.shape == (5, 3)
    assert out.kl.shape == out.reconstruction_loss.shape == (5,)


def test_elbo_is_the_negative_of_forwards_terms() -> None:
    torch.manual_seed(0)
    model = VAE(1, 8, 4, 2)
    x = _pictures(4, 1, 8, 8).round()
    torch.manual_seed(1)
    out = model(x)
    torch.manual_seed(1)
    assert torch.equal(model.elbo(x), -out.reconstruction_loss - out.kl)
    torch.manual_seed(1)
    singles = torch.stack([model.elbo(x) for _ in range(3)])
    torch.manual_seed(1)
    torch.testing.assert_close(model.elbo(x, num_samples=3), singles.mean(dim=0))


@pytest.mark.parametrize("size", [4, 28, 30, (5, 7), (32, 17), [11, 4]])
def test_any_size(size: int | tuple[int, int] | list[int]) -> None:
    model = VAE(3, size, 4, 2)
    height, width = (size, size) if isinstance(size, int) else size
    out = model(_pictures(2, 3, height, width))
    out.loss.backward()
    assert out.reconstruction.shape == (2, 3, height, width)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    sample = model.sample(3)
    assert sample.shape == (3, 3, height, width)
    assert sample.min() >= 0.0
    assert sample.max() <= 1.0


def test_a_seed_fixes_the_samples_and_leaves_the_global_generator() -> None:
    model = VAE(1, 8, 4, 2)
    state = torch.get_rng_state()
    first = model.sample(4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, model.sample(4, seed=3))
    assert not torch.equal(first, model.sample(4, seed=4))


def test_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    x = torch.zeros(16, 1, 12, 12)
    for i in range(16):
        x[i, 0, : 3 + i % 4 * 3, : 3 + i // 4 * 3] = 1.0
    model = VAE(1, 12, 8, 4)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = -model.elbo(x).mean().item()
    for _ in range(300):
        loss = model(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # 16 equally likely pictures cannot cost less than ln 16 on average; untrained it is ~100.
    last = -model.elbo(x, num_samples=20).mean().item()
    assert math.log(16) - 0.5 < last < 10.0 < first


def test_compiles_as_one_graph() -> None:
    model = VAE(1, 8, 4, 2).eval()
    x = _pictures(2, 1, 8, 8)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out.mean, expected.mean)
    torch.testing.assert_close(out.kl, expected.kl)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 3}, "image_size must be .* got 3"),
        ({"image_size": (8, 8, 8)}, "image_size"),
        ({"latent_dim": 0}, "latent_dim must be at least 1; got 0"),
        ({"likelihood": "poisson"}, "likelihood must be .*'poisson'"),
        ({"variance": 0.0}, "variance must be positive"),
    ],
)
def test_refuses_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAE(**arguments)


def test_refuses_other_pictures() -> None:
    model = VAE(1, 8, 4, 2)
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\); got torch.float32 \(2, 1, 8, 9\)"):
        model(torch.zeros(2, 1, 8, 9))
    with pytest.raises(ValueError, match="uint8"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        model.elbo(torch.zeros(2, 1, 8, 8), num_samples=0)
