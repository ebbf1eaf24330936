"""Predicted time of a search on an H200, from instruction counts, against the floor of its size.

A model, not a measurement. Per pair, the matrix unit needs D/2048 clocks of an SM and the ALU pipe
its instructions / 64; what overlaps costs the larger of the two, what does not costs the sum. The
codes come from L2 meanwhile, no faster than it gives them. The rates below are published or
measured by others (provenance beside each); the model puts the plain tile-and-argmax kernel of
flash-kmeans at 2.95 ms for 65536 × 65536 × 128, where its authors measured 3.155 ms (fp16), and is
7–33 % optimistic at smaller sizes.
"""

from __future__ import annotations

import dataclasses

from benchmarks.static.sass import LoopCost

MULTIPROCESSORS = 132
CLOCK_HZ = 1.75e9
# cuBLAS and CUTLASS reach 780–794 TFLOP/s of the 989 dense fp16 TFLOP/s on this chip.
MATRIX_FLOPS = 794e12
ALU_LANES = 64  # CUDA C++ Programming Guide, arithmetic throughput: compare, minimum, maximum
ISSUE_LANES = 128  # four schedulers, one warp instruction per clock each
DRAM_BYTES_PER_S = 4.3e12
L2_BYTES_PER_S = 5.5e12
# Loop control, barriers and bank conflicts that instruction counts do not show.
OVERHEAD = 1.10


@dataclasses.dataclass(frozen=True)
class Size:
    """A benchmark size with float32 input, and the device time aimed at, in µs."""

    name: str
    rows: int
    codes: int
    channels: int
    target_us: float

    @property
    def pairs(self) -> int:
        return self.rows * self.codes


H200_SIZES = (
    Size("131072×512×64", 131072, 512, 64, 30),
    Size("131072×8192×256", 131072, 8192, 256, 1000),
    Size("1048576×1024×8", 1048576, 1024, 8, 220),
    Size("262144×16384×8", 262144, 16384, 8, 550),
    Size("65536×65536×128", 65536, 65536, 128, 1800),
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Times in µs. `floor` is one 16-bit matrix pass or one reading of the input, the longer."""

    main_loop_us: float
    tail_us: float
    rescore_us: float
    floor_us: float

    @property
    def total_us(self) -> float:
        return self.main_loop_us + self.tail_us + self.rescore_us


def predict(
    size: Size,
    cost: LoopCost,
    depth: int,
    tail: float,
    rescored_codes: int,
    block_rows: int,
    overlap: float | None = None,
) -> Prediction:
    """Time of the fast pass and of rescoring its winners.

    Args:
        size: what is searched.
        cost: of the main loop, per pair.
        depth: products per pair, padding and extra product terms included.
        tail: warp instructions outside the main loop per row.
        rescored_codes: codes read again per row, 16 bits per channel, from L2.
        block_rows: rows of a block, which read the codes from L2 once for all of them.
        overlap: share of the shorter pipe's work hidden under the longer's; default `cost.overlap`.
    Returns:
        Times in µs.
    """
    hidden = (cost.overlap or 0.0) if overlap is None else overlap
    matrix = _matrix_clocks(depth)
    vector = max(cost.alu / ALU_LANES, cost.issued / ISSUE_LANES)
    clocks = OVERHEAD * max(matrix, vector) + (1 - hidden) * min(matrix, vector)
    code_bytes = size.pairs / block_rows * depth * 2
    per_clock = MULTIPROCESSORS * CLOCK_HZ / 1e6
    return Prediction(
        main_loop_us=max(size.pairs * clocks / per_clock, code_bytes / L2_BYTES_PER_S * 1e6),
        tail_us=size.rows * tail / (ISSUE_LANES / 32) / per_clock,
        rescore_us=size.rows * rescored_codes * size.channels * 2 / L2_BYTES_PER_S * 1e6,
        floor_us=_floor_us(size),
    )


def _matrix_clocks(depth: int) -> float:
    return 2 * depth / (MATRIX_FLOPS / (MULTIPROCESSORS * CLOCK_HZ))


def _floor_us(size: Size) -> float:
    matrix = size.pairs * _matrix_clocks(max(16, size.channels)) / (MULTIPROCESSORS * CLOCK_HZ)
    # float32 rows and codes in, int32 indices out.
    traffic = 4 * (size.rows * (size.channels + 1) + size.codes * size.channels) / DRAM_BYTES_PER_S
    return max(matrix, traffic) * 1e6
