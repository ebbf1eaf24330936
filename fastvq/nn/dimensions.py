"""Sequences or pictures: the convolutions of one and of two spatial dimensions.

A part that works for both takes `dimensions` and reads its layers' classes here.
"""

from __future__ import annotations

from torch import nn

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED: dict[int, type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
}


def check_dimensions(module: str, dimensions: int) -> None:
    """Refuse a number of spatial dimensions other than 1 and 2."""
    if dimensions not in CONVOLUTIONS:
        raise ValueError(
            f"{module}: dimensions must be 1 (sequences) or 2 (pictures); got {dimensions!r}."
        )
