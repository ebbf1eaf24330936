"""Launchers of the masked convolution in Triton: values, and gradients to x and to the weight.

    y[b, o, i, j] = bias[o] + Σ_{live (u, v)} Σ_c weight[o, c, u, v] ·
                    x[b, c, i + dilation·(u − kh//2), j + dilation·(v − kw//2)]

Each direction is one matrix product whose operands are gathered on the way in: nothing the size of
(pixels × taps) is written. The gradient to x is the same kernel with flipped taps. A causal
convolution of sequences is the case of height 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .masked_conv2d_taps import NOWHERE, add_taps, pixel_rows_columns
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
    # int64: pixels · channels passes 2³¹ for long batches.
    block = tl.program_id(0).to(tl.int64)
    pixel = block // COLUMN_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    o = (block % COLUMN_BLOCKS).to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    row, column = pixel_rows_columns(pixel, height, width)
    row = tl.where(pixel < pixels, row, NOWHERE)
    total = add_taps(
        tl.zeros((BLOCK_P, BLOCK_O), tl.float32),
        x_ptr,
        weight_ptr,
        pixel,
        o % OUT_CHANNELS,
        row,
        column,
        height,
        width,
        dilation,
        OUT_CHANNELS * CHANNELS,
        steps,
        CHANNELS,
        TAPS,
        KERNEL_WIDTH,
        UP,
        BLOCK_C,
        PRECISION,
        STAGES,
        INTERPRETED,
    )
    if HAS_BIAS:
        total += tl.load(bias_ptr + o, mask=o < OUT_CHANNELS, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + pixel[:, None] * OUT_CHANNELS + o[None, :]
    exists = (pixel < pixels)[:, None] & (o < OUT_CHANNELS)[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=exists)


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
    taps = _live_taps(weight, mask_type)
    packed = weight.flatten(2)[:, :, :taps].permute(2, 0, 1).contiguous()
    return _convolve(x, packed, bias, weight.shape[2:], dilation)


def masked_conv2d_backward_x(grad: Tensor, weight: Tensor, mask_type: str, dilation: int) -> Tensor:
    """Gradient to x, (B, C, H, W) of grad's dtype, channels_last; arguments as the forward's."""
    taps = _live_taps(weight, mask_type)
    packed = weight.flatten(2)[:, :, :taps].permute(2, 1, 0).contiguous()
    return _convolve(grad, packed, None, weight.shape[2:], -dilation)


def masked_conv2d_backward_weight(
    grad: Tensor, x: Tensor, kernel_size: tuple[int, int], mask_type: str, dilation: int
) -> Tensor:
    """Gradient to the weight, (O, C, kh, kw) of x's dtype, contiguous; zero at masked taps."""
    size = (grad.shape[1], x.shape[1], *kernel_size)
    grad_weight = torch.empty(size, dtype=x.dtype, device=x.device)
    taps = _live_taps(grad_weight, mask_type)
    if taps == 0 or x.numel() == 0 or grad.numel() == 0:
        return grad_weight.zero_()
    grad, x = _channels_last(grad), _channels_last(x)
    height, width = x.shape[2:]
    pixels = len(x) * height * width
    tiles = _tiles_for("grad_weight", x, (size[0], size[1], pixels))
    blocks = triton.cdiv(taps, tiles.taps)
    blocks *= triton.cdiv(size[0], tiles.rows) * triton.cdiv(size[1], tiles.columns)
    steps = triton.cdiv(pixels, tiles.depth)
    parts = min(steps, triton.cdiv(_wanted_programs(x), blocks), MOST_PARTS)
    steps_per_part = triton.cdiv(steps, parts)
    parts = triton.cdiv(steps, steps_per_part)
    partial = torch.empty((parts, taps, *size[:2]), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        masked_conv2d_grad_weight_kernel[(blocks, parts)](
            *(grad, x, partial, pixels, height, width, dilation, steps_per_part),
            *(tiles.depth // width % height, tiles.depth % width),
            OUT_CHANNELS=size[0],
            CHANNELS=size[1],
            TAPS=taps,
            KERNEL_WIDTH=kernel_size[1],
            UP=kernel_size[0] // 2,
            GROUP=tiles.taps,
            BLOCK_O=tiles.rows,
            BLOCK_C=tiles.columns,
            BLOCK_P=tiles.depth,
            **_options(x, tiles),
        )
        _sum_parts(partial, grad_weight)
    return grad_weight


def _wanted_programs(x: Tensor) -> int:
    if not x.is_cuda:
        return 2
    properties = torch.cuda.get_device_properties(x.device)
    return PROGRAMS_PER_SM * int(properties.multi_processor_count)


def _sum_parts(partial: Tensor, grad_weight: Tensor) -> None:
    """Add the parts in their order; zeros where a tap is masked."""
    parts, taps, out_channels, channels = partial.shape
    kernel_taps = grad_weight[0, 0].numel()
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


def _convolve(
    x: Tensor, packed: Tensor, bias: Tensor | None, kernel_size: tuple[int, ...], dilation: int
) -> Tensor:
    """Σ over the live taps, `packed` as (taps, columns, channels); flipped where dilation < 0."""
    taps, columns, channels = packed.shape
    batch, _, height, width = x.shape
    y = torch.empty(
        (batch, columns, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if y.numel() == 0:
        return y
    if taps == 0 or channels == 0:
        return y.zero_() if bias is None else y.copy_(bias[:, None, None].expand_as(y))
    x = _channels_last(x)
    pixels = batch * height * width
    tiles = _tiles_for("convolution", x, (pixels, columns, channels))
    blocks = triton.cdiv(pixels, tiles.rows) * triton.cdiv(columns, tiles.columns)
    with torch.cuda.device_of(x):
        masked_conv2d_kernel[(blocks,)](
            *(x, packed, bias, y, pixels, height, width, dilation),
            taps * triton.cdiv(channels, tiles.depth),
            CHANNELS=channels,
            OUT_CHANNELS=columns,
            TAPS=taps,
            KERNEL_WIDTH=kernel_size[1],
            UP=kernel_size[0] // 2,
            HAS_BIAS=bias is not None,
            BLOCK_P=tiles.rows,
            BLOCK_O=tiles.columns,
            BLOCK_C=tiles.depth,
            **_options(x, tiles),
        )
    return y


def _tiles_for(kernel: str, x: Tensor, size: tuple[int, int, int]) -> Tiles:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    return choose_tiles(kernel, arithmetic_of(x), capability, size)


def _options(x: Tensor, tiles: Tiles) -> dict[str, object]:
    return {
        "PRECISION": PRECISIONS[arithmetic_of(x)],
        "STAGES": tiles.stages,
        "INTERPRETED": not x.is_cuda,
        "num_warps": tiles.warps,
        "enable_fp_fusion": True,
    }


def _live_taps(weight: Tensor, mask_type: str) -> int:
    """How many taps the mask leaves: in raster order, the first ones."""
    return weight.shape[2] // 2 * weight.shape[3] + weight.shape[3] // 2 + (mask_type == "B")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
