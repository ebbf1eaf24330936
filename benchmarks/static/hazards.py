"""What the matrix unit has in flight, followed along every path through a Hopper kernel.

`HGMMA` returns before its product is done; `WARPGROUP.DEPBAR` waits. Until then nothing may touch
the accumulator, nor write the registers that the product reads. Afterwards the accumulator must be
read before it is overwritten: otherwise scores were computed and thrown away. The compilers have
broken both rules (see `kernels/triton/nearest_code_hopper.py`), so the machine code is checked.
"""

from __future__ import annotations

import dataclasses
import re

from benchmarks.static.sass import Instruction, Program, allowed_in_flight

_REGISTER = re.compile(r"[-~!|]*R(\d+)\b")
_STORES = ("ST", "RED", "ATOM", "UTMA", "BAR", "SYNCS", "BRA", "EXIT", "R2UR", "ISETP", "FSETP")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Products that one wait completes: registers they write, and registers they read."""

    written: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()

    def __or__(self, other: Batch) -> Batch:
        return Batch(self.written | other.written, self.read | other.read)


@dataclasses.dataclass(frozen=True)
class State:
    """At one point of one path: committed batches, the open one, registers finished but unread."""

    flying: tuple[Batch, ...] = ()
    open: Batch = Batch()
    unread: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, order=True)
class Hazard:
    address: int
    rule: str
    instruction: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.address:#x}: {self.instruction}"


def find_dummies(program: Program) -> list[Instruction]:
    """Products whose result goes nowhere: what the assembler leaves of an HGMMA that it deleted."""
    return [
        instruction
        for instruction in program.instructions
        if instruction.opcode == "HGMMA" and instruction.operands[0].startswith("RZ")
    ]


def find_hazards(program: Program, most_states: int = 20000) -> list[Hazard]:
    """Every break of the rules above that some path reaches, in the order of the code.

    Raises:
        RuntimeError: the paths carry more than `most_states` distinct states.
    """
    found: set[Hazard] = set()
    seen: set[tuple[int, State]] = set()
    waiting = [(0, State())]
    meetings = {target for targets in program.targets.values() for target in targets}
    while waiting:
        position, state = waiting.pop()
        while position < len(program.instructions):
            if position in meetings:
                if (position, state) in seen:
                    break
                seen.add((position, state))
                if len(seen) > most_states:
                    raise RuntimeError(f"find_hazards: more than {most_states} states to follow")
            instruction = program.instructions[position]
            state, broken = _step(state, instruction)
            found.update(Hazard(instruction.address, rule, str(instruction)) for rule in broken)
            waiting.extend((target, state) for target in program.targets.get(position, ()))
            if _ends_path(instruction):
                break
            position += 1
    return sorted(found)


def _ends_path(instruction: Instruction) -> bool:
    # A branch can also be conditional by its first operand: `BRA.U !UP0, …`.
    conditional = instruction.guard or (instruction.opcode == "BRA" and instruction.operands[1:])
    return not conditional and instruction.opcode in {"BRA", "BRX", "EXIT", "RET"}


def _step(state: State, instruction: Instruction) -> tuple[State, list[str]]:
    """The state behind an instruction, and the rules that it breaks."""
    left = allowed_in_flight(instruction)
    if left is not None:
        done = state.flying[: len(state.flying) - left] if left else state.flying
        finished = frozenset[int]().union(*(batch.written for batch in done))
        kept = state.flying[len(done) :]
        # A chain of products on one accumulator is not done while its last is in flight.
        still = frozenset[int]().union(state.open.written, *(batch.written for batch in kept))
        return dataclasses.replace(state, flying=kept, unread=state.unread | finished - still), []
    if instruction.opcode == "HGMMA":
        return _issue(state, instruction)

    busy = state.open
    for batch in state.flying:
        busy = busy | batch
    if not busy.written and not state.unread:
        return state, []
    written, read = registers(instruction)
    broken = []
    if (written | read) & busy.written:
        broken.append("accumulator touched in flight")
    if written & busy.read:
        broken.append("operand overwritten in flight")
    unread = state.unread - read
    if written & unread:
        broken.append("accumulator overwritten unread")
        unread = unread - written
    return dataclasses.replace(state, unread=unread), broken


def _issue(state: State, instruction: Instruction) -> tuple[State, list[str]]:
    shape = instruction.name.split(".")[1]
    width = int(shape.split("x")[1]) // (4 if instruction.name.endswith(".F16") else 2)
    destination, first, *rest = instruction.operands
    broken = []
    start = _REGISTER.match(destination)
    written = frozenset(range(int(start[1]), int(start[1]) + width)) if start else frozenset()
    operand = _REGISTER.match(first)
    read = frozenset(range(int(operand[1]), int(operand[1]) + 4)) if operand else frozenset()
    overwrites = "RZ" in rest or "!UPT" in rest
    if overwrites and written & state.unread:
        broken.append("accumulator overwritten unread")
    if overwrites and any(written & batch.written for batch in (*state.flying, state.open)):
        broken.append("accumulator overwritten in flight")
    batch = state.open | Batch(written, read)
    unread = state.unread - written
    if "gsb0" in instruction.operands:
        return State((*state.flying, batch), Batch(), unread), broken
    return State(state.flying, batch, unread), broken


def registers(instruction: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    """Registers that an instruction writes and reads, wide operands included."""
    written: set[int] = set()
    read: set[int] = set()
    stores = instruction.opcode.startswith(_STORES)
    for position, operand in enumerate(instruction.operands):
        is_result = position == 0 and not stores
        width = _width(instruction, position) if not operand.startswith("[") else 1
        for number in re.findall(r"\bR(\d+)\b", operand):
            (written if is_result else read).update(range(int(number), int(number) + width))
    if instruction.guard:
        # It may not execute: its result then does not replace what was there.
        read |= written
    return frozenset(written), frozenset(read)


def _width(instruction: Instruction, position: int) -> int:
    """How many registers the operand at this position spans."""
    parts = instruction.name.split(".")
    if parts[0] in {"LDS", "LDG", "LDL", "LD", "STS", "STG", "STL", "ST"}:
        return 4 if "128" in parts else 2 if "64" in parts else 1
    if parts[0] == "LDSM":
        return int(parts[-1]) if parts[-1].isdigit() else 1
    if parts[0] == "CS2R" or (parts[0] == "IMAD" and "WIDE" in parts and position in (0, 3)):
        return 2
    return 1
