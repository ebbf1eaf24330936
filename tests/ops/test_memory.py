"""The memory promise: a training step allocates nothing of size N×K, and little of its own.

The step runs in a process of its own, on whose address space every allocation counts: torch's, the
C++ kernels' and the threads'. Between two probes the kernel's high-water mark of resident memory is
reset, so that the difference is what the step needed at most.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark"
)

_PROGRAM = """
import sys, torch
from fastvq import ops
torch.set_num_threads(2)
N, K, D = map(int, sys.argv[2:])

def high_water():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def step(x, codebook):
    out = ops.vector_quantize(x, codebook, gradient="rotation")
    (out.quantized.mean() + out.commitment.mean() + out.codebook.mean()).backward()
    return out, ops.code_statistics(x.detach(), out.indices, K)

def residual(x, codebook):
    return ops.residual_quantize(x, codebook[None].expand(4, -1, -1))

run = {"step": step, "residual": residual}[sys.argv[1]]
run(torch.randn(64, D, requires_grad=True), torch.randn(8, D, requires_grad=True))  # warm
x, codebook = torch.randn(N, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")
start = high_water()
kept = run(x, codebook)
print(high_water() - start)
"""


def _peak(which: str, n: int, k: int, d: int) -> int:
    """Bytes that a call needed at most beside x and the codebook, results included."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, which, *map(str, (n, k, d))],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


# Stacks of the threads, the allocator's slack, lazily loaded code.
_SLACK = 6 * 2**20


def test_training_step():
    n, k, d = 20_000, 4000, 128
    rows, codes, per_row = 4 * n * d, 4 * k * d, 8 * n
    # Results: quantized and grad_x; grad_codebook and the sums; an index and two losses per row.
    # mean().backward() makes one more gradient of quantized's size.
    results = 3 * rows + 2 * codes + 2 * per_row
    peak = _peak("step", n, k, d)
    # Scratch: at most one input, one codebook, and some numbers per row.
    assert results - _SLACK < peak < results + rows + codes + 3 * per_row + _SLACK
    assert peak < n * k  # a byte a pair


def test_residual_quantize():
    n, k, d = 20_000, 2000, 128
    rows, codes, per_row = 4 * n * d, 4 * k * d, 8 * n
    # Results: quantized and four indices a row; the expanded codebooks are made contiguous.
    results = rows + 4 * per_row + 4 * codes
    peak = _peak("residual", n, k, d)
    # Scratch: the residual, one codebook made ready for the search, and some numbers per row.
    assert results + rows - _SLACK < peak < results + rows + 3 * codes + 3 * per_row + _SLACK
