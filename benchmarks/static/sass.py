"""Reading machine code (SASS): resources, spills, matrix instructions, cost of the main loop.

Counts are of instructions in the text, not of cycles. A *pair* is one (row, code) score; all counts
per pair are instructions that one thread executes for each score it owns, which is the same as warp
instructions times 32 per score.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable

from benchmarks.static.compile import MachineCode

# Issued at 64 lanes per clock and SM on sm_80 to sm_100, half the rate of FADD and FFMA:
# comparisons, selections, minima, maxima, integer and logic operations, conversions and moves.
ALU = frozenset(
    """
    BMSK CS2R F2FP F2F FCHK FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2 I2F I2FP IABS IADD
    IADD3 IMNMX ISETP LEA LOP LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF UMOV2 VHMNMX VIADD
    VIADDMNMX VIMNMX VIMNMX3
    """.split()  # noqa: SIM905
)
# Issued at 128 lanes per clock and SM.
FMA = frozenset({"FADD", "FADD2", "FFMA", "FFMA2", "FMUL", "FMUL2", "HADD2", "HFMA2", "IMAD"})
MATRIX = frozenset(["HMMA", "HGMMA", "UTCHMMA"])
DOUBLE_PRECISION = frozenset(["DADD", "DFMA", "DMUL", "DMNMX", "DSETP", "DMMA"])

# CUDA C++ Programming Guide, technical specifications per compute capability: dynamic shared memory
# that one block can opt in to, and what an SM holds.
SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_RESERVED_PER_BLOCK = 1024
REGISTERS_PER_SM = 64 * 1024
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
# A warp's registers are handed out 256 at a time.
REGISTER_ALLOCATION = 256

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T0-9]+)\s+)?(\S+)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"\.L\w+")


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    guard: str
    name: str
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.guard} {self.name} {', '.join(self.operands)}".strip()


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of one kernel, and where each one may branch to (positions among them)."""

    instructions: tuple[Instruction, ...]
    targets: dict[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Positions first … last of a loop body, the branch back included."""

    program: Program
    first: int
    last: int

    @functools.cached_property
    def body(self) -> tuple[Instruction, ...]:
        return self.program.instructions[self.first : self.last + 1]

    @functools.cached_property
    def counts(self) -> collections.Counter[str]:
        return collections.Counter(instruction.opcode for instruction in self.body)

    def encloses(self, other: Loop) -> bool:
        inside = self.first <= other.first and other.last <= self.last
        return inside and (self.first, self.last) != (other.first, other.last)


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search kernel was asked to compute, to compare its machine code with.

    Attributes:
        products: multiply-adds per pair: the width of the operands.
        warp_pairs: scores per warp and trip through the main loop.
        chunks: trips of a loop over the operands' columns inside that trip, if one is left.
        tcgen05_products: multiply-adds per UTCHMMA and warp (sm_100), whose shape the machine code
            does not name.
    """

    products: int
    warp_pairs: int
    chunks: int = 1
    tcgen05_products: int = 0


@dataclasses.dataclass(frozen=True)
class LoopCost:
    """A main loop's instructions per pair, and the share of its ALU work under matrix products.

    `products` is how many of the multiply-adds that the search needs the machine code holds: 1, or
    some are missing.
    """

    products: float
    alu: float
    fma: float
    issued: float
    overlap: float | None  # None where it cannot be read from the code (sm_80, sm_100)


def parse(sass: str) -> Program:
    """Instructions and branches from `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = _LABEL.match(line.strip())
        if label:
            labels[label.group(1)] = len(instructions)
            continue
        found = _INSTRUCTION.match(line)
        if found:
            address, guard, name, operands = found.groups()
            split = tuple(part.strip() for part in operands.split(",")) if operands else ()
            instructions.append(Instruction(int(address, 16), guard or "", name, split))
    targets = {
        position: tuple(labels[name] for name in _TARGET.findall(" ".join(instruction.operands)))
        for position, instruction in enumerate(instructions)
        if instruction.opcode in {"BRA", "BRX"}
    }
    return Program(tuple(instructions), targets)


def count(instructions: Iterable[Instruction], opcodes: Iterable[str]) -> int:
    wanted = set(opcodes)
    return sum(instruction.opcode in wanted for instruction in instructions)


def count_spills(program: Program) -> int:
    """Loads from and stores to local memory: registers that did not fit."""
    return count(program.instructions, {"LDL", "STL"})


def find_loops(program: Program) -> list[Loop]:
    """Every backward branch with what it encloses, the shortest body per entry point."""
    shortest: dict[int, int] = {}
    for last, targets in sorted(program.targets.items()):
        for first in targets:
            body = program.instructions[first : last + 1]
            # Waits for a barrier spin out of line, behind the kernel's end: their branch back to
            # the main path spans unrelated code, and its body holds an unconditional exit.
            if body and not any(i.opcode in {"EXIT", "RET"} and not i.guard for i in body):
                shortest.setdefault(first, last)
    return [Loop(program, first, last) for first, last in sorted(shortest.items())]


def find_main_loops(program: Program) -> list[Loop]:
    """The innermost loops that compute scores: those with matrix instructions."""
    loops = [loop for loop in find_loops(program) if count(loop.body, MATRIX)]
    return [loop for loop in loops if not any(loop.encloses(other) for other in loops)]


def multiply_adds(instruction: Instruction, search: Search) -> int:
    """Products per warp that one instruction adds up; 0 for any but matrix instructions."""
    if instruction.opcode == "UTCHMMA":
        return search.tcgen05_products
    if instruction.opcode == "HGMMA":  # one for the four warps of a warpgroup
        rows, columns, depth = map(int, instruction.name.split(".")[1].split("x"))
        return rows * columns * depth // 4
    if instruction.opcode == "HMMA":  # 16816 is 16×8×16; 1688 is 16×8×8
        return 16 * 8 * int(instruction.name.split(".")[1][3:])
    return 0


def measure(loop: Loop, search: Search) -> LoopCost:
    """Instructions per pair of a main loop.

    Where the operands' columns are a loop of their own, `loop` is that inner loop: its instructions
    count once per chunk, those of the enclosing loop once.
    """
    needed = search.products * search.warp_pairs
    inside = sum(multiply_adds(i, search) for i in loop.body)
    around: tuple[Instruction, ...] = ()
    trips = 1.0
    if search.chunks > 1 and inside < needed and (outer := _enclosing(loop)):
        start, end = loop.first - outer.first, loop.last + 1 - outer.first
        around = outer.body[:start] + outer.body[end:]
        # Chunks that the compiler peeled off the inner loop are done around it.
        peeled = sum(multiply_adds(i, search) for i in around) * search.chunks / needed
        trips = search.chunks - peeled
    pairs = search.warp_pairs / 32
    found = trips * inside + sum(multiply_adds(i, search) for i in around)

    def per_pair(opcodes: Iterable[str]) -> float:
        return (trips * count(loop.body, opcodes) + count(around, opcodes)) / pairs

    return LoopCost(
        products=found / needed,
        alu=per_pair(ALU),
        fma=per_pair(FMA),
        issued=(trips * len(loop.body) + len(around)) / pairs,
        overlap=_overlap(loop),
    )


def _enclosing(loop: Loop) -> Loop | None:
    outer = [other for other in find_loops(loop.program) if other.encloses(loop)]
    return min(outer, key=lambda other: len(other.body), default=None)


def _overlap(loop: Loop) -> float | None:
    """The share of ALU instructions between a product's issue and the wait for it (HGMMA)."""
    if not loop.counts["HGMMA"]:
        return None
    flying: list[bool] = []  # one entry per batch not yet waited for; the last may still be open
    under = total = 0
    for _ in range(2):  # the second trip starts with what the first left in flight
        under = total = 0
        is_open = False
        for instruction in loop.body:
            if instruction.opcode == "HGMMA":
                if not is_open:
                    flying.append(True)
                is_open = "gsb0" not in instruction.operands
            elif (left := allowed_in_flight(instruction)) is not None:
                del flying[: max(0, len(flying) - left)]
            elif instruction.opcode in ALU:
                total += 1
                under += bool(flying)
    return under / max(1, total)


def allowed_in_flight(instruction: Instruction) -> int | None:
    """How many batches a `WARPGROUP.DEPBAR` leaves in flight; None for other instructions."""
    if not instruction.name.startswith("WARPGROUP.DEPBAR"):
        return None
    return int(instruction.operands[-1], 16)


def blocks_per_sm(code: MachineCode) -> int:
    """How many blocks of this kernel an SM holds at once: registers, shared memory, warps."""
    granules = -(-code.registers * 32 // REGISTER_ALLOCATION)
    by_registers = REGISTERS_PER_SM // (granules * REGISTER_ALLOCATION * code.warps)
    block = code.shared_bytes + SHARED_RESERVED_PER_BLOCK
    by_shared = SHARED_PER_SM[code.capability] // block
    return min(by_registers, by_shared, WARPS_PER_SM // code.warps, BLOCKS_PER_SM)
