"""Definition of the masked (causal) convolution: a sum over the live taps, one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    dilation: int = 1,
    groups: int = 1,
    channel_groups: int = 1,
) -> Tensor:
    """'Same'-padded convolution that sees only earlier pixels in raster order.

        y[b, o, i, j] = bias[o] + Σ_{live (u, v)} Σ_c weight[o, c, u, v] ·
                        x[b, c, i + dilation·(u − kh//2), j + dilation·(v − kw//2)]

    A tap is live if it lies before the centre in raster order (mask type "A"), or is the
    centre too ("B"). The others are never read: what they hold cannot matter. With groups, the
    channels of x and y form that many convolutions beside each other. With n ordered groups of
    channels, y's group q sees at the centre x's groups 0 … q − 1 ("A") or 0 … q ("B") alone.

    Args:
        x: (B, C, H, W). weight: (O, C / groups, kh, kw), odd kernel. bias: (O,).
    Returns:
        (B, O, H, W).
    van den Oord et al. 2016, arXiv:1601.06759, sec. 3.4; channels in order: sec. 3.3.
    """
    if groups > 1:
        beside = [
            masked_conv2d(*part, mask_type=mask_type, dilation=dilation)
            for part in zip(x.chunk(groups, dim=1), weight.chunk(groups))
        ]
        y = torch.cat(beside, dim=1)
        return y if bias is None else y + bias[:, None, None]
    height, width = x.shape[2:]
    kernel_height, kernel_width = weight.shape[2:]
    up, left = dilation * (kernel_height // 2), dilation * (kernel_width // 2)
    padded = F.pad(x, (left, left, up, 0))
    y = x.new_zeros(x.shape[0], weight.shape[0], height, width)
    # Sums over nothing: with no live tap x and weight still get a gradient, which is zero.
    y = y + x[:, :0].sum() + weight[:0].sum()
    if bias is not None:
        y = y + bias[:, None, None]
    centre = (kernel_height // 2, kernel_width // 2)
    for u in range(kernel_height):
        for v in range(kernel_width):
            seen = padded[:, :, u * dilation :, v * dilation :][:, :, :height, :width]
            if (u, v) < centre:
                y = y + torch.einsum("oc,bchw->bohw", weight[:, :, u, v], seen)
            elif (u, v) == centre:
                y = y + _centre_term(seen, weight[:, :, u, v], mask_type, channel_groups)
    return y


def _centre_term(x: Tensor, weight: Tensor, mask_type: str, channel_groups: int) -> Tensor:
    """What the current pixel (B, C, H, W) adds by `weight` (O, C), group by group of channels."""
    terms = []
    for q, rows in enumerate(weight.chunk(channel_groups)):
        seen = (q + (mask_type == "B")) * x.shape[1] // channel_groups
        terms.append(torch.einsum("oc,bchw->bohw", rows[:, :seen], x[:, :seen]))
    return torch.cat(terms, dim=1)
