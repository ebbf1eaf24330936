"""`python -m benchmarks.record`: everything a CPU can say, then the tables and plots, in one go.

Suite by suite, each in a process of its own, in the order of importance: two threads, one thread,
cold caches. About a quarter of an hour on two quiet cores. Cut off, the same command goes on with
the cases that have no record yet of these sources on this machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from .suites import SUITES

_CHECKOUT = Path(__file__).parents[1]
_SCALE = ("search_scale", "step_scale", "search_memory", "processes")
_COLD = ("nearest_code", "code_statistics")
# Too many small cases, or of one thread by themselves.
_NOT_ON_ONE_THREAD = (*_SCALE, "quantizers")


def plan() -> list[tuple[str, ...]]:
    """The options of `python -m benchmarks` of every part, in order."""
    first = [name for name in SUITES if name not in _SCALE]
    return [
        *((name, "--threads", "2", "--seconds", "1") for name in first),
        *((name, "--threads", "2", "--seconds", "0.3") for name in _SCALE),
        *(
            (name, "--threads", "1", "--seconds", "0.5")
            for name in first
            if name not in _NOT_ON_ONE_THREAD
        ),
        *((name, "--threads", "2", "--seconds", "0.3", "--cold") for name in _COLD),
    ]


def main() -> int:
    """Exit status: 0; 1 where a check was red or a part failed; 3 where the time ran out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="of the whole call (15)")
    parser.add_argument("--again", action="store_true", help="record what is recorded, too")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    arguments = parser.parse_args()
    start = time.monotonic()
    failed = []
    for part in plan():
        if arguments.list:
            print("python -m benchmarks", *part)
            continue
        left = 60 * arguments.minutes - (time.monotonic() - start)
        if left <= 0:
            print("Time is up; the same command goes on.", flush=True)
            return 3
        print(f"== {' '.join(part)} ({left / 60:.1f} minutes left)", flush=True)
        resume = [] if arguments.again else ["--resume"]
        command = [sys.executable, "-m", "benchmarks", *part, *resume]
        began = time.monotonic()
        try:
            done = subprocess.run(command, cwd=_CHECKOUT, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            continue
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            failed.append(" ".join(part))
    if arguments.list:
        return 0
    subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=_CHECKOUT, check=True)
    if failed:
        print(f"red or failed: {'; '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
