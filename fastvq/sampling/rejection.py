"""Rejection by a classifier: of drawn samples, those it is surest are of the class asked for.

Razavi et al. 2019, arXiv:1906.00446, section 3.3: it trades diversity for fidelity. The classifier
that `fastvq` trains is `fastvq.models.Classifier`; any other's probabilities will do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A product like 0.1 · 80 may fall short of the whole number it stands for.
_ROUNDING = 1e-9


def draws_for(count: int, fraction: float) -> int:
    """How many samples of a class must be drawn for `keep_best` to keep `count` of them."""
    _check_fraction(fraction)
    return math.ceil(count / fraction - _ROUNDING)


def keep_best(probabilities: Tensor, labels: Tensor, fraction: float) -> Tensor:
    """The samples whose probability of the class they were asked to be is highest.

        keep n where rank of probabilities[n, labels[n]] among {m : labels[m] = labels[n]} is
        below max(1, ⌊fraction · #{m : labels[m] = labels[n]}⌋)

    Args:
        probabilities: (N, classes) float, or anything that grows with them, as log-probabilities.
        labels: (N,) int64, the class each sample was drawn for.
        fraction: of each class's samples, in (0, 1].
    Returns:
        (M,) int64 indices: classes in the order of their first samples, the best first in each,
        equal ones in the order they were drawn.
    Raises:
        ValueError: shapes disagree, a label is no class, a probability is NaN, or the fraction is
            outside (0, 1].
    """
    _check_fraction(fraction)
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"keep_best: probabilities must be (N, classes) and labels (N,); got "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}."
        )
    if labels.numel() == 0:
        return labels.new_zeros(0)
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"keep_best: labels must be in 0 … {probabilities.shape[1] - 1}, the classifier's "
            f"classes; got values from {int(labels.min())} to {int(labels.max())}."
        )
    scores = probabilities.gather(1, labels[:, None])[:, 0]
    if scores.isnan().any():
        raise ValueError("keep_best: probabilities must be numbers; got NaN.")
    kept = []
    for label in dict.fromkeys(labels.tolist()):
        own = (labels == label).nonzero()[:, 0]
        count = max(1, math.floor(fraction * len(own) + _ROUNDING))
        kept.append(own[scores[own].argsort(descending=True, stable=True)[:count]])
    return torch.cat(kept)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"keep_best: fraction must be in (0, 1]; got {fraction}.")
