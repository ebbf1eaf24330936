"""The fast pass of nearest_code for Hopper alone: warp-specialised Gluon kernels.

**Never executed so far**: compiled for sm_90 with Triton 3.6 and 3.9, its machine code checked
(`tests/kernels/triton/test_machine_code.py`) and its Python text run in an emulator of warps,
barriers and copies (`tests/kernels/triton/gluon_emulator.py`). It is therefore off unless
`FASTVQ_HOPPER_KERNELS=1` is set (`is_enabled`), until it has been seen right and faster on a GPU.

One block owns pairs of row tiles, one tile per consumer warpgroup; a producer warp copies codes
through a ring in shared memory with the tensor memory accelerator (TMA). Rows, accumulators and the
running best stay in registers; scores are never written to memory.

    score[n, k] = Σ_d rows[n, d] · codes[k, d] + bias[k]

A *slot* is GROUPS codes of one 128-code tile that lie 128 / GROUPS apart. Each row gets its best
slot, the best score and the best score of any other slot: what decides whether the winner is
certain. Certifying and rescoring are the caller's, as for the plain kernel.

What the compilers do to such kernels, and why the code is as it is:

- An accumulator that is waited for and at once given to the next product, without a branch between,
  makes ptxas 12.8 to 13.4 delete products and keep `HGMMA … RZ`. The arrival at a barrier in the
  middle of the unrolled body avoids it.
- A product in flight across the loop's back edge makes ptxas wait for every product (C7514): each
  stage ends with nothing in flight.
- LLVM sinks a pure maximum below later products, which costs copies of the accumulator: the maxima
  of the fold are volatile inline assembly.
- An id packed into −inf makes NaN, and the runner-up is lost: padding is finite.
- More shared memory than an SM has compiles without complaint: the launcher counts it.
"""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 renamed the copy and gave the old name an error.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

CONSUMERS = gl.constexpr(2)
TILE_CODES = gl.constexpr(128)
# Below every score and finite; also with an id in its low bits.
LOWEST = gl.constexpr(-3.0e38)
# The narrow kernel keeps the number of a tile in the low bits of a score. Scores shrink or grow by
# less than 2⁻¹³ of themselves: 10 of the 23 bits behind the leading one.
TILE_IDS = gl.constexpr(1024)
TILE_ID_ERROR = 2.0**-13

