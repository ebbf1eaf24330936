"""Launchers of a gated PixelCNN layer in Triton: both stacks forward, and all their gradients.

Forward, three products: the vertical stack up to its gate, the horizontal stack with the link up to
its gate, and the 1×1 convolution after it, which adds the residual. Backward, the gates' gradients
are taken where the features are made again, and every convolution goes back by the kernels of
`masked_conv2d`. gated_masked_conv_gate.py holds the kernels with a gate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import triton

from .gated_masked_conv_gate import gated_masked_conv_backward_kernel, gated_masked_conv_kernel
from .masked_conv2d import (
    Window,
    channels_last,
    convolve,
    empty_channels_last,
    launch_options,
    taps_by_input,
    taps_by_output,
    tiles_for,
    weight_gradient,
)
from .masked_conv2d_tiles import LEAST_BLOCK

VERTICAL, HORIZONTAL = 0, 1
POINT = Window(taps=1, of=1, width=1, up=0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What both directions are told; `weights` as `fastvq.ops.gated_masked_conv` orders them."""

    seed: Tensor | None
    dropout: float
    mask_type: str
    dilation: int
    residual: bool
    vertical: Tensor
    horizontal: Tensor
    class_bias: Tensor | None
    condition: Tensor | None
    condition_weight: Tensor | None
    weights: list[Tensor]

    @property
    def channels(self) -> int:
        return self.vertical.shape[1]

    def window(self, stack: int) -> Window:
        """The rows of the vertical kernel, or the live columns of the horizontal one."""
        rows, width = self.weights[0].shape[2:]
        if stack == VERTICAL:
            return Window(rows * width, rows * width, width, width // 2)
        return Window(width // 2 + (self.mask_type == "B"), width, width, 0)

    def packed(self, index: int) -> tuple[Tensor, Tensor]:
        """A 1×1 weight as (rows, columns), and its bias."""
        weight, bias = self.weights[index : index + 2]
        return weight.flatten(1).contiguous(), bias.contiguous()


def gated_masked_conv_forward(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Both outputs, and the vertical features (B, 2C, H, W) that the way back wants.

    Each is channels_last.
    """
    features = empty_channels_last(layer.vertical, 2 * layer.channels)
    gated_v, gated_h = (empty_channels_last(layer.vertical, layer.channels) for _ in range(2))
    for stack, gated in ((VERTICAL, gated_v), (HORIZONTAL, gated_h)):
        _launch(gated_masked_conv_kernel, layer, stack, features, (features, gated))
    w_o, b_o = layer.weights[6:]
    residual = layer.horizontal if layer.residual else None
    out_h = convolve(gated_h, taps_by_output(w_o, POINT), b_o, POINT, 1, residual)
    return gated_v, out_h, features


def gated_masked_conv_backward(
    grad_vertical: Tensor,
    grad_horizontal: Tensor,
    features: Tensor,
    wanted: list[bool],
    layer: Layer,
) -> list[Tensor | None]:
    """Gradients to vertical, horizontal, class_bias, condition, condition_weight, weights.

    Those to an absent tensor, and to vertical, horizontal and condition where `wanted` says so,
    are None. Sums over pixels are taken in float32 of the gradients as
    they are stored.
    """
    w_v, _, w_h, _, w_vh, _, w_o, _ = layer.weights
    grad_horizontal = channels_last(grad_horizontal)
    window_v, window_h = layer.window(VERTICAL), layer.window(HORIZONTAL)
    grad_v, grad_h, gate_v = (empty_channels_last(features, features.shape[1]) for _ in range(3))
    gated_h = empty_channels_last(layer.vertical, layer.channels)
    through = (grad_horizontal, taps_by_input(w_o, POINT), layer.channels)
    written = (features, gated_h, grad_h, None)
    backward = gated_masked_conv_backward_kernel
    _launch(backward, layer, HORIZONTAL, features, (None, through, *written))
    through = (grad_h, taps_by_input(w_vh, POINT), 2 * layer.channels)
    written = (features, None, gate_v, grad_v)
    grad_vertical = channels_last(grad_vertical)
    _launch(backward, layer, VERTICAL, features, (grad_vertical, through, *written))
    residual = grad_horizontal if layer.residual else None
    back, d = -layer.dilation, layer.dilation
    total_h = grad_h.sum(dim=(0, 2, 3))
    grad_x: list[Tensor | None] = [None, None]
    if wanted[0]:
        grad_x[0] = convolve(grad_v, taps_by_input(w_v, window_v), None, window_v, back)
    if wanted[1]:
        grad_x[1] = convolve(grad_h, taps_by_input(w_h, window_h), None, window_h, back, residual)
    return [
        *grad_x,
        *_added_gradients(layer, gate_v, grad_h, wanted[2]),
        *(weight_gradient(grad_v, layer.vertical, window_v, d), grad_v.sum(dim=(0, 2, 3))),
        *(weight_gradient(grad_h, layer.horizontal, window_h, d), total_h),
        *(weight_gradient(grad_h, features, POINT, 1), total_h.clone()),
        *(weight_gradient(grad_horizontal, gated_h, POINT, 1), grad_horizontal.sum(dim=(0, 2, 3))),
    ]


def _added_gradients(
    layer: Layer, gate_v: Tensor, gate_h: Tensor, wanted: bool
) -> list[Tensor | None]:
    """To the class bias, the condition and its weight, from both stacks' features."""
    grads: list[Tensor | None] = [None, None, None]
    if layer.class_bias is not None:
        grads[0] = torch.cat([gate.sum(dim=(2, 3)) for gate in (gate_v, gate_h)], dim=1)
    if layer.condition is not None:
        assert layer.condition_weight is not None
        condition = channels_last(layer.condition)
        added = None
        halves = zip((gate_v, gate_h), layer.condition_weight.chunk(2)) if wanted else ()
        for gate, weight in halves:
            added = convolve(gate, taps_by_input(weight, POINT), None, POINT, 1, added)
        grads[1] = added
        grads[2] = torch.cat(
            [weight_gradient(gate, condition, POINT, 1) for gate in (gate_v, gate_h)]
        )
    return grads


def _launch(
    kernel: Any, layer: Layer, stack: int, features: Tensor, own_arguments: tuple[Any, ...]
) -> None:
    """One kernel over one stack; a (tensor, packed weight, channels) gets its number of steps."""
    batch, channels, height, width = layer.vertical.shape
    pixels = batch * height * width
    condition = 0 if layer.condition is None else layer.condition.shape[1]
    # Both halves of at least 16 gated channels stand side by side in a block.
    name = "gate" if kernel is gated_masked_conv_kernel else "gate_backward"
    tiles = tiles_for(name, features, (pixels, 2 * max(LEAST_BLOCK, channels), channels))
    block_c = tiles.columns // 2
    window = layer.window(stack)

    def steps(size: int) -> int:
        return triton.cdiv(size, tiles.depth)

    x = channels_last(layer.vertical if stack == VERTICAL else layer.horizontal)
    weight, bias = layer.weights[2 * stack : 2 * stack + 2]
    own = (x, taps_by_output(weight, window), bias.contiguous(), window.taps * steps(channels))
    link = (features, *layer.packed(4), steps(2 * channels))
    mapped = None
    if layer.condition is not None:
        assert layer.condition_weight is not None
        packed = layer.condition_weight.flatten(1).contiguous()
        mapped = (channels_last(layer.condition), packed, steps(condition))
    class_bias = None if layer.class_bias is None else layer.class_bias.contiguous()
    own_arguments = tuple(
        (*value[:2], steps(value[2])) if isinstance(value, tuple) else value
        for value in own_arguments
    )
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(pixels, tiles.rows) * triton.cdiv(channels, block_c),)](
            *(own, link, class_bias, mapped, _dropout(layer)),
            *own_arguments,
            *(pixels, height, width, layer.dilation),
            CHANNELS=channels,
            CONDITION_CHANNELS=condition,
            TAPS=window.taps,
            KERNEL_WIDTH=window.width,
            UP=window.up,
            STACK=stack,
            HAS_CLASS=class_bias is not None,
            DROPS=layer.seed is not None,
            BLOCK_P=tiles.rows,
            BLOCK_C=block_c,
            BLOCK_D=tiles.depth,
            **launch_options(x, tiles),
        )


def _dropout(layer: Layer) -> tuple[Tensor, int, float] | None:
    """Seed, the least 32-bit number that is kept, and what is kept's factor."""
    if layer.seed is None:
        return None
    kept = max(1.0 - layer.dropout, 2.0**-32)
    return layer.seed, int(layer.dropout * 2**32 + 0.5), 1.0 / kept
