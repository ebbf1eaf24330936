"""The fast pass of nearest_code for Hopper alone: warp-specialised Gluon kernels.

**Never executed so far**: compiled for sm_90 with Triton 3.6 and 3.9, its machine code checked
(`tests/kernels/triton/test_machine_code.py`) and its Python text run in an emulator of warps,
barriers and copies (`tests/kernels/triton/gluon_emulator.py`). It is therefore off unless
`FASTVQ_HOPPER_KERNELS=1` is set (nearest_code_tiles.py), until it has been seen right and faster
on a GPU.

One block owns pairs of row tiles, one tile per consumer warpgroup; a producer warp copies codes
through a ring in shared memory with the tensor memory accelerator (TMA). Rows, accumulators and the
running best stay in registers; scores are never written to memory.

    score[n, k] = Σ_j rows[n, j] · codes[k, j] − ratio[n] · norms[k]

A *slot* is GROUP codes of one 128-code tile that lie 128 / GROUP apart. Each row gets its best
slot, the best score and the best score of any other slot: what decides whether the winner is
certain. Operands, results and the meaning of ID_BITS are those of nearest_code_search.py, so that
certifying and rescoring are shared.

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
# More id bits than this cost the certificate more than keeping ids apart costs the fold.
MOST_ID_BITS = 9

SHARED_BYTES_PER_BLOCK = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How operands of one width are searched."""

    rows: int  # per consumer
    group: int  # codes per slot
    tiles: int  # 128-code tiles per stage of the ring
    stages: int
    chunk: int  # columns of the operands per stage
    # Whether only each row's best is kept between tiles, or the best of every slot column.
    row_state: bool
    consumer_registers: int = 240

    @property
    def stage_codes(self) -> int:
        return self.tiles * TILE_CODES.value

    def id_bits(self, num_codes: int, has_norms: bool) -> int:
        """Low bits of a score that hold a number: of its slot with row state, else of its tile.

        0 where tile numbers are kept apart: there are too many, or three product terms (their
        norms are columns) made scores more exact than what the bits would cost.
        """
        if self.row_state:
            return (TILE_CODES.value // self.group - 1).bit_length()
        bits = max(1, (num_codes // TILE_CODES.value - 1).bit_length())
        return bits if has_norms and bits <= MOST_ID_BITS else 0

    def shared_bytes(self, width: int, has_norms: bool) -> int:
        """Rows, the ring of codes and norms, the barriers, and 256 bytes of the compiler's own."""
        rows = CONSUMERS.value * self.rows * width * 2
        ring = self.stages * self.stage_codes * (self.chunk * 2 + 4 * has_norms)
        barriers = 8 * (3 * CONSUMERS.value + 2 * self.stages)
        return rows + ring + barriers + 256


# Chosen from machine code, not measured (`python -m benchmarks.static`): by width of the operands
# and whether norms are subtracted from the product or lie among its columns.
TILINGS = {
    (16, False): Tiling(rows=64, group=16, tiles=8, stages=2, chunk=16, row_state=False),
    (32, False): Tiling(rows=64, group=16, tiles=8, stages=2, chunk=32, row_state=False),
    (64, False): Tiling(rows=64, group=16, tiles=4, stages=2, chunk=64, row_state=False),
    (16, True): Tiling(rows=64, group=8, tiles=8, stages=2, chunk=16, row_state=False),
    (32, True): Tiling(rows=64, group=8, tiles=8, stages=2, chunk=32, row_state=False),
    (64, True): Tiling(rows=64, group=4, tiles=2, stages=4, chunk=64, row_state=False),
    (128, True): Tiling(rows=128, group=4, tiles=1, stages=4, chunk=128, row_state=True),
    (256, True): Tiling(rows=128, group=2, tiles=1, stages=3, chunk=128, row_state=True),
}


def nearest_slot_hopper(
    rows: Tensor,
    codes: Tensor,
    ratio: Tensor | None,
    norms: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor],
    num_programs: int,
    tiling: Tiling | None = None,
) -> int:
    """Best slot of each row, its score and the runner-up's.

    Args:
        rows: (N, WIDTH) float16, contiguous; WIDTH 16, 32 or 64, with norms also 128 or 256.
        codes: (K, WIDTH) float16, contiguous, K a multiple of `tiling.stage_codes`. A padded code
            must score below every code, by its norm or by a column kept for that.
        ratio: (N,) float32, what multiplies the norms in each row; None where they are columns.
        norms: (K,) float32, finite; None where they are columns of the operands.
        results: written: winner (N,) int32, best (N,) float32, second (N,) float32; contiguous.
            The winning slot is codes winner, winner + C, winner + 2C …, `tiling.group` of them,
            C = 128 / group.
        num_programs: most blocks to launch; one per multiprocessor serves.
        tiling: default `TILINGS[WIDTH, norms is not None]`.
    Returns:
        How many low bits of `best` and `second` hold a number instead.
    Raises:
        ValueError: a shape these kernels do not take.
    """
    num_rows, width = rows.shape
    num_codes = codes.shape[0]
    tiling = tiling or TILINGS.get((width, norms is not None))
    if tiling is None:
        taken = ", ".join(str(w) for w, has_norms in TILINGS if has_norms == (norms is not None))
        raise ValueError(
            f"nearest_slot_hopper: rows must be (N, W) with W among {taken}; got "
            f"{tuple(rows.shape)}. Pad with columns of zeros, or use the plain kernel."
        )
    if num_codes == 0 or num_codes % tiling.stage_codes:
        raise ValueError(
            f"nearest_slot_hopper: codes must be padded to a multiple of {tiling.stage_codes} "
            f"rows; got {num_codes}. Add codes that never win."
        )
    needed = tiling.shared_bytes(width, norms is not None)
    if needed > SHARED_BYTES_PER_BLOCK:
        raise ValueError(
            f"nearest_slot_hopper: tiling must fit in {SHARED_BYTES_PER_BLOCK} bytes of shared "
            f"memory; got {tiling}, which needs {needed}. Use fewer stages."
        )
    id_bits = tiling.id_bits(num_codes, norms is not None)
    if num_rows == 0:
        return id_bits
    blocks = -(-num_rows // (CONSUMERS.value * tiling.rows))
    _nearest_slot_hopper_kernel[(min(num_programs, blocks),)](
        _describe(rows, [tiling.rows, tiling.chunk]),
        _describe(codes, [tiling.stage_codes, tiling.chunk]),
        None if norms is None else _describe(norms, [tiling.stage_codes]),
        ratio,
        *results,
        num_rows,
        num_codes // tiling.stage_codes,
        WIDTH=width,
        CHUNK=tiling.chunk,
        BLOCK_N=tiling.rows,
        TILES=tiling.tiles,
        STAGES=tiling.stages,
        GROUP=tiling.group,
        ID_BITS=id_bits,
        ROW_STATE=tiling.row_state,
        RESIDENT=not tiling.row_state and num_codes <= tiling.stages * tiling.stage_codes,
        CONSUMER_REGISTERS=tiling.consumer_registers,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return id_bits


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
def _multiply_add(a, b, c):
    # Volatile, so that it reads the accumulator where that is at hand, and frees it.
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _halves(scores):
    # Columns 0 … n/2−1 and n/2 … n−1: lies in the same thread's registers, nothing moves.
    width: gl.constexpr = scores.shape[1]
    return scores.reshape([scores.shape[0], 2, width // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _slot_maximum(scores, GROUP: gl.constexpr):
    """Column j of the result is the greatest of columns j, j + C, j + 2C …; C = width / GROUP."""
    if GROUP == 1:
        best = scores
    else:
        left, right = _halves(scores)
        best = _maximum(_slot_maximum(left, GROUP // 2), _slot_maximum(right, GROUP // 2))
    return best


@gluon.jit
def _with_id(score, number, ID_BITS: gl.constexpr):
    """The score with a number below 2^ID_BITS in place of its low bits."""
    keep: gl.constexpr = -(1 << ID_BITS)
    bits = (score.to(gl.int32, bitcast=True) & keep) | number
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _fold_tile(best, second, ids, scores, tile, GROUP: gl.constexpr, ID_BITS: gl.constexpr):
    top = _slot_maximum(scores, GROUP)
    if ID_BITS > 0:
        top = _with_id(top, tile, ID_BITS)
    else:
        ids = gl.where(top > best, tile, ids)
    second = gl.maximum(second, gl.minimum(best, top))
    return gl.maximum(best, top), second, ids


@gluon.jit
def _merge_best_two(best_a, second_a, best_b, second_b):
    second = gl.maximum(gl.minimum(best_a, best_b), gl.maximum(second_a, second_b))
    return gl.maximum(best_a, best_b), second


@gluon.jit
def _fold_row(best, second, best_tile, scores, tile, GROUP: gl.constexpr, ID_BITS: gl.constexpr):
    slots = _slot_maximum(scores, GROUP)
    width: gl.constexpr = slots.shape[1]
    columns = gl.arange(0, width, gl.SliceLayout(0, slots.type.layout))
    packed = _with_id(slots, gl.expand_dims(columns, 0), ID_BITS)
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
def _less_norms(
    scores, minus_ratio, norms_ring, stage, tile: gl.constexpr, HAS_NORMS: gl.constexpr
):
    if HAS_NORMS:
        norms = norms_ring.index(stage).slice(tile * TILE_CODES, TILE_CODES)
        norms = norms.load(gl.SliceLayout(0, scores.type.layout))
        scores = _multiply_add(gl.expand_dims(minus_ratio, 1), gl.expand_dims(norms, 0), scores)
    return scores


@gluon.jit
def _load_minus_ratio(ratio_ptr, i_row, num_rows, HAS_NORMS: gl.constexpr):
    if HAS_NORMS:
        minus_ratio = -gl.load(ratio_ptr + i_row, mask=i_row < num_rows, other=0.0)
    else:
        minus_ratio = 0
    return minus_ratio


@gluon.jit
def _narrow_consumer(
    buffers,
    pointers,
    num_rows,
    num_stages,
    consumer: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    ID_BITS: gl.constexpr,
    HAS_NORMS: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Two accumulators take turns: one is folded while the other's product is in flight."""
    rows_tile, rows_full, rows_empty, codes_ring, norms_ring, full, empty, _ = buffers
    ratio_ptr, winner_ptr, best_ptr, second_ptr = pointers
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_CODES, 16])
    zeros = gl.zeros([BLOCK_N, TILE_CODES], gl.float32, scores_layout)
    slots: gl.constexpr = TILE_CODES // GROUP
    slot_layout: gl.constexpr = _slot_maximum(zeros, GROUP).type.layout
    stage = 0
    phase = 0
    rows_phase = 0
    num_blocks = gl.cdiv(num_rows, CONSUMERS * BLOCK_N)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        mbarrier.wait(rows_full.index(consumer), rows_phase)
        rows_phase ^= 1
        rows = rows_tile.index(consumer).load(gl.DotOperandLayout(0, scores_layout, 2))
        mbarrier.arrive(rows_empty.index(consumer), count=1)
        first_row = (block * CONSUMERS + consumer) * BLOCK_N
        i_row = first_row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, scores_layout))
        minus_ratio = _load_minus_ratio(ratio_ptr, i_row, num_rows, HAS_NORMS)
        best = gl.full([BLOCK_N, slots], LOWEST, gl.float32, slot_layout)
        second = best
        ids = gl.zeros([BLOCK_N, slots], gl.int32, slot_layout)
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
                scores = _less_norms(even, minus_ratio, norms_ring, stage, tile, HAS_NORMS)
                best, second, ids = _fold_tile(best, second, ids, scores, number, GROUP, ID_BITS)
                if tile + 2 < TILES:
                    even = _issue(rows, codes_ring, stage, tile + 2, even)
                    odd = warpgroup_mma_wait(1, deps=[odd])
                else:
                    odd = warpgroup_mma_wait(0, deps=[odd])
                    if not HAS_NORMS:
                        mbarrier.arrive(empty.index(stage), count=1)
                scores = _less_norms(odd, minus_ratio, norms_ring, stage, tile + 1, HAS_NORMS)
                best, second, ids = _fold_tile(
                    best, second, ids, scores, number + 1, GROUP, ID_BITS
                )
            if HAS_NORMS:
                mbarrier.arrive(empty.index(stage), count=1)
            if not RESIDENT:
                stage, phase = _advance(stage, phase, STAGES)
        columns = gl.expand_dims(gl.arange(0, slots, gl.SliceLayout(0, slot_layout)), 0)
        row_best = gl.max(best, 1)
        is_best = best == gl.expand_dims(row_best, 1)
        column = gl.min(gl.where(is_best, columns, slots), 1)
        is_winner = columns == gl.expand_dims(column, 1)
        others = gl.where(is_winner, second, best)
        if ID_BITS > 0:
            tile = row_best.to(gl.int32, bitcast=True) & ((1 << ID_BITS) - 1)
        else:
            tile = gl.max(gl.where(is_winner, ids, 0), 1)
        i_row = first_row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, slot_layout))
        gl.store(winner_ptr + i_row, tile * TILE_CODES + column, mask=i_row < num_rows)
        gl.store(best_ptr + i_row, row_best, mask=i_row < num_rows)
        gl.store(second_ptr + i_row, gl.max(others, 1), mask=i_row < num_rows)


@gluon.jit
def _wide_consumer(
    buffers,
    pointers,
    num_rows,
    num_stages,
    consumer: gl.constexpr,
    CHUNKS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    ID_BITS: gl.constexpr,
    HAS_NORMS: gl.constexpr,
):
    """One accumulator; the other warpgroup's products run while this one folds (ping-pong)."""
    rows_tile, rows_full, rows_empty, codes_ring, norms_ring, full, empty, turns = buffers
    ratio_ptr, winner_ptr, best_ptr, second_ptr = pointers
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_CODES, 16])
    zeros = gl.zeros([BLOCK_N, TILE_CODES], gl.float32, scores_layout)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    stage = 0
    phase = 0
    rows_phase = 0
    turn_phase = 0
    num_blocks = gl.cdiv(num_rows, CONSUMERS * BLOCK_N)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        mbarrier.wait(rows_full.index(consumer), rows_phase)
        rows_phase ^= 1
        i_row = (block * CONSUMERS + consumer) * BLOCK_N + gl.arange(0, BLOCK_N, row_layout)
        minus_ratio = _load_minus_ratio(ratio_ptr, i_row, num_rows, HAS_NORMS)
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
            if HAS_NORMS:
                norms = norms_ring.index(stage).load(gl.SliceLayout(0, scores_layout))
            for _ in gl.static_range(CHUNKS):
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _advance(stage, phase, STAGES)
            if HAS_NORMS:
                scores = _multiply_add(
                    gl.expand_dims(minus_ratio, 1), gl.expand_dims(norms, 0), scores
                )
            best, second, best_tile = _fold_row(
                best, second, best_tile, scores, tile, GROUP, ID_BITS
            )
        mbarrier.arrive(rows_empty.index(consumer), count=1)
        column = best.to(gl.int32, bitcast=True) & ((1 << ID_BITS) - 1)
        gl.store(winner_ptr + i_row, best_tile * TILE_CODES + column, mask=i_row < num_rows)
        gl.store(best_ptr + i_row, best, mask=i_row < num_rows)
        gl.store(second_ptr + i_row, second, mask=i_row < num_rows)


@gluon.jit
def _load_stage(
    codes_desc, norms_desc, buffers, turn, chunk: gl.constexpr, stage,
    CHUNK: gl.constexpr, STAGE_CODES: gl.constexpr, HAS_NORMS: gl.constexpr,
):  # fmt: skip
    _, _, _, codes_ring, norms_ring, full, _, _ = buffers
    needs_norms: gl.constexpr = HAS_NORMS and chunk == 0
    mbarrier.expect(full.index(stage), STAGE_CODES * (CHUNK * 2 + 4 * needs_norms))
    position = turn * STAGE_CODES
    _load_tile(codes_desc, [position, chunk * CHUNK], full.index(stage), codes_ring.index(stage))
    if needs_norms:
        _load_tile(norms_desc, [position], full.index(stage), norms_ring.index(stage))


@gluon.jit
def _producer(
    rows_desc,
    codes_desc,
    norms_desc,
    buffers,
    num_rows,
    num_stages,
    CHUNKS: gl.constexpr,
    CHUNK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGE_CODES: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_NORMS: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Copies row tiles, and the codebook once (resident) or for every pair of row tiles."""
    rows_tile, rows_full, rows_empty, _, _, _, empty, _ = buffers
    if RESIDENT:
        for turn in range(num_stages):
            _load_stage(
                codes_desc, norms_desc, buffers, turn, 0, turn, CHUNK, STAGE_CODES, HAS_NORMS
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
                _load_tile(rows_desc, [position, chunk * CHUNK], rows_full.index(consumer), target)
        rows_phase ^= 1
        if not RESIDENT:
            for turn in range(num_stages):
                for chunk in gl.static_range(CHUNKS):
                    mbarrier.wait(empty.index(stage), phase)
                    _load_stage(
                        codes_desc, norms_desc, buffers, turn, chunk, stage,
                        CHUNK, STAGE_CODES, HAS_NORMS,
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
    norms_desc,
    ratio_ptr,
    winner_ptr,
    best_ptr,
    second_ptr,
    num_rows,
    num_stages,
    WIDTH: gl.constexpr,
    CHUNK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    ID_BITS: gl.constexpr,
    ROW_STATE: gl.constexpr,
    RESIDENT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    CHUNKS: gl.constexpr = WIDTH // CHUNK
    STAGE_CODES: gl.constexpr = TILES * TILE_CODES
    HAS_NORMS: gl.constexpr = norms_desc is not None
    rows_tile = gl.allocate_shared_memory(
        gl.float16, [CONSUMERS * CHUNKS, BLOCK_N, CHUNK], rows_desc.layout
    )
    codes_ring = gl.allocate_shared_memory(
        gl.float16, [STAGES, STAGE_CODES, CHUNK], codes_desc.layout
    )
    if HAS_NORMS:
        norms_ring = gl.allocate_shared_memory(gl.float32, [STAGES, STAGE_CODES], norms_desc.layout)
    else:
        norms_ring: gl.constexpr = None
    rows_full = _barriers(CONSUMERS, 1)
    rows_empty = _barriers(CONSUMERS, 1)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, CONSUMERS)
    turns = _barriers(CONSUMERS, 1)
    fence_async_shared()
    buffers = (rows_tile, rows_full, rows_empty, codes_ring, norms_ring, full, empty, turns)
    pointers = (ratio_ptr, winner_ptr, best_ptr, second_ptr)
    # The compile-time arguments are written out three times: in a named tuple they would become
    # run-time values.
    # fmt: off
    if ROW_STATE:
        mbarrier.arrive(turns.index(0), count=1)  # the first turn is consumer 0's
        gl.warp_specialize(
            [
                (_wide_consumer, (buffers, pointers, num_rows, num_stages, 0,
                                  CHUNKS, BLOCK_N, STAGES, GROUP, ID_BITS, HAS_NORMS)),
                (_wide_consumer, (buffers, pointers, num_rows, num_stages, 1,
                                  CHUNKS, BLOCK_N, STAGES, GROUP, ID_BITS, HAS_NORMS)),
                (_producer, (rows_desc, codes_desc, norms_desc, buffers, num_rows, num_stages,
                             CHUNKS, CHUNK, BLOCK_N, STAGE_CODES, STAGES, HAS_NORMS, RESIDENT)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_narrow_consumer, (buffers, pointers, num_rows, num_stages, 0,
                                    BLOCK_N, TILES, STAGES, GROUP, ID_BITS, HAS_NORMS, RESIDENT)),
                (_narrow_consumer, (buffers, pointers, num_rows, num_stages, 1,
                                    BLOCK_N, TILES, STAGES, GROUP, ID_BITS, HAS_NORMS, RESIDENT)),
                (_producer, (rows_desc, codes_desc, norms_desc, buffers, num_rows, num_stages,
                             CHUNKS, CHUNK, BLOCK_N, STAGE_CODES, STAGES, HAS_NORMS, RESIDENT)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    # fmt: on
