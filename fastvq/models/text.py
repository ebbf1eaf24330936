"""Autoencoders of lines of text: `TextVAE` and `TextVQVAE`.

Lives here: their assembly from the strided coder, the Gaussian latent or a codebook, and a
`PixelCNN` over a sequence as the causal decoder. Reading lines is in `fastvq.train.data.text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.models.pixelcnn import PixelCNN
from fastvq.models.pretrained import Pretrained
from fastvq.nn.codebook import Codebook
from fastvq.nn.gaussian import DiagonalGaussian
from fastvq.nn.strided_coder import (
    CoderShape,
    keep_signal_size,
    strided_decoder,
    strided_encoder,
)

NUM_SYMBOLS = 256
END = 10  # the newline, which ends a line and fills it up


class TextVAEOutput(NamedTuple):
    """What `TextVAE` returns. Nats per line."""

    mean: Tensor  # (B, latent_dim)
    log_variance: Tensor  # (B, latent_dim)
    kl: Tensor  # (B,) KL(q(z|x) ‖ N(0, I))
    reconstruction_loss: Tensor  # (B,) −log p(x|z), up to the line's end
    loss: Tensor  # () mean of reconstruction_loss + kl, each latent dimension at least free_nats


class TextVQVAEOutput(NamedTuple):
    """What `TextVQVAE` returns."""

    codes: list[Tensor]  # one (B, length / downsample) int64
    reconstruction_loss: Tensor  # (B,) −log p(x|codes), nats up to the line's end
    commitment_loss: Tensor  # () mean over vectors and channels
    perplexity: Tensor  # ()
    usage: Tensor  # () share of the codebook in use
    loss: Tensor  # () nats per symbol + commitment_weight · commitment_loss


def live_symbols(x: Tensor) -> Tensor:
    """(B, T) bool: the symbols of each line up to its first newline, that one included."""
    ended = x == END
    return ended.cumsum(dim=1) - ended.long() == 0


class _TextModel(nn.Module):
    """Bytes → features, downsample times coarser; features → the causal decoder's condition."""

    def __init__(
        self,
        length: int,
        hidden_channels: int,
        downsample: int,
        num_layers: int,
        kernel_size: int,
        dilations: Sequence[int],
        features: int,
        dropout: float,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if downsample < 2 or downsample & (downsample - 1):
            raise ValueError(f"{name}: downsample must be 2, 4, 8, …; got {downsample}.")
        if length < downsample or length % downsample:
            raise ValueError(
                f"{name}: length must be a multiple of downsample={downsample}; got {length}."
            )
        if hidden_channels < 2:
            raise ValueError(f"{name}: hidden_channels must be at least 2; got {hidden_channels}.")
        self.length, self.downsample, self.steps = length, downsample, length // downsample
        shape = CoderShape(hidden_channels, hidden_channels // 2, 2, 0, (1,), 1)
        self.embedding = nn.Embedding(NUM_SYMBOLS, hidden_channels)
        self.encoder = strided_encoder(hidden_channels, downsample, shape)
        self.condition = strided_decoder(features, hidden_channels, downsample, shape)
        for network in (self.encoder, self.condition):
            keep_signal_size(network)
        self.decoder = PixelCNN(
            NUM_SYMBOLS,
            hidden_channels,
            num_layers,
            kernel_size,
            condition_channels=hidden_channels,
            dilations=dilations,
            dropout=dropout,
            dimensions=1,
        )

    def _features(self, x: Tensor) -> Tensor:
        """(B, length) symbols → (B, hidden, steps)."""
        if x.dim() != 2 or x.shape[1] != self.length or x.dtype != torch.int64:
            raise ValueError(
                f"{type(self).__name__}: x must be int64 lines (B, {self.length}); got {x.dtype} "
                f"{tuple(x.shape)}."
            )
        features: Tensor = self.encoder(self.embedding(x).movedim(-1, 1))
        return features

    def _negative_log_likelihood(self, x: Tensor, features: Tensor) -> Tensor:
        """−log p(x | features), (B,) nats up to each line's end."""
        log_prob = self.decoder.code_log_prob(x, condition=self.condition(features))
        return -(log_prob * live_symbols(x)).sum(dim=1)

    @torch.no_grad()
    def _draw(self, features: Tensor, temperature: float, options: dict[str, Any]) -> Tensor:
        """Lines (B, length) int64, newlines after each one's end."""
        condition = self.condition(features)
        drawn = self.decoder.sample(
            self.length, len(features), condition=condition, temperature=temperature, **options
        )
        return torch.where(live_symbols(drawn), drawn, END)


class TextVAE(Pretrained, _TextModel):
    """Gaussian VAE of lines, with a causal convolutional decoder.

        log p(x) ≥ E_q(z|x)[Σ_t log p(x[t] | x[<t], z)] − KL(q(z|x) ‖ N(0, I))

    A line is (length,) bytes: its own, then newlines; the sum ends with the first newline. z is
    one vector for the whole line, spread over it by the mirror image of the encoder. A decoder
    that sees the symbols before can do without z, so z must be made worth its price:

        loss = mean reconstruction_loss + Σ_d max(free_nats, mean KL_d)

    with KL_d of latent dimension d over the batch; nothing is gained by a KL below free_nats.

    Args:
        length: symbols of a line, its end included; a multiple of `downsample`.
        hidden_channels: width of encoder and decoder.
        latent_dim: size of z.
        downsample: a power of two; symbols per step of the coarsest features.
        num_layers, kernel_size, dilations, dropout: of the decoder, see `PixelCNN`.
        free_nats: the KL of a latent dimension that costs nothing.
    Raises:
        ValueError: an argument outside these rules.
    Bowman et al. 2016, arXiv:1511.06349 (with LSTMs); free bits: Kingma et al. 2016,
    arXiv:1606.04934, appendix C.8; dilated convolutions: Yang et al. 2017, arXiv:1702.08139.
    """

    def __init__(
        self,
        length: int = 128,
        hidden_channels: int = 64,
        latent_dim: int = 32,
        downsample: int = 8,
        num_layers: int = 6,
        kernel_size: int = 5,
        dilations: Sequence[int] = (1, 2, 4),
        dropout: float = 0.0,
        free_nats: float = 0.5,
    ) -> None:
        super().__init__(
            length,
            hidden_channels,
            downsample,
            num_layers,
            kernel_size,
            dilations,
            hidden_channels,
            dropout,
        )
        if latent_dim < 1 or free_nats < 0.0:
            raise ValueError(
                "TextVAE: latent_dim must be at least 1 and free_nats at least 0; got "
                f"{latent_dim} and {free_nats}."
            )
        self.latent_dim, self.free_nats = latent_dim, free_nats
        self.to_latent = nn.Linear(hidden_channels * self.steps, 2 * latent_dim)
        self.from_latent = nn.Linear(latent_dim, hidden_channels * self.steps)

    def forward(self, x: Tensor) -> TextVAEOutput:
        """One reparameterised z of each line (B, length) int64, and the terms of the bound."""
        posterior = self.encode(x)
        reconstruction_loss = self._negative_log_likelihood(x, self._spread(posterior.sample()))
        each = DiagonalGaussian(posterior.mean.T, posterior.log_variance.T).kl() / len(x)
        loss = reconstruction_loss.mean() + each.clamp(min=self.free_nats).sum()
        return TextVAEOutput(*posterior, posterior.kl(), reconstruction_loss, loss)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x) of lines (B, length) int64."""
        mean, log_variance = self.to_latent(self._features(x).flatten(1)).chunk(2, dim=1)
        return DiagonalGaussian(mean, log_variance)

    def line_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of lines (B, length) and latents (B, latent_dim): (B,) nats."""
        return -self._negative_log_likelihood(x, self._spread(z))

    @torch.no_grad()
    def elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Evidence lower bound of each line, (B,) nats: a mean over `num_samples` draws of z."""
        posterior = self.encode(x)
        draws = [self.line_log_prob(x, posterior.sample()) for _ in range(num_samples)]
        return torch.stack(draws).mean(dim=0) - posterior.kl()

    def decode(self, z: Tensor, temperature: float = 0.0, **options: Any) -> Tensor:
        """Lines (B, length) int64 of latents (B, latent_dim); options as `PixelCNN.sample`."""
        return self._draw(self._spread(z), temperature, options)

    def sample(self, n: int, seed: int = 0, temperature: float = 1.0, **options: Any) -> Tensor:
        """Lines (n, length) int64 of z ~ N(0, I)."""
        z = torch.randn(n, self.latent_dim, generator=torch.Generator().manual_seed(seed))
        weight = self.from_latent.weight
        return self.decode(z.to(weight), temperature, seed=seed, **options)

    def _spread(self, z: Tensor) -> Tensor:
        features: Tensor = self.from_latent(z)
        return features.unflatten(1, (-1, self.steps))


class TextVQVAE(Pretrained, _TextModel):
    """VQ-VAE of lines: a code for every `downsample` symbols, and a causal decoder.

        z = conv1(Encoder(x)),   q = the nearest codes,   p(x|q) = Π_t p(x[t] | x[<t], Upsample(q))
        loss = −log p(x|q) per symbol + commitment_weight · commitment_loss

    The codebook follows the batches by moving averages. With a prior over its codes
    (`HierarchicalPrior` of shapes [[length / downsample]]) −log p(codes) − log p(x|codes) is the
    length of a lossless code for x.

    Args:
        length, hidden_channels, downsample, num_layers, kernel_size, dilations, dropout: as
            `TextVAE`.
        num_codes: K.
        code_dim: D.
        commitment_weight: β.
        decay, revive_below: see `fastvq.nn.Codebook`.
        seed: of the k-means start of the codebook.
    Raises:
        ValueError: an argument outside these rules.
    van den Oord et al. 2017, arXiv:1711.00937, with the decoder of its section 4.3.
    """

    levels = 1

    def __init__(
        self,
        length: int = 128,
        hidden_channels: int = 64,
        num_codes: int = 512,
        code_dim: int = 32,
        downsample: int = 8,
        num_layers: int = 6,
        kernel_size: int = 5,
        dilations: Sequence[int] = (1, 2, 4),
        dropout: float = 0.0,
        *,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        revive_below: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            length,
            hidden_channels,
            downsample,
            num_layers,
            kernel_size,
            dilations,
            code_dim,
            dropout,
        )
        self.num_codes, self.commitment_weight = num_codes, commitment_weight
        self.to_code = nn.Conv1d(hidden_channels, code_dim, 1)
        self.codebook = Codebook(
            num_codes, code_dim, decay=decay, kmeans_init=True, revive_below=revive_below, seed=seed
        )

    def forward(self, x: Tensor) -> TextVQVAEOutput:
        """Quantize lines (B, length) int64; in training mode the codebook follows the batch."""
        out = self._quantize(x, freeze=False)
        q = out.quantized.view(len(x), self.steps, -1).movedim(-1, 1)
        reconstruction_loss = self._negative_log_likelihood(x, q)
        per_symbol = reconstruction_loss.sum() / live_symbols(x).sum()
        return TextVQVAEOutput(
            [out.indices.view(len(x), self.steps)],
            reconstruction_loss,
            out.commitment,
            out.perplexity,
            out.usage,
            per_symbol + self.commitment_weight * out.commitment,
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """Codes of lines (B, length) int64: [(B, length / downsample) int64]."""
        return [self._quantize(x, freeze=True).indices.view(len(x), self.steps)]

    def line_log_prob(self, x: Tensor, codes: Sequence[Tensor]) -> Tensor:
        """log p(x|codes): (B,) nats, up to each line's end."""
        return -self._negative_log_likelihood(x, self._vectors(codes))

    def decode_codes(
        self, codes: Sequence[Tensor], temperature: float = 0.0, **options: Any
    ) -> Tensor:
        """Lines (B, length) int64 of codes; options as `PixelCNN.sample`."""
        return self._draw(self._vectors(codes), temperature, options)

    def _quantize(self, x: Tensor, freeze: bool) -> Any:
        z = self.to_code(self._features(x))
        return self.codebook(z.movedim(1, -1).flatten(0, 1), freeze=freeze)

    def _vectors(self, codes: Sequence[Tensor]) -> Tensor:
        """(B, D, steps)."""
        (only,) = codes
        if only.dim() != 2 or only.shape[1] != self.steps or only.dtype != torch.int64:
            raise ValueError(
                f"TextVQVAE: codes must be [int64 (B, {self.steps})]; got {only.dtype} "
                f"{tuple(only.shape)}."
            )
        vectors = F.embedding(only, self.codebook.embed[0])
        return vectors.movedim(-1, 1).to(self.embedding.weight.dtype)
