"""`VectorQuantize`, a drop-in for the module of that name in vector-quantize-pytorch.

Lives here: the argument list, projections and the return values of that library. Arguments that are
refused are `vector_quantize_arguments.py`, layouts and heads `vector_layout.py`, the codebook and
its updates `codebook.py`, choosing codes by all their scores `code_scores.py`, losses beyond
commitment `codebook_losses.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.ops.checks import check_float, check_indices
from fastvq.ops.code_statistics import rows_of_codes
from fastvq.ops.vector_quantize_mean import vector_quantize_mean

from .code_scores import choose_codes, soft_gradient
from .codebook import Codebook, UpdateWeight
from .codebook_losses import codes_in_use, cross_entropy, diversity_loss, orthogonal_loss
from .finite_rows import linear_projections
from .implicit_codes import quantize_to_own_codes
from .vector_layout import VectorLayout
from .vector_quantize_arguments import check_constructor, require

CodebookTransform = Callable[[Tensor], Tensor]


class LossBreakdown(NamedTuple):
    """The terms of the loss, unweighted."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class _Call(NamedTuple):
    """One forward's rows and options."""

    z: Tensor  # (h, N, D), projected, in heads, of unit length where the metric asks for it
    shape: torch.Size  # x's, without channels
    mask: Tensor | None  # (N,) bool
    topk: int | None = None
    temperature: float = 0.0
    transform: CodebookTransform | None = None
    frozen: bool = False
    follows: bool = False


class _Chosen(NamedTuple):
    """The codes of a call's rows: `fastvq.ops.VectorQuantizeOutput`, then what led to them.

    The two losses are by row, or () where they are their means already.
    """

    quantized: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor
    codes: Tensor  # (h, K, D), those that were compared
    own: Tensor | None = None  # the chosen rows where they are no rows of `codes`
    optimised: Tensor | None = None  # the loss of the in-place optimizer


