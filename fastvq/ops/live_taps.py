"""The C++ convolutions over live taps: what a mask leaves, as the data that the kernels take.

A mask leaves taps, and of the centre tap some channels. `forward`, `backward_x` and
`backward_weight` run any such set; which sets there are is up to the caller: `masked_taps` gives
those of mask types A and B.

With `winograd` rectangles of taps cost fewer products, in float32 and where that is faster
(kernels/cpu/masked_conv_winograd.h). Rounding errors are then some two to four times as large and
not bounded element by element.
"""

from __future__ import annotations

import functools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import CPU_EXTENSION
from .nearest_code import DTYPE_CODES


class Tap(NamedTuple):
    """One live tap: weight[:, :, u, v] meets the pixel (i + dy, j + dx)."""

    u: int
    v: int
    dy: int
    dx: int
    is_centre: bool = False


@functools.cache
def masked_taps(kernel: tuple[int, int], dilation: int) -> tuple[Tap, ...]:
    """The taps before the centre of an odd kernel in raster order, and the centre."""
    (height, width), taps = kernel, []
    up, left = height // 2, width // 2
    for u in range(up + 1):
        for v in range(width if u < up else left + 1):
            centre = (u, v) == (up, left)
            taps.append(Tap(u, v, dilation * (u - up), dilation * (v - left), centre))
    return tuple(taps)


class Part(NamedTuple):
    """Channels of a result that see the same: first and last + 1 of each range."""

    outputs: tuple[int, int]
    inputs: tuple[int, int]
    # Of the inputs, counted from their first: what the centre tap reads.
    centre: tuple[int, int]


@functools.cache
def masked_parts(
    mask_type: str, groups: int, channel_groups: int, in_channels: int, out_channels: int
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of the output, and the parts of x's gradient, which sums over output channels."""
    C, O = in_channels // groups, out_channels // groups  # noqa: E741
    sees_itself = mask_type == "B"
    forward, backward = [], []
    for g in range(groups):
        for q in range(channel_groups):
            c, o = C // channel_groups, O // channel_groups
            inputs, outputs = (g * C, (g + 1) * C), (g * O, (g + 1) * O)
            forward.append(
                Part(
                    (outputs[0] + q * o, outputs[0] + (q + 1) * o),
                    inputs,
                    (0, (q + sees_itself) * c),
                )
            )
            backward.append(
                Part(
                    (inputs[0] + q * c, inputs[0] + (q + 1) * c),
                    outputs,
                    ((q + 1 - sees_itself) * o, O),
                )
            )
    return tuple(forward), tuple(backward)


@functools.lru_cache(maxsize=256)
def _tap_data(
    taps: tuple[Tap, ...], strides: tuple[int, int], part: Part, direction: int
) -> array[int]:
    """What the kernel reads: dy, dx, weight offset, first and last channel of each tap."""
    every = (0, part.inputs[1] - part.inputs[0])
    data = array("q")
    for tap in taps:
        channels = part.centre if tap.is_centre else every
        if channels[0] < channels[1]:
            offset = tap.u * strides[0] + tap.v * strides[1]
            data.extend((direction * tap.dy, direction * tap.dx, offset, *channels))
    return data


def _arguments(
    x: Tensor, y: Tensor, weight: Tensor, taps: tuple[Tap, ...], part: Part, *, transposed: bool
) -> tuple[int, ...]:
    """How the C++ calls take one part; `transposed`: y is the gradient of the weight's input."""
    stride_o, stride_c, *kernel_strides = weight.stride()
    strides = (stride_c, stride_o) if transposed else (stride_o, stride_c)
    data = _tap_data(taps, (kernel_strides[0], kernel_strides[1]), part, -1 if transposed else 1)
    o, c = part.outputs[0], 0
    if transposed:
        o, c = part.inputs[0], part.outputs[0] % max(weight.shape[1], 1)
    size = x.element_size()
    return (
        DTYPE_CODES[x.dtype],
        x.shape[0],
        part.inputs[1] - part.inputs[0],
        part.outputs[1] - part.outputs[0],
        *x.shape[2:],
        x.data_ptr() + part.inputs[0] * x.stride(1) * size,
        *x.stride(),
        y.data_ptr() + part.outputs[0] * y.stride(1) * size,
        *y.stride(),
        weight.data_ptr() + (o * stride_o + c * stride_c) * size,
        *strides,
        data.buffer_info()[0],
        len(data) // 5,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    taps: tuple[Tap, ...],
    parts: tuple[Part, ...],
    *,
    add: bool = False,
    winograd: bool = False,
) -> None:
    """y (+)= bias + Σ_taps weight[:, :, u, v] · x, moved; all of one dtype, any strides."""
    assert CPU_EXTENSION is not None
    bias = None if bias is None else bias.contiguous()
    for part in parts:
        CPU_EXTENSION.masked_conv(
            *_arguments(x, y, weight, taps, part, transposed=False),
            0 if bias is None else bias[part.outputs[0] :].data_ptr(),
            add,
            winograd,
            torch.get_num_threads(),
        )


def backward_x(
    grad: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    taps: tuple[Tap, ...],
    parts: tuple[Part, ...],
    *,
    add: bool = False,
    winograd: bool = False,
) -> None:
    """grad_x (+)= Σ_taps weight[:, :, u, v]ᵀ · grad, moved back; `parts` of x's gradient."""
    assert CPU_EXTENSION is not None
    for part in parts:
        CPU_EXTENSION.masked_conv(
            *_arguments(grad, grad_x, weight, taps, part, transposed=True),
            *(0, add, winograd, torch.get_num_threads()),
        )


def backward_weight(
    grad: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    taps: tuple[Tap, ...],
    parts: tuple[Part, ...],
    *,
    winograd: bool = False,
) -> None:
    """grad_weight[:, :, u, v] = Σ grad · x, moved, for live taps alone: hand in zeros."""
    assert CPU_EXTENSION is not None
    for part in parts:
        CPU_EXTENSION.masked_conv_weight_gradient(
            *_arguments(x, grad, grad_weight, taps, part, transposed=False),
            0 if grad_bias is None else grad_bias[part.outputs[0] :].data_ptr(),
            winograd,
            torch.get_num_threads(),
        )
