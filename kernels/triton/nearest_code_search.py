"""The fast pass: each row's best slot of codes, and a bound on all the others.

A slot is the set of GROUP codes of one tile whose columns lie BLOCK_K/GROUP apart. The maximum
over a slot is taken inside the accumulator, where those columns are registers of one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .halves import halves
from .nearest_code_rows import (
    EXPONENT,
    LOWEST,
    RATIO_TOP,
    RECORD,
    load_rows,
    not_finite,
    operand_dims,
    row_exponent,
    row_operand,
    scale_ratio,
    scaled,
)


@triton.jit
def _slot_maxima(tile, GROUP: tl.constexpr):
    """Column s of the result is the largest of columns s, s + W, s + 2W …; W = width/GROUP."""
    if GROUP == 1:
        top = tile
    else:
        left, right = halves(tile)
        top = tl.maximum(_slot_maxima(left, GROUP // 2), _slot_maxima(right, GROUP // 2))
    return top


@triton.jit
def _fold(best, second, ids, tile, k, GROUP: tl.constexpr, ID_BITS: tl.constexpr):
    """Let tile number k compete for each slot's best and second-best score.

    With ID_BITS the tile's number replaces that many low bits of the score (what that moves a
    score by is in the bound); without, it is kept beside it.
    """
    top = _slot_maxima(tile, GROUP)
    if ID_BITS > 0:
        keep: tl.constexpr = -(1 << ID_BITS)
        top = ((top.to(tl.int32, bitcast=True) & keep) | k).to(tl.float32, bitcast=True)
    else:
        ids = tl.where(top > best, k, ids)
    second = tl.maximum(second, tl.minimum(best, top))
    best = tl.maximum(best, top)
    return best, second, ids


@triton.jit
def _load_codes(
    codes,
    row,
    column,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(CHUNK, BLOCK_K) fp16: CHUNK columns of a tile of codes, from a descriptor or a pointer."""
    if TMA:
        block = codes.load([row, column]).T
    else:
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_K)
        columns = column + tl.arange(0, CHUNK)
        block = tl.load(codes + rows[None, :] * WIDTH + columns[:, None])
    return block


