"""The rows that the fast pass could not settle, to the last bit.

Every code is scored again in three products of fp16 pieces, each code and each row with a scale
of its own, and an interval is put round each score (nearest_code.md, (7)–(9)). Codes whose
interval reaches the best one's are listed; where several are left, the canonical float64 score
decides between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .nearest_code_certify import (
    CUT,
    DOUBLE_ROUNDOFF,
    MARGIN,
    ROUNDOFF,
    SLACK,
    recorded,
    winner_distance,
)
from .nearest_code_codes import RESOLVER_RECORD
from .nearest_code_rows import (
    CENTER_LENGTH,
    EXPONENT,
    RECORD,
    ROW_TOP,
    exponent,
    load_rows,
    not_finite,
    power_of_two,
    scaled,
)

# The ratio of a row's scale to the codebook's; codes' own scales go from 2⁻⁶⁰ to 2⁵ of that.
RATIO_TOP = tl.constexpr(41)
RATIO_BOTTOM = tl.constexpr(-66)
# Bounds on a scaled code: its length, that of its low piece and of what both pieces leave.
CODE_LENGTH = tl.constexpr(16.0)
CODE_LOW_LENGTH = tl.constexpr(2.0**-6)
CODE_RESIDUAL = tl.constexpr(2.0**-17)
# Norms are float32 and meet two roundings; the float64 score's own is far below that.
NORM_ROUNDOFF = tl.constexpr(2.0**-21)


@triton.jit
def _product_rounded(a, b, INTERPRETED: tl.constexpr):
    """a·b in float64, rounded: never the front half of a fused multiply-add."""
    if INTERPRETED:
        product = a * b
    else:
        product = tl.inline_asm_elementwise(
            "mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], dtype=tl.float64, is_pure=True, pack=1
        )
    return product


@triton.jit
def _sum_rounded(a, b, INTERPRETED: tl.constexpr):
    """a + b in float64, rounded, and not fused with what made b."""
    if INTERPRETED:
        total = a + b
    else:
        total = tl.inline_asm_elementwise(
            "add.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], dtype=tl.float64, is_pure=True, pack=1
        )
    return total


@triton.jit
def _pairs(tile):
    """Even and odd columns of a tile."""
    rows: tl.constexpr = tile.shape[0]
    width: tl.constexpr = tile.shape[1]
    return tl.split(tl.reshape(tile, (rows, width // 2, 2)))


@triton.jit
def _canonical_scores(
    x_ptr,
    codebook_ptr,
    rows,
    codes,
    mask,
    stride_xn,
    stride_xd,
    stride_ck,
    stride_cd,
    D: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The score of the index promise, of one code per row: float64, d = 0 … D−1, smaller wins.

    Channels beyond D are zeros on both sides: they add a zero, which changes nothing.
    """
    total = tl.zeros((BLOCK_N,), tl.float64)
    for start in tl.range(0, D, 8):
        dims = start + tl.arange(0, 8).to(tl.int64)
        inside = mask[:, None] & (dims < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xn + dims[None, :] * stride_xd, inside, 0.0)
        at = codes[:, None].to(tl.int64) * stride_ck + dims[None, :] * stride_cd
        c = tl.load(codebook_ptr + at, inside, 0.0)
        x = x.to(tl.float32).to(tl.float64)
        c = c.to(tl.float32).to(tl.float64)
        if L2:
            difference = x - c
            term = _product_rounded(difference, difference, INTERPRETED)
        else:
            term = -_product_rounded(x, c, INTERPRETED)
        even, odd = _pairs(term)
        t04, t26 = _pairs(even)
        t15, t37 = _pairs(odd)
        t0, t4 = tl.split(t04)
        t1, t5 = tl.split(t15)
        t2, t6 = tl.split(t26)
        t3, t7 = tl.split(t37)
        total = _sum_rounded(total, t0, INTERPRETED)
        total = _sum_rounded(total, t1, INTERPRETED)
        total = _sum_rounded(total, t2, INTERPRETED)
        total = _sum_rounded(total, t3, INTERPRETED)
        total = _sum_rounded(total, t4, INTERPRETED)
        total = _sum_rounded(total, t5, INTERPRETED)
        total = _sum_rounded(total, t6, INTERPRETED)
        total = _sum_rounded(total, t7, INTERPRETED)
    return total


