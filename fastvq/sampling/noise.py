"""Counter-based Gumbel noise: every draw's noise is a function of where the draw is, not of when.

There is no generator state: the noise of one code at one position of one level of one sample
under one seed is computed from those five numbers alone. It is therefore the same in any order,
batch split, method or device. Choosing a code from it lives in `draw`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
# the golden-ratio increment and the two multipliers of its output function, as signed int64.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def fresh_seed() -> int:
    """A seed in 0 … 2⁶³ − 2, taken from torch's global CPU generator."""
    return int(torch.randint(2**63 - 1, ()).item())


def _signed(number: int) -> int:
    """The int64 with the same low 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical shift: int64's own >> would copy the sign bit in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64 bits; int64 products wrap modulo 2⁶⁴."""
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def sample_states(seed: int, samples: Tensor, level: int) -> Tensor:
    """The state h of `random_bits` after seed, sample and level: (n,) int64."""
    state = _mix(torch.zeros_like(samples) + _signed((seed + 1) * _INCREMENT))
    state = _mix(state + (samples + 1) * _INCREMENT)
    return _mix(state + _signed((level + 1) * _INCREMENT))


def random_bits(
    seed: int, samples: Tensor, level: int, positions: Tensor, num_codes: int
) -> Tensor:
    """64 random bits for each (position, sample, code).

        h ← mix(h + γ·(n + 1)) for n = seed, sample, level, position, code in turn, from h = 0

    γ is SplitMix64's increment, so that the last step walks a SplitMix64 stream over the codes.

    Args:
        seed: any int; taken modulo 2⁶⁴.
        samples: (n,) int64, index of each sample.
        level: which prior of a hierarchy draws; 0 for a single one.
        positions: (P,) int64, raster index in the map.
        num_codes: K.
    Returns:
        (P, n, K) int64.
    """
    codes = torch.arange(num_codes, device=samples.device)
    state = sample_states(seed, samples, level)
    state = _mix(state + (positions[:, None] + 1) * _INCREMENT)
    return _mix(state[:, :, None] + (codes + 1) * _INCREMENT)


def gumbel_noise(
    seed: int, samples: Tensor, level: int, positions: Tensor, num_codes: int
) -> Tensor:
    """Standard Gumbel noise −log(−log u) for each (position, sample, code); see `random_bits`.

    u = (m + ½)·2⁻⁵² with m the top 52 of 64 random bits: never 0 or 1, and exact in float64. The
    bits are identical on every device; the logarithms may differ in their last place between
    devices, which `draw`'s tolerance covers many times over.

    Returns:
        (P, n, K) float64.
    """
    bits = _shift_right(random_bits(seed, samples, level, positions, num_codes), 12)
    uniform = bits.double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()
