"""What every form of data offers once it is open: `Source`, and the error of one broken item.

How a path is recognised is in opening.py; the forms themselves are in pictures.py, sounds.py and
arrays.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class BrokenItem(Exception):
    """One item that cannot be decoded. `name` says which, `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


class Source(ABC):
    """Items in a fixed order, read one at a time by their index.

    A source can be pickled, and read from in forked and spawned processes.

    Attributes:
        kind: "pictures" or "sounds".
        path: where the data lies.
        split: the part that was opened ("train", "val" or "test"), None where there are no parts.
        dtype: of the arrays that `read` returns, uint8 or float32.
        labels: (N,) int64, the class of each item; None where the data has no classes.
        class_names: the name of each class, in the order of its label; None where they have none.
    """

    kind: str
    path: Path
    split: str | None = None
    dtype: np.dtype[Any]
    labels: NDArray[np.int64] | None = None
    class_names: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of items N."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an item in a message."""

    @abstractmethod
    def read(self, index: int, *, at_least: int | None = None) -> Array:
        """One item.

        Args:
            index: 0 ... N − 1.
            at_least: a picture larger than this many pixels on both sides may be decoded smaller,
                as long as neither side falls below it. None: full size.
        Returns:
            A picture: (H, W, C), C = 1 or 3, uint8, or float32 in 0…1. A sound: (1, T) float32 in
            −1…1.
        Raises:
            BrokenItem: the item cannot be decoded.
        """

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where the data has none."""
        if self.class_names is not None:
            return len(self.class_names)
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def require(self, kind: str) -> Source:
        """This source, where it is of that kind ("pictures" or "sounds").

        Raises:
            ValueError: it is of another kind.
        """
        if self.kind != kind:
            raise ValueError(f"data '{self.path}': {kind} are needed here; it holds {self.kind}.")
        return self

    def __str__(self) -> str:
        classes = f", {self.num_classes} classes" if self.num_classes else ", no classes"
        split = f", {self.split} part" if self.split else ""
        return f"{len(self)} {self.kind} in '{self.path}'{split}{classes}"
