"""Launcher of the exact nearest-code search in Triton.

    index[n] = argmin_k Σ_d (x[n, d] − codebook[k, d])²        ("dot": argmax_k Σ_d x·c)

Six kernels, one after the other on the stream, none waiting for the host:

    sum_codes, prepare_codes   nearest_code_codes.py     operands, sizes, duplicates
    search                     nearest_code_search.py    best slot of codes per row, in fp16
    certify                    nearest_code_certify.py   rows that the error bound settles
    prepare_resolver           nearest_code_codes.py     the codes once more, if any row is left
    resolve                    nearest_code_resolve.py   the others, exactly

Of the codes, no more than one copy in the size of float32 is in memory at a time (of rows
narrower than 16 channels, the padding besides).

nearest_code.md derives the bound. nearest_code_tiles.py chooses tiles.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .nearest_code_certify import nearest_code_certify_kernel
from .nearest_code_codes import (
    RESOLVER_RECORD,
    nearest_code_prepare_codes_kernel,
    nearest_code_prepare_resolver_kernel,
    nearest_code_sum_codes_kernel,
)
from .nearest_code_resolve import nearest_code_resolve_kernel
from .nearest_code_rows import RECORD
from .nearest_code_search import nearest_code_round_rows_kernel, nearest_code_search_kernel
from .nearest_code_tiles import Tiles, choose_tiles

# Elements of a codebook's block in the kernels that prepare it, and how many programs sum it.
CODE_ELEMENTS = 2048
SUM_PARTS = 32
# Channels at a time in the kernels that re-read rows.
ROW_CHUNK = 64
CERTIFY_ELEMENTS = 4096
RESOLVE_ROWS = 64
RESOLVE_CODES = 32
RESOLVE_WARPS = 8
RESOLVE_CHUNK = 64
# The fast pass gets at least this many programs where there are tiles of codes to share out.
LEAST_PROGRAMS = 128
# CUDA's limit on the second and third dimension of a grid.
MOST_HEADS = 65535


def nearest_code_forward(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str,
    exact: bool = True,
    distance: bool = True,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices, and distances, of the nearest codes.

    Args:
        x: (heads, N, D) float32, float16 or bfloat16, any strides.
        codebook: (books, K, D), books 1 or heads, any of these dtypes, any strides.
        metric: "l2" or "dot".
        exact: check every row against the bound and settle those it leaves open. Without, the
            index is of a code whose score lies within twice the bound of the best one.
        distance: also compute the winner's distance.
        tiles: in place of those of the data file.
    Returns:
        (heads, N) int64 and (heads, N) float32, the latter empty without `distance`.
    """
    heads, N, _ = x.shape
    indices = x.new_empty((heads, N), dtype=torch.int64)
    distances = x.new_empty((heads, N) if distance else (0,), dtype=torch.float32)
    if N == 0:
        return indices, distances
    for first in range(0, heads, MOST_HEADS):
        part = slice(first, first + MOST_HEADS)
        books = codebook if len(codebook) == 1 else codebook[part]
        _search_heads(x[part], books, metric == "l2", indices[part], distances[part], exact, tiles)
    return indices, distances


def _search_heads(
    x: Tensor,
    codebook: Tensor,
    l2: bool,
    indices: Tensor,
    distances: Tensor,
    exact: bool,
    tiles: Tiles | None,
) -> None:
    """The five launches, for as many heads as a grid has room for."""
    interpreted = x.device.type == "cpu"
    if tiles is None:
        capability = None if interpreted else torch.cuda.get_device_capability(x.device)
        tiles = choose_tiles(x.shape[2], capability)
    with contextlib.nullcontext() if interpreted else torch.cuda.device(x.device):
        codes = _prepare_codes(codebook, tiles, len(x), l2)
        slots = _search(x, codes, tiles, l2)
        queue = _certify(x, codebook, codes, slots, tiles, l2, exact, indices, distances)
        if exact:
            # The search has read its operand: the resolver's pieces of the codes may lie there.
            del codes.operand
            _resolve(x, codebook, codes, queue, l2, interpreted, indices, distances)


@dataclasses.dataclass
class _Codes:
    """A codebook as the kernels read it; see nearest_code_codes.py.

    `padded` is K rounded up, `width` the search's columns, `channels` the resolver's.
    """

    padded: int
    width: int
    channels: int
    operand: Tensor
    norms: Tensor
    center: Tensor
    record: Tensor
    queued: Tensor


@dataclasses.dataclass
class _Slots:
    """What the search found: the best slot's first code, its score, the best score elsewhere."""

    splits: int
    id_bits: int
    winner: Tensor
    best: Tensor
    second: Tensor


