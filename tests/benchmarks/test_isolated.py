"""Candidates in processes of their own, and the peak memory of a call."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import memory, timing
from benchmarks.isolated import Isolated

ARRAYS = {
    "x": np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32),
    "codebook": np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32),
}
NEAREST = ((ARRAYS["x"][:, None] - ARRAYS["codebook"]) ** 2).sum(-1).argmin(1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's high-water mark")


def test_a_worker_computes_and_times_itself():
    pytest.importorskip("sklearn")
    run = Isolated("benchmarks.rivals.search:scikit_learn", ARRAYS, 1)
    try:
        assert np.array_equal(run.result(), NEAREST)
        timings = timing.interleaved({"a": run, "b": lambda: None}, seconds=0.0, least=3)
        assert timings["a"].p50 > timings["b"].p50 > 0
        assert run.time_ms(cold=True) > 0
        assert run.peak_bytes() is None or run.peak_bytes() >= 0
    finally:
        run.close()


def test_a_worker_without_its_library_says_so():
    with pytest.raises(RuntimeError, match=r"AttributeError: .*no_such_library"):
        Isolated("benchmarks.rivals.search:no_such_library", ARRAYS, 1)


@linux
def test_the_peak_is_what_a_call_holds_at_most():
    def run() -> np.ndarray:
        first = np.ones(16 * 2**20, dtype=np.uint8)
        second = np.ones(8 * 2**20, dtype=np.uint8)
        del first, second
        return np.ones(4 * 2**20, dtype=np.uint8)

    run()
    peak = memory.peak_bytes(run)
    assert peak is not None
    assert 24 * 2**20 <= peak < 26 * 2**20
