"""The recording run: every suite is in its plan, and what is recorded is not measured again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import record, records, running, suites


def test_every_suite_is_recorded_at_two_threads_and_most_at_one() -> None:
    parts = record.plan()
    assert len(set(parts)) == len(parts)
    for name in suites.SUITES:
        assert any(part[:3] == (name, "--threads", "2") for part in parts)
    on_one = {part[0] for part in parts if part[2] == "1"}
    assert {"nearest_code", "vector_quantize", "code_statistics", "stage1_step"} <= on_one
    assert [part[0] for part in parts if "--cold" in part] == ["nearest_code", "code_statistics"]


def test_recorded_cases_are_left_out(tmp_path, monkeypatch) -> None:
    context = suites.Context(threads=1)
    cases = suites.load("nearest_code").CASES["cpu"][:2]
    done = {
        "suite": "nearest_code",
        "case": cases[0],
        "threads": 1,
        "cache": "warm",
        "machine": records.machine("cpu"),
        "sources": records.sources_digest(),
    }
    for changes in ({}, {"sources": "other"}, {"threads": 2}, {"cache": "cold"}):
        path = records.append(
            {**done, "case": cases[1] if changes else cases[0], **changes}, tmp_path
        )
    assert len(path.read_text().splitlines()) == 4
    found = records.read(tmp_path)
    monkeypatch.setattr(records, "read", lambda: found)
    assert running.waiting("nearest_code", cases, context) == [cases[1]]
    assert json.loads(path.read_text().splitlines()[0])["suite"] == "nearest_code"


def test_a_failed_part_is_named_and_the_rest_goes_on(monkeypatch, capsys) -> None:
    ran = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, int("code_statistics" in command))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["record"])
    assert record.main() == 1
    assert ran[-1] == ["benchmarks.report"]
    assert len(ran) == len(record.plan()) + 1
    assert all("--resume" in command for command in ran[:-1])
    assert "red or failed: code_statistics" in capsys.readouterr().out


def test_the_time_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["record", "--minutes", "0"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("no time was left"))
    assert record.main() == 3