SHARED_BYTES_PER_BLOCK = 227 * 1024
MAX_DEPTH = 256


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one padded row width is searched; the shapes of `configs/`, by argument name."""

    rows: int  # per consumer
    groups: int  # codes per slot
    tiles: int  # 128-code tiles per stage of the ring
    stages: int
    chunk: int  # channels per stage
    # Whether only each row's best is kept between tiles, or the best of every slot column.
    row_state: bool
    consumer_registers: int = 240

    @property
    def stage_codes(self) -> int:
        return self.tiles * TILE_CODES.value

    def shared_bytes(self, depth: int, has_bias: bool) -> int:
        """Rows, the ring of codes and biases, and the barriers."""
        rows = CONSUMERS.value * self.rows * depth * 2
        ring = self.stages * self.stage_codes * (self.chunk * 2 + 4 * has_bias)
        barriers = 8 * (2 * CONSUMERS.value + 2 * self.stages + CONSUMERS.value)
        return rows + ring + barriers


# Chosen from machine code, not measured: Triton 3.9, `python -m benchmarks.static`.
TILINGS = {
    16: Tiling(rows=64, groups=16, tiles=8, stages=2, chunk=16, row_state=False),
    32: Tiling(rows=64, groups=8, tiles=8, stages=2, chunk=32, row_state=False),
    64: Tiling(rows=64, groups=8, tiles=4, stages=2, chunk=64, row_state=False),
    128: Tiling(rows=128, groups=4, tiles=1, stages=4, chunk=128, row_state=True),
    256: Tiling(rows=128, groups=2, tiles=1, stages=3, chunk=128, row_state=True),
}


def is_enabled() -> bool:
    """Whether the user asked for these kernels: FASTVQ_HOPPER_KERNELS=1."""
    return os.environ.get("FASTVQ_HOPPER_KERNELS", "0") == "1"


def nearest_slot_hopper(
    rows: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    num_programs: int,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tiling]:
    """Best slot of each row, its score and the runner-up's.

    Args:
        rows: (N, DEPTH) float16, contiguous; DEPTH 16, 32, 64, 128 or 256.
        codes: (K, DEPTH) float16, contiguous, K a multiple of `tiling.stage_codes` and at most
            131072 where the tiling keeps tile numbers in the score. A padded code must score
            lower than every code: by its `bias`, or by a channel where every row holds 1.
        bias: (K,) float32, finite, or None for 0.
        num_programs: blocks to launch, one per multiprocessor.
        tiling: default `TILINGS[DEPTH]`.
    Returns:
        slot (N,) int32, best (N,) float32, second (N,) float32, the tiling used. Slot s holds codes
        `(s // C) · 128 + s % C + C · g` for g = 0 … groups − 1, with C = 128 / groups.
    Raises:
        ValueError: a shape these kernels do not take.
    """
    num_rows, depth = rows.shape
    if depth not in TILINGS:
        raise ValueError(
            f"nearest_slot_hopper: rows must be (N, D) with D among {', '.join(map(str, TILINGS))}; "
            f"got {tuple(rows.shape)}. Pad the channels with zeros, or use the plain kernel."
        )
    tiling = tiling or TILINGS[depth]
    num_codes = codes.shape[0]
    if num_codes == 0 or num_codes % tiling.stage_codes:
        raise ValueError(
            f"nearest_slot_hopper: codes must be padded to a multiple of {tiling.stage_codes} rows "
            f"for D = {depth}; got {tuple(codes.shape)}. Add codes that never win."
        )
    most = TILE_IDS.value * TILE_CODES.value
    if not tiling.row_state and num_codes > most:
        raise ValueError(
            f"nearest_slot_hopper: codes must be at most {most} for D = {depth}; got {num_codes}. "
            "Search the codebook in parts, or use the plain kernel."
        )
    needed = tiling.shared_bytes(depth, bias is not None)
    if needed > SHARED_BYTES_PER_BLOCK:
        raise ValueError(
            f"nearest_slot_hopper: tiling must fit in {SHARED_BYTES_PER_BLOCK} bytes of shared "
            f"memory; got {tiling}, which needs {needed}. Use fewer stages."
        )
    slot = torch.empty(num_rows, dtype=torch.int32, device=rows.device)
    best = torch.empty(num_rows, dtype=torch.float32, device=rows.device)
    second = torch.empty_like(best)
    if num_rows == 0:
        return slot, best, second, tiling
    tile_pairs = -(-num_rows // (CONSUMERS.value * tiling.rows))
    _nearest_slot_hopper_kernel[(min(num_programs, tile_pairs),)](
        _describe(rows, [tiling.rows, tiling.chunk]),
        _describe(codes, [tiling.stage_codes, tiling.chunk]),
        None if bias is None else _describe(bias, [tiling.stage_codes]),
        slot,
        best,
        second,
        num_rows,
        num_codes // tiling.stage_codes,
        DEPTH=depth,
        CHUNK=tiling.chunk,
        BLOCK_N=tiling.rows,
        TILES=tiling.tiles,
        STAGES=tiling.stages,
        GROUPS=tiling.groups,
        ROW_STATE=tiling.row_state,
        RESIDENT=depth == tiling.chunk and num_codes <= tiling.stages * tiling.stage_codes,
        CONSUMER_REGISTERS=tiling.consumer_registers,
        num_warps=4,
    )
    return slot, best, second, tiling


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    if tensor.dim() == 1:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    else:
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@gluon.jit
def _maximum(a, b):
    # Volatile: LLVM would sink a pure maximum below later products.
    return gl.inline_asm_elementwise(
        "max.f32 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _plus(scores, bias):
    # Volatile, so that it stays where the accumulator is still at hand.
    return gl.inline_asm_elementwise(
        "add.f32 $0, $1, $2;", "=r,r,r", [scores, bias], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _halves(scores):
    # Columns 0 … n/2−1 and n/2 … n−1: lies in the same thread's registers, nothing moves.
    width: gl.constexpr = scores.shape[1]
    return scores.reshape([scores.shape[0], 2, width // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _slot_maximum(scores, GROUPS: gl.constexpr):
    """Column j of the result is the greatest of columns j, j + C, j + 2C …; C = width / GROUPS."""
    if GROUPS == 1:
        best = scores
    else:
        left, right = _halves(scores)
        best = _maximum(_slot_maximum(left, GROUPS // 2), _slot_maximum(right, GROUPS // 2))
    return best


@gluon.jit
def _with_id(score, mask: gl.constexpr, number):
    """The score with a number in place of its low bits, `mask + 1` of them counted in ids."""
    bits = (score.to(gl.int32, bitcast=True) & ~mask) | number
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _fold_tile(best, second, scores, tile, GROUPS: gl.constexpr):
    packed = _with_id(_slot_maximum(scores, GROUPS), TILE_IDS - 1, tile)
    second = gl.maximum(second, gl.minimum(best, packed))
    return gl.maximum(best, packed), second


@gluon.jit
def _merge_best_two(best_a, second_a, best_b, second_b):
    second = gl.maximum(gl.minimum(best_a, best_b), gl.maximum(second_a, second_b))
    return gl.maximum(best_a, best_b), second


@gluon.jit
def _fold_row(best, second, best_tile, scores, tile, GROUPS: gl.constexpr):
    slots = _slot_maximum(scores, GROUPS)
    width: gl.constexpr = slots.shape[1]
    columns = gl.arange(0, width, gl.SliceLayout(0, slots.type.layout))
    packed = _with_id(slots, width - 1, gl.expand_dims(columns, 0))
    left, right = _halves(packed)
    pairs = (gl.maximum(left, right), gl.minimum(left, right))
    tile_best, tile_second = gl.reduce(pairs, 1, _merge_best_two)
    tile_best = gl.convert_layout(tile_best, best.type.layout)
    tile_second = gl.convert_layout(tile_second, best.type.layout)
    best_tile = gl.where(tile_best > best, tile, best_tile)
    best, second = _merge_best_two(best, second, tile_best, tile_second)
    return best, second, best_tile


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring; the phase flips where it starts anew."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _issue(rows, codes_ring, stage, tile: gl.constexpr, accumulator):
    codes = codes_ring.index(stage).slice(tile * TILE_CODES, TILE_CODES, dim=0)
    return warpgroup_mma(rows, codes.permute((1, 0)), accumulator, use_acc=False, is_async=True)


@gluon.jit
def _with_bias(scores, bias_ring, stage, tile: gl.constexpr, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        bias = bias_ring.index(stage).slice(tile * TILE_CODES, TILE_CODES)
        bias = bias.load(gl.SliceLayout(0, scores.type.layout))
        scores = _plus(scores, gl.expand_dims(bias, 0))
    return scores


@gluon.jit
def _narrow_consumer(
    buffers,
    outputs,
    num_rows,
    num_stages,
    consumer: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Two accumulators take turns: one is folded while the other's product is in flight."""
    rows_tile, rows_full, rows_empty, codes_ring, bias_ring, full, empty, _ = buffers
    slot_ptr, best_ptr, second_ptr = outputs
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_CODES, 16])
    zeros = gl.zeros([BLOCK_N, TILE_CODES], gl.float32, scores_layout)
    slots: gl.constexpr = TILE_CODES // GROUPS
    slot_layout: gl.constexpr = _slot_maximum(zeros, GROUPS).type.layout
    stage = 0
    phase = 0
    rows_phase = 0
    num_blocks = gl.cdiv(num_rows, CONSUMERS * BLOCK_N)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        mbarrier.wait(rows_full.index(consumer), rows_phase)
        rows_phase ^= 1
        rows = rows_tile.index(consumer).load(gl.DotOperandLayout(0, scores_layout, 2))
        mbarrier.arrive(rows_empty.index(consumer), count=1)
        best = gl.full([BLOCK_N, slots], LOWEST, gl.float32, slot_layout)
        second = best
        for turn in range(num_stages):
            if RESIDENT:
                stage = turn
                phase = 0
            mbarrier.wait(full.index(stage), phase)
            even = _issue(rows, codes_ring, stage, 0, zeros)
            odd = zeros
            for tile in gl.static_range(0, TILES, 2):
                odd = _issue(rows, codes_ring, stage, tile + 1, odd)
                even = warpgroup_mma_wait(1, deps=[even])
                number = turn * TILES + tile
                scores = _with_bias(even, bias_ring, stage, tile, HAS_BIAS)
                best, second = _fold_tile(best, second, scores, number, GROUPS)
                if tile + 2 < TILES:
                    even = _issue(rows, codes_ring, stage, tile + 2, even)
                    odd = warpgroup_mma_wait(1, deps=[odd])
                else:
                    odd = warpgroup_mma_wait(0, deps=[odd])
                    if not HAS_BIAS:
                        mbarrier.arrive(empty.index(stage), count=1)
                scores = _with_bias(odd, bias_ring, stage, tile + 1, HAS_BIAS)
                best, second = _fold_tile(best, second, scores, number + 1, GROUPS)
            if HAS_BIAS:
                mbarrier.arrive(empty.index(stage), count=1)
            if not RESIDENT:
                stage, phase = _advance(stage, phase, STAGES)
        columns = gl.expand_dims(gl.arange(0, slots, gl.SliceLayout(0, slot_layout)), 0)
        row_best = gl.max(best, 1)
        is_best = best == gl.expand_dims(row_best, 1)
        column = gl.min(gl.where(is_best, columns, slots), 1)
        others = gl.where(columns == gl.expand_dims(column, 1), second, best)
        tile = row_best.to(gl.int32, bitcast=True) & (TILE_IDS - 1)
        i_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, slot_layout))
        i_row += (block * CONSUMERS + consumer) * BLOCK_N
        gl.store(slot_ptr + i_row, tile * slots + column, mask=i_row < num_rows)
        gl.store(best_ptr + i_row, row_best, mask=i_row < num_rows)
        gl.store(second_ptr + i_row, gl.max(others, 1), mask=i_row < num_rows)


