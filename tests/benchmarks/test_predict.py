"""The time model against the one measurement that it was set by."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.static.predict import H200_SIZES, Size, predict
from benchmarks.static.sass import LoopCost


def test_the_plain_tile_and_argmax_kernel_is_predicted_within_a_tenth() -> None:
    # Its instruction counts (Triton 3.6, sm_90), and flash-kmeans' published 3.155 ms on an H200.
    cost = LoopCost(products=1, alu=4.89, fma=1.2, issued=7.27, overlap=0.0)
    size = H200_SIZES[4]
    result = predict(size, cost, depth=128, tail=150 / 16, rescored_codes=0, block_rows=128)
    assert 0.9 * 3155 < result.total_us < 3155
    assert 1300 < result.floor_us < 1400


def test_overlap_hides_the_shorter_pipe() -> None:
    size = H200_SIZES[1]
    cost = LoopCost(products=1, alu=3.0, fma=1.0, issued=5.0, overlap=None)
    apart, together = (predict(size, cost, 256, 0, 0, 256, overlap) for overlap in (0.0, 1.0))
    assert together.main_loop_us < apart.main_loop_us
    assert together.main_loop_us == pytest.approx(1.1 * together.floor_us)


def test_small_blocks_wait_for_their_codes() -> None:
    size = Size("", rows=65536, codes=65536, channels=128, target_us=0)
    cost = LoopCost(products=1, alu=0, fma=0, issued=0, overlap=1.0)
    small, large = (predict(size, cost, 128, 0, 0, rows) for rows in (16, 4096))
    # Every block of rows reads all codes, 16 bits per channel, at 5.5 TB/s.
    assert small.main_loop_us == pytest.approx(65536 / 16 * 65536 * 128 * 2 / 5.5e6)
    assert large.main_loop_us < small.main_loop_us / 5
