"""The gradient of the taps: products of gradients and shifted pixels, summed over all pixels.

        grad_weight[o, c, tap] = Σ_p grad[p, o] · x[p + shift(tap), c]

The sum over pixels is shared out between programs, each of which leaves one partial block in
float32; a second kernel adds them in their order. No atomics: bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_conv2d_taps import first_pixel, inside_picture, matrix_product, places, tap_shift


@triton.jit
def _next_pixels(row, column, height, width, row_step, column_step):
    """Row and column of pixels a fixed number further on; the steps are below height and width."""
    column += column_step
    wrapped = column >= width
    column = tl.where(wrapped, column - width, column)
    row += row_step + wrapped.to(tl.int32)
    return tl.where(row >= height, row - height, row), column


@triton.jit
def masked_conv2d_grad_weight_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    pixels,
    height,
    width,
    dilation,
    steps_per_part,
    row_step,
    column_step,
    OUT_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    UP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # A program owns the BLOCK_O × BLOCK_C blocks of GROUP neighbouring taps and steps_per_part ·
    # BLOCK_P pixels. On chip stay the blocks' sums. The taps share one reading of the gradient and,
    # in the L1 cache, most of x. Never written: the pixels as a tap sees them.
    GROUPS: tl.constexpr = (TAPS + GROUP - 1) // GROUP
    COLUMN_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0)
    first_tap = block % GROUPS * GROUP
    o = block // (GROUPS * COLUMN_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = block // GROUPS % COLUMN_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1).to(tl.int64)
    first = first_pixel(tl.program_id(1) * steps_per_part, BLOCK_P, pixels)
    # Whether a pixel exists is asked at each step, so here all have a row.
    pixel, _, row, column, _, _ = places(
        first, BLOCK_P, first.to(tl.int64) + BLOCK_P, height, width
    )
    grad_at = grad_ptr + pixel[None, :] * OUT_CHANNELS + o[:, None]
    x_at = x_ptr + pixel[:, None] * CHANNELS + c[None, :]
    totals = ()
    for _ in tl.static_range(GROUP):
        totals += (tl.zeros((BLOCK_O, BLOCK_C), tl.float32),)
    for step in tl.range(0, steps_per_part, num_stages=STAGES):
        exists = first.to(tl.int64) + step * BLOCK_P + tl.arange(0, BLOCK_P) < pixels
        grad_mask = exists[None, :]
        if OUT_CHANNELS % BLOCK_O != 0:
            grad_mask = grad_mask & (o < OUT_CHANNELS)[:, None]
        a = tl.load(grad_at, mask=grad_mask, other=0.0)
        sums = ()
        for g in tl.static_range(GROUP):
            tap = first_tap + g
            rows, columns = tap_shift(tap, dilation, KERNEL_WIDTH, UP)
            # Where the last group is not full, what lies beyond the last tap sees nothing.
            seen_row = tl.where(tap < TAPS, row + rows, -1)
            mask = (exists & inside_picture(seen_row, column + columns, height, width))[:, None]
            if CHANNELS % BLOCK_C != 0:
                mask = mask & (c < CHANNELS)[None, :]
            shift = (rows.to(tl.int64) * width + columns) * CHANNELS
            b = tl.load(x_at + shift, mask=mask, other=0.0, cache_modifier=".ca")
            sums += (matrix_product(a, b, totals[g], PRECISION, INTERPRETED),)
        totals = sums
        grad_at += BLOCK_P * OUT_CHANNELS
        x_at += BLOCK_P * CHANNELS
        row, column = _next_pixels(row, column, height, width, row_step, column_step)
    for g in tl.static_range(GROUP):
        tap = first_tap + g
        at = ((part * TAPS + tap) * OUT_CHANNELS + o)[:, None] * CHANNELS + c[None, :]
        inside = o < tl.where(tap < TAPS, OUT_CHANNELS, 0)
        tl.store(partial_ptr + at, totals[g], mask=inside[:, None] & (c < CHANNELS)[None, :])


@triton.jit
def masked_conv2d_sum_parts_kernel(
    partial_ptr,
    grad_weight_ptr,
    parts,
    OUT_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A program owns BLOCK_C input channels of one output channel, all taps of them: masked taps
    # are written as zeros and never read.
    o = tl.program_id(0)
    tap = tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = partial_ptr + (tap.to(tl.int64) * OUT_CHANNELS + o)[:, None] * CHANNELS + c[None, :]
    live = (tap < TAPS)[:, None] & (c < CHANNELS)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for _ in tl.range(0, parts):
        total += tl.load(at, mask=live, other=0.0)
        at += TAPS * OUT_CHANNELS * CHANNELS
    out = (o.to(tl.int64) * CHANNELS + c)[None, :] * KERNEL_TAPS + tap[:, None]
    exists = (tap < KERNEL_TAPS)[:, None] & (c < CHANNELS)[None, :]
    tl.store(grad_weight_ptr + out, total.to(grad_weight_ptr.dtype.element_ty), mask=exists)
