"""encodec: `EuclideanCodebook`, and the residual quantizer made of it.

`VectorQuantization`, the layer between the two, is left as it is: it runs on the codebook put
into it, and adds nothing but projections and a loss.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvq import ops

from .adapter import Host, Unsupported, adopt
from .rows import code_rows, moving_averages


class EuclideanCodebook(nn.Module):
    """`EuclideanCodebook` of encodec: EMA codes of vectors in the last dimension.

    Started by k-means on the first batch, from rows drawn as there. There, codes expired in a step
    are overwritten by the moving averages in the same step, so that expiry has no effect but to
    advance the random state; here it does that alone. With several processes, which there keep
    statistics of their own, the statistics are summed over all and the start is process 0's.

    State: inited (1,), cluster_size (K,), embed and embed_avg (K, D).
    """

    codebook_size: int
    kmeans_iters: int
    decay: float
    epsilon: float
    threshold_ema_dead_code: float
    inited: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_avg: Tensor
    # Whether `inited` is known to be set: reading it waits for the device.
    known_inited: bool

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.known_inited = False
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) → code rows (..., D), without a gradient, and indices (...)."""
        rows = self.preprocess(x)
        self.init_embed_(rows)
        indices = self.quantize(rows)
        quantized = self.dequantize(indices).view(x.shape)
        if self.training:
            if self.threshold_ema_dead_code > 0 and self._any_expired():
                _draw_rows(rows, self.codebook_size)
            followed = moving_averages(
                self.cluster_size,
                self.embed_avg,
                rows.detach(),
                indices,
                self.decay,
                self.epsilon,
            )
            self.embed.copy_(followed)
        return quantized, self.postprocess_emb(indices, x.shape)

    def encode(self, x: Tensor) -> Tensor:
        """(..., D) → indices (...)."""
        return self.postprocess_emb(self.quantize(self.preprocess(x)), x.shape)

    def decode(self, embed_ind: Tensor) -> Tensor:
        """Indices (...) → code rows (..., D)."""
        return self.dequantize(embed_ind)

    def preprocess(self, x: Tensor) -> Tensor:
        """(..., D) → (N, D)."""
        return x.reshape(-1, x.shape[-1])

    def quantize(self, x: Tensor) -> Tensor:
        """(N, D) → indices (N,)."""
        return ops.nearest_code(x, self.embed)

    def postprocess_emb(self, embed_ind: Tensor, shape: torch.Size) -> Tensor:
        """Indices (N,) in the shape of the vectors."""
        return embed_ind.view(shape[:-1])

    def dequantize(self, embed_ind: Tensor) -> Tensor:
        """Indices (...) → code rows (..., D)."""
        return code_rows(self.embed, embed_ind)

    def _any_expired(self) -> bool:
        return bool((self.cluster_size < self.threshold_ema_dead_code).any())

    def started(self) -> bool:
        """Whether the codes have had their start."""
        self.known_inited = self.known_inited or bool(self.inited)
        return self.known_inited

    @torch.no_grad()
    def init_embed_(self, data: Tensor) -> None:
        """Start the codes by k-means on the rows `data` (N, D), once."""
        if self.started():
            return
        codes, counts = _kmeans(data, self.codebook_size, self.kmeans_iters)
        self.embed.copy_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.copy_(counts)
        self.inited.fill_(1.0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for state in (self.embed, self.embed_avg, self.cluster_size):
                dist.broadcast(state, 0)
        self.known_inited = True


def _kmeans(data: Tensor, num_codes: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from rows drawn at random: centres (K, D), and counts (K,).

    A centre without rows stays where it is.
    """
    centres = data[_draw_rows(data, num_codes)]
    counts = centres.new_zeros(num_codes)
    for _ in range(iterations):
        counts, sums = ops.code_statistics(data, ops.nearest_code(data, centres), num_codes)
        means = (sums / counts.clamp(min=1.0)[:, None]).to(data.dtype)
        centres = torch.where((counts > 0)[:, None], means, centres)
    return centres, counts


def _draw_rows(data: Tensor, count: int) -> Tensor:
    """Numbers of `count` random rows, by the global generator of their device.

    Without replacement where there are enough.
    """
    if len(data) >= count:
        return torch.randperm(len(data), device=data.device)[:count]
    return torch.randint(0, len(data), (count,), device=data.device)


class ResidualVectorQuantization(nn.Module):
    """`ResidualVectorQuantization` of encodec; outside training all levels in one pass.

    `layers` are that library's, each with an `EuclideanCodebook` in it.
    """

    layers: nn.ModuleList

    def forward(self, x: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, D, T) → quantized (B, D, T), indices (Q, B, T), losses (Q, 1) of n_q levels."""
        if not self.training and self._in_one_pass(x, n_q):
            quantized, indices = self._quantize(x, n_q)
            return quantized, indices, x.new_zeros(len(indices), 1, dtype=torch.float32)
        quantized_sum: Tensor | float = 0.0
        residual = x
        collected = []
        for layer in self.layers[: n_q or len(self.layers)]:
            quantized, indices, loss = layer(residual)
            residual = residual - quantized
            quantized_sum = quantized_sum + quantized
            collected.append((indices, loss))
        all_indices, losses = (torch.stack(parts) for parts in zip(*collected))
        return cast(Tensor, quantized_sum), all_indices, losses

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        """x (B, D, T) → indices (Q, B, T)."""
        if self._in_one_pass(x, n_q):
            return self._quantize(x, n_q)[1]
        residual = x
        collected = []
        for layer in self.layers[: n_q or len(self.layers)]:
            indices = cast(Any, layer).encode(residual)
            residual = residual - cast(Any, layer).decode(indices)
            collected.append(indices)
        return torch.stack(collected)

    def decode(self, q_indices: Tensor) -> Tensor:
        """Indices (Q, B, T) → the sum of their codes (B, D, T)."""
        total = torch.zeros((), device=q_indices.device)
        for layer, indices in zip(self.layers, q_indices):
            total = total + cast(Any, layer).decode(indices)
        return total

    def _in_one_pass(self, x: Tensor, n_q: int | None) -> bool:
        """Whether levels are plain codebooks in float32, so that their residuals round alike."""
        layers = self.layers[: n_q or len(self.layers)]
        return x.dtype == torch.float32 and all(
            isinstance(layer.project_in, nn.Identity)
            and isinstance(layer.project_out, nn.Identity)
            and isinstance(layer._codebook, EuclideanCodebook)
            and layer._codebook.embed.dtype == torch.float32
            and layer._codebook.started()
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            for layer in cast(Any, layers)
        )

    def _quantize(self, x: Tensor, n_q: int | None) -> tuple[Tensor, Tensor]:
        """Quantized (B, D, T) and indices (Q, B, T)."""
        layers = cast(Any, self.layers[: n_q or len(self.layers)])
        codebooks = torch.stack([layer._codebook.embed for layer in layers])
        batch, dim, steps = x.shape
        out = ops.residual_quantize(x.detach().transpose(1, 2).reshape(-1, dim), codebooks)
        quantized = out.quantized.view(batch, steps, dim).transpose(1, 2)
        return quantized, out.indices.t().reshape(len(layers), batch, steps)


def _adapt_codebook(host: Any) -> EuclideanCodebook:
    shape = host.embed.shape
    if len(shape) != 2 or shape[0] != host.codebook_size or host.embed_avg.shape != shape:
        raise Unsupported(f"its embed has shape {tuple(shape)}, not ({host.codebook_size}, D)")
    if host.cluster_size.shape != shape[:1] or isinstance(host.embed, nn.Parameter):
        raise Unsupported("its state is not that of moving averages")
    adapter = adopt(EuclideanCodebook, host)
    adapter.known_inited = False
    return adapter


def _adapt_residual(host: Any) -> ResidualVectorQuantization:
    for layer in host.layers:
        if not isinstance(getattr(layer, "_codebook", None), EuclideanCodebook):
            raise Unsupported("not every one of its layers has a codebook that was replaced")
    return adopt(ResidualVectorQuantization, host)


def _fill_codebook(host: Any) -> None:
    host.embed.normal_()
    host.embed_avg.copy_(host.embed)
    host.cluster_size.fill_(1.0)
    host.inited.fill_(1.0)


def _fill_residual(host: Any) -> None:
    for layer in host.layers:
        _fill_codebook(layer._codebook)


HOSTS = (
    Host(
        library="encodec",
        class_name="EuclideanCodebook",
        modules=("encodec.quantization.core_vq",),
        attributes=frozenset(
            {
                *("codebook_size", "kmeans_iters", "decay", "epsilon", "threshold_ema_dead_code"),
                *("inited", "cluster_size", "embed", "embed_avg"),
            }
        ),
        without=frozenset(),
        bypassed=(),
        adapt=_adapt_codebook,
        probe=lambda host: (torch.randn(2, 5, host.embed.shape[1], dtype=torch.float64),),
        fill=_fill_codebook,
    ),
    Host(
        library="encodec",
        class_name="ResidualVectorQuantization",
        modules=("encodec.quantization.core_vq",),
        attributes=frozenset({"layers"}),
        without=frozenset(),
        bypassed=(),
        adapt=_adapt_residual,
        probe=lambda host: (torch.randn(2, _input_dim(host), 5, dtype=torch.float64),),
        fill=_fill_residual,
    ),
)


def _input_dim(residual: Any) -> int:
    layer = residual.layers[0]
    if isinstance(layer.project_in, nn.Linear):
        return layer.project_in.in_features
    return int(layer._codebook.embed.shape[1])
