"""The named rules of moving averages, each against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq.nn.codebook import Codebook
from fastvq.nn.ema import RULES

U = 2.0**-24
K, D, N, STEPS = 5, 3, 40, 6
DECAY, EPS = 0.9, 0.05


def _laplace(counts: Tensor) -> Tensor:
    total = counts.sum()
    return total * (counts + EPS) / (total + K * EPS)


class _Formula:
    """The three rules as their users write them, in float64."""

    def __init__(self, rule: str, codes: Tensor) -> None:
        self.rule, self.step = rule, 0
        self.counts = torch.zeros(K) if rule == "debiased" else torch.ones(K)
        self.sums = torch.zeros(K, D) if rule == "debiased" else codes.clone()
        self.counts, self.sums = self.counts.double(), self.sums.double()

    def update(self, n: Tensor, s: Tensor) -> Tensor:
        self.step += 1
        self.counts = DECAY * self.counts + (1 - DECAY) * n
        self.sums = DECAY * self.sums + (1 - DECAY) * s
        if self.rule == "smoothed_divisor":
            return self.sums / _laplace(self.counts)[:, None]
        if self.rule == "smoothed_counts":
            self.counts = _laplace(self.counts)
            return self.sums / self.counts[:, None]
        debias = 1 - DECAY**self.step
        return self.sums / debias / _laplace(self.counts / debias)[:, None]


@pytest.mark.parametrize("rule", RULES)
def test_rule_follows_its_formula(rule: str) -> None:
    torch.manual_seed(0)
    module = Codebook(
        K, D, decay=DECAY, eps=EPS, ema_rule=rule, kmeans_init=False, revive_below=0.0
    )
    module.embed.copy_(torch.randn(1, K, D))
    if rule != "debiased":
        module.embed_avg.copy_(module.embed)
    formula = _Formula(rule, module.embed[0].double())
    for step in range(STEPS):
        x = torch.randn(N, D)
        index = module(x).indices
        hits = torch.nn.functional.one_hot(index, K).double()
        codes = formula.update(hits.sum(dim=0), hits.T @ x.double())
        # Per step: u of the largest value met, for a sum, two products, an addition and what a
        # smoothed count adds to them (a sum of K and four more). Debiasing multiplies by at most
        # 1/(1−γ), for it divides by 1−γᵗ.
        bound_n = (step + 1) * (K + 8) * U * N
        bound_m = bound_n * x.abs().max()
        assert (module.cluster_size[0] - formula.counts).abs().max() <= bound_n
        assert (module.embed_avg[0] - formula.sums).abs().max() <= bound_m
        least = (formula.counts + EPS * (1 - DECAY)).min() * 0.9
        bound_e = (bound_m + bound_n * codes.abs().max()) / least + (K + 8) * U * codes.abs().max()
        assert (module.embed[0] - codes).abs().max() <= bound_e
    assert bound_e < 0.01


def test_rules_differ() -> None:
    results = []
    for rule in RULES:
        torch.manual_seed(0)
        module = Codebook(K, D, eps=EPS, ema_rule=rule, kmeans_init=False, revive_below=0.0)
        for _ in range(3):
            module(torch.randn(N, D))
        results.append(module.embed.clone())
    for i in range(3):
        assert (results[i] - results[i - 1]).abs().max() > 1e-4


def test_debiased_state_resumes() -> None:
    torch.manual_seed(0)
    batches = torch.randn(6, N, D)
    whole = Codebook(K, D, ema_rule="debiased", kmeans_init=False, revive_below=0.0)
    resumed = Codebook(K, D, ema_rule="debiased", kmeans_init=False, revive_below=0.0)
    resumed.load_state_dict(whole.state_dict())
    for x in batches[:3]:
        whole(x)
    resumed.load_state_dict(whole.state_dict())
    for x in batches[3:]:
        whole(x)
        resumed(x)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


def test_an_empty_batch_is_no_step() -> None:
    for rule in RULES:
        module = Codebook(K, D, ema_rule=rule, kmeans_init=False)
        module(torch.randn(N, D))
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module(torch.randn(0, D))
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_refuses_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match=r"ema_rule must be one of smoothed_divisor, .*'sonnet'"):
        Codebook(K, D, ema_rule="sonnet")
