"""What a suite is, and running one: prepare, check, time, record, print."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from . import records
from .timing import Timing, interleaved

SUITES = {
    "nearest_code": "benchmarks.ops.nearest_code",
    "vector_quantize": "benchmarks.ops.vector_quantize",
    "code_statistics": "benchmarks.ops.code_statistics",
    "masked_conv": "benchmarks.ops.masked_conv2d",
    "quantizers": "benchmarks.nn.quantizers",
    "gated_layer": "benchmarks.nn.gated_layer",
}


@dataclass(frozen=True)
class Context:
    """Where and how a run measures."""

    device: str = "cpu"
    threads: int = 2
    cold: bool = False
    seconds: float = 4.0


@dataclass
class Prepared:
    """One case, ready to be timed.

    `candidates` maps names to callables, the first being the one others are compared with;
    `absent` names those that cannot run and why; `notes` says of a candidate what its check found.
    """

    candidates: dict[str, Callable[[], object]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def rival(self, name: str, make: Callable[[], Callable[[], object]]) -> None:
        """Add a candidate that may not be there: `make` imports, prepares and checks it."""
        try:
            self.candidates[name] = make()
        except Exception as reason:  # whatever ails a rival, the report goes on and says so
            first_line = (str(reason).splitlines() or [""])[0]
            self.absent[name] = f"{type(reason).__name__}: {first_line}"


def load(name: str) -> ModuleType:
    return importlib.import_module(SUITES[name])


def run_suite(
    name: str, context: Context, *, quick: bool = False, record: bool = True
) -> list[dict[str, Any]]:
    """Measure every case of a suite that belongs to the device; returns the records."""
    suite = load(name)
    cases = suite.QUICK_CASES if quick else suite.CASES[context.device]
    results = []
    for case in cases:
        prepared: Prepared = suite.prepare(case, context)
        timings = interleaved(
            prepared.candidates,
            device=context.device,
            cold=context.cold,
            seconds=context.seconds,
        )
        result = {
            "suite": name,
            "case": case,
            "threads": context.threads,
            "cache": "cold" if context.cold else "warm",
            "unit": "ms",
            "timings": {who: timing._asdict() for who, timing in timings.items()},
            "notes": prepared.notes,
            "absent": prepared.absent,
            "machine": records.machine(context.device),
            "versions": records.versions(),
            **records.source(),
        }
        print(table(name, case, timings, prepared), flush=True)
        if record:
            records.append(result)
        results.append(result)
    return results


def table(suite: str, case: dict[str, Any], timings: dict[str, Timing], prepared: Prepared) -> str:
    """A case in a few lines of text: medians, and how they compare with the first candidate."""
    described = " ".join(f"{key}={value}" for key, value in case.items())
    lines = [f"{suite} {described}   (ms: median, 20–80 %; ratio to the first)"]
    first = next(iter(timings.values())).p50
    for name, timing in timings.items():
        lines.append(
            f"  {name:<34} {timing.p50:>10.3f}  {timing.p20:>9.3f}–{timing.p80:<9.3f}"
            f" {timing.p50 / first:>8.2f}×  {prepared.notes.get(name, '')}".rstrip()
        )
    lines += [f"  {name:<34}     absent: {why}" for name, why in prepared.absent.items()]
    return "\n".join(lines)
