"""Pages and plots are what the records generate; tables say who is faster, and by how much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import records
from benchmarks.report import __main__ as command
from benchmarks.report import gpu_tables, plots, tables
from benchmarks.static import regression

CASE = {"N": 32768, "K": 512, "D": 64}


def record(suite: str = "nearest_code", time: str = "2026-01-02T00:00:00+00:00", **changes) -> dict:
    medians = {"fastvq": 2.0, "FAISS IndexFlatL2": 5.0, "vector-quantize-pytorch, eval": 60.0}
    return {
        "time": time,
        "suite": suite,
        "case": CASE,
        "threads": 2,
        "cache": "warm",
        "unit": "ms",
        "timings": {who: {"p20": t, "p50": t, "p80": t, "runs": 5} for who, t in medians.items()},
        "peak_bytes": {"fastvq": 2**20, "FAISS IndexFlatL2": 3 * 2**20},
        "roofline": {"floor_ms": 1.0},
        "fraction": {"fastvq": 0.5},
        "machine": {"cpu": "Some CPU", "cores": 2, "isa": "avx2"},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "dirty": False,
        **changes,
    }


def test_pages_are_what_the_records_generate() -> None:
    assert [path.name for path in command.stale_pages()] == []


def test_plots_show_what_the_records_hold() -> None:
    assert command.stale_plots() == []


def test_a_changed_figure_makes_a_page_stale() -> None:
    text = command.PAGES[0].read_text(encoding="utf-8")
    block = text.index("<!-- benchmarks: cpu -->")
    digit = next(i for i in range(text.index("×)", block), 0, -1) if text[i].isdigit())
    forged = f"{text[:digit]}{9 - int(text[digit])}{text[digit + 1 :]}"
    assert command.generate(forged) == command.generate(text) != forged


def test_a_line_of_the_table() -> None:
    text = tables.cpu_table([record()])
    (row,) = [line for line in text.splitlines() if line.startswith("| nearest code")]
    assert "N=32768, K=512, D=64" in row
    assert "| 2.0 | 5.0 (2.5×)<br>FAISS IndexFlatL2 | 60.0 (30×) | 50 % | 1.0 / 3.0 |" in row
    assert "`fastvq bench nearest_code --case N=32768,K=512,D=64`" in row
    assert "Some CPU, 2 cores, avx2; 2 threads" in text
    assert "2026-01-02" in text
    assert "commit 0123456789." in text
    assert "No rival was faster" in text


def test_a_lost_case_is_named_and_bold() -> None:
    lost = record(timings={"fastvq": {"p50": 2.0}, "plain torch": {"p50": 1.0}})
    text = tables.cpu_table([lost])
    assert "**1.0 (0.50×)**<br>plain torch" in text
    assert "| nearest_code | N=32768, K=512, D=64 | 2, warm | 2.0 | **1.0 (0.50×)** |" in text


def test_the_last_record_of_a_case_counts_and_a_red_one_removes_it() -> None:
    old, new = record(), record(time="2026-01-03T00:00:00+00:00", commit="new")
    assert tables.line("", old) is not None
    assert records.latest([old, new]) == [new]
    assert records.latest([old, {**new, "red": "wrong", "timings": {}}]) == []
    other = record(machine={"cpu": "Another"}, time="2025-01-01T00:00:00+00:00")
    assert records.latest([other, new]) == [new]
    # A dirty tree is said.
    assert "abc (dirty)" in tables.cpu_table([record(commit="abc", dirty=True)])


def test_a_gpu_run_is_shown_with_its_machine_and_date() -> None:
    case = {"case": {"N": 9}, "timings": {"fastvq": {"p50": 0.1}, "flash-kmeans": {"p50": 0.3}}}
    part = {
        "suite": "gpu",
        "part": "search-S1",
        "status": "passed",
        "time": "2026-05-06T00:00:00+00:00",
        "result": {"cases": [case]},
        "machine": {"gpu": "NVIDIA H200", "cuda": "12.9"},
        "versions": {"torch": "2.13.0", "triton": "3.6.0"},
        "commit": "0123456789ab",
    }
    baseline = regression.load()
    text = gpu_tables.gpu_table([part], baseline)
    assert "Measured on NVIDIA H200, 2026-05-06" in text
    assert "| N=9 | 0.10 | 0.30 (3.0×) | flash-kmeans |" in text
    assert "Measured on" not in gpu_tables.gpu_table([{**part, "status": "failed"}], baseline)


def test_the_prediction_covers_the_five_sizes_and_says_what_it_is() -> None:
    text = gpu_tables.gpu_table([], regression.load())
    assert text.startswith("**Predicted, not measured**")
    sizes = gpu_tables.sizes(regression.load())
    assert len(sizes) == 5
    assert all(one["floor_us"] < one["predicted_us"] < 10 * one["floor_us"] for one in sizes)


def test_plots_are_drawn_once_for_the_same_data(tmp_path: Path) -> None:
    curve = [record("search_scale", case={"along": "N", **CASE, "N": 4**power}) for power in (3, 4)]
    found = [record(), *curve]
    written = {path.name for path in plots.draw_all(found, regression.load(), tmp_path)}
    assert written == {"speed-cpu.svg", "scale-search.svg", "speed-gpu-predicted.svg"}
    assert plots.draw_all(found, regression.load(), tmp_path) == []
    shown = plots.data(found, regression.load())
    assert shown["scale-search.svg"][0] == ("ms against N", "fastvq", [64.0, 256.0], [2.0, 2.0])
    assert "ms against N" in (tmp_path / "scale-search.svg").read_text(encoding="utf-8")
    found[0]["timings"]["fastvq"]["p50"] = 3.0
    (redrawn,) = plots.draw_all(found, regression.load(), tmp_path)
    assert redrawn.name == "speed-cpu.svg"


def test_the_largest_problem_is_the_largest_with_a_time() -> None:
    found = [
        record("search_memory", case={"N": 16, "K": 256, "D": 4}),
        record(
            "search_memory",
            case={"N": 16, "K": 1024, "D": 4},
            timings={"fastvq": {"p50": 4.0}},
            peak_bytes={"fastvq": 5 * 2**20},
        ),
    ]
    lines = tables.largest_problems(
        [
            {**one, "peak_bytes": {**dict.fromkeys(one["timings"], 2**20), **one["peak_bytes"]}}
            for one in found
        ]
    ).splitlines()
    assert "| fastvq | 1024 | 5 | 4.0 |" in lines
    assert "| FAISS IndexFlatL2 | 256 | 3 | 5.0 |" in lines


def test_records_are_json_lines() -> None:
    for path in sorted(records.FOLDER.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            assert {"time", "suite", "machine", "commit", "dirty"} <= json.loads(text).keys()
