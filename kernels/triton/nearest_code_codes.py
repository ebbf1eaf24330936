"""How a codebook becomes operands: centred, scaled, split into fp16 pieces, duplicates dropped.

Three kernels. The first sums the codes and files each under a hash of its channels; the second,
knowing the mean and the scale, writes the operands of the search; the third, after the search,
writes the resolver's where a row is left for it, into memory that the search's have given back.
What they leave behind per code is float32 at most; sizes and residuals are measured in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .nearest_code_rows import (
    ALIVE,
    CENTER_LENGTH,
    EXPONENT,
    LENGTH,
    LOW_LENGTH,
    NORM,
    PADDING,
    RECORD,
    RESIDUAL,
    not_finite,
    power_of_two,
)

# The half squared length of a code that must never win; see RATIO_BOTTOM in the rows' file.
DEAD_NORM = tl.constexpr(2.0**100)
# Rounding a measured size to float32 and summing it in float64 cost less than this factor.
UPWARDS = tl.constexpr(1.0 + 2.0**-20)
# The resolver's codes have scaled lengths in [8, 16), unless this far below the largest code.
CODE_TOP = tl.constexpr(3)
CODE_BOTTOM = tl.constexpr(-120)
# Per code for the resolver: its scale over the codebook's, half its squared length (DEAD: none).
RESOLVER_RECORD = tl.constexpr(2)
DEAD = tl.constexpr(-1.0)


@triton.jit
def _double_power_of_two(e):
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _double_exponent(value):
    return (((value.to(tl.int64, bitcast=True) >> 52) & 2047) - 1023).to(tl.int32)


@triton.jit
def _load_codes(codes_ptr, rows, row_mask, dims, dim_mask, stride_k, stride_d):
    """(rows, dims) float32, dead entries 0; and which rows are whole and finite."""
    offsets = rows[:, None].to(tl.int64) * stride_k + dims[None, :].to(tl.int64) * stride_d
    mask = row_mask[:, None] & dim_mask[None, :]
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    finite = row_mask & (tl.max(not_finite(codes), axis=1) == 0)
    # −0 becomes +0: codes that compare equal get equal bits.
    return tl.where(finite[:, None], codes, 0.0) + 0.0, finite


@triton.jit
def _bucket(codes, dims, BUCKETS: tl.constexpr):
    """A hash of each row's channels, order within the row included, below BUCKETS."""
    mixed = codes.to(tl.uint32, bitcast=True) * 2654435761
    mixed = (mixed ^ (mixed >> 15)) * (dims[None, :].to(tl.uint32) * 2246822519 + 3266489917)
    mixed = mixed ^ (mixed >> 13)
    total = tl.sum(mixed.to(tl.int32, bitcast=True), axis=1).to(tl.uint32, bitcast=True)
    total = (total ^ (total >> 16)) * 2146121005
    return ((total ^ (total >> 15)) & (BUCKETS - 1)).to(tl.int32)


