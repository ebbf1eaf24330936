"""Causal self-attention over a feature map in raster order, or over a sequence.

It follows gated masked convolutions in `fastvq.models.PixelCNN`, whose horizontal features hold
earlier codes only; the mask here keeps that so.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.dimensions import CONVOLUTIONS, check_dimensions


def coordinates(*shape: int, like: Tensor) -> Tensor:
    """(len(shape), *shape): each position's centre, scaled to −1 … 1 along each axis."""
    axes = [
        (torch.arange(size, device=like.device, dtype=like.dtype) * 2 + 1) / size - 1
        for size in shape
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every pixel to itself and all earlier ones, with a residual.

        y[p] = x[p] + W_o Σ_{p' ≤ p} softmax_{p'}(q[p]·k[p'] / √(C / heads)) v[p']

    p counts pixels in raster order, or the steps of a sequence. q, k and v are 1×1 maps of x and
    a coordinate channel per dimension, so that attention knows where it looks in a map of any
    height and width or a sequence of any length. Pixel p attends to itself, so no softmax is over
    nothing; this shows no code too many as long as x[p] itself holds codes before p only.

    A weight of zero times a value that is NaN is NaN: unlike the convolutions, attention does not
    keep a NaN at a later pixel from earlier ones.

    Args:
        channels: C, a multiple of `heads`.
        heads: number of heads.
        dropout: probability of dropping an attention weight.
        dimensions: 2 for maps, 1 for sequences.
    Raises:
        ValueError: `channels` is not a multiple of `heads`, or another number of dimensions.
    Chen et al. 2018, arXiv:1712.09763 (PixelSNAIL); Razavi et al. 2019, arXiv:1906.00446.
    """

    def __init__(
        self, channels: int, heads: int = 8, dropout: float = 0.0, dimensions: int = 2
    ) -> None:
        super().__init__()
        check_dimensions("CausalSelfAttention", dimensions)
        if heads < 1 or channels % heads:
            raise ValueError(
                f"CausalSelfAttention: channels must be a multiple of heads; got {channels} "
                f"channels and {heads} heads."
            )
        self.channels = channels
        self.heads = heads
        self.dropout = dropout
        self.dimensions = dimensions
        conv = CONVOLUTIONS[dimensions]
        self.query_key_value = conv(channels + dimensions, 3 * channels, 1)
        self.out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C, T) → the same shape."""
        batch, channels, *shape = x.shape
        position = coordinates(*shape, like=x).expand(batch, *[-1] * (len(shape) + 1))
        projected = self.query_key_value(torch.cat([x, position], dim=1))
        # (3, B, heads, positions, C / heads)
        query, key, value = projected.reshape(
            batch, 3, self.heads, channels // self.heads, math.prod(shape)
        ).permute(1, 0, 2, 4, 3)
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        merged = attended.transpose(2, 3).reshape(x.shape)
        return x + self.out(merged)

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, dropout={self.dropout}"
