"""Entropies of soft assignments to a codebook of sign vectors, for lookup-free quantization.

Lives here: the two entropies of LFQ's auxiliary loss. Which rows count, and how the entropies are
weighted, is `lfq.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Probabilities below this count as this inside the logarithm, as in vector-quantize-pytorch.
_LEAST = 1e-5
# No row's product with another is above zero past this many nats below `_LEAST`, in float32.
_VANISHED = 200.0
# Row × code terms that exist at once.
_BLOCK_TERMS = 2**17


def sign_codes(bits: int, device: torch.device) -> Tensor:
    """(2^bits, bits) float32 of −1 and 1: the binary digits of 0 … 2^bits − 1, highest first."""
    digits = torch.arange(bits - 1, -1, -1, device=device)
    numbers = torch.arange(2**bits, device=device)
    return ((numbers[:, None] >> digits) & 1).float() * 2.0 - 1.0


def half_signs(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sign codes of the first and of the last half of `bits` bits."""
    return sign_codes(bits // 2, device), sign_codes(bits - bits // 2, device)


def binary_entropies(
    x: Tensor, counts: Tensor, scale: float, signs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
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
        signs: `half_signs(d)`, float32; or `sign_codes(d)` alone, for so few rows and codes that
            all N×K terms at once are quicker, and small.
    Returns:
        () and () in nats, means over the codebooks too; zeros if no row counts. With
        `torch.distributed` running, the mean inside `batch` is over the rows of all processes.
    Yu et al. 2023, arXiv:2310.05737, eq. 4.
    """
    entropies: tuple[Tensor, Tensor] = _Entropies.apply(x, counts, scale, *signs)
    return entropies


class _Entropies(torch.autograd.Function):
    """Both entropies; the forward pass leaves their gradients ready.

    With a, b the distributions over the halves, l = ln a + ln b and u = min(l − ln 1e-5, 0):

        h = h₀(a) + h₀(b) + Σ p·u,   ∂h/∂ln a = −a·(ln a + const) + Σ_b p·(u + [u < 0])

    where h₀ has no clamp, and the constant drops out of the gradient to the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        counts: Tensor,
        scale: float,
        *signs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        make = _by_halves if len(signs) == 2 else _by_codes
        per_sample, batch, by_sample, by_batch = make(x, counts, scale, *signs)
        ctx.save_for_backward(by_sample, by_batch)
        ctx.scale, ctx.others = scale, 2 + len(signs)
        return per_sample, batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_sample: Tensor, to_batch: Tensor) -> tuple[Tensor | None, ...]:
        by_sample, by_batch = ctx.saved_tensors
        # A process's rows are in the mean of every process.
        to_batch, _ = _over_processes(to_batch, to_batch)
        grad = (by_sample * (to_sample * ctx.scale)).addcmul_(by_batch, to_batch * ctx.scale)
        return grad, *[None] * ctx.others


def _by_halves(
    x: Tensor, counts: Tensor, scale: float, first_signs: Tensor, last_signs: Tensor
) -> tuple[Tensor, ...]:
    """Both entropies, and their gradients to x but for the scale."""
    books = x.shape[1]
    parts = x.split([first_signs.shape[1], last_signs.shape[1]], dim=2)
    first = (parts[0] @ first_signs.t()).mul_(scale).log_softmax(dim=2)
    last = (parts[1] @ last_signs.t()).mul_(scale).log_softmax(dim=2)
    a, b = first.exp(), last.exp()
    entropy, *slopes = _row_entropies(*(each.flatten(0, 1) for each in (first, last, a, b)))
    total = counts.sum()
    weights = (counts / (total.clamp(min=1.0) * books))[:, None, None]
    per_sample = (entropy.view(len(x), books) * weights[..., 0]).sum()
    counted = a * counts[:, None, None]
    b_by_book = b.transpose(0, 1)
    batch, by_code = _entropy_of_mean(counted.permute(1, 2, 0) @ b_by_book, total)
    by_sample = [slope.unflatten(0, x.shape[:2]) * weights for slope in slopes]
    by_first = (b_by_book @ by_code.transpose(1, 2)).transpose(0, 1) * counted
    by_last = (counted.transpose(0, 1) @ by_code).transpose(0, 1) * b
    gradients = (
        torch.cat([_to_part(f, a, first_signs), _to_part(g, b, last_signs)], dim=2)
        for f, g in (by_sample, (by_first, by_last))
    )
    return per_sample, batch, *gradients


def _by_codes(x: Tensor, counts: Tensor, scale: float, signs: Tensor) -> tuple[Tensor, ...]:
    """The same from all N×K terms at once: fewer operations."""
    logs = (x @ signs.t()).mul_(scale).log_softmax(dim=2)
    p = logs.exp()
    clamped = logs.clamp(min=math.log(_LEAST))
    total = counts.sum()
    weights = (counts / (total.clamp(min=1.0) * -x.shape[1]))[:, None, None]
    weighted = p * weights
    per_sample = (weighted * clamped).sum()
    slope = clamped.add_(logs >= math.log(_LEAST)).mul_(weighted)
    counted = p * counts[:, None, None]
    batch, by_code = _entropy_of_mean(counted.sum(dim=0), total)
    by_batch = counted.mul_(by_code)
    return per_sample, batch, _to_part(slope, p, signs), _to_part(by_batch, p, signs)


def _entropy_of_mean(sums: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """h of sums/total over all processes, mean over the codebooks; its gradient to the sums."""
    sums, total = _over_processes(sums, total)
    total = total.clamp(min=1.0)
    mean = sums / total
    logs = mean.clamp(min=_LEAST).log_()
    batch = (mean * logs).sum() / -len(sums)
    return batch, logs.add_(mean >= _LEAST).div_(total * -len(sums))


def _over_processes(sums: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Both, summed over all processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums, total
    fused = torch.cat([sums.flatten(), total[None]])
    dist.all_reduce(fused)
    return fused[:-1].view_as(sums), fused[-1]


def _row_entropies(
    first: Tensor, last: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """h of every row (R,), and its gradients to the log-probabilities first (R, A), last (R, B)."""
    by_first, by_last = a * first, b * last
    entropy = by_first.sum(dim=1).add_(by_last.sum(dim=1)).neg_()
    by_first.neg_()
    by_last.neg_()
    size = max(1, _BLOCK_TERMS // (a.shape[1] * b.shape[1]))
    for start in range(0, len(a), size):
        block = slice(start, start + size)
        clamped, over_last, over_first = _clamped(first[block], last[block], a[block], b[block])
        entropy[block] += clamped
        by_first[block] += over_last
        by_last[block] += over_first
    return entropy, by_first, by_last


def _clamped(first: Tensor, last: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ p·u (R,), and Σ p·(u + [u < 0]) over the last half (R, A) and over the first (R, B)."""
    below = (first - math.log(_LEAST))[:, :, None] + last[:, None, :]
    below.clamp_(-_VANISHED, 0.0)
    p = a[:, :, None] * b[:, None, :]
    slope = below.sign()
    torch.sub(below, slope, out=slope).mul_(p)
    return below.mul_(p).sum(dim=(1, 2)), slope.sum(dim=2), slope.sum(dim=1)


def _to_part(slope: Tensor, p: Tensor, signs: Tensor) -> Tensor:
    """The gradient to the bits, but for the scale, from that to its log-probabilities."""
    return (slope - p * slope.sum(dim=-1, keepdim=True)) @ signs
