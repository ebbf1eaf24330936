"""LlamaGen: the `VectorQuantizer` of its image tokenizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapter import Host, adopt, check_embedding
from .rows import code_rows, quantize_rows
from .taming import fill_embedding, probe_map

_TEMPERATURE = 0.01
# Pairs of a row and a code held at a time by the entropy loss: 2²² float32 are 16 MiB.
_PAIRS_PER_BLOCK = 1 << 22


class VectorQuantizer(nn.Module):
    """`VectorQuantizer` of LlamaGen: rows and codes brought to length one where `l2_norm` is set.

    With `entropy_loss_ratio` 0 the entropy term is a plain 0; otherwise it looks at all pairs of
    rows and codes, a block of rows at a time, and again in the backward pass. The history of
    indices `codebook_used` is a buffer without a gradient.
    """

    n_e: int
    e_dim: int
    beta: float
    entropy_loss_ratio: float
    l2_norm: bool
    show_usage: bool
    embedding: nn.Embedding
    codebook_used: Tensor

    def forward(
        self, z: Tensor
    ) -> tuple[
        Tensor,
        tuple[Tensor | None, Tensor | None, Tensor | None, float],
        tuple[None, None, Tensor],
    ]:
        """z (B, e_dim, H, W) → z_q, (vq, commitment, entropy, usage), (None, None, indices (N,)).

        vq = mean ‖q − sg[z]‖², commitment = beta · mean ‖sg[q] − z‖², means per channel; the
        three losses are None outside training. Usage is the share of codes among the last 65536
        indices, 0 where it is not kept or outside training.
        """
        batch, dim, height, width = z.shape
        rows = z.permute(0, 2, 3, 1).reshape(-1, dim)
        codes = self.embedding.weight
        if self.l2_norm:
            rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
        out = quantize_rows(rows, codes)
        usage: float = 0
        if self.show_usage and self.training:
            usage = self._usage(out.indices)
        vq = commitment = entropy = None
        if self.training:
            vq, commitment = out.codebook, self.beta * out.commitment
            entropy = vq.new_zeros(())
            if self.entropy_loss_ratio != 0.0:
                entropy = self.entropy_loss_ratio * entropy_loss(rows, codes)
        z_q = out.quantized.view(batch, height, width, dim).permute(0, 3, 1, 2)
        return z_q, (vq, commitment, entropy, usage), (None, None, out.indices)

    def _usage(self, indices: Tensor) -> float:
        kept = len(self.codebook_used)
        self.codebook_used.copy_(torch.cat([self.codebook_used, indices])[-kept:])
        return len(self.codebook_used.unique()) / self.n_e

    def get_codebook_entry(
        self,
        indices: Tensor,
        shape: tuple[int, ...] | None = None,
        channel_first: bool = True,
    ) -> Tensor:
        """Codes of indices (N,), of length one with `l2_norm`.

        `shape` is that of the map to return: (B, D, H, W), or (B, H, W, D) without
        `channel_first`; None returns (N, D).
        """
        codes = self.embedding.weight
        if self.l2_norm:
            codes = F.normalize(codes, dim=-1)
        rows = code_rows(codes, indices)
        if shape is None:
            return rows
        if not channel_first:
            return rows.view(shape)
        batch, dim, height, width = shape
        return rows.reshape(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()


def entropy_loss(rows: Tensor, codes: Tensor) -> Tensor:
    """Mean entropy of a row's soft assignment minus that of the mean assignment, in nats.

        p[n, k] = softmax_k(−‖x[n] − c[k]‖² / 0.01)
        loss = mean_n H(p[n]) − H(mean_n p[n]),   H with log(p + 1e-5) in the second

    Args:
        rows: (N, D). codes: (K, D).
    Returns:
        () float32 (float64 if an input is).
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, codes.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        rows, codes = rows.to(dtype), codes.to(dtype)
        block = max(1, _PAIRS_PER_BLOCK // len(codes))
        parts = [
            checkpoint(_assignment_block, part, codes, use_reentrant=False)
            for part in rows.split(block)
        ]
        share = torch.stack([part for part, _ in parts]).sum(dim=0) / max(len(rows), 1)
        entropy = torch.stack([part for _, part in parts]).sum() / max(len(rows), 1)
    return entropy + (share * torch.log(share + 1e-5)).sum()


def _assignment_block(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_n p[n] (K,) and Σ_n H(p[n]) ()."""
    # The ‖x‖² term is constant over k: the softmax does not see it.
    affinity = (2.0 * rows @ codes.T - (codes * codes).sum(dim=1)) / _TEMPERATURE
    log_p = F.log_softmax(affinity, dim=1)
    p = log_p.exp()
    return p.sum(dim=0), -(p * log_p).sum()


def _adapt(host: Any) -> VectorQuantizer:
    check_embedding(host.embedding, host.n_e, host.e_dim)
    adapter = adopt(VectorQuantizer, host)
    if host.show_usage:
        # There it is a parameter among the buffers, which no in-place write may touch.
        adapter.codebook_used = host.codebook_used.detach()
    return adapter


HOSTS = (
    Host(
        library="LlamaGen",
        class_name="VectorQuantizer",
        modules=("tokenizer.tokenizer_image.vq_model",),
        attributes=frozenset(
            {"n_e", "e_dim", "beta", "entropy_loss_ratio", "l2_norm", "show_usage", "embedding"}
        ),
        without=frozenset(),
        bypassed=("embedding",),
        adapt=_adapt,
        probe=probe_map,
        fill=fill_embedding,
    ),
)
