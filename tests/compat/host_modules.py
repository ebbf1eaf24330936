"""Stand-ins for the modules of other libraries, written from what those do, not from their code.

Names, import paths, attributes, buffers, argument order and return values are the libraries';
the arithmetic is the plain textbook form, all pairs of rows and codes at once. Where a library is
installed, `REAL` has its own class beside the stand-in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_home(module: str) -> Callable[[type], type]:
    """Give a class the import path of the one that it stands in for."""

    def move(cls: type) -> type:
        cls.__module__ = module
        return cls

    return move


def distances(rows: Tensor, codes: Tensor) -> Tensor:
    """(N, K) squared distances in the expanded form that all of these libraries use."""
    return (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * rows @ codes.T


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    return x + (q - x).detach()


def follow(module: Any, rows: Tensor, indices: Tensor, eps: float) -> Tensor:
    """A plain EMA step on cluster_size and embed_avg (K, D) views; returns the codes."""
    one_hot = F.one_hot(indices, len(module.cluster_size)).to(rows.dtype)
    average = module.embed_avg
    sums = one_hot.T @ rows if average.shape[0] == len(module.cluster_size) else rows.T @ one_hot
    module.cluster_size.mul_(module.decay).add_(one_hot.sum(0), alpha=1 - module.decay)
    average.mul_(module.decay).add_(sums, alpha=1 - module.decay)
    total = module.cluster_size.sum()
    return (module.cluster_size + eps) / (total + len(module.cluster_size) * eps) * total


@at_home("vqvae")
class Quantize(nn.Module):
    """rosinality/vq-vae-2-pytorch."""

    def __init__(self, dim: int, n_embed: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = input.reshape(-1, self.dim)
        indices = distances(rows, self.embed.T).argmin(1)
        ids = indices.view(input.shape[:-1])
        q = self.embed_code(ids)
        if self.training:
            with torch.no_grad():
                size = follow(self, rows, indices, self.eps)
                self.embed.copy_(self.embed_avg / size)
        diff = ((q.detach() - input) ** 2).mean()
        return straight_through(input, q), diff, ids

    def embed_code(self, embed_id: Tensor) -> Tensor:
        return F.embedding(embed_id, self.embed.T)


class _EmbeddingQuantizer(nn.Module):
    def __init__(self, n_e: int, dim: int, beta: float) -> None:
        super().__init__()
        self.n_e, self.beta = n_e, beta
        self.embedding = nn.Embedding(n_e, dim)
        nn.init.uniform_(self.embedding.weight, -1.0, 1.0)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map (B, D, H, W) → straight-through map, indices, ‖sg[q]−z‖², ‖q−sg[z]‖² means."""
        last = z.permute(0, 2, 3, 1)
        rows = last.reshape(-1, last.shape[-1])
        indices = distances(rows, self.embedding.weight).argmin(1)
        q = self.embedding(indices).view(last.shape)
        pull_z, pull_q = ((q.detach() - last) ** 2).mean(), ((q - last.detach()) ** 2).mean()
        return straight_through(last, q).permute(0, 3, 1, 2).contiguous(), indices, pull_z, pull_q


@at_home("taming.modules.vqvae.quantize")
class VectorQuantizer(_EmbeddingQuantizer):
    """taming-transformers, the first one."""

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim, beta)
        self.e_dim = e_dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        z_q, indices, pull_z, pull_q = self.quantize(z)
        one_hot = F.one_hot(indices, self.n_e).to(z.dtype)
        share = one_hot.mean(0)
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        return z_q, pull_z + self.beta * pull_q, (perplexity, one_hot, indices.unsqueeze(1))

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        rows = self.embedding(indices)
        return rows if shape is None else rows.view(shape).permute(0, 3, 1, 2).contiguous()


