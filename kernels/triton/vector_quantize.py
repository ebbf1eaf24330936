"""vector_quantize around its search: what follows from the indices, and the gradient to x.

One kernel each way. The search that finds the indices is `nearest_code`'s; the gradient to the
codebook is a segment sum and lies in `code_statistics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

# Elements of one program's tile: 8 float32 a thread at 4 warps. Channels beyond MAX_BLOCK_D are
# walked in a loop.
TILE_ELEMENTS = 1024
MAX_BLOCK_D = 256


@triton.jit
def _rows(rows_per_head, BLOCK_N: tl.constexpr):
    """Of the rows of this program: flat number, head, number in the head, and which exist."""
    # int64: the offsets made of them pass 2³¹ for long batches.
    blocks = tl.cdiv(rows_per_head, BLOCK_N)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return head * rows_per_head + row, head, row, row < rows_per_head


@triton.jit
def _first_channel(
    ptr, flat, head, row, stride_h, stride_n, WIDTH: tl.constexpr, PACKED: tl.constexpr
):
    """Where rows start. WIDTH is a constant so that their alignment is known to the compiler."""
    if PACKED:
        offset = flat * WIDTH
    else:
        offset = head * stride_h + row * stride_n
    return (ptr + offset)[:, None]


@triton.jit
def _vector_quantize_fwd_kernel(
    x_ptr,
    codebook_ptr,
    mask_ptr,
    found_ptr,
    quantized_ptr,
    indices_ptr,
    distance_ptr,
    rows_per_head,
    codes_per_head,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_mh,
    stride_mn,
    WIDTH: tl.constexpr,
    X_PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns BLOCK_N rows. On chip stays the sum of squares of each; the differences are
    # never written. A masked row gets −1 and zeros, a row without a nearest code −1 and NaN.
    flat, head, row, inside = _rows(rows_per_head, BLOCK_N)
    index = tl.load(found_ptr + flat, mask=inside, other=-1)
    counted = inside
    if HAS_MASK:
        counts = tl.load(mask_ptr + head * stride_mh + row * stride_mn, mask=inside, other=0)
        counted = counts != 0
    found = counted & (index >= 0)
    lost = counted & (index < 0)
    filler = tl.where(lost, float("nan"), 0.0)
    x_row = _first_channel(x_ptr, flat, head, row, stride_xh, stride_xn, WIDTH, X_PACKED)
    q_row = (codebook_ptr + (head * codes_per_head + index) * WIDTH)[:, None]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        wanted = found[:, None] & (d < WIDTH)
        x = tl.load(x_row + d * stride_xd, mask=wanted, other=0.0)
        q = tl.load(q_row + d, mask=wanted, other=0.0)
        difference = x.to(tl.float32) - q.to(tl.float32)
        total += tl.sum(difference * difference, axis=1)
        value = tl.where(found[:, None], q, filler[:, None].to(q.dtype))
        at = quantized_ptr + (flat * WIDTH)[:, None] + d
        tl.store(at, value, mask=inside[:, None] & (d < WIDTH))
    tl.store(indices_ptr + flat, tl.where(found, index, -1), mask=inside)
    tl.store(distance_ptr + flat, tl.where(found, total, filler), mask=inside)


@triton.jit
def _lengths(
    x_row,
    q_row,
    found,
    stride_xd,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """‖x‖, ‖q‖ and ‖q‖/‖x‖ of each row; as divisors lengths below 1e-6 count as 1e-6."""
    x_square = tl.zeros((BLOCK_N,), tl.float32)
    q_square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        wanted = found[:, None] & (d < WIDTH)
        x = tl.load(x_row + d * stride_xd, mask=wanted, other=0.0).to(tl.float32)
        q = tl.load(q_row + d, mask=wanted, other=0.0).to(tl.float32)
        x_square += tl.sum(x * x, axis=1)
        q_square += tl.sum(q * q, axis=1)
    # Rounded to nearest, as the divisions by them are: at D = 1, x̂ + q̂ is then exactly zero where
    # x and q have opposite signs, not a rounding error with a direction of its own.
    x_length = tl.maximum(tl.sqrt_rn(x_square), 1e-6)
    q_length = tl.sqrt_rn(q_square)
    return x_length, tl.maximum(q_length, 1e-6), q_length / x_length


@triton.jit
def _mirror_products(
    g_row,
    x_row,
    q_row,
    x_length,
    q_length,
    found,
    stride_gd,
    stride_xd,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """2(g·s)/‖s‖² with s = x̂ + q̂, the factor of s in 2w(w·g); and 2(q̂·g). ‖s‖ is ≥ 1e-12."""
    square = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    along_q = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        wanted = found[:, None] & (d < WIDTH)
        g = tl.load(g_row + d * stride_gd, mask=wanted, other=0.0).to(tl.float32)
        x = tl.load(x_row + d * stride_xd, mask=wanted, other=0.0).to(tl.float32)
        q = tl.load(q_row + d, mask=wanted, other=0.0).to(tl.float32)
        q_unit = tl.div_rn(q, q_length[:, None])
        mirror = tl.div_rn(x, x_length[:, None]) + q_unit
        square += tl.sum(mirror * mirror, axis=1)
        along += tl.sum(g * mirror, axis=1)
        along_q += tl.sum(g * q_unit, axis=1)
    # Divided twice by the length: its square would underflow where x̂ ≈ −q̂.
    length = tl.maximum(tl.sqrt(square), 1e-12)
    return 2.0 * (along / length) / length, 2.0 * along_q


@triton.jit
def _vector_quantize_bwd_kernel(
    grad_quantized_ptr,
    grad_commitment_ptr,
    x_ptr,
    codebook_ptr,
    indices_ptr,
    grad_x_ptr,
    rows_per_head,
    codes_per_head,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_lh,
    stride_ln,
    stride_xh,
    stride_xn,
    stride_xd,
    WIDTH: tl.constexpr,
    X_PACKED: tl.constexpr,
    G_PACKED: tl.constexpr,
    HAS_QUANTIZED: tl.constexpr,
    HAS_COMMITMENT: tl.constexpr,
    ROTATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns BLOCK_N rows. On chip stay, for the rotation, five sums per row; directions
    # and the rotated gradient are never written. The rotation walks the row three times (lengths,
    # products with the mirror normal, result): the second and third find it in the L1 cache.
    flat, head, row, inside = _rows(rows_per_head, BLOCK_N)
    index = tl.load(indices_ptr + flat, mask=inside, other=-1)
    found = index >= 0
    x_row = _first_channel(x_ptr, flat, head, row, stride_xh, stride_xn, WIDTH, X_PACKED)
    q_row = (codebook_ptr + (head * codes_per_head + index) * WIDTH)[:, None]
    pull = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_COMMITMENT:
        weight_ptr = grad_commitment_ptr + head * stride_lh + row * stride_ln
        pull = 2.0 * tl.load(weight_ptr, mask=found, other=0.0).to(tl.float32)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    x_length = tl.zeros((BLOCK_N,), tl.float32)
    q_length = tl.zeros((BLOCK_N,), tl.float32)
    along_w = tl.zeros((BLOCK_N,), tl.float32)
    along_q = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_QUANTIZED:
        g_row = _first_channel(
            grad_quantized_ptr, flat, head, row, stride_gh, stride_gn, WIDTH, G_PACKED
        )
        if ROTATION:
            x_length, q_length, scale = _lengths(
                x_row, q_row, found, stride_xd, WIDTH, BLOCK_N, BLOCK_D
            )
            along_w, along_q = _mirror_products(
                g_row,
                x_row,
                q_row,
                x_length,
                q_length,
                found,
                stride_gd,
                stride_xd,
                WIDTH,
                BLOCK_N,
                BLOCK_D,
            )
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        wanted = found[:, None] & (d < WIDTH)
        grad = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if HAS_QUANTIZED:
            grad = tl.load(g_row + d * stride_gd, mask=wanted, other=0.0).to(tl.float32)
        if HAS_COMMITMENT or ROTATION:
            x = tl.load(x_row + d * stride_xd, mask=wanted, other=0.0).to(tl.float32)
            q = tl.load(q_row + d, mask=wanted, other=0.0).to(tl.float32)
            if HAS_QUANTIZED and ROTATION:
                x_unit = tl.div_rn(x, x_length[:, None])
                mirror = x_unit + tl.div_rn(q, q_length[:, None])
                turned = grad - along_w[:, None] * mirror + along_q[:, None] * x_unit
                grad = scale[:, None] * turned
            grad += pull[:, None] * (x - q)
        at = grad_x_ptr + (flat * WIDTH)[:, None] + d
        tl.store(at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside[:, None] & (d < WIDTH))


def vector_quantize_forward(
    x: Tensor, codebook: Tensor, mask: Tensor | None, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized rows, final indices and squared distances from the indices of the search.

        quantized[n] = codebook[i[n]],   distance[n] = Σ_d (x[n, d] − quantized[n, d])²

    Args:
        x: (N, D) or (heads, N, D). codebook: (K, D) or (heads, K, D). Any strides, and each
            float32, float16 or bfloat16.
        mask: (N,) or (heads, N) bool, True = counts; a masked row gets −1, zeros and distance 0.
        indices: (N,) or (heads, N) int64, contiguous; −1 where the search found no code: such a
            row becomes NaN.
    Returns:
        quantized, shaped as x in the codebook's dtype; indices; distance float32.
    """
    quantized = torch.empty(x.shape, dtype=codebook.dtype, device=x.device)
    final = torch.empty_like(indices)
    distance = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    if indices.numel() > 0:
        grid, tiles = _tiles(x)
        with torch.cuda.device_of(x):
            _vector_quantize_fwd_kernel[grid](
                *(x, codebook.contiguous(), mask, indices, quantized, final, distance),
                *(x.shape[-2], _codes_per_head(codebook)),
                *_strides(x, 3),
                *((0, 0) if mask is None else _strides(mask, 2)),
                WIDTH=x.shape[-1],
                X_PACKED=x.is_contiguous(),
                HAS_MASK=mask is not None,
                **tiles,
                enable_fp_fusion=True,
            )
    return quantized, final, distance


