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
    LOWEST,
    RECORD,
    load_rows,
    power_of_two,
    row_scales,
    scaled,
)

# The ratio of a row's scale to the codebook's; codes' own scales are 2⁻¹²⁰ to 2⁵ of that.
RATIO_TOP = tl.constexpr(126)
RATIO_BOTTOM = tl.constexpr(-100)
# Of the product of both more than this is not needed: a code so much longer than the row only
# falls further behind as it grows. Nor would its square fit into float32.
SCALE_TOP = tl.constexpr(2.0**46)
# Bounds on a scaled code: its length, that of its low piece and of what both pieces leave.
CODE_LENGTH = tl.constexpr(16.0)
CODE_LOW_LENGTH = tl.constexpr(2.0**-6)
CODE_RESIDUAL = tl.constexpr(2.0**-17)
# A row shorter than 2⁻⁶³ has no length after the GPU's square root.
FLUSHED = tl.constexpr(2.0**-56)
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
def _largest(values):
    """The largest of a block's values, as a scalar.

    By way of a column: of what a tcgen05 product has led to, Triton 3.6 lays out the reductions
    anew, and aborts at one over a tensor of one dimension.
    """
    return tl.max(values[:, None], axis=0).item()


@triton.jit
def _settle(
    best_score,
    best_index,
    codes_ptr,
    uppers_ptr,
    listed,
    lowest,
    last,
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
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Let the listed codes that still reach the best one's interval compete in float64.

    In the last turn a code that has no rival in its row wins without.
    """
    slots = tl.arange(0, BLOCK_K)[None, :]
    there = slots < listed[:, None]
    uppers = tl.load(uppers_ptr[:, None] + slots, mask=there, other=LOWEST)
    kept = there & (uppers >= lowest[:, None])
    rivals = tl.sum(kept.to(tl.int32), axis=1) + (best_index >= 0).to(tl.int32)
    codes = tl.load(codes_ptr[:, None] + slots, mask=kept, other=-1)
    alone = last & (rivals == 1) & (best_index < 0)
    contested = tl.where(last & (rivals <= 1), 0, listed)
    for t in tl.range(0, _largest(contested)):
        upper = tl.load(uppers_ptr + t, mask=t < contested, other=LOWEST)
        competes = (t < contested) & (upper >= lowest)
        if _largest(competes.to(tl.int32)) > 0:
            code = tl.load(codes_ptr + t, mask=competes, other=0)
            score = _canonical_scores(
                *(x_ptr, codebook_ptr, rows, code, competes, stride_xn, stride_xd),
                *(stride_ck, stride_cd, D, L2, BLOCK_N, INTERPRETED),
            )
            nearer = (best_index < 0) | (score < best_score)
            tie = (score == best_score) & (code < best_index)
            better = competes & (nearer | tie)
            best_score = tl.where(better, score, best_score)
            best_index = tl.where(better, code, best_index)
    best_index = tl.where(alone, tl.max(codes, axis=1), best_index)
    return best_score, best_index


@triton.jit
def _row_pieces(
    pieces_ptr,
    x_ptr,
    center_ptr,
    rows,
    row_mask,
    row_e,
    overflowed,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The scaled rows in high and low fp16 pieces, and the squared lengths of row, low and rest.

    Of several chunks the pieces are left in memory, in one chunk they are returned.
    """
    squared = tl.zeros((BLOCK_N,), tl.float32)
    low_squared = squared
    rest_squared = squared
    high = tl.zeros((BLOCK_N, CHUNK), tl.float16)
    low = high
    for start in tl.range(0, WIDTH, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        x, _ = load_rows(
            x_ptr, center_ptr, rows, row_mask, dims, dims < D, stride_xn, stride_xd, L2
        )
        x = tl.where(overflowed[:, None] > 0, 0.0, scaled(x, row_e[:, None]))
        high = x.to(tl.float16)
        rest = x - high.to(tl.float32)
        low = rest.to(tl.float16)
        wide_low = low.to(tl.float32)
        rest = rest - wide_low
        squared += tl.sum(x * x, axis=1)
        low_squared += tl.sum(wide_low * wide_low, axis=1)
        rest_squared += tl.sum(rest * rest, axis=1)
        if CHUNK < WIDTH:
            tl.store(pieces_ptr + dims[None, :], high)
            tl.store(pieces_ptr + WIDTH + dims[None, :], low)
    return high, low, squared, low_squared, rest_squared


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
    inner += tl.sqrt(low_squared) * CODE_LOW_LENGTH + FLUSHED
    inner += (length + residual) * ((D + WIDTH // 4 + 16) * CUT * 1.01 * CODE_LENGTH)
    outer = squared
    if L2 == 0:
        outer = length * (ratio * scaled(recorded(record_ptr, CENTER_LENGTH), codes_e))
    outer = outer * (2 * (D + 4) * DOUBLE_ROUNDOFF * MARGIN) + SLACK
    # Nothing is known of a row that overflowed: every code's interval is the whole line.
    return inner * MARGIN, tl.where(overflowed > 0, float("inf"), outer)


@triton.jit
def _products(
    high_ptr,
    low_ptr,
    pieces_ptr,
    x_high,
    x_low,
    codes,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of the rows with a tile of codes, high·high apart from the two that are small."""
    large = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    small = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    at = codes[None, :].to(tl.int64) * WIDTH + tl.arange(0, CHUNK)[:, None]
    for start in tl.range(0, WIDTH, CHUNK):
        if CHUNK < WIDTH:
            dims = start + tl.arange(0, CHUNK)[None, :]
            x_high = tl.load(pieces_ptr + dims)
            x_low = tl.load(pieces_ptr + WIDTH + dims)
        high = tl.load(high_ptr + at + start)
        low = tl.load(low_ptr + at + start)
        small = tl.dot(x_low, high, small)
        small = tl.dot(x_high, low, small)
        large = tl.dot(x_high, high, large)
    return large + small


@triton.jit
def _tile_intervals(products, inner, outer, ratio, resolver_ptr, codes, L2: tl.constexpr):
    """Lower and upper ends of the scores of a tile; of dead codes, below everything."""
    own = tl.load(resolver_ptr + codes * RESOLVER_RECORD)
    norm = tl.load(resolver_ptr + codes * RESOLVER_RECORD + 1)
    scale = ratio[:, None] * own[None, :]
    lower = products - inner[:, None]
    upper = products + inner[:, None]
    if L2:
        known = scale <= SCALE_TOP
        scale = tl.minimum(scale, SCALE_TOP)
        upper -= scale * (norm * (1.0 - NORM_ROUNDOFF))[None, :]
        lower -= scale * (norm * (1.0 + NORM_ROUNDOFF))[None, :]
        lower = tl.where(known, lower * scale - outer[:, None], LOWEST)
    else:
        lower = lower * scale - outer[:, None]
    upper = upper * scale + outer[:, None]
    alive = norm[None, :] >= 0.0
    return tl.where(alive, lower, LOWEST), tl.where(alive, upper, LOWEST)


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
    pieces_ptr,
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

    A program owns every so-many-th block of BLOCK_N queued rows, and in memory two lists of
    BLOCK_K entries per row (and wide rows' pieces). On chip: one tile of scores, the best lower
    end of an interval per row. The length of the queue is read on the device.
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
    own = (head * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    listed_codes_ptr += own * BLOCK_K
    listed_uppers_ptr += own * BLOCK_K
    pieces = pieces_ptr + own[:, None] * (2 * WIDTH)
    codes_e = tl.load(record_ptr + EXPONENT)
    queued = tl.load(queued_ptr + head)
    tiles = padded_codes // BLOCK_K
    for block in tl.range(tl.program_id(0), tl.cdiv(queued, BLOCK_N), tl.num_programs(0)):
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = place < queued
        rows = tl.load(queue_ptr + place, mask=row_mask, other=0).to(tl.int64)
        row_e, overflowed, _ = row_scales(
            *(x_ptr, center_ptr, rows, row_mask, codes_e, stride_xn, stride_xd),
            *(D, WIDTH, CHUNK, 1, RATIO_TOP, L2, BLOCK_N),
        )
        x_high, x_low, squared, low_squared, rest_squared = _row_pieces(
            *(pieces, x_ptr, center_ptr, rows, row_mask, row_e, overflowed, stride_xn, stride_xd),
            *(D, WIDTH, CHUNK, L2, BLOCK_N),
        )
        # What threads of this program write to memory, others of it read.
        tl.debug_barrier()
        # Without norms the row's scale moves all scores alike.
        difference = row_e - codes_e if L2 else row_e * 0
        ratio = power_of_two(tl.minimum(tl.maximum(difference, RATIO_BOTTOM), RATIO_TOP))
        inner, outer = _interval(
            *(record_ptr, codes_e, ratio, overflowed, squared, low_squared, rest_squared),
            *(D, WIDTH, L2),
        )

        lowest = tl.full((BLOCK_N,), LOWEST, tl.float32)
        listed = tl.zeros((BLOCK_N,), tl.int32)
        best_score = tl.zeros((BLOCK_N,), tl.float64)
        best_index = tl.full((BLOCK_N,), -1, tl.int32)
        # One turn more than there are tiles: in the last, the lists' last entries compete.
        for tile in tl.range(0, tiles + 1, num_stages=1):
            codes = tl.minimum(tile, tiles - 1) * BLOCK_K + tl.arange(0, BLOCK_K)
            products = _products(
                *(high_ptr, low_ptr, pieces, x_high, x_low, codes),
                *(WIDTH, CHUNK, BLOCK_N, BLOCK_K),
            )
            lower, upper = _tile_intervals(products, inner, outer, ratio, resolver_ptr, codes, L2)
            lowest = tl.maximum(lowest, tl.max(lower, axis=1))
            wanted = row_mask & (tile < tiles)
            reaches = wanted[:, None] & (upper >= lowest[:, None]) & (upper > LOWEST)
            reaches = reaches.to(tl.int32)
            new = tl.sum(reaches, axis=1)
            if (_largest(listed + new) > BLOCK_K) | (tile == tiles):
                best_score, best_index = _settle(
                    *(best_score, best_index, listed_codes_ptr, listed_uppers_ptr, listed),
                    *(
                        lowest,
                        tile == tiles,
                        x_ptr,
                        codebook_ptr,
                        rows,
                        stride_xn,
                        stride_xd,
                        stride_ck,
                    ),
                    *(stride_cd, D, L2, BLOCK_N, BLOCK_K, INTERPRETED),
                )
                listed = tl.zeros((BLOCK_N,), tl.int32)
                tl.debug_barrier()
            if _largest(new) > 0:
                at = (listed[:, None] + tl.cumsum(reaches, axis=1) - 1).to(tl.int64)
                numbers = tl.broadcast_to(codes[None, :], (BLOCK_N, BLOCK_K))
                tl.store(listed_codes_ptr[:, None] + at, numbers, mask=reaches > 0)
                tl.store(listed_uppers_ptr[:, None] + at, upper, mask=reaches > 0)
                tl.debug_barrier()
                listed += new

        tl.store(index_ptr + head * N + rows, best_index.to(tl.int64), mask=row_mask)
        if DISTANCE:
            distance = winner_distance(
                *(x_ptr, codebook_ptr, rows, tl.maximum(best_index, 0), row_mask),
                *(stride_xn, stride_xd, stride_ck, stride_cd, D, L2, BLOCK_N, CHUNK),
            )
            tl.store(distance_ptr + head * N + rows, distance, mask=row_mask)
