"""VQ-VAE and VQ-VAE-2: pictures to levels of discrete codes and back.

Lives here: the encoders, the decoders and their assembly, for any number of levels. The codebook
is `nn/codebook.py`; priors over the codes are in other files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.codebook import Codebook, CodebookOutput
from fastvq.nn.residual import ResidualStack

from .pretrained import Pretrained


class VQVAEOutput(NamedTuple):
    """What `VQVAE` and `VQVAE2` return; L levels, the top (coarsest) first."""

    reconstruction: Tensor  # (B, C, H, W), about 0…1: not clamped
    codes: list[Tensor]  # L × (B, h, w) int64
    reconstruction_loss: Tensor  # () mean squared error
    commitment_loss: Tensor  # () sum over levels of means
    codebook_loss: Tensor  # () likewise; 0 with an EMA codebook
    perplexity: Tensor  # (L,) exp of the entropy of each level's codes in this batch
    loss: Tensor  # () the weighted sum to minimise
    usage: Tensor  # (L,) fraction of each level's codes in use by the running counts


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

        loss = reconstruction_loss / data_variance + codebook_loss
             + commitment_weight · commitment_loss

    with reconstruction_loss the mean squared error over all elements of the 0…1 picture, and the
    other two means over vectors and channels, summed over levels.

    Args:
        in_channels: C of the pictures.
        levels: L ≥ 1.
        hidden_channels: width of encoders and decoders (half of it next to the picture).
        residual_channels: width inside the residual blocks.
        num_residual_blocks: per encoder and decoder.
        downsample: a power of two ≥ 2, picture to bottom codes.
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
    Raises:
        ValueError: an argument out of its range.
    van den Oord et al. 2017, arXiv:1711.00937; Razavi et al. 2019, arXiv:1906.00446, algorithm 1.
    The papers leave the encoders' widths next to the picture and the merging of more than two
    levels open.
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
    ) -> None:
        super().__init__()
        name = type(self).__name__
        least = {"in_channels": 1, "levels": 1, "hidden_channels": 2, "residual_channels": 1}
        least |= {"num_residual_blocks": 0, "num_codes": 1, "code_dim": 1}
        for argument, value in least.items():
            if locals()[argument] < value:
                raise ValueError(
                    f"{name}: {argument} must be at least {value}; got {locals()[argument]}."
                )
        if downsample < 2 or downsample & (downsample - 1):
            raise ValueError(f"{name}: downsample must be 2, 4, 8, …; got {downsample}.")
        if codebook not in ("ema", "gradient"):
            raise ValueError(f"{name}: codebook must be 'ema' or 'gradient'; got {codebook!r}.")
        if not 0.0 <= level_dropout < 1.0:
            raise ValueError(f"{name}: level_dropout must be in [0, 1); got {level_dropout}.")
        if not data_variance > 0.0:
            raise ValueError(f"{name}: data_variance must be positive; got {data_variance}.")
        self.in_channels, self.levels = in_channels, levels
        self.num_codes, self.code_dim = num_codes, code_dim
        self.downsample = downsample
        self.commitment_weight, self.data_variance = commitment_weight, data_variance
        self.level_dropout = level_dropout
        widths = (hidden_channels, residual_channels, num_residual_blocks)
        # Index 0 is the bottom level in every list of modules.
        self.encoders = nn.ModuleList(
            _encoder(in_channels, *widths, downsample)
            if level == 0
            else _encoder(hidden_channels, *widths, 2)
            for level in range(levels)
        )
        self.level_decoders = nn.ModuleList(
            _decoder(code_dim * (levels - 1 - level), code_dim, *widths, 2)
            for level in range(levels - 1)
        )
        self.to_code = nn.ModuleList(
            nn.Conv2d(hidden_channels + (code_dim if level < levels - 1 else 0), code_dim, 1)
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
                nn.ConvTranspose2d(code_dim, code_dim, 4, stride=2, padding=1) for _ in range(level)
            )
            for level in range(levels)
        )
        self.decoder = _decoder(code_dim * levels, in_channels, *widths, downsample)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Encode, quantize and decode pictures (B, C, H, W), float 0…1.

        H and W must be divisible by downsample·2^(levels−1). In training mode the codebooks
        follow the batch, and `level_dropout` applies.

        Raises:
            ValueError: the pictures have another shape or are not floating.
        """
        self._check_pictures(x)
        above, quantized = self._quantize(x)
        if self.training and self.level_dropout > 0.0 and self.levels > 1:
            above = self._drop_levels(above)
        reconstruction = (self.decoder(torch.cat(above, dim=1)) + 1.0) / 2.0
        reconstruction_loss = F.mse_loss(reconstruction.float(), x.float())
        commitment_loss = torch.stack([level.commitment for level in quantized]).sum()
        codebook_loss = torch.stack([level.codebook for level in quantized]).sum()
        loss = (
            reconstruction_loss / self.data_variance
            + codebook_loss
            + self.commitment_weight * commitment_loss
        )
        return VQVAEOutput(
            reconstruction,
            [level.indices for level in quantized],
            reconstruction_loss,
            commitment_loss,
            codebook_loss,
            torch.stack([level.perplexity for level in quantized]),
            loss,
            torch.stack([level.usage for level in quantized]),
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """Codes of pictures (B, C, H, W): L × (B, h, w) int64, top level first.

        Leaves the codebooks alone, in training mode too. A code is −1 where the encoder's output
        is not finite.
        """
        self._check_pictures(x)
        _, quantized = self._quantize(x, freeze=True)
        return [level.indices for level in quantized]

    @torch.no_grad()
    def decode_codes(self, codes: Sequence[Tensor], levels: int | None = None) -> Tensor:
        """Pictures (B, C, H, W), about 0…1 (not clamped), of codes.

        Args:
            codes: (B, h, w) integers in 0 … num_codes − 1 per level, top first, each level twice
                the height and width of the one before.
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
            q = q.permute(0, 3, 1, 2).to(next(self.decoder.parameters()).dtype)
            maps.append(self._to_bottom(q, level))
        for level in reversed(range(self.levels - used)):
            maps.append(self._mean_map(level, maps[0]).expand_as(maps[0]))
        picture: Tensor = (self.decoder(torch.cat(maps, dim=1)) + 1.0) / 2.0
        return picture

    def _quantize(
        self, x: Tensor, freeze: bool = False
    ) -> tuple[list[Tensor], list[CodebookOutput]]:
        """Quantized maps at the bottom resolution, and each level's codes as maps; top first."""
        features: list[Tensor] = []
        h = 2.0 * x - 1.0
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
            batch, dim, height, width = z.shape
            out = self.codebooks[level](z.permute(0, 2, 3, 1).reshape(-1, dim), freeze=freeze)
            outputs.append(out._replace(indices=out.indices.view(batch, height, width)))
            q = out.quantized.view(batch, height, width, dim).permute(0, 3, 1, 2)
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
        """(1, D, H, W) as `like`: the mean code of `level` in every place.

        The mean weights the codes by their running counts.
        """
        codebook = self._codebook(level)
        weight = codebook.cluster_size[0] / codebook.cluster_size[0].sum()
        mean = (weight @ codebook.embed[0].detach()).to(like.dtype)
        height, width = like.shape[2] >> level, like.shape[3] >> level
        return self._to_bottom(mean.view(1, -1, 1, 1).expand(-1, -1, height, width), level)

    def _drop_levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Replace the lower levels of some examples by mean maps; maps top first, all at bottom."""
        batch, device = maps[0].shape[0], maps[0].device
        dropped = torch.rand(batch, device=device) < self.level_dropout
        kept = torch.randint(1, self.levels, (batch,), device=device)
        result = maps[:1]
        for position in range(1, self.levels):
            absent = (dropped & (kept <= position))[:, None, None, None]
            fill = self._mean_map(self.levels - 1 - position, maps[position])
            result.append(torch.where(absent, fill, maps[position]))
        return result

    def _check_pictures(self, x: Tensor) -> None:
        name = type(self).__name__
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
        if codes.dim() != 3 or codes.is_floating_point() or codes.is_complex():
            raise ValueError(
                f"{name}: codes[{position}] must be integers (B, h, w); "
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
    """VQ-VAE: one level of codes, `downsample` times coarser than the picture.

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
        )


