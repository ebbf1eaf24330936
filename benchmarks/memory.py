"""The most memory that one call holds beyond what was held before it; needs no torch on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Peak bytes of `run()` above the start: resident memory on a CPU, allocated on a GPU.

    None where the system does not say (a CPU without Linux's resettable high-water mark).
    """
    return _peak_on_cuda(run) if device == "cuda" else _peak_on_cpu(run)


def _peak_on_cuda(run: Callable[[], object]) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(run: Callable[[], object]) -> int | None:
    try:
        # Freed memory that the allocator keeps would hide what the call takes again.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5", encoding="ascii")
        before = _kilobytes("VmRSS")
        run()
        return 1024 * max(0, _kilobytes("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _kilobytes(name: str) -> int:
    status = _STATUS.read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0])
