"""taming-transformers: `VectorQuantizer` and `VectorQuantizer2`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import index_remap
from .adapter import Host, Unsupported, adopt, check_embedding
from .rows import QuantizedRows, code_rows, quantize_rows


def quantize_map(z: Tensor, codes: Tensor) -> tuple[Tensor, QuantizedRows]:
    """A map z (B, D, H, W) → its quantized map, contiguous, and what its rows gave."""
    batch, dim, height, width = z.shape
    out = quantize_rows(z.permute(0, 2, 3, 1).reshape(-1, dim), codes)
    quantized = out.quantized.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
    return quantized, out


def codebook_entry(codes: Tensor, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Code rows; as a map (B, D, H, W) where `shape` is (B, H, W, D)."""
    rows = code_rows(codes, indices)
    return rows if shape is None else rows.view(shape).permute(0, 3, 1, 2).contiguous()


class VectorQuantizer(nn.Module):
    """`VectorQuantizer` of taming-transformers.

    Its third result holds a dense one-hot map (N, n_e), which is made here too: it is the one
    thing of that size.
    """

    n_e: int
    e_dim: int
    beta: float
    embedding: nn.Embedding

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """z (B, e_dim, H, W) → z_q, loss (), (perplexity (), one-hot (N, n_e), indices (N, 1)).

        loss = mean ‖sg[q] − z‖² + beta · mean ‖q − sg[z]‖², means per channel: `beta` is on the
        codebook term, as there.
        """
        z_q, out = quantize_map(z, self.embedding.weight)
        loss = out.commitment + self.beta * out.codebook
        one_hot = z.new_zeros(len(out.indices), self.n_e)
        found = (out.indices >= 0).to(z.dtype)[:, None]
        one_hot.scatter_(1, out.indices.clamp(min=0)[:, None], found)
        share = one_hot.mean(dim=0)
        perplexity = torch.exp(-(share * torch.log(share + 1e-10)).sum())
        return z_q, loss, (perplexity, one_hot, out.indices[:, None])

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes of indices (N,); with `shape` (B, H, W, D) as a map (B, D, H, W)."""
        return codebook_entry(self.embedding.weight, indices, shape)


class VectorQuantizer2(nn.Module):
    """`VectorQuantizer2` of taming-transformers, and the same class under other names.

    loss = a · mean ‖sg[q] − z‖² + b · mean ‖q − sg[z]‖², means per channel, with (a, b) =
    (1, beta) where `legacy` is set, which is that library's default, else (beta, 1).
    """

    n_e: int
    beta: float
    legacy: bool
    embedding: nn.Embedding
    remap: Any
    used: Tensor
    re_embed: int
    unknown_index: int | str
    sane_index_shape: bool

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, D, H, W) → z_q, loss (), (None, None, indices).

        Indices are (N,); (N, 1) where they are remapped; (B, H, W) with `sane_index_shape`.

        Raises:
            ValueError: one of the last three arguments, which are there for another class, is set.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError(
                "VectorQuantizer2: temp, rescale_logits and return_logits must be left at "
                "their defaults; they are arguments of a Gumbel quantizer."
            )
        return self._quantize(z)

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        z_q, out = quantize_map(z, self.embedding.weight)
        if self.legacy:
            loss = out.commitment + self.beta * out.codebook
        else:
            loss = self.beta * out.commitment + out.codebook
        indices = out.indices
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[0], *z.shape[2:])
        return z_q, loss, (None, None, indices)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """(B, ...) indices of codes → positions in `used`."""
        return index_remap.remap_to_used(inds, self.used, self.re_embed, self.unknown_index)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """(B, ...) positions in `used` → indices of codes."""
        return index_remap.unmap_to_all(inds, self.used, self.re_embed)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes of indices (N,); with `shape` (B, H, W, D) as a map (B, D, H, W)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(-1))
        return codebook_entry(self.embedding.weight, indices, shape)


def _adapt(host: Any) -> VectorQuantizer:
    check_embedding(host.embedding, host.n_e, host.e_dim)
    return adopt(VectorQuantizer, host)


def _adapt2(host: Any) -> VectorQuantizer2:
    check_embedding(host.embedding, host.n_e, host.e_dim)
    return adopt(VectorQuantizer2, host)


def _no_gumbel(host: Any) -> nn.Module:
    raise Unsupported("a Gumbel quantizer has no nearest code, and no equivalent here")


def probe_map(host: Any) -> tuple[Tensor]:
    """A map (B, D, H, W)."""
    return (torch.randn(2, host.embedding.weight.shape[1], 3, 2, dtype=torch.float64),)


def fill_embedding(host: Any) -> None:
    """Random codes."""
    host.embedding.weight.normal_()


_ATTRIBUTES = frozenset({"n_e", "e_dim", "beta", "embedding"})
_ATTRIBUTES2 = _ATTRIBUTES | {"legacy", "remap", "re_embed", "sane_index_shape"}
_LLAMAGEN = frozenset({"entropy_loss_ratio", "l2_norm", "show_usage"})
_MODULES = ("taming.modules.vqvae.quantize",)

HOSTS = (
    Host(
        library="taming-transformers",
        class_name="VectorQuantizer",
        modules=_MODULES,
        attributes=_ATTRIBUTES,
        without=_LLAMAGEN | {"legacy"},
        bypassed=("embedding",),
        adapt=_adapt,
        probe=probe_map,
        fill=fill_embedding,
    ),
    *(
        Host(
            library="taming-transformers",
            class_name=class_name,
            modules=_MODULES,
            attributes=_ATTRIBUTES2,
            without=frozenset(),
            bypassed=("embedding",),
            adapt=_adapt2,
            probe=probe_map,
            fill=fill_embedding,
        )
        for class_name in ("VectorQuantizer2", "VectorQuantizer")
    ),
    Host(
        library="taming-transformers",
        class_name="GumbelQuantize",
        modules=_MODULES,
        attributes=frozenset({"embedding_dim", "n_embed", "kl_weight", "proj", "embed"}),
        without=frozenset(),
        bypassed=(),
        adapt=_no_gumbel,
        probe=probe_map,
        fill=fill_embedding,
    ),
)
