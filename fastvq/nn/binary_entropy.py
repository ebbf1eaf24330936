"""Entropies of soft assignments to a codebook of sign vectors, for lookup-free quantization.

Lives here: the two entropies of LFQ's auxiliary loss. Which rows count, and how the entropies are
weighted, is `lfq.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor

# Probabilities below this count as this inside the logarithm, as in vector-quantize-pytorch.
_LEAST = 1e-5
# Row × code terms that exist at once: 4 MB of float32.
_BLOCK_TERMS = 2**20


def sign_codes(bits: int, device: torch.device) -> Tensor:
    """(2^bits, bits) float32 of −1 and 1: the binary digits of 0 … 2^bits − 1, highest first."""
    digits = torch.arange(bits - 1, -1, -1, device=device)
    numbers = torch.arange(2**bits, device=device)
    return ((numbers[:, None] >> digits) & 1).float() * 2.0 - 1.0


def binary_entropies(x: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mean entropy of each row's distribution over all sign vectors, and entropy of their mean.

        p[n, k] = softmax_k(scale · x[n]·b[k]),   b[k] ∈ {−1, 1}^d, K = 2^d
        per_sample = mean_n h(p[n]),   batch = h(mean_n p[n]),   h(p) = −Σ_k p_k ln max(p_k, 1e-5)

    The bits are independent, so p is the outer product of the distributions over the first and the
    last half of them: their exponentials number N√K, and the mean of p is a matrix product. Only
    the clamp inside h sees single codes, and it goes through the rows in blocks: nothing of size
    N×K is kept, not for the gradient either.

    Args:
        x: (N, codebooks, d) float32, finite.
        counts: (N,) float32, the weight of each row in both means.
        scale: factor of the logits.
    Returns:
        () and () in nats, means over the codebooks too; zeros if no row counts. With
        `torch.distributed` running, the mean inside `batch` is over the rows of all processes.
    Yu et al. 2023, arXiv:2310.05737, eq. 4.
    """
    bits = x.shape[-1]
    halves = x.split([bits // 2, bits - bits // 2], dim=-1)
    first, last = (
        (scale * (half @ sign_codes(half.shape[-1], x.device).t())).log_softmax(dim=-1)
        for half in halves
    )
    each = _ClampedEntropy.apply(first.flatten(0, 1), last.flatten(0, 1))
    weights = counts / counts.sum().clamp(min=1.0)
    per_sample = (each.unflatten(0, x.shape[:2]).mean(dim=1) * weights).sum()
    sums = torch.einsum("n,nca,ncb->cab", counts, first.exp(), last.exp())
    total = counts.sum()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        fused = torch.cat([sums.flatten(), total[None]])
        fused = differentiable.all_reduce(fused)
        sums, total = fused[:-1].view_as(sums), fused[-1].detach()
    mean = sums.flatten(1) / total.clamp(min=1.0)
    batch = -(mean * mean.clamp(min=_LEAST).log()).sum(dim=1).mean()
    return per_sample, batch


class _ClampedEntropy(torch.autograd.Function):
    """(R,) h of the outer products of exp(first) (R, A) and exp(last) (R, B), block by block.

    With l = first[a] + last[b], p = eˡ and m = max(l, ln 1e-5): h = −Σ p·m, and
    ∂h/∂l = −p·(m + [l ≥ ln 1e-5]); the forward pass leaves the gradient ready.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, last: Tensor) -> Tensor:
        left, right = first.exp(), last.exp()
        least = torch.tensor(_LEAST, device=first.device).log()
        entropy = first.new_empty(len(first))
        to_first, to_last = torch.empty_like(first), torch.empty_like(last)
        size = max(1, _BLOCK_TERMS // (first.shape[1] * last.shape[1]))
        for start in range(0, len(first), size):
            block = slice(start, start + size)
            a, b = left[block], right[block]
            logs = first[block, :, None] + last[block, None, :]
            above = (logs >= least).to(logs.dtype)
            clamped = torch.maximum(logs, least)
            entropy[block] = -(a * (clamped @ b[..., None])[..., 0]).sum(dim=-1)
            slope = clamped + above
            to_first[block] = -a * (slope @ b[..., None])[..., 0]
            to_last[block] = -b * (a[:, None, :] @ slope)[:, 0]
        ctx.save_for_backward(to_first, to_last)
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        to_first, to_last = ctx.saved_tensors
        return grad[:, None] * to_first, grad[:, None] * to_last
