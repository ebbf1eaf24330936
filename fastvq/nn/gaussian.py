"""The Gaussian latent of a variational autoencoder.

Lives here: a diagonal Gaussian posterior, its reparameterised sample and its divergence from the
standard normal prior. Networks that produce it are in `models/`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DiagonalGaussian(NamedTuple):
    """q(z|x) = N(z; mean, diag(exp(log_variance))), one per example.

    Both fields are (B, ...) and of one shape. Kingma & Welling 2013, arXiv:1312.6114.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """z = mean + exp(log_variance / 2) · ε, ε ~ N(0, 1): differentiable in both (eq. 7)."""
        noise = torch.randn_like(self.mean)
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, I)) in nats per example, (B,) float32 (float64 if the fields are).

        ½ Σ (mean² + exp(log_variance) − 1 − log_variance), summed over all dimensions but the
        first (eq. 10, appendix B).
        """
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        mean, log_variance = self.mean.to(wide), self.log_variance.to(wide)
        # expm1: exp(v) − 1 would lose its digits to cancellation near the prior.
        terms = mean.square() + torch.expm1(log_variance) - log_variance
        return 0.5 * terms.flatten(start_dim=1).sum(dim=1)
