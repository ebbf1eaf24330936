"""Times of several callables on one machine, run in turn so that they meet the same weather."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .isolated import TimesItself

# Between cold runs this much memory is written: more than the last-level caches of the machines
# in use (32 MiB on the CPUs, 50 MiB of L2 on an H100 or H200).
_CACHE_BYTES = 256 * 2**20
# Keeps a GPU busy while the host queues the run behind it, so that events see the device alone.
_HEAD_START_CYCLES = 400_000
# OpenMP's idle threads spin for some milliseconds after a parallel region: on a machine with few
# cores they would take one from whoever runs next.
_REST_SECONDS = 0.01
# A run shorter than this is timed right after another of the same, which fills the caches again.
_SHORT_MS = 20.0
# A run longer than this is timed this often, whatever the others need.
_LONG_MS = 1000.0
_LONG_RUNS = 3


class Timing(NamedTuple):
    """Percentiles of one callable's times, in milliseconds, over `runs` runs."""

    p20: float
    p50: float
    p80: float
    runs: int


def interleaved(
    callables: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    cold: bool = False,
    seconds: float = 4.0,
    least: int = 5,
    most: int = 200,
) -> dict[str, Timing]:
    """Times of the callables, each timed once per round after one round of warming up.

    Rounds go on until `seconds` have passed, at least `least` and at most `most` of them; a
    callable of more than a second sits out after three.

    Args:
        device: "cpu" times on the wall clock; "cuda" times on the device, between events.
        cold: evict the caches before every run; otherwise a short run follows one of the same.
    """
    evict = _evictor(device) if cold else None
    for run in callables.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in callables}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for name, run in callables.items():
            if len(times[name]) >= _LONG_RUNS and times[name][-1] > _LONG_MS:
                continue
            if device == "cpu":
                time.sleep(_REST_SECONDS)
            if evict is not None:
                evict()
            elif times[name][-1:] < [_SHORT_MS]:
                run()
            times[name].append(_once(run, device, cold))
    return {name: summary(values) for name, values in times.items()}


def quickest(candidates: dict[str, Callable[[], object]], device: str = "cpu") -> str:
    """The name of the candidate with the least time in two runs, after one to warm up."""
    found = interleaved(candidates, device=device, seconds=0.0, least=2)
    return min(found, key=lambda name: found[name].p20)


def summary(times: list[float]) -> Timing:
    """The percentiles of a list of times, by linear interpolation."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(p20, p50, p80, len(times))


def _once(run: Callable[[], object], device: str, cold: bool) -> float:
    if isinstance(run, TimesItself):
        return run.time_ms(cold)
    return _time_on_cuda(run) if device == "cuda" else _time_on_cpu(run)


def _time_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _time_on_cuda(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _evictor(device: str) -> Callable[[], object]:
    buffer = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)
    return lambda: buffer.add_(1)
