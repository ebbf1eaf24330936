"""Runs parts one by one under time limits, and remembers which are done.

A part is a command that may write a JSON object to the file it finds in FASTVQ_RESULT. Each part
leaves one line in benchmarks/results/, with the digest of the sources it ran on: the parts that
have a line for these sources and this GPU are not run again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records

RESULT_VARIABLE = "FASTVQ_RESULT"
SUITE = "gpu"
_CHECKOUT = Path(__file__).parents[2]
# Below this a part is not started: importing torch and compiling take that long.
LEAST_SECONDS = 15.0
_TAIL = 4000


@dataclasses.dataclass(frozen=True)
class Part:
    """A command, how long it may take, and why it cannot run here, if it cannot."""

    name: str
    command: tuple[str, ...]
    limit: float
    absent: str | None = None


def run(
    parts: list[Part],
    *,
    seconds: float,
    again: bool = False,
    folder: Path = records.FOLDER,
    describe: Callable[[], dict[str, Any]] | None = None,
) -> int:
    """Run the parts that have no line yet (all of them if `again`); returns the exit status."""
    described = describe() if describe is not None else _describe()
    recorded = {} if again else _recorded(folder, described)
    statuses = dict(recorded)
    start = time.monotonic()
    for part in parts:
        if part.name in recorded:
            print(f"{part.name}: {recorded[part.name]} before, on these sources", flush=True)
            continue
        left = seconds - (time.monotonic() - start)
        if part.absent is None and left < min(LEAST_SECONDS, part.limit):
            break
        line = _run_part(part, min(part.limit, left))
        if line["status"] == "timed out" and left < part.limit:
            # The call's time ran out, not the part's: it has not had its chance.
            print(f"{part.name}: cut off after {line['seconds']:.0f} s", flush=True)
            break
        records.append({"suite": SUITE, "part": part.name, **line, **described}, folder)
        statuses[part.name] = line["status"]
        print(f"{part.name}: {line['status']} in {line['seconds']:.0f} s", flush=True)
        if line["status"] not in ("passed", "absent"):
            print(line["output"], flush=True)
    waiting = [part.name for part in parts if part.name not in statuses]
    if any(statuses.get(part.name) in ("failed", "timed out") for part in parts):
        return 1
    if waiting:
        print(f"Time is up; the same command goes on with: {', '.join(waiting)}", flush=True)
        return 3
    return 0


def _run_part(part: Part, limit: float) -> dict[str, Any]:
    """status, seconds, what the part wrote as its result, and the end of what it printed."""
    if part.absent is not None:
        return {"status": "absent", "seconds": 0.0, "result": None, "output": part.absent}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # A session of its own, so that a part that hangs is ended with all it started.
        process = subprocess.Popen(
            part.command,
            cwd=_CHECKOUT,
            env={**os.environ, RESULT_VARIABLE: str(result)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
            status = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = "timed out"
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
    seconds = time.monotonic() - start
    return {"status": status, "seconds": seconds, "result": found, "output": output[-_TAIL:]}


def write_result(result: dict[str, Any]) -> None:
    """Called by a part: its numbers, for the record. The last call counts."""
    path = os.environ.get(RESULT_VARIABLE)
    if path is None:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        Path(path).write_text(json.dumps(result), encoding="utf-8")


def _describe() -> dict[str, Any]:
    return {
        "machine": records.machine("cuda"),
        "versions": records.versions(),
        **records.source(),
        "sources": records.sources_digest(),
    }


def _recorded(folder: Path, described: dict[str, Any]) -> dict[str, str]:
    """Status of each part that has a line for these sources on this machine."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            same = line.get("suite") == SUITE and line.get("sources") == described["sources"]
            if same and line["machine"] == described["machine"]:
                found[line["part"]] = line["status"]
    return found
