"""`SimVQ`, a drop-in for the module of that name in vector-quantize-pytorch.

Lives here: a frozen codebook seen through a learned transform. The search and the losses are ops;
several SimVQs on each other's residuals are `residual_sim_vq.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq import ops
from fastvq.ops.checks import check_indices, check_int


def _identity(codes: Tensor) -> Tensor:
    return codes


class SimVQ(nn.Module):
    """Nearest codes in a transformed codebook: the codes stay, the transform learns.

        e[k] = T(c[k]),   index[n] = argmin_k ‖x[n] − e[k]‖²,   quantized[n] = e[index[n]]
        loss = w · (mean ‖sg[x] − e‖² + v · mean ‖x − sg[e]‖²)

    Every code moves with T, also those that no vector chose. Means divide by the vectors that have
    a code, times channels; the loss is the same in training and evaluation. The gradient of
    `quantized` to x is the rotation trick's, or straight-through; the loss alone teaches T. Indices
    are exact for the codes as T gives them. A vector that is not finite gets index −1 and NaN, and
    has no part in the loss.

    Args:
        dim: channels of x and of a transformed code.
        codebook_size: K.
        codebook_transform: T; a linear map without bias if None.
        init_fn: applied to the frozen codes, which are normal with deviation dim^(−½).
        channel_first: x is (B, dim, …), else (B, …, dim).
        rotation_trick: else straight-through.
        input_to_quantize_commit_loss_weight: v.
        commitment_weight: w.
        frozen_codebook_dim: channels of a frozen code; `dim` if None.
    Raises:
        ValueError: x has another number of channels.
    Zhu et al. 2024, arXiv:2411.02038, eq. 5–6. Rotation: Fifty et al. 2024, arXiv:2410.06424.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = _identity,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_int("SimVQ", "dim", dim)
        check_int("SimVQ", "codebook_size", codebook_size)
        self.dim, self.codebook_size = dim, codebook_size
        self.channel_first = channel_first
        width = dim if frozen_codebook_dim is None else frozen_codebook_dim
        frozen = init_fn(torch.randn(codebook_size, width) * width**-0.5)
        if codebook_transform is None:
            codebook_transform = nn.Linear(width, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", frozen)
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}"

    @property
    def codebook(self) -> Tensor:
        """(K, dim): the transformed codes, with their graph."""
        codes: Tensor = self.code_transform(self.frozen_codebook)
        return codes

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What `forward` makes of indices (B, …), in x's layout; zeros for −1."""
        check_indices("SimVQ.indices_to_codes", "indices", indices, self.codebook_size)
        frozen = F.embedding(indices.clamp(min=0), self.frozen_codebook)
        codes = torch.where((indices >= 0)[..., None], self.code_transform(frozen), 0.0)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize (B, …, dim), or (B, dim, …) with `channel_first`.

        Returns:
            quantized, in x's shape and dtype; indices, int64 in x's shape without its channels;
            loss (), float32.
        """
        rows = x.movedim(1, -1) if self.channel_first else x
        if rows.shape[-1] != self.dim:
            raise ValueError(
                f"SimVQ: x must have {self.dim} channels in dimension "
                f"{1 if self.channel_first else -1}; got {tuple(x.shape)}."
            )
        out = ops.vector_quantize(
            rows.reshape(-1, self.dim),
            self.codebook,
            gradient="rotation" if self.rotation_trick else "straight_through",
        )
        found = out.indices >= 0
        terms = out.codebook + self.input_to_quantize_commit_loss_weight * out.commitment
        mean = torch.where(found, terms, 0.0).sum() / (found.sum() * self.dim).clamp(min=1)
        quantized = out.quantized.to(x.dtype).reshape(rows.shape)
        if self.channel_first:
            quantized = quantized.movedim(-1, 1)
        return quantized, out.indices.reshape(rows.shape[:-1]), mean * self.commitment_weight
