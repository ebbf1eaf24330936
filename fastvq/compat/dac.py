"""Descript Audio Codec: `VectorQuantize`.

`ResidualVectorQuantize` is left as it is: it runs on the quantizers put into it, and the
projections between its levels keep them apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq import ops

from .adapter import Host, adopt, check_embedding
from .rows import code_rows


class VectorQuantize(nn.Module):
    """`VectorQuantize` of DAC: the code nearest in direction, between two projections.

        index[n] = argmin_k ‖z[n]/|z[n]| − c[k]/|c[k]|‖²,   z_q[n] = c[index[n]]

    The lengths are divided out in the input's precision, and the index is exact for the result.
    """

    codebook_size: int
    codebook_dim: int
    in_proj: nn.Module
    out_proj: nn.Module
    codebook: nn.Embedding

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z (B, D, T) → z_q (B, D, T), commitment (B,), codebook (B,), indices (B, T), z_e.

        z_e (B, codebook_dim, T) is z projected in; both losses are mean squares over its channels
        and steps.
        """
        z_e = self.in_proj(z)
        z_q, indices = self.decode_latents(z_e)
        commitment = F.mse_loss(z_e, z_q.detach(), reduction="none").mean([1, 2])
        codebook = F.mse_loss(z_q, z_e.detach(), reduction="none").mean([1, 2])
        z_q = self.out_proj(z_e + (z_q - z_e).detach())
        return z_q, commitment, codebook, indices, z_e

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Indices (B, T) → code rows (B, T, codebook_dim)."""
        return code_rows(self.codebook.weight, embed_id)

    def decode_code(self, embed_id: Tensor) -> Tensor:
        """Indices (B, T) → code rows as (B, codebook_dim, T)."""
        return self.embed_code(embed_id).transpose(1, 2)

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, codebook_dim, T) → their codes in the same layout, and indices (B, T)."""
        batch, dim, steps = latents.shape
        rows = F.normalize(latents.detach().transpose(1, 2).reshape(-1, dim))
        indices = ops.nearest_code(rows, F.normalize(self.codebook.weight.detach()))
        indices = indices.view(batch, steps)
        return self.decode_code(indices), indices


def _adapt(host: Any) -> VectorQuantize:
    check_embedding(host.codebook, host.codebook_size, host.codebook_dim)
    return adopt(VectorQuantize, host)


def _probe(host: Any) -> tuple[Tensor]:
    weight = host.in_proj.weight
    return (torch.randn(2, weight.shape[1], 5, dtype=torch.float64),)


def _fill(host: Any) -> None:
    host.codebook.weight.normal_()


HOSTS = (
    Host(
        library="descript-audio-codec",
        class_name="VectorQuantize",
        modules=("dac.nn.quantize",),
        attributes=frozenset({"codebook_size", "codebook_dim", "in_proj", "out_proj", "codebook"}),
        without=frozenset({"_codebook"}),
        bypassed=("codebook",),
        adapt=_adapt,
        probe=_probe,
        fill=_fill,
    ),
)
