"""The strided encoder and decoder of the VQ-VAE family, on maps or on sequences.

Lives here: how halvings, residual blocks and doublings follow each other. What stands between an
encoder and a decoder is the models' affair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastvq.nn.convolution import doubling, halving, same_conv
from fastvq.nn.masked_conv import CausalConv1d
from fastvq.nn.residual import ResidualBlock, ResidualStack


class CoderShape(NamedTuple):
    """What the encoders and decoders of one model have in common."""

    hidden_channels: int  # width, half of it next to the data
    residual_channels: int  # inside the residual blocks
    num_blocks: int  # residual blocks at the coarsest resolution
    stage_blocks: int  # residual blocks at each resolution between it and the data
    dilations: Sequence[int]  # of the blocks of one resolution, in turn
    dimensions: int  # 1 or 2


def strided_encoder(in_channels: int, stride: int, shape: CoderShape) -> nn.Sequential:
    """(B, in_channels, n, …) → (B, hidden, n/stride, …): halvings, a convolution, residual blocks.

    `stage_blocks` residual blocks follow each halving but the last.
    """
    halvings = stride.bit_length() - 1
    hidden, dimensions = shape.hidden_channels, shape.dimensions
    widths = [in_channels, hidden // 2] + [hidden] * (halvings - 1)
    layers: list[nn.Module] = []
    for position, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        layers += [halving(dimensions, before, after), nn.ReLU()]
        if shape.stage_blocks and position < halvings:
            layers.append(_stack(after, shape.stage_blocks, shape, causal=False))
    layers.append(same_conv(dimensions, widths[-1], hidden))
    return nn.Sequential(*layers, _stack(hidden, shape.num_blocks, shape, causal=False))


def strided_decoder(
    in_channels: int, out_channels: int, stride: int, shape: CoderShape, *, causal: bool = False
) -> nn.Sequential:
    """(B, in_channels, n, …) → (B, out_channels, n·stride, …): the encoder's mirror image.

    Causal: no step of the output sees a later step of the input; only of sequences.
    """
    doublings = stride.bit_length() - 1
    hidden, dimensions = shape.hidden_channels, shape.dimensions
    last = [hidden // 2] if doublings > 1 else []
    widths = [hidden] * max(doublings - 1, 1) + [*last, out_channels]
    layers: list[nn.Module] = [same_conv(dimensions, in_channels, hidden, causal=causal)]
    layers.append(_stack(hidden, shape.num_blocks, shape, causal))
    for position, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        layers += [doubling(dimensions, before, after, causal=causal), nn.ReLU()]
        if shape.stage_blocks and position < doublings:
            layers.append(_stack(after, shape.stage_blocks, shape, causal))
    return nn.Sequential(*layers[:-1])


def _stack(channels: int, num_blocks: int, shape: CoderShape, causal: bool) -> ResidualStack:
    """The residual blocks of one resolution."""
    return ResidualStack(
        channels,
        shape.residual_channels,
        num_blocks,
        dilations=shape.dilations,
        dimensions=shape.dimensions,
        causal=causal,
    )


@torch.no_grad()
def keep_signal_size(network: nn.Module) -> None:
    """Draw the convolutions' weights so that a signal keeps its size through many strides.

    Normal, of variance 2 / (number of inputs that one output sees), biases 0 (He et al. 2015,
    arXiv:1502.01852, eq. 10); residual blocks start as the identity. PyTorch's own start shrinks
    the signal at every stride, and six of them (`downsample=64`) leave no difference between the
    vectors that are quantized: one code then takes them all.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            taps = module.kernel_size[0]
            if isinstance(module, CausalConv1d):
                taps = (taps + 1) // 2
            elif isinstance(module, nn.ConvTranspose1d):
                taps //= module.stride[0]
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / (module.in_channels * taps)))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.net[3].weight)  # type: ignore[arg-type]
