"""Masked convolutions by PyTorch's own, run over the rectangles of live taps.

What a mask leaves are the full-width rows above the centre and the left part of the centre's own
row: each is an ordinary convolution, so masked taps are never loaded, multiplied or given a
gradient. Where channels are ordered, the centre tap is one more convolution for each group of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .repeatable import repeatable


class Mask(NamedTuple):
    """What a raw op is told of the mask and the channels."""

    mask_type: str
    dilation: int
    groups: int
    channel_groups: int


class _Rectangle(NamedTuple):
    """One rectangle of live taps and the part of the padded picture it slides over."""

    rows: slice  # of the kernel
    columns: slice
    above: int  # zero rows to put above the picture
    left: int  # zero columns to put left of it
    right: int
    height: int  # rows and columns of the padded picture that the taps visit
    width: int
    outputs: slice = slice(None)  # channels
    inputs: slice = slice(None)


def _live_rectangles(x: Tensor, weight: Tensor, mask: Mask) -> Iterator[_Rectangle]:
    channels, height, width = x.shape[1:]
    outputs, _, kernel_height, kernel_width = weight.shape
    up, side, d = kernel_height // 2, kernel_width // 2, mask.dilation
    sees_itself, n = mask.mask_type == "B", mask.channel_groups
    if up:
        yield _Rectangle(
            slice(0, up),
            slice(None),
            *(up * d, side * d, side * d),
            *(height + (up - 1) * d, width + 2 * side * d),
        )
    live = side + (sees_itself and n == 1)
    if live:
        yield _Rectangle(
            slice(up, up + 1),
            slice(0, live),
            *(0, side * d, 0),
            *(height, width + (live - 1) * d),
        )
    for q in range(0 if sees_itself else 1, n) if n > 1 else ():
        yield _Rectangle(
            *(slice(up, up + 1), slice(side, side + 1)),
            *(0, 0, 0, height, width),
            slice(q * outputs // n, (q + 1) * outputs // n),
            slice(0, (q + sees_itself) * channels // n),
        )


def _seen(x: Tensor, part: _Rectangle) -> Tensor:
    padded = F.pad(x[:, part.inputs], (part.left, part.right, part.above, 0))
    return padded[:, :, : part.height, : part.width]


def _taps(weight: Tensor, part: _Rectangle) -> Tensor:
    return weight[part.outputs, part.inputs, part.rows, part.columns]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask, y: Tensor) -> None:
    """Writes the convolution of x into y."""
    y.zero_() if bias is None else y.copy_(bias[:, None, None].expand_as(y))
    for part in _live_rectangles(x, weight, mask):
        seen, taps = _seen(x, part), _taps(weight, part)
        with repeatable(x.device):
            y[:, part.outputs] += F.conv2d(seen, taps, dilation=mask.dilation, groups=mask.groups)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Mask, grad_x: Tensor, grad_weight: Tensor
) -> None:
    """Adds the gradients to grad_x and grad_weight; one that is empty is not wanted.

    Each rectangle's gradient is put back where the rectangle was cut out.
    """
    height, width = x.shape[2:]
    wanted = [grad_x.numel() > 0, grad_weight.numel() > 0]
    for part in _live_rectangles(x, weight, mask) if any(wanted) else ():
        with repeatable(x.device):
            grad_seen, grad_taps, _ = torch.ops.aten.convolution_backward(
                grad[:, part.outputs],
                _seen(x, part),
                _taps(weight, part).contiguous(),
                None,
                *([1, 1], [0, 0], [mask.dilation, mask.dilation]),
                *(False, [0, 0], mask.groups),
                [*wanted, False],
            )
        if wanted[1]:
            _taps(grad_weight, part).add_(grad_taps)
        if wanted[0]:
            # Undo _seen: put the rows and columns that were cut off back, then drop the padding.
            bottom = part.above + height - part.height
            right = part.left + width + part.right - part.width
            whole = F.pad(grad_seen, (0, right, 0, bottom))
            grad_x[:, part.inputs] += whole[:, :, part.above :, part.left : part.left + width]
