"""The conformal threshold: its false-alarm rate counted exactly, and the p-values that match it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from fastvq.train.false_alarms import (
    conformal_p_values,
    conformal_threshold,
    least_held_in,
    needed_rank,
)

RATES = (0.5, 0.3, 0.25, 0.1, 0.07, 0.05, 0.01)


def flagged_in_turn(scores: np.ndarray, rate: float) -> int:
    """How many of n + 1 scores are flagged when each in turn is new and the others are held in.

    Exchangeability makes each of these equally likely to be what happened, so that the count over
    n + 1 is the exact probability of a false alarm.
    """
    return sum(
        bool(scores[new] > conformal_threshold(np.delete(scores, new), rate))
        for new in range(len(scores))
    )


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", [1, 2, 3, 9, 19, 20, 39, 99, 100, 137])
def test_false_alarms_are_exactly_as_many_as_the_rule_allows(count: int, rate: float) -> None:
    exact = Fraction(str(rate))
    if count < 1 / exact - 1:
        with pytest.raises(ValueError, match="held-in items"):
            conformal_threshold(np.zeros(count), rate)
        return
    scores = np.random.default_rng(count).permutation(count + 1).astype(float)
    assert flagged_in_turn(scores, rate) == math.floor((count + 1) * exact)


@pytest.mark.parametrize("rate", [0.25, 0.1])
def test_ties_raise_no_more_alarms(rate: float) -> None:
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(0, 6, 41).astype(float)
        assert flagged_in_turn(scores, rate) <= math.floor(41 * Fraction(str(rate)))


def test_the_threshold_is_the_least_that_keeps_the_rate() -> None:
    scores = np.arange(100.0)
    threshold = conformal_threshold(scores[:-1], 0.05)
    assert threshold == 94.0  # k = ⌈100 · 0.95⌉ = 95, of 0, 1, …
    assert sum(scores > threshold) == 5
    assert sum(scores > np.sort(scores)[93]) == 6


@pytest.mark.parametrize("rate", RATES)
def test_the_least_number_of_held_in_items_is_the_least(rate: float) -> None:
    least = least_held_in(rate)
    assert least == max(math.ceil(1 / Fraction(str(rate)) - 1), 1)
    assert needed_rank(least, rate) <= least
    assert least == 1 or needed_rank(least - 1, rate) > least - 1


def test_p_values_by_their_definition() -> None:
    rng = np.random.default_rng(0)
    held_in = rng.integers(0, 9, 30).astype(float)
    scores = np.concatenate([rng.integers(-1, 11, 50), held_in[:3], [np.inf]])
    direct = [(1 + sum(held_in >= score)) / 31 for score in scores]
    assert conformal_p_values(held_in, scores).tolist() == direct


@pytest.mark.parametrize("rate", RATES[:-1])
def test_a_score_is_above_the_threshold_where_its_p_value_is_at_most_the_rate(rate: float) -> None:
    for count in (19, 20, 33):
        held_in = np.random.default_rng(count).integers(0, 15, count).astype(float)
        scores = np.arange(-1.0, 16.0, 0.5)
        above = scores > conformal_threshold(held_in, rate)
        within = conformal_p_values(held_in, scores) <= rate * (1 + 1e-12)
        assert above.tolist() == within.tolist()


def test_errors() -> None:
    for rate in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="false_alarm_rate must lie between 0 and 1"):
            conformal_threshold(np.zeros(9), rate)
    with pytest.raises(ValueError, match=r"needs at least 19 held-in items .* got 18"):
        conformal_threshold(np.zeros(18), 0.05)
    with pytest.raises(ValueError, match="1 NaN"):
        conformal_threshold(np.array([0.0, math.nan]), 0.5)
    with pytest.raises(ValueError, match="1 NaN"):
        conformal_p_values(np.zeros(3), np.array([math.nan]))
