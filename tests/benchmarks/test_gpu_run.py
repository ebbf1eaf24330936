"""The one-command GPU run, with parts that need no GPU: limits, records, going on."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, runner, small
from benchmarks.suites import SUITES, load

WRITES_A_RESULT = """
import json, os, pathlib
print("hello")
pathlib.Path(os.environ["FASTVQ_RESULT"]).write_text(json.dumps({"answer": 42}))
"""
HANGS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
MACHINE = {"gpu": "Imaginary X1", "cpu": "some", "cores": 1}


def _part(name: str, code: str, limit: float = 20.0) -> runner.Part:
    return runner.Part(name, (sys.executable, "-S", "-c", code), limit)


def _run(folder: Path, *given: runner.Part, sources: str = "abc", **options: float) -> int:
    return runner.run(
        list(given),
        folder=folder,
        describe=lambda: {"machine": MACHINE, "sources": sources},
        **{"seconds": 100.0, **options},
    )


def _lines(folder: Path) -> list[dict]:
    return [json.loads(text) for path in folder.glob("*.jsonl") for text in path.open()]


def test_each_part_leaves_one_line(tmp_path: Path) -> None:
    absent = runner.Part("sanitizer", ("no-such-program",), 5.0, absent="it is not installed")
    failing = _part("failing", "print('why'); raise SystemExit(3)")
    assert _run(tmp_path, _part("good", WRITES_A_RESULT), absent, failing) == 1
    good, missing, failed = _lines(tmp_path)
    assert good["suite"] == "gpu"
    assert (good["part"], good["status"]) == ("good", "passed")
    assert good["result"] == {"answer": 42}
    assert good["output"] == "hello\n"
    assert good["machine"] == MACHINE
    assert (missing["status"], missing["output"]) == ("absent", "it is not installed")
    assert (failed["status"], failed["output"], failed["result"]) == ("failed", "why\n", None)


def test_goes_on_where_it_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = _part("first", "pass"), _part("second", "pass")
    # No time for the second part: it is not started, and the status says so.
    slow = _part("first", "import time; time.sleep(0.5)")
    assert _run(tmp_path, slow, second, seconds=runner.LEAST_SECONDS + 0.4) == 3
    assert "goes on with: second" in capsys.readouterr().out
    assert _run(tmp_path, first, second) == 0
    assert [line["part"] for line in _lines(tmp_path)] == ["first", "second"]
    # Nothing is left to do; other sources, or the asking by name, start again.
    assert _run(tmp_path, first, second) == 0
    assert len(_lines(tmp_path)) == 2
    assert _run(tmp_path, first, again=True) == 0
    assert _run(tmp_path, first, second, sources="changed") == 0
    assert len(_lines(tmp_path)) == 5


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    start = time.monotonic()
    assert _run(tmp_path, _part("hangs", HANGS, limit=1.0), _part("next", "pass")) == 1
    # The grandchild holds the output pipe: had it survived, the run would wait for ever.
    assert time.monotonic() - start < 20
    assert [line["status"] for line in _lines(tmp_path)] == ["timed out", "passed"]


def test_a_part_without_its_whole_time_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.1)
    assert _run(tmp_path, _part("long", "while True: pass", limit=60.0), seconds=0.5) == 3
    assert _lines(tmp_path) == []


def test_the_digest_follows_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "kernels" / "a.py"
    source.parent.mkdir()
    source.write_text("one")
    before = records.sources_digest(tmp_path)
    assert records.sources_digest(tmp_path) == before
    source.write_text("two")
    assert records.sources_digest(tmp_path) != before


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    assert command.main() == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "benchmarks.gpu: torch sees no CUDA device; nothing was run.\n"


def test_parts_have_their_own_names_and_limits() -> None:
    known = parts.all_parts()
    assert len({part.name for part in known}) == len(known)
    assert {"tests", "search-S1", "step-S5", "adversarial", "sanitizer-memcheck"} <= {
        part.name for part in known
    }
    assert all(0 < part.limit <= 240 for part in known)


def test_the_small_cases_run_without_a_gpu_too(capsys: pytest.CaptureFixture) -> None:
    small.main("cpu")
    assert capsys.readouterr().out == "every kernel ran\n"


def test_every_suite_with_gpu_cases_is_a_part() -> None:
    names = {part.name for part in parts.all_parts()}
    divided = {"nearest_code": "search-S5", "vector_quantize": "step-S5"}
    divided["code_statistics"] = "sums-S5"
    divided["masked_conv2d"], divided["gated_layer"] = "masked_conv2d-tf32", "gated_layer-bfloat16"
    for suite in SUITES:
        if load(suite).CASES["cuda"]:
            assert divided.get(suite, f"suite-{suite}") in names
    assert "tuning" in names


def test_tuning_changes_one_field_at_a_time() -> None:
    tuning = pytest.importorskip("benchmarks.gpu.tuning", reason="needs triton")
    shipped = tuning.choose_tiles(64, (9, 0))
    first, *others = tuning.neighbours(shipped)
    assert first == shipped
    assert len({*others}) == len(others) >= 6
    for tiles in others:
        assert "," not in tuning._difference(tiles, shipped)
        assert tuning._difference(tiles, shipped) != "shipped"
