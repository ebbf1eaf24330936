"""VQ-VAE and VQ-VAE-2: pictures or sounds to levels of discrete codes and back.

Lives here: the assembly of encoders, decoders and codebooks, for any number of levels, on maps or
on sequences. The encoders and decoders are `nn/strided_coder.py`, the codebook is
`nn/codebook.py`; priors over the codes are in other files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.codebook import Codebook, CodebookOutput
from fastvq.nn.convolution import doubling, pointwise
from fastvq.nn.dimensions import check_dimensions
from fastvq.nn.spectral_loss import spectral_loss
from fastvq.nn.strided_coder import (
    CoderShape,
    keep_signal_size,
    strided_decoder,
    strided_encoder,
)
from fastvq.ops.checks import check_int, check_number

from .pretrained import Pretrained


class VQVAEOutput(NamedTuple):
    """What `VQVAE` and `VQVAE2` return; L levels, the top (coarsest) first."""

    reconstruction: Tensor  # (B, C, H, W), about 0…1, or (B, C, T), about −1…1: not clamped
    codes: list[Tensor]  # L × (B, h, w) or (B, t) int64
    reconstruction_loss: Tensor  # () mean squared error
    commitment_loss: Tensor  # () sum over levels of means
    codebook_loss: Tensor  # () likewise; 0 with an EMA codebook
    perplexity: Tensor  # (L,) exp of the entropy of each level's codes in this batch
    loss: Tensor  # () the weighted sum to minimise
    usage: Tensor  # (L,) fraction of each level's codes in use by the running counts
    spectral_loss: Tensor  # () see `fastvq.nn.spectral_loss`; 0 where it has no weight


class VQVAE2(Pretrained, nn.Module):
    """Hierarchical VQ-VAE: every level quantizes what the levels above it leave unsaid.

    Level l = L (top) … 1 (bottom), feature maps f from the encoders, D-channel code maps q:

        f[1] = Encoder[1](2x − 1),   f[l] = Encoder[l](f[l−1])
        z[L] = conv1×1(f[L]),   z[l] = conv1×1(Decoder[l](q[L], …, q[l+1]), f[l])
        q[l] = the rows of z[l] replaced by their nearest codes
        reconstruction = (Decoder(q[L], …, q[1]) + 1) / 2

    Encoder[1] is `downsample` times coarser than the picture, each further level another 2 times;
    maps of several levels meet, concatenated, at the finer resolution, brought there by learned
    4×4 transposed convolutions (with `levels=2, downsample=4` this is the network most public
    VQ-VAE-2 checkpoints use). The loss is

        loss = reconstruction_loss / data_variance + spectral_weight · spectral_loss
             + codebook_loss + commitment_weight · commitment_loss

    with reconstruction_loss the mean squared error over all elements of the 0…1 picture, the
    spectral loss (0 unless it has a weight) that of `fastvq.nn.spectral_loss`, and the other two
    means over vectors and channels, summed over levels.

    With `dimensions=1` the same network is one of sequences: every convolution has one dimension,
    and x is a sound (B, C, T) in −1…1, which the network sees, and gives, in units of its standard
    deviation √data_variance instead of 2x − 1. T need not be a multiple of anything: x is
    continued with zeros up to the next multiple of the coarsest code, and what the decoder gives
    for them is cut off.

    Args:
        in_channels: C of the pictures or sounds.
        levels: L ≥ 1.
        hidden_channels: width of encoders and decoders (half of it next to the picture).
        residual_channels: width inside the residual blocks.
        num_residual_blocks: per encoder and decoder.
        downsample: a power of two ≥ 2, picture or sound to bottom codes.
        num_codes: K, of every level.
        code_dim: D.
        commitment_weight: β.
        codebook: "ema" (moving averages) or "gradient" (a parameter with the codebook loss).
        decay, kmeans_init, revive_below: see `fastvq.nn.Codebook`.
        level_dropout: fraction of the training pictures that are reconstructed from their top n
            levels alone, n uniform in 1 … L − 1, the maps of the levels below replaced by their
            mean code. Without it the decoder reads everything from the bottom level, and the
            levels above stay empty; the papers have no such term.
        data_variance: what the squared error is divided by in `loss`; the variance of the training
            pictures balances the terms, as in the VQ-VAE authors' implementation.
        seed: of the k-means start of the codebooks.
        dimensions: 2 for pictures, 1 for sounds.
        stage_blocks: residual blocks at every resolution between the codes' and the data's too.
        dilations: of the residual blocks of one resolution, in turn.
        causal: no step of a decoded sound depends on codes of a later time (the encoder sees what
            follows in any case); only with `dimensions=1`.
        spectral_weight: of the spectral loss; None: 1 for sounds, 0 for pictures. Only sounds.
        spectral_windows: steps of the windows that the spectral loss looks through.
    Raises:
        ValueError: an argument out of its range.
    van den Oord et al. 2017, arXiv:1711.00937; Razavi et al. 2019, arXiv:1906.00446, algorithm 1.
    The papers leave the encoders' widths next to the picture and the merging of more than two
    levels open. For sounds the first paper (section 4.3) has downsample=64, a dilated causal
    decoder that is autoregressive over samples, and no spectral loss; this decoder is not
    autoregressive, and the spectral loss takes that part.
    """

    def __init__(
        self,
        in_channels: int = 3,
        levels: int = 2,
        hidden_channels: int = 128,
        residual_channels: int = 32,
        num_residual_blocks: int = 2,
        downsample: int = 4,
        num_codes: int = 512,
        code_dim: int = 64,
        *,
        commitment_weight: float = 0.25,
        codebook: str = "ema",
        decay: float = 0.99,
        kmeans_init: bool = True,
        revive_below: float = 0.1,
        level_dropout: float = 0.1,
        data_variance: float = 1.0,
        seed: int = 0,
        dimensions: int = 2,
        stage_blocks: int = 0,
        dilations: Sequence[int] = (1,),
        causal: bool = False,
        spectral_weight: float | None = None,
        spectral_windows: Sequence[int] = (512, 128, 32),
    ) -> None:
        super().__init__()
        name = type(self).__name__
        least = {"in_channels": 1, "levels": 1, "hidden_channels": 2, "residual_channels": 1}
        least |= {"num_residual_blocks": 0, "num_codes": 1, "code_dim": 1, "stage_blocks": 0}
        for argument, value in least.items():
            check_int(name, argument, locals()[argument], value)
        check_int(name, "downsample", downsample)
        if downsample < 2 or downsample & (downsample - 1):
            raise ValueError(f"{name}: downsample must be 2, 4, 8, …; got {downsample}.")
        if codebook not in ("ema", "gradient"):
            raise ValueError(f"{name}: codebook must be 'ema' or 'gradient'; got {codebook!r}.")
        for argument in ("level_dropout", "data_variance", "commitment_weight"):
            check_number(name, argument, locals()[argument])
        if not 0.0 <= level_dropout < 1.0:
            raise ValueError(f"{name}: level_dropout must be in [0, 1); got {level_dropout}.")
        if not data_variance > 0.0:
            raise ValueError(f"{name}: data_variance must be positive; got {data_variance}.")
        if spectral_weight is None:
            spectral_weight = 1.0 if dimensions == 1 else 0.0
        _check_sequence_options(name, dimensions, dilations, causal, spectral_weight)
        self.dimensions, self.causal = dimensions, causal
        self.spectral_weight, self.spectral_windows = spectral_weight, tuple(spectral_windows)
        self.in_channels, self.levels = in_channels, levels
        self.num_codes, self.code_dim = num_codes, code_dim
        self.downsample = downsample
        self.commitment_weight, self.data_variance = commitment_weight, data_variance
        self.level_dropout = level_dropout
        shape = CoderShape(
            hidden_channels,
            residual_channels,
            num_residual_blocks,
            stage_blocks,
            tuple(dilations),
            dimensions,
        )
        # Index 0 is the bottom level in every list of modules.
        self.encoders = nn.ModuleList(
            strided_encoder(in_channels, downsample, shape)
            if level == 0
            else strided_encoder(hidden_channels, 2, shape)
            for level in range(levels)
        )
        self.level_decoders = nn.ModuleList(
            strided_decoder(code_dim * (levels - 1 - level), code_dim, 2, shape)
            for level in range(levels - 1)
        )
        self.to_code = nn.ModuleList(
            pointwise(
                dimensions, hidden_channels + (code_dim if level < levels - 1 else 0), code_dim
            )
            for level in range(levels)
        )
        self.codebooks = nn.ModuleList(
            Codebook(
                num_codes,
                code_dim,
                learnable=codebook == "gradient",
                decay=decay,
                kmeans_init=kmeans_init,
                revive_below=revive_below,
                seed=seed + level,
            )
            for level in range(levels)
        )
        # upsamplers[l][i] takes the map of level l from resolution l − i to l − i − 1.
        self.upsamplers = nn.ModuleList(
            nn.ModuleList(
                doubling(dimensions, code_dim, code_dim, causal=causal) for _ in range(level)
            )
            for level in range(levels)
        )
        self.decoder = strided_decoder(
            code_dim * levels, in_channels, downsample, shape, causal=causal
        )
        if dimensions == 1:
            keep_signal_size(self)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Encode, quantize and decode pictures (B, C, H, W), float 0…1, or sounds (B, C, T).

        H and W must be divisible by downsample·2^(levels−1); T need not. In training mode the
        codebooks follow the batch, and `level_dropout` applies.

        Raises:
            ValueError: x has another shape or is not floating.
        """
        self._check_data(x)
        above, quantized = self._quantize(x)
        if self.training and self.level_dropout > 0.0 and self.levels > 1:
            above = self._drop_levels(above)
        reconstruction = self._decode(above)
        if self.dimensions == 1:
            reconstruction = reconstruction[..., : x.shape[-1]]
        reconstruction_loss = F.mse_loss(reconstruction.float(), x.float())
        commitment_loss = torch.stack([level.commitment for level in quantized]).sum()
        codebook_loss = torch.stack([level.codebook for level in quantized]).sum()
        loss = (
            reconstruction_loss / self.data_variance
            + codebook_loss
            + self.commitment_weight * commitment_loss
        )
        spectral = torch.zeros_like(loss)
        if self.spectral_weight > 0.0:
            spectral = spectral_loss(x, reconstruction, self.spectral_windows)
            loss = loss + self.spectral_weight * spectral
        return VQVAEOutput(
            reconstruction,
            [level.indices for level in quantized],
            reconstruction_loss,
            commitment_loss,
            codebook_loss,
            torch.stack([level.perplexity for level in quantized]),
            loss,
            torch.stack([level.usage for level in quantized]),
            spectral,
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """Codes of pictures (B, C, H, W) or sounds (B, C, T): L × (B, h, w) or (B, t) int64.

        Top level first; t = ⌈T / step⌉ · 2^l on level l from the top, step =
        downsample·2^(levels−1). Leaves the codebooks alone, in training mode too. A code is −1
        where the encoder's output is not finite.
        """
        self._check_data(x)
        _, quantized = self._quantize(x, freeze=True)
        return [level.indices for level in quantized]

    @torch.no_grad()
    def decode_codes(self, codes: Sequence[Tensor], levels: int | None = None) -> Tensor:
        """Pictures (B, C, H, W), about 0…1 (not clamped), or sounds (B, C, T), of codes.

        Args:
            codes: (B, h, w) or (B, t) integers in 0 … num_codes − 1 per level, top first, each
                level twice the size of the one before. T is t · downsample of the bottom level:
                cut it to the length of the sound that was encoded.
            levels: use the first `levels` entries alone, to see what those levels hold; each
                absent level is filled with its mean code, codes weighted by how often they are
                used. None uses all.
        Raises:
            ValueError: a code out of range (−1, "no code", included), maps that do not fit.
        """
        name = type(self).__name__
        used = self.levels if levels is None else levels
        if not 1 <= used <= self.levels:
            raise ValueError(
                f"{name}.decode_codes: levels must be in 1 … {self.levels}; got {levels}."
            )
        if not used <= len(codes) <= self.levels:
            raise ValueError(
                f"{name}.decode_codes: codes must hold {used} maps, top level first; "
                f"got {len(codes)}."
            )
        maps: list[Tensor] = []
        for position in range(used):
            expected = None if position == 0 else _doubled(codes[position - 1].shape)
            self._check_codes(codes[position], position, expected)
            level = self.levels - 1 - position
            q = F.embedding(codes[position].long(), self._codebook(level).embed[0])
            q = q.movedim(-1, 1).to(next(self.decoder.parameters()).dtype)
            maps.append(self._to_bottom(q, level))
        for level in reversed(range(self.levels - used)):
            maps.append(self._mean_map(level, maps[0]).expand_as(maps[0]))
        return self._decode(maps)

    def _decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Pictures or sounds of the levels' maps, all at the bottom resolution."""
        decoded: Tensor = self.decoder(torch.cat(list(maps), dim=1))
        if self.dimensions == 1:
            return decoded * math.sqrt(self.data_variance)
        return (decoded + 1.0) / 2.0

    def _quantize(
        self, x: Tensor, freeze: bool = False
    ) -> tuple[list[Tensor], list[CodebookOutput]]:
        """Quantized maps at the bottom resolution, and each level's codes as maps; top first."""
        features: list[Tensor] = []
        if self.dimensions == 2:
            h = 2.0 * x - 1.0
        else:
            h = x / math.sqrt(self.data_variance)
            h = F.pad(h, (0, -x.shape[-1] % (self.downsample << (self.levels - 1))))
        for encoder in self.encoders:
            h = encoder(h)
            features.append(h)
        above: list[Tensor] = []
        outputs: list[CodebookOutput] = []
        for level in reversed(range(self.levels)):
            merged = features[level]
            if above:
                decoded = self.level_decoders[level](torch.cat(above, dim=1))
                merged = torch.cat([decoded, merged], dim=1)
            z = self.to_code[level](merged)
            batch, dim, *size = z.shape
            out = self.codebooks[level](z.movedim(1, -1).reshape(-1, dim), freeze=freeze)
            outputs.append(out._replace(indices=out.indices.view(batch, *size)))
            q = out.quantized.view(batch, *size, dim).movedim(-1, 1)
            above = [*self._raised(above, level), q]
        return above, outputs

    def _raised(self, maps: list[Tensor], level: int) -> list[Tensor]:
        """Maps of the levels above `level`, top first, from resolution level + 1 to `level`."""
        raised = []
        for position, code_map in enumerate(maps):
            own = self.levels - 1 - position
            steps = cast(nn.ModuleList, self.upsamplers[own])
            raised.append(steps[own - level - 1](code_map))
        return raised

    def _codebook(self, level: int) -> Codebook:
        return cast(Codebook, self.codebooks[level])

    def _to_bottom(self, code_map: Tensor, level: int) -> Tensor:
        """A map of `level`, brought to the bottom resolution."""
        for step in cast(nn.ModuleList, self.upsamplers[level]):
            code_map = step(code_map)
        return code_map

    def _mean_map(self, level: int, like: Tensor) -> Tensor:
        """(1, D, …) of the size of `like`: the mean code of `level` in every place.

        The mean weights the codes by their running counts.
        """
        codebook = self._codebook(level)
        weight = codebook.cluster_size[0] / codebook.cluster_size[0].sum()
        mean = (weight @ codebook.embed[0].detach()).to(like.dtype)
        size = [length >> level for length in like.shape[2:]]
        places = mean.view(1, -1, *[1] * len(size)).expand(-1, -1, *size)
        return self._to_bottom(places, level)

    def _drop_levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Replace the lower levels of some examples by mean maps; maps top first, all at bottom."""
        batch, device = maps[0].shape[0], maps[0].device
        dropped = torch.rand(batch, device=device) < self.level_dropout
        kept = torch.randint(1, self.levels, (batch,), device=device)
        result = maps[:1]
        for position in range(1, self.levels):
            absent = (dropped & (kept <= position)).view(-1, *[1] * (maps[0].dim() - 1))
            fill = self._mean_map(self.levels - 1 - position, maps[position])
            result.append(torch.where(absent, fill, maps[position]))
        return result

    def _check_data(self, x: Tensor) -> None:
        name = type(self).__name__
        if self.dimensions == 1:
            if x.dim() != 3 or x.shape[1] != self.in_channels or not x.is_floating_point():
                raise ValueError(
                    f"{name}: x must be float sounds (B, {self.in_channels}, T); "
                    f"got {x.dtype} {tuple(x.shape)}."
                )
            if x.shape[2] == 0:
                raise ValueError(f"{name}: x must have at least one step; got {tuple(x.shape)}.")
            return
        if x.dim() != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ValueError(
                f"{name}: x must be float pictures (B, {self.in_channels}, H, W); "
                f"got {x.dtype} {tuple(x.shape)}."
            )
        step = self.downsample << (self.levels - 1)
        height, width = x.shape[2:]
        if height % step or width % step or height == 0 or width == 0:
            nearest = " × ".join(
                str(max(1, (2 * size + step) // (2 * step)) * step) for size in (height, width)
            )
            raise ValueError(
                f"{name}: height and width must be multiples of {step} (downsample "
                f"{self.downsample}, {self.levels} levels); got {height} × {width}, the nearest "
                f"valid size is {nearest}."
            )

    def _check_codes(self, codes: Tensor, position: int, expected: torch.Size | None) -> None:
        name = f"{type(self).__name__}.decode_codes"
        if codes.dim() != 1 + self.dimensions or codes.is_floating_point() or codes.is_complex():
            places = "(B, h, w)" if self.dimensions == 2 else "(B, t)"
            raise ValueError(
                f"{name}: codes[{position}] must be integers {places}; "
                f"got {codes.dtype} {tuple(codes.shape)}."
            )
        if expected is not None and codes.shape != expected:
            raise ValueError(
                f"{name}: codes[{position}] must be {tuple(expected)}, twice the level above; "
                f"got {tuple(codes.shape)}."
            )
        if codes.numel():
            low, high = (int(value) for value in codes.aminmax())
            if low < 0 or high >= self.num_codes:
                raise ValueError(
                    f"{name}: codes[{position}] must be in 0 … {self.num_codes - 1}; "
                    f"got {low if low < 0 else high}."
                )


class VQVAE(VQVAE2):
    """VQ-VAE: one level of codes, `downsample` times coarser than the picture or sound.

    `VQVAE2` with `levels=1`; arguments, outputs and errors are described there. `codes` and
    `encode` give lists of one map.

    van den Oord et al. 2017, arXiv:1711.00937.
    """

    def __init__(
        self,
        in_channels: int = 3,
        hidden_channels: int = 128,
        residual_channels: int = 32,
        num_residual_blocks: int = 2,
        downsample: int = 4,
        num_codes: int = 512,
        code_dim: int = 64,
        *,
        commitment_weight: float = 0.25,
        codebook: str = "ema",
        decay: float = 0.99,
        kmeans_init: bool = True,
        revive_below: float = 0.1,
        data_variance: float = 1.0,
        seed: int = 0,
        dimensions: int = 2,
        stage_blocks: int = 0,
        dilations: Sequence[int] = (1,),
        causal: bool = False,
        spectral_weight: float | None = None,
        spectral_windows: Sequence[int] = (512, 128, 32),
    ) -> None:
        super().__init__(
            in_channels,
            1,
            hidden_channels,
            residual_channels,
            num_residual_blocks,
            downsample,
            num_codes,
            code_dim,
            commitment_weight=commitment_weight,
            codebook=codebook,
            decay=decay,
            kmeans_init=kmeans_init,
            revive_below=revive_below,
            data_variance=data_variance,
            seed=seed,
            dimensions=dimensions,
            stage_blocks=stage_blocks,
            dilations=dilations,
            causal=causal,
            spectral_weight=spectral_weight,
            spectral_windows=spectral_windows,
        )


def _check_sequence_options(
    name: str, dimensions: int, dilations: Sequence[int], causal: bool, spectral_weight: float
) -> None:
    """Refuse values out of range, and what only sounds have where the model is of pictures."""
    check_dimensions(name, dimensions)
    check_number(name, "spectral_weight", spectral_weight)
    listed = isinstance(dilations, Sequence) and not isinstance(dilations, str)
    if not listed or not dilations or any(dilation < 1 for dilation in dilations):
        raise ValueError(f"{name}: dilations must be at least one of 1, 2, …; got {dilations!r}.")
    if spectral_weight < 0.0:
        raise ValueError(f"{name}: spectral_weight must be 0 or more; got {spectral_weight}.")
    if dimensions == 2 and (causal or spectral_weight > 0.0):
        option = "causal" if causal else "spectral_weight"
        raise ValueError(f"{name}: {option} is of sounds; set dimensions=1, or leave it out.")


def _doubled(shape: torch.Size) -> torch.Size:
    """The shape (B, h, w) or (B, t) one level further down."""
    return torch.Size((shape[0], *(2 * size for size in shape[1:])))
