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
) -> Tensor:
    """'Same'-padded convolution that sees only earlier pixels in raster order.

        y[b, o, i, j] = bias[o] + Σ_{live (u, v)} Σ_c weight[o, c, u, v] ·
                        x[b, c, i + dilation·(u − kh//2), j + dilation·(v − kw//2)]

    A tap is live if it lies before the centre in raster order (mask type "A"), or is the
    centre too ("B"). The others are never read: what they hold cannot matter.

    Args:
        x: (B, C, H, W). weight: (O, C, kh, kw), odd kernel. bias: (O,).
    Returns:
        (B, O, H, W).
    van den Oord et al. 2016, arXiv:1601.06759, sec. 3.4.
    """
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
            if (u, v) < centre or (mask_type == "B" and (u, v) == centre):
                seen = padded[:, :, u * dilation :, v * dilation :][:, :, :height, :width]
                y = y + torch.einsum("oc,bchw->bohw", weight[:, :, u, v], seen)
    return y
