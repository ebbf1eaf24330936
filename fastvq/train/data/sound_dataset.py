"""`SoundDataset`: every sound of a source at one rate and in one length.

Reading and resampling WAV files is in sounds.py; what data sets have in common is in items.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fastvq.train.data.items import ItemDataset, random_words
from fastvq.train.data.sounds import SoundFiles
from fastvq.train.data.source import Array, Source


class SoundBatch(TypedDict):
    """B clips: sound (B, 1, T) float32; label, index and broken as `Batch`."""

    sound: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    broken: list[tuple[str, str]]


class SoundDataset(ItemDataset):
    """Clips of one length (1, T), one of each sound of a source.

    Of a sound longer than T a window of T samples is taken; a shorter one is set among zeros. The
    clip begins with the sound's first sample, unless `moving`: then the window, or the place among
    the zeros, is drawn evenly among all that fit, by (seed, epoch, index) alone.

    Args:
        source: from `open_source`; it must hold sounds.
        rate: samples per second, to which every sound is resampled; None: the first one's.
        seconds: T / rate, T rounded to the nearest.
        peak: each sound is scaled so that its largest absolute value is this (silence stays as it
            is); None: sounds are left at their loudness.
        moving: see above.
        seed: for `moving`; 0 or more.
        strict: refuse a sound that cannot be decoded, instead of skipping it.
    Attributes:
        rate: samples per second.
    Raises:
        ValueError: an argument breaks its rule, or the source holds pictures.
    """

    noun = "sound"
    decodes = True
    shape: tuple[int, int]

    def __init__(
        self,
        source: Source,
        *,
        rate: int | None = None,
        seconds: float = 1.0,
        peak: float | None = None,
        moving: bool = False,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(source.require("sounds"), seed, strict)
        self.rate = cast(SoundFiles, source).rate if rate is None else rate
        if self.rate < 1:
            raise ValueError(f"SoundDataset: rate must be 1 or more; got {rate}.")
        if not seconds * self.rate >= 0.5:
            raise ValueError(
                f"SoundDataset: seconds must be at least one sample of 1/{self.rate} s; "
                f"got {seconds}."
            )
        if peak is not None and not peak > 0.0:
            raise ValueError(f"SoundDataset: peak must be positive; got {peak}.")
        self.peak, self.moving = peak, moving
        self.shape = (1, round(seconds * self.rate))

    def without_augmentation(self) -> SoundDataset:
        """The same dataset, every clip beginning with its sound."""
        still = copy.copy(self)
        still.moving = False
        return still

    def whole(self, position: int, broken: list[tuple[str, str]]) -> Array | None:
        """(1, T) float32, the whole sound at a position, resampled and scaled; T its own.

        None, and (name, reason) added to `broken`, where it cannot be decoded.

        Raises:
            ValueError: it cannot be decoded, under `strict`.
        """
        return self._read(int(self.indices[position]), broken)

    def read_batch(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        *,
        epoch: int = 0,
        drop_broken: bool = False,
    ) -> SoundBatch:
        broken: list[tuple[str, str]] = []
        indices: list[int] = []
        clips = np.zeros((len(positions), *self.shape), np.float32)
        for index, sound in self._readable(positions, broken, drop_broken):
            self._place(clips[len(indices)], sound, epoch, index)
            indices.append(index)
        found = np.array(indices, np.int64)
        return SoundBatch(
            sound=torch.from_numpy(clips[: len(indices)]),
            label=self._labels_of(found),
            index=torch.from_numpy(found),
            broken=broken,
        )

    def _place(self, clip: Array, sound: Array, epoch: int, index: int) -> None:
        """A window of the sound into the clip of zeros, or the whole sound among them."""
        spare = abs(sound.shape[1] - clip.shape[1])
        start = 0
        if self.moving:
            words = random_words(self.seed, epoch, np.array([index], np.int64))
            start = int(words[0] % np.uint64(spare + 1))
        if sound.shape[1] >= clip.shape[1]:
            clip[:] = sound[:, start : start + clip.shape[1]]
        else:
            clip[:, start : start + sound.shape[1]] = sound

    def _decode(self, index: int) -> Array:
        sound = cast(SoundFiles, self.source).read_at(index, self.rate)
        loudest = float(np.abs(sound).max())
        if self.peak is not None and loudest > 0.0:
            sound = sound * np.float32(self.peak / loudest)
        return sound
