"""Layouts of quantizer inputs: sequences, channel first, pictures, videos, and heads.

Lives here: how x becomes rows of vectors, rows become heads, and results x's shape again. No
parameters: projections are the module's that owns a layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VectorLayout:
    """Where the vectors of x are.

    Args:
        dim: channels of x.
        heads: vectors that each of them is split into.
        separate: each head has a codebook of its own.
        channel_last: x is (B, N, dim), else (B, dim, N); (B, dim) either way.
        spatial: 2 or 3 for x (B, dim, H, W) or (B, dim, T, H, W); 0 for neither.
    """

    dim: int
    heads: int = 1
    separate: bool = False
    channel_last: bool = True
    spatial: int = 0

    @property
    def channels_last(self) -> bool:
        return self.channel_last and not self.spatial

    @property
    def heads_in_rows(self) -> int:
        """How many rows of the one codebook a vector becomes."""
        return 1 if self.separate else self.heads

    def rows(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """x as (rows, dim), and its shape without channels."""
        dims = 2 + self.spatial if self.spatial else 3
        channels = x.dim() - 1 if self.channels_last or x.dim() == 2 else 1
        if x.dim() not in ((dims,) if self.spatial else (2, 3)) or x.shape[channels] != self.dim:
            raise ValueError(
                f"VectorQuantize: x must have {dims} dimensions with {self.dim} channels in "
                f"dimension {-1 if self.channels_last else 1}; got {tuple(x.shape)}."
            )
        moved = x if channels == x.dim() - 1 else x.movedim(channels, -1)
        return moved.reshape(-1, self.dim), moved.shape[:-1]

    def restored(self, rows: Tensor, shape: torch.Size, topk: int | None) -> Tensor:
        """(rows, dim) as x was; the best few of a vector come last, or before last channels."""
        few = () if topk is None else (topk,)
        output = rows.reshape(*shape, *few, self.dim)
        return output if self.channels_last or len(shape) == 1 else output.movedim(-1, 1)

    def row_mask(
        self, mask: Tensor | None, lens: Tensor | None, shape: torch.Size, device: torch.device
    ) -> Tensor | None:
        """The mask as (rows,)."""
        if lens is not None:
            if mask is not None:
                raise ValueError("VectorQuantize.forward: mask excludes lens; give one of them.")
            mask = torch.arange(shape[-1], device=device) < lens[:, None]
        if mask is None:
            return None
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"VectorQuantize.forward: mask must be bool {tuple(shape)} to match x; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        return mask.reshape(-1)

    def split(self, z: Tensor) -> Tensor:
        """(rows, heads·D) → (1, rows·heads, D), or (heads, rows, D) for separate codebooks."""
        if self.heads == 1:
            return z.unsqueeze(0)
        split = z.unflatten(-1, (self.heads, -1))
        return split.transpose(0, 1) if self.separate else split.flatten(0, 1)[None]

    def join(self, q: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.heads == 1:
            return q.squeeze(0)
        if self.separate:
            return q.transpose(0, 1).flatten(-2)
        return q[0].unflatten(0, (-1, self.heads)).flatten(-2)

    def by_position(
        self, z: Tensor, mask: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, Tensor | None]:
        """Split rows as (h, B·heads of one codebook, positions, D), their mask without h and D."""
        sizes = (shape[0], shape[1:].numel(), self.heads_in_rows)
        placed = z.unflatten(1, sizes).transpose(2, 3).flatten(1, 2)
        if mask is None:
            return placed, None
        return placed, mask.reshape(sizes).transpose(1, 2).flatten(0, 1)

    def index_map(self, indices: Tensor, shape: torch.Size, topk: int | None) -> Tensor:
        """(h, N) indices in x's shape, with a last dimension of heads or of the best few."""
        if self.separate and self.heads > 1:
            indices = indices.transpose(0, 1)
        few = self.heads if topk is None else topk
        return indices.reshape(*shape, *(() if self.heads == 1 and topk is None else (few,)))

    def head_indices(self, indices: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
        """The inverse of `index_map` without topk; −1 where masked."""
        expected = (*shape, self.heads) if self.heads > 1 else tuple(shape)
        if tuple(indices.shape) != expected:
            raise ValueError(
                f"VectorQuantize: indices must be {expected} to match x; "
                f"got {tuple(indices.shape)}."
            )
        if self.separate and self.heads > 1:
            found = indices.reshape(-1, self.heads).transpose(0, 1)
        else:
            found = indices.reshape(1, -1)
        return found if mask is None else torch.where(mask, found, -1)
