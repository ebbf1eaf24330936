"""How codes follow their rows by exponential moving averages: the rules, by name.

Lives here: what the rules make of the averages. The averages themselves, and the whole step of the
first rule, are `fastvq.ops.ema_step`; when they are applied, and to whose rows, is `codebook.py`.

With n[k] rows of sum s[k] assigned to code k in a batch, decay γ, K codes and a small ε, every
rule keeps

    N[k] ← γN[k] + (1−γ)n[k],   m[k] ← γm[k] + (1−γ)s[k]

and differs in what it makes of them, with Laplace(N)[k] = ΣN · (N[k] + ε) / (ΣN + Kε):

    smoothed_divisor   e = m / Laplace(N).            (vector-quantize-pytorch, rosinality, encodec)
    smoothed_counts    N ← Laplace(N), then e = m / N: the smoothed count is what the next step
                       decays.                        (zalandoresearch, pythae)
    debiased           N̂ = N / (1 − γᵗ), m̂ = m / (1 − γᵗ) after t steps that started from zero;
                       e = m̂ / Laplace(N̂).            (sonnet)
"""

from __future__ import annotations

from torch import Tensor

from fastvq.ops.ema_step import laplace_smoothed

RULES = ("smoothed_divisor", "smoothed_counts", "debiased")


def codes_of_averages(
    rule: str, counts: Tensor, sums: Tensor, eps: float, debias: Tensor | None
) -> Tensor:
    """e (h, K, D) from N (h, K) and m (h, K, D); `debias` (h, 1) is 1 − γᵗ."""
    if rule == "smoothed_counts":
        return sums / counts[..., None]
    if rule == "debiased":
        assert debias is not None
        counts, sums = counts / debias, sums / debias[..., None]
    return sums / laplace_smoothed(counts, eps)[..., None]
