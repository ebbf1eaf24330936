"""The variational autoencoder with a Gaussian latent, for pictures.

Lives here: a small convolutional encoder and decoder and their objective. The latent itself is
`nn/gaussian.py`; quantized autoencoders are `vqvae.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.gaussian import DiagonalGaussian
from fastvq.ops.checks import check_int

from .pretrained import Pretrained


class VAEOutput(NamedTuple):
    """What `VAE` returns. Nats; sums over pixels, channels and latent dimensions."""

    reconstruction: Tensor  # (B, C, H, W) mean of p(x|z), 0…1
    mean: Tensor  # (B, latent_dim)
    log_variance: Tensor  # (B, latent_dim)
    kl: Tensor  # (B,) KL(q(z|x) ‖ p(z))
    reconstruction_loss: Tensor  # (B,) −log p(x|z)
    loss: Tensor  # () mean over the batch of reconstruction_loss + kl, the negative ELBO


class VAE(Pretrained, nn.Module):
    """Convolutional Gaussian VAE, trained on the evidence lower bound.

        log p(x) ≥ ELBO = E_q(z|x)[log p(x|z)] − KL(q(z|x) ‖ N(0, I))

    The encoder halves the picture twice and ends in two linear layers; the decoder mirrors it.
    Sizes that 4 does not divide are zero-padded at the bottom and right, and cropped on the way
    out.

    Args:
        in_channels: C.
        image_size: H = W, or (H, W); at least 4.
        hidden_channels: channels at half resolution; twice as many at a quarter, and 8 times as
            many units in the linear layer.
        latent_dim: size of z.
        likelihood: "bernoulli": log p = Σ x log p̂ + (1−x) log(1−p̂), for binary pictures (for grey
            values it is the cross-entropy, not a log-likelihood); or "gaussian": independent
            N(x; p̂, variance) densities per element.
        variance: of the Gaussian likelihood, fixed; in squared units of the 0…1 picture.
    Raises:
        ValueError: an argument out of its range.
    Kingma & Welling 2013, arXiv:1312.6114, eq. 3, 7 and 10; convolutions instead of the paper's
    single hidden layer.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        hidden_channels: int = 32,
        latent_dim: int = 32,
        *,
        likelihood: str = "bernoulli",
        variance: float = 0.01,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        for side in size:
            check_int("VAE", "image_size", side)
        if len(size) != 2 or min(size) < 4:
            raise ValueError(
                f"VAE: image_size must be one size or (H, W), at least 4; got {image_size}."
            )
        for name, value in (
            ("in_channels", in_channels),
            ("hidden_channels", hidden_channels),
            ("latent_dim", latent_dim),
        ):
            check_int("VAE", name, value)
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(
                f"VAE: likelihood must be 'bernoulli' or 'gaussian'; got {likelihood!r}."
            )
        if not variance > 0.0:
            raise ValueError(f"VAE: variance must be positive; got {variance}.")
        self.in_channels, self.latent_dim = in_channels, latent_dim
        self.height, self.width = size
        self.likelihood, self.variance = likelihood, variance
        coarse = (2 * hidden_channels, -(-self.height // 4), -(-self.width // 4))
        units = 8 * hidden_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, 2 * hidden_channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(math.prod(coarse), units),
            nn.ReLU(),
            nn.Linear(units, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, units),
            nn.ReLU(),
            nn.Linear(units, math.prod(coarse)),
            nn.ReLU(),
            nn.Unflatten(1, coarse),
            nn.ConvTranspose2d(2 * hidden_channels, hidden_channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden_channels, in_channels, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> VAEOutput:
        """One reparameterised sample of z, its reconstruction and the terms of the bound.

        Samples z in eval mode too, with the global generator.

        Args:
            x: (B, C, H, W) float, 0…1.
        Raises:
            ValueError: `x` has another shape or is not floating.
        """
        posterior = self.encode(x)
        logits = self._logits(posterior.sample())
        reconstruction_loss = self._negative_log_likelihood(logits, x)
        kl = posterior.kl()
        loss = (reconstruction_loss + kl).mean()
        return VAEOutput(torch.sigmoid(logits), *posterior, kl, reconstruction_loss, loss)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x) of pictures (B, C, H, W)."""
        expected = (self.in_channels, self.height, self.width)
        if x.dim() != 4 or x.shape[1:] != expected or not x.is_floating_point():
            raise ValueError(
                f"VAE: x must be float pictures (B, {self.in_channels}, {self.height}, "
                f"{self.width}); got {x.dtype} {tuple(x.shape)}."
            )
        padded = F.pad(x, (0, -self.width % 4, 0, -self.height % 4))
        mean, log_variance = self.encoder(padded).chunk(2, dim=1)
        return DiagonalGaussian(mean, log_variance)

    def decode(self, z: Tensor) -> Tensor:
        """(B, latent_dim) → the mean of p(x|z), (B, C, H, W) in 0…1."""
        return torch.sigmoid(self._logits(z))

    @torch.no_grad()
    def elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Evidence lower bound of each picture, (B,) nats: a mean over `num_samples` draws of z.

        Raises:
            ValueError: a bad shape, or `num_samples` below 1.
        """
        if num_samples < 1:
            raise ValueError(f"VAE.elbo: num_samples must be at least 1; got {num_samples}.")
        posterior = self.encode(x)
        losses = [
            self._negative_log_likelihood(self._logits(posterior.sample()), x)
            for _ in range(num_samples)
        ]
        return -torch.stack(losses).mean(dim=0) - posterior.kl()

    @torch.no_grad()
    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """Means of p(x|z) for z ~ N(0, I): (n, C, H, W) in 0…1.

        `seed` makes z the same on every device; None draws it with the global CPU generator.
        """
        check_int("VAE.sample", "n", n, least=0)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        z = torch.randn(n, self.latent_dim, generator=generator)
        weight = next(self.decoder.parameters())
        return self.decode(z.to(weight))

    def _logits(self, z: Tensor) -> Tensor:
        logits: Tensor = self.decoder(z)
        return logits[:, :, : self.height, : self.width]

    def _negative_log_likelihood(self, logits: Tensor, x: Tensor) -> Tensor:
        """−log p(x|z), (B,) nats, summed over the picture in float32."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, x = logits.to(wide), x.to(wide)
        if self.likelihood == "bernoulli":
            terms = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        else:
            squared = (x - torch.sigmoid(logits)).square() / (2.0 * self.variance)
            terms = squared + 0.5 * math.log(2.0 * math.pi * self.variance)
        return terms.flatten(start_dim=1).sum(dim=1)
