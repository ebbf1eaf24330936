"""Which rows the fast pass has settled: the bound of nearest_code.md, applied.

A row is certain when the best slot beats every other by twice the error bound, and one of the
slot's codes beats its neighbours there by as much. The others are queued for the resolver.
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
    LOWEST,
    NORM,
    RATIO_BOTTOM,
    RATIO_BOTTOM_COLUMNS,
    RATIO_TOP,
    RECORD,
    RESIDUAL,
    load_rows,
    operand_dims,
    row_operand,
    row_scales,
    scale_ratio,
    scaled,
)

# Tensor cores may cut instead of round: twice the unit roundoff of float32.
CUT = tl.constexpr(2.0**-23)
ROUNDOFF = tl.constexpr(2.0**-24)
DOUBLE_ROUNDOFF = tl.constexpr(2.0**-53)
# Sums of sizes are float32 themselves, and so is this bound: one part in a hundred above both.
MARGIN = tl.constexpr(1.01)
# What underflows is below this, the lengths that the GPU's square root flushes to 0 included.
SLACK = tl.constexpr(2.0**-40)


@triton.jit
def recorded(record_ptr, slot):
    return tl.load(record_ptr + slot).to(tl.float32, bitcast=True)


@triton.jit
def _error_bound(
    record_ptr,
    row_e,
    codes_e,
    ratio,
    length,
    residual,
    low_length,
    score,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    ID_BITS: tl.constexpr,
    L2: tl.constexpr,
):
    """How far a score of the fast pass may lie from the canonical one; nearest_code.md, (1)–(6)."""
    code = recorded(record_ptr, LENGTH)
    code_residual = recorded(record_ptr, RESIDUAL)
    norm = ratio * recorded(record_ptr, NORM)
    # (1) rounding to fp16 pieces
    residual = residual + length * ROUNDOFF
    bound = residual * code + (length + residual) * code_residual
    product = (length + residual) * (code + code_residual)
    if TERMS == 1:
        # (2) accumulation, (3) the norm: rounded, then subtracted
        bound += product * ((D + WIDTH // 4 + 4) * CUT + ROUNDOFF) + norm * CUT
        bottom: tl.constexpr = RATIO_BOTTOM
    else:
        bound += low_length * recorded(record_ptr, LOW_LENGTH)
        bound += (product * 1.01 + norm) * ((3 * D + WIDTH // 4 + 8) * CUT) + ratio * ROUNDOFF
        bottom: tl.constexpr = RATIO_BOTTOM_COLUMNS
    # (4) a ratio of scales that was held up
    bound += tl.where(row_e - codes_e < bottom, norm, 0.0)
    # (5) a tile's number in the score's low bits
    if ID_BITS > 0:
        bound += 2.0 ** (ID_BITS - 23) * tl.abs(score)
    # (6) the rounding of the canonical float64 score itself
    if L2:
        back = tl.minimum(codes_e - row_e, 250)
        canonical = scaled(length * length, back) + 2.0 * length * code + ratio * code * code
    else:
        canonical = length * (code + scaled(recorded(record_ptr, CENTER_LENGTH), codes_e))
    return (bound + canonical * ((D + 4) * DOUBLE_ROUNDOFF) + SLACK) * MARGIN


@triton.jit
def _merge_splits(
    winner_ptr, best_ptr, second_ptr, at, step, splits, row_mask, BLOCK_N: tl.constexpr
):
    """The best slot over all ranges of tiles, and the best score of every other slot."""
    best = tl.full((BLOCK_N,), LOWEST, tl.float32)
    second = best
    winner = tl.zeros((BLOCK_N,), tl.int32)
    for split in tl.range(0, splits):
        here = at + split * step
        top = tl.load(best_ptr + here, mask=row_mask, other=LOWEST)
        slot = tl.load(winner_ptr + here, mask=row_mask, other=0)
        others = tl.load(second_ptr + here, mask=row_mask, other=LOWEST)
        second = tl.maximum(tl.maximum(second, others), tl.minimum(best, top))
        winner = tl.where(top > best, slot, winner)
        best = tl.maximum(best, top)
    return winner, best, second


@triton.jit
def winner_distance(
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
    CHUNK: tl.constexpr,
):
    """Σ(x − c)², or Σ x·c, of a code per row, in float32."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, D, CHUNK):
        dims = start + tl.arange(0, CHUNK).to(tl.int64)
        inside = mask[:, None] & (dims < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xn + dims[None, :] * stride_xd, inside, 0.0)
        at = codes[:, None].to(tl.int64) * stride_ck + dims[None, :] * stride_cd
        c = tl.load(codebook_ptr + at, inside, 0.0)
        if L2:
            difference = x.to(tl.float32) - c.to(tl.float32)
            total += tl.sum(difference * difference, axis=1)
        else:
            total += tl.sum(x.to(tl.float32) * c.to(tl.float32), axis=1)
    return total


