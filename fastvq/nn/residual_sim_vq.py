"""`ResidualSimVQ`, a drop-in for the module of that name in vector-quantize-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq.ops.checks import check_indices
from fastvq.ops.code_statistics import rows_of_codes

from .residual_levels import ResidualLevels
from .sim_vq import SimVQ


class ResidualSimVQ(ResidualLevels[SimVQ]):
    """SimVQs in turn, each on what those before it left.

        r₀ = x;   c_q = SimVQ_q(r_q);   r_{q+1} = r_q − sg[c_q];   quantized = Σ_q c_q

    Each level sends its own gradient to x.

    Args:
        dim: channels of x.
        num_quantizers: Q.
        codebook_size: K of every level.
        heads: must be 1.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: see
            `ResidualLevels`.
        channel_first: x is (B, dim, …), else (B, …, dim).
        rotation_trick: else straight-through.
        sim_vq_kwargs: further arguments of `SimVQ`. A `codebook_transform` is shared by all levels.
    Raises:
        ValueError: an argument out of its range.
    Zhu et al. 2024, arXiv:2411.02038; Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__(
            num_quantizers,
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        if heads != 1:
            raise ValueError(f"ResidualSimVQ: heads must be 1; got {heads}.")
        self.channel_first = channel_first
        self.layers = nn.ModuleList(
            SimVQ(
                dim=dim,
                codebook_size=codebook_size,
                rotation_trick=rotation_trick,
                channel_first=channel_first,
                **sim_vq_kwargs,
            )
            for _ in range(num_quantizers)
        )

    @property
    def codebook_size(self) -> int:
        return self._layer(0).codebook_size

    @property
    def codebook_dim(self) -> int:
        return self._layer(0).dim

    @property
    def codebooks(self) -> Tensor:
        """(Q, K, dim): the transformed codes, with their graph."""
        return torch.stack([self._layer(q).codebook for q in range(self.num_quantizers)])

    def _level_codes(self, level: int, indices: Tensor) -> Tensor:
        layer = self._layer(level)
        check_indices(
            "ResidualSimVQ.get_codes_from_indices", "indices", indices, layer.codebook_size
        )
        return rows_of_codes(layer.codebook, indices)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """(Q, B, …, dim), or (Q, B, dim, …) with `channel_first`, for indices (B, …, Q)."""
        codes = super().get_codes_from_indices(indices)
        return codes.movedim(-1, 2) if self.channel_first else codes

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize (B, …, dim), or (B, dim, …) with `channel_first`.

        Args:
            return_all_codes: also return every level's codes.
            rand_quantize_dropout_fixed_seed: of quantizer dropout; None draws one.
        Returns:
            quantized, in x's shape and dtype; indices (B, …, Q) int64; losses (Q,).
        """
        depth = self._depth(rand_quantize_dropout_fixed_seed, x.device, dropout=True)
        residual = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        quantized = torch.zeros_like(residual)
        levels, losses = [], []
        for layer in list(self.layers)[:depth]:
            codes, index, loss = layer(residual)
            residual = residual - codes.detach()
            quantized = quantized + codes
            levels.append(index)
            losses.append(loss)
        dropped = self.num_quantizers - depth
        indices = torch.stack(levels + [torch.full_like(levels[0], -1)] * dropped, dim=-1)
        loss = torch.stack(losses + [torch.zeros_like(losses[0])] * dropped, dim=-1)
        out = quantized.to(x.dtype)
        if not return_all_codes:
            return out, indices, loss
        return out, indices, loss, self.get_codes_from_indices(indices)
