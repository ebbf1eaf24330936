"""Filters against brute force, the draw's probabilities, and the proof that doubt is complete."""

from __future__ import annotations

import math

import pytest
import torch

from fastvq.sampling import draw as draw_module
from fastvq.sampling.draw import Filter, draw, exact_draw, kept_codes
from fastvq.sampling.noise import gumbel_noise

RULES = [
    Filter(),
    Filter(0.0),
    Filter(0.5, 3),
    Filter(1.0, None, 0.6),
    Filter(2.0, 5, 0.5),
    Filter(1.0, 1),
    Filter(1.0, 8, 1.0),
    Filter(1.0, None, 1e-9),
]


def _kept_by_hand(logits: list[float], top_k: int | None, top_p: float | None) -> list[bool]:
    order = sorted(range(len(logits)), key=lambda k: (-logits[k], k))[: top_k or len(logits)]
    weights = {k: math.exp(logits[k]) for k in order}
    kept, mass = [], 0.0
    for k in order:
        if top_p is not None and kept and mass >= top_p * sum(weights.values()):
            break
        kept.append(k)
        mass += weights[k]
    return [k in kept for k in range(len(logits))]


@pytest.mark.parametrize("rule", RULES)
def test_filters_equal_brute_force(rule: Filter) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 8, dtype=torch.float64)
    logits[:5] = logits[:5].round()  # ties
    logits[5] = 0
    kept = kept_codes(logits, rule)
    for row, got in zip(logits.tolist(), kept.tolist()):
        assert got == _kept_by_hand(row, rule.top_k, rule.top_p)


@pytest.mark.parametrize("rule", [r for r in RULES if r.temperature])
def test_frequencies_are_the_filtered_probabilities(rule: Filter) -> None:
    torch.manual_seed(1)
    n, num_codes = 20000, 8
    logits = torch.randn(1, num_codes, dtype=torch.float64)
    noise = gumbel_noise(7, torch.arange(n), 0, torch.zeros(1, dtype=torch.int64), num_codes)[0]
    got = exact_draw(logits.expand(n, -1), noise, rule).bincount(minlength=num_codes)
    scaled = logits / rule.temperature
    p = scaled.masked_fill(~kept_codes(scaled, rule), -torch.inf).softmax(dim=1)[0]
    # a count of n Bernoulli trials: five standard deviations √(n·p·(1 − p))
    assert ((got - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert exact_draw(logits, None, Filter(0.0)).tolist() == [1, 0]
    assert draw(logits, None, Filter(0.0)).doubtful.tolist() == [True, True]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tolerance", [2.0**-14, 0.02])
def test_a_draw_without_doubt_is_the_canonical_one(
    rule: Filter, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits moved by up to the tolerance in the worst directions: equal, or in doubt."""
    monkeypatch.setattr(draw_module, "TOLERANCE", tolerance)
    torch.manual_seed(2)
    n, num_codes = 4000, 12
    canonical = torch.randn(n, num_codes, dtype=torch.float64) * 0.8
    canonical[: n // 4] = (canonical[: n // 4] * 20).round() / 20  # many ties and near ties
    noise = gumbel_noise(3, torch.arange(n), 0, torch.zeros(1, dtype=torch.int64), num_codes)[0]
    given_noise = noise if rule.temperature else None
    expected = exact_draw(canonical, given_noise, rule)
    flipped, doubted = 0, 0
    for trial in range(8):
        push = torch.randn(n, num_codes, dtype=torch.float64).sign()
        if trial == 0:  # pull the winner down, push all others up
            push = torch.ones_like(push).scatter_(1, expected[:, None], -1)
        if trial == 1:
            push = -torch.ones_like(push).scatter_(1, expected[:, None], -1)
        # |logits| may be below 1, where the tolerance is the bare figure
        moved = canonical + push * tolerance * (1 - 1e-9)
        codes, doubtful = draw(moved, given_noise, rule)
        assert (doubtful | (codes == expected)).all()
        flipped += int((exact_draw(moved, given_noise, rule) != expected).sum())
        doubted += int(doubtful.sum())
    assert flipped > 0  # the disturbance does move face-value draws
    if tolerance < 0.01 and rule.temperature:
        # Gap of the two best scores: density at most 1 at zero, so a share 2δ is in doubt, plus a
        # quarter of rows built as ties at a filter's edge.
        assert doubted / (8 * n) < 0.3


def test_doubt_is_rare_on_generic_logits() -> None:
    torch.manual_seed(0)
    n, num_codes = 20000, 64
    logits = torch.randn(n, num_codes)
    noise = gumbel_noise(1, torch.arange(n), 0, torch.zeros(1, dtype=torch.int64), num_codes)[0]
    for rule in (Filter(), Filter(1.0, 10), Filter(1.0, None, 0.9), Filter(1.0, 10, 0.9)):
        # Gumbel-max scores: the gap of the best two is exponential with rate 1, so below 2δ with
        # probability under 2δ, δ = ε ≤ 2⁻¹⁴·5; a filter's edge adds no more than that again.
        bound = 2 * 2 * 5 * 2.0**-14
        allowed = n * bound + 5 * math.sqrt(n * bound)
        assert int(draw(logits, noise, rule).doubtful.sum()) <= allowed


def test_rows_that_are_not_finite_are_doubtful() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for rule in RULES:
            logits = torch.randn(2, 12)
            logits[0, 3] = bad
            noise = torch.zeros(2, 12, dtype=torch.float64) if rule.temperature else None
            assert draw(logits, noise, rule).doubtful[0]


def test_one_code_is_never_in_doubt() -> None:
    for rule in RULES[:1] + RULES[3:4]:
        codes, doubtful = draw(torch.zeros(3, 1), torch.zeros(3, 1).double(), rule)
        assert codes.tolist() == [0, 0, 0]
        assert not doubtful.any()
