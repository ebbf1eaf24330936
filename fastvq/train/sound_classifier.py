"""The classifier that judges reconstructed and sampled sounds: a small convolutional network on
log-mel spectrograms.

It is trained on real sounds alone. That of the demo's pictures is in `digit_classifier`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.spectral_loss import magnitude_spectrogram
from fastvq.train.data import SoundDataset, open_source
from fastvq.train.data.sounds import SoundFiles

_BANDS = 32
_HOP_SECONDS = 0.010
_WINDOW_SECONDS = 0.032
_FLOOR = 1e-4
_BATCH = 32


def mel_filters(bins: int, rate: int, bands: int = _BANDS) -> Tensor:
    """(bins, bands): triangles that are even in mel = 2595 log10(1 + hertz / 700), 0 to rate/2.

    Each triangle rises from the centre of the band below it and falls to that of the band above;
    one that is narrower than the distance of two bins keeps the nearest bin.
    O'Shaughnessy 1987, "Speech Communication", p. 150, for the scale.
    """
    hertz = torch.linspace(0.0, rate / 2, bins)
    mels = 2595.0 * torch.log10(1.0 + hertz / 700.0)
    centres = torch.linspace(0.0, float(mels[-1]), bands + 2)
    width = centres[1] - centres[0]
    filters = (1.0 - (mels[:, None] - centres[None, 1:-1]).abs() / width).clamp(min=0.0)
    nearest = (mels[:, None] - centres[None, 1:-1]).abs().argmin(dim=0)
    filters[nearest, torch.arange(bands)] = filters[nearest, torch.arange(bands)].clamp(min=0.5)
    return filters


def log_mel(sounds: Tensor, rate: int) -> Tensor:
    """ln of the mel bands of sounds (B, 1, T): (B, 1, bands, frames), each with mean 0 and
    variance 1 over its own elements, so that loudness does not count."""
    window = 2 * max(1, round(_WINDOW_SECONDS * rate / 2))
    magnitudes = magnitude_spectrogram(sounds[:, 0], window, max(1, round(_HOP_SECONDS * rate)))
    peak = magnitudes.amax(dim=(1, 2), keepdim=True).clamp(min=1e-10)
    bands = (magnitudes / peak) @ mel_filters(magnitudes.shape[-1], rate)
    logs = bands.clamp(min=_FLOOR).log().transpose(1, 2)[:, None]
    mean = logs.mean(dim=(2, 3), keepdim=True)
    return (logs - mean) / logs.std(dim=(2, 3), keepdim=True).clamp(min=1e-3)


class SoundClassifier:
    """Reads which class a sound is of.

    Three 3×3 convolutions (16, 32, 64 channels, batch normalisation, ReLU, pooling by 2), the mean
    over time and the last convolution's bands, and a linear layer; trained by Adam on the
    cross-entropy, with the clips shifted in time, noise added, and bands and moments hidden at
    random.

    Args:
        sounds: (N, 1, T) float32, real ones.
        labels: (N,) int64.
        rate: samples per second.
        epochs: passes over the sounds.
        seed: of the weights, the order and the augmentation.
    """

    def __init__(
        self, sounds: Tensor, labels: Tensor, rate: int, *, epochs: int = 60, seed: int = 0
    ) -> None:
        self.rate = rate
        classes = int(labels.max()) + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = _network(classes)
            self._train(sounds, labels, epochs)
        self._network.eval()

    def _train(self, sounds: Tensor, labels: Tensor, epochs: int) -> None:
        optimizer = torch.optim.Adam(self._network.parameters(), lr=2e-3, weight_decay=1e-4)
        steps = epochs * math.ceil(len(sounds) / _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        self._network.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(sounds)).split(_BATCH):
                logits = self._network(_augmented(sounds[rows], self.rate))
                loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    @torch.no_grad()
    def read(self, sounds: Tensor) -> Tensor:
        """The class of each sound (B, 1, T): (B,) int64. T may differ from the training's."""
        parts = [self._network(log_mel(part, self.rate)) for part in sounds.split(_BATCH)]
        return torch.cat(parts).argmax(dim=1)

    def accuracy(self, sounds: Tensor, labels: Tensor) -> float:
        """Share of the sounds that are read as their label, in 0…1."""
        return float((self.read(sounds) == labels).double().mean())