@gluon.jit
def _wide_consumer(
    buffers,
    outputs,
    num_rows,
    num_stages,
    consumer: gl.constexpr,
    CHUNKS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """One accumulator; the other warpgroup's products run while this one folds (ping-pong)."""
    rows_tile, rows_full, rows_empty, codes_ring, bias_ring, full, empty, turns = buffers
    slot_ptr, best_ptr, second_ptr = outputs
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_CODES, 16])
    zeros = gl.zeros([BLOCK_N, TILE_CODES], gl.float32, scores_layout)
    slots: gl.constexpr = TILE_CODES // GROUPS
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    stage = 0
    phase = 0
    rows_phase = 0
    turn_phase = 0
    num_blocks = gl.cdiv(num_rows, CONSUMERS * BLOCK_N)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        mbarrier.wait(rows_full.index(consumer), rows_phase)
        rows_phase ^= 1
        best = gl.full([BLOCK_N], LOWEST, gl.float32, row_layout)
        second = best
        best_tile = gl.zeros([BLOCK_N], gl.int32, row_layout)
        for tile in range(num_stages):
            next_stage = stage
            next_phase = phase
            for _ in gl.static_range(CHUNKS):
                mbarrier.wait(full.index(next_stage), next_phase)
                next_stage, next_phase = _advance(next_stage, next_phase, STAGES)
            mbarrier.wait(turns.index(consumer), turn_phase)
            turn_phase ^= 1
            scores = zeros
            next_stage = stage
            next_phase = phase
            for chunk in gl.static_range(CHUNKS):
                rows = rows_tile.index(consumer * CHUNKS + chunk)
                codes = codes_ring.index(next_stage).permute((1, 0))
                scores = warpgroup_mma(rows, codes, scores, use_acc=chunk > 0, is_async=True)
                next_stage, next_phase = _advance(next_stage, next_phase, STAGES)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(turns.index(1 - consumer), count=1)
            if HAS_BIAS:
                bias = bias_ring.index(stage).load(gl.SliceLayout(0, scores_layout))
            for _ in gl.static_range(CHUNKS):
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _advance(stage, phase, STAGES)
            if HAS_BIAS:
                scores = _plus(scores, gl.expand_dims(bias, 0))
            best, second, best_tile = _fold_row(best, second, best_tile, scores, tile, GROUPS)
        mbarrier.arrive(rows_empty.index(consumer), count=1)
        i_row = (block * CONSUMERS + consumer) * BLOCK_N + gl.arange(0, BLOCK_N, row_layout)
        slot = best_tile * slots + (best.to(gl.int32, bitcast=True) & (slots - 1))
        gl.store(slot_ptr + i_row, slot, mask=i_row < num_rows)
        gl.store(best_ptr + i_row, best, mask=i_row < num_rows)
        gl.store(second_ptr + i_row, second, mask=i_row < num_rows)