@triton.jit
def _settle(
    best_score,
    best_index,
    codes_ptr,
    uppers_ptr,
    listed,
    lowest,
    x_ptr,
    codebook_ptr,
    rows,
    stride_xn,
    stride_xd,
    stride_ck,
    stride_cd,
    D: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Let the listed codes that still reach the best one's interval compete in float64."""
    for t in tl.range(0, tl.max(listed, axis=0)):
        there = t < listed
        code = tl.load(codes_ptr + t, mask=there, other=0)
        upper = tl.load(uppers_ptr + t, mask=there, other=0.0)
        alive = there & (upper >= lowest)
        if tl.max(alive.to(tl.int32), axis=0) > 0:
            score = _canonical_scores(
                x_ptr,
                codebook_ptr,
                rows,
                code,
                alive,
                stride_xn,
                stride_xd,
                stride_ck,
                stride_cd,
                D,
                L2,
                BLOCK_N,
                INTERPRETED,
            )
            first = (best_index < 0) | (score < best_score)
            tie = (score == best_score) & (code < best_index)
            better = alive & (first | tie)
            best_score = tl.where(better, score, best_score)
            best_index = tl.where(better, code, best_index)
    return best_score, best_index


@triton.jit
def _row_pieces(
    x_ptr,
    center_ptr,
    rows,
    row_mask,
    row_e,
    overflowed,
    start,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    L2: tl.constexpr,
):
    """A chunk of the scaled rows: high and low fp16 pieces, and the chunk's part of three sizes."""
    dims = start + tl.arange(0, CHUNK)
    x, _ = load_rows(x_ptr, center_ptr, rows, row_mask, dims, dims < D, stride_xn, stride_xd, L2)
    x = tl.where(overflowed[:, None] > 0, 0.0, scaled(x, row_e[:, None]))
    high = x.to(tl.float16)
    rest = x - high.to(tl.float32)
    low = rest.to(tl.float16)
    wide_low = low.to(tl.float32)
    rest = rest - wide_low
    return (
        high,
        low,
        tl.sum(x * x, axis=1),
        tl.sum(wide_low * wide_low, axis=1),
        tl.sum(rest * rest, axis=1),
    )


@triton.jit
def _row_scales(
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
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Exponents of the rows' scales, and which rows have none for they overflowed when centred."""
    largest = tl.zeros((BLOCK_N,), tl.float32)
    overflowed = tl.zeros((BLOCK_N,), tl.int32)
    for start in tl.range(0, WIDTH, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        x, _ = load_rows(
            x_ptr, center_ptr, rows, row_mask, dims, dims < D, stride_xn, stride_xd, L2
        )
        overflowed = tl.maximum(overflowed, tl.max(not_finite(x), axis=1))
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    largest = tl.where(overflowed > 0, 0.0, largest)
    return tl.minimum((-exponent(largest)) + ROW_TOP, codes_e + RATIO_TOP), overflowed


@triton.jit
def _interval(
    record_ptr,
    codes_e,
    ratio,
    overflowed,
    squared,
    low_squared,
    rest_squared,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    L2: tl.constexpr,
):
    """Half widths of a row's intervals, before and after the code's scale: nearest_code.md, (7)."""
    length = tl.sqrt(squared)
    residual = tl.sqrt(rest_squared) + length * ROUNDOFF
    inner = residual * CODE_LENGTH + (length + residual) * (CODE_RESIDUAL + D * 2.0**-25)
    inner += tl.sqrt(low_squared) * CODE_LOW_LENGTH
    inner += (length + residual) * ((D + WIDTH // 4 + 16) * CUT * 1.01 * CODE_LENGTH)
    inner = tl.where(overflowed > 0, float("inf"), inner * MARGIN)
    outer = squared
    if L2 == 0:
        outer = length * (ratio * scaled(recorded(record_ptr, CENTER_LENGTH), codes_e))
    return inner, outer * (2 * (D + 4) * DOUBLE_ROUNDOFF * MARGIN) + SLACK


@triton.jit
def _pair_scores(
    high_ptr,
    low_ptr,
    x_ptr,
    center_ptr,
    rows,
    row_mask,
    row_e,
    overflowed,
    x_high,
    x_low,
    codes,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of the rows with a tile of codes, high·high apart from the two that are small."""
    large = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    small = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, WIDTH, CHUNK):
        if CHUNK < WIDTH:
            x_high, x_low, _, _, _ = _row_pieces(
                x_ptr,
                center_ptr,
                rows,
                row_mask,
                row_e,
                overflowed,
                start,
                stride_xn,
                stride_xd,
                D,
                CHUNK,
                L2,
            )
        at = codes[None, :].to(tl.int64) * WIDTH + (start + tl.arange(0, CHUNK))[:, None]
        high = tl.load(high_ptr + at)
        low = tl.load(low_ptr + at)
        small = tl.dot(x_low, high, small)
        small = tl.dot(x_high, low, small)
        large = tl.dot(x_high, high, large)
    return large + small


@triton.jit
def nearest_code_resolve_kernel(
    x_ptr,
    codebook_ptr,
    high_ptr,
    low_ptr,
    resolver_ptr,
    center_ptr,
    record_ptr,
    queue_ptr,
    queued_ptr,
    listed_codes_ptr,
    listed_uppers_ptr,
    index_ptr,
    distance_ptr,
    N,
    padded_codes,
    num_books,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    L2: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Index (and distance) of every queued row of a head.

    A program owns every so-many-th block of BLOCK_N queued rows, and two lists of BLOCK_K entries
    per row in memory that are its own. On chip: the rows' pieces, one tile of scores, the best
    lower end of an interval per row. The length of the queue is read on the device.
    """
    head = tl.program_id(1).to(tl.int64)
    book = head % num_books
    x_ptr += head * stride_xh
    codebook_ptr += book * stride_ch
    high_ptr += book * padded_codes * WIDTH
    low_ptr += book * padded_codes * WIDTH
    resolver_ptr += book * padded_codes * RESOLVER_RECORD
    center_ptr += book * D
    record_ptr += book * RECORD
    queue_ptr += head * N
    lists = (head * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    listed_codes_ptr += lists * BLOCK_K
    listed_uppers_ptr += lists * BLOCK_K
    codes_e = tl.load(record_ptr + EXPONENT)
    queued = tl.load(queued_ptr + head)
    for block in tl.range(tl.program_id(0), tl.cdiv(queued, BLOCK_N), tl.num_programs(0)):
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = place < queued
        rows = tl.load(queue_ptr + place, mask=row_mask, other=0).to(tl.int64)
        row_e, overflowed = _row_scales(
            x_ptr,
            center_ptr,
            rows,
            row_mask,
            codes_e,
            stride_xn,
            stride_xd,
            D,
            WIDTH,
            CHUNK,
            L2,
            BLOCK_N,
        )
        ratio = power_of_two(tl.maximum(row_e - codes_e, RATIO_BOTTOM))
        x_high = tl.zeros((BLOCK_N, CHUNK), tl.float16)
        x_low = x_high
        squared = tl.zeros((BLOCK_N,), tl.float32)
        low_squared = squared
        rest_squared = squared
        for start in tl.static_range(0, WIDTH, CHUNK):
            x_high, x_low, square, low_square, rest_square = _row_pieces(
                x_ptr,
                center_ptr,
                rows,
                row_mask,
                row_e,
                overflowed,
                start,
                stride_xn,
                stride_xd,
                D,
                CHUNK,
                L2,
            )
            squared += square
            low_squared += low_square
            rest_squared += rest_square
        inner, outer = _interval(
            record_ptr,
            codes_e,
            ratio,
            overflowed,
            squared,
            low_squared,
            rest_squared,
            D,
            WIDTH,
            L2,
        )

        lowest = tl.full((BLOCK_N,), -3.0e38, tl.float32)
        listed = tl.zeros((BLOCK_N,), tl.int32)
        best_score = tl.zeros((BLOCK_N,), tl.float64)
        best_index = tl.full((BLOCK_N,), -1, tl.int32)
        for tile in tl.range(0, padded_codes // BLOCK_K):
            codes = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            score = _pair_scores(
                high_ptr,
                low_ptr,
                x_ptr,
                center_ptr,
                rows,
                row_mask,
                row_e,
                overflowed,
                x_high,
                x_low,
                codes,
                stride_xn,
                stride_xd,
                D,
                WIDTH,
                CHUNK,
                L2,
                BLOCK_N,
                BLOCK_K,
            )
            scale = ratio[:, None] * tl.load(resolver_ptr + codes * RESOLVER_RECORD)[None, :]
            norm = tl.load(resolver_ptr + codes * RESOLVER_RECORD + 1)
            alive = norm[None, :] >= 0.0
            over = scale * (norm * (1.0 + NORM_ROUNDOFF))[None, :]
            under = scale * (norm * (1.0 - NORM_ROUNDOFF))[None, :]
            upper = scale * (score + inner[:, None] - under) + outer[:, None]
            lower = scale * (score - inner[:, None] - over) - outer[:, None]
            lower = tl.where(alive, lower, -3.0e38)
            lowest = tl.maximum(lowest, tl.max(lower, axis=1))
            reaches = (alive & row_mask[:, None] & (upper >= lowest[:, None])).to(tl.int32)
            new = tl.sum(reaches, axis=1)
            if tl.max(new, axis=0) > 0:
                if tl.max(listed + new, axis=0) > BLOCK_K:
                    best_score, best_index = _settle(
                        best_score,
                        best_index,
                        listed_codes_ptr,
                        listed_uppers_ptr,
                        listed,
                        lowest,
                        x_ptr,
                        codebook_ptr,
                        rows,
                        stride_xn,
                        stride_xd,
                        stride_ck,
                        stride_cd,
                        D,
                        L2,
                        BLOCK_N,
                        INTERPRETED,
                    )
                    listed = tl.zeros((BLOCK_N,), tl.int32)
                    # The lists are read by other threads than those that write them.
                    tl.debug_barrier()
                at = (listed[:, None] + tl.cumsum(reaches, axis=1) - 1).to(tl.int64)
                tl.store(
                    listed_codes_ptr[:, None] + at,
                    tl.broadcast_to(codes[None, :], (BLOCK_N, BLOCK_K)),
                    mask=reaches > 0,
                )
                tl.store(listed_uppers_ptr[:, None] + at, upper, mask=reaches > 0)
                tl.debug_barrier()
                listed += new

        slots = tl.arange(0, BLOCK_K)[None, :]
        there = slots < listed[:, None]
        kept_codes = tl.load(listed_codes_ptr[:, None] + slots, mask=there, other=0)
        kept_uppers = tl.load(listed_uppers_ptr[:, None] + slots, mask=there, other=0.0)
        kept = there & (kept_uppers >= lowest[:, None])
        index = tl.max(tl.where(kept, kept_codes, -1), axis=1)
        rivals = tl.sum(kept.to(tl.int32), axis=1) + (best_index >= 0).to(tl.int32)
        if tl.max(rivals, axis=0) > 1:
            best_score, best_index = _settle(
                best_score,
                best_index,
                listed_codes_ptr,
                listed_uppers_ptr,
                tl.where(rivals > 1, listed, 0),
                lowest,
                x_ptr,
                codebook_ptr,
                rows,
                stride_xn,
                stride_xd,
                stride_ck,
                stride_cd,
                D,
                L2,
                BLOCK_N,
                INTERPRETED,
            )
        index = tl.where(best_index >= 0, best_index, index)
        tl.debug_barrier()
        tl.store(index_ptr + head * N + rows, index.to(tl.int64), mask=row_mask)
        if DISTANCE:
            distance = winner_distance(
                x_ptr,
                codebook_ptr,
                rows,
                tl.maximum(index, 0),
                row_mask,
                stride_xn,
                stride_xd,
                stride_ck,
                stride_cd,
                D,
                L2,
                BLOCK_N,
                CHUNK,
            )
            tl.store(distance_ptr + head * N + rows, distance, mask=row_mask)
