"""Where dead codes restart: random counted rows of the batch, the same on every process.

Lives here: the draw, without waiting for the device. Which codes are dead is `codebook.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import world_size


def draw_rows(x: Tensor, counted: Tensor, dead: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """A counted row for each dead code.

    The j-th of M dead codes takes a uniform draw from the j-th of M equal slices of the counted
    rows of all processes, so that two codes rarely restart at the same row. The draw comes from
    the global CPU generator (process 0's), whatever the device. Where there are fewer rows than
    dead codes, the codes left over stay as they are.

    Args:
        x: (h, N, D).
        counted: (h, N) bool, rows that may be taken.
        dead: (h, K) bool.
        shared: over all processes.
    Returns:
        Which codes restart (h, K) bool, and their rows (h, K, D) float32, zeros elsewhere.
    """
    position = counted.long().cumsum(dim=1)  # how many counted rows up to this one
    local = position[:, -1:] if position.shape[1] else position.new_zeros(len(position), 1)
    uniform = torch.rand(dead.shape, dtype=torch.float64).to(x.device, non_blocking=True)
    uniform, first, total = _agreed(uniform, local, shared)
    slot = dead.long().cumsum(dim=1) - 1
    dead = dead & (slot < total)
    slots = dead.long().sum(dim=1, keepdim=True).clamp(min=1)
    drawn = ((slot + uniform) / slots * total).long().clamp(min=0)
    drawn = torch.minimum(drawn, (total - 1).clamp(min=0)) - first
    here = dead & (drawn >= 0) & (drawn < local)
    rows = x.new_zeros((*dead.shape, x.shape[-1]), dtype=torch.float32)
    if x.shape[1]:
        taken = torch.searchsorted(position, drawn + 1).clamp(max=x.shape[1] - 1)
        found = x.float().gather(1, taken[..., None].expand(-1, -1, x.shape[-1]))
        rows = torch.where(here[..., None], found, rows)
    if world_size(shared) > 1:
        dist.all_reduce(rows)  # one process holds the row, the others add zeros: exact
    return dead, rows


def _agreed(uniform: Tensor, local: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Process 0's draws (h, K), and how many counted rows lie before this process's and in all."""
    world = world_size(shared)
    if world == 1:
        return uniform, torch.zeros_like(local), local
    rank, num_codes = dist.get_rank(), uniform.shape[1]
    fused = uniform.new_zeros(len(uniform), num_codes + world)
    if rank == 0:
        fused[:, :num_codes] = uniform
    fused[:, num_codes + rank] = local[:, 0].double()
    dist.all_reduce(fused)
    rows = fused[:, num_codes:].long()
    first, total = rows[:, :rank].sum(dim=1, keepdim=True), rows.sum(dim=1, keepdim=True)
    return fused[:, :num_codes], first, total
