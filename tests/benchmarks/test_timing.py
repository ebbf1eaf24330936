"""Timing: interleaved rounds, percentiles, cold caches."""

import time

import pytest
import torch

from benchmarks import timing


def test_summary_gives_percentiles():
    assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0, 6)


def test_candidates_take_turns():
    order = []
    timings = timing.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, least=3
    )
    # One round of warming up; a short run is timed right after another of the same.
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert timings["a"].runs == timings["b"].runs == 3


def test_rounds_go_on_until_the_time_is_over():
    timings = timing.interleaved({"a": lambda: None}, seconds=60.0, most=7)
    assert timings["a"].runs == 7


def test_the_slower_one_takes_longer():
    timings = timing.interleaved(
        {"short": lambda: torch.zeros(1), "long": lambda: time.sleep(0.05)}, seconds=0.0, least=3
    )
    assert timings["long"].p50 > timings["short"].p50 > 0


def test_cold_runs_evict_before_every_run(monkeypatch):
    evictions = []
    monkeypatch.setattr(timing, "_evictor", lambda device: lambda: evictions.append(device))
    timing.interleaved({"a": lambda: None, "b": lambda: None}, cold=True, seconds=0.0, least=2)
    assert evictions == ["cpu"] * 4


@pytest.mark.cuda
def test_cuda_times_are_those_of_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    timings = timing.interleaved(
        {"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}, device="cuda"
    )
    assert 3.0 < timings["four"].p50 / timings["one"].p50 < 5.0
