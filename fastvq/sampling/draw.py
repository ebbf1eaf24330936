"""Choosing a code from logits and noise, and telling which choices rounding could have flipped.

A code is drawn by the Gumbel-max rule: with z = logits / temperature and S the codes that top-k
and then top-p keep,

    code = argmax over S of z_k + g_k,      g_k standard Gumbel noise,

which has exactly the probabilities softmax(z over S) (Maddison et al. 2014, arXiv:1411.0030).
Temperature 0 is greedy: argmax of the logits. Ties go to the lower code.

Why every method gives the same codes
-------------------------------------
Two ways of computing the same logits in float32 (one whole forward, an incremental one, another
batch size or device) differ by rounding, and a draw is a comparison, which the smallest
difference can flip. So a *canonical* draw is defined: the one from the logits that the plain
forward gives in float64 for that sample alone. Each method either proves that its own draw is the
canonical one, or takes the canonical one:

* Let every method's logits be within ε (`logit_tolerance`) of the canonical ones; then z is
  within δ = ε / temperature.
* If the winner's score leads by at least 2δ over all others, then canonically
  s*_winner ≥ s_winner − δ ≥ s_other + δ ≥ s*_other: the canonical winner is the same.
* top-k and top-p: `_bounds` gives a set that is kept canonically for certain and a set outside
  which nothing is kept, from the same δ. If the winner over the larger set leads by 2δ and is
  itself in the smaller set, it is the canonical winner, because the kept set lies between them.
* Otherwise the draw is *doubtful*, and the caller settles it: it computes the canonical logits
  and calls `exact_draw` on them; at once (`loop`), or when the map is there (`proof`).

Hence each method's draw equals the canonical draw at every position, by induction over the
positions (equal earlier codes give equal canonical logits), whichever draws it found doubtful.
About 2δ of all draws are doubtful, a fraction of one per map.

What remains: the canonical logits themselves are float64 sums, whose order may differ between
devices. A draw closer than that (about 1e-13) could still differ; no test will ever see one.
And ε is a stated figure, not a proven bound: a bound for every network would have to follow the
worst case of every sum through every layer, and would doubt nearly every draw. Whoever settles a
doubtful draw also compares the two logits, or the map's other codes, and warns where they differ by
more than ε. `verify` needs no ε at all: it compares every code with its canonical draw (`proof`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# 1024 units in the last place of float32. Rounding adds up like a random walk over layers and
# terms; in networks of 15 to 20 layers the observed difference is near 1e-6 of the largest logit.
TOLERANCE = 2.0**-14


class Draw(NamedTuple):
    """`codes` (n,) int64, and `doubtful` (n,) bool: which of them must be settled."""

    codes: Tensor
    doubtful: Tensor


class Filter(NamedTuple):
    """How logits become a distribution: temperature first, then top-k, then top-p."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def logit_tolerance(logits: Tensor) -> Tensor:
    """ε for each row, (n, 1): `TOLERANCE` times the largest |logit|, and at least `TOLERANCE`."""
    return TOLERANCE * logits.detach().abs().amax(dim=1, keepdim=True).double().clamp(min=1.0)


def kept_codes(logits: Tensor, rule: Filter) -> Tensor:
    """Which codes top-k and then top-p keep of logits already divided by the temperature.

    top-k keeps the k largest; top-p keeps, of those, the shortest run of the most probable whose
    probabilities (renormalised after top-k) reach p, and always at least one. Ties: lower code
    first.

    Args:
        logits: (n, K) float64.
    Returns:
        (n, K) bool.
    """
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if rule.top_k is not None:
        kept[:, rule.top_k :] = False
    if rule.top_p is not None and rule.top_p < 1:
        weights = ordered.masked_fill(~kept, -torch.inf).softmax(dim=1)
        before = weights.cumsum(dim=1).roll(1, dims=1)
        before[:, 0] = 0
        kept &= before < rule.top_p
    return torch.zeros_like(kept).scatter_(1, order, kept)


