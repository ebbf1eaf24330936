"""Remapping of indices to the codes in use, an option of taming's and diffusers' quantizers."""

from __future__ import annotations

import torch
from torch import Tensor


def remap_to_used(
    indices: Tensor, used: Tensor, remapped_size: int, unknown_index: int | str
) -> Tensor:
    """Position of each index in `used`.

    Args:
        indices: (B, ...) int64.
        used: (R,) the codes in use.
        remapped_size: how many remapped indices there are: R, or R + 1 with an extra one.
        unknown_index: what an index that is not in `used` becomes; "random" draws from
            0 … remapped_size − 1 with the global CPU generator.
    Returns:
        As `indices`, in 0 … remapped_size − 1.
    """
    values, order = used.to(indices).sort(stable=True)
    position = torch.searchsorted(values, indices.contiguous()).clamp(max=len(values) - 1)
    unknown = values[position] != indices
    remapped = order[position]
    if unknown_index == "random":
        count = int(unknown.sum())
        remapped[unknown] = torch.randint(0, remapped_size, (count,)).to(remapped.device)
    else:
        remapped[unknown] = int(unknown_index)
    return remapped


def unmap_to_all(indices: Tensor, used: Tensor, remapped_size: int) -> Tensor:
    """The inverse of `remap_to_used`; the extra index, where there is one, becomes used[0]."""
    used = used.to(indices)
    if remapped_size > len(used):
        indices = torch.where(indices >= len(used), 0, indices)
    return used[indices]
