"""`FSQ`, a drop-in for the module of that name in vector-quantize-pytorch.

Lives here: finite scalar quantization with its indices, projections and layouts. The levels are
`scalar_levels.py`; several FSQs on each other's residuals are `residual_fsq.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastvq.ops.checks import check_indices

from .finite_rows import linear_projections, projected
from .scalar_levels import ScalarLevels

# Sums of integers up to this are exact in float32.
_FLOAT32_INTEGERS = 2**24


class FSQ(nn.Module):
    """Round every channel to one of a few levels; the codebook is their product, never searched.

        b(z) = h·tanh(z + s) − o,   ẑ = round(b(z)) / ⌊L/2⌋
        index = Σ_d (round(b(z_d)) + ⌊L_d/2⌋) · Π_{d' < d} L_{d'}

    L is a channel's number of levels, h = (L−1)(1+ε)/2 with ε = 1e-3, o = ½ for even L and else 0,
    s = atanh(o/h). With `preserve_symmetry` instead, levels lie evenly on −1 … 1:

        ẑ = 2/(L−1) · ⌊(L−1)(tanh(z)+1)/2 + ½⌋ − 1

    With `bound_hard_clamp`, clamping to −1 … 1 takes the place of tanh (and s = o/h). The gradient
    is straight-through: that of the expression without its rounding.

    A channel's level is found by comparing z with the places where the rounded expression steps,
    computed in float64. It is the level of exact arithmetic, the same on every device, where
    float32 tanh can fall on either side of a step. A vector that holds NaN gets index −1 and NaN in
    the channels that held it (all of them behind a projection); ±Inf is the last level.

    Args:
        levels: L of each channel of a code, ≥ 2 (2 needs `preserve_symmetry`).
        dim: channels of x; `len(levels) · num_codebooks` if None, else projected linearly.
        num_codebooks: codes per vector, from as many slices of its channels.
        keep_num_codebooks_dim: give indices a last dimension of num_codebooks; None: if it is > 1.
        scale: kept as an attribute, without effect, as in that library.
        allowed_dtypes: dtypes that are quantized as they are; others go through float32.
        channel_first: x is (B, dim, …); always so for four dimensions or more.
        projection_has_bias: of both projections.
        return_indices: False gives None for the indices.
        force_quantization_f32: False leaves half-precision codes in their dtype throughout.
        preserve_symmetry, bound_hard_clamp: as above.
        noise_dropout: in training, probability of adding uniform noise in ±½ to a channel of the
            code (clamped to −1 … 1); needs `preserve_symmetry`. That library draws with ½ whatever
            the probability.
        orthogonal_rotation: rotate codes by a fixed random orthogonal matrix.
    Raises:
        ValueError: levels or arguments that exclude another.
    Mentzer et al. 2023, arXiv:2309.15505, sec. 3.1 and appendix A.1. Symmetry and noise: Parker et
    al. 2024, arXiv:2411.19842, sec. 3.2.
    """

    _levels: Tensor
    _basis: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        levels = [int(level) for level in levels]
        least = 2 if preserve_symmetry else 3
        if not levels or min(levels) < least:
            raise ValueError(
                f"FSQ: levels must be at least {least}"
                f"{'' if preserve_symmetry else ' (2 with preserve_symmetry=True)'}; got {levels}."
            )
        if noise_dropout > 0.0 and not preserve_symmetry:
            raise ValueError(
                f"FSQ: noise_dropout needs preserve_symmetry=True; got noise_dropout="
                f"{noise_dropout} without it."
            )
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        if num_codebooks > 1 and not keep:
            raise ValueError(
                f"FSQ: keep_num_codebooks_dim=False needs num_codebooks=1; got {num_codebooks}."
            )
        self.scale = scale
        self.preserve_symmetry, self.bound_hard_clamp = preserve_symmetry, bound_hard_clamp
        self.noise_dropout = noise_dropout
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.effective_codebook_dim = len(levels) * num_codebooks
        self.keep_num_codebooks_dim = keep
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.channel_first = channel_first
        self.return_indices = return_indices
        self.allowed_dtypes = allowed_dtypes
        self.force_quantization_f32 = force_quantization_f32
        self.codebook_size = math.prod(levels)
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in, self.project_out = linear_projections(
            self.dim, self.effective_codebook_dim, self.has_projections, projection_has_bias
        )
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        basis_dtype = torch.int32 if self.codebook_size <= 2**31 else torch.int64
        self.register_buffer("_basis", torch.tensor(basis, dtype=basis_dtype), persistent=False)
        self._snap = ScalarLevels(levels, preserve_symmetry, bound_hard_clamp)
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            rotation = torch.empty(self.codebook_dim, self.codebook_dim)
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(rotation))

    def extra_repr(self) -> str:
        return f"levels={self._levels.tolist()}, dim={self.dim}, codebooks={self.num_codebooks}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FSQ:
        """Follow device moves and casts; the levels' constants keep their dtypes."""
        super()._apply(fn, recurse)
        self._snap.to(self._levels.device)
        return self

    @property
    def implicit_codebook(self) -> Tensor:
        """(codebook_size, codebook_dim) float32: the code of every index, made anew."""
        return self._indices_to_codes(torch.arange(self.codebook_size, device=self._levels.device))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize (B, N, dim), (B, dim, …) with `channel_first`, or a map (B, dim, H, W, …).

        Returns:
            the quantized z, in its shape and dtype, and indices, int32 (int64 where codebook_size
            is above 2³¹), in z's shape without its channels, with a last dimension `num_codebooks`
            where it is kept; or None without `return_indices`.
        Raises:
            ValueError: z has another number of channels.
        """
        first = self.channel_first or z.dim() >= 4
        rows = z.movedim(1, -1) if first else z
        if rows.shape[-1] != self.dim:
            raise ValueError(
                f"FSQ: z must have {self.dim} channels in dimension {1 if first else -1}; "
                f"got {tuple(z.shape)}."
            )
        rows = projected(self.project_in, rows)
        dtype = rows.dtype
        if self.force_quantization_f32 and dtype not in self.allowed_dtypes:
            rows = rows.float()
        channels, index = self._quantized(self._channels(rows))
        out = projected(self.project_out, self._rows(channels, rows).to(dtype))
        if first:
            out = out.movedim(-1, 1)
        if not self.return_indices:
            return out, None
        last = (self.num_codebooks,) if self.keep_num_codebooks_dim else ()
        return out, index.reshape(*rows.shape[:-1], *last)

    def _quantized(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of channels (d, N), rotated there and back where asked for, and indices (N,)."""
        if self.orthogonal_rotation:
            rotation = self.orthogonal_rot.to(channels.dtype)
            channels = (channels.t() @ rotation).t().contiguous()
        codes, level = self._snap(channels)
        index = self._index(level)
        if self.training and self.noise_dropout > 0.0:
            codes = self.maybe_apply_noise(codes.t().contiguous()).t()
        if self.orthogonal_rotation:
            codes = (codes.t() @ rotation.t()).t()
        return codes, index

    def quantize(self, z: Tensor) -> Tensor:
        """The code of z (…, codebook_dim), with the straight-through gradient to z."""
        return self._rows(self._snap(self._channels(z))[0], z)

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """`quantize` by the first expression, whatever `preserve_symmetry` says; eps is its ε."""
        snap = ScalarLevels(self._levels.tolist(), False, hard_clamp, eps)
        snap.to(z.device)
        return self._rows(snap(self._channels(z))[0], z)

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """`quantize` by the second expression, whatever `preserve_symmetry` says."""
        snap = ScalarLevels(self._levels.tolist(), True, hard_clamp)
        snap.to(z.device)
        return self._rows(snap(self._channels(z))[0], z)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """Codes with the noise of `noise_dropout` added, in training."""
        if not self.training or self.noise_dropout == 0.0:
            return bounded_z
        noisy = torch.empty_like(bounded_z).bernoulli_(self.noise_dropout).bool()
        noise = torch.rand_like(bounded_z) - 0.5
        return torch.where(noisy, bounded_z + noise, bounded_z).clamp(-1.0, 1.0)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """(…) indices of codes (…, codebook_dim); −1 where a code holds NaN."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(
                f"FSQ.codes_to_indices: codes must have {self.codebook_dim} channels; "
                f"got {tuple(zhat.shape)}."
            )
        level = self._scale_and_shift(zhat.to(torch.promote_types(zhat.dtype, torch.float32)))
        return self._index(self._channels(level).round()).reshape(zhat.shape[:-1])

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """(…, codebook_dim): the level, from 0, of every channel of the code of each index."""
        return (indices[..., None] // self._basis) % self._levels

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What `forward` makes of these indices, in z's layout; codes of zeros for −1."""
        image = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        codes = self._indices_to_codes(indices)
        dtype = next((p.dtype for p in self.project_out.parameters()), codes.dtype)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.t().to(codes.dtype)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        out: Tensor = self.project_out(codes.to(dtype))
        return out.movedim(-1, 1) if image or self.channel_first else out

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        check_indices("FSQ.indices_to_codes", "indices", indices, self.codebook_size)
        codes = self._scale_and_shift_inverse(self.indices_to_level_indices(indices))
        return torch.where((indices >= 0)[..., None], codes, 0.0)

    def _scale_and_shift(self, zhat_normalized: Tensor) -> Tensor:
        """The level, from 0, of a code's channels."""
        if self.preserve_symmetry:
            return (zhat_normalized + 1.0) / (2.0 / (self._levels - 1))
        half = self._levels // 2
        return zhat_normalized * half + half

    def _scale_and_shift_inverse(self, zhat: Tensor) -> Tensor:
        if self.preserve_symmetry:
            return zhat * (2.0 / (self._levels - 1)) - 1.0
        half = self._levels // 2
        return (zhat - half) / half

    def _channels(self, z: Tensor) -> Tensor:
        """z (…, d) as (d, N): long rows, so that what belongs to a channel is one number each."""
        return z.reshape(-1, self.codebook_dim).t().contiguous()

    def _rows(self, channels: Tensor, z: Tensor) -> Tensor:
        return channels.t().contiguous().reshape(z.shape)

    def _index(self, level: Tensor) -> Tensor:
        """(N,) from levels (d, N), floating point; −1 where one is NaN."""
        if self.codebook_size <= _FLOAT32_INTEGERS:
            index = (level * self._basis[:, None]).sum(dim=0)
            return index.nan_to_num_(nan=-1.0).to(self._basis.dtype)
        whole = level.nan_to_num().long() * self._basis[:, None]
        index = whole.sum(dim=0, dtype=self._basis.dtype)
        return torch.where(level.isnan().any(dim=0), -1, index)
