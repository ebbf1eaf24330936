"""How the search's kernels read a row of x: centred, scaled by a power of two, in fp16 pieces.

The search, the certificate and the resolver call these same functions, so that the bound of
nearest_code.md speaks of the very numbers that were multiplied. No kernel lives here.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Slots of the int32 record that nearest_code_codes.py leaves per codebook: the exponent of the
# codes' scale, then maxima over the codes, as the bits of non-negative float32.
EXPONENT = tl.constexpr(0)
LENGTH = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
LOW_LENGTH = tl.constexpr(3)
NORM = tl.constexpr(4)
CENTER_LENGTH = tl.constexpr(5)
ALIVE = tl.constexpr(6)
RECORD = tl.constexpr(8)

# A scaled row's largest channel lies in [4, 8); the codes' scaled lengths below 2⁸.
ROW_TOP = tl.constexpr(2)
# How much larger than the codes' scale a row's may get, so that norms stay within fp16 pieces.
RATIO_TOP = tl.constexpr(12)
# The ratio of the scales is held above these: where three fp16 columns carry the norm, and where
# float32 does. What holding it costs is in the bound.
RATIO_BOTTOM_COLUMNS = tl.constexpr(-24)
RATIO_BOTTOM = tl.constexpr(-60)
# Padding's score, −2³⁰, in the column kept for it; no true score is below −2²⁸.
PADDING = tl.constexpr(32768.0)
# Below every score, and finite: the bits of −∞ with an id in them are a NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def exponent(value):
    """⌊log₂ value⌋ of a positive float32; −127 for zero and below the smallest normal."""
    return ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def power_of_two(e):
    """2ᵉ in float32, −126 ≤ e ≤ 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(value, e):
    """value·2ᵉ for |e| ≤ 252, exact unless the result is subnormal."""
    half = e >> 1
    return value * power_of_two(half) * power_of_two(e - half)


@triton.jit
def not_finite(value):
    """1 where a float32 is NaN or ±Inf, else 0."""
    return ((value.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)


@triton.jit
def load_rows(
    x_ptr, center_ptr, rows, row_mask, dims, dim_mask, stride_n, stride_d, CENTER: tl.constexpr
):
    """Rows of x, less the centre, as float32; and which of them hold NaN or ±Inf.

    Returns:
        (BLOCK_N, dims) float32 and (BLOCK_N,) int32.
    """
    offsets = rows[:, None] * stride_n + dims[None, :].to(tl.int64) * stride_d
    mask = row_mask[:, None] & dim_mask[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    broken = tl.max(not_finite(x), axis=1)
    if CENTER:
        x = x - tl.load(center_ptr + dims, mask=dim_mask, other=0.0)[None, :]
    return x, broken


@triton.jit
def row_exponent(largest, codes_exponent, HIGHEST: tl.constexpr, L2: tl.constexpr):
    """Exponent of the scale of a row whose largest channel has this size.

    Where norms take part it is at most 2^HIGHEST times the codes' scale.
    """
    e = (-exponent(largest)) + ROW_TOP
    if L2:
        e = tl.minimum(e, codes_exponent + HIGHEST)
    return e


@triton.jit
def scale_ratio(rows_exponent, codes_exponent, TERMS: tl.constexpr):
    """The row's scale over the codes', as it multiplies the norm."""
    bottom: tl.constexpr = RATIO_BOTTOM if TERMS == 1 else RATIO_BOTTOM_COLUMNS
    return power_of_two(tl.minimum(tl.maximum(rows_exponent - codes_exponent, bottom), RATIO_TOP))


@triton.jit
def operand_dims(columns, D: tl.constexpr, TERMS: tl.constexpr):
    """The channel that each column of an operand holds, and whether it holds one.

    One term: channel j in column j. Three: high, high and low pieces of the codes against high,
    low and high ones of the rows, D columns each; then three of the norm, and padding's.
    """
    dims = columns % D
    held = columns < TERMS * D
    return dims, held


@triton.jit
def row_operand(x, ratio, columns, D: tl.constexpr, TERMS: tl.constexpr):
    """The fp16 columns of scaled rows."""
    operand = x.to(tl.float16)
    if TERMS == 3:
        low = (x - operand.to(tl.float32)).to(tl.float16)
        column = columns[None, :]
        operand = tl.where((column >= D) & (column < 2 * D), low, operand)
        is_norm = (column >= 3 * D) & (column < 3 * D + 3)
        operand = tl.where(is_norm, ratio[:, None].to(tl.float16), operand)
        operand = tl.where(column == 3 * D + 3, PADDING, operand.to(tl.float32)).to(tl.float16)
    return operand


@triton.jit
def row_scales(
    x_ptr,
    center_ptr,
    rows,
    row_mask,
    codes_e,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TERMS: tl.constexpr,
    HIGHEST: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Exponents of the rows' scales; which rows overflowed when centred; which hold NaN or ±Inf.

    A row that overflowed has no scale: it gets that of a row of zeros.
    """
    largest = tl.zeros((BLOCK_N,), tl.float32)
    overflowed = tl.zeros((BLOCK_N,), tl.int32)
    broken = tl.zeros((BLOCK_N,), tl.int32)
    for start in tl.range(0, WIDTH, CHUNK):
        dims, held = operand_dims(start + tl.arange(0, CHUNK), D, TERMS)
        x, bad = load_rows(x_ptr, center_ptr, rows, row_mask, dims, held, stride_xn, stride_xd, L2)
        broken = tl.maximum(broken, bad)
        overflowed = tl.maximum(overflowed, tl.max(not_finite(x), axis=1))
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    largest = tl.where(overflowed > 0, 0.0, largest)
    return row_exponent(largest, codes_e, HIGHEST, L2), overflowed, broken
