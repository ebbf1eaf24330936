"""`ResidualFSQ` and `GroupedResidualFSQ`, drop-ins for those of vector-quantize-pytorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .finite_rows import linear_projections, projected
from .fsq import FSQ
from .precision import without_autocast
from .residual_levels import ResidualGroups, ResidualLevels


class ResidualFSQ(ResidualLevels[FSQ]):
    """Finite scalar quantizers in turn, each L times finer than the one before.

        r₀ = clamp(project_in(x));   c_q = FSQ(r_q / s_q) · s_q,   s_q = L^(−q)
        r_{q+1} = r_q − c_q
        quantized = project_out(Σ_q c_q)

    Every FSQ is `preserve_symmetry`. Before the first, inputs are bounded to v·tanh(x/v): v is
    1 + 1/(L−1) with `bound_hard_clamp`, else `soft_clamp_input_value`, or no bound if that is None.
    Residuals are float32 for half-precision x. Each level sends its own straight-through gradient
    to x, so that where nothing is clamped Q levels add up to Q times the gradient.

    Args:
        levels: L of every channel of a code.
        num_quantizers: Q.
        dim: channels of x; `len(levels)` if None, else projected linearly.
        is_channel_first: x is (B, dim, …), else (B, N, dim).
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: see
            `ResidualLevels`.
        soft_clamp_input_value: v, a number or one per channel; excludes `bound_hard_clamp`.
        bound_hard_clamp: the FSQs clamp instead of tanh.
        kwargs: further arguments of `FSQ`.
    Raises:
        ValueError: an argument out of its range, or arguments that exclude another.
    Mentzer et al. 2023, arXiv:2309.15505; Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1.
    """

    scales: Tensor
    soft_clamp_input_value: Tensor | None

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_quantizers,
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        if bound_hard_clamp and soft_clamp_input_value is not None:
            raise ValueError(
                "ResidualFSQ: soft_clamp_input_value needs bound_hard_clamp=False; got "
                f"{soft_clamp_input_value} with bound_hard_clamp=True."
            )
        width = len(levels)
        dim = width if dim is None else dim
        self.has_projections = dim != width
        self.project_in, self.project_out = linear_projections(dim, width, self.has_projections)
        self.is_channel_first = is_channel_first
        self.levels = levels
        self.layers = nn.ModuleList(
            FSQ(
                levels=levels,
                dim=width,
                preserve_symmetry=True,
                bound_hard_clamp=bound_hard_clamp,
                **kwargs,
            )
            for _ in range(num_quantizers)
        )
        if self._layer(0).has_projections:
            raise ValueError(
                "ResidualFSQ: num_codebooks must be 1; got "
                f"{self._layer(0).num_codebooks}. Use GroupedResidualFSQ."
            )
        self.codebook_size = self._layer(0).codebook_size
        counts = torch.tensor(levels, dtype=torch.float32)
        depth = torch.arange(num_quantizers, dtype=torch.float32)
        self.register_buffer("scales", counts ** -depth[:, None], persistent=False)
        bound = soft_clamp_input_value
        if bound_hard_clamp:
            bound = 1 + 1 / (counts - 1)
        elif bound is not None:
            bound = torch.as_tensor(bound, dtype=torch.float32)
        self.register_buffer("soft_clamp_input_value", bound, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualFSQ:
        """Follow device moves and casts, but keep scales and bounds in float32."""
        scales, bound = self.scales, self.soft_clamp_input_value
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        if bound is not None:
            self.soft_clamp_input_value = bound.to(self.scales.device)
        return self

    @property
    def codebooks(self) -> Tensor:
        """(Q, codebook_size, d): the levels' codes before their scale."""
        return torch.stack([self._layer(q).implicit_codebook for q in range(self.num_quantizers)])

    def _level_codes(self, level: int, indices: Tensor) -> Tensor:
        layer = self._layer(level)
        codes = layer._indices_to_codes(indices)
        if layer.orthogonal_rotation:
            codes = codes @ layer.orthogonal_rot.t().to(codes.dtype)
        return codes * self.scales[level]

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize (B, N, dim), or (B, dim, …) with `is_channel_first`.

        Args:
            return_all_codes: also return every level's codes, (Q, B, …, d).
            rand_quantize_dropout_fixed_seed: of quantizer dropout; None draws one.
        Returns:
            quantized, in x's shape and dtype, and indices, int32 (int64 where a level was dropped),
            (B, …, Q), or (B, Q, …) with `is_channel_first`.
        """
        rows = x.movedim(1, -1) if self.is_channel_first else x
        shape = rows.shape[:-1]
        rows = projected(
            self.project_in, rows.reshape(len(rows), math.prod(shape[1:]), rows.shape[-1])
        )
        dtype = rows.dtype
        depth = self._depth(rand_quantize_dropout_fixed_seed, x.device, torch.is_grad_enabled())
        with without_autocast(x.device):
            residual = rows if dtype == torch.float64 else rows.float()
            if self.soft_clamp_input_value is not None:
                bound = self.soft_clamp_input_value
                residual = (residual / bound).tanh() * bound
            # Long rows, a channel each, are what levels are found in.
            residual = self._layer(0)._channels(residual)
            kept, levels = [], []
            for level, scale in enumerate(self.scales[:depth, :, None].unbind()):
                codes, index = self._layer(level)._quantized(residual / scale)
                codes = codes * scale
                residual = residual - codes.detach()
                kept.append(codes)
                levels.append(index)
            quantized = self._layer(0)._rows(sum(kept[1:], start=kept[0]), rows)
        dropped = [torch.full_like(levels[0], -1, dtype=torch.int64)]
        indices = torch.stack(levels + dropped * (self.num_quantizers - depth), dim=-1)
        indices = indices.reshape(*shape, self.num_quantizers)
        out = projected(self.project_out, quantized.to(dtype))
        out = out.reshape(*shape, out.shape[-1])
        all_codes = (self.get_codes_from_indices(indices),) if return_all_codes else ()
        if self.is_channel_first:
            out, indices = out.movedim(-1, 1), indices.movedim(-1, 1)
        return out, indices, *all_codes


class GroupedResidualFSQ(ResidualGroups):
    """`ResidualFSQ`s side by side, see `ResidualGroups`.

    Args:
        dim: channels of x, a multiple of `groups`.
        groups: how many.
        accept_image_fmap: channels are in dimension 1 (give `is_channel_first=True` too).
        kwargs: further arguments of `ResidualFSQ`.
    """

    def __init__(
        self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any
    ) -> None:
        def make(width: int) -> ResidualFSQ:
            return ResidualFSQ(dim=width, **kwargs)

        super().__init__(make, dim, groups, accept_image_fmap)
        self.codebook_size = self.rvqs[0].codebook_size

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple[Tensor, ...]:
        """As `ResidualFSQ`, with indices (groups, …) and a tuple of the groups' codes."""
        results = self._each(x, return_all_codes=return_all_codes)
        return self._joined(results, return_all_codes)