class VectorQuantize(nn.Module):
    """Nearest codes of vectors, with the arguments and results of vector-quantize-pytorch.

        z = project_in(x),   index[n] = argmin_k ‖z[n] − e[k]‖²,   quantize = project_out(e[index])
        loss = commitment_weight · mean ‖z − sg[e[index]]‖²   (training only, else 0)

    The mean divides by counted vectors times channels. The codes follow z by moving averages (see
    `fastvq.nn.Codebook`); with `learnable_codebook` they are a parameter, and the loss, of the
    same value, also has its gradient to the codes. The gradient of `quantize` to z is the rotation
    trick's unless `rotation_trick=False`, then straight-through. Where that library's indices
    depend on rounding these are exact, and state stays float32 in a half-precision model.

    Arguments keep their order, names and defaults. The few that are not supported are refused by
    name when set to anything but their default; docs/migration.md lists every argument, and where
    results differ on purpose. With several processes statistics, k-means and revived codes are
    shared. Scores of all codes, which sampling, diversity and cross-entropy need, are made in
    blocks: nothing of size N×K is allocated.

    Args:
        dim: channels of x.
        codebook_size: K.
        codebook_dim: channels of a code (per head); `dim` if None. Linear projections, `project_in`
            and `project_out`, join the two where `codebook_dim` · `heads` is not `dim`.
        heads: split z into this many vectors, each with its own index.
        separate_codebook_per_head: a codebook for each head instead of one for all.
        decay, eps: of the moving averages.
        freeze_codebook: never change the codes after their start.
        kmeans_init, kmeans_iters: start from k-means on the first training batch.
        sync_kmeans: k-means over all processes' rows; False is refused with several of them.
        use_cosine_sim: compare, and keep, z and codes at unit length.
        layernorm_after_project_in: a LayerNorm behind the projection.
        threshold_ema_dead_code: restart codes whose running count is below this many rows.
        channel_last: x is (B, N, dim), else (B, dim, N).
        accept_image_fmap, accept_3d_fmap: x is (B, dim, H, W), or (B, dim, T, H, W).
        commitment_weight: weight of the commitment loss.
        commitment_use_cross_entropy_loss: commit by cross-entropy of the chosen index instead.
        orthogonal_reg_weight: weight of `orthogonal_loss`; makes the codes a parameter, that the
            averages still move.
        orthogonal_reg_active_codes_only: of this batch's codes only.
        orthogonal_reg_max_codes: of a random choice of at most this many.
        codebook_diversity_loss_weight, codebook_diversity_temperature: of `diversity_loss`.
        stochastic_sample_codes, sample_codebook_temp: in training draw the code from
            softmax(score / temperature); temperature 0 takes the nearest.
        straight_through: Gumbel straight-through: where gradients are not routed to the input, z
            gets those of softmax(score / temperature). Excludes `rotation_trick`.
        rotation_trick: None means yes, unless `straight_through` or dim is 1.
        sync_codebook: share state with all processes; None means True.
        ema_update: None means `not learnable_codebook`; False leaves the codes to other means.
        manual_ema_update: averages move the codes only in `_codebook.update_ema()`.
        learnable_codebook: codes are a parameter; excludes `ema_update=True`.
        in_place_codebook_optimizer: makes an optimizer of the codebook's parameters, that takes a
            step on mean ‖sg[z] − e‖² inside each training forward, before z is quantized anew.
        manual_in_place_optimizer_update: leave its step to `update_in_place_optimizer`.
        return_zeros_for_masked_padding: masked positions come back as zeros, else as x.
        route_gradients_to_input: False sends the gradient of `quantize` to learnable codes (or
            the Gumbel softmax) instead of z.
    Raises:
        ValueError: an unsupported argument, or one out of its range.
    van den Oord et al. 2017, arXiv:1711.00937; Fifty et al. 2024, arXiv:2410.06424 (rotation); Jang
    et al. 2016, arXiv:1611.01144 (Gumbel).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Any] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        rotation = check_constructor(dict(locals()))
        learnable = bool(learnable_codebook)
        self._layout = VectorLayout(
            dim,
            heads,
            separate_codebook_per_head,
            channel_last,
            spatial=2 if accept_image_fmap else 3 if accept_3d_fmap else 0,
        )
        self._make_projections(dim, codebook_dim, heads, layernorm_after_project_in)
        self._codebook = Codebook(
            codebook_size,
            dim if codebook_dim is None else codebook_dim,
            num_codebooks=heads if separate_codebook_per_head else 1,
            learnable=learnable or orthogonal_reg_weight > 0,
            metric="cosine" if use_cosine_sim else "l2",
            decay=decay,
            eps=eps,
            ema_update=not learnable if ema_update is None else ema_update,
            manual_ema_update=manual_ema_update,
            kmeans_init=kmeans_init,
            kmeans_iterations=kmeans_iters,
            kmeans_weight=1.0,
            revive_below=0.0,
            revive_below_count=float(threshold_ema_dead_code),
            gradient="rotation" if rotation else "straight_through",
            sync=sync_codebook is not False,
        )
        self.in_place_codebook_optimizer = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(
                self._codebook.parameters()
            )
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.use_cosine_sim, self.rotation_trick = use_cosine_sim, rotation
        self.freeze_codebook, self.learnable_codebook = freeze_codebook, learnable
        self.channel_last = channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.commitment_weight = commitment_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.straight_through = straight_through
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input

    def _make_projections(
        self, dim: int, codebook_dim: int | None, heads: int, layernorm: bool
    ) -> None:
        width = heads * (dim if codebook_dim is None else codebook_dim)
        self.has_projections = width != dim
        self.project_in, self.project_out = linear_projections(dim, width, self.has_projections)
        if self.has_projections and layernorm:
            self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(width))

    @property
    def ema_update(self) -> bool:
        """Whether moving averages move the codes."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes: (K, D), or (heads, K, D) for separate codebooks."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes.reshape(self._codebook.embed.shape))

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: CodebookTransform | None = None,
        ema_update_weight: UpdateWeight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """Quantize x: (B, N, dim), (B, dim), or as the layout arguments say.

        Args:
            indices: codes to predict, shaped as the indices this returns; −1 does not count.
            mask: (B, N) bool (or the shape of the map), True = counts.
            lens: (B,) instead of a mask: the first lens[b] vectors of each example count.
            topk: return the k nearest codes of each vector and leave the codebook alone; one head.
            sample_codebook_temp: instead of the module's.
            freeze_codebook: leave the codes alone in this call; None asks the module's.
            return_loss_breakdown: also return the `LossBreakdown`.
            codebook_transform_fn: makes of the codes (h, K, D) every vector's own codes
                (h, B, N, K, D), N the positions of an example; one head, N·K·D of memory.
            ema_update_weight: (K,) or (h, K), multiplies 1 − decay by code; or a function of the
                batch's sums and counts that returns it.
            accum_ema_update: keep this batch's statistics for the next call without it.
            ema_update: instead of the module's.
        Returns:
            quantize in x's shape and dtype; indices, int64 in x's shape without its channels, with
            a last dimension `heads` where there are several; loss (). Masked positions have index
            −1. With `topk` all but the breakdown have a last dimension of k, and the commitment
            loss is each vector's own, in evaluation too. With `indices`, quantize and the mean
            cross-entropy (nats) of `indices` under softmax(score).
        Raises:
            ValueError: arguments exclude each other, or shapes disagree.
        """
        check_float("VectorQuantize", "x", x)
        rows, shape = self._layout.rows(x)
        row_mask = self._layout.row_mask(mask, lens, shape, x.device)
        self._check_call(topk, codebook_transform_fn, indices)
        z, head_mask = self._projected(rows, row_mask)
        call = _Call(
            z=z,
            shape=shape,
            mask=head_mask,
            topk=None if topk is None else min(int(topk), self.codebook_size),
            temperature=(
                self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
            ),
            transform=codebook_transform_fn,
            frozen=self.freeze_codebook if freeze_codebook is None else freeze_codebook,
            follows=self.ema_update if ema_update is None else ema_update,
        )
        chosen = self._choose(call, ema_update_weight, accum_ema_update)
        quantize = self._layout.join(self._routed(chosen, call)).to(x.dtype)
        if self.has_projections:
            quantize = self.project_out(quantize)
        if row_mask is not None or self.has_projections or self.heads > 1:
            quantize = self._padded(quantize, rows, row_mask, call.topk)
        quantize = self._layout.restored(quantize, shape, call.topk)
        if indices is not None:
            check_indices("VectorQuantize.forward", "indices", indices, self.codebook_size)
            given = self._layout.head_indices(indices, shape, call.mask)
            metric = self._codebook.search_metric
            return quantize, cross_entropy(call.z, chosen.codes, given, metric)
        loss, terms = self._losses(chosen, call)
        result = (quantize, self._layout.index_map(chosen.indices, shape, call.topk), loss)
        return (*result, terms) if return_loss_breakdown else result

    def _choose(
        self, call: _Call, weight: UpdateWeight | None = None, accumulate: bool = False
    ) -> _Chosen:
        """The codes of z; in training also the codebook's start, update and optimizer step."""
        codebook = self._codebook
        updates = self.training and not call.frozen and call.topk is None
        observes = updates and (call.follows or codebook.revives)
        optimises = updates and self.in_place_codebook_optimizer is not None
        if self.training:
            codebook.init_embed_(call.z, call.mask)
        chosen = self._assign(call, codebook.codes(changes=observes or optimises))
        if observes:
            codebook.learn_from(
                call.z,
                chosen.indices,
                follow=call.follows,
                weight=weight,
                accumulate=accumulate,
            )
        if not optimises:
            return chosen
        loss = self._optimise_in_place(call, chosen)
        return self._assign(call, self._codebook.codes(changes=True))._replace(optimised=loss)

    def _assign(self, call: _Call, codes: Tensor) -> _Chosen:
        """Codes for z: the nearest, or drawn, or the nearest few, or of implicit codebooks."""
        z, codebook = call.z, self._codebook
        metric, gradient = codebook.search_metric, codebook.gradient
        if call.transform is not None:
            own = call.transform(codes).flatten(1, 2)
            found, rows = quantize_to_own_codes(z, own, metric, gradient, call.mask)
            return _Chosen(*found, codes, own=rows)
        draws = self.training and self.stochastic_sample_codes and call.temperature > 0.0
        if not draws and call.topk is None:
            search = vector_quantize_mean if self.training else ops.vector_quantize
            found = search(z, codes, mask=call.mask, metric=metric, gradient=gradient)
            return _Chosen(*found, codes)
        indices = choose_codes(
            z,
            codes,
            metric,
            mask=call.mask,
            temperature=call.temperature if draws else 0.0,
            topk=call.topk,
        )
        if call.topk is not None:
            z, indices = z.repeat_interleave(call.topk, dim=1), indices.flatten(1)
        return _Chosen(*ops.quantize_to_indices(z, codes, indices, gradient=gradient), codes)

    def _routed(self, chosen: _Chosen, call: _Call) -> Tensor:
        """The quantized rows, with their gradient to z or to the codes."""
        if self.route_gradients_to_input and call.z.requires_grad:
            return chosen.quantized
        quantized = chosen.quantized.detach()
        if chosen.codes.requires_grad or chosen.own is not None:
            rows = chosen.own
            if rows is None:
                rows = rows_of_codes(chosen.codes, chosen.indices)
            # rows − sg[rows] is exactly zero.
            quantized = quantized + (rows - rows.detach())
        if self.straight_through and self.training and call.z.requires_grad:
            metric = self._codebook.search_metric
            quantized = soft_gradient(quantized, call.z, chosen.codes, metric, call.temperature)
        return quantized

    def _losses(self, chosen: _Chosen, call: _Call) -> tuple[Tensor, LossBreakdown]:
        """The weighted sum, and its terms. In evaluation zeros, or with topk the distances."""
        zero = chosen.commitment.new_zeros(())
        commitment = diversity = orthogonal = loss = zero
        if call.topk is not None and not self.training:
            commitment = self._commitment(chosen, call)
            loss = commitment * (self.commitment_weight if self.commitment_weight > 0.0 else 1.0)
        elif self.training and self.commitment_weight > 0.0:
            commitment = self._commitment(chosen, call)
            loss = self.commitment_weight * commitment
        if self.training and self.codebook_diversity_loss_weight > 0.0:
            diversity = self._diversity(chosen, call)
            loss = loss + self.codebook_diversity_loss_weight * diversity
        if self.training and self.orthogonal_reg_weight > 0.0:
            active = None
            if self.orthogonal_reg_active_codes_only:
                active = codes_in_use(chosen.indices, self.codebook_size)
            orthogonal = orthogonal_loss(
                self._codebook.embed, active, self.orthogonal_reg_max_codes
            )
            loss = loss + self.orthogonal_reg_weight * orthogonal
        optimised = zero if chosen.optimised is None else chosen.optimised
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # backward() on the loss of an input without gradients does nothing, but may be called.
            loss = loss if loss.requires_grad else loss.requires_grad_()
        return loss, LossBreakdown(commitment, diversity, orthogonal, optimised)

    def _commitment(self, chosen: _Chosen, call: _Call) -> Tensor:
        if self.commitment_use_cross_entropy_loss and call.topk is None:
            metric = self._codebook.search_metric
            return cross_entropy(call.z, chosen.codes, chosen.indices, metric)
        loss = chosen.commitment
        if self.learnable_codebook and not call.frozen:
            # The same value, with its gradient to the codes.
            loss = loss + (chosen.codebook - chosen.codebook.detach())
        if call.topk is not None:
            return loss.reshape(*call.shape, call.topk) / self._codebook.dim
        return self._codebook.mean(loss, chosen.indices) if loss.dim() else loss

    def _diversity(self, chosen: _Chosen, call: _Call) -> Tensor:
        z, mask = self._layout.by_position(call.z, call.mask, call.shape)
        metric, temperature = self._codebook.search_metric, self.codebook_diversity_temperature
        return diversity_loss(z, chosen.codes, metric, temperature, mask)

    def _optimise_in_place(self, call: _Call, chosen: _Chosen) -> Tensor:
        """One step of the codebook's own optimizer on mean ‖sg[z] − e‖²; returns that loss."""
        loss = self._codebook.collect_gradient(call.z, chosen.indices)
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss

    def update_in_place_optimizer(self) -> None:
        """A step of `in_place_codebook_optimizer` with the gradients collected since its last."""
        if self.in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer.step()
            self.in_place_codebook_optimizer.zero_grad()

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """An update of the codebook by x (as in `forward`) whose indices are known."""
        check_indices("VectorQuantize.update_indices", "indices", indices, self.codebook_size)
        rows, shape = self._layout.rows(x)
        z, head_mask = self._projected(rows, self._layout.row_mask(mask, None, shape, x.device))
        given = self._layout.head_indices(indices, shape, head_mask)
        self._codebook.update_indices(z, given, head_mask)

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """In training, restart dead codes at vectors of x (B, N, heads · codebook_dim)."""
        z = self._layout.split(x.reshape(-1, x.shape[-1]))
        self._codebook.expire_codes_(self._codebook.transform_input(z))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code rows of the indices that `forward` returned; zeros for −1.

        Returns:
            (B, N, D); (B, N, heads, D) for a codebook shared by several heads; (B, N, heads·D) for
            separate ones. Channels go where x has them, for one head or separate codebooks.
        """
        check_indices(
            "VectorQuantize.get_codes_from_indices", "indices", indices, self.codebook_size
        )
        codes = self.codebook
        if self.separate_codebook_per_head:
            offset = torch.arange(self.heads, device=indices.device) * self.codebook_size
            rows = torch.where(indices < 0, -1, indices + offset)
            found = rows_of_codes(codes.flatten(0, 1), rows).flatten(-2)
        else:
            found = rows_of_codes(codes, indices)
            if self.heads > 1:
                return found
        return found if self._layout.channels_last else found.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` makes of these indices: codes, projected out, in x's layout."""
        codes = self.get_codes_from_indices(indices)
        if self.heads > 1 and not self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        elif not self._layout.channels_last:
            codes = codes.movedim(1, -1)
        output: Tensor = self.project_out(codes)
        return output if self._layout.channels_last else output.movedim(-1, 1)

    def _projected(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """z (h, N, D), and which of its rows count.

        A row that is not finite does not reach the projections: its products with a gradient of
        zero would be NaN, in the gradient of every weight. It is lost with all its heads.
        """
        if self.has_projections or self.heads > 1:
            finite = rows.isfinite().all(dim=-1)
            rows = torch.where(finite[:, None], rows, 0.0)
            mask = finite if mask is None else mask & finite
        if self.has_projections:
            rows = self.project_in(rows)
        if mask is not None and self._layout.heads_in_rows > 1:
            mask = mask.repeat_interleave(self._layout.heads_in_rows)
        return self._codebook.transform_input(self._layout.split(rows)), mask

    def _padded(
        self, quantize: Tensor, rows: Tensor, mask: Tensor | None, topk: int | None
    ) -> Tensor:
        """Quantized rows, several for each of `rows` with topk; NaN where x is, and padding."""
        few = quantize.unflatten(0, (len(rows), 1 if topk is None else topk))
        if self.has_projections or self.heads > 1:
            finite = rows.isfinite().all(dim=-1)
            few = torch.where(finite[:, None, None], few, torch.nan)
        if mask is None:
            return few
        padding = 0.0 if self.return_zeros_for_masked_padding else rows[:, None]
        return torch.where(mask[:, None, None], few, padding)

    def _check_call(
        self, topk: int | None, transform: CodebookTransform | None, indices: Tensor | None
    ) -> None:
        """Arguments of `forward` that exclude each other."""
        where = "VectorQuantize.forward"
        if topk is not None:
            optimises = self.in_place_codebook_optimizer is not None
            by_entropy = self.commitment_use_cross_entropy_loss
            require(int(topk) >= 1, f"{where}: topk must be at least 1; got {topk}.")
            require(self.heads == 1, f"{where}: topk needs heads=1; got {self.heads}.")
            require(
                not (self.training and (optimises or by_entropy)),
                f"{where}: topk excludes, in training, in_place_codebook_optimizer and "
                "commitment_use_cross_entropy_loss.",
            )
        if transform is not None:
            require(self.heads == 1, f"{where}: codebook_transform_fn needs heads=1.")
            require(
                topk is None
                and indices is None
                and not (self.stochastic_sample_codes or self.commitment_use_cross_entropy_loss)
                and self.codebook_diversity_loss_weight == 0.0,
                f"{where}: codebook_transform_fn excludes topk, indices, "
                "stochastic_sample_codes and the losses that need all scores.",
            )
