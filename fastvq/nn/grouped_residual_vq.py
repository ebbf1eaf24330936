"""`GroupedResidualVQ`, a drop-in for the module of that name in vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .residual_levels import ResidualGroups
from .residual_vq import ResidualVQ


class GroupedResidualVQ(ResidualGroups):
    """`ResidualVQ`s side by side, each on its own slice of the channels; see `ResidualGroups`.

    Args:
        dim: channels of x, a multiple of `groups`.
        groups: how many.
        accept_image_fmap: x is (B, dim, H, W).
        kwargs: further arguments of `ResidualVQ`.
    Raises:
        ValueError: as `ResidualVQ`, or dim is no multiple of groups.
    Yang et al. 2023, arXiv:2305.02765, sec. 3.
    """

    def __init__(
        self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any
    ) -> None:
        def make(width: int) -> ResidualVQ:
            return ResidualVQ(dim=width, accept_image_fmap=accept_image_fmap, **kwargs)

        super().__init__(make, dim, groups, accept_image_fmap)

    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple:
        """As `ResidualVQ`, with indices (groups, B, …, Q), losses (groups, Q), a tuple of codes.

        Args:
            indices: codes to predict, one tensor a group.
        Returns:
            With `indices`: quantized, and the sum of the groups' cross-entropies.
        """
        given = None if indices is None or len(indices) == 0 else list(indices)
        if given is not None and len(given) != self.groups:
            raise ValueError(
                f"GroupedResidualVQ.forward: indices must hold {self.groups} groups; "
                f"got {len(given)}."
            )
        results = self._each(
            x,
            given,
            return_all_codes=return_all_codes,
            sample_codebook_temp=sample_codebook_temp,
            freeze_codebook=freeze_codebook,
            mask=mask,
        )
        if given is not None:
            quantized, losses = results
            return torch.cat(quantized, dim=self.split_dim), torch.stack(losses).sum()
        return self._joined(results, return_all_codes)