def _prepare_codes(codebook: Tensor, tiles: Tiles, heads: int, l2: bool) -> _Codes:
    books, K, D = codebook.shape
    width, channels = tiles.width(D), max(16, triton.next_power_of_2(D))
    padded = _round_up(K, max(tiles.step_codes, RESOLVE_CODES))
    rows = max(1, CODE_ELEMENTS // channels)
    blocks = triton.cdiv(triton.cdiv(K, rows), SUM_PARTS)
    parts = triton.cdiv(triton.cdiv(K, rows), blocks)
    buckets = max(256, triton.next_power_of_2(4 * K))

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return codebook.new_empty(shape, dtype=dtype)

    # One buffer of zeros: the records, the queues' lengths, the owners of hashes.
    zeros = codebook.new_zeros(books * (RECORD.value + buckets) + heads, dtype=torch.int32)
    record, queued, owners = zeros.split([books * RECORD.value, heads, books * buckets])
    sums = empty(books, parts, channels + 2, dtype=torch.float64)
    nearest_code_sum_codes_kernel[(parts, books)](
        *(codebook, sums, owners, K, blocks, *codebook.stride()),
        D=D,
        BLOCK_D=channels,
        BLOCK_R=rows,
        BUCKETS=buckets,
        enable_fp_fusion=True,
    )
    codes = _Codes(
        padded,
        width,
        channels,
        operand=empty(books * padded, width, dtype=torch.float16),
        norms=empty(books, padded, dtype=torch.float32),
        center=empty(books, D, dtype=torch.float32),
        record=record,
        queued=queued,
    )
    nearest_code_prepare_codes_kernel[(triton.cdiv(padded, rows), books)](
        *(codebook, sums, owners, record, codes.center, codes.operand, codes.norms),
        *(K, padded, parts, *codebook.stride()),
        D=D,
        BLOCK_D=channels,
        WIDTH=width,
        TERMS=tiles.terms,
        L2=l2,
        BLOCK_R=rows,
        BUCKETS=buckets,
        enable_fp_fusion=True,
    )
    return codes


def _search(x: Tensor, codes: _Codes, tiles: Tiles, l2: bool) -> _Slots:
    if tiles.hopper:
        return _search_hopper(x, codes, tiles, l2)
    heads, N, D = x.shape
    books = len(codes.center)
    chunk = min(tiles.chunk, codes.width)
    blocks = triton.cdiv(N, tiles.block_n)
    # A split is a whole number of the loop's steps.
    step = 2 if tiles.paired else 1
    steps = codes.padded // (tiles.block_k * step)
    per_split = triton.cdiv(steps, max(1, LEAST_PROGRAMS // (blocks * heads)))
    splits = triton.cdiv(steps, per_split)
    id_bits = tiles.id_bits(per_split * step)
    strides = x.stride()
    ratio = codes.norms
    if chunk < codes.width:
        x, ratio = _round_rows(x, codes, tiles, l2)
    operand = codes.operand
    if tiles.tma:
        operand = TensorDescriptor.from_tensor(operand, [tiles.block_k, chunk])
    slots = _Slots(
        splits,
        id_bits,
        winner=x.new_empty((splits, heads, N), dtype=torch.int32),
        best=x.new_empty((splits, heads, N), dtype=torch.float32),
        second=x.new_empty((splits, heads, N), dtype=torch.float32),
    )
    nearest_code_search_kernel[(blocks, splits, heads)](
        *(x, operand, codes.norms, codes.center, codes.record, ratio),
        *(slots.winner, slots.best, slots.second),
        *(N, codes.padded, per_split * step, books, *strides),
        D=D,
        WIDTH=codes.width,
        CHUNK=chunk,
        TERMS=tiles.terms,
        L2=l2,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GROUP=tiles.group,
        ID_BITS=id_bits,
        TMA=tiles.tma,
        PAIRED=tiles.paired,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,
    )
    return slots


def _search_hopper(x: Tensor, codes: _Codes, tiles: Tiles, l2: bool) -> _Slots:
    """The search by nearest_code_hopper.py, head by head."""
    from .nearest_code_hopper import nearest_slot_hopper

    heads, N, _ = x.shape
    rows, ratio = _round_rows(x, codes, tiles, l2)
    operands = codes.operand.view(-1, codes.padded, codes.width)
    processors = 1
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    winner = x.new_empty((1, heads, N), dtype=torch.int32)
    best = x.new_empty((1, heads, N), dtype=torch.float32)
    second = x.new_empty((1, heads, N), dtype=torch.float32)
    has_norms = tiles.terms == 1
    id_bits = 0
    for head in range(heads):
        book = head % len(operands)
        id_bits = nearest_slot_hopper(
            rows[head],
            operands[book],
            ratio[head] if has_norms else None,
            codes.norms[book] if has_norms else None,
            (winner[0, head], best[0, head], second[0, head]),
            processors,
        )
    return _Slots(1, id_bits, winner, best, second)


def _round_rows(x: Tensor, codes: _Codes, tiles: Tiles, l2: bool) -> tuple[Tensor, Tensor]:
    """Rows too wide for a program of the search, as fp16 in memory, and their ratios of scales."""
    heads, N, D = x.shape
    operand = x.new_empty((heads, N, codes.width), dtype=torch.float16)
    ratio = x.new_empty((heads, N), dtype=torch.float32)
    rows = max(1, CERTIFY_ELEMENTS // codes.width)
    nearest_code_round_rows_kernel[(triton.cdiv(N, rows), heads)](
        *(x, codes.center, codes.record, operand, ratio, N, len(codes.center), *x.stride()),
        D=D,
        WIDTH=codes.width,
        TERMS=tiles.terms,
        L2=l2,
        BLOCK_N=rows,
        enable_fp_fusion=True,
    )
    return operand, ratio


def _certify(
    x: Tensor,
    codebook: Tensor,
    codes: _Codes,
    slots: _Slots,
    tiles: Tiles,
    l2: bool,
    exact: bool,
    indices: Tensor,
    distances: Tensor,
) -> Tensor:
    heads, N, D = x.shape
    chunk = min(ROW_CHUNK, codes.width)
    rows = max(1, CERTIFY_ELEMENTS // (chunk * tiles.group))
    queue = x.new_empty((heads, N) if exact else (0,), dtype=torch.int32)
    nearest_code_certify_kernel[(triton.cdiv(N, rows), heads)](
        *(x, codebook, codes.operand, codes.norms, codes.center, codes.record),
        *(slots.winner, slots.best, slots.second, indices, distances, queue, codes.queued),
        *(N, codes.padded, slots.splits, len(codebook), *x.stride(), *codebook.stride()),
        D=D,
        WIDTH=codes.width,
        CHUNK=chunk,
        TERMS=tiles.terms,
        L2=l2,
        GROUP=tiles.group,
        SLOTS=tiles.block_k // tiles.group,
        ID_BITS=slots.id_bits,
        EXACT=exact,
        DISTANCE=distances.numel() > 0,
        BLOCK_N=rows,
        enable_fp_fusion=True,
    )
    return queue


def _prepare_resolver(
    codebook: Tensor, codes: _Codes, heads: int, l2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """High and low pieces of each code, and the records of its scale and norm."""
    books, K, D = codebook.shape
    high, low = codebook.new_empty((2, books, codes.padded, codes.channels), dtype=torch.float16)
    record = codebook.new_empty((books, codes.padded, RESOLVER_RECORD.value), dtype=torch.float32)
    rows = max(1, CODE_ELEMENTS // codes.channels)
    nearest_code_prepare_resolver_kernel[(triton.cdiv(codes.padded, rows), books)](
        *(codebook, codes.record, codes.center, codes.norms, codes.queued, high, low, record),
        *(K, codes.padded, heads, books, *codebook.stride()),
        D=D,
        BLOCK_D=codes.channels,
        L2=l2,
        BLOCK_R=rows,
        enable_fp_fusion=True,
    )
    return high, low, record


def _resolve(
    x: Tensor,
    codebook: Tensor,
    codes: _Codes,
    queue: Tensor,
    l2: bool,
    interpreted: bool,
    indices: Tensor,
    distances: Tensor,
) -> None:
    heads, N, D = x.shape
    pieces = _prepare_resolver(codebook, codes, heads, l2)
    programs = 1
    if not interpreted:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        programs = triton.cdiv(2 * processors, heads)
    programs = min(programs, triton.cdiv(N, RESOLVE_ROWS))
    lists = (heads * programs * RESOLVE_ROWS, RESOLVE_CODES)
    chunk = min(RESOLVE_CHUNK, codes.channels)
    wide = programs * heads * RESOLVE_ROWS * 2 * codes.channels if chunk < codes.channels else 0
    nearest_code_resolve_kernel[(programs, heads)](
        *(x, codebook, *pieces, codes.center, codes.record),
        *(queue, codes.queued),
        *(x.new_empty(lists, dtype=torch.int32), x.new_empty(lists, dtype=torch.float32)),
        *(x.new_empty(wide, dtype=torch.float16), indices, distances),
        *(N, codes.padded, len(codebook), *x.stride(), *codebook.stride()),
        D=D,
        WIDTH=codes.channels,
        CHUNK=chunk,
        L2=l2,
        DISTANCE=distances.numel() > 0,
        BLOCK_N=RESOLVE_ROWS,
        BLOCK_K=RESOLVE_CODES,
        INTERPRETED=interpreted,
        num_warps=RESOLVE_WARPS,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _round_up(value: int, step: int) -> int:
    return triton.cdiv(value, step) * step
