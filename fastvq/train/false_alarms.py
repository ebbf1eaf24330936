"""A threshold that keeps a stated false-alarm rate, from the scores of held-in items.

Split conformal prediction: nothing is assumed of the scores but that held-in and new normal items
are exchangeable. What the scores are is in anomaly.py; scores here are the higher the odder.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def conformal_threshold(held_in: Scores, rate: float) -> float:
    """The least threshold t such that "score > t" is a false alarm at most at `rate`.

        t = the k-th smallest of the n held-in scores,   k = ⌈(n + 1)(1 − rate)⌉

    A new score, exchangeable with the held-in ones, lies above t with probability at most
    1 − k/(n + 1) ≤ rate, exactly 1 − k/(n + 1) where scores never tie.

    Args:
        held_in: (n,) scores of items that neither the models nor any part of the score were
            fitted on.
        rate: in (0, 1).
    Raises:
        ValueError: the rate is out of range, a score is NaN, or n < 1/rate − 1, where no finite
            threshold keeps the rate.
    Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 2.2; the
    quantile as in Lei et al. 2018, arXiv:1604.04173, section 2.2.
    """
    check_rate(rate)
    _check_scores("held_in", held_in)
    count = len(held_in)
    rank = needed_rank(count, rate)
    if rank > count:
        raise ValueError(
            f"detect: a false-alarm rate of {rate:g} needs at least {least_held_in(rate)} held-in "
            f"items to set the threshold by; got {count}. Give more, or a higher rate."
        )
    return float(np.partition(held_in, rank - 1)[rank - 1])


def conformal_p_values(held_in: Scores, scores: Scores) -> Scores:
    """How often a normal item would score as high: (m,), in 1/(n + 1) … 1.

        p = (1 + number of held-in scores ≥ score) / (n + 1)

    For a normal item P(p ≤ rate) ≤ rate at every rate, and p ≤ rate exactly where the score lies
    above `conformal_threshold(held_in, rate)`.

    Raises:
        ValueError: a score is NaN.
    """
    _check_scores("held_in", held_in)
    _check_scores("scores", scores)
    below = np.searchsorted(np.sort(held_in), scores, side="left").astype(np.float64)
    p_values: Scores = (1.0 + len(held_in) - below) / (len(held_in) + 1.0)
    return p_values


def needed_rank(count: int, rate: float) -> int:
    """k = ⌈(n + 1)(1 − rate)⌉, unmoved by the rounding of `rate` to a float."""
    return count + 1 - math.floor((count + 1) * rate * (1.0 + 1e-12))


def least_held_in(rate: float) -> int:
    """The least n for which `needed_rank` is at most n."""
    return max(math.ceil(1.0 / (rate * (1.0 + 1e-12))) - 1, 1)


def check_rate(rate: float) -> None:
    """Refuse a rate outside (0, 1)."""
    if not 0.0 < rate < 1.0:
        raise ValueError(f"detect: false_alarm_rate must lie between 0 and 1; got {rate:g}.")


def _check_scores(name: str, scores: Scores) -> None:
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(
            f"detect: {name} must be (n,) numbers; got {scores.shape} with "
            f"{int(np.isnan(scores).sum())} NaN."
        )