@triton.jit
def nearest_code_certify_kernel(
    x_ptr,
    codebook_ptr,
    operand_ptr,
    norms_ptr,
    center_ptr,
    record_ptr,
    winner_ptr,
    best_ptr,
    second_ptr,
    index_ptr,
    distance_ptr,
    queue_ptr,
    queued_ptr,
    N,
    padded_codes,
    splits,
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
    TERMS: tl.constexpr,
    L2: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    ID_BITS: tl.constexpr,
    EXACT: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The index of each row that is certain; the others' numbers appended to the queue.

    A program owns BLOCK_N rows. On chip: their chunk of channels, that of the GROUP codes of the
    winning slot, and GROUP scores per row.
    """
    head = tl.program_id(1).to(tl.int64)
    book = head % num_books
    record_ptr += book * RECORD
    center_ptr += book * D
    operand_ptr += book * padded_codes * WIDTH
    norms_ptr += book * padded_codes
    x_ptr += head * stride_xh
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    out = head * N + rows
    winner, best, second = _merge_splits(
        winner_ptr,
        best_ptr,
        second_ptr,
        out,
        tl.num_programs(1).to(tl.int64) * N,
        splits,
        row_mask,
        BLOCK_N,
    )

    # The row's scale, from the same maximum that the search took.
    codes_e = tl.load(record_ptr + EXPONENT)
    row_e, overflowed, broken = row_scales(
        *(x_ptr, center_ptr, rows, row_mask, codes_e, stride_xn, stride_xd),
        *(D, WIDTH, CHUNK, TERMS, RATIO_TOP, L2, BLOCK_N),
    )
    ratio = scale_ratio(row_e, codes_e, TERMS)

    codes = winner[:, None] + SLOTS * tl.arange(0, GROUP)[None, :]
    scores = tl.zeros((BLOCK_N, GROUP), tl.float32)
    length = tl.zeros((BLOCK_N,), tl.float32)
    residual = tl.zeros((BLOCK_N,), tl.float32)
    low_length = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, WIDTH, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        dims, held = operand_dims(columns, D, TERMS)
        x, _ = load_rows(x_ptr, center_ptr, rows, row_mask, dims, held, stride_xn, stride_xd, L2)
        x = scaled(tl.where(overflowed[:, None] > 0, 0.0, x), row_e[:, None])
        operand = row_operand(x, ratio, columns, D, TERMS).to(tl.float32)
        at = operand_ptr + codes[:, :, None].to(tl.int64) * WIDTH + columns[None, None, :]
        scores += tl.sum(operand[:, None, :] * tl.load(at).to(tl.float32), axis=2)
        own = tl.where((columns < D)[None, :], x, 0.0)
        high = own.to(tl.float16).to(tl.float32)
        rest = own - high
        if TERMS == 3:
            low = rest.to(tl.float16).to(tl.float32)
            rest = rest - low
            low_length += tl.sum(low * low, axis=1)
        length += tl.sum(own * own, axis=1)
        residual += tl.sum(rest * rest, axis=1)
    if TERMS == 1:
        scores -= ratio[:, None] * tl.load(norms_ptr + codes)

    column = tl.arange(0, GROUP)[None, :]
    top = tl.max(scores, axis=1)
    pick = tl.min(tl.where(scores == top[:, None], column, GROUP - 1), axis=1)
    index = tl.sum(tl.where(column == pick[:, None], codes, 0), axis=1)
    neighbour = tl.max(tl.where(column == pick[:, None], LOWEST, scores), axis=1)

    none = (broken > 0) | (tl.load(record_ptr + ALIVE) == 0)
    index = tl.where(none, -1, index).to(tl.int64)
    tl.store(index_ptr + out, index, mask=row_mask)
    if DISTANCE:
        distance = winner_distance(
            x_ptr,
            codebook_ptr + book * stride_ch,
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
        tl.store(distance_ptr + out, tl.where(none, float("nan"), distance), mask=row_mask)
    if EXACT:
        bound = _error_bound(
            record_ptr,
            row_e,
            codes_e,
            ratio,
            tl.sqrt(length),
            tl.sqrt(residual),
            tl.sqrt(low_length),
            tl.maximum(tl.abs(best), tl.abs(second)),
            D,
            WIDTH,
            TERMS,
            ID_BITS,
            L2,
        )
        certain = (best - second > 2.0 * bound) & (top - neighbour > 2.0 * bound)
        certain = certain & (overflowed == 0)
        unsure = (row_mask & (none == 0) & (certain == 0)).to(tl.int32)
        first = tl.atomic_add(queued_ptr + head, tl.sum(unsure, axis=0))
        place = head * N + first + tl.cumsum(unsure, axis=0) - 1
        tl.store(queue_ptr + place, rows.to(tl.int32), mask=unsure > 0)
