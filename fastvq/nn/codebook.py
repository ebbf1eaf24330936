"""The codebook of a quantizer and everything that changes it.

Lives here: the codes and their running statistics, and when they start, follow, restart. How they
do is `ema.py` (the averages), `codebook_start.py` (k-means) and `revival.py` (dead codes). The
search, the straight-through gradient and the two losses are ops; projections, heads and picture
layouts are the modules' that own a codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.ops.checks import check_int, check_number
from fastvq.ops.code_statistics import statistics_of_search
from fastvq.ops.ema_step import (
    LARGEST_SUM,
    average_,
    ema_step,
    ema_step_of_rows,
    laplace_smoothed,
    runs_in_cpp,
    some_rows,
    unit_rows,
)

from . import ema
from .codebook_start import cluster_rows
from .processes import summed, world_size
from .revival import draw_rows

METRICS = ("l2", "cosine")
# A weight of an update by code: (K,) or (h, K), or a function of the batch's sums and counts.
UpdateWeight = Tensor | Callable[[Tensor, Tensor], Tensor]


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

    (γ is `decay`, ε `eps`; the smoothed count Ñ is the divisor only, N is stored unsmoothed. Other
    rules are `ema_rule`'s, see `fastvq.nn.ema`.) With `learnable=True` the codes are a parameter
    that the codebook loss moves; N and m are kept for usage and revival.

    With `metric="cosine"` rows and codes have unit length, the nearest code is the one of
    greatest dot product, and the losses are those of the unit rows.

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
    `sync=False` keeps each process to itself.

    State, float32 whatever dtype the module is cast to: `initted ()` bool, `cluster_size (h, K)`
    (N), `embed_avg (h, K, D)` (m), `embed (h, K, D)` (e); for the debiased rule also
    `ema_steps (h, 1)` (t).

    Args:
        num_codes: K.
        dim: D.
        num_codebooks: h independent codebooks, each for its own rows x[h].
        learnable: codes are a parameter.
        metric: "l2" or "cosine".
        decay: γ in [0, 1].
        eps: ε > 0.
        ema_rule: "smoothed_divisor", "smoothed_counts" or "debiased".
        ema_update: the codes follow the averages; None means `not learnable`.
        manual_ema_update: they do so only when `update_ema` is called.
        kmeans_init: start from k-means on the first training batch (on at most 32·K of its rows);
            otherwise from uniform random codes in ±√(6 / KD), with counts of one.
        kmeans_iterations: Lloyd iterations of that start.
        kmeans_weight: what the counts of that start are multiplied by to give N; None means 1−γ,
            as if they were the first batch of averages that began at nothing, so that codes can
            follow an encoder that still changes fast.
        revive_below: dead-code threshold as a fraction of the mean count; 0 switches revival off.
            With decay 0.99 and 0.1, a code that is never used restarts after some 230 steps, and
            after a few in the first steps from k-means, when counts are still small.
        revive_below_count: dead-code threshold in rows per batch instead; 0 leaves it at the
            fraction.
        gradient: "straight_through" or "rotation", the gradient of `quantized` to x.
        sync: share statistics, start and restarts with all processes.
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
    ema_steps: Tensor
    _waiting_counts: Tensor | None
    _waiting_sums: Tensor | None

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        num_codebooks: int = 1,
        learnable: bool = False,
        metric: str = "l2",
        decay: float = 0.99,
        eps: float = 1e-5,
        ema_rule: str = "smoothed_divisor",
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        kmeans_init: bool = True,
        kmeans_iterations: int = 10,
        kmeans_weight: float | None = None,
        revive_below: float = 0.1,
        revive_below_count: float = 0.0,
        gradient: str = "straight_through",
        sync: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_codes", num_codes),
            ("dim", dim),
            ("num_codebooks", num_codebooks),
        ):
            check_int("Codebook", name, size)
        for name, number in (("decay", decay), ("eps", eps), ("revive_below", revive_below)):
            check_number("Codebook", name, number)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"Codebook: decay must be in [0, 1]; got {decay}.")
        if not eps > 0.0:
            raise ValueError(f"Codebook: eps must be positive; got {eps}.")
        if not 0.0 <= revive_below < 1.0:
            raise ValueError(f"Codebook: revive_below must be in [0, 1); got {revive_below}.")
        if not revive_below_count >= 0.0:
            raise ValueError(
                f"Codebook: revive_below_count must be at least 0; got {revive_below_count}."
            )
        for name, value, allowed in (
            ("metric", metric, METRICS),
            ("ema_rule", ema_rule, ema.RULES),
        ):
            if value not in allowed:
                raise ValueError(
                    f"Codebook: {name} must be one of {', '.join(allowed)}; got {value!r}."
                )
        self.num_codes, self.dim, self.num_codebooks = num_codes, dim, num_codebooks
        self.learnable, self.metric, self.decay, self.eps = learnable, metric, decay, eps
        self.ema_rule, self.manual_ema_update = ema_rule, manual_ema_update
        self.ema_update = not learnable if ema_update is None else ema_update
        self.kmeans_iterations, self.seed = kmeans_iterations, seed
        self.kmeans_weight = 1.0 - decay if kmeans_weight is None else kmeans_weight
        self.revive_below, self.revive_below_count = revive_below, revive_below_count
        self.gradient, self.sync = gradient, sync
        self._register_state(kmeans_init)
        # Whether initted is known to be true: reading the buffer waits for the device, so it is
        # read in training steps until it is true, then not again until a state is loaded.
        self._known_initted = not kmeans_init

    def _register_state(self, kmeans_init: bool) -> None:
        embed = torch.empty(self.num_codebooks, self.num_codes, self.dim, dtype=torch.float32)
        nn.init.kaiming_uniform_(embed)
        if self.metric == "cosine":
            embed = unit_rows(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(embed.shape[:2], dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if self.ema_rule == "debiased":
            self.cluster_size.zero_()
            self.embed_avg.zero_()
            self.register_buffer("ema_steps", torch.zeros(self.num_codebooks, 1))
        if self.learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # Statistics that wait for a later update, see `observe`.
        self.register_buffer("_waiting_counts", None, persistent=False)
        self.register_buffer("_waiting_sums", None, persistent=False)

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
        heads = self.transform_input(heads)
        if updating:
            self.init_embed_(heads, mask)
        out = self.assign(heads, mask, changes=updating)
        if updating:
            counts = self.observe(heads, out.indices, follow=self.ema_update)
        else:
            counts = self._histogram(out.indices)
        usage = self._usage()
        if updating and self.revives:
            self._revive(heads, out.indices >= 0)
        commitment = self.mean(out.commitment, out.indices)
        codebook = commitment.new_zeros(())
        if self.learnable:
            codebook = self.mean(out.codebook, out.indices)
        perplexity = _perplexity(counts)
        quantized, indices = out.quantized.to(x.dtype), out.indices
        if x.dim() == 2:
            quantized, indices = quantized[0], indices[0]
            perplexity, usage = perplexity[0], usage[0]
        return CodebookOutput(quantized, indices, commitment, codebook, perplexity, usage)

    def transform_input(self, x: Tensor) -> Tensor:
        """x as it is compared with the codes: of unit length for the cosine, else unchanged."""
        return unit_rows(x) if self.metric == "cosine" else x

    @property
    def search_metric(self) -> str:
        """What `fastvq.ops` calls this codebook's metric."""
        return "dot" if self.metric == "cosine" else "l2"

    def codes(self, changes: bool) -> Tensor:
        """`embed`, for use in this forward.

        Where this forward goes on to change it in place (`changes`), a copy: the graph may need
        the present value.
        """
        return self.embed.clone() if changes and torch.is_grad_enabled() else self.embed

    def assign(
        self, x: Tensor, mask: Tensor | None = None, *, changes: bool = False
    ) -> ops.VectorQuantizeOutput:
        """The nearest codes of transformed rows x (h, N, D)."""
        return ops.vector_quantize(
            x, self.codes(changes), mask=mask, metric=self.search_metric, gradient=self.gradient
        )

    def mean(self, loss: Tensor, indices: Tensor) -> Tensor:
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
    def observe(
        self,
        x: Tensor,
        indices: Tensor,
        *,
        follow: bool,
        weight: UpdateWeight | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """Take the rows of all processes into the averages; returns the batch's counts (h, K).

        Args:
            x: (h, N, D) transformed rows.
            indices: (h, N) their codes; −1 does not count.
            follow: move the codes too, unless updates are manual.
            weight: (K,) or (h, K), multiplies 1−γ by code; or a function that gets the sums
                (h, K, D) and counts (h, K) and returns it.
            accumulate: only keep the statistics, for the next update without it.
        """
        follow = follow and not self.manual_ema_update
        waits = accumulate or self._waiting_counts is not None
        whole_step = weight is None and self.ema_rule == "smoothed_divisor"
        state = self.cluster_size, self.embed_avg, self.embed
        decay, eps, unit = self.decay, self.eps, self.metric == "cosine"
        if whole_step and follow and not waits and self._steps_by_rows(x, state):
            return ema_step_of_rows(*state, x, indices, decay=decay, eps=eps, unit=unit)
        counts, sums = statistics_of_search(x, indices, self.num_codes)
        counts, sums = summed(counts.float(), sums.float(), self.sync)
        if callable(weight):
            weight = weight(sums, counts)
        if waits:
            counts, sums = self._with_waiting(counts, sums, accumulate)
        if accumulate:
            return counts
        if whole_step:
            codes = self.embed if follow else None
            ema_step(*state[:2], codes, counts, sums, decay=decay, eps=eps, unit=unit)
        else:
            self._step(counts, sums, follow, weight)
        return counts

    def _steps_by_rows(self, x: Tensor, state: tuple[Tensor, ...]) -> bool:
        """Whether one pass over this process's rows is the whole step."""
        here = x.dtype is not torch.float64 and world_size(self.sync) == 1
        return here and runs_in_cpp(*state)

    def _step(self, counts: Tensor, sums: Tensor, follow: bool, weight: Tensor | None) -> None:
        """A step of the rules that `ema_step` does not know, or one weighted by code."""
        some = some_rows(counts)
        step = some * (1.0 - self.decay)
        if weight is not None:
            step = step * self._by_code(weight)
        average_(self.cluster_size, self.embed_avg, counts, sums, step)
        if self.ema_rule == "smoothed_counts":
            self.cluster_size.lerp_(laplace_smoothed(self.cluster_size, self.eps), some)
        elif self.ema_rule == "debiased":
            self.ema_steps.add_(some)
        if follow:
            self.embed.copy_(torch.where(some[..., None] > 0, self._followed(), self.embed))

    def learn_from(
        self,
        x: Tensor,
        indices: Tensor,
        *,
        follow: bool,
        weight: UpdateWeight | None = None,
        accumulate: bool = False,
    ) -> None:
        """A whole training update: `observe`, then restart dead codes."""
        self.observe(x, indices, follow=follow, weight=weight, accumulate=accumulate)
        if self.revives and not accumulate:
            self._revive(x, indices >= 0)

    def collect_gradient(self, x: Tensor, indices: Tensor) -> Tensor:
        """Add to `embed.grad` that of the mean ‖sg[x] − e‖² of all processes; returns the own mean.

        The mean divides by rows that count and D.
        """
        with torch.enable_grad():
            out = ops.quantize_to_indices(x.detach(), self.embed, indices)
            loss = self.mean(out.codebook, indices)
            (grad,) = torch.autograd.grad(loss, self.embed)
        rows = (indices >= 0).sum()
        weight = rows.expand(self.embed.shape[:2]).float()
        total, grad = summed(weight, grad * rows, self.sync)
        grad = grad / total[..., None].clamp(min=1.0)
        self.embed.grad = grad if self.embed.grad is None else self.embed.grad + grad
        return loss.detach()

    def _with_waiting(
        self, counts: Tensor, sums: Tensor, accumulate: bool
    ) -> tuple[Tensor, Tensor]:
        """The statistics plus those that waited; they wait on if `accumulate`."""
        if self._waiting_counts is not None and self._waiting_sums is not None:
            counts, sums = counts + self._waiting_counts, sums + self._waiting_sums
        self._waiting_counts = counts if accumulate else None
        self._waiting_sums = sums if accumulate else None
        return counts, sums

    def _by_code(self, weight: Tensor) -> Tensor:
        """An update's weight as (1, K) or (h, K)."""
        by_code = weight[None] if weight.dim() == 1 else weight
        if by_code.shape not in ((1, self.num_codes), self.cluster_size.shape):
            raise ValueError(
                f"Codebook: ema_update_weight must be ({self.num_codes},) or "
                f"{tuple(self.cluster_size.shape)}; got {tuple(weight.shape)}."
            )
        return by_code.to(self.cluster_size)

    def _followed(self) -> Tensor:
        """The codes that the averages give."""
        debias = None
        if self.ema_rule == "debiased":
            debias = (1.0 - self.decay**self.ema_steps).clamp(min=1e-12)
        codes = ema.codes_of_averages(
            self.ema_rule, self.cluster_size, self.embed_avg, self.eps, debias
        )
        return unit_rows(codes) if self.metric == "cosine" else codes

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the codes to where the averages are, as `manual_ema_update` leaves to the caller."""
        self.embed.copy_(self._followed())

    @torch.no_grad()
    def update_indices(
        self,
        x: Tensor,
        indices: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: UpdateWeight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """An update by transformed rows x (h, N, D) whose codes are known, in any mode."""
        follow = self.ema_update if ema_update is None else ema_update
        if not (follow or self.revives):
            return
        counted = (indices >= 0) & x.isfinite().all(dim=-1)
        if mask is not None:
            counted = counted & mask
        indices = torch.where(counted, indices, -1)
        self.observe(
            x, indices, follow=follow, weight=ema_update_weight, accumulate=accum_ema_update
        )
        if not accum_ema_update:
            self.expire_codes_(x, mask)

    @property
    def revives(self) -> bool:
        """Whether dead codes restart."""
        return self.revive_below > 0.0 or self.revive_below_count > 0.0

    def expire_codes_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """In training, restart dead codes at counted ones of the transformed rows x (h, N, D)."""
        if not (self.training and self.revives):
            return
        counted = x.isfinite().all(dim=-1)
        self._revive(x, counted if mask is None else counted & mask)

    @torch.no_grad()
    def _revive(self, x: Tensor, counted: Tensor) -> None:
        if not self.revives:
            return
        mean = self.cluster_size.mean(dim=1, keepdim=True)
        restart, threshold = mean, self.revive_below * mean
        if self.revive_below_count > 0.0:
            restart = threshold = torch.full_like(mean, self.revive_below_count)
        dead, rows = draw_rows(x, counted, self.cluster_size < threshold, self.sync)
        self.cluster_size.copy_(torch.where(dead, restart, self.cluster_size))
        self.embed.copy_(torch.where(dead[..., None], rows, self.embed))
        sums = (rows * restart[..., None]).clamp(-LARGEST_SUM, LARGEST_SUM)
        self.embed_avg.copy_(torch.where(dead[..., None], sums, self.embed_avg))

    def init_embed_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """k-means on transformed rows x (h, N, D), once every codebook has a counted row.

        Does nothing where the codes have started already.
        """
        if not self._known_initted:
            self._start(x, mask)

    @torch.no_grad()
    def _start(self, x: Tensor, mask: Tensor | None) -> None:
        if bool(self.initted):
            self._known_initted = True
            return
        counted = x.isfinite().all(dim=-1)
        if mask is not None:
            counted = counted & mask
        start = cluster_rows(
            x,
            counted,
            self.num_codes,
            iterations=self.kmeans_iterations,
            metric=self.metric,
            seed=self.seed,
            shared=self.sync,
        )
        if start is None:
            return
        codes, counts = start
        # A code without rows counts as if it had one.
        self.cluster_size.copy_(self.kmeans_weight * counts.clamp(min=1.0))
        self.embed.copy_(codes)
        self.embed_avg.copy_(codes * self.cluster_size[..., None])
        self.initted.fill_(True)
        self._known_initted = True


def _perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy in nats of the histogram `counts` (h, K); 1 if it is empty."""
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.special.entr(share).sum(dim=1).exp()
