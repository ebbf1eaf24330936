"""Sounds for people: spectrogram pictures, and WAV files.

The drawing of grids is in `pictures`, the transform in `fastvq.nn.spectral_loss`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvq.nn.spectral_loss import magnitude_spectrogram
from fastvq.train.data.sounds import encode_wav
from fastvq.train.pictures import level_names, reconstructions, save_grid

_WINDOW_SECONDS = 0.032
_WIDTH = 160  # frames of a spectrogram, about
_DECIBELS = 70.0  # from white down to black
# From soft to loud; evenly spaced, with straight lines between.
_COLOURS = (
    (0.0, 0.0, 0.05),
    (0.35, 0.05, 0.45),
    (0.85, 0.25, 0.3),
    (1.0, 0.7, 0.2),
    (1.0, 1.0, 0.9),
)


def spectrogram_pictures(sounds: Tensor, rate: int) -> Tensor:
    """Log-magnitude spectrograms of sounds (B, 1, T): (B, 3, H, W) in 0…1.

    Time runs to the right, frequency upwards from 0 to rate/2. Colours from dark to light show the
    70 dB below the loudest point of all sounds together.
    """
    window = 2 * round(_WINDOW_SECONDS * rate / 2)
    hop = max(1, sounds.shape[-1] // _WIDTH)
    magnitudes = magnitude_spectrogram(sounds.detach().float().cpu()[:, 0], max(window, 2), hop)
    decibels = 20.0 * magnitudes.clamp(min=1e-10).log10()
    loudness = (1.0 + (decibels - decibels.max()) / _DECIBELS).clamp(0.0, 1.0)
    return _coloured(loudness.transpose(1, 2).flip(1))


def _coloured(values: Tensor) -> Tensor:
    """(B, H, W) in 0…1 → (B, 3, H, W)."""
    anchors = torch.tensor(_COLOURS)
    place = values * (len(anchors) - 1)
    below = place.floor().long().clamp(max=len(anchors) - 2)
    share = (place - below)[..., None]
    colours = anchors[below] * (1.0 - share) + anchors[below + 1] * share
    return colours.permute(0, 3, 1, 2)


def save_spectrograms(
    sounds: Tensor,
    rate: int,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    columns: int | None = None,
) -> Path:
    """Write the spectrograms of sounds (B, 1, T) as one PNG; labels and columns as `save_grid`."""
    return save_grid(
        spectrogram_pictures(sounds, rate),
        path,
        labels=labels,
        column_labels=column_labels,
        columns=columns,
        scale=1,
    )


def save_sound_reconstructions(
    model: nn.Module, sounds: Tensor, rate: int, path: str | os.PathLike[str]
) -> Path:
    """Write the spectrograms of what a model reconstructs beside the originals', a row per sound.

    Columns as `save_reconstructions`: "original", then what the top levels hold.

    Args:
        model: a `VQVAE` or `VQVAE2` of sounds, in eval mode.
        sounds: (B, 1, T) float, on the model's device.
    """
    decoded = [one[..., : sounds.shape[-1]] for one in reconstructions(model, sounds)]
    names = level_names(len(decoded)) if len(decoded) > 1 else ["reconstruction"]
    return save_spectrograms(
        torch.stack([sounds, *decoded], dim=1).flatten(0, 1),
        rate,
        path,
        column_labels=["original", *names],
        columns=len(decoded) + 1,
    )


def save_sounds(
    sounds: Sequence[Tensor], rate: int, folder: str | os.PathLike[str], names: Sequence[str]
) -> Path:
    """Write each sound (1, T) as a 16-bit WAV file of its name into a folder, made if missing."""
    target = Path(folder)
    for sound, name in zip(sounds, names):
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_wav(sound.detach().float().cpu().numpy(), rate))
    return target
