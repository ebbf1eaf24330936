"""Residual blocks of the VQ-VAE encoders and decoders.

Lives here: the pre-activation block of VQ-VAE and a stack of them. Masked (causal) blocks are not
here.
"""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1×1(relu(conv3×3(relu(x)))), on (B, channels, H, W).

    The two convolutions are `net.1` and `net.3`. van den Oord et al. 2017, arXiv:1711.00937, §4.1.

    Args:
        channels: channels of the input and the output.
        residual_channels: channels between the two convolutions.
    """

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, residual_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(residual_channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) → the same shape."""
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
    """

    def __init__(self, channels: int, residual_channels: int, num_blocks: int) -> None:
        blocks: list[nn.Module] = [
            ResidualBlock(channels, residual_channels) for _ in range(num_blocks)
        ]
        super().__init__(*blocks, nn.ReLU())
