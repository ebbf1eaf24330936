"""The first codes of a codebook: k-means on the rows of its first training batch.

Lives here: gathering the rows of all processes, and clustering them. The clustering is
`kmeans.py`; what becomes of the state is `codebook.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq import ops

from .kmeans import kmeans
from .processes import world_size

# k-means sees at most this many rows per code, drawn at random.
_ROWS_PER_CODE = 32


def cluster_rows(
    x: Tensor,
    counted: Tensor,
    num_codes: int,
    *,
    iterations: int,
    metric: str,
    seed: int,
    shared: bool,
) -> tuple[Tensor, Tensor] | None:
    """Codes and how many rows each has, the same on every process.

    Args:
        x: (h, N, D); one codebook for each h.
        counted: (h, N) bool.
    Returns:
        codes (h, K, D) and counts (h, K) float32, scaled up to all rows where a part was
        clustered; None while a codebook has no counted row on any process.
    """
    samples = [
        _gathered(rows[keep], num_codes, seed, shared) for rows, keep in zip(x.float(), counted)
    ]
    if min(total for _, total in samples) == 0:
        return None
    found = []
    for head, (rows, total) in enumerate(samples):
        codes, indices = kmeans(rows, num_codes, iterations, seed=seed + head, metric=metric)
        counts, _ = ops.code_statistics(rows, indices, num_codes)
        if world_size(shared) > 1:
            fused = torch.cat([counts[:, None], codes], dim=1)
            dist.broadcast(fused, 0)
            counts, codes = fused[:, 0], fused[:, 1:]
        found.append((codes, counts * (total / len(rows))))
    return torch.stack([c for c, _ in found]), torch.stack([n for _, n in found])


def _gathered(rows: Tensor, num_codes: int, seed: int, shared: bool) -> tuple[Tensor, int]:
    """At most 32·K of the rows, of all processes in order of rank, and how many there were."""
    world, limit = world_size(shared), _ROWS_PER_CODE * num_codes
    sizes = [len(rows)]
    if world > 1:
        all_sizes = [rows.new_zeros(1, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(all_sizes, torch.tensor(sizes, device=rows.device))
        sizes = [int(size) for size in all_sizes]
    share = min(max(sizes), -(-limit // world))
    if len(rows) > share:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(rows), generator=generator)[:share].sort().values
        rows = rows[chosen.to(rows.device)]
    if world > 1:
        # Every process contributes the same number of rows, zeros at the end of a short one.
        padded = rows.new_zeros(share, rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        rows = torch.cat([part[: min(size, share)] for part, size in zip(parts, sizes)])
    return rows, sum(sizes)
