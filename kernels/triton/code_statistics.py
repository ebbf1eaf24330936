"""Sums of rows by code: the statistics of a step, and the gradient of the codebook.

Both are one sorted segment sum. The rows are put in the order of their codes (a stable radix sort
of small integer keys); the sorted rows are cut into chunks of `CHUNK`, each walked from front to
back by one lane in float64. A run of equal codes that lies inside one chunk is finished there. A
run that crosses a border leaves one partial row per chunk, and the partial rows, which are again
sorted by code, go through the same kernel, a level at a time, until one chunk is left.

What follows from it:

- bitwise repeatable: no atomics, and the order of additions is set by `CHUNK` alone, not by tiles,
  warps or timing;
- a code that owns every row costs what any other data costs: each lane walks `CHUNK` rows;
- exact to one rounding: float64 sums rounded once, |error| ≤ u₃₂·|sum| + n·2⁻⁵³·Σ|terms|;
- the host never waits: every launch size follows from the shapes, so a CUDA graph can hold it.

The floor is one read of x and the indices and one write of (K, D). Beyond it this moves, per row,
the key (2 bytes up to 32767 codes, else 4) and the 8-byte row number through the two or four
passes of the sort, and 16·D/CHUNK bytes of partial rows, 1/16 of a float32 x. A counting sort of
our own would save the row numbers' upper half and a few launches; at K = 65536 its table of
(row block × code) counts would be larger than all keys, so the library's radix sort serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

# Rows walked by one lane. It fixes the order of additions: changing it may change last bits.
CHUNK = 64
# Rows loaded ahead of their additions, so that a lane waits once for several rows.
AHEAD = tl.constexpr(4)
NO_CODE = tl.constexpr(-1)
# Elements of one program's accumulator: 4 float64 a thread at 4 warps. No more lanes than that many
# threads can own whole, or the keys pass through shared memory.
TILE_ELEMENTS = 512
MAX_LANES = 64
MAX_BLOCK_D = 128
KEYS_PER_PROGRAM = 1024


@triton.jit(debug=True)
def _code_keys_kernel(
    indices_ptr,
    keys_ptr,
    num_rows,
    rows_per_head,
    num_codes,
    keys_per_head,
    skipped,
    stride_ih,
    stride_in,
    BLOCK_N: tl.constexpr,
):
    # A program owns BLOCK_N rows. It writes each row's sort key: head·keys_per_head + code, or
    # `skipped`, which sorts last, where the index is −1. An index outside the codebook stops the
    # program as one outside a tensor stops PyTorch's own indexing.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < num_rows
    head = row // rows_per_head
    at = indices_ptr + head * stride_ih + (row - head * rows_per_head) * stride_in
    index = tl.load(at, mask=inside, other=-1)
    known = (index >= -1) & (index < num_codes)
    tl.device_assert(known, "code_statistics: an index is outside the codebook")
    key = tl.where(known & (index >= 0), head * keys_per_head + index, skipped)
    tl.store(keys_ptr + row, key.to(keys_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _run_ends_kernel(keys_ptr, starts_ptr, ends_ptr, num_entries, num_keys, BLOCK_N: tl.constexpr):
    # A program owns BLOCK_N sorted keys and writes where runs of equal keys start and end.
    entry = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < num_entries
    key = tl.load(keys_ptr + entry, mask=inside, other=NO_CODE).to(tl.int32)
    before = tl.load(keys_ptr + entry - 1, mask=inside & (entry > 0), other=NO_CODE)
    after = tl.load(keys_ptr + entry + 1, mask=entry + 1 < num_entries, other=NO_CODE)
    live = inside & (key < num_keys)
    position = entry.to(tl.int32)
    tl.store(starts_ptr + key, position, mask=live & (before.to(tl.int32) != key))
    tl.store(ends_ptr + key, position + 1, mask=live & (after.to(tl.int32) != key))


@triton.jit
def _key(keys_ptr, entry, num_entries, num_keys):
    """The code of sorted entries; NO_CODE beyond them and for rows that are skipped."""
    inside = (entry >= 0) & (entry < num_entries)
    key = tl.load(keys_ptr + entry, mask=inside, other=NO_CODE).to(tl.int32)
    return tl.where(key < num_keys, key, NO_CODE)


@triton.jit
def _store_float64(low_ptr, high_ptr, offset, value, mask):
    # In two 32-bit planes: their tiles then have the layout of the float32 tiles, where a 64-bit
    # plane would have its own, and every row would pass through shared memory.
    bits = value.to(tl.int64, bitcast=True)
    tl.store(low_ptr + offset, bits.to(tl.int32), mask=mask)
    tl.store(high_ptr + offset, (bits >> 32).to(tl.int32), mask=mask)


@triton.jit
def _load_float64(low_ptr, high_ptr, offset, mask):
    low = tl.load(low_ptr + offset, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(high_ptr + offset, mask=mask, other=0).to(tl.int64)
    return ((high << 32) | low).to(tl.float64, bitcast=True)


@triton.jit
def _terms(
    entry,
    key,
    d,
    in_d,
    order_ptr,
    values_ptr,
    high_ptr,
    weight_ptr,
    codebook_ptr,
    rows_per_head,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_wh,
    stride_wn,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    KIND: tl.constexpr,
):
    """The (LANES, BLOCK_D) float64 terms of one sorted entry per lane; zeros without a code."""
    live = key >= 0
    mask = live[:, None] & in_d[None, :]
    if KIND == "partial":
        term = _load_float64(values_ptr, high_ptr, entry[:, None] * WIDTH + d[None, :], mask)
    else:
        row = tl.load(order_ptr + entry, mask=live, other=0)
        head = tl.zeros_like(row)
        if HEADS:
            # 32 bits: a 64-bit division is a subroutine, and the rows of a sort fit.
            head = (row.to(tl.int32) // rows_per_head).to(tl.int64)
            row -= head * rows_per_head
        if PACKED:
            at = values_ptr + (row * WIDTH)[:, None] + d[None, :]
        else:
            at = values_ptr + (head * stride_vh + row * stride_vn)[:, None] + d[None, :] * stride_vd
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if KIND == "pull":
            # ∂/∂q of w‖x − q‖². The rows of a run share q: its loads hit the L1 cache.
            weight = tl.load(weight_ptr + head * stride_wh + row * stride_wn, mask=live, other=0.0)
            code = codebook_ptr + (key.to(tl.int64) * WIDTH)[:, None] + d[None, :]
            q = tl.load(code, mask=mask, other=0.0).to(tl.float32)
            value = (2.0 * weight.to(tl.float32))[:, None] * (q - value)
        term = value.to(tl.float64)
    return term


@triton.jit
def _segment_sum_kernel(
    keys_ptr,
    order_ptr,
    values_ptr,
    high_ptr,
    weight_ptr,
    codebook_ptr,
    sums_ptr,
    open_keys_ptr,
    open_low_ptr,
    open_high_ptr,
    num_entries,
    num_chunks,
    num_keys,
    rows_per_head,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_wh,
    stride_wn,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    KIND: tl.constexpr,
    LENGTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns LANES chunks of LENGTH sorted entries and BLOCK_D channels. On chip stays one
    # running sum per lane and channel; the terms are formed there and never written. Written are
    # the rows of `sums` whose runs lie in one chunk, and two open rows per chunk: row 2c, what a
    # run from an earlier chunk adds here, and row 2c+1, the start of a run that goes on. A row
    # without a run gets NO_CODE. A run through the whole chunk is row 2c, with zeros in 2c+1, so
    # that the rows of one run stay neighbours.
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < WIDTH
    first = lane * LENGTH
    key = _key(keys_ptr, first, num_entries, num_keys)
    continued = (key >= 0) & (_key(keys_ptr, first - 1, num_entries, num_keys) == key)
    goes_on = continued
    total = tl.zeros((LANES, BLOCK_D), tl.float64)
    open_row = (2 * lane * WIDTH)[:, None] + d[None, :]

    for start in range(0, LENGTH, AHEAD):
        keys = (key,)
        terms = ()
        for ahead in tl.static_range(AHEAD):
            entry = first + start + ahead
            terms += (
                _terms(
                    entry,
                    keys[ahead],
                    d,
                    in_d,
                    order_ptr,
                    values_ptr,
                    high_ptr,
                    weight_ptr,
                    codebook_ptr,
                    rows_per_head,
                    stride_vh,
                    stride_vn,
                    stride_vd,
                    stride_wh,
                    stride_wn,
                    WIDTH,
                    HEADS,
                    PACKED,
                    KIND,
                ),
            )
            keys += (_key(keys_ptr, entry + 1, num_entries, num_keys),)
        for ahead in tl.static_range(AHEAD):
            key = keys[ahead]
            goes_on = (key >= 0) & (keys[ahead + 1] == key)
            ends = (key >= 0) & (keys[ahead + 1] != key)
            total += terms[ahead]
            tl.store(
                sums_ptr + (key.to(tl.int64) * WIDTH)[:, None] + d[None, :],
                total.to(tl.float32).to(sums_ptr.dtype.element_ty),
                mask=(ends & ~continued)[:, None] & in_d[None, :],
            )
            head_ends = (ends & continued)[:, None] & in_d[None, :]
            _store_float64(open_low_ptr, open_high_ptr, open_row, total, head_ends)
            total = tl.where(goes_on[:, None], total, 0.0)
            continued = continued & goes_on
        key = keys[AHEAD]

    through = (goes_on & continued)[:, None]
    open_mask = goes_on[:, None] & in_d[None, :]
    _store_float64(open_low_ptr, open_high_ptr, open_row, total, open_mask & through)
    rest = tl.where(through, 0.0, total)
    _store_float64(open_low_ptr, open_high_ptr, open_row + WIDTH, rest, open_mask)
    if tl.program_id(1) == 0:
        _store_open_keys(keys_ptr, open_keys_ptr, lane, num_entries, num_chunks, num_keys, LENGTH)


@triton.jit
def _store_open_keys(
    keys_ptr, open_keys_ptr, chunk, num_entries, num_chunks, num_keys, LENGTH: tl.constexpr
):
    """The codes of the two open rows of each chunk, read off the sorted keys at its borders."""
    first = chunk * LENGTH
    beyond = first + LENGTH
    head = _key(keys_ptr, first, num_entries, num_keys)
    continued = _key(keys_ptr, first - 1, num_entries, num_keys) == head
    tail = _key(keys_ptr, beyond - 1, num_entries, num_keys)
    goes_on = _key(keys_ptr, beyond, num_entries, num_keys) == tail
    inside = chunk < num_chunks
    tl.store(open_keys_ptr + 2 * chunk, tl.where(continued, head, NO_CODE), mask=inside)
    tl.store(open_keys_ptr + 2 * chunk + 1, tl.where(goes_on, tail, NO_CODE), mask=inside)


def code_statistics_forward(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code.

    Args:
        x: (N, D) or (heads, N, D) float32, float16 or bfloat16; any strides.
        indices: (N,) or (heads, N) int64 in −1 … num_codes − 1; −1 is skipped.
    Returns:
        counts (K,) and sums (K, D), or with the heads leading; float32.
    """
    heads = x.shape[0] if x.dim() == 3 else 1
    num_keys = heads * num_codes
    sums = x.new_zeros((*x.shape[:-2], num_codes, x.shape[-1]), dtype=torch.float32)
    if indices.numel() == 0:
        return sums.new_zeros(sums.shape[:-1]), sums
    with torch.cuda.device_of(x):
        keys, order = _sort_by_code(indices, num_codes, num_codes, num_keys)
        _segment_sums("rows", x, None, None, keys, order, sums)
        return _run_lengths(keys, num_keys).view(sums.shape[:-1]), sums


