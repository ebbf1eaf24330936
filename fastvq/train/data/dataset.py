"""`PictureDataset`: every picture of a source in one shape, and its division for validation.

The order in which pictures are visited, worker processes and the report of broken pictures are in
loading.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastvq.train.data.arrays import ArraySource
from fastvq.train.data.items import ItemDataset, random_words
from fastvq.train.data.pictures import fit_picture, with_channels
from fastvq.train.data.source import Array, Source

Items = TypeVar("Items", bound=ItemDataset)


class Batch(TypedDict):
    """B pictures; `PictureDataset.__getitem__` leaves the first axis out.

    picture: (B, C, H, W) uint8, or float32 in 0…1 where the source is float; see `to_float`.
    label: (B,) int64, −1 where the source has no classes.
    index: (B,) int64, each picture's index in the source.
    broken: (name, reason) of each picture that was met and could not be decoded.
    """

    picture: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    broken: list[tuple[str, str]]


class PictureDataset(ItemDataset):
    """Pictures of one shape (C, H, W), read from a source by position.

    Args:
        source: from `open_source`; it must hold pictures.
        image_size: pixels, an int for squares or (H, W): each picture is resized until it just
            covers that size, and its centre cropped. None: every picture must have the size of the
            first one.
        channels: 1 (grey) or 3 (RGB). None: those of the first picture.
        flip: mirror pictures left to right at random, each with probability 1/2, decided by
            (seed, epoch, index) alone.
        seed: for `flip`; 0 or more.
        strict: refuse a picture that cannot be decoded, instead of skipping it.
    Attributes:
        shape: (C, H, W) of every picture.
        indices: (len,) int64, which pictures of the source, in order.
        decodes: whether reading takes decoding or resizing, which worker processes speed up.
    Raises:
        ValueError: an argument breaks its rule, the source holds sounds, or none of its pictures
            (with `strict`, not the first one) can be decoded.
    """

    noun = "picture"
    shape: tuple[int, int, int]

    def __init__(
        self,
        source: Source,
        *,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        flip: bool = False,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(source.require("pictures"), seed, strict)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(
                f"PictureDataset: image_size must be a positive int or (H, W); got {image_size}."
            )
        if channels not in (None, 1, 3):
            raise ValueError(f"PictureDataset: channels must be 1 or 3; got {channels}.")
        self.flip = flip
        self._resizes = size is not None
        # Decoded at twice the final size or more, a JPEG loses nothing that the resize would keep.
        self._at_least = None if size is None else 2 * max(size)
        _, first = self._read_readable(0, [])
        height, width = size or first.shape[:2]
        self.shape = (channels or first.shape[2], height, width)
        self.decodes = not isinstance(source, ArraySource) or first.shape[:2] != (height, width)

    def without_augmentation(self) -> PictureDataset:
        """The same dataset, no picture flipped."""
        plain = copy.copy(self)
        plain.flip = False
        return plain

    def __getitem__(self, position: int) -> Batch:
        """One picture, (C, H, W), as in epoch 0."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} is outside a dataset of {len(self)} pictures")
        batch = self.read_batch([position % len(self)])
        return Batch(
            picture=batch["picture"][0],
            label=batch["label"][0],
            index=batch["index"][0],
            broken=batch["broken"],
        )

    def read_batch(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        *,
        epoch: int = 0,
        drop_broken: bool = False,
    ) -> Batch:
        """The pictures at `positions`.

        Args:
            positions: 0 ... len − 1, B of them.
            epoch: decides, with the seed, which pictures are flipped.
            drop_broken: leave a picture that cannot be decoded out, so that fewer than B come back.
                Otherwise the next readable picture takes its place.
        Raises:
            ValueError: a picture has another size than the first one and there is no `image_size`;
                one cannot be decoded under `strict`; or none can.
        """
        broken: list[tuple[str, str]] = []
        if isinstance(self.source, ArraySource) and not self.decodes:
            indices = self.indices[np.asarray(positions, np.int64)]
            stacked = with_channels(self.source.gather(indices), self.shape[0])
        else:
            indices, stacked = self._decoded(positions, broken, drop_broken)
        if self.flip:
            flipped = _coin(self.seed, epoch, indices)
            stacked[flipped] = stacked[flipped, :, ::-1]
        return Batch(
            picture=torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))),
            label=self._labels_of(indices),
            index=torch.from_numpy(indices),
            broken=broken,
        )

    def _decode(self, index: int) -> Array:
        return self.source.read(index, at_least=self._at_least)

    def _decoded(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        broken: list[tuple[str, str]],
        drop_broken: bool,
    ) -> tuple[NDArray[np.int64], Array]:
        """(indices (B,), pictures (B, H, W, C)), one picture after the other."""
        channels, height, width = self.shape
        indices: list[int] = []
        pictures = np.empty((len(positions), height, width, channels), self.source.dtype)
        for index, picture in self._readable(positions, broken, drop_broken):
            pictures[len(indices)] = self._to_shape(index, picture)
            indices.append(index)
        return np.array(indices, np.int64), pictures[: len(indices)]

    def _to_shape(self, index: int, picture: Array) -> Array:
        channels, height, width = self.shape
        if self._resizes:
            picture = fit_picture(picture, height, width)
        elif picture.shape[:2] != (height, width):
            raise ValueError(
                f"picture {self.source.name(index)}: it is {picture.shape[0]}×{picture.shape[1]} "
                f"(height×width); the first is {height}×{width}. "
                "Set a common size with --image-size (image_size)."
            )
        return with_channels(picture, channels)


def examples(batch: Any, device: str | torch.device = "cpu") -> torch.Tensor:
    """What a model takes of a batch, on `device`: pictures 0…1 as `to_float`, sounds −1…1, or
    lines of text as int64 symbols."""
    if "text" in batch:
        text: torch.Tensor = batch["text"].to(device)
        return text
    item = batch["picture"] if "picture" in batch else batch["sound"]
    return to_float(item.to(device, non_blocking=True))


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    """A batch's pictures as float32 in 0…1: uint8 is divided by 255, float is kept.

    To be called on the training device: a quarter of the bytes travels there.
    """
    if pictures.dtype == torch.uint8:
        return pictures.float().div_(255)
    return pictures.float()


def split_validation(dataset: Items, fraction: float, seed: int = 0) -> tuple[Items, Items]:
    """Divides a dataset at random into (training, validation), each in the dataset's order.

    Args:
        dataset: at least 2 items.
        fraction: of the items that go to validation, between 0 and 1, at least one item.
        seed: 0 or more; the same seed gives the same division.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"split_validation: fraction must lie between 0 and 1; got {fraction}.")
    if seed < 0:
        raise ValueError(f"split_validation: seed must be 0 or more; got {seed}.")
    if len(dataset) < 2:
        raise ValueError(
            f"split_validation: dataset must hold at least 2 {dataset.noun}s; got {len(dataset)}."
        )
    held_out = min(max(round(fraction * len(dataset)), 1), len(dataset) - 1)
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.subset(np.sort(order[held_out:])), dataset.subset(np.sort(order[:held_out]))


def _coin(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """One fair bit for each index: the top bit of its random word."""
    return (random_words(seed, epoch, indices) >> np.uint64(63)).astype(bool)
