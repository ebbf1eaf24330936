"""The codebook of a quantizer and everything that changes it.

Lives here: the codes and their running statistics, the EMA update, k-means initialisation, revival
of dead codes, and keeping all of these equal on every process. The search, the straight-through
gradient and the two losses are ops; projections, heads and picture layouts are the modules' that
own a codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvq import ops

from .kmeans import kmeans

# k-means initialisation sees at most this many rows per code, drawn at random.
_INIT_ROWS_PER_CODE = 32


class CodebookOutput(NamedTuple):
    """What `Codebook` returns; shapes for x (N, D), in brackets for x (h, N, D)."""

    quantized: Tensor  # (N, D) [(h, N, D)], x's dtype
    indices: Tensor  # (N,) [(h, N)] int64, −1 where no code was given
    commitment: Tensor  # () float32, float64 if x is
    codebook: Tensor  # () likewise
    perplexity: Tensor  # () [(h,)] float32
    usage: Tensor  # () [(h,)] float32


class Codebook(nn.Module):
    """K codes of D channels, kept by exponential moving averages or learned by gradient.

        index[n] = argmin_k ‖x[n] − e[k]‖²,   quantized[n] = e[index[n]]
        commitment = mean ‖x − sg[e]‖²,   codebook = mean ‖sg[x] − e‖²

    Both means divide by the number of counted rows times D. With `learnable=False` the codes
    follow the data in every training forward, with n[k] rows of sum s[k] assigned to code k:

        N[k] ← γN[k] + (1−γ)n[k],   m[k] ← γm[k] + (1−γ)s[k]
        e[k] = m[k] / Ñ[k],   Ñ[k] = ΣN · (N[k] + ε) / (ΣN + Kε)

    (γ is `decay`, ε `eps`; the smoothed count Ñ is the divisor only, N is stored unsmoothed.) With
    `learnable=True` the codes are a parameter that the codebook loss moves; N is kept for usage
    and revival, m is not used.

    Dead codes: after the update, a code with N[k] below `revive_below` · mean N restarts at a
    random counted row of the batch, with N[k] = mean N and m[k] to match (with
    `revive_below_count` > 0 it is the threshold, and the N[k] of the restart, instead). The row is
    chosen with the global CPU generator, whatever the device.

    A row counts if `mask` allows it and it is finite. A row that does not count has no influence
    on anything but itself: index −1, no loss, no statistics. A batch without counted rows leaves
    the state as it was and has zero losses. Outside `training`, or with `freeze=True`, nothing
    changes.

    With `torch.distributed` running at the time of the call, statistics are those of all processes
    together, and initialisation and revival take rows of any; every process ends with the same
    codes to the bit. Every process must make the same training calls, empty batches included.

    State, float32 whatever dtype the module is cast to: `initted ()` bool, `cluster_size (h, K)`
    (N), `embed_avg (h, K, D)` (m), `embed (h, K, D)` (e).

    Args:
        num_codes: K.
        dim: D.
        num_codebooks: h independent codebooks, each for its own rows x[h].
        learnable: codes are a parameter instead of moving averages.
        decay: γ in [0, 1).
        eps: ε > 0.
        kmeans_init: start from k-means on the first training batch (on at most 32·K of its rows);
            otherwise from uniform random codes in ±√(6 / KD), with counts of one.
        kmeans_iterations: Lloyd iterations of that start.
        revive_below: dead-code threshold as a fraction of the mean count; 0 switches revival off.
            With decay 0.99 and 0.1, a code that is never used restarts after some 230 steps, and
            after a few in the first steps from k-means, when counts are still small.
        revive_below_count: dead-code threshold in rows per batch instead; 0 leaves it at the
            fraction.
        gradient: "straight_through" or "rotation", the gradient of `quantized` to x.
        seed: of the k-means start.
    Raises:
        ValueError: an argument out of its range.
    van den Oord et al. 2017, arXiv:1711.00937, eq. 1–3 and appendix A.1; the smoothing is that of
    the authors' own implementation, not in the paper.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        num_codebooks: int = 1,
        learnable: bool = False,
        decay: float = 0.99,
        eps: float = 1e-5,
        kmeans_init: bool = True,
        kmeans_iterations: int = 10,
        revive_below: float = 0.1,
        revive_below_count: float = 0.0,
        gradient: str = "straight_through",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_codes", num_codes),
            ("dim", dim),
            ("num_codebooks", num_codebooks),
        ):
            if size < 1:
                raise ValueError(f"Codebook: {name} must be at least 1; got {size}.")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Codebook: decay must be in [0, 1); got {decay}.")
        if not eps > 0.0:
            raise ValueError(f"Codebook: eps must be positive; got {eps}.")
        if not 0.0 <= revive_below < 1.0:
            raise ValueError(f"Codebook: revive_below must be in [0, 1); got {revive_below}.")
        if not revive_below_count >= 0.0:
            raise ValueError(
                f"Codebook: revive_below_count must be at least 0; got {revive_below_count}."
            )
        self.num_codes, self.dim, self.num_codebooks = num_codes, dim, num_codebooks
        self.learnable, self.decay, self.eps = learnable, decay, eps
        self.kmeans_iterations, self.seed = kmeans_iterations, seed
        self.revive_below, self.revive_below_count = revive_below, revive_below_count
        self.gradient = gradient
        embed = torch.empty(num_codebooks, num_codes, dim, dtype=torch.float32)
        nn.init.kaiming_uniform_(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(embed.shape[:2], dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # Whether initted is known to be true: reading the buffer waits for the device, so it is
        # read in training steps until it is true, then not again until a state is loaded.
        self._known_initted = not kmeans_init

    def extra_repr(self) -> str:
        kind = "gradient" if self.learnable else f"ema, decay={self.decay}"
        return f"{self.num_codes}, {self.dim}, num_codebooks={self.num_codebooks}, {kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """Follow device moves, but stay float32 (`.half()`, `.to(torch.bfloat16)`, ...)."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known_initted = False
        super()._load_from_state_dict(*args, **kwargs)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, freeze: bool = False
    ) -> CodebookOutput:
        """Quantize the rows of `x`, and in training let the codebook follow them.

        Args:
            x: (N, D), or (h, N, D) with h = num_codebooks, any floating dtype.
            mask: (N,) or (h, N) bool, True = counts; None counts every row.
            freeze: leave the state alone, in training too.
        Returns:
            A `CodebookOutput`. `quantized` holds the code rows (zeros where masked, NaN where x
            is not finite). The `codebook` loss is 0 without a graph unless `learnable`.
            `perplexity` is exp(entropy in nats) of the code histogram of this batch's counted
            rows (of all processes where the state was updated), 1 if there are none. `usage` is
            the fraction of codes with N[k] ≥ max(`revive_below`, 0.01) · mean N, before revival.
        Raises:
            ValueError: `x` has another shape.
        """
        heads = x.unsqueeze(0) if x.dim() == 2 else x
        if heads.dim() != 3 or heads.shape[::2] != (self.num_codebooks, self.dim):
            raise ValueError(
                f"Codebook: x must be (N, {self.dim}) for one codebook or "
                f"({self.num_codebooks}, N, {self.dim}); got {tuple(x.shape)}."
            )
        updating = self.training and not freeze
        if updating:
            self._initialise(heads, mask)
        # The update below writes into `embed` while the graph may still need its present value.
        codes = self.embed.clone() if updating else self.embed
        out = ops.vector_quantize(heads, codes, mask=mask, gradient=self.gradient)
        counts = self._update(heads, out.indices) if updating else self._histogram(out.indices)
        usage = self._usage()
        if updating and (self.revive_below > 0.0 or self.revive_below_count > 0.0):
            self._revive(heads, out.indices)
        commitment = self._mean(out.commitment, out.indices)
        codebook = commitment.new_zeros(())
        if self.learnable:
            codebook = self._mean(out.codebook, out.indices)
        perplexity = _perplexity(counts)
        quantized, indices = out.quantized.to(x.dtype), out.indices
        if x.dim() == 2:
            quantized, indices = quantized[0], indices[0]
            perplexity, usage = perplexity[0], usage[0]
        return CodebookOutput(quantized, indices, commitment, codebook, perplexity, usage)

    def _mean(self, loss: Tensor, indices: Tensor) -> Tensor:
        """Mean of the (h, N) sums over D over the rows that have a code, and D."""
        counted = indices >= 0
        total = torch.where(counted, loss, 0.0).sum()
        return total / (counted.sum() * self.dim).clamp(min=1)

    def _histogram(self, indices: Tensor) -> Tensor:
        """(h, K) float32 counts of the codes in `indices`, for a forward without an update."""
        counts = indices.new_zeros(self.num_codebooks, self.num_codes)
        counts.scatter_add_(1, indices.clamp(min=0), (indices >= 0).to(counts.dtype))
        return counts.float()

    def _usage(self) -> Tensor:
        """(h,) fraction of the codes whose running count is not near zero."""
        threshold = max(self.revive_below, 0.01) * self.cluster_size.mean(dim=1, keepdim=True)
        return (self.cluster_size >= threshold).float().mean(dim=1)

    @torch.no_grad()
    def _update(self, x: Tensor, indices: Tensor) -> Tensor:
        """One EMA step on the state, of all processes' rows; returns the batch's counts."""
        counts, sums = ops.code_statistics(x, indices, self.num_codes)
        if _world_size() > 1:
            # One tensor, one collective.
            fused = torch.cat([counts[..., None], sums], dim=-1)
            dist.all_reduce(fused)
            counts, sums = fused[..., 0].contiguous(), fused[..., 1:].contiguous()
        some = counts.sum(dim=1, keepdim=True) > 0
        kept = torch.where(some, self.decay, 1.0)
        self.cluster_size.copy_(kept * self.cluster_size + (1.0 - kept) * counts)
        if self.learnable:
            return counts
        kept = kept[..., None]
        self.embed_avg.copy_(kept * self.embed_avg + (1.0 - kept) * sums)
        total = self.cluster_size.sum(dim=1, keepdim=True)
        smoothed = total * (self.cluster_size + self.eps) / (total + self.num_codes * self.eps)
        followed = self.embed_avg / smoothed[..., None]
        self.embed.copy_(torch.where(some[..., None], followed, self.embed))
        return counts

    @torch.no_grad()
    def _revive(self, x: Tensor, indices: Tensor) -> None:
        """Restart codes with a small running count at rows of the batch, without a host sync.

        The j-th of M dead codes takes a uniform draw from the j-th of M equal slices of the
        counted rows of all processes, so that two codes rarely restart at the same row.
        """
        mean = self.cluster_size.mean(dim=1, keepdim=True)
        restart, threshold = mean, self.revive_below * mean
        if self.revive_below_count > 0.0:
            restart = threshold = torch.full_like(mean, self.revive_below_count)
        dead = self.cluster_size < threshold
        counted = (indices >= 0).long().cumsum(dim=1)  # how many counted rows up to this one
        local = counted[:, -1:] if counted.shape[1] else counted.new_zeros(len(counted), 1)
        uniform = torch.rand(dead.shape, dtype=torch.float64).to(x.device, non_blocking=True)
        first, total = torch.zeros_like(local), local
        if _world_size() > 1:
            # Every process learns all row numbers and takes process 0's draws.
            rank = dist.get_rank()
            shared = uniform.new_zeros(self.num_codebooks, self.num_codes + _world_size())
            if rank == 0:
                shared[:, : self.num_codes] = uniform
            shared[:, self.num_codes + rank] = local[:, 0].double()
            dist.all_reduce(shared)
            uniform, rows = shared[:, : self.num_codes], shared[:, self.num_codes :].long()
            first, total = rows[:, :rank].sum(dim=1, keepdim=True), rows.sum(dim=1, keepdim=True)
        dead = dead & (total > 0)
        slot = dead.long().cumsum(dim=1) - 1
        slots = dead.long().sum(dim=1, keepdim=True).clamp(min=1)
        drawn = ((slot + uniform) / slots * total).long().clamp(min=0)
        drawn = torch.minimum(drawn, (total - 1).clamp(min=0)) - first
        here = dead & (drawn >= 0) & (drawn < local)
        position = torch.searchsorted(counted, drawn + 1).clamp(max=max(x.shape[1] - 1, 0))
        fresh = self.embed_avg.new_zeros(self.embed_avg.shape)
        if x.shape[1]:
            taken = x.float().gather(1, position[..., None].expand(-1, -1, self.dim))
            fresh = torch.where(here[..., None], taken, fresh)
        if _world_size() > 1:
            dist.all_reduce(fresh)  # one process holds the row, the others add zeros: exact
        self.cluster_size.copy_(torch.where(dead, restart, self.cluster_size))
        self.embed.copy_(torch.where(dead[..., None], fresh, self.embed))
        if not self.learnable:
            sums = fresh * restart[..., None]
            self.embed_avg.copy_(torch.where(dead[..., None], sums, self.embed_avg))

    @torch.no_grad()
    def _initialise(self, x: Tensor, mask: Tensor | None) -> None:
        """k-means on the first training batch that has a counted row in every codebook."""
        if self._known_initted or bool(self.initted):
            self._known_initted = True
            return
        counted = x.isfinite().all(dim=-1)
        if mask is not None:
            counted = counted & mask
        samples = [self._gathered(rows[keep]) for rows, keep in zip(x.float(), counted)]
        if min(total for _, total in samples) == 0:
            return
        for head, (rows, total) in enumerate(samples):
            codes, indices = kmeans(
                rows, self.num_codes, self.kmeans_iterations, seed=self.seed + head
            )
            counts, _ = ops.code_statistics(rows, indices, self.num_codes)
            if _world_size() > 1:
                fused = torch.cat([counts[:, None], codes], dim=1)
                dist.broadcast(fused, 0)
                counts, codes = fused[:, 0], fused[:, 1:]
            # The state one EMA step away from nothing, as if the sample were the whole batch: the
            # codes can follow an encoder that still changes fast, and those it leaves behind are
            # soon below the mean. A code without rows counts as if it had one.
            counts = (counts * (total / len(rows))).clamp(min=1.0)
            self.cluster_size[head] = (1.0 - self.decay) * counts
            self.embed[head] = codes
            self.embed_avg[head] = codes * self.cluster_size[head][:, None]
        self.initted.fill_(True)
        self._known_initted = True

    def _gathered(self, rows: Tensor) -> tuple[Tensor, int]:
        """At most 32·K of the rows, of all processes in order of rank, and how many there were."""
        world, limit = _world_size(), _INIT_ROWS_PER_CODE * self.num_codes
        sizes = [len(rows)]
        if world > 1:
            all_sizes = [rows.new_zeros(1, dtype=torch.int64) for _ in range(world)]
            dist.all_gather(all_sizes, torch.tensor(sizes, device=rows.device))
            sizes = [int(size) for size in all_sizes]
        share = min(max(sizes), -(-limit // world))
        if len(rows) > share:
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(len(rows), generator=generator)[:share].sort().values
            rows = rows[chosen.to(rows.device)]
        if world > 1:
            # Every process contributes the same number of rows, zeros at the end of a short one.
            padded = rows.new_zeros(share, self.dim)
            padded[: len(rows)] = rows
            parts = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(parts, padded)
            rows = torch.cat([part[: min(size, share)] for part, size in zip(parts, sizes)])
        return rows, sum(sizes)


def _perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy in nats of the histogram `counts` (h, K); 1 if it is empty."""
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.special.entr(share).sum(dim=1).exp()


def _world_size() -> int:
    """Number of processes, asked anew at every call: the group may start after the module."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