class _Remapping(_EmbeddingQuantizer):
    """What taming's second quantizer and diffusers' have in common."""

    def __init__(
        self,
        n_e: int,
        dim: int,
        beta: float,
        remap: Any = None,
        unknown_index: Any = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, dim, beta)
        self.legacy, self.sane_index_shape, self.remap = legacy, sane_index_shape, remap
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", torch.as_tensor(remap))
            extra = unknown_index == "extra"
            self.re_embed = len(self.used) + int(extra)
            self.unknown_index = len(self.used) if extra else unknown_index

    def remap_to_used(self, inds: Tensor) -> Tensor:
        match = inds.reshape(len(inds), -1, 1) == self.used
        new, unknown = match.long().argmax(-1), ~match.any(-1)
        if self.unknown_index == "random":
            new[unknown] = torch.randint(0, self.re_embed, new[unknown].shape)
        else:
            new[unknown] = self.unknown_index
        return new.reshape(inds.shape)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        inds = inds.clone()
        if self.re_embed > len(self.used):
            inds[inds >= len(self.used)] = 0
        return self.used[inds]

    def run(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        z_q, indices, pull_z, pull_q = self.quantize(z)
        loss = pull_z + self.beta * pull_q if self.legacy else self.beta * pull_z + pull_q
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[0], z.shape[2], z.shape[3])
        return z_q, loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        rows = self.embedding(indices)
        return rows if shape is None else rows.view(shape).permute(0, 3, 1, 2).contiguous()


