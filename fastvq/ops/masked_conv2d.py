"""masked_conv2d: the convolution that sees only earlier pixels in raster order.

The taps that the mask leaves form two rectangles: the full-width rows above the centre, and
the left part of the centre's own row. By default each runs as one ordinary convolution over
that rectangle alone, so masked taps are never loaded, multiplied or given a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.reference import masked_conv2d as reference

from . import checks
from .backends import choose
from .registration import register

MASK_TYPES = ("A", "B")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """'Same'-padded convolution that sees only earlier pixels in raster order.

        y[b, o, i, j] = bias[o] + Σ_{live (u, v)} Σ_c weight[o, c, u, v] ·
                        x[b, c, i + dilation·(u − kh//2), j + dilation·(v − kw//2)]

    A tap is live if it lies before the centre in raster order (mask type "A"), or is the
    centre too ("B"). Masked taps contribute nothing, whatever they hold, and receive zero
    gradient. Under autocast the inputs are cast as for `torch.nn.functional.conv2d`.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 or float64; any strides; B may be 0.
        weight: (O, C, kh, kw), kh and kw odd, of x's dtype.
        bias: (O,) or None.
        mask_type: "A" or "B".
        dilation: distance between taps in pixels, ≥ 1.
        backend: "triton" or "reference", which adds the live taps one by one; None chooses,
            and where no kernel is faster runs PyTorch's convolution over the live rectangles
            (see `fastvq.ops.explain`).
    Returns:
        (B, O, H, W) of x's dtype; channels_last from "triton". Differentiable once in x, weight
        and bias.
    Raises:
        ValueError: shapes disagree, an even kernel, or an unknown option.
        TypeError: not tensors, or dtypes differ.
        RuntimeError: the backend asked for cannot run this call.
    van den Oord et al. 2016, arXiv:1601.06759, sec. 3.4.
    """
    op = "masked_conv2d"
    check_convolution(op, x, weight, bias, mask_type, dilation, spatial=2)
    chosen = choose(op, backend, x, weight)
    if backend == "reference":
        return reference.masked_conv2d(x, weight, bias, mask_type=mask_type, dilation=dilation)
    x, weight, bias = _under_autocast(x, weight, bias)
    check_same_dtype(op, x, weight, bias)
    return _MaskedConv2d.apply(x, weight, bias, mask_type, dilation, chosen)


def check_convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    dilation: int,
    *,
    spatial: int,
) -> None:
    """Shapes and options of a masked convolution with one or two spatial dimensions."""
    layout, kernel = ("(B, C, H, W)", "kh, kw") if spatial == 2 else ("(B, C, T)", "k")
    checks.check_float(op, "x", x)
    checks.check_float(op, "weight", weight)
    if x.dim() != spatial + 2:
        raise ValueError(f"{op}: x must be {layout}; got {checks.shape(x)}.")
    if weight.dim() != spatial + 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weight must be (O, {x.shape[1]}, {kernel}) to match x {checks.shape(x)}; "
            f"got {checks.shape(weight)}."
        )
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(
            f"{op}: weight must have an odd kernel, so that it has a centre; got "
            f"{checks.shape(weight)}."
        )
    checks.check_device(op, "weight", weight, x)
    if bias is not None:
        checks.check_float(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias must be ({weight.shape[0]},) to match weight "
                f"{checks.shape(weight)}; got {checks.shape(bias)}."
            )
        checks.check_device(op, "bias", bias, x)
    checks.check_choice(op, "mask_type", mask_type, MASK_TYPES)
    checks.check_positive_int(op, "dilation", dilation)


def check_same_dtype(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of x ({x.dtype}); got {tensor.dtype}. "
                f"Convert one of them, or run under torch.autocast."
            )


def _under_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs in autocast's dtype where it is on, as PyTorch's convolutions take them."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _Rectangle(NamedTuple):
    """One rectangle of live taps and the part of the padded picture it slides over."""

    rows: slice  # of the kernel
    columns: slice
    above: int  # zero rows to put above the picture
    left: int  # zero columns to put left of it
    right: int
    height: int  # rows and columns of the padded picture that the taps visit
    width: int


def _live_rectangles(x: Tensor, weight: Tensor, mask_type: str, d: int) -> Iterator[_Rectangle]:
    height, width = x.shape[2:]
    kernel_height, kernel_width = weight.shape[2:]
    up, side = kernel_height // 2, kernel_width // 2
    if up:
        yield _Rectangle(
            slice(0, up),
            slice(None),
            *(up * d, side * d, side * d),
            *(height + (up - 1) * d, width + 2 * side * d),
        )
    live = side + (mask_type == "B")
    if live:
        yield _Rectangle(
            slice(up, up + 1),
            slice(0, live),
            *(0, side * d, 0),
            *(height, width + (live - 1) * d),
        )


def _seen(x: Tensor, part: _Rectangle) -> Tensor:
    padded = F.pad(x, (part.left, part.right, part.above, 0))
    return padded[:, :, : part.height, : part.width]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, dilation: int, backend: str
) -> Tensor:
    if backend == "triton":
        from fastvq.kernels.triton.masked_conv2d import masked_conv2d_forward

        return masked_conv2d_forward(x, weight, bias, mask_type, dilation)
    y: Tensor | None = None
    for part in _live_rectangles(x, weight, mask_type, dilation):
        taps = weight[:, :, part.rows, part.columns]
        term = F.conv2d(_seen(x, part), taps, bias if y is None else None, dilation=dilation)
        y = term if y is None else y + term
    if y is None:  # a 1×1 kernel of type "A" has no live tap
        y = _forward_fake(x, weight, bias, mask_type, dilation, backend).zero_()
        if bias is not None:
            y += bias[:, None, None]
    return y.contiguous()


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, dilation: int, backend: str
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return _empty(x, shape, backend)


def _empty(x: Tensor, shape: Sequence[int], backend: str) -> Tensor:
    layout = torch.channels_last if backend == "triton" else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask_type: str, dilation: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias."""
    if backend == "triton":
        from fastvq.kernels.triton import masked_conv2d as kernels

        return (
            kernels.masked_conv2d_backward_x(grad, weight, mask_type, dilation),
            kernels.masked_conv2d_backward_weight(grad, x, weight.shape[2:], mask_type, dilation),
            grad.sum(dim=(0, 2, 3)),
        )
    return _rectangles_backward(grad, x, weight, mask_type, dilation)


def _rectangles_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask_type: str, dilation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, each rectangle's put back where it was cut out."""
    height, width = x.shape[2:]
    grad_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    for part in _live_rectangles(x, weight, mask_type, dilation):
        taps = weight[:, :, part.rows, part.columns].contiguous()
        seen = _seen(x, part)
        grad_seen, grad_taps, _ = torch.ops.aten.convolution_backward(
            grad,
            seen,
            taps,
            None,
            *([1, 1], [0, 0], [dilation, dilation]),
            *(False, [0, 0], 1),
            [True, True, False],
        )
        grad_weight[:, :, part.rows, part.columns] = grad_taps
        # Undo _seen: put the rows and columns that were cut off back, then drop the padding.
        bottom = part.above + height - part.height
        right = part.left + width + part.right - part.width
        whole = F.pad(grad_seen, (0, right, 0, bottom))
        grad_x += whole[:, :, part.above :, part.left : part.left + width]
    return grad_x, grad_weight, grad.sum(dim=(0, 2, 3))


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.has_bias = options, bias is not None
        return torch.ops.fastvq.masked_conv2d(x, weight, bias, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.fastvq.masked_conv2d_backward(
            grad, x, weight, *ctx.options
        )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None, None


register(
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, str mask_type, int dilation, "
    "str backend) -> Tensor",
    _forward,
    _forward_fake,
)
register(
    "masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, str mask_type, int dilation, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, x, weight, mask_type, dilation, backend: (
        _empty(x, x.shape, backend),
        weight.new_empty(weight.shape),
        grad.new_empty(weight.shape[:1]),
    ),
)