def _encoder(
    in_channels: int, hidden: int, residual: int, num_blocks: int, stride: int
) -> nn.Sequential:
    """Pictures or features → (B, hidden, H/stride, W/stride): halvings, 3×3, residual blocks."""
    halvings = stride.bit_length() - 1
    widths = [in_channels, hidden // 2] + [hidden] * (halvings - 1)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    layers.append(nn.Conv2d(widths[-1], hidden, 3, padding=1))
    return nn.Sequential(*layers, ResidualStack(hidden, residual, num_blocks))


def _decoder(
    in_channels: int, out_channels: int, hidden: int, residual: int, num_blocks: int, stride: int
) -> nn.Sequential:
    """Code maps → (B, out_channels, H·stride, W·stride): the encoder's mirror image."""
    doublings = stride.bit_length() - 1
    last = [hidden // 2] if doublings > 1 else []
    widths = [hidden] * max(doublings - 1, 1) + [*last, out_channels]
    layers: list[nn.Module] = [nn.Conv2d(in_channels, hidden, 3, padding=1)]
    layers.append(ResidualStack(hidden, residual, num_blocks))
    for before, after in itertools.pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _doubled(shape: torch.Size) -> torch.Size:
    """The shape (B, h, w) one level further down."""
    return torch.Size((shape[0], 2 * shape[1], 2 * shape[2]))
