"""diffusers: the `VectorQuantizer` of its VQ autoencoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .adapter import Host, adopt, check_embedding
from .taming import VectorQuantizer2, fill_embedding, probe_map


class VectorQuantizer(VectorQuantizer2):
    """`VectorQuantizer` of diffusers: taming's second one, with `vq_embed_dim` for its width."""

    vq_embed_dim: int

    def forward(  # type: ignore[override]
        self, z: Tensor
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, vq_embed_dim, H, W) → z_q, loss (), (None, None, indices)."""
        return self._quantize(z)


def _adapt(host: Any) -> VectorQuantizer:
    check_embedding(host.embedding, host.n_e, host.vq_embed_dim)
    return adopt(VectorQuantizer, host)


HOSTS = (
    Host(
        library="diffusers",
        class_name="VectorQuantizer",
        modules=("diffusers.models.autoencoders.vae", "diffusers.models.vae"),
        attributes=frozenset(
            {"n_e", "vq_embed_dim", "beta", "legacy", "embedding", "remap", "sane_index_shape"}
        ),
        without=frozenset(),
        bypassed=("embedding",),
        adapt=_adapt,
        probe=probe_map,
        fill=fill_embedding,
    ),
)
