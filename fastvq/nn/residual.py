"""Residual blocks of the VQ-VAE encoders and decoders.

Lives here: the pre-activation block of VQ-VAE and a stack of them. Masked (causal) blocks are not
here.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastvq.nn.dimensions import CONVOLUTIONS, check_dimensions


class ResidualBlock(nn.Module):
    """x + conv1(relu(conv3(relu(x)))), on (B, channels, H, W) or (B, channels, T).

    conv3 is a 3×3 convolution (of 3 steps), conv1 a 1×1; they are `net.1` and `net.3`. van den
    Oord et al. 2017, arXiv:1711.00937, §4.1.

    Args:
        channels: channels of the input and the output.
        residual_channels: channels between the two convolutions.
        dimensions: 2 for pictures, 1 for sequences.
    Raises:
        ValueError: another number of dimensions.
    """

    def __init__(self, channels: int, residual_channels: int, dimensions: int = 2) -> None:
        super().__init__()
        check_dimensions("ResidualBlock", dimensions)
        conv = CONVOLUTIONS[dimensions]
        self.net = nn.Sequential(
            nn.ReLU(),
            conv(channels, residual_channels, 3, padding=1),
            nn.ReLU(),
            conv(residual_channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) or (B, channels, T) → the same shape."""
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
        dimensions: as `ResidualBlock`.
    """

    def __init__(
        self, channels: int, residual_channels: int, num_blocks: int, dimensions: int = 2
    ) -> None:
        blocks: list[nn.Module] = [
            ResidualBlock(channels, residual_channels, dimensions) for _ in range(num_blocks)
        ]
        super().__init__(*blocks, nn.ReLU())