def codebook_gradient(grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Gradient of Σ_n grad_loss[n]·‖x[n] − codebook[indices[n]]‖² to the codebook.

        grad[k] = Σ_{n : indices[n] = k} 2·grad_loss[n]·(codebook[k] − x[n])

    Terms are float32, formed on chip; heads that share one codebook are summed in the same pass.

    Args:
        grad_loss: (N,) or (heads, N); x: (N, D) or (heads, N, D); any strides.
        codebook: (K, D), or (heads, K, D).
        indices: as `code_statistics_forward`.
    Returns:
        The shape and dtype of the codebook.
    """
    num_codes = codebook.shape[-2]
    keys_per_head = num_codes if codebook.dim() == 3 else 0
    num_keys = codebook.shape[:-1].numel()
    grad = torch.zeros(codebook.shape, dtype=codebook.dtype, device=codebook.device)
    if indices.numel() > 0:
        book = codebook.contiguous()
        with torch.cuda.device_of(x):
            keys, order = _sort_by_code(indices, num_codes, keys_per_head, num_keys)
            _segment_sums("pull", x, grad_loss, book, keys, order, grad)
    return grad


def _sort_by_code(
    indices: Tensor, num_codes: int, keys_per_head: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Sort keys ascending and the rows that hold them; equal keys in row order."""
    if num_keys >= 2**31 - 1 or indices.numel() >= 2**31:
        raise ValueError(
            f"code_statistics: rows and codes, all heads together, must each be fewer than 2³¹; "
            f"got {indices.numel()} and {num_keys}. Split the batch."
        )
    # The fewer bytes a key has, the fewer passes the radix sort makes over it.
    dtype = torch.int16 if num_keys < 2**15 else torch.int32
    rows = indices if indices.dim() == 2 else indices[None]
    keys = torch.empty(rows.numel(), dtype=dtype, device=indices.device)
    _code_keys_kernel[(triton.cdiv(rows.numel(), KEYS_PER_PROGRAM),)](
        rows,
        keys,
        rows.numel(),
        rows.shape[1],
        num_codes,
        keys_per_head,
        num_keys,
        *rows.stride(),
        BLOCK_N=KEYS_PER_PROGRAM,
        enable_fp_fusion=True,
    )
    return torch.sort(keys, stable=True)


def _run_lengths(keys: Tensor, num_keys: int) -> Tensor:
    """How often each code occurs among the sorted keys, float32."""
    starts, ends = torch.zeros((2, num_keys), dtype=torch.int32, device=keys.device)
    _run_ends_kernel[(triton.cdiv(len(keys), KEYS_PER_PROGRAM),)](
        *(keys, starts, ends, len(keys), num_keys),
        BLOCK_N=KEYS_PER_PROGRAM,
        enable_fp_fusion=True,
    )
    lengths = torch.empty(num_keys, dtype=torch.float32, device=keys.device)
    return torch.sub(ends, starts, out=lengths)


def _segment_sums(
    kind: str,
    x: Tensor,
    weight: Tensor | None,
    codebook: Tensor | None,
    keys: Tensor,
    order: Tensor,
    sums: Tensor,
) -> None:
    """Fill the rows of `sums` whose codes have rows; it holds zeros."""
    width = x.shape[-1]
    num_keys = sums.numel() // width
    strides, heads = _addressing(x, weight)
    packed = x.is_contiguous()
    block_d = min(MAX_BLOCK_D, triton.next_power_of_2(width))
    values, high = x, x
    while True:
        chunks = triton.cdiv(len(keys), CHUNK)
        # One chunk leaves nothing open: its buffers are never written, and its keys never read.
        rows = 2 * chunks if chunks > 1 else 0
        open_keys = torch.empty(2 * chunks, dtype=torch.int32, device=x.device)
        low, open_high = torch.empty((2, rows, width), dtype=torch.int32, device=x.device)
        lanes = min(MAX_LANES, TILE_ELEMENTS // block_d, triton.next_power_of_2(chunks))
        _segment_sum_kernel[(triton.cdiv(chunks, lanes), triton.cdiv(width, block_d))](
            *(keys, order, values, high, weight, codebook, sums, open_keys, low, open_high),
            *(len(keys), chunks, num_keys, x.shape[-2]),
            *strides,
            WIDTH=width,
            HEADS=heads,
            PACKED=packed,
            KIND=kind,
            LENGTH=CHUNK,
            LANES=lanes,
            BLOCK_D=block_d,
            enable_fp_fusion=True,
        )
        if chunks == 1:
            return
        kind, keys, values, high = "partial", open_keys, low, open_high


def _addressing(x: Tensor, weight: Tensor | None) -> tuple[tuple[int, ...], bool]:
    """Strides of x (head, row, channel) and the weights (head, row); whether rows have heads.

    Where the rows of all heads lie one after the other, they need no head of their own.
    """
    x_strides = x.stride() if x.dim() == 3 else (0, *x.stride())
    one_weight = weight is None or not any(weight.stride())
    if x.is_contiguous() and (one_weight or weight.is_contiguous()):
        return (*x_strides, 0, 0 if one_weight else 1), False
    weight_strides = (0, 0) if weight is None else (0, *weight.stride())[-2:]
    return (*x_strides, *weight_strides), x.dim() == 3
