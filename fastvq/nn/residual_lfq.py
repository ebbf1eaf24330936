"""`ResidualLFQ` and `GroupedResidualLFQ`, drop-ins for those of vector-quantize-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .finite_rows import linear_projections, projected
from .lfq import LFQ
from .precision import without_autocast
from .residual_levels import ResidualGroups, ResidualLevels


class ResidualLFQ(ResidualLevels[LFQ]):
    """Lookup-free quantizers in turn, each with codes half the size of those before.

        r₀ = project_in(x);   c_q = LFQ(r_q) with codes {−2^(−q), 2^(−q)}^d;   r_{q+1} = r_q − c_q
        quantized = project_out(Σ_q c_q)

    Each level sends its own straight-through gradient to x: Q levels add up to Q times the
    gradient.

    Args:
        dim: channels of x, projected linearly where it is not log2(codebook_size).
        num_quantizers: Q.
        codebook_size: 2^d, of every level.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: see
            `ResidualLevels`.
        soft_clamp_input_value: of the first level; halved for each next.
        kwargs: further arguments of `LFQ`.
    Raises:
        ValueError: an argument out of its range, or arguments that exclude another.
    Yu et al. 2023, arXiv:2310.05737; Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_quantizers,
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        width = codebook_size.bit_length() - 1
        self.has_projections = dim != width
        self.project_in, self.project_out = linear_projections(dim, width, self.has_projections)
        clamp = soft_clamp_input_value
        self.layers = nn.ModuleList(
            LFQ(
                dim=width,
                codebook_scale=2.0**-level,
                soft_clamp_input_value=None if clamp is None else clamp * 2.0**-level,
                **kwargs,
            )
            for level in range(num_quantizers)
        )
        if self._layer(0).has_projections:
            raise ValueError(
                "ResidualLFQ: num_codebooks must be 1 and has_projections not True; got "
                f"num_codebooks={self._layer(0).num_codebooks}. Use GroupedResidualLFQ."
            )

    @property
    def codebooks(self) -> Tensor:
        """(Q, codebook_size, d)."""
        return torch.stack([self._layer(q).codebook for q in range(self.num_quantizers)])

    def _level_codes(self, level: int, indices: Tensor) -> Tensor:
        layer = self._layer(level)
        flat = indices.reshape(1, -1, *([1] * layer.keep_num_codebooks_dim))
        codes = layer.indices_to_codes(flat, project_out=False)
        if layer.channel_first:
            codes = codes.movedim(1, -1)
        return codes.reshape(*indices.shape, -1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize (B, N, dim).

        Args:
            mask: (B, N) bool, True = counts in the losses.
            return_all_codes: also return every level's codes, (Q, B, N, d).
            rand_quantize_dropout_fixed_seed: of quantizer dropout; None draws one.
        Returns:
            quantized, in x's shape and dtype; indices (B, N, Q) int64; losses (Q,).
        """
        rows = projected(self.project_in, x)
        dtype = rows.dtype
        depth = self._depth(rand_quantize_dropout_fixed_seed, x.device, torch.is_grad_enabled())
        with without_autocast(x.device):
            residual = rows if dtype == torch.float64 else rows.float()
            kept, levels, losses = [], [], []
            for layer in list(self.layers)[:depth]:
                codes, index, loss = layer(residual, mask=mask)
                residual = residual - codes.detach()
                kept.append(codes)
                levels.append(index)
                losses.append(loss)
        dropped = self.num_quantizers - depth
        indices = torch.stack(levels + [torch.full_like(levels[0], -1)] * dropped, dim=-1)
        loss = torch.stack(losses + [torch.zeros_like(losses[0])] * dropped, dim=-1)
        out = projected(self.project_out, sum(kept[1:], start=kept[0]).to(dtype))
        if not return_all_codes:
            return out, indices, loss
        return out, indices, loss, self.get_codes_from_indices(indices)


class GroupedResidualLFQ(ResidualGroups):
    """`ResidualLFQ`s side by side, see `ResidualGroups`.

    Args:
        dim: channels of x, a multiple of `groups`.
        groups: how many.
        accept_image_fmap: channels are in dimension 1.
        kwargs: further arguments of `ResidualLFQ`.
    """

    def __init__(
        self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any
    ) -> None:
        def make(width: int) -> ResidualLFQ:
            return ResidualLFQ(dim=width, **kwargs)

        super().__init__(make, dim, groups, accept_image_fmap)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False
    ) -> tuple[Tensor, ...]:
        """As `ResidualLFQ`: indices (groups, …), losses (groups, Q), a tuple of codes."""
        results = self._each(x, mask=mask, return_all_codes=return_all_codes)
        return self._joined(results, return_all_codes)
