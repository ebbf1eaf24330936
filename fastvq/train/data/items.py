"""`ItemDataset`: what data sets of pictures and of sounds have in common.

Which items there are and in what order, reading them with the broken ones left out or replaced,
and random numbers that depend on (seed, epoch, item) alone. What shape items are brought to is in
dataset.py and sound_dataset.py.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastvq.train.data.source import Array, BrokenItem, Source

Own = TypeVar("Own", bound="ItemDataset")


class ItemDataset(ABC):
    """Items of one shape, read from a source by position.

    Attributes:
        noun: "picture" or "sound", for messages; the key of a batch's items too.
        shape: of every item: (C, H, W) or (C, T).
        indices: (len,) int64, which items of the source, in order.
        decodes: whether reading takes decoding or resizing, which worker processes speed up.
    """

    noun: str
    shape: tuple[int, ...]
    decodes: bool

    def __init__(self, source: Source, seed: int, strict: bool) -> None:
        if seed < 0:
            raise ValueError(f"{type(self).__name__}: seed must be 0 or more; got {seed}.")
        self.source, self.seed, self.strict = source, seed, strict
        self.indices = np.arange(len(source), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(len,) int64, or None where the source has no classes."""
        return None if self.source.labels is None else self.source.labels[self.indices]

    @property
    def class_names(self) -> list[str] | None:
        """The name of each class of the source; None where they have none."""
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes of the source; 0 where it has none."""
        return self.source.num_classes

    def subset(self: Own, positions: Sequence[int] | NDArray[np.int64]) -> Own:
        """The same dataset with only the items at these positions, in their order."""
        chosen = copy.copy(self)
        chosen.indices = self.indices[np.asarray(positions, np.int64)]
        return chosen

    def without_augmentation(self: Own) -> Own:
        """The same dataset, every item as it is met in evaluation, in every epoch."""
        return self

    @abstractmethod
    def read_batch(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        *,
        epoch: int = 0,
        drop_broken: bool = False,
    ) -> Any:
        """The items at `positions`, 0 … len − 1, under the key `noun`, with "label" (B,) int64,
        −1 where there are no classes, "index" (B,) int64 in the source, and "broken", (name,
        reason) of each item that was met and could not be decoded.

        Args:
            epoch: decides, with the seed, how items are augmented.
            drop_broken: leave an item that cannot be decoded out, so that fewer than B come back.
                Otherwise the next readable item takes its place.
        Raises:
            ValueError: an item has a shape that does not fit, cannot be decoded under `strict`, or
                none can.
        """

    @abstractmethod
    def _decode(self, index: int) -> Array:
        """The item `index` of the source, as it lies there.

        Raises:
            BrokenItem: it cannot be decoded.
        """

    def _readable(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        broken: list[tuple[str, str]],
        drop_broken: bool,
    ) -> Iterator[tuple[int, Array]]:
        """(index, item) at each position, as `read_batch` says of broken ones."""
        for position in positions:
            index = int(self.indices[position])
            item = self._read(index, broken)
            if item is not None:
                yield index, item
            elif not drop_broken:
                yield self._read_readable(int(position) + 1, broken)

    def _read_readable(self, position: int, broken: list[tuple[str, str]]) -> tuple[int, Array]:
        """(index, item) of the first readable item at or after a position, going round."""
        for step in range(len(self)):
            index = int(self.indices[(position + step) % len(self)])
            item = self._read(index, broken)
            if item is not None:
                return index, item
        name, reason = broken[0]
        raise ValueError(
            f"data '{self.source.path}': none of these {len(self)} {self.noun}s can be decoded; "
            f"one is {name}: {reason}."
        )

    def _read(self, index: int, broken: list[tuple[str, str]]) -> Array | None:
        """One item; None, and a line in `broken`, where it cannot be decoded."""
        try:
            return self._decode(index)
        except BrokenItem as error:
            if self.strict:
                raise ValueError(
                    f"{self.noun} {error.name}: it cannot be decoded ({error.reason}). "
                    "Remove it, or leave out --strict (strict) to skip it."
                ) from None
            broken.append((error.name, error.reason))
            return None

    def _labels_of(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """(B,) int64; −1 where the source has no classes."""
        labels = self.source.labels
        return torch.from_numpy(np.full_like(indices, -1) if labels is None else labels[indices])


def random_words(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each index: a hash of (seed, epoch, index).

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), once for
    each number, on a running state.
    """
    state = np.zeros(len(indices), np.uint64)
    for number in (np.uint64(seed), np.uint64(epoch), indices.astype(np.uint64)):
        state = (state ^ number) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state
