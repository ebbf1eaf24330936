"""Running a suite: prepare, check, time, measure memory, record, print."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from . import memory, records, roofline
from .isolated import TimesItself
from .suites import Context, Prepared, Work, WrongResult, load
from .timing import Timing, interleaved


def run_suite(
    name: str,
    context: Context,
    *,
    cases: Iterable[dict[str, Any]] | None = None,
    record: bool = True,
) -> list[dict[str, Any]]:
    """Measure cases of a suite (default: all that belong to the device); returns the records.

    A case whose check fails gives a record with `red`, the reason, and no times.
    """
    chosen = load(name).CASES[context.device] if cases is None else cases
    results = []
    for case in chosen:
        result = run_case(name, case, context)
        print(table(result), flush=True)
        if record:
            records.append(result)
        results.append(result)
    return results


def run_case(name: str, case: dict[str, Any], context: Context) -> dict[str, Any]:
    """The record of one case."""
    return {**time_case(name, case, context), **_circumstances(context.device)}


def time_case(name: str, case: dict[str, Any], context: Context) -> dict[str, Any]:
    """The record of one case, without what all cases of a run share."""
    result: dict[str, Any] = {**_kind(name, case, context), "unit": "ms"}
    try:
        prepared: Prepared = load(name).prepare(case, context)
    except WrongResult as reason:
        return {**result, "red": str(reason), "timings": {}}
    try:
        return {**result, **measure(prepared, context)}
    finally:
        prepared.close()


def _kind(name: str, case: dict[str, Any], context: Context) -> dict[str, Any]:
    return {
        "suite": name,
        "case": case,
        "device": context.device,
        "threads": context.threads,
        "cache": "cold" if context.cold else "warm",
    }


def waiting(name: str, cases: list[dict[str, Any]], context: Context) -> list[dict[str, Any]]:
    """The cases without a record of these sources on this machine."""
    sources, machine = records.sources_digest(), records.machine(context.device)
    done = {
        records.key(record)
        for record in records.read()
        if record.get("sources") == sources and record["machine"] == machine and "case" in record
    }
    return [case for case in cases if records.key(_kind(name, case, context)) not in done]


def measure(prepared: Prepared, context: Context) -> dict[str, Any]:
    """Build the rivals, then times, peak memory and fractions of the roofline of all."""
    prepared.build()
    timings = interleaved(
        prepared.candidates, device=context.device, cold=context.cold, seconds=context.seconds
    )
    peaks = {who: _peak(run, context.device) for who, run in prepared.candidates.items()}
    return {
        "timings": {who: timing._asdict() for who, timing in timings.items()},
        "peak_bytes": peaks,
        **_against_ceiling(prepared.work, timings, context),
        "notes": prepared.notes,
        "absent": prepared.absent,
    }


def _peak(run: Callable[[], object], device: str) -> int | None:
    return run.peak_bytes() if isinstance(run, TimesItself) else memory.peak_bytes(run, device)


def _against_ceiling(
    work: Work | None, timings: dict[str, Timing], context: Context
) -> dict[str, Any]:
    if work is None:
        return {}
    ceiling = roofline.measure(context.device, work.dtype, context.threads)
    floor = ceiling.floor_ms(work)
    return {
        "work": work._asdict(),
        "roofline": {**ceiling._asdict(), "floor_ms": floor},
        "fraction": {who: floor / timing.p50 for who, timing in timings.items()},
    }


def _circumstances(device: str) -> dict[str, Any]:
    return {
        "machine": records.machine(device),
        "load": os.getloadavg()[0],
        "versions": records.versions(),
        **records.source(),
        "sources": records.sources_digest(),
    }


def table(result: dict[str, Any]) -> str:
    """A record in a few lines of text: medians, and how they compare with the first candidate."""
    described = " ".join(f"{key}={value}" for key, value in result["case"].items())
    head = f"{result['suite']} {described}   ({result['threads']} threads, {result['cache']} cache"
    if "red" in result:
        return f"{head})\n  RED, no times: {result['red']}"
    lines = [f"{head}; ms: median, 20–80 %; ratio to the first; peak MiB; of the roofline)"]
    first = next(iter(result["timings"].values()))["p50"]
    for name, timing in result["timings"].items():
        lines.append(
            f"  {name:<34} {timing['p50']:>10.3f}  {timing['p20']:>9.3f}–{timing['p80']:<9.3f}"
            f" {timing['p50'] / first:>8.2f}×  {_mebibytes(result['peak_bytes'][name]):>8}"
            f"  {_percent(result.get('fraction', {}).get(name)):>6}"
            f"  {result['notes'].get(name, '')}".rstrip()
        )
    lines += [f"  {name:<34}     absent: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines)


def _mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"
