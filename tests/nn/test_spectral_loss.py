"""The spectral loss and its parts, against a direct Fourier sum in float64."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from fastvq.nn.spectral_loss import log_spectral_distance, magnitude_spectrogram, spectral_loss

U = 2.0**-24


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5


def _direct(x: Tensor, window: int, hop: int) -> Tensor:
    """The definition, one frame and one frequency at a time: (frames, window/2 + 1) float64."""
    values = x.double().tolist()
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * n / window) for n in range(window)]
    rows = []
    for frame in range(-(-len(values) // hop)):
        row = []
        for k in range(window // 2 + 1):
            total = 0j
            for n in range(window):
                place = hop * frame + n - window // 2
                if 0 <= place < len(values):
                    turn = cmath.exp(-2j * math.pi * k * n / window)
                    total += hann[n] * values[place] * turn
            row.append(abs(total) * 2 / sum(hann))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("length", "window", "hop"), [(50, 16, 4), (1, 8, 2), (7, 32, 8), (33, 2, 1), (40, 6, 9)]
)
def test_magnitudes_are_the_direct_sum(length: int, window: int, hop: int) -> None:
    x = _noise(length)
    expected = _direct(x, window, hop)
    exact = magnitude_spectrogram(x.double(), window, hop)
    assert exact.shape == expected.shape
    # Every sum has `window` terms of size at most ½, scaled by 2/Σw = 4/window: the sum of sizes
    # is at most 1 and a fast transform of n points errs by less than n·u of it in float64.
    assert (exact - expected).abs().max() <= 4 * window * 2.0**-53
    assert (magnitude_spectrogram(x, window, hop) - expected).abs().max() <= 4 * window * U


def test_a_full_scale_sine_has_magnitude_one() -> None:
    n = torch.arange(256, dtype=torch.float64)
    magnitudes = magnitude_spectrogram(torch.sin(2 * math.pi * 8 * n / 64), 64, 16)
    middle = magnitudes[8]
    assert int(middle.argmax()) == 8
    assert float(middle[8]) == pytest.approx(1.0, abs=1e-12)


def test_the_loss_is_its_equation() -> None:
    x, y = _noise(2, 1, 70), _noise(2, 1, 70, seed=1)
    floor, total = 1e-2, 0.0
    for window in (16, 8):
        pairs = [(_direct(a[0], window, window // 4), _direct(b[0], window, window // 4))
                 for a, b in zip(x, y)]  # fmt: skip
        ratios = [float((a - b).norm() / a.norm()) for a, b in pairs]
        logs = torch.stack([(a.clamp(min=floor).log() - b.clamp(min=floor).log()).abs()
                            for a, b in pairs])  # fmt: skip
        total += sum(ratios) / 2 + float(logs.mean())
    loss = spectral_loss(x.double(), y.double(), (16, 8), floor)
    assert float(loss) == pytest.approx(total / 2, rel=1e-10)


def test_gradients() -> None:
    x, y = _noise(2, 1, 20).double(), _noise(2, 1, 20, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda other: spectral_loss(x, other, (8, 4), 1e-6), (y,))
    silent = torch.zeros(1, 1, 20, requires_grad=True)
    spectral_loss(torch.zeros(1, 1, 20), silent).backward()
    assert silent.grad is not None
    assert torch.equal(silent.grad, torch.zeros_like(silent))


def test_forward_and_backward_repeat_bitwise() -> None:
    x, y = _noise(3, 1, 900), _noise(3, 1, 900, seed=1)
    found = []
    for _ in range(2):
        other = y.clone().requires_grad_()
        loss = spectral_loss(x, other)
        loss.backward()
        found.append((loss.detach(), other.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_log_spectral_distance_of_a_louder_sound() -> None:
    """Ten times the amplitude is 20 dB in every bin that lies above the floor."""
    x = _noise(2, 1, 600)
    distance = log_spectral_distance(x, 10.0 * x, window=64, floor=1e-30)
    torch.testing.assert_close(distance, torch.full((2,), 20.0), rtol=1e-5, atol=0.0)
    assert torch.equal(log_spectral_distance(x, x), torch.zeros(2))


def test_refused() -> None:
    with pytest.raises(ValueError, match="window must be even and at least 2"):
        magnitude_spectrogram(torch.zeros(1, 5), 3, 1)
    with pytest.raises(ValueError, match=r"one shape \(B, \.\.\., T\)"):
        spectral_loss(torch.zeros(1, 5), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="at least one, and floor must be positive"):
        spectral_loss(torch.zeros(1, 5), torch.zeros(1, 5), ())
