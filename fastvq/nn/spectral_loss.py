"""The distance between two waveforms in several short-time Fourier transforms.

Lives here: magnitude spectrograms and the multi-resolution loss on them. Mel bands and pictures of
spectrograms belong to what shows and judges sounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def magnitude_spectrogram(x: Tensor, window: int, hop: int) -> Tensor:
    """Magnitudes of the short-time Fourier transform, a full-scale sine being about 1.

        S[f, k] = |Σ_n w[n] · x[hop·f + n − window/2] · exp(−2πi·k·n / window)| · 2 / Σ_n w[n]
        w[n] = ½ − ½ cos(2πn / window),   n = 0 … window − 1   (periodic Hann)

    x counts as 0 outside its T steps, so that any T ≥ 1 has a spectrogram. Differentiable, where
    S = 0 too (with gradient 0), and bitwise repeatable on one device, backward included.

    Args:
        x: (..., T) float.
        window: even number of steps, at least 2.
        hop: steps from one frame to the next, at least 1.
    Returns:
        (..., ⌈T / hop⌉, window/2 + 1), in x's dtype, at least float32.
    Raises:
        ValueError: an argument breaks its rule.
    """
    if window < 2 or window % 2 or hop < 1 or x.shape[-1] < 1:
        raise ValueError(
            "magnitude_spectrogram: window must be even and at least 2, hop and the length of x at "
            f"least 1; got window {window}, hop {hop}, length {x.shape[-1]}."
        )
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    frames = -(-x.shape[-1] // hop)
    after = hop * (frames - 1) + window - window // 2 - x.shape[-1]
    padded = F.pad(x, (window // 2, max(after, 0)))
    hann = torch.hann_window(window, periodic=True, dtype=x.dtype, device=x.device)
    # Unfolding gathers in its backward pass; torch.stft's frames are added up in no fixed order.
    spectrum = torch.fft.rfft(padded.unfold(-1, window, hop)[..., :frames, :] * hann)
    power = spectrum.real.square() + spectrum.imag.square()
    positive = power > 0.0
    root = torch.where(positive, power, 1.0).sqrt()
    return torch.where(positive, root, 0.0) * (2.0 / float(hann.sum()))


def spectral_loss(
    x: Tensor, y: Tensor, windows: Sequence[int] = (512, 128, 32), floor: float = 1e-3
) -> Tensor:
    """Multi-resolution spectral distance of waveforms y from waveforms x; a scalar.

        loss = mean over windows of   ‖S(x) − S(y)‖₂ / max(‖S(x)‖₂, floor)
                                    + mean |ln max(S(x), floor) − ln max(S(y), floor)|

    with S the magnitudes of `magnitude_spectrogram`, a quarter of the window apart; the norms are
    taken over each example, and their ratios averaged over the batch; the second mean is over all
    elements.

    Args:
        x: (B, ..., T) float, the originals.
        y: as x, what is compared with them.
        windows: steps, even; one resolution each.
        floor: magnitudes below it count as it: what is softer than 20 log10(floor) dB below a
            full-scale sine is not listened to.
    Raises:
        ValueError: shapes disagree, no windows, or floor is not positive.
    Yamamoto et al. 2020, arXiv:1910.11480, eq. 4–6; the floor replaces their clamp at 1e-7.
    """
    if x.shape != y.shape or x.dim() < 2:
        raise ValueError(
            "spectral_loss: x and y must be of one shape (B, ..., T); "
            f"got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if not windows or not floor > 0.0:
        raise ValueError(
            f"spectral_loss: windows must hold at least one, and floor must be positive; "
            f"got {tuple(windows)} and {floor}."
        )
    terms: list[Tensor] = []
    for window in windows:
        hop = max(window // 4, 1)
        original = magnitude_spectrogram(x, window, hop)
        other = magnitude_spectrogram(y, window, hop)
        difference = torch.linalg.vector_norm((original - other).flatten(1), dim=1)
        size = torch.linalg.vector_norm(original.flatten(1), dim=1).clamp(min=floor)
        logs = original.clamp(min=floor).log() - other.clamp(min=floor).log()
        terms.append((difference / size).mean() + logs.abs().mean())
    return torch.stack(terms).mean()


def log_spectral_distance(x: Tensor, y: Tensor, window: int = 256, floor: float = 1e-3) -> Tensor:
    """Root-mean-square difference of the log spectra of each example, in dB: (B,).

        d = mean over frames of √( mean over bins of (20 log10 max(S(x), floor)
                                                       − 20 log10 max(S(y), floor))² )

    Arguments as `spectral_loss`. Rabiner & Juang 1993, "Fundamentals of Speech Recognition",
    section 4.5.1, of magnitudes with a floor.
    """
    logs = [
        magnitude_spectrogram(one, window, window // 4).clamp(min=floor).log10() for one in (x, y)
    ]
    decibels = 20.0 * (logs[0] - logs[1])
    frames = decibels.square().mean(dim=-1).sqrt()
    return frames.flatten(1).mean(dim=1)
