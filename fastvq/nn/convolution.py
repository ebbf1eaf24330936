"""Convolutions whose number of dimensions is an argument: the parts of encoders and decoders.

Lives here: 'same', pointwise, halving and doubling convolutions on maps (B, C, H, W) or sequences
(B, C, T), and the causal forms that sequences have. Masked convolutions of priors are in
`masked_conv.py`; what the parts are put together to is in `strided_coder.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastvq.nn.dimensions import CONVOLUTIONS, TRANSPOSED
from fastvq.nn.masked_conv import CausalConv1d


class CausalConvTranspose1d(nn.ConvTranspose1d):
    """Twice as many steps, none of which sees a later one: kernel 4, stride 2.

        y[2i + k] = bias + Σ weight[k] · x[i],   k = 0 … 3, for the first 2T steps

    so that y[t] depends on x[⌊t/2⌋] and x[⌊t/2⌋ − 1] alone. Parameters and state-dict keys are
    `torch.nn.ConvTranspose1d`'s.

    Args:
        in_channels, out_channels: C of (B, C, T) and of (B, C, 2T).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, in_channels, T) → (B, out_channels, 2T)."""
        return super().forward(x, output_size)[..., : 2 * x.shape[-1]]


def same_conv(
    dimensions: int, in_channels: int, out_channels: int, *, dilation: int = 1, causal: bool = False
) -> nn.Module:
    """Three taps along each dimension, the size unchanged.

    Causal: the three taps are the present step and two before it.
    """
    if causal:  # five taps, of which `CausalConv1d` keeps the centre and what lies before it
        return CausalConv1d(in_channels, out_channels, 5, "B", dilation)
    return CONVOLUTIONS[dimensions](
        in_channels, out_channels, 3, padding=dilation, dilation=dilation
    )


def pointwise(dimensions: int, in_channels: int, out_channels: int) -> nn.Module:
    """One tap."""
    return CONVOLUTIONS[dimensions](in_channels, out_channels, 1)


def halving(dimensions: int, in_channels: int, out_channels: int) -> nn.Module:
    """Half the size along each dimension: kernel 4, stride 2."""
    return CONVOLUTIONS[dimensions](in_channels, out_channels, 4, stride=2, padding=1)


def doubling(
    dimensions: int, in_channels: int, out_channels: int, *, causal: bool = False
) -> nn.Module:
    """Twice the size along each dimension: transposed, kernel 4, stride 2."""
    if causal:
        return CausalConvTranspose1d(in_channels, out_channels)
    return TRANSPOSED[dimensions](in_channels, out_channels, 4, stride=2, padding=1)
