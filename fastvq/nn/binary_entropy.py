"""Entropies of soft assignments to a codebook of sign vectors, for lookup-free quantization.

Lives here: the two entropies of LFQ's auxiliary loss. Which rows count, and how the entropies are
weighted, is `lfq.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
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
    x: Tensor, counts: Tensor, scale: float, signs: tuple[Tensor, Tensor]
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
        signs: `half_signs(d)`, float32.
    Returns:
        () and () in nats, means over the codebooks too; zeros if no row counts. With
        `torch.distributed` running, the mean inside `batch` is over the rows of all processes.
    Yu et al. 2023, arXiv:2310.05737, eq. 4.
    """
    total = counts.sum()
    weights = counts / (total.clamp(min=1.0) * x.shape[1])
    per_sample, sums = _Entropies.apply(x, counts, weights, scale, *signs)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        fused = torch.cat([sums.flatten(), total[None]])
        fused = differentiable.all_reduce(fused)
        sums, total = fused[:-1].view_as(sums), fused[-1].detach()
    mean = sums / total.clamp(min=1.0)
    batch = (mean * mean.clamp(min=_LEAST).log()).sum() / -x.shape[1]
    return per_sample, batch


class _Entropies(torch.autograd.Function):
    """Σ_n weights[n]·h(p[n]) and Σ_n counts[n]·p[n], (codebooks, √K, √K).

    With a, b the distributions over the halves, l = ln a + ln b and u = min(l − ln 1e-5, 0):

        h = h₀(a) + h₀(b) + Σ p·u,   ∂h/∂ln a = −a·(ln a + const) + Σ_b p·(u + [u < 0])

    where h₀ has no clamp, and the constant drops out of the gradient to the logits. The forward
    pass leaves the gradient of h ready.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        counts: Tensor,
        weights: Tensor,
        scale: float,
        first_signs: Tensor,
        last_signs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        signs = (first_signs, last_signs)
        parts = x.flatten(0, 1).split([half.shape[1] for half in signs], dim=1)
        first, last = (
            (part @ half.t()).mul_(scale).log_softmax(dim=1) for part, half in zip(parts, signs)
        )
        a, b = first.exp(), last.exp()
        to_first, to_last = a * first, b * last
        entropy = -(to_first.sum(dim=1) + to_last.sum(dim=1))
        size = max(1, _BLOCK_TERMS // (a.shape[1] * b.shape[1]))
        for start in range(0, len(a), size):
            block = slice(start, start + size)
            clamped, by_first, by_last = _clamped(first[block], last[block], a[block], b[block])
            entropy[block] += clamped
            to_first[block] -= by_first
            to_last[block] -= by_last
        to_x = torch.cat(
            [
                _to_part(-slope, p, half)
                for slope, p, half in zip((to_first, to_last), (a, b), signs)
            ],
            dim=1,
        )
        a, b = a.unflatten(0, x.shape[:2]), b.unflatten(0, x.shape[:2])
        sums = (a * counts[:, None, None]).permute(1, 2, 0) @ b.transpose(0, 1)
        ctx.scale = scale
        ctx.save_for_backward(to_x, a, b, counts, weights, first_signs, last_signs)
        return entropy.unflatten(0, x.shape[:2]).sum(dim=1) @ weights, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_entropy: Tensor, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        to_x, a, b, counts, weights, first_signs, last_signs = ctx.saved_tensors
        by_first = (b.transpose(0, 1) @ to_sums.transpose(1, 2)).transpose(0, 1) * a
        by_last = (a.transpose(0, 1) @ to_sums).transpose(0, 1) * b
        mean = [_to_part(by_first, a, first_signs), _to_part(by_last, b, last_signs)]
        grad = torch.cat(mean, dim=-1).mul_(counts[:, None, None])
        grad.addcmul_(to_x.view_as(grad), (weights * to_entropy)[:, None, None])
        return grad.mul_(ctx.scale), None, None, None, None, None


def _clamped(first: Tensor, last: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ p·u (R,), and Σ p·(u + [u < 0]) over the last half (R, A) and over the first (R, B)."""
    below = (first - math.log(_LEAST))[:, :, None] + last[:, None, :]
    below.clamp_(-_VANISHED, 0.0)
    p = a[:, :, None] * b[:, None, :]
    slope = below.sign()
    torch.sub(below, slope, out=slope).mul_(p)
    return below.mul_(p).sum(dim=(1, 2)), slope.sum(dim=2), slope.sum(dim=1)


def _to_part(slope: Tensor, p: Tensor, signs: Tensor) -> Tensor:
    """The gradient to a half's bits, but for the scale, from that to its log-probabilities."""
    return (slope - p * slope.sum(dim=-1, keepdim=True)) @ signs
