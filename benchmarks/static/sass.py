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
from collections.abc import Iterable, Sequence

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
class LoopCost:
    """Instructions per pair in a main loop, and the share of ALU work under matrix products."""

    pairs: float  # scores per thread and trip
    alu: float
    fma: float
    issued: float
    overlap: float | None  # None where the matrix instruction is synchronous (sm_80)


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


def multiply_adds(instruction: Instruction) -> int:
    """Products that one HMMA (per warp) or HGMMA (per warpgroup) adds up; 0 for other opcodes."""
    if instruction.opcode == "HGMMA":
        rows, columns, depth = map(int, instruction.name.split(".")[1].split("x"))
        return rows * columns * depth
    if instruction.opcode == "HMMA":
        shape = instruction.name.split(".")[1]  # 16816 is 16×8×16; 1688 is 16×8×8
        return 16 * 8 * int(shape[3:])
    return 0


def pairs_per_thread(body: Sequence[Instruction], depth: int) -> float:
    """Scores per thread in this code.

    Args:
        depth: products per score, the padded width of a row times the number of product terms.
    """
    warps = {"HMMA": 1, "HGMMA": 4}
    products = sum(multiply_adds(i) / warps.get(i.opcode, 1) for i in body) / 32
    return products / depth + sum(_scores_read(i) for i in body)


def _scores_read(instruction: Instruction) -> float:
    # tcgen05 products name their shape in a register, so on sm_100 the scores are counted where
    # they are read: LDTM.xN gives N registers to each of 32 lanes, or of 16 (16dp).
    found = re.search(r"^LDTM\.(\w*?)\.?x(\d+)", instruction.name)
    if not found:
        return 0
    return int(found[2]) / (2 if found[1].startswith("16dp") else 1)


def measure(loop: Loop, depth: int) -> LoopCost:
    """Instructions per pair of one trip through a main loop."""
    pairs = pairs_per_thread(loop.body, depth)
    if not pairs:
        raise ValueError("measure: the loop computes no scores; its matrix products are gone")
    return LoopCost(
        pairs=pairs,
        alu=count(loop.body, ALU) / pairs,
        fma=count(loop.body, FMA) / pairs,
        issued=len(loop.body) / pairs,
        overlap=_overlap(loop),
    )


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
