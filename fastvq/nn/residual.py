"""Residual blocks of the VQ-VAE encoders and decoders.

Lives here: the pre-activation block of VQ-VAE and a stack of them, on maps or on sequences. The
convolutions they are made of are in `convolution.py`; gated masked blocks are in
`gated_masked_conv.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastvq.nn.convolution import pointwise, same_conv
from fastvq.nn.dimensions import check_dimensions


class ResidualBlock(nn.Module):
    """x + conv1(relu(conv3(relu(x)))), with kernels 1 and 3 along each dimension.

    The two convolutions are `net.1` and `net.3`. van den Oord et al. 2017, arXiv:1711.00937, §4.1.

    Args:
        channels: channels of the input and the output.
        residual_channels: channels between the two convolutions.
        dimensions: 2 for maps (B, channels, H, W), 1 for sequences (B, channels, T).
        dilation: distance between the taps of conv3.
        causal: conv3 sees the present step and two before it; only of sequences.
    """

    def __init__(
        self,
        channels: int,
        residual_channels: int,
        dimensions: int = 2,
        *,
        dilation: int = 1,
        causal: bool = False,
    ) -> None:
        check_dimensions("ResidualBlock", dimensions)
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(),
            same_conv(dimensions, channels, residual_channels, dilation=dilation, causal=causal),
            nn.ReLU(),
            pointwise(dimensions, residual_channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, ...) → the same shape."""
        residual: Tensor = self.net(x)
        return x + residual


class ResidualStack(nn.Sequential):
    """`num_blocks` residual blocks one after the other, then a ReLU.

    The closing ReLU belongs to the stack because a block ends in a sum that no activation has
    seen yet. With `num_blocks=0` only the ReLU is left.

    Args:
        channels: channels of the input and the output.
        residual_channels: channels inside each block.
        num_blocks: how many blocks.
        dimensions, causal: as `ResidualBlock`.
        dilations: of the blocks, in turn.
    """

    def __init__(
        self,
        channels: int,
        residual_channels: int,
        num_blocks: int,
        dimensions: int = 2,
        *,
        dilations: Sequence[int] = (1,),
        causal: bool = False,
    ) -> None:
        blocks: list[nn.Module] = [
            ResidualBlock(
                channels,
                residual_channels,
                dimensions,
                dilation=dilations[index % len(dilations)],
                causal=causal,
            )
            for index in range(num_blocks)
        ]
        super().__init__(*blocks, nn.ReLU())