@triton.jit
def _product(
    x,
    codes,
    row,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of the rows with BLOCK_K codes; x in registers, or pointers to fp16 rows."""
    if CHUNK == WIDTH:
        block = _load_codes(codes, row, 0, WIDTH, CHUNK, TMA, BLOCK_K)
        scores = tl.dot(x, block, out_dtype=tl.float32)
    else:
        scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, WIDTH, CHUNK):
            rows = tl.load(x + start + tl.arange(0, CHUNK)[None, :])
            block = _load_codes(codes, row, start, WIDTH, CHUNK, TMA, BLOCK_K)
            scores = tl.dot(rows, block, scores)
    return scores


@triton.jit
def _less_norm(scores, ratio, norms_ptr, tile, TERMS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Take the codes' half squared lengths off, unless columns of the product have done so."""
    if TERMS == 1:
        norm = tl.load(norms_ptr + tile * BLOCK_K + tl.arange(0, BLOCK_K))
        scores = scores - ratio[:, None] * norm[None, :]
    return scores


@triton.jit
def _rows_in_registers(
    x_ptr,
    center_ptr,
    rows,
    row_mask,
    codes_exponent,
    stride_n,
    stride_d,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    L2: tl.constexpr,
):
    """A block of rows as the product's fp16 operand, and their ratio of scales."""
    columns = tl.arange(0, WIDTH)
    dims, held = operand_dims(columns, D, TERMS)
    x, _ = load_rows(x_ptr, center_ptr, rows, row_mask, dims, held, stride_n, stride_d, L2)
    # Rows that hold NaN or Inf, or overflowed when centred, go on as zeros; the certificate
    # knows them again.
    x = tl.where(tl.max(not_finite(x), axis=1)[:, None] > 0, 0.0, x)
    e = row_exponent(tl.max(tl.abs(x), axis=1), codes_exponent, RATIO_TOP, L2)
    ratio = scale_ratio(e, codes_exponent, TERMS)
    return row_operand(scaled(x, e[:, None]), ratio, columns, D, TERMS), ratio


@triton.jit
def nearest_code_search_kernel(
    x_ptr,
    codes,
    norms_ptr,
    center_ptr,
    record_ptr,
    ratio_ptr,
    winner_ptr,
    best_ptr,
    second_ptr,
    N,
    padded_codes,
    tiles_per_split,
    num_books,
    stride_xh,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TERMS: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ID_BITS: tl.constexpr,
    TMA: tl.constexpr,
    PAIRED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Best slot, its score and the best score elsewhere, of each row among a range of tiles.

    A program owns BLOCK_N rows and a range of tiles of codes (program_id 1). On chip: the rows
    as the product's operand, one tile of scores, best and second per slot. Never in memory: a
    score of a (row, code) pair.
    """
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    book = head % num_books
    book_row = (book * padded_codes).to(tl.int32)
    norms_ptr += book * padded_codes
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    if CHUNK == WIDTH:
        codes_exponent = tl.load(record_ptr + book * RECORD + EXPONENT)
        x, ratio = _rows_in_registers(
            x_ptr + head * stride_xh,
            center_ptr + book * D,
            rows,
            row_mask,
            codes_exponent,
            stride_xn,
            stride_xd,
            D,
            WIDTH,
            TERMS,
            L2,
        )
    else:
        # x_ptr: the rows as nearest_code_round_rows_kernel left them.
        safe = head * N + tl.minimum(rows, N - 1)
        x = x_ptr + safe[:, None] * WIDTH
        ratio = tl.load(ratio_ptr + safe)

    SLOTS: tl.constexpr = BLOCK_K // GROUP
    first = split * tiles_per_split
    count = tl.minimum(tiles_per_split, padded_codes // BLOCK_K - first)
    best = tl.full((BLOCK_N, SLOTS), LOWEST, tl.float32)
    second = best
    ids = tl.zeros((BLOCK_N, SLOTS), tl.int32)
    # The tile before is folded while the next product is on its way. Which of the two comes first
    # in the text decides whether the assembler lets them overlap: with products so narrow that
    # the norm is among their columns, the product; else the fold (SASS of sm_90, Triton 3.6).
    tile = tl.full((BLOCK_N, BLOCK_K), LOWEST, tl.float32)
    if PAIRED:
        for k in tl.range(0, count, 2, num_stages=STAGES):
            for t in tl.static_range(2):
                row = book_row + (first + k + t) * BLOCK_K
                scores = _product(x, codes, row, WIDTH, CHUNK, TMA, BLOCK_N, BLOCK_K)
                before = tl.maximum(k + t - 1, 0)
                best, second, ids = _fold(best, second, ids, tile, before, GROUP, ID_BITS)
                tile = _less_norm(scores, ratio, norms_ptr, first + k + t, TERMS, BLOCK_K)
    else:
        for k in tl.range(0, count, num_stages=STAGES):
            before = tl.maximum(k - 1, 0)
            best, second, ids = _fold(best, second, ids, tile, before, GROUP, ID_BITS)
            row = book_row + (first + k) * BLOCK_K
            scores = _product(x, codes, row, WIDTH, CHUNK, TMA, BLOCK_N, BLOCK_K)
            tile = _less_norm(scores, ratio, norms_ptr, first + k, TERMS, BLOCK_K)
    best, second, ids = _fold(best, second, ids, tile, count - 1, GROUP, ID_BITS)

    slots = tl.arange(0, SLOTS)[None, :]
    top = tl.max(best, axis=1)
    slot = tl.min(tl.where(best == top[:, None], slots, SLOTS), axis=1)
    others = tl.max(tl.where(slots == slot[:, None], second, best), axis=1)
    if ID_BITS > 0:
        winner = top.to(tl.int32, bitcast=True) & ((1 << ID_BITS) - 1)
    else:
        winner = tl.max(tl.where(slots == slot[:, None], ids, 0), axis=1)
    out = (split * tl.num_programs(2) + head) * N + rows
    tl.store(winner_ptr + out, (first + winner) * BLOCK_K + slot, mask=row_mask)
    tl.store(best_ptr + out, top, mask=row_mask)
    tl.store(second_ptr + out, others, mask=row_mask)


@triton.jit
def nearest_code_round_rows_kernel(
    x_ptr,
    center_ptr,
    record_ptr,
    operand_ptr,
    ratio_ptr,
    N,
    num_books,
    stride_xh,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows too wide to be held by a program of the search, rounded and scaled into memory.

    A program owns BLOCK_N rows.
    """
    head = tl.program_id(1).to(tl.int64)
    book = head % num_books
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    operand, ratio = _rows_in_registers(
        x_ptr + head * stride_xh,
        center_ptr + book * D,
        rows,
        row_mask,
        tl.load(record_ptr + book * RECORD + EXPONENT),
        stride_xn,
        stride_xd,
        D,
        WIDTH,
        TERMS,
        L2,
    )
    out = head * N + rows
    at = operand_ptr + out[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at, operand, mask=row_mask[:, None])
    tl.store(ratio_ptr + out, ratio, mask=row_mask)
