"""The memory of a sampling request: what is foretold, and a request that cannot fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling.priors import build_prior

from fastvq.sampling import memory

_PEAK = """
import torch
from fastvq.models import PixelCNN
from fastvq.sampling.memory import bytes_per_sample
torch.set_num_threads(1)

def peak():  # of this program alone: getrusage's would begin with the parent's
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

model = PixelCNN(64, 32, 4, kernel_size=5, attention_every=2)
model.sample((24, 24), 1, seed=0)
before = peak()
model.sample((24, 24), 256, seed=0, given=torch.zeros(24, 24, dtype=torch.int64))
print(peak() - before, 256 * bytes_per_sample(model._plan(), 24, 24))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells the peak there")
def test_foretells_what_sampling_takes() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    peak, foretold = map(int, done.stdout.split())
    # The allocator keeps freed blocks, and temporaries of two layers may meet: a factor of 2.
    assert foretold / 2 < peak < 2 * foretold


def test_a_request_that_cannot_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_prior("attention")
    each = memory.bytes_per_sample(model._plan(), 4, 6)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * each + 1)
    assert model.sample((4, 6), 3).shape == (3, 4, 6)
    with pytest.raises(RuntimeError, match=r"n must be at most 3 for maps of 4 × 6 .*got 4.*first"):
        model.sample((4, 6), 4)


def test_available_memory_of_this_machine() -> None:
    free = memory.available_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    assert memory.available_bytes(torch.device("meta")) is None
