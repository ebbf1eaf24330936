"""Lines of a text file as sequences of bytes: `TextDataset`.

A line is its UTF-8 bytes, then one newline, which ends it; newlines fill it up to the common
length. So the 256 bytes are the whole vocabulary, no file holds an unknown symbol, and a model of
lines gives probability to where they end, too.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastvq.train.data.pictures import EXTENSIONS

NUM_SYMBOLS = 256
END = 10  # the newline
_LOOKED_AT = 1 << 16  # bytes that decide whether a file is text
_OTHER_SUFFIXES = (".zip", ".npy", ".npz", ".gz", ".wav", *EXTENSIONS)


class TextDataset:
    """The lines of a text file, empty ones left out.

    It answers to `training_batches` and `evaluation_batches` as an `ItemDataset` does; a batch
    holds "text", (B, length) int64.

    Args:
        path: a text file.
        length: symbols of a line, its end included; longer lines are left out.
        strict: refuse a line that is longer, instead of leaving it out.
    Attributes:
        shape: (1, length).
        too_long: how many lines were left out.
        num_bytes: of all lines, one newline each included.
    Raises:
        ValueError: no such file, it is no text, or no line is left.
    """

    noun = "line"
    decodes = False
    labels = None
    class_names = None
    num_classes = 0

    def __init__(self, path: str | os.PathLike[str], length: int, *, strict: bool = False) -> None:
        self.path, self.split = Path(path), None
        self.shape = (1, length)
        if length < 2:
            raise ValueError(f"text '{path}': length must be at least 2; got {length}.")
        if not is_text(path):
            raise ValueError(f"text '{path}': not a text file (it holds a zero byte, or is none).")
        lines = [line.rstrip(b"\r") for line in self.path.read_bytes().split(b"\n")]
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not numbered:
            raise ValueError(f"text '{path}': it holds no line. Name a file with text in it.")
        kept = [line for _, line in numbered if len(line) < length]
        self.too_long = len(numbered) - len(kept)
        if strict and self.too_long:
            number, line = next(one for one in numbered if len(one[1]) >= length)
            raise ValueError(
                f"text '{path}': every line must have fewer than {length} bytes; line {number} "
                f"has {len(line)}. Raise the length, or leave out --strict to skip such lines."
            )
        if not kept:
            raise ValueError(
                f"text '{path}': every one of its {len(numbered)} lines has {length} bytes or "
                "more. Raise the length."
            )
        self._bytes = np.frombuffer(b"".join(kept), np.uint8)
        self._ends = np.cumsum([len(line) for line in kept], dtype=np.int64)
        self.indices = np.arange(len(kept), dtype=np.int64)
        self.source = self  # where a data set says what it was read from

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return f"{len(self)} lines in '{self.path}'"

    def name(self, index: int) -> str:
        """What to call a line in a message."""
        return f"line {index} of those kept of '{self.path}'"

    @property
    def num_bytes(self) -> int:
        return sum(len(line) + 1 for line in self.lines())

    def lines(self) -> list[bytes]:
        """The lines themselves, without their ends."""
        starts = np.concatenate([[0], self._ends[:-1]])
        whole = self._bytes.tobytes()
        return [whole[starts[index] : self._ends[index]] for index in self.indices]

    def subset(self, positions: Sequence[int] | NDArray[np.int64]) -> TextDataset:
        """The same lines at these positions alone, in their order."""
        chosen = copy.copy(self)
        chosen.indices = self.indices[np.asarray(positions, np.int64)]
        return chosen

    def read_batch(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        *,
        epoch: int = 0,
        drop_broken: bool = False,
    ) -> dict[str, Any]:
        """ "text" (n, length) int64, "label" (n,) −1, "index" (n,), and "broken", always empty."""
        chosen = self.subset(positions)
        return {
            "text": symbols_of(chosen.lines(), self.shape[1]),
            "label": torch.full((len(chosen),), -1),
            "index": torch.from_numpy(chosen.indices),
            "broken": [],
        }


def is_text(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of a file without a zero byte at its start, and of no other known form."""
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix.lower() in _OTHER_SUFFIXES:
        return False
    with file.open("rb") as opened:
        return b"\0" not in opened.read(_LOOKED_AT)


def symbols_of(lines: Sequence[bytes], length: int) -> torch.Tensor:
    """(n, length) int64: each line, then newlines.

    Raises:
        ValueError: a line holds a newline, or is too long.
    """
    rows = np.full((len(lines), length), END, np.int64)
    for row, line in zip(rows, lines):
        if len(line) >= length or END in line:
            raise ValueError(
                f"text: a line must have fewer than {length} bytes and no newline; "
                f"got {len(line)} bytes."
            )
        row[: len(line)] = np.frombuffer(line, np.uint8)
    return torch.from_numpy(rows)


def lines_of(symbols: torch.Tensor) -> list[str]:
    """The lines of (n, length) symbols, up to the first newline of each; broken UTF-8 as �."""
    rows = symbols.to(torch.uint8).cpu().numpy()
    return [row.tobytes().split(b"\n", 1)[0].decode("utf-8", "replace") for row in rows]
