"""The processes that keep one codebook together.

Lives here: how many there are, and sums over them. What is summed, and when, is the codebook's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(shared: bool = True) -> int:
    """Number of processes, asked anew at every call: the group may start after the module."""
    if not (shared and dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def summed(counts: Tensor, sums: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Counts (h, K) and sums (h, K, D) over all processes, in one collective."""
    if world_size(shared) == 1:
        return counts, sums
    fused = torch.cat([counts[..., None], sums], dim=-1)
    dist.all_reduce(fused)
    return fused[..., 0].contiguous(), fused[..., 1:].contiguous()