@gluon.jit
def _load_stage(
    codes_desc, bias_desc, buffers, turn, chunk: gl.constexpr, stage,
    CHUNK: gl.constexpr, STAGE_CODES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    _, _, _, codes_ring, bias_ring, full, _, _ = buffers
    needs_bias: gl.constexpr = HAS_BIAS and chunk == 0
    mbarrier.expect(full.index(stage), STAGE_CODES * (CHUNK * 2 + 4 * needs_bias))
    position = turn * STAGE_CODES
    _load_tile(codes_desc, [position, chunk * CHUNK], full.index(stage), codes_ring.index(stage))
    if needs_bias:
        _load_tile(bias_desc, [position], full.index(stage), bias_ring.index(stage))


@gluon.jit
def _producer(
    rows_desc,
    codes_desc,
    bias_desc,
    buffers,
    num_rows,
    num_stages,
    CHUNKS: gl.constexpr,
    CHUNK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGE_CODES: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Copies row tiles, and the codebook once (resident) or for every pair of row tiles."""
    rows_tile, rows_full, rows_empty, codes_ring, bias_ring, full, empty, _ = buffers
    if RESIDENT:
        for turn in range(num_stages):
            _load_stage(
                codes_desc, bias_desc, buffers, turn, 0, turn, CHUNK, STAGE_CODES, HAS_BIAS
            )
    stage = 0
    phase = 1  # a fresh barrier counts as passed in phase 1: every buffer starts empty
    rows_phase = 1
    num_blocks = gl.cdiv(num_rows, CONSUMERS * BLOCK_N)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(rows_empty.index(consumer), rows_phase)
            mbarrier.expect(rows_full.index(consumer), BLOCK_N * CHUNKS * CHUNK * 2)
            position = (block * CONSUMERS + consumer) * BLOCK_N
            for chunk in gl.static_range(CHUNKS):
                target = rows_tile.index(consumer * CHUNKS + chunk)
                _load_tile(
                    rows_desc, [position, chunk * CHUNK], rows_full.index(consumer), target
                )
        rows_phase ^= 1
        if not RESIDENT:
            for turn in range(num_stages):
                for chunk in gl.static_range(CHUNKS):
                    mbarrier.wait(empty.index(stage), phase)
                    _load_stage(
                        codes_desc, bias_desc, buffers, turn, chunk, stage,
                        CHUNK, STAGE_CODES, HAS_BIAS,
                    )  # fmt: skip
                    stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _nearest_slot_hopper_kernel(
    rows_desc,
    codes_desc,
    bias_desc,
    slot_ptr,
    best_ptr,
    second_ptr,
    num_rows,
    num_stages,
    DEPTH: gl.constexpr,
    CHUNK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    ROW_STATE: gl.constexpr,
    RESIDENT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    CHUNKS: gl.constexpr = DEPTH // CHUNK
    STAGE_CODES: gl.constexpr = TILES * TILE_CODES
    HAS_BIAS: gl.constexpr = bias_desc is not None
    rows_tile = gl.allocate_shared_memory(
        gl.float16, [CONSUMERS * CHUNKS, BLOCK_N, CHUNK], rows_desc.layout
    )
    codes_ring = gl.allocate_shared_memory(
        gl.float16, [STAGES, STAGE_CODES, CHUNK], codes_desc.layout
    )
    if HAS_BIAS:
        bias_ring = gl.allocate_shared_memory(gl.float32, [STAGES, STAGE_CODES], bias_desc.layout)
    else:
        bias_ring: gl.constexpr = None
    rows_full = _barriers(CONSUMERS, 1)
    rows_empty = _barriers(CONSUMERS, 1)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, CONSUMERS)
    turns = _barriers(CONSUMERS, 1)
    fence_async_shared()
    buffers = (rows_tile, rows_full, rows_empty, codes_ring, bias_ring, full, empty, turns)
    outputs = (slot_ptr, best_ptr, second_ptr)
    # The compile-time arguments are written out three times: in a named tuple they would become
    # run-time values.
    # fmt: off
    if ROW_STATE:
        mbarrier.arrive(turns.index(0), count=1)  # the first turn is consumer 0's
        gl.warp_specialize(
            [
                (_wide_consumer, (buffers, outputs, num_rows, num_stages, 0,
                                  CHUNKS, BLOCK_N, STAGES, GROUPS, HAS_BIAS)),
                (_wide_consumer, (buffers, outputs, num_rows, num_stages, 1,
                                  CHUNKS, BLOCK_N, STAGES, GROUPS, HAS_BIAS)),
                (_producer, (rows_desc, codes_desc, bias_desc, buffers, num_rows, num_stages,
                             CHUNKS, CHUNK, BLOCK_N, STAGE_CODES, STAGES, HAS_BIAS, RESIDENT)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_narrow_consumer, (buffers, outputs, num_rows, num_stages, 0,
                                    BLOCK_N, TILES, STAGES, GROUPS, HAS_BIAS, RESIDENT)),
                (_narrow_consumer, (buffers, outputs, num_rows, num_stages, 1,
                                    BLOCK_N, TILES, STAGES, GROUPS, HAS_BIAS, RESIDENT)),
                (_producer, (rows_desc, codes_desc, bias_desc, buffers, num_rows, num_stages,
                             CHUNKS, CHUNK, BLOCK_N, STAGE_CODES, STAGES, HAS_BIAS, RESIDENT)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    # fmt: on
