"""The sum over live taps that every masked convolution kernel is built round.

In raster order the live taps of a mask are the first ones, so tap t of the loop is tap t of the
kernel and no list of taps is needed. Pixels are flat, p = (b·H + i)·W + j, of a picture whose
channels lie side by side (channels_last): a tap then is one shift of p for every pixel, and what it
must not see, beyond the edge of the picture, is a comparison with i and j.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No picture has this row: every tap of such a pixel lies outside, so nothing is loaded for it.
NOWHERE = tl.constexpr(-(2**30))


@triton.jit
def tap_shift(tap, dilation, KERNEL_WIDTH: tl.constexpr, UP: tl.constexpr):
    """Rows and columns from a pixel to what a tap sees; a negative dilation flips the kernel."""
    rows = (tap // KERNEL_WIDTH - UP) * dilation
    columns = (tap % KERNEL_WIDTH - KERNEL_WIDTH // 2) * dilation
    return rows, columns


@triton.jit
def inside_picture(row, column, height, width):
    # As unsigned numbers, what lies before 0 is larger than any size: one comparison each.
    return (row.to(tl.uint32, bitcast=True) < height) & (column.to(tl.uint32, bitcast=True) < width)


@triton.jit
def matrix_product(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a·b in float32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def first_pixel(block, BLOCK: tl.constexpr, pixels):
    """Of a block: 32 bits wide where the number of pixels is, so that dividing it is cheap."""
    return tl.minimum(block, pixels) * BLOCK


@triton.jit
def places(first, BLOCK: tl.constexpr, pixels, height, width):
    """Where BLOCK flat pixels from `first` on are, as `add_taps` takes it.

    Pixel, picture, row, column, and a picture's size. Only the first is divided as it is; the
    others are counted on from it, in numbers below 2³¹ however many pixels there are.
    """
    line = first // width
    picture = line // height
    column = (first - line * width).to(tl.int32) + tl.arange(0, BLOCK)
    lines_on = column // width
    row = (line - picture * height).to(tl.int32) + lines_on
    pictures_on = row // height
    # int64: pixels · channels passes 2³¹ for long batches.
    pixel = first.to(tl.int64) + tl.arange(0, BLOCK)
    row = tl.where(pixel < pixels, row % height, NOWHERE)
    return pixel, picture.to(tl.int64) + pictures_on, row, column % width, height, width


@triton.jit
def add_taps(
    total,
    x_ptr,
    weight_ptr,
    weight_row,
    place,
    dilation,
    tap_stride,
    steps,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """total[p, n] + Σ_taps Σ_c x[p + shift(tap), c] · weight[tap, weight_row[n], c].

    `weight` is (taps, rows, CHANNELS), packed, tap_stride numbers to a tap; every row number must
    exist. `steps` is TAPS · ⌈CHANNELS / BLOCK_C⌉, given as a number so that no loop is unrolled.
    """
    pixel, _, row, column, height, width = place
    c = tl.arange(0, BLOCK_C)
    x_at = x_ptr + pixel[:, None] * CHANNELS + c[None, :]
    weight_at = weight_ptr + weight_row[None, :].to(tl.int64) * CHANNELS + c[:, None]
    # One loop over channels and taps, so that the pipeline of loads fills once. Taps change first:
    # what neighbouring taps see is nearly the same, and ".ca" lets the L1 cache keep it.
    for step in tl.range(0, steps, num_stages=STAGES):
        tap = step % TAPS
        first = step // TAPS * BLOCK_C
        rows, columns = tap_shift(tap, dilation, KERNEL_WIDTH, UP)
        seen = inside_picture(row + rows, column + columns, height, width)[:, None]
        shift = (rows.to(tl.int64) * width + columns) * CHANNELS + first
        at = tap.to(tl.int64) * tap_stride + first
        if CHANNELS % BLOCK_C == 0:
            a = tl.load(x_at + shift, mask=seen, other=0.0, cache_modifier=".ca")
            b = tl.load(weight_at + at)
        else:
            exists = first + c < CHANNELS
            seen = seen & exists[None, :]
            a = tl.load(x_at + shift, mask=seen, other=0.0, cache_modifier=".ca")
            b = tl.load(weight_at + at, mask=exists[:, None], other=0.0)
        total = matrix_product(a, b, total, PRECISION, INTERPRETED)
    return total


@triton.jit
def add_products(
    total,
    x_ptr,
    weight_ptr,
    weight_row,
    place,
    steps,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """total[p, n] + Σ_c x[p, c] · weight[weight_row[n], c]: a 1×1 kernel, of one tap."""
    return add_taps(
        *(total, x_ptr, weight_ptr, weight_row, place, 1, 0, steps),
        *(CHANNELS, 1, 1, 0, BLOCK_C, PRECISION, STAGES, INTERPRETED),
    )
