"""The four convolutions of a gated PixelCNN layer, each over its live taps, forward and back.

Results can be added onto a tensor that is there, which spares the layer its additions. Backend
"cpp" is `live_taps`, at every shape: no padding, any strides. In float32 rectangles of taps take
fewer products by Winograd's minimal filtering, 12 for 24 at kernel size 3 and 24 for 60 at 5; their
rounding errors are some two to four times those of plain sums. Elsewhere PyTorch's convolution runs
over the padded and cropped input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import live_taps
from .repeatable import repeatable


class Convolution(NamedTuple):
    """A stride-1 convolution whose tap (u, v) reads the pixel (i + up + u·d, j + left + v·d).

    Pixels outside the picture are zero. Columns from `columns` on are masked.
    """

    weight: Tensor  # (O, C, rows, k)
    columns: int
    up: int
    left: int
    dilation: int
    backend: str

    def forward(self, x: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """(B, O, H, W): bias + convolution of x (+ onto, which is overwritten); channels_last."""
        if self.backend == "cpp":
            y = _pixels(x, self.weight.shape[0]) if onto is None else onto
            parts, _ = self._parts
            added = onto is not None
            live_taps.forward(x, self.weight, bias, y, self._taps, parts, add=added, winograd=True)
            return y
        with repeatable(x.device):
            y = F.conv2d(self._seen(x), self._live_weight, bias, dilation=self.dilation)
        return channels_last(y) if onto is None else onto.add_(y)

    def backward_x(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """(B, C, H, W): the gradient to x (+ onto, which is overwritten); channels_last."""
        if self.backend == "cpp":
            grad_x = _pixels(grad, self.weight.shape[1]) if onto is None else onto
            _, parts = self._parts
            added = onto is not None
            live_taps.backward_x(
                grad, self.weight, grad_x, self._taps, parts, add=added, winograd=True
            )
            return grad_x
        x = _pixels(grad, self.weight.shape[1])
        grad_seen, _ = self._convolution_backward(grad, self._seen(x), (True, False))
        grad_x = self._unseen(grad_seen, x)
        return channels_last(grad_x) if onto is None else onto.add_(grad_x)

    def backward_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """(O, C, rows, k), zero where masked."""
        if self.backend == "cpp":
            grad_weight = torch.zeros(
                self.weight.shape, dtype=self.weight.dtype, device=self.weight.device
            )
            parts, _ = self._parts
            live_taps.backward_weight(grad, x, grad_weight, None, self._taps, parts, winograd=True)
            return grad_weight
        _, grad_weight = self._convolution_backward(grad, self._seen(x), (False, True))
        return F.pad(grad_weight, (0, self.weight.shape[3] - self.columns))

    @property
    def _live_weight(self) -> Tensor:
        return self.weight[..., : self.columns].contiguous()

    @property
    def _taps(self) -> tuple[live_taps.Tap, ...]:
        return live_rectangle(self.weight.shape[2], self.columns, self.up, self.left, self.dilation)

    @property
    def _parts(self) -> tuple[tuple[live_taps.Part, ...], tuple[live_taps.Part, ...]]:
        out, inputs = (0, self.weight.shape[0]), (0, self.weight.shape[1])
        return (live_taps.Part(out, inputs, (0, 0)),), (live_taps.Part(inputs, out, (0, 0)),)

    def _edges(self, x: Tensor) -> tuple[int, int, int, int]:
        """What the window adds left, right, above and below; below zero, what it cuts off."""
        rows, d = self.weight.shape[2], self.dilation
        right, below = self.left + (self.columns - 1) * d, self.up + (rows - 1) * d
        return -self.left, max(right, -x.shape[3]), -self.up, max(below, -x.shape[2])

    def _seen(self, x: Tensor) -> Tensor:
        """x under the kernel's window, with the zeros outside the picture."""
        rows, d = self.weight.shape[2], self.dilation
        shown = F.pad(x, self._edges(x))
        return channels_last(
            shown[:, :, : x.shape[2] + (rows - 1) * d, : x.shape[3] + (self.columns - 1) * d]
        )

    def _unseen(self, grad_seen: Tensor, x: Tensor) -> Tensor:
        """The transpose of `_seen`."""
        left, right, above, below = self._edges(x)
        height, width = x.shape[2] + above + below, x.shape[3] + left + right
        missing = (0, width - grad_seen.shape[3], 0, height - grad_seen.shape[2])
        return F.pad(F.pad(grad_seen, missing), (-left, -right, -above, -below))

    def _convolution_backward(self, grad: Tensor, seen: Tensor, wanted: tuple[bool, bool]) -> Any:
        with repeatable(grad.device):
            grads = torch.ops.aten.convolution_backward(
                *(grad, seen, self._live_weight, None),
                *([1, 1], [0, 0], [self.dilation, self.dilation]),
                *(False, [0, 0], 1),
                [*wanted, False],
            )
        return grads[:2]


def live_rectangle(
    rows: int, columns: int, up: int, left: int, dilation: int
) -> tuple[live_taps.Tap, ...]:
    """The taps of a rectangle as the C++ kernels take them."""
    return tuple(
        live_taps.Tap(u, v, up + u * dilation, left + v * dilation)
        for u in range(rows)
        for v in range(columns)
    )


def pointwise(weight: Tensor, backend: str) -> Convolution:
    """A 1×1 convolution."""
    return Convolution(weight, 1, 0, 0, 1, backend)


def channels_last(x: Tensor) -> Tensor:
    """The same numbers with the channels of a pixel side by side, where sizes are 1 too."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _pixels(like: Tensor, channels: int) -> Tensor:
    """Uninitialised (B, channels, H, W), channels_last."""
    batch, _, height, width = like.shape
    return like.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