@triton.jit
def nearest_code_sum_codes_kernel(
    codebook_ptr,
    sums_ptr,
    owners_ptr,
    K,
    blocks_per_part,
    stride_ch,
    stride_ck,
    stride_cd,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Float64 sums over a part of the codes, and the lowest code of each hash.

    A program owns a range of codes. It leaves Σ c (D), Σ‖c‖² and the count of finite codes in its
    own row of `sums`, so that they can be added in one order; and in `owners[hash]` the largest
    K − k, which no order of arrival can change.
    """
    book = tl.program_id(1).to(tl.int64)
    codebook_ptr += book * stride_ch
    owners_ptr += book * BUCKETS
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float64)
    squares = tl.zeros((BLOCK_R,), tl.float64)
    count = tl.zeros((BLOCK_R,), tl.float64)
    first = tl.program_id(0) * blocks_per_part
    for block in tl.range(first, first + blocks_per_part):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        codes, finite = _load_codes(
            codebook_ptr, rows, rows < K, dims, dims < D, stride_ck, stride_cd
        )
        wide = codes.to(tl.float64)
        total += tl.sum(wide, axis=0)
        squares += tl.sum(wide * wide, axis=1)
        count += finite.to(tl.float64)
        tl.atomic_max(owners_ptr + _bucket(codes, dims, BUCKETS), K - rows, mask=finite)
    out = sums_ptr + (book * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_D + 2)
    tl.store(out + dims, total)
    tl.store(out + BLOCK_D, tl.sum(squares, axis=0))
    tl.store(out + BLOCK_D + 1, tl.sum(count, axis=0))


@triton.jit
def _center_and_exponent(sums_ptr, parts, dims, dim_mask, BLOCK_D: tl.constexpr, L2: tl.constexpr):
    """The centre m (float32) and the scale's exponent e: 2ᵉ·(Σ‖c − m‖²)^½ < 2⁸.

    The mean where the codes lie at least half their root mean square from the origin: their
    differences then count, not their sizes. Else 0, which keeps 16-bit inputs exact.
    """
    total = tl.zeros((BLOCK_D,), tl.float64)
    squares = tl.sum(tl.zeros((BLOCK_D,), tl.float64), axis=0)
    count = squares
    for part in tl.range(0, parts):
        at = sums_ptr + part * (BLOCK_D + 2)
        total += tl.load(at + dims)
        squares += tl.load(at + BLOCK_D)
        count += tl.load(at + BLOCK_D + 1)
    count = tl.maximum(count, 1.0)
    mean = tl.where(dim_mask, total / count, 0.0)
    offset = tl.sum(mean * mean, axis=0)
    center = tl.where(4.0 * offset * count > squares, mean, 0.0).to(tl.float32)
    wide = center.to(tl.float64)
    spread = squares - tl.sum(wide * (2.0 * total - count * wide), axis=0)
    # What cancels in that difference is below 2⁻⁴⁵ of what it was taken from.
    spread = tl.maximum(spread, 0.0) + squares * 2.0**-45
    e = tl.where(spread > 0.0, 8 - ((_double_exponent(spread) + 2) >> 1), 0)
    return center, e


@triton.jit
def _is_copy(
    codebook_ptr,
    owners_ptr,
    codes,
    finite,
    rows,
    K,
    dims,
    dim_mask,
    stride_k,
    stride_d,
    BUCKETS: tl.constexpr,
):
    """Whether an equal row of lower number is on file. A lost hash only leaves a copy in."""
    owner = K - tl.load(owners_ptr + _bucket(codes, dims, BUCKETS))
    older = finite & (owner < rows)
    other, _ = _load_codes(codebook_ptr, owner, older, dims, dim_mask, stride_k, stride_d)
    return older & (tl.max((other != codes).to(tl.int32), axis=1) == 0)


@triton.jit
def _scaled_codes(codes, center, e, alive):
    """(codes − centre)·2ᵉ in float64; zeros for the dead."""
    c = (codes.to(tl.float64) - center.to(tl.float64)[None, :]) * _double_power_of_two(e)
    return tl.where(alive[:, None], c, 0.0)


@triton.jit
def _half_square(squared, L2: tl.constexpr):
    """What a code's score is lessened by: half its squared length, or nothing for dot products."""
    return 0.5 * squared if L2 else 0.0 * squared


@triton.jit
def _split(value):
    """A float64 as fp16 pieces: high, low, and the float64 rest."""
    high = value.to(tl.float32).to(tl.float16)
    rest = value - high.to(tl.float64)
    low = rest.to(tl.float32).to(tl.float16)
    return high, low, rest - low.to(tl.float64)


@triton.jit
def _record_largest(record_ptr, slot, values):
    """Raise a slot of the record to the largest of non-negative values, rounded upwards."""
    largest = (tl.max(values, axis=0) * UPWARDS).to(tl.float32)
    tl.atomic_max(record_ptr + slot, largest.to(tl.int32, bitcast=True))


@triton.jit
def _store_operand(
    at,
    high,
    low,
    norm,
    alive,
    inside,
    dims,
    dim_mask,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The search's columns of each code; `operand_dims` and `row_operand` are their other side."""
    at = at[:, None]
    if TERMS == 1:
        tl.store(at + dims[None, :], high, mask=inside[:, None])
    else:
        mask = inside[:, None] & dim_mask[None, :]
        tl.store(at + dims[None, :], high, mask=mask)
        tl.store(at + D + dims[None, :], high, mask=mask)
        tl.store(at + 2 * D + dims[None, :], low, mask=mask)
        first, second, rest = _split(-norm)
        third = rest.to(tl.float32).to(tl.float16)
        padding = tl.where(alive, 0.0, -PADDING).to(tl.float16)
        columns = tl.arange(0, WIDTH)[None, :] - 3 * D
        values = tl.where(columns == 0, first[:, None], 0.0)
        values = tl.where(columns == 1, second[:, None], values)
        values = tl.where(columns == 2, third[:, None], values)
        values = tl.where(columns == 3, padding[:, None], values)
        tl.store(at + 3 * D + columns, values.to(tl.float16), mask=inside[:, None] & (columns >= 0))


@triton.jit
def nearest_code_prepare_codes_kernel(
    codebook_ptr,
    sums_ptr,
    owners_ptr,
    record_ptr,
    center_ptr,
    operand_ptr,
    norms_ptr,
    K,
    padded_codes,
    parts,
    stride_ch,
    stride_ck,
    stride_cd,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Operands of the search, and the sizes that the bound is made of.

    A program owns BLOCK_R codes, padding included. Codes that hold NaN or Inf, copies of a code
    of lower number, and padding are dead: zeros with a norm that nothing survives.
    """
    book = tl.program_id(1).to(tl.int64)
    codebook_ptr += book * stride_ch
    owners_ptr += book * BUCKETS
    record_ptr += book * RECORD
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    center, e = _center_and_exponent(
        sums_ptr + book * parts * (BLOCK_D + 2), parts, dims, dim_mask, BLOCK_D, L2
    )
    if tl.program_id(0) == 0:
        tl.store(record_ptr + EXPONENT, e)
        tl.store(center_ptr + book * D + dims, center, mask=dim_mask)
        length = tl.sqrt(tl.sum(center.to(tl.float64) * center.to(tl.float64), axis=0))
        tl.store(
            record_ptr + CENTER_LENGTH,
            (length * UPWARDS).to(tl.float32).to(tl.int32, bitcast=True),
        )

    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    codes, finite = _load_codes(codebook_ptr, rows, rows < K, dims, dim_mask, stride_ck, stride_cd)
    copy = _is_copy(
        codebook_ptr,
        owners_ptr,
        codes,
        finite,
        rows,
        K,
        dims,
        dim_mask,
        stride_ck,
        stride_cd,
        BUCKETS,
    )
    alive = finite & (copy == 0)
    c = _scaled_codes(codes, center, e, alive)
    squared = tl.sum(c * c, axis=1)
    norm = _half_square(squared, L2)
    high, low, rest = _split(c)
    if TERMS == 1:
        rest += low.to(tl.float64)
    wide_low = low.to(tl.float64)
    _record_largest(record_ptr, LENGTH, tl.sqrt(squared))
    _record_largest(record_ptr, RESIDUAL, tl.sqrt(tl.sum(rest * rest, axis=1)))
    _record_largest(record_ptr, LOW_LENGTH, tl.sqrt(tl.sum(wide_low * wide_low, axis=1)))
    _record_largest(record_ptr, NORM, norm)
    tl.atomic_max(record_ptr + ALIVE, tl.max(alive.to(tl.int32), axis=0))

    inside = rows < padded_codes
    out = book * padded_codes + rows
    tl.store(norms_ptr + out, tl.where(alive, norm.to(tl.float32), DEAD_NORM), mask=inside)
    _store_operand(
        operand_ptr + out * WIDTH, high, low, norm, alive, inside, dims, dim_mask, D, WIDTH, TERMS
    )


@triton.jit
def nearest_code_prepare_resolver_kernel(
    codebook_ptr,
    record_ptr,
    center_ptr,
    norms_ptr,
    queued_ptr,
    high_ptr,
    low_ptr,
    resolver_ptr,
    K,
    padded_codes,
    heads,
    num_books,
    stride_ch,
    stride_ck,
    stride_cd,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The codes again with a scale each, in two fp16 pieces, if any row waits for the resolver.

    A program owns BLOCK_R codes, padding included. Which of them are dead it reads in the norms.
    """
    book = tl.program_id(1).to(tl.int64)
    waiting = tl.load(queued_ptr + book)
    for head in tl.range(book + num_books, heads, num_books):
        waiting += tl.load(queued_ptr + head)
    if waiting > 0:
        dims = tl.arange(0, BLOCK_D)
        dim_mask = dims < D
        rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = rows < padded_codes
        out = book * padded_codes + rows
        alive = tl.load(norms_ptr + out, mask=inside, other=DEAD_NORM) < DEAD_NORM
        codes, _ = _load_codes(
            codebook_ptr + book * stride_ch,
            rows,
            alive & (rows < K),
            dims,
            dim_mask,
            stride_ck,
            stride_cd,
        )
        center = tl.load(center_ptr + book * D + dims, mask=dim_mask, other=0.0)
        e = tl.load(record_ptr + book * RECORD + EXPONENT)
        c = _scaled_codes(codes, center, e, alive)
        squared = tl.sum(c * c, axis=1)
        own = tl.maximum((_double_exponent(squared) >> 1) - CODE_TOP, CODE_BOTTOM)
        own_scale = _double_power_of_two(-own)
        high, low, _ = _split(c * own_scale[:, None])
        at = out[:, None] * BLOCK_D + dims[None, :]
        tl.store(high_ptr + at, high, mask=inside[:, None])
        tl.store(low_ptr + at, low, mask=inside[:, None])
        norm = _half_square(squared, L2) * own_scale * own_scale
        half_square = tl.where(alive, norm.to(tl.float32), DEAD)
        tl.store(resolver_ptr + out * RESOLVER_RECORD, power_of_two(own), mask=inside)
        tl.store(resolver_ptr + out * RESOLVER_RECORD + 1, half_square, mask=inside)
