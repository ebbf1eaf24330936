"""The Hopper kernels' text, run in an emulator, and their launcher's checks; no GPU.

What only machine code can show (spills, products in flight, instruction counts) is in
test_machine_code.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastvq.kernels.triton import nearest_code_hopper as hopper
from fastvq.kernels.triton.nearest_code import nearest_code_forward
from fastvq.kernels.triton.nearest_code_hopper import TILINGS, Tiling, nearest_slot_hopper
from fastvq.kernels.triton.nearest_code_tiles import choose_tiles, hopper_tiles
from gluon_emulator import EmulationError, Emulator, Pointer
from tolerances import UNIT_ROUNDOFF

from fastvq.reference.nearest_code import nearest_code as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = hopper.TILE_CODES.value
U32 = UNIT_ROUNDOFF[torch.float32]

# Small rings, so that few codes already go around them: by whether norms are columns or apart.
SMALL = {
    "narrow": Tiling(rows=64, group=16, tiles=2, stages=2, chunk=16, row_state=False),
    "narrow ring of 3": Tiling(rows=64, group=4, tiles=4, stages=3, chunk=32, row_state=False),
    "wide": Tiling(rows=128, group=4, tiles=1, stages=2, chunk=128, row_state=True),
    "wide, two chunks": Tiling(rows=128, group=2, tiles=1, stages=3, chunk=128, row_state=True),
}
WIDTHS = {"narrow": 16, "narrow ring of 3": 32, "wide": 128, "wide, two chunks": 256}


@dataclasses.dataclass
class Operands:
    rows: Tensor
    codes: Tensor
    ratio: Tensor | None
    norms: Tensor | None

    def scores(self) -> Tensor:
        """(N, K) in float64."""
        scores = self.rows.double() @ self.codes.double().T
        if self.ratio is not None and self.norms is not None:
            scores -= self.ratio.double()[:, None] * self.norms.double()
        return scores

    def size(self, num_codes: int) -> Tensor:
        """(N,): the greatest sum of a score's terms' sizes, padding aside."""
        size = self.rows.double().abs() @ self.codes[:num_codes].double().abs().T
        if self.ratio is not None and self.norms is not None:
            size += self.ratio.double()[:, None] * self.norms[:num_codes].double().abs()
        return size.amax(1)


def make_operands(
    tiling: Tiling, width: int, num_rows: int, num_codes: int, norms: bool
) -> Operands:
    """Random rows and codes, the codes padded to whole stages the way that the caller must."""
    padded = math.ceil(num_codes / tiling.stage_codes) * tiling.stage_codes
    rows = torch.randn(num_rows, width).half()
    codes = torch.randn(padded, width).half()
    codes[num_codes:] = 0
    if norms:
        half_squares = 0.5 * codes.float().square().sum(1)
        half_squares[num_codes:] = 2.0**30
        return Operands(rows, codes, 2.0 ** torch.randint(-2, 3, (num_rows,)), half_squares)
    rows[:, -1] = 2.0**15
    codes[:num_codes, -1] = 0
    codes[num_codes:, -1] = -(2.0**15)
    return Operands(rows, codes, None, None)


def run(
    operands: Operands, tiling: Tiling, programs: int, seed: int, resident: bool = False,
    module: types.ModuleType = hopper,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The launch that nearest_slot_hopper makes, in the emulator."""
    num_rows, width = operands.rows.shape
    num_codes = len(operands.codes)
    has_norms = operands.norms is not None
    winner = torch.full((num_rows,), -7, dtype=torch.int32)
    best = torch.full((num_rows,), float("nan"))
    second = best.clone()

    def described(tensor: Tensor, block: list[int]) -> types.SimpleNamespace:
        return types.SimpleNamespace(base=tensor, block_shape=block, layout=None)

    norms = operands.norms
    Emulator(module, seed).launch(
        "_nearest_slot_hopper_kernel",
        programs,
        described(operands.rows, [tiling.rows, tiling.chunk]),
        described(operands.codes, [tiling.stage_codes, tiling.chunk]),
        None if norms is None else described(norms, [tiling.stage_codes]),
        None if operands.ratio is None else Pointer(operands.ratio),
        *(Pointer(winner), Pointer(best), Pointer(second)),
        *(num_rows, num_codes // tiling.stage_codes),
        *(width, tiling.chunk, tiling.rows, tiling.tiles, tiling.stages, tiling.group),
        *(tiling.id_bits(num_codes, has_norms), tiling.row_state, resident, 240),
    )
    return winner, best, second


def slot_scores(operands: Operands, group: int) -> Tensor:
    """(N, K/128, 128/group): the greatest score of each slot, in float64."""
    scores = operands.scores()
    return scores.reshape(len(scores), -1, group, TILE // group).amax(2)


def assert_fast_pass(
    operands: Operands, tiling: Tiling, num_codes: int, result: tuple[Tensor, Tensor, Tensor]
) -> None:
    """What the certificate relies on: the winner's score, and second the best of all others."""
    winner, best, second = result
    has_norms = operands.norms is not None
    bits = tiling.id_bits(len(operands.codes), has_norms)
    slots = slot_scores(operands, tiling.group)
    tile, column = winner.long() // TILE, winner.long() % TILE
    assert (column < TILE // tiling.group).all()
    assert (winner < num_codes).all()  # padding never wins
    i = torch.arange(len(winner))
    # Ids in the low bits move a score by less than 2^bits units in the last place of 23.
    moved = 2.0 ** (bits - 23) if bits else 0.0
    # A float32 sum of width terms and one subtraction.
    error = (operands.rows.shape[1] + 2) * U32 * operands.size(num_codes)
    won = slots[i, tile, column]
    assert ((best.double() - won).abs() <= error + moved * won.abs()).all()
    slots[i, tile, column] = -torch.inf
    other = slots.amax((1, 2))
    # Where there is no other code, `other` is padding's score.
    error += (operands.rows.shape[1] + 2) * U32 * other.abs()
    assert ((second.double() - other).abs() <= error + moved * other.abs()).all()
    assert (best >= second).all()


CASES = [
    ("narrow", False, 1, 1, 1, False),
    ("narrow", False, 70, 256, 1, True),
    ("narrow", False, 300, 1500, 2, False),
    ("narrow", True, 129, 700, 2, False),
    ("narrow", True, 300, 512, 1, True),
    ("narrow ring of 3", True, 260, 2100, 1, False),
    ("narrow ring of 3", False, 200, 1000, 2, False),
    ("wide", True, 300, 500, 1, False),
    ("wide, two chunks", True, 530, 900, 2, False),
]


@pytest.mark.parametrize(("shape", "norms", "num_rows", "num_codes", "programs", "resident"), CASES)
def test_the_fast_pass_under_random_schedules(
    shape: str, norms: bool, num_rows: int, num_codes: int, programs: int, resident: bool
) -> None:
    tiling = SMALL[shape]
    operands = make_operands(tiling, WIDTHS[shape], num_rows, num_codes, norms)
    for seed in range(3):
        result = run(operands, tiling, programs, seed, resident)
        assert_fast_pass(operands, tiling, num_codes, result)


def test_equal_scores_leave_no_winner_certain() -> None:
    tiling = SMALL["narrow"]
    operands = make_operands(tiling, 16, 64, 512, norms=False)
    operands.codes[300] = operands.codes[37]
    operands.rows[:, :-1] = operands.codes[37, :-1] * 4
    _, best, second = run(operands, tiling, 1, seed=0)
    torch.testing.assert_close(best, second, rtol=0, atol=0)


BROKEN = {
    "codes released before the products that read them": (
        "narrow",
        "mbarrier.wait(full.index(stage), phase)",
        "mbarrier.wait(full.index(stage), phase); mbarrier.arrive(empty.index(stage), count=1)",
    ),
    "one wait too few": ("narrow", "warpgroup_mma_wait(1, deps=[even])", "even"),
    "a wait that leaves the product in flight": (
        "narrow",
        "warpgroup_mma_wait(0, deps=[odd])",
        "warpgroup_mma_wait(1, deps=[odd])",
    ),
    "a stage never released": ("wide", "mbarrier.arrive(empty.index(stage), count=1)", "pass"),
    "turns never passed": ("wide", "mbarrier.arrive(turns.index(1 - consumer), count=1)", "pass"),
    "rows never released": ("wide", "mbarrier.arrive(rows_empty.index(consumer), count=1)", "pass"),
    "the second chunk ignored": (
        "wide, two chunks",
        "scores, use_acc=chunk > 0",
        "zeros, use_acc=False",
    ),
    "a copy without its bytes": (
        "narrow",
        "STAGE_CODES * (CHUNK * 2 + 4 * needs_norms)",
        "STAGE_CODES * CHUNK",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_emulator_sees_a_broken_kernel(name: str) -> None:
    shape, text, wrong = BROKEN[name]
    module = changed_module(text, wrong)
    with pytest.raises((EmulationError, AssertionError)):
        run_and_check(shape, module)


def test_the_changed_module_is_sound_unchanged() -> None:
    for shape in SMALL:
        run_and_check(shape, changed_module("GROUP", "GROUP"))


def run_and_check(shape: str, module: types.ModuleType) -> None:
    tiling = SMALL[shape]
    operands = make_operands(tiling, WIDTHS[shape], 300, 1100, norms=shape != "narrow")
    for seed in range(3):
        result = run(operands, tiling, 1, seed, module=module)
        assert_fast_pass(operands, tiling, 1100, result)


def changed_module(text: str, wrong: str) -> types.ModuleType:
    """The kernels' module with a piece of its text replaced, its jitted functions plain."""
    path = hopper.__file__
    assert path is not None
    with open(path, encoding="utf-8") as file:
        source = file.read()
    assert text in source
    source = source.replace(text, wrong).replace("@gluon.jit\n", "")
    module = types.ModuleType(hopper.__name__)
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def test_padding_stays_finite_with_an_id_in_it() -> None:
    lowest = torch.tensor(hopper.LOWEST.value, dtype=torch.float32).view(torch.int32)
    for bits in range(hopper.MOST_ID_BITS + 1):
        packed = ((lowest & -(1 << bits)) | ((1 << bits) - 1)).view(torch.float32)
        assert packed.isfinite()
        assert packed < -(2.0**100)


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTVQ_HOPPER_KERNELS", raising=False)
    assert not any(choose_tiles(channels, (9, 0)).hopper for channels in (8, 64, 256))
    monkeypatch.setenv("FASTVQ_HOPPER_KERNELS", "1")
    assert all(choose_tiles(channels, (9, 0)).hopper for channels in (3, 8, 16, 31, 64, 256))
    assert not choose_tiles(512, (9, 0)).hopper  # wider than these kernels serve
    assert not choose_tiles(64, (8, 0)).hopper
    assert not choose_tiles(64, (10, 0)).hopper


class EmulatedKernel:
    """Launches in the emulator what the launcher launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.emulator = Emulator(hopper)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: object, num_warps: int, enable_fp_fusion: bool, **kw: int) -> None:
            self.launches += 1
            given = [Pointer(a) if isinstance(a, Tensor) else a for a in arguments]
            self.emulator.launch("_nearest_slot_hopper_kernel", grid[0], *given, **kw)

        return launch


@pytest.mark.skipif(not INTERPRETED, reason="the kernels around it need the interpreter")
@pytest.mark.parametrize(
    ("heads", "books", "num_rows", "num_codes", "channels", "metric"),
    [
        (1, 1, 70, 33, 8, "l2"),
        (2, 1, 65, 130, 3, "dot"),
        (2, 2, 40, 200, 31, "l2"),
        (1, 1, 130, 300, 100, "l2"),
        (1, 1, 20, 1, 256, "l2"),
    ],
)
def test_the_whole_search_is_exact_with_it(
    heads: int, books: int, num_rows: int, num_codes: int, channels: int, metric: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kernel = EmulatedKernel()
    monkeypatch.setattr(hopper, "_nearest_slot_hopper_kernel", kernel)
    x = torch.randn(heads, num_rows, channels)
    codebook = torch.randn(books, num_codes, channels)
    codebook[:, num_codes // 2] = codebook[:, 0]  # a tie
    x[:, 0] = codebook[:, 0]
    x[:, -1, 0] = torch.nan
    tiles = hopper_tiles(channels)
    assert tiles is not None
    indices, _ = nearest_code_forward(x, codebook, metric=metric, tiles=tiles)
    assert kernel.launches == heads
    for head in range(heads):
        truth, _ = reference(x[head].double(), codebook[head % books].double(), metric=metric)
        assert torch.equal(indices[head], truth)


@pytest.mark.parametrize(
    ("width", "num_codes", "tiling", "message"),
    [
        (48, 1024, None, "rows must be (N, W) with W among 16, 32, 64"),
        (16, 1000, None, "codes must be padded to a multiple of 1024 rows; got 1000"),
        (16, 0, None, "codes must be padded"),
        (32, 4096, dataclasses.replace(TILINGS[32, False], stages=4), "which needs 270"),
    ],
)
def test_refusals_name_the_way_out(
    width: int, num_codes: int, tiling: Tiling | None, message: str
) -> None:
    rows = torch.zeros(8, width, dtype=torch.float16)
    codes = torch.zeros(num_codes, width, dtype=torch.float16)
    with pytest.raises(ValueError) as refusal:
        nearest_slot_hopper(rows, codes, None, None, results_for(rows), 132, tiling)
    assert message in str(refusal.value)


def test_no_rows_launch_nothing() -> None:
    rows = torch.zeros(0, 16, dtype=torch.float16)
    codes = torch.zeros(1024, 16, dtype=torch.float16)
    assert nearest_slot_hopper(rows, codes, None, None, results_for(rows), 132) == 0


def results_for(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    winner = torch.empty(len(rows), dtype=torch.int32)
    return winner, torch.empty(len(rows)), torch.empty(len(rows))
