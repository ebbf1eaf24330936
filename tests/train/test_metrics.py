"""Figures of merit against brute force."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvq.train.metrics import (
    PictureLikelihood,
    _log_prob,
    area_under_roc,
    bits_per_dim,
    evaluate_bits_per_dim,
    evaluate_elbo,
    nats_to_bits,
    peak_signal_to_noise,
)
from fastvq.train.priors import train_prior
from fastvq.train.run_folder import load_run
from fastvq.train.stage1 import train_stage1

from .conftest import prior_config, stage1_config


def test_conversions() -> None:
    assert nats_to_bits(math.log(8.0)) == pytest.approx(3.0)
    assert bits_per_dim(math.log(256.0) * 12, 12) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="dims must be 1 or more; got 0"):
        bits_per_dim(1.0, 0)
    squared = torch.tensor([1.0, 0.01, 0.0])
    assert peak_signal_to_noise(squared).tolist() == pytest.approx([0.0, 20.0, 100.0])


def test_the_area_under_the_roc_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    for high in (2, 5, 1000):  # many ties, some, hardly any
        normal = rng.integers(0, high, 40).astype(float)
        anomalous = rng.integers(0, high + high // 2, 25).astype(float)
        pairs = [(a > n) + 0.5 * (a == n) for n in normal for a in anomalous]
        assert area_under_roc(normal, anomalous) == sum(pairs) / 1000
    assert area_under_roc(np.zeros(3), np.ones(2)) == 1.0
    assert area_under_roc(np.ones(2), np.array([-np.inf])) == 0.0
    assert area_under_roc(np.ones(4), np.ones(4)) == 0.5
    with pytest.raises(ValueError, match="at least one score each; got 3 and 0"):
        area_under_roc(np.zeros(3), np.zeros(0))


def test_the_likelihood_is_a_distribution_over_256_values() -> None:
    values = torch.arange(256.0)[:, None, None]
    means = torch.tensor([0.0, 0.1, 0.5004, 1.0])[None, :, None]
    scales = torch.tensor([1e-4, 0.01, 0.4])[None, None, :]
    total = _log_prob(values, means, scales).exp().sum(dim=0)
    # 256 differences of values up to 1, each off by a few unit roundoffs (exp and division: 8).
    assert torch.allclose(total, torch.ones(()), rtol=0, atol=256 * 8 * 2**-24)


def test_the_likelihood_is_the_formula() -> None:
    """Against the Laplace distribution of torch in float64, in the middle and in both tails."""
    values = torch.tensor([0.0, 3.0, 100.0, 254.0, 255.0], dtype=torch.float64)
    means, scale = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    laplace = torch.distributions.Laplace(means, scale)
    low, high = laplace.cdf((values - 0.5) / 255), laplace.cdf((values + 0.5) / 255)
    low[0], high[-1] = 0.0, 1.0
    expected = torch.log(0.999 * (high - low) + 0.001 / 256)
    got = _log_prob(values.float(), means.float(), scale.float()).double()
    # The edges are differences of values below 1 (u = 2^-24), divided by a scale of 0.05, in the
    # exponent: 20 · 4u; the mass of a bin is a difference of two such, about 0.04 to 1 relative.
    assert torch.allclose(got, expected, rtol=0, atol=20 * 4 * 50 * 2**-24)


class _Constant:
    """A decoder that always gives the same grey."""

    def __init__(self, mean: float) -> None:
        self.mean = mean

    def encode(self, x: Tensor) -> list[Tensor]:
        return [torch.zeros(len(x), 1, 1, dtype=torch.int64)]

    def decode_codes(self, codes: list[Tensor]) -> Tensor:
        return torch.full((len(codes[0]), 1, 16, 16), self.mean)


def test_fitting_finds_the_scale_of_the_data() -> None:
    model: Any = _Constant(0.5)
    torch.manual_seed(0)
    noise = torch.distributions.Laplace(0.5, 0.05).sample((200, 1, 16, 16)).clamp(0, 1)
    likelihood = PictureLikelihood.fit(model, noise.split(50))
    found = float(likelihood.scales[PictureLikelihood.MEAN_BINS // 2])
    # The grid's ratio is 2550^(1/39) < 1.23; the sampling error of 51200 values is far below.
    assert 0.05 / 1.23 <= found <= 0.05 * 1.23
    # Entropy of the rounded Laplace in bits: log2(2 e b · 255), off by the grid's and ε's cost.
    bits = likelihood.bits_per_dim(model, noise)
    assert bits.shape == (200,)
    assert float(bits.mean()) == pytest.approx(math.log2(2 * math.e * 0.05 * 255), abs=0.05)
    with pytest.raises(ValueError, match="batches must hold pictures; got none"):
        PictureLikelihood.fit(model, [])


def test_the_bound_of_a_finished_prior(pictures: Path, codes: Path, tmp_path: Path) -> None:
    run = train_prior(prior_config(codes, tmp_path / "run", steps=2), progress=False)
    got = evaluate_bits_per_dim(run, str(pictures), batch_size=7)
    # A uniform code costs 4 bits at each of 4 + 16 places, over 192 values: the prior is near it.
    assert got["code_bits_per_dim"] == pytest.approx(4 * 20 / 192, rel=0.1)
    assert got["total_bits_per_dim"] == got["code_bits_per_dim"] + got["picture_bits_per_dim"]
    assert 0 < got["picture_bits_per_dim"] < math.log2(256 / 0.001)
    per_level = 4 * got["level0_bits_per_code"] + 16 * got["level1_bits_per_code"]
    assert per_level / 192 == pytest.approx(got["code_bits_per_dim"])
    assert got["pictures"] == 60
    other = evaluate_bits_per_dim(run, str(pictures), batch_size=60)
    assert other["code_bits_per_dim"] == pytest.approx(got["code_bits_per_dim"], rel=1e-5)


def test_the_elbo_of_a_finished_vae(pictures: Path, stage1_run: Path, tmp_path: Path) -> None:
    config = stage1_config(
        *(pictures, tmp_path / "run"),
        **{"model": "vae", "channels": 1, "steps": 2},
        model_arguments={"hidden_channels": 4, "latent_dim": 3},
    )
    run = load_run(train_stage1(config, progress=False))
    got = evaluate_elbo(run, str(pictures), limit=20)
    assert got["pictures"] == 20
    # Untrained, every pixel costs about ln 2 nats, one bit.
    assert got["bits_per_dim"] == pytest.approx(1.0, abs=0.15)
    assert got["negative_elbo"] == pytest.approx(got["bits_per_dim"] * 64 * math.log(2))
    assert evaluate_elbo(run, str(pictures), limit=20) == got
    assert "bits_per_dim" not in evaluate_elbo(run, str(pictures), binarise=False, limit=5)
    with pytest.raises(ValueError, match="run must be of kind 'vae'; got 'vqvae2'"):
        evaluate_elbo(str(stage1_run), str(pictures))
