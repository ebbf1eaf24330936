"""`pytest benchmarks`: one benchmark per suite, case and candidate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suites import SUITES

pytest.importorskip("pytest_benchmark")


def test_every_suite_has_benchmarks_and_one_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-v"]
        + ["-k", "code_statistics and index_add_ and not compiled"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    deselected = int(done.stdout.split(" deselected")[0].split()[-1])
    timed = [module for module in SUITES.values() if ".scale." not in module]
    assert deselected >= 2 * len(timed)
