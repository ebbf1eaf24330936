"""Launchers of the masked convolution in Triton: values, and gradients to x and to the weight.

    y[b, o, i, j] = bias[o] + Σ_{live (u, v)} Σ_c weight[o, c, u, v] ·
                    x[b, c, i + dilation·(u − kh//2), j + dilation·(v − kw//2)]

Each direction is one matrix product whose operands are gathered on the way in: nothing the size of
(pixels × taps) is written. The gradient to x is the same kernel with flipped taps. A causal
convolution of sequences is the case of height 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .masked_conv2d_taps import add_taps, first_pixel, places
from .masked_conv2d_tiles import Tiles, arithmetic_of, choose_tiles
from .masked_conv2d_weight import masked_conv2d_grad_weight_kernel, masked_conv2d_sum_parts_kernel

# How the matrix product forms products of float32; of 16-bit numbers they are exact.
PRECISIONS = {"half": "ieee", "tf32": "tf32", "float32": "tf32x3"}
# Elements of a block of the kernel that adds up the parts of the weight's gradient.
SUM_ELEMENTS = 1024
# Programs of the weight's gradient per multiprocessor: one wave, so that little is left to add.
PROGRAMS_PER_SM = 1
# CUDA's limit on the second dimension of a grid.
MOST_PARTS = 65535


@triton.jit
def masked_conv2d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    y_ptr,
    pixels,
    height,
    width,
    dilation,
    steps,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # A program owns BLOCK_P pixels and BLOCK_O output channels. On chip stays their sum over taps
    # and channels. Never written: padded pictures, masked weights, or one tap's share of the sum.
    COLUMN_BLOCKS: tl.constexpr = (OUT_CHANNELS + BLOCK_O - 1) // BLOCK_O
    block = tl.program_id(0)
    first = first_pixel(block // COLUMN_BLOCKS, BLOCK_P, pixels)
    place = places(first, BLOCK_P, pixels, height, width)
    o = block % COLUMN_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    total = add_taps(
        tl.zeros((BLOCK_P, BLOCK_O), tl.float32),
        *(x_ptr, weight_ptr, o % OUT_CHANNELS, place),
        *(dilation, OUT_CHANNELS * CHANNELS, steps),
        *(CHANNELS, TAPS, KERNEL_WIDTH, UP, BLOCK_C, PRECISION, STAGES, INTERPRETED),
    )
    if HAS_BIAS:
        total += tl.load(bias_ptr + o, mask=o < OUT_CHANNELS, other=0.0).to(tl.float32)[None, :]
    pixel = place[0]
    at = pixel[:, None] * OUT_CHANNELS + o[None, :]
    exists = (pixel < pixels)[:, None] & (o < OUT_CHANNELS)[None, :]
    if HAS_ADD:
        total += tl.load(add_ptr + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=exists)


class Window(NamedTuple):
    """The live taps of a kernel: in raster order, the first `taps` of `of`.

    `width` is the kernel's; `up` counts the rows before the one in line with the pixel.
    """

    taps: int
    of: int
    width: int
    up: int


def masked_window(kernel_size: tuple[int, int], mask_type: str) -> Window:
    height, width = kernel_size
    taps = height // 2 * width + width // 2 + (mask_type == "B")
    return Window(taps, height * width, width, height // 2)


def masked_conv2d_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, dilation: int
) -> Tensor:
    """The convolution's values.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16; any strides. channels_last is read as it
            lies, anything else copied to it first.
        weight: (O, C, kh, kw), odd kernel, of x's dtype; any strides. bias: (O,) or None.
        mask_type: "A" or "B". dilation: ≥ 1.
    Returns:
        (B, O, H, W) of x's dtype, channels_last.
    """
    window = masked_window(weight.shape[2:], mask_type)
    return convolve(x, taps_by_output(weight, window), bias, window, dilation)


def masked_conv2d_backward_x(grad: Tensor, weight: Tensor, mask_type: str, dilation: int) -> Tensor:
    """Gradient to x, (B, C, H, W) of grad's dtype, channels_last; arguments as the forward's."""
    window = masked_window(weight.shape[2:], mask_type)
    return convolve(grad, taps_by_input(weight, window), None, window, -dilation)


def masked_conv2d_backward_weight(
    grad: Tensor, x: Tensor, kernel_size: tuple[int, int], mask_type: str, dilation: int
) -> Tensor:
    """Gradient to the weight, (O, C, kh, kw) of x's dtype, contiguous; zero at masked taps."""
    found = weight_gradient(grad, x, masked_window(kernel_size, mask_type), dilation)
    return found.view(*found.shape[:2], *kernel_size)


def taps_by_output(weight: Tensor, window: Window) -> Tensor:
    """The live taps as (taps, O, C)."""
    return weight.flatten(2)[:, :, : window.taps].permute(2, 0, 1).contiguous()


def taps_by_input(weight: Tensor, window: Window) -> Tensor:
    """The live taps as (taps, C, O)."""
    return weight.flatten(2)[:, :, : window.taps].permute(2, 1, 0).contiguous()


def convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    window: Window,
    dilation: int,
    add: Tensor | None = None,
) -> Tensor:
    """Σ over the live taps, the bias and `add`; the kernel is flipped where the dilation is < 0.

    Args:
        x: (B, C, H, W), any strides.
        packed: (taps, columns, C).
        add: (B, columns, H, W) or None, any strides.
    Returns:
        (B, columns, H, W), channels_last.
    """
    taps, columns, channels = packed.shape
    y = empty_channels_last(x, columns)
    if y.numel() == 0:
        return y
    if taps == 0 or channels == 0:
        return y.zero_() if bias is None else y.copy_(bias[:, None, None].expand_as(y))
    x = channels_last(x)
    batch, _, height, width = x.shape
    pixels = batch * height * width
    tiles = tiles_for("convolution", x, (pixels, columns, channels))
    blocks = triton.cdiv(pixels, tiles.rows) * triton.cdiv(columns, tiles.columns)
    with torch.cuda.device_of(x):
        masked_conv2d_kernel[(blocks,)](
            *(x, packed, None if bias is None else bias.contiguous()),
            *(None if add is None else channels_last(add), y),
            *(pixels, height, width, dilation),
            taps * triton.cdiv(channels, tiles.depth),
            CHANNELS=channels,
            OUT_CHANNELS=columns,
            TAPS=taps,
            KERNEL_WIDTH=window.width,
            UP=window.up,
            HAS_BIAS=bias is not None,
            HAS_ADD=add is not None,
            BLOCK_P=tiles.rows,
            BLOCK_O=tiles.columns,
            BLOCK_C=tiles.depth,
            **launch_options(x, tiles),
        )
    return y


def weight_gradient(grad: Tensor, x: Tensor, window: Window, dilation: int) -> Tensor:
    """Gradient to the kernel, (O, C, all its taps) of x's dtype; zero at taps that are not live."""
    out_channels, channels = grad.shape[1], x.shape[1]
    size = (out_channels, channels, window.of)
    grad_weight = torch.empty(size, dtype=x.dtype, device=x.device)
    if window.taps == 0 or x.numel() == 0 or grad.numel() == 0:
        return grad_weight.zero_()
    grad, x = channels_last(grad), channels_last(x)
    height, width = x.shape[2:]
    pixels = len(x) * height * width
    tiles = tiles_for("grad_weight", x, (out_channels, channels, pixels))
    group = min(tiles.taps, window.taps)
    blocks = triton.cdiv(window.taps, group)
    blocks *= triton.cdiv(out_channels, tiles.rows) * triton.cdiv(channels, tiles.columns)
    steps = triton.cdiv(pixels, tiles.depth)
    parts = min(steps, triton.cdiv(_wanted_programs(x), blocks), MOST_PARTS)
    steps_per_part = triton.cdiv(steps, parts)
    parts = triton.cdiv(steps, steps_per_part)
    partial = torch.empty(
        (parts, window.taps, out_channels, channels), dtype=torch.float32, device=x.device
    )
    with torch.cuda.device_of(x):
        masked_conv2d_grad_weight_kernel[(blocks, parts)](
            *(grad, x, partial, pixels, height, width, dilation, steps_per_part),
            *(tiles.depth // width % height, tiles.depth % width),
            OUT_CHANNELS=out_channels,
            CHANNELS=channels,
            TAPS=window.taps,
            KERNEL_WIDTH=window.width,
            UP=window.up,
            GROUP=group,
            BLOCK_O=tiles.rows,
            BLOCK_C=tiles.columns,
            BLOCK_P=tiles.depth,
            **launch_options(x, tiles),
        )
        _sum_parts(partial, grad_weight)
    return grad_weight


def _wanted_programs(x: Tensor) -> int:
    if not x.is_cuda:
        return 2
    properties = torch.cuda.get_device_properties(x.device)
    return PROGRAMS_PER_SM * int(properties.multi_processor_count)


def _sum_parts(partial: Tensor, grad_weight: Tensor) -> None:
    """Add the parts in their order; zeros where a tap is not live."""
    parts, taps, out_channels, channels = partial.shape
    kernel_taps = grad_weight.shape[2]
    block_t = triton.next_power_of_2(kernel_taps)
    block_c = max(1, min(SUM_ELEMENTS // block_t, triton.next_power_of_2(channels)))
    masked_conv2d_sum_parts_kernel[(out_channels, triton.cdiv(channels, block_c))](
        *(partial, grad_weight, parts),
        OUT_CHANNELS=out_channels,
        CHANNELS=channels,
        TAPS=taps,
        KERNEL_TAPS=kernel_taps,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        enable_fp_fusion=True,
    )


def tiles_for(kernel: str, x: Tensor, size: tuple[int, int, int]) -> Tiles:
    return choose_tiles(kernel, arithmetic_of(x), _capability(x), size)


def _capability(x: Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def launch_options(x: Tensor, tiles: Tiles) -> dict[str, object]:
    return {
        "PRECISION": PRECISIONS[arithmetic_of(x)],
        "STAGES": tiles.stages,
        "INTERPRETED": not x.is_cuda,
        "num_warps": tiles.warps,
        "enable_fp_fusion": True,
    }


def channels_last(x: Tensor) -> Tensor:
    """The same numbers with a pixel's channels side by side, pixels one after the other."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(x: Tensor, channels: int) -> Tensor:
    size = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
