"""The committed figures of the GPU kernels: what counts as worse."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.static import regression

ROW = {
    **{"kernel": "search D8", "sm": 90, "registers": 100, "blocks": 2, "shared": 1000},
    **{"spills": 0, "hazards": 0, "matrix": 8, "alu": 1.6, "fma": 0.4, "issued": 2.8},
    "us": {"1×2×8": [100.0, 50.0]},
}


def test_the_same_figures_are_no_regression() -> None:
    assert regression.regressions([ROW], [ROW]) == []
    small = {**ROW, "alu": 1.6 * 1.04, "registers": 110, "us": {"1×2×8": [104.0, 50.0]}}
    assert regression.regressions([small], [ROW]) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"alu": 1.7}, "alu 1.7, was 1.6"),
        ({"issued": 3.0}, "issued 3, was 2.8"),
        ({"registers": 120}, "registers 120, was 100"),
        ({"spills": 1}, "spills 1, was 0"),
        ({"hazards": 2}, "hazards 2, was 0"),
        ({"blocks": 1}, "blocks 1, was 2"),
        ({"matrix": 4}, "matrix 4, was 8"),
        ({"us": {"1×2×8": [106.0, 50.0]}}, "1×2×8 predicted 106 µs, was 100"),
    ],
)
def test_a_worse_figure_is_a_regression(changed: dict, line: str) -> None:
    assert regression.regressions([{**ROW, **changed}], [ROW]) == [f"search D8, sm_90: {line}"]


def test_a_kernel_that_comes_or_goes_is_said() -> None:
    assert regression.regressions([ROW], []) == ["search D8, sm_90 has no committed row"]
    assert regression.regressions([], [ROW]) == ["search D8, sm_90 is committed and gone"]


def test_one_version_is_written_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    regression.save("3.9.0", [ROW], path)
    regression.save("3.6.0", [ROW, ROW], path)
    regression.save("3.9.0", [], path)
    assert regression.load(path) == {"3.6.0": [ROW, ROW], "3.9.0": []}
