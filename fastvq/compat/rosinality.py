"""rosinality/vq-vae-2-pytorch: the quantizer `Quantize`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Host, Unsupported, adopt
from .rows import code_rows, moving_averages, quantize_rows


class Quantize(nn.Module):
    """`Quantize` of rosinality/vq-vae-2-pytorch: EMA codes of vectors in the last dimension.

    Attributes and state: dim, n_embed, decay, eps; buffers embed (dim, n_embed), cluster_size
    (n_embed,), embed_avg (dim, n_embed). With several processes the statistics are summed over
    all, as there.
    """

    dim: int
    n_embed: int
    decay: float
    eps: float
    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., dim) → quantized (..., dim), mean ‖x − sg[q]‖² per channel (), indices (...)."""
        rows = input.reshape(-1, self.dim)
        # A copy: the update below writes into `embed` while the graph may need its present value.
        codes = self.embed.t().clone(memory_format=torch.contiguous_format)
        out = quantize_rows(rows, codes)
        if self.training:
            followed = moving_averages(
                self.cluster_size,
                self.embed_avg.t(),
                rows.detach(),
                out.indices,
                self.decay,
                self.eps,
            )
            self.embed.copy_(followed.t())
        indices = out.indices.view(input.shape[:-1])
        return out.quantized.view(input.shape), out.commitment, indices

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """(...) int64 → (..., dim) code rows."""
        return code_rows(self.embed.t(), embed_id)


def _adapt(host: Any) -> Quantize:
    shape = (host.dim, host.n_embed)
    if host.embed.shape != shape or host.embed_avg.shape != shape:
        raise Unsupported(f"its embed has shape {tuple(host.embed.shape)}, not {shape}")
    if host.cluster_size.shape != shape[1:] or isinstance(host.embed, nn.Parameter):
        raise Unsupported("its state is not that of moving averages")
    return adopt(Quantize, host)


def _fill(host: Any) -> None:
    host.embed.normal_()
    host.embed_avg.copy_(host.embed)
    host.cluster_size.fill_(1.0)


HOSTS = (
    Host(
        library="rosinality/vq-vae-2-pytorch",
        class_name="Quantize",
        modules=("vqvae",),
        attributes=frozenset(
            {"dim", "n_embed", "decay", "eps", "embed", "cluster_size", "embed_avg"}
        ),
        without=frozenset(),
        bypassed=(),
        adapt=_adapt,
        probe=lambda host: (torch.randn(2, 3, 2, host.dim, dtype=torch.float64),),
        fill=_fill,
    ),
)
