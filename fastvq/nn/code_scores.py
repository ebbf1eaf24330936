"""Choosing codes by all their scores: sampling, the best few, and softmax gradients.

Lives here: what needs the score of every row for every code. Scores are made, used and dropped in
blocks of rows, and made again for the backward pass, so that the N×K matrix never exists. The
nearest code itself does not need them; it is `fastvq.ops`'.

    score[n, k] = −‖x[n] − e[k]‖  ("l2"),   x[n]·e[k]  ("dot")

For "l2" it is computed as −√max(‖x‖² + ‖e‖² − 2x·e, 1e-8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvq import ops

# Scores made at a time: 2²² float32 scores are 16 MiB, whatever N and K are.
SCORES_PER_BLOCK = 1 << 22


def scores(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """(..., N, K) in float32 (float64 if an input is) of x (..., N, D) and codes (..., K, D)."""
    wide = torch.float64 if torch.float64 in (x.dtype, codes.dtype) else torch.float32
    x, codes = x.to(wide), codes.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        product = x @ codes.transpose(-1, -2)
    if metric == "dot":
        return product
    squares = x.square().sum(dim=-1)[..., None] + codes.square().sum(dim=-1)[..., None, :]
    return -(squares - 2.0 * product).clamp(min=1e-8).sqrt()


def row_blocks(num_rows: int, num_scores: int) -> Iterator[slice]:
    """Slices of the rows, each of as many as a block of scores holds at `num_scores` a row."""
    size = max(1, SCORES_PER_BLOCK // max(num_scores, 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def recomputed(function: Callable[..., Tensor], *args: Tensor | str | float) -> Tensor:
    """function(*args), which keeps its arguments alone for the backward pass."""
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result


@torch.no_grad()
def choose_codes(
    x: Tensor,
    codes: Tensor,
    metric: str,
    *,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    topk: int | None = None,
) -> Tensor:
    """The best code of each row, or the best few, after Gumbel noise if there is a temperature.

        index[n] = argmax_k score[n, k] / T + g[n, k],   g = −ln(−ln U(0, 1))

    which draws k with probability softmax(score[n] / T)[k]. Without noise the ranking is that of
    float64 scores, equal ones by index.

    Args:
        x: (h, N, D).
        codes: (h, K, D).
        metric: "l2" or "dot".
        mask: (N,) or (h, N) bool, True = counts.
        temperature: T; 0 chooses without noise.
        topk: how many codes of each row, best first; None is one, without a dimension for it.
    Returns:
        (h, N) or (h, N, topk) int64; −1 where masked and for rows that are not finite.
    """
    if temperature <= 0.0 and topk is None:
        found = ops.nearest_code(x, codes, metric=metric)
    else:
        count = 1 if topk is None else topk
        heads = [
            torch.cat(
                [x.new_empty((0, count), dtype=torch.int64)]
                + [
                    _best(rows[block], book, metric, temperature, count)
                    for block in row_blocks(len(rows), len(book))
                ]
            )
            for rows, book in zip(x, codes)
        ]
        found = torch.stack(heads)
        found = found.squeeze(-1) if topk is None else found
    counted = x.isfinite().all(dim=-1)
    counted = counted if mask is None else counted & mask
    return torch.where(counted if topk is None else counted[..., None], found, -1)


def _best(rows: Tensor, book: Tensor, metric: str, temperature: float, count: int) -> Tensor:
    if temperature > 0.0:
        ranked = scores(rows, book, metric)
        noise = torch.zeros_like(ranked).uniform_(0, 1)
        ranked = ranked / temperature - (-noise.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    else:
        ranked = scores(rows.double(), book.double(), metric)
    if count == 1:
        return ranked.argmax(dim=-1, keepdim=True)
    return ranked.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def soft_gradient(
    quantized: Tensor, x: Tensor, codes: Tensor, metric: str, temperature: float
) -> Tensor:
    """`quantized` (h, N, D) with the softmax's gradient to x: the Gumbel straight-through.

    value quantized,  gradient that of Σ_k softmax(score[n] / T)[k] · sg[e[k]]
    """
    if temperature <= 0.0:
        return quantized
    soft = torch.stack(
        [
            torch.cat(
                [
                    recomputed(_soft_codes, rows[block], book, metric, temperature)
                    for block in row_blocks(len(rows), len(book))
                ]
                or [rows.float()]
            )
            for rows, book in zip(x, codes)
        ]
    )
    # soft − sg[soft] is exactly zero.
    return quantized + torch.where(quantized.isfinite(), soft - soft.detach(), 0.0)


def _soft_codes(rows: Tensor, book: Tensor, metric: str, temperature: float) -> Tensor:
    share = (scores(rows, book, metric) / temperature).softmax(dim=-1)
    return share @ book.detach().to(share.dtype)
