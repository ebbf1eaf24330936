"""Dividing a tile in registers; no kernel lives here."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(tile):
    """Left and right halves of a tile's columns; where a thread holds both, no data moves."""
    rows: tl.constexpr = tile.shape[0]
    width: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, width // 2)), (0, 2, 1)))