def exact_draw(logits: Tensor, noise: Tensor | None, rule: Filter) -> Tensor:
    """The draw taken at face value: no tolerance.

    Args:
        logits: (n, K).
        noise: (n, K) float64 Gumbel noise; None exactly when the temperature is 0.
    Returns:
        (n,) int64.
    """
    if rule.temperature == 0 or noise is None:
        return logits.double().argmax(dim=1)
    scaled = logits.double() / rule.temperature
    return (scaled + noise).masked_fill(~kept_codes(scaled, rule), -torch.inf).argmax(dim=1)


def draw(logits: Tensor, noise: Tensor | None, rule: Filter) -> Draw:
    """`exact_draw` for rows whose draw no error within the tolerance can change; doubt for others.

    Rows with a logit that is not finite are doubtful.

    Args:
        logits: (n, K).
        noise: (n, K) float64 Gumbel noise; None exactly when the temperature is 0.
    Returns:
        (codes (n,), doubtful (n,)); the code of a doubtful row is to be replaced.
    """
    delta = logit_tolerance(logits)
    scores = logits.double()
    certain = None
    if rule.temperature != 0 and noise is not None:
        delta = delta / rule.temperature
        scaled = scores / rule.temperature
        scores = scaled + noise
        if rule.top_k is not None or (rule.top_p is not None and rule.top_p < 1):
            certain, possible = _bounds(scaled, delta, rule)
            scores = scores.masked_fill(~possible, -torch.inf)
    if scores.shape[1] == 1:
        codes = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        return Draw(codes, ~scores[:, 0].isfinite())
    best, index = scores.topk(2, dim=1)
    codes = index[:, 0]
    safe = (best[:, 0] - best[:, 1] >= 2 * delta[:, 0]) & delta[:, 0].isfinite()
    if certain is not None:
        safe &= certain.gather(1, codes[:, None])[:, 0]
    return Draw(codes, ~safe)


def _bounds(scaled: Tensor, delta: Tensor, rule: Filter) -> tuple[Tensor, Tensor]:
    """Codes kept whatever an error of `delta` per element of `scaled` does, and codes that may be.

    Both sets are runs from the top of the sorted order. Order statistics move by at most δ, so
    top-k certainly keeps what lies more than 2δ above the (k+1)-th, and cannot keep what lies more
    than 2δ below the k-th. For top-p, the probability before a code is bounded from both sides by
    counting the codes within 2δ of it in or out; a ratio of sums of exp moves by at most e^{±2δ}.

    Args:
        scaled: (n, K) float64, logits / temperature.
        delta: (n, 1).
    Returns:
        (certain, possible), (n, K) bool each, with certain ⊆ kept ⊆ possible.
    """
    ordered, order = scaled.sort(dim=1, descending=True)
    num_codes = scaled.shape[1]
    delta = delta + 1e-12  # the float64 arithmetic of this function and of `kept_codes`
    certain = torch.ones_like(ordered, dtype=torch.bool)
    possible = torch.ones_like(certain)
    if rule.top_k is not None and rule.top_k < num_codes:
        certain = ordered > ordered[:, rule.top_k, None] + 2 * delta
        possible = ordered >= ordered[:, rule.top_k - 1, None] - 2 * delta
    if rule.top_p is not None and rule.top_p < 1:
        weights = (ordered - ordered[:, :1]).exp()
        # sums[:, m] = the sum of the m largest weights
        sums = torch.nn.functional.pad(weights.cumsum(dim=1), (1, 0))
        num_certain = certain.sum(dim=1, keepdim=True)
        num_possible = possible.sum(dim=1, keepdim=True)
        falling = -ordered  # ascending, as searchsorted wants
        maybe_before = torch.searchsorted(falling, falling + 2 * delta, right=True)
        surely_before = torch.searchsorted(falling, falling - 2 * delta)
        most = sums.gather(1, maybe_before.minimum(num_possible)) - weights
        least = sums.gather(1, surely_before.minimum(num_certain))
        spread = (2 * delta).exp()
        certain &= most * spread < rule.top_p * sums.gather(1, num_certain)
        possible &= least <= rule.top_p * spread * sums.gather(1, num_possible)
    unsorted = torch.zeros_like(certain)
    return unsorted.scatter(1, order, certain), unsorted.scatter(1, order, possible)
