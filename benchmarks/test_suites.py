"""The suites' quick cases under pytest-benchmark: `pytest benchmarks`, with its options to compare.

    pytest benchmarks --benchmark-autosave                      # keep this run
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%
    pytest benchmarks -k "code_statistics and fastvq"

One benchmark per suite, case and candidate, grouped by case. A rival that runs in a process of its
own is timed through a pipe here, which adds about 0.05 ms; `python -m benchmarks` does not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

import torch

from benchmarks.suites import SUITES, Context, Prepared, load

# Curves take the same candidates to other sizes.
_TIMED = [name for name, module in SUITES.items() if not module.startswith("benchmarks.scale")]
_CONTEXT = Context(threads=torch.get_num_threads(), seconds=0.0)


@functools.cache
def _prepared(suite: str, number: int) -> Prepared:
    prepared: Prepared = load(suite).prepare(load(suite).QUICK_CASES[number], _CONTEXT)
    return prepared


def _candidates() -> Iterator[Any]:
    for suite in _TIMED:
        for number, case in enumerate(load(suite).QUICK_CASES):
            described = " ".join(f"{key}={value}" for key, value in case.items())
            for who in _prepared(suite, number).names:
                name = f"{suite} {described}: {who}"
                yield pytest.param(suite, number, who, id=name.replace(" ", "_"))


@pytest.mark.parametrize(("suite", "number", "who"), [*_candidates()])
def test_candidate(suite: str, number: int, who: str, benchmark: Any) -> None:
    prepared = _prepared(suite, number)
    prepared.build()
    if who in prepared.absent:
        pytest.skip(f"{who}: {prepared.absent[who]}")
    benchmark.group = f"{suite} {load(suite).QUICK_CASES[number]}"
    benchmark.extra_info.update(note=prepared.notes.get(who, ""), candidate=who)
    benchmark(prepared.candidates[who])


@pytest.fixture(scope="module", autouse=True)
def _workers() -> Iterator[None]:
    yield
    for suite in _TIMED:
        for number in range(len(load(suite).QUICK_CASES)):
            _prepared(suite, number).close()
