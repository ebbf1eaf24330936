"""The counter-based noise against Python's integers, and its statistics."""

from __future__ import annotations

import math

import torch

from fastvq.sampling.noise import fresh_seed, gumbel_noise, random_bits


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _bits(*numbers: int) -> int:
    state = 0
    for number in numbers:
        state = _mix((state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return state


def test_bits_equal_exact_integer_arithmetic() -> None:
    for seed in (0, 1, -1, 2**63 - 1, 2**64 - 1):
        samples, positions = torch.tensor([0, 3, 10**12]), torch.tensor([0, 7])
        bits = random_bits(seed, samples, 2, positions, 3)
        for p, s, k in torch.cartesian_prod(*map(torch.arange, (2, 3, 3))).tolist():
            expected = _bits(seed % 2**64, int(samples[s]), 2, int(positions[p]), k)
            assert int(bits[p, s, k]) % 2**64 == expected


def test_the_stream_over_codes_is_splitmix64() -> None:
    # First outputs of SplitMix64 from state 1234567, as published with the algorithm.
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(_mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_depends_on_where_alone() -> None:
    samples, positions = torch.arange(4), torch.arange(6)
    whole = gumbel_noise(5, samples, 1, positions, 7)
    assert whole.shape == (6, 4, 7)
    assert whole.dtype == torch.float64
    assert torch.equal(gumbel_noise(5, samples[2:], 1, positions[3:], 7), whole[3:, 2:])
    assert torch.equal(gumbel_noise(5, samples.flip(0), 1, positions, 5), whole.flip(1)[..., :5])
    for other in (
        gumbel_noise(6, samples, 1, positions, 7),
        gumbel_noise(5, samples, 0, positions, 7),
    ):
        assert (other != whole).all()


def test_gumbel_moments() -> None:
    # Mean γ and variance π²/6; of n draws the mean has standard error π/√(6n), and the variance
    # one of √((κ − 1)/n)·π²/6 with kurtosis κ = 5.4. Five of each.
    noise = gumbel_noise(0, torch.arange(100), 0, torch.arange(20), 100)
    n, variance = noise.numel(), math.pi**2 / 6
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772156649) < 5 * math.sqrt(variance / n)
    assert abs(noise.var().item() - variance) < 5 * math.sqrt(4.4 / n) * variance


def test_fresh_seeds_come_from_the_global_generator() -> None:
    torch.manual_seed(3)
    first = [fresh_seed() for _ in range(3)]
    torch.manual_seed(3)
    assert [fresh_seed() for _ in range(3)] == first
    assert len(set(first)) == 3
