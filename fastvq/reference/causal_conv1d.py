"""Definition of the masked (causal) convolution in one dimension."""

from __future__ import annotations

from torch import Tensor

from .masked_conv2d import masked_conv2d


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str = "B",
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """`masked_conv2d` on a picture one row high.

        y[b, o, t] = bias[o] + Σ_{live v} Σ_c weight[o, c, v] · x[b, c, t + dilation·(v − k//2)]

    Args:
        x: (B, C, T). weight: (O, C / groups, k), odd k; taps after the centre are never read.
    Returns:
        (B, O, T).
    van den Oord et al. 2016, arXiv:1609.03499, sec. 2.1.
    """
    y = masked_conv2d(
        x[:, :, None],
        weight[:, :, None],
        bias,
        mask_type=mask_type,
        dilation=dilation,
        groups=groups,
    )
    return y[:, :, 0]
