"""Curves: what varies varies alone, and several processes share one result."""

from __future__ import annotations

import pytest

from benchmarks import suites
from benchmarks.isolated import Together
from benchmarks.scale import memory, processes, search, step

CONTEXT = suites.Context(threads=1, seconds=0.0)


def test_one_size_varies_along_a_curve() -> None:
    for axis in search.BASE:
        curve = [case for case in search.CASES["cpu"] if case["along"] == axis]
        sizes = [case[axis] for case in curve]
        assert len(set(sizes)) == len(sizes) >= 6
        rest = {tuple(case[other] for other in search.BASE if other != axis) for case in curve}
        assert len(rest) == 1
    assert [case["B"] for case in step.CASES["cpu"]] == [1, 2, 4, 8, 16, 32]


def test_a_rival_beyond_the_budget_is_named() -> None:
    case = {"N": 16384, "K": 65536, "D": 2}
    prepared = memory.prepare(case, CONTEXT)
    prepared.keep({"torch.cdist + argmin"})
    prepared.build()
    assert "8 GiB, the budget is 2" in prepared.absent["torch.cdist + argmin"]


def test_two_processes_share_their_sums() -> None:
    prepared = processes.prepare(processes.QUICK_CASES[0], CONTEXT)
    try:
        ours = prepared.candidates["fastvq"]
        assert isinstance(ours, Together)
        assert ours.result().shape == (64, 17)
        assert ours.time_ms() > 0
    finally:
        prepared.close()


def test_wrong_shared_sums_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = processes.reference.code_statistics

    def wrong(*arguments):
        counts, sums = right(*arguments)
        return counts + 1, sums

    monkeypatch.setattr(processes.reference, "code_statistics", wrong)
    with pytest.raises(suites.WrongResult, match="the shared sums"):
        processes.prepare(processes.QUICK_CASES[0], CONTEXT)