class Reading(NamedTuple):
    """How well one set of sounds was read."""

    name: str
    sounds: int
    accuracy: float  # in 0…1


class Judgement(NamedTuple):
    """What `judge_sounds` found."""

    trained_on: int
    read: list[Reading]  # the sounds held out first, where there are some


def judge_sounds(
    data: str | os.PathLike[str],
    read: Sequence[str | os.PathLike[str]],
    *,
    class_pattern: str | None = None,
    hold_out: str | None = None,
    seconds: float = 1.0,
    epochs: int = 60,
    seed: int = 0,
) -> Judgement:
    """Train a `SoundClassifier` on real sounds, and let it read others.

    Args:
        data: sounds with classes, see `open_source`.
        read: more sounds with classes; their names are those of `data`.
        class_pattern: as `open_source`, for all of them.
        hold_out: a regular expression: the files of `data` in whose name it is found are read.
        seconds: heard of each sound, from its start.
        epochs, seed: of the training.
    Raises:
        ValueError: data is refused, or has no classes or other ones.
    """
    real = SoundDataset(open_source(data, class_pattern=class_pattern), seconds=seconds)
    names = _class_names(real, data)
    held = [
        hold_out is not None
        and re.search(hold_out, cast(SoundFiles, real.source).file_name(index)) is not None
        for index in range(len(real))
    ]
    training = [row for row, out in enumerate(held) if not out]
    if not training:
        raise ValueError(f"classify: hold_out {hold_out!r} leaves no sound of '{data}' to learn.")
    batch = real.read_batch(training, drop_broken=True)
    classifier = SoundClassifier(
        batch["sound"], batch["label"], real.rate, epochs=epochs, seed=seed
    )
    readings = []
    if any(held):
        rest = real.subset([row for row, out in enumerate(held) if out])
        readings.append(_reading(classifier, rest, f"'{data}', held out", names))
    for path in read:
        source = open_source(path, class_pattern=class_pattern)
        others = SoundDataset(source, rate=real.rate, seconds=seconds)
        readings.append(_reading(classifier, others, f"'{path}'", names))
    return Judgement(len(batch["label"]), readings)


def _class_names(dataset: SoundDataset, path: str | os.PathLike[str]) -> list[str]:
    if dataset.class_names is None:
        raise ValueError(
            f"classify: '{path}' must have classes: one folder each, or --class-pattern "
            "(class_pattern)."
        )
    return dataset.class_names


def _reading(
    classifier: SoundClassifier, dataset: SoundDataset, name: str, names: list[str]
) -> Reading:
    own = _class_names(dataset, dataset.source.path)
    unknown = [one for one in own if one not in names]
    if unknown:
        raise ValueError(
            f"classify: the classes of {name} must be among {', '.join(names)}; got {unknown[0]}."
        )
    batch = dataset.read_batch(range(len(dataset)), drop_broken=True)
    labels = torch.tensor([names.index(one) for one in own])[batch["label"]]
    return Reading(name, len(labels), classifier.accuracy(batch["sound"], labels))


def _network(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    layers += [nn.AdaptiveAvgPool2d((4, 3)), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(64 * 12, classes))


def _augmented(sounds: Tensor, rate: int) -> Tensor:
    """Log-mel spectrograms of shifted sounds with noise, parts of them hidden."""
    shift = int(torch.randint(0, max(1, sounds.shape[-1] // 8), ()))
    noise = 10.0 ** (-1.5 - 2.0 * torch.rand(len(sounds), 1, 1))
    loudest = sounds.abs().amax(dim=2, keepdim=True)
    shifted = F.pad(sounds, (shift, 0))[..., : sounds.shape[-1]]
    mels = log_mel(shifted + noise * loudest * torch.randn_like(sounds), rate)
    bands, frames = mels.shape[2:]
    for size, axis in ((bands // 6, 2), (frames // 8, 3)):
        start = int(torch.randint(0, mels.shape[axis] - size + 1, ()))
        mels.narrow(axis, start, size).zero_()
    return mels