@at_home("taming.modules.vqvae.quantize")
class VectorQuantizer2(_Remapping):
    """taming-transformers, the second one."""

    def __init__(self, n_e: int, e_dim: int, beta: float, **options: Any) -> None:
        super().__init__(n_e, e_dim, beta, **options)
        self.e_dim = e_dim

    def forward(
        self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> Any:
        return self.run(z)


def _diffusers() -> type:
    @at_home("diffusers.models.autoencoders.vae")
    class VectorQuantizer(_Remapping):
        def __init__(self, n_e: int, vq_embed_dim: int, beta: float, **options: Any) -> None:
            super().__init__(n_e, vq_embed_dim, beta, **options)
            self.vq_embed_dim = vq_embed_dim

        def forward(self, z: Tensor) -> Any:
            return self.run(z)

    return VectorQuantizer


def _llamagen() -> type:
    @at_home("tokenizer.tokenizer_image.vq_model")
    class VectorQuantizer(nn.Module):
        def __init__(
            self,
            n_e: int,
            e_dim: int,
            beta: float,
            entropy_loss_ratio: float,
            l2_norm: bool,
            show_usage: bool,
        ) -> None:
            super().__init__()
            self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
            self.entropy_loss_ratio, self.l2_norm = entropy_loss_ratio, l2_norm
            self.show_usage = show_usage
            self.embedding = nn.Embedding(n_e, e_dim)
            nn.init.uniform_(self.embedding.weight, -1.0, 1.0)
            if show_usage:
                self.register_buffer("codebook_used", nn.Parameter(torch.zeros(65536)))

        def codes(self) -> Tensor:
            weight = self.embedding.weight
            return F.normalize(weight, dim=-1) if self.l2_norm else weight

        def forward(self, z: Tensor) -> Any:
            last = z.permute(0, 2, 3, 1)
            if self.l2_norm:
                last = F.normalize(last, dim=-1)
            rows, codes = last.reshape(-1, self.e_dim), self.codes()
            d = distances(rows, codes)
            indices = d.argmin(1)
            q = codes[indices].view(last.shape)
            usage, losses = 0, (None, None, None)
            if self.training:
                if self.show_usage:
                    with torch.no_grad():
                        seen = torch.cat([self.codebook_used, indices.to(self.codebook_used)])
                        self.codebook_used.copy_(seen[-65536:])
                    usage = len(self.codebook_used.unique()) / self.n_e
                pull_q = ((q - last.detach()) ** 2).mean()
                pull_z = self.beta * ((q.detach() - last) ** 2).mean()
                losses = (pull_q, pull_z, self.entropy_loss_ratio * soft_entropy(-d))
            z_q = straight_through(last, q).permute(0, 3, 1, 2)
            return z_q, (*losses, usage), (None, None, indices)

        def get_codebook_entry(
            self, indices: Tensor, shape: Any = None, channel_first: bool = True
        ) -> Tensor:
            rows = self.codes()[indices]
            if shape is not None and channel_first:
                rows = rows.reshape(shape[0], shape[2], shape[3], shape[1])
                return rows.permute(0, 3, 1, 2).contiguous()
            return rows if shape is None else rows.view(shape)

    return VectorQuantizer


def soft_entropy(affinity: Tensor) -> Tensor:
    """Mean entropy of the rows' soft assignments less that of the mean one; temperature 0.01."""
    p = F.softmax(affinity / 0.01, dim=-1)
    log_p = F.log_softmax(affinity / 0.01 + 1e-5, dim=-1)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


@at_home("encodec.quantization.core_vq")
class EuclideanCodebook(nn.Module):
    """encodec: codes; started by k-means, followed by moving averages."""

    def __init__(
        self, dim: int, codebook_size: int, kmeans_init: bool, kmeans_iters: int = 10
    ) -> None:
        super().__init__()
        self.decay, self.epsilon, self.threshold_ema_dead_code = 0.99, 1e-5, 2
        self.codebook_size, self.kmeans_iters = codebook_size, kmeans_iters
        embed = torch.zeros(codebook_size, dim) if kmeans_init else torch.rand(codebook_size, dim)
        self.register_buffer("inited", torch.tensor([float(not kmeans_init)]))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def start(self, rows: Tensor) -> None:
        centres = rows[torch.randperm(len(rows))[: self.codebook_size]]
        for _ in range(self.kmeans_iters):
            one_hot = F.one_hot(torch.cdist(rows, centres).argmin(1), self.codebook_size)
            counts = one_hot.sum(0)
            means = one_hot.to(rows.dtype).T @ rows / counts.clamp(min=1)[:, None]
            centres = torch.where((counts == 0)[:, None], centres, means)
        self.embed.copy_(centres)
        self.embed_avg.copy_(centres)
        self.cluster_size.copy_(counts)
        self.inited.fill_(1.0)

    def encode(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return distances(rows, self.embed).argmin(1).view(x.shape[:-1])

    def decode(self, embed_ind: Tensor) -> Tensor:
        return F.embedding(embed_ind, self.embed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.detach().reshape(-1, x.shape[-1])
        if not self.inited:
            self.start(rows)
        indices = self.encode(x)
        q = self.decode(indices)
        if self.training:
            if (self.cluster_size < self.threshold_ema_dead_code).any():
                torch.randperm(len(rows))  # rows for expired codes, which are overwritten below
            size = follow(self, rows, indices.view(-1), self.epsilon)
            self.embed.copy_(self.embed_avg / size[:, None])
        return q, indices


@at_home("encodec.quantization.core_vq")
class VectorQuantization(nn.Module):
    """encodec: projections and the commitment loss about a codebook."""

    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        inner = codebook_dim or dim
        self.project_in = nn.Identity() if inner == dim else nn.Linear(dim, inner)
        self.project_out = nn.Identity() if inner == dim else nn.Linear(inner, dim)
        self.commitment_weight, self.codebook_size = 1.0, codebook_size
        self._codebook = EuclideanCodebook(inner, codebook_size, **options)

    @property
    def codebook(self) -> Tensor:
        return self._codebook.embed

    def encode(self, x: Tensor) -> Tensor:
        return self._codebook.encode(self.project_in(x.transpose(1, 2)))

    def decode(self, embed_ind: Tensor) -> Tensor:
        return self.project_out(self._codebook.decode(embed_ind)).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.project_in(x.transpose(1, 2))
        q, indices = self._codebook(x)
        loss = torch.zeros(1, requires_grad=self.training)
        if self.training:
            loss = loss + F.mse_loss(q.detach(), x) * self.commitment_weight
            q = straight_through(x, q)
        return self.project_out(q).transpose(1, 2), indices, loss


@at_home("encodec.quantization.core_vq")
class ResidualVectorQuantization(nn.Module):
    """encodec: a sequence of quantizers, each on what the last one left."""

    def __init__(self, *, num_quantizers: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VectorQuantization(**options) for _ in range(num_quantizers))

    def forward(self, x: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        total, indices, losses = 0.0, [], []
        for layer in self.layers[: n_q or len(self.layers)]:
            q, index, loss = layer(x)
            x, total = x - q, total + q
            indices.append(index)
            losses.append(loss)
        return total, torch.stack(indices), torch.stack(losses)

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        indices = []
        for layer in self.layers[: n_q or len(self.layers)]:
            indices.append(layer.encode(x))
            x = x - layer.decode(indices[-1])
        return torch.stack(indices)

    def decode(self, q_indices: Tensor) -> Tensor:
        return sum(layer.decode(index) for layer, index in zip(self.layers, q_indices))


@at_home("dac.nn.quantize")
class VectorQuantize(nn.Module):
    """Descript Audio Codec: one quantizer, nearest in direction, weight-normed projections."""

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = nn.utils.weight_norm(nn.Conv1d(input_dim, codebook_dim, 1))
        self.out_proj = nn.utils.weight_norm(nn.Conv1d(codebook_dim, input_dim, 1))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        z_e = self.in_proj(z)
        z_q, indices = self.decode_latents(z_e)
        commitment = ((z_e - z_q.detach()) ** 2).mean([1, 2])
        codebook = ((z_q - z_e.detach()) ** 2).mean([1, 2])
        return self.out_proj(straight_through(z_e, z_q)), commitment, codebook, indices, z_e

    def embed_code(self, embed_id: Tensor) -> Tensor:
        return F.embedding(embed_id, self.codebook.weight)

    def decode_code(self, embed_id: Tensor) -> Tensor:
        return self.embed_code(embed_id).transpose(1, 2)

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        rows = F.normalize(latents.transpose(1, 2).reshape(-1, latents.shape[1]))
        indices = distances(rows, F.normalize(self.codebook.weight)).argmin(1)
        indices = indices.view(len(latents), -1)
        return self.decode_code(indices), indices


@at_home("dac.nn.quantize")
class ResidualVectorQuantize(nn.Module):
    """Descript Audio Codec: a sequence of quantizers, with quantizer dropout in training."""

    def __init__(
        self, input_dim: int, n_codebooks: int, codebook_size: int, quantizer_dropout: float
    ) -> None:
        super().__init__()
        self.n_codebooks, self.quantizer_dropout = n_codebooks, quantizer_dropout
        self.quantizers = nn.ModuleList(
            VectorQuantize(input_dim, codebook_size, 8) for _ in range(n_codebooks)
        )

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, ...]:
        batch = len(z)
        used = torch.full((batch,), n_quantizers or self.n_codebooks)
        if self.training:
            dropped = int(batch * self.quantizer_dropout)
            used[:dropped] = torch.randint(1, self.n_codebooks + 1, (batch,))[:dropped]
        total, residual = 0.0, z
        commitment, codebook, codes, latents = 0.0, 0.0, [], []
        for level, quantizer in enumerate(self.quantizers):
            if not self.training and level >= used[0]:
                break
            z_q, pull_z, pull_q, index, z_e = quantizer(residual)
            mask = level < used
            total, residual = total + z_q * mask[:, None, None], residual - z_q
            commitment = commitment + (pull_z * mask).mean()
            codebook = codebook + (pull_q * mask).mean()
            codes.append(index)
            latents.append(z_e)
        return total, torch.stack(codes, 1), torch.cat(latents, 1), commitment, codebook


DiffusersVectorQuantizer, LlamaGenVectorQuantizer = _diffusers(), _llamagen()


def _real(module: str, name: str) -> Any:
    """The library's own class; None where the library is not installed, or cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, RuntimeError):
        return None


REAL = {
    "diffusers": _real("diffusers.models.autoencoders.vae", "VectorQuantizer"),
    "encodec": _real("encodec.quantization.core_vq", "ResidualVectorQuantization"),
    "dac": _real("dac.nn.quantize", "ResidualVectorQuantize"),
}
