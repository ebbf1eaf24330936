"""residual_quantize between its searches: the residual of a level, and the sum of all.

The searches are `nearest_code`'s, one per level. Kept between the levels are the float32 residual
and the indices; the running sum is not: its rows are read again from the codebooks at the end, in
the order of the levels, which rounds exactly as a running sum would.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

TILE_ELEMENTS = 1024
MAX_BLOCK_D = 256


@triton.jit
def _residual_kernel(
    x_ptr,
    codebook_ptr,
    indices_ptr,
    residual_ptr,
    num_rows,
    stride_xn,
    stride_xd,
    stride_ck,
    stride_cd,
    WIDTH: tl.constexpr,
    X_PACKED: tl.constexpr,
    BOOK_PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns a tile of BLOCK_N rows by BLOCK_D channels; nothing outlives it on chip. A row
    # without a code becomes NaN, so that no later search finds one for it.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < num_rows)[:, None] & (d < WIDTH)
    index = tl.load(indices_ptr + row, mask=row < num_rows, other=-1)[:, None]
    x_row = row[:, None] * (WIDTH if X_PACKED else stride_xn)
    x = tl.load(x_ptr + x_row + d * stride_xd, mask=inside, other=0.0)
    code_row = index * (WIDTH if BOOK_PACKED else stride_ck)
    code = tl.load(codebook_ptr + code_row + d * stride_cd, mask=inside & (index >= 0), other=0.0)
    residual = x.to(tl.float32) - code.to(tl.float32)
    residual = tl.where(index >= 0, residual, float("nan"))
    tl.store(residual_ptr + row[:, None] * WIDTH + d, residual, mask=inside)


@triton.jit
def _sum_of_codes_kernel(
    codebooks_ptr,
    indices_ptr,
    quantized_ptr,
    num_rows,
    levels,
    stride_cq,
    stride_ck,
    stride_cd,
    stride_in,
    stride_iq,
    WIDTH: tl.constexpr,
    BOOK_PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns a tile of BLOCK_N rows by BLOCK_D channels. Its sum over the levels stays on
    # chip and is written once. A row that lost its code at some level is NaN.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < num_rows)[:, None] & (d < WIDTH)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for level in range(0, levels):
        at = indices_ptr + row * stride_in + level * stride_iq
        index = tl.load(at, mask=row < num_rows, other=-1)[:, None]
        code_row = index * (WIDTH if BOOK_PACKED else stride_ck)
        code = tl.load(
            codebooks_ptr + code_row + d * stride_cd, mask=inside & (index >= 0), other=0.0
        )
        total += tl.where(index >= 0, code.to(tl.float32), float("nan"))
        codebooks_ptr += stride_cq
    value = total.to(quantized_ptr.dtype.element_ty)
    tl.store(quantized_ptr + row[:, None] * WIDTH + d, value, mask=inside)


def subtract_codes(x: Tensor, codebook: Tensor, indices: Tensor, residual: Tensor) -> None:
    """residual[n] = float32(x[n]) − float32(codebook[indices[n]]), NaN where the index is −1.

    Args:
        x: (N, D) float32, float16 or bfloat16, any strides; it may be `residual` itself.
        codebook: (K, D), any of the dtypes and strides.
        indices: (N,) int64, contiguous.
        residual: (N, D) float32, contiguous; written.
    """
    grid, tiles = _tiles(x)
    if len(x) > 0:
        with torch.cuda.device_of(x):
            _residual_kernel[grid](
                *(x, codebook, indices, residual),
                *(len(x), *x.stride(), *codebook.stride()),
                X_PACKED=x.is_contiguous(),
                BOOK_PACKED=codebook.is_contiguous(),
                **tiles,
                enable_fp_fusion=True,
            )


def sum_of_codes(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Σ_q codebooks[q, indices[n, q]], added in float32 in the order of q.

    Args:
        codebooks: (Q, K, D), any strides.
        indices: (N, Q) int64, any strides; a row with a −1 becomes NaN.
    Returns:
        (N, D) in the codebooks' dtype.
    """
    rows, (levels, _, width) = len(indices), codebooks.shape
    quantized = torch.empty((rows, width), dtype=codebooks.dtype, device=codebooks.device)
    grid, tiles = _tiles(quantized)
    if rows > 0:
        with torch.cuda.device_of(codebooks):
            _sum_of_codes_kernel[grid](
                *(codebooks, indices, quantized, rows, levels),
                *(*codebooks.stride(), *indices.stride()),
                BOOK_PACKED=codebooks.is_contiguous(),
                **tiles,
                enable_fp_fusion=True,
            )
    return quantized


def _tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    block_d = min(MAX_BLOCK_D, triton.next_power_of_2(x.shape[-1]))
    block_n = TILE_ELEMENTS // block_d
    grid = (triton.cdiv(len(x), block_n), triton.cdiv(x.shape[-1], block_d))
    return grid, {"WIDTH": x.shape[-1], "BLOCK_N": block_n, "BLOCK_D": block_d}