def vector_quantize_backward_x(
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
) -> Tensor:
    """Gradient to x of the quantized rows and the commitment losses, q = codebook[i]:

        grad_x = g + 2·c·(x − q)            ("rotation": λRᵀg for g, see `fastvq.reference`)

    Rows with index −1 get zeros. Sums are float32, errors below those of the plain formula's.

    Args:
        grad_quantized: g, shaped as x, any strides; None counts as zeros.
        grad_commitment: c, (N,) or (heads, N), any strides; None counts as zeros.
        gradient: "straight_through" or "rotation".
        x, codebook, indices: as `vector_quantize_forward`; the indices are its final ones.
    Returns:
        The shape and dtype of x, contiguous.
    """
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if indices.numel() > 0:
        grid, tiles = _tiles(x)
        with torch.cuda.device_of(x):
            _vector_quantize_bwd_kernel[grid](
                *(grad_quantized, grad_commitment, x, codebook.contiguous(), indices, grad_x),
                *(x.shape[-2], _codes_per_head(codebook)),
                *((0, 0, 0) if grad_quantized is None else _strides(grad_quantized, 3)),
                *((0, 0) if grad_commitment is None else _strides(grad_commitment, 2)),
                *_strides(x, 3),
                WIDTH=x.shape[-1],
                X_PACKED=x.is_contiguous(),
                G_PACKED=grad_quantized is not None and grad_quantized.is_contiguous(),
                HAS_QUANTIZED=grad_quantized is not None,
                HAS_COMMITMENT=grad_commitment is not None,
                ROTATION=gradient == "rotation",
                **tiles,
                enable_fp_fusion=True,
            )
    return grad_x


def _tiles(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the tile of one program: whole rows, in pieces where they are long."""
    block_d = min(MAX_BLOCK_D, triton.next_power_of_2(x.shape[-1]))
    block_n = TILE_ELEMENTS // block_d
    heads = x.shape[0] if x.dim() == 3 else 1
    grid = (triton.cdiv(x.shape[-2], block_n) * heads,)
    return grid, {"BLOCK_N": block_n, "BLOCK_D": block_d}


def _codes_per_head(codebook: Tensor) -> int:
    """How far the code numbers of two heads lie apart; 0 where they share the codes."""
    return codebook.shape[1] if codebook.dim() == 3 else 0


def _strides(tensor: Tensor, dims: int) -> tuple[int, ...]:
    """The strides with the heads leading; a tensor that all heads share steps by 0."""
    return (*(0,) * (dims - tensor.dim()), *tensor.stride())
