"""Causal self-attention over a feature map in raster order.

It follows gated masked convolutions in `fastvq.models.PixelCNN`, whose horizontal features hold
earlier codes only; the mask here keeps that so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def coordinates(height: int, width: int, like: Tensor) -> Tensor:
    """(2, H, W): row and column of each pixel's centre, scaled to −1 … 1, for any H and W."""
    rows = (torch.arange(height, device=like.device, dtype=like.dtype) * 2 + 1) / height - 1
    columns = (torch.arange(width, device=like.device, dtype=like.dtype) * 2 + 1) / width - 1
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every pixel to itself and all earlier ones, with a residual.

        y[p] = x[p] + W_o Σ_{p' ≤ p} softmax_{p'}(q[p]·k[p'] / √(C / heads)) v[p']

    p counts pixels in raster order. q, k and v are 1×1 maps of x and two coordinate channels, so
    that attention knows where it looks in a map of any height and width. Pixel p attends to
    itself, so no softmax is over nothing; this shows no code too many as long as x[p] itself
    holds codes before p only.

    A weight of zero times a value that is NaN is NaN: unlike the convolutions, attention does not
    keep a NaN at a later pixel from earlier ones.

    Args:
        channels: C, a multiple of `heads`.
        heads: number of heads.
        dropout: probability of dropping an attention weight.
    Raises:
        ValueError: `channels` is not a multiple of `heads`.
    Chen et al. 2018, arXiv:1712.09763 (PixelSNAIL); Razavi et al. 2019, arXiv:1906.00446.
    """

    def __init__(self, channels: int, heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(
                f"CausalSelfAttention: channels must be a multiple of heads; got {channels} "
                f"channels and {heads} heads."
            )
        self.channels = channels
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Conv2d(channels + 2, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        batch, channels, height, width = x.shape
        position = coordinates(height, width, x).expand(batch, -1, -1, -1)
        projected = self.query_key_value(torch.cat([x, position], dim=1))
        # (3, B, heads, H·W, C / heads)
        query, key, value = projected.reshape(
            batch, 3, self.heads, channels // self.heads, height * width
        ).permute(1, 0, 2, 4, 3)
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        merged = attended.transpose(2, 3).reshape(batch, channels, height, width)
        return x + self.out(merged)

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, dropout={self.dropout}"
