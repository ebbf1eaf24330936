"""How many lanes per clock and multiprocessor the instructions of the search's fold get.

The model behind the search's tiles assumes 64 for minima, maxima, selections and logic, 128 for
float32 additions, and 16 for conversions to float64; nobody has published them for every GPU. Each
kernel runs 32 warps per multiprocessor through a loop of one instruction, timed with the GPU's own
clock, and the machine code is read to see that the loop holds what was meant.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.static import sass

WARPS = 32
# Per lane: independent chains, so that no instruction waits for the one before it.
CHAINS = 4
ROUNDS = 8
ITERATIONS = 512

# Three steps over a, b, c that no algebra shortens, and the opcodes that count as that instruction.
STEPS: dict[str, tuple[tuple[str, str, str], tuple[str, ...]]] = {
    "fp32 max": (("max.f32 a, a, b;", "min.f32 b, b, c;", "max.f32 c, c, a;"), ("FMNMX",)),
    "int32 max": (
        ("max.s32 a, a, b;", "min.s32 b, b, c;", "max.s32 c, c, a;"),
        ("IMNMX", "VIMNMX"),
    ),
    "int32 max of three": (
        (
            "max.s32 t, a, b; max.s32 a, t, c;",
            "min.s32 t, b, c; min.s32 b, t, a;",
            "max.s32 t, c, a; max.s32 c, t, b;",
        ),
        ("VIMNMX3",),
    ),
    "fp16x2 max": (
        ("max.f16x2 a, a, b;", "min.f16x2 b, b, c;", "max.f16x2 c, c, a;"),
        ("HMNMX2", "VHMNMX"),
    ),
    "logic of three": (
        ("lop3.b32 a, a, b, c, 0x96;", "lop3.b32 b, b, c, a, 0xe8;", "lop3.b32 c, c, a, b, 0x6a;"),
        ("LOP3",),
    ),
    "fp32 add": (("add.f32 a, a, b;", "add.f32 b, b, c;", "add.f32 c, c, a;"), ("FADD",)),
    "fp32 multiply-add": (
        ("fma.rn.f32 a, a, b, c;", "fma.rn.f32 b, b, c, a;", "fma.rn.f32 c, c, a, b;"),
        ("FFMA",),
    ),
}


@triton.jit
def _clock(value):
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64; // $1", "=l,r", [value], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _rate_kernel(values_ptr, cycles_ptr, iterations, ASM: tl.constexpr, LANES: tl.constexpr):
    # A program owns one multiprocessor: as many warps as it schedules. Nothing but the clock and
    # the last values is written.
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    a, b, c = lane, lane * 3 + 1, lane * 7 + 2
    start = _clock(tl.program_id(0))
    for _ in range(iterations):
        a, b, c = tl.inline_asm_elementwise(
            ASM,
            "=r,=r,=r,r,r,r",
            [a, b, c],
            dtype=(tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    end = _clock(tl.program_id(0))
    tl.store(values_ptr + lane, a ^ b ^ c)
    tl.store(cycles_ptr + tl.program_id(0), end - start)


def assembly(steps: tuple[str, str, str]) -> str:
    """`ROUNDS` rounds of the steps on registers a, b, c that start as $3, $4, $5."""
    head = "{ .reg .b32 a, b, c, t; mov.b32 a, $3; mov.b32 b, $4; mov.b32 c, $5;"
    tail = "mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c; }"
    return " ".join([head, *steps * ROUNDS, tail])


def loop_counts(cubin: bytes) -> dict[str, int]:
    """How often each opcode occurs in the longest loop of a kernel."""
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [disassembler, "-c", file.name], capture_output=True, text=True, check=True
        )
    loops = sass.find_loops(sass.parse(done.stdout))
    return dict(max(loops, key=lambda loop: len(loop.body)).counts)


def measure() -> dict[str, Any]:
    """Lanes per clock and multiprocessor of each instruction, and what its loop holds besides."""
    properties = torch.cuda.get_device_properties(0)
    programs, lanes = properties.multi_processor_count, WARPS * 32 * CHAINS
    values = torch.empty(programs * lanes, dtype=torch.int32, device="cuda")
    cycles = torch.empty(programs, dtype=torch.int64, device="cuda")
    found = {}
    for name, (steps, opcodes) in STEPS.items():
        for _ in range(3):
            compiled = _rate_kernel[(programs,)](
                values, cycles, ITERATIONS, ASM=assembly(steps), LANES=lanes, num_warps=WARPS
            )
        counts = loop_counts(compiled.asm["cubin"])
        executed = sum(counts.get(opcode, 0) for opcode in opcodes) * WARPS * 32 * ITERATIONS
        found[name] = {
            "lanes_per_clock": executed / cycles.double().median().item(),
            "instructions": {o: counts[o] for o in opcodes if o in counts},
            "of": sum(counts.values()),
        }
        print(f"{name}: {found[name]}", flush=True)
    return {"gpu": properties.name, "rates": found}
