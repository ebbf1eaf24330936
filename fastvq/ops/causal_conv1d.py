"""causal_conv1d: the masked convolution in one dimension."""

from __future__ import annotations

from torch import Tensor

from fastvq.reference import causal_conv1d as reference

from .masked_conv2d import check_convolution, convolve


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str = "B",
    dilation: int = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """'Same'-padded convolution of a sequence that sees only earlier steps.

        y[b, o, t] = bias[o] + Σ_{live v} Σ_c weight[o, c, v] · x[b, c, t + dilation·(v − k//2)]

    `masked_conv2d` in one dimension: taps before the centre are live, and the centre for mask
    type "B". Taps after the centre contribute nothing and receive zero gradient.

    Args:
        x: (B, C, T) float32, float16, bfloat16 or float64; any strides.
        weight: (O, C / groups, k), k odd. bias: (O,) or None.
        mask_type: "A" or "B". dilation: distance between taps in steps, ≥ 1.
        groups: as in `torch.nn.functional.conv1d`.
        backend: as `masked_conv2d`.
    Returns:
        (B, O, T) of x's dtype.
    Raises:
        ValueError, TypeError, RuntimeError: as `masked_conv2d`.
    van den Oord et al. 2016, arXiv:1609.03499, sec. 2.1.
    """
    op = "causal_conv1d"
    check_convolution(op, x, weight, bias, mask_type, dilation, groups, spatial=1)
    if backend == "reference":
        return reference.causal_conv1d(
            x, weight, bias, mask_type=mask_type, dilation=dilation, groups=groups
        )
    plane, kernel = x[:, :, None], weight[:, :, None]
    return convolve(op, plane, kernel, bias, mask_type, dilation, groups, 1, backend)[:, :, 0]
