"""Rejection by a classifier's probabilities."""

from __future__ import annotations

import pytest
import torch

from fastvq.sampling import draws_for, keep_best


def test_the_best_of_each_class_are_kept_best_first() -> None:
    labels = torch.tensor([2, 2, 0, 2, 0, 2, 0])
    own = torch.tensor([0.1, 0.9, 0.4, 0.9, 0.7, 0.3, 0.5])  # of the class asked for
    probabilities = torch.full((7, 3), 0.95)  # of others: they must not count
    probabilities[torch.arange(7), labels] = own
    assert keep_best(probabilities, labels, 0.5).tolist() == [1, 3, 4]
    assert keep_best(probabilities, labels, 0.01).tolist() == [1, 4]
    assert sorted(keep_best(probabilities, labels, 1.0).tolist()) == list(range(7))
    assert keep_best(probabilities[:0], labels[:0], 0.5).tolist() == []


@pytest.mark.parametrize("fraction", [1.0, 0.9, 2 / 3, 0.5, 0.3, 0.1, 0.07])
def test_as_many_are_drawn_as_leave_the_count(fraction: float) -> None:
    for count in (1, 2, 8, 10, 33):
        drawn = draws_for(count, fraction)
        kept = keep_best(torch.rand(drawn, 1), torch.zeros(drawn, dtype=torch.int64), fraction)
        assert len(kept) == count
        assert drawn - 1 < count / fraction


def test_refusals() -> None:
    probabilities, labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
            keep_best(probabilities, labels, fraction)
    with pytest.raises(ValueError, match=r"labels must be in 0 … 1.*from 0 to 2"):
        keep_best(probabilities, torch.tensor([0, 2, 1]), 0.5)
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2,\)"):
        keep_best(probabilities, labels[:2], 0.5)
    with pytest.raises(ValueError, match="must be numbers; got NaN"):
        keep_best(probabilities * torch.nan, labels, 0.5)
