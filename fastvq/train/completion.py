"""Completing a real picture: the codes of a part of it are kept, a prior draws the others.

What is kept is a half of every level's code map. Codes at its edge were encoded with a view of the
pixels beyond it, as far as the encoder's receptive field reaches.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.train.data import to_float
from fastvq.train.data.pictures import decode_picture, fit_picture, with_channels
from fastvq.train.run_folder import Run, load_run

HALVES = ("top-half", "bottom-half", "left-half", "right-half")
_GREY = 0.5


class KnownPart(NamedTuple):
    """A picture of which a half is known."""

    given: list[Tensor]  # per level (h, w) int64, −1 where to be drawn
    shown: Tensor  # (C, H, W) in 0…1: the picture, grey where codes are to be drawn


@torch.no_grad()
def known_part(run: Run, model: Any, path: str | os.PathLike[str], keep: str) -> KnownPart:
    """The codes of a half of a picture.

    Args:
        run: of a prior.
        model: the model that its codes are of.
        path: of a picture file; brought to the size and channels the model was trained on.
        keep: one of `HALVES`.
    Raises:
        ValueError: no such half, or the file cannot be read as a picture.
    """
    if keep not in HALVES:
        raise ValueError(f"sample: keep must be one of {', '.join(HALVES)}; got {keep!r}.")
    assert run.stage1 is not None
    channels, height, width = load_run(run.stage1).resolved["picture_shape"]
    pixels = with_channels(fit_picture(_read(Path(path)), height, width), channels)
    picture = to_float(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    codes = model.encode(picture.to(next(model.parameters()).device))
    given = [torch.where(_kept(keep, level[0].shape), level[0].cpu(), -1) for level in codes]
    return KnownPart(given, torch.where(_kept(keep, (height, width)), picture[0], _GREY))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"sample: the picture to complete must be a file; '{path}' is none.")
    try:
        return decode_picture(path.read_bytes())
    except Exception as error:  # decoders raise nearly every type on damaged input
        raise ValueError(f"sample: '{path}' cannot be read as a picture: {error}.") from None


def _kept(keep: str, shape: tuple[int, ...]) -> Tensor:
    """(H, W) bool: the half's rows or columns; of an odd number the larger half."""
    height, width = shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    known = {
        "top-half": rows < (height + 1) // 2,
        "bottom-half": rows >= height // 2,
        "left-half": columns < (width + 1) // 2,
        "right-half": columns >= width // 2,
    }[keep]
    return known.expand(height, width)
