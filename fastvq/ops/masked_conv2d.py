"""masked_conv2d: the convolution that sees only earlier pixels in raster order.

Masked taps are never loaded, multiplied or given a gradient. On CPUs C++ kernels run over the live
taps in one pass (`live_taps`); elsewhere PyTorch's convolutions run over the rectangles that the
mask leaves (`live_rectangles`). `_faster_than_cpp` says which it is by default.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastvq.reference import masked_conv2d as reference

from . import checks, live_rectangles, live_taps
from .backends import CPU_EXTENSION, choose, prefer_torch
from .registration import register

MASK_TYPES = ("A", "B")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    dilation: int = 1,
    groups: int = 1,
    channel_groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """'Same'-padded convolution that sees only earlier pixels in raster order.

        y[b, o, i, j] = bias[o] + Σ_{live (u, v)} Σ_c weight[o, c, u, v] ·
                        x[b, c, i + dilation·(u − kh//2), j + dilation·(v − kw//2)]

    A tap is live if it lies before the centre in raster order (mask type "A"), or is the
    centre too ("B"). Masked taps contribute nothing, whatever they hold, and receive zero
    gradient. Under autocast the inputs are cast as for `torch.nn.functional.conv2d`.

    With `channel_groups` n > 1 the channels of a pixel come one after the other, as a picture's
    red, green and blue do for n = 3: x's and y's channels form n equal, contiguous groups, and at
    the centre tap y's group q sees x's groups 0 … q − 1 ("A") or 0 … q ("B").

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 or float64; any strides; B may be 0.
        weight: (O, C / groups, kh, kw), kh and kw odd, of x's dtype.
        bias: (O,) or None.
        mask_type: "A" or "B".
        dilation: distance between taps in pixels, ≥ 1.
        groups: as in `torch.nn.functional.conv2d`; divides C and O.
        channel_groups: groups of channels that are ordered; divides C and O, and is 1 where
            `groups` is not.
        backend: "triton" and "cpp" run the GPU's and the C++ kernels; "reference" adds the live
            taps one by one; None takes the kernels, or PyTorch's convolution over the live
            rectangles where that is faster or the only one that can run (`fastvq.ops.explain` says
            which).
    Returns:
        (B, O, H, W) of x's dtype, channels_last where x is. Sums are taken in float32 and rounded
        once ("cpp"), in one order whatever the number of threads. PyTorch's convolutions on a GPU
        are held to deterministic algorithms, none chosen by timing, whatever
        `torch.backends.cudnn` says. Differentiable once in x, weight and bias.
    Raises:
        ValueError: shapes disagree, an even kernel, or an unknown option.
        TypeError: not tensors, or dtypes differ.
        RuntimeError: the backend asked for cannot run this call.
    van den Oord et al. 2016, arXiv:1601.06759, sec. 3.4; channels in order: sec. 3.3.
    """
    op = "masked_conv2d"
    check_convolution(op, x, weight, bias, mask_type, dilation, groups, spatial=2)
    _check_channel_groups(op, x, weight, groups, channel_groups)
    return convolve(op, x, weight, bias, mask_type, dilation, groups, channel_groups, backend)


def convolve(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    dilation: int,
    groups: int,
    channel_groups: int,
    backend: str | None,
) -> Tensor:
    """`masked_conv2d` of arguments that are checked, on behalf of `op`."""
    if backend == "reference":
        return reference.masked_conv2d(
            x,
            weight,
            bias,
            mask_type=mask_type,
            dilation=dilation,
            groups=groups,
            channel_groups=channel_groups,
        )
    x, weight, bias = _under_autocast(x, weight, bias)
    check_same_dtype(op, x, weight, bias)
    chosen = choose(op, backend, x, weight)
    if chosen == "triton" and channel_groups > 1:
        if backend == "triton":
            raise RuntimeError(
                f'{op}: backend="triton" cannot run: its kernels do not order channels, and '
                f"channel_groups is {channel_groups}. Use backend=None to let fastvq choose."
            )
        chosen = "reference"
    return _MaskedConv2d.apply(x, weight, bias, mask_type, dilation, groups, channel_groups, chosen)


def check_convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    dilation: int,
    groups: int,
    *,
    spatial: int,
) -> None:
    """Shapes and options of a masked convolution with one or two spatial dimensions."""
    layout, kernel = ("(B, C, H, W)", "kh, kw") if spatial == 2 else ("(B, C, T)", "k")
    checks.check_float(op, "x", x)
    checks.check_float(op, "weight", weight)
    if x.dim() != spatial + 2:
        raise ValueError(f"{op}: x must be {layout}; got {checks.shape(x)}.")
    checks.check_int(op, "groups", groups)
    if x.shape[1] % groups:
        raise ValueError(
            f"{op}: groups must divide the {x.shape[1]} channels of x {checks.shape(x)}; "
            f"got {groups}."
        )
    inputs = x.shape[1] // groups
    if weight.dim() != spatial + 2 or weight.shape[1] != inputs:
        raise ValueError(
            f"{op}: weight must be (O, {inputs}, {kernel}) to match x {checks.shape(x)}"
            f"{f' in {groups} groups' if groups > 1 else ''}; got {checks.shape(weight)}."
        )
    if weight.shape[0] % groups:
        raise ValueError(
            f"{op}: groups must divide the {weight.shape[0]} output channels of weight "
            f"{checks.shape(weight)}; got {groups}."
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
    checks.check_int(op, "dilation", dilation)


def _check_channel_groups(
    op: str, x: Tensor, weight: Tensor, groups: int, channel_groups: int
) -> None:
    checks.check_int(op, "channel_groups", channel_groups)
    if channel_groups > 1 and groups > 1:
        raise ValueError(
            f"{op}: channel_groups must be 1 where groups is not, since groups never see each "
            f"other; got channel_groups={channel_groups} with groups={groups}."
        )
    if x.shape[1] % channel_groups or weight.shape[0] % channel_groups:
        raise ValueError(
            f"{op}: channel_groups must divide the {x.shape[1]} input and {weight.shape[0]} output "
            f"channels; got {channel_groups}."
        )


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


_HAS_AVX2 = CPU_EXTENSION is not None and "avx2" in CPU_EXTENSION.isa_available()
# With groups, the C++ kernels run one convolution after the other: below this many channels in
# each, PyTorch was faster. Measured on a 2-core Zen 4, float32 and bfloat16, 64 and 256 channels in
# 4 … 64 groups. Without groups the C++ kernels were faster at every shape tried, 1×1 to 7×7 and 1
# to 512 channels, with AVX-512 and with AVX2; with 16-byte vectors they were slower.
_LEAST_OF_GROUP = {"contiguous": 2, "channels_last": 16}


def _faster_than_cpp(x: Tensor, weight: Tensor) -> str | None:
    """Why PyTorch's convolutions are faster than the C++ kernels here; None where they are not."""
    if os.environ.get("FASTVQ_CPU_ISA") == "generic" or not _HAS_AVX2:
        return "without AVX2 its kernels have 16-byte vectors"
    channels = weight.shape[1]
    layout = "channels_last" if x.stride(1) == 1 and not x.is_contiguous() else "contiguous"
    if channels < x.shape[1] and channels < _LEAST_OF_GROUP[layout]:
        return f"groups of {channels} {layout} channels are too small for its kernels"
    return None


for _op in ("masked_conv2d", "causal_conv1d"):
    prefer_torch(_op, "cpp", _faster_than_cpp)


def _empty_like(x: Tensor, channels: int) -> Tensor:
    """An output for x, in x's memory format: channels_last, else contiguous."""
    last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.empty(
        (x.shape[0], channels, *x.shape[2:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    dilation: int,
    groups: int,
    channel_groups: int,
    backend: str,
) -> Tensor:
    y = _empty_like(x, weight.shape[0])
    if backend == "triton":
        from fastvq.kernels.triton.masked_conv2d import masked_conv2d_forward

        return _in_format_of(y, masked_conv2d_forward(x, weight, bias, mask_type, dilation))
    if backend == "cpp":
        taps = live_taps.masked_taps((weight.shape[2], weight.shape[3]), dilation)
        parts, _ = live_taps.masked_parts(
            mask_type, groups, channel_groups, x.shape[1], weight.shape[0]
        )
        live_taps.forward(x, weight, bias, y, taps, parts)
    else:
        mask = live_rectangles.Mask(mask_type, dilation, groups, channel_groups)
        live_rectangles.forward(x, weight, bias, mask, y)
    return y


def _in_format_of(like: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides of `like`, which it is copied to where its own differ."""
    return value if value.stride() == like.stride() else like.copy_(value)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    dilation: int,
    groups: int,
    channel_groups: int,
    backend: str,
) -> Tensor:
    return _empty_like(x, weight.shape[0])


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_type: str,
    dilation: int,
    groups: int,
    channel_groups: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias; one that is not wanted is empty."""
    grad_x, grad_weight, grad_bias = _backward_fake(
        grad, x, weight, mask_type, dilation, groups, channel_groups, wanted, backend
    )
    if backend == "triton":
        from fastvq.kernels.triton import masked_conv2d as kernels

        if wanted[0]:
            found = kernels.masked_conv2d_backward_x(grad, weight, mask_type, dilation)
            grad_x = _in_format_of(grad_x, found)
        if wanted[1]:
            size = (weight.shape[2], weight.shape[3])
            found = kernels.masked_conv2d_backward_weight(grad, x, size, mask_type, dilation)
            grad_weight = _in_format_of(grad_weight, found)
    elif backend == "cpp":
        grad_weight.zero_()
        taps = live_taps.masked_taps((weight.shape[2], weight.shape[3]), dilation)
        parts, parts_of_x = live_taps.masked_parts(
            mask_type, groups, channel_groups, x.shape[1], weight.shape[0]
        )
        if wanted[0]:
            live_taps.backward_x(grad, weight, grad_x, taps, parts_of_x)
        if wanted[1]:
            bias_too = grad_bias if wanted[2] else None
            live_taps.backward_weight(grad, x, grad_weight, bias_too, taps, parts)
    else:
        mask = live_rectangles.Mask(mask_type, dilation, groups, channel_groups)
        live_rectangles.backward(grad, x, weight, mask, grad_x.zero_(), grad_weight.zero_())
    if wanted[2] and not (backend == "cpp" and wanted[1]):
        torch.sum(grad, dim=(0, 2, 3), out=grad_bias)
    return grad_x, grad_weight, grad_bias


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask_type: str,
    dilation: int,
    groups: int,
    channel_groups: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty_like(x, x.shape[1]) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else x.new_empty(0),
        grad.new_empty(weight.shape[:1] if wanted[2] else (0,)),
    )


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: str | int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return torch.ops.fastvq.masked_conv2d(x, weight, bias, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        *mask, backend = ctx.options
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.fastvq.masked_conv2d_backward(grad, x, weight, *mask, wanted, backend)
        given = (one if want else None for one, want in zip(grads, wanted))
        return (*given, *(None for _ in ctx.options))


register(
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, str mask_type, int dilation, "
    "int groups, int channel_groups, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
register(
    "masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, str mask_type, int dilation, "
    "int groups, int channel_groups, bool[3] wanted, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _vendor_is_faster(x: Tensor, weight: Tensor) -> str | None:
    """Why cuDNN over the live taps should run a call that the Triton kernels could."""
    from fastvq.kernels.triton.masked_conv2d_tiles import vendor_is_faster

    if not x.is_cuda or not vendor_is_faster(x, weight, torch.cuda.get_device_capability(x.device)):
        return None
    return (
        f"predicted, not measured, for a weight of {checks.shape(weight)} "
        f"(kernels/triton/configs/masked_conv2d.json)"
    )


for _op in ("masked_conv2d", "causal_conv1d"):
    prefer_torch(_op, "triton", _vendor_is_faster)
