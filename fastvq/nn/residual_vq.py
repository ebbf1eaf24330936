"""`ResidualVQ`, a drop-in for the module of that name in vector-quantize-pytorch.

Lives here: how one level's residual reaches the next, and what the levels return together. A level
is a `VectorQuantize`; what all residual quantizers share is `residual_levels.py`, several of them
side by side `grouped_residual_vq.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.ops.checks import check_indices, check_int
from fastvq.ops.code_statistics import rows_of_codes

from .finite_rows import linear_projections, projected
from .residual_levels import ResidualLevels
from .vector_quantize import VectorQuantize
from .vector_quantize_arguments import refuse_unsupported

# Arguments of the constructor that are out of scope, with their defaults (None is a beam of 1).
_UNSUPPORTED: dict[str, Any] = {
    "diveq": False,
    "implicit_neural_codebook": False,
    "mlp_kwargs": None,
    "beam_size": 1,
    "eval_beam_size": 1,
    "beam_score_quantizer_weights": None,
}


class ResidualVQ(ResidualLevels[VectorQuantize]):
    """Vector quantizers in turn, each on what those before it left.

        r₀ = project_in(x);   c_q = VQ_q(r_q);   r_{q+1} = r_q − sg[c_q]
        quantized = project_out(Σ_q c_q);   loss[q] = VQ_q's, of r_q

    In training each level sends its own gradient to x, the rotation trick's or straight-through, so
    that Q straight-through levels add up to Q times the gradient, as in that library. Residuals and
    sums are float32 for half-precision x, and every index is exact for the residual it was given.

    Arguments keep their names and defaults. QINCo (`implicit_neural_codebook`, `mlp_kwargs`),
    `diveq` and beam search (`beam_size` and its like, unless 1) are refused by name;
    docs/migration.md lists every argument, and where results differ on purpose.

    Args:
        dim: channels of x.
        num_quantizers: Q; may be left out where `codebook_size` is a tuple.
        codebook_size: K of all levels, or of each.
        codebook_dim: channels of a code; `dim` if None, else joined by linear projections.
        shared_codebook: one codebook for all levels; it follows their averages once a step.
        heads: must be 1.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: see
            `ResidualLevels`.
        accept_image_fmap: x is (B, dim, H, W).
        quant_grad_frac: share of c_q that keeps its gradient in r_{q+1}; 0 detaches it.
        return_zeros_for_masked_padding: masked positions come back as zeros, else as x.
        vq_kwargs: further arguments of `VectorQuantize`.
    Raises:
        ValueError: an unsupported argument, or one out of its range.
    Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1. Shared codebook: Lee et al. 2022,
    arXiv:2203.01941, sec. 3.1.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        sizes = _codebook_sizes(codebook_size, num_quantizers)
        super().__init__(
            len(sizes),
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        asked = {
            "diveq": diveq,
            "implicit_neural_codebook": implicit_neural_codebook,
            "mlp_kwargs": mlp_kwargs or None,
            "beam_size": beam_size or 1,
            "eval_beam_size": eval_beam_size or 1,
            "beam_score_quantizer_weights": beam_score_quantizer_weights,
        }
        refuse_unsupported("ResidualVQ", asked, _UNSUPPORTED)
        if heads != 1:
            raise ValueError(
                f"ResidualVQ: heads must be 1; got {heads}. Use GroupedResidualVQ for several "
                "codes a level."
            )
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(
                f"ResidualVQ: shared_codebook=True needs one codebook_size; got {sizes}."
            )
        if shared_codebook:
            vq_kwargs.update(manual_ema_update=True, manual_in_place_optimizer_update=True)
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in, self.project_out = linear_projections(
            dim, self.codebook_dim, self.has_projections
        )
        self.dim, self.accept_image_fmap = dim, accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.codebook_sizes, self.uniform_codebook_size = sizes, len(set(sizes)) == 1
        self.shared_codebook, self.quant_grad_frac = shared_codebook, quant_grad_frac
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=self.codebook_dim,
                codebook_size=size,
                codebook_dim=self.codebook_dim,
                return_zeros_for_masked_padding=return_zeros_for_masked_padding,
                **vq_kwargs,
            )
            for size in sizes
        )
        if shared_codebook:
            for layer in list(self.layers)[1:]:
                layer._codebook = self._layer(0)._codebook

    @property
    def vq_is_ema_updating(self) -> bool:
        """Whether moving averages move the codes."""
        return self._layer(0).ema_update

    @property
    def codebook_size(self) -> int:
        """K of the first level."""
        return self._layer(0).codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """(Q, K, D); a tuple of (K, D) where sizes differ."""
        books = tuple(self._layer(level).codebook for level in range(self.num_quantizers))
        return torch.stack(books) if self.uniform_codebook_size else books

    def _level_codes(self, level: int, indices: Tensor) -> Tensor:
        layer = self._layer(level)
        check_indices("ResidualVQ.get_codes_from_indices", "indices", indices, layer.codebook_size)
        return rows_of_codes(layer.codebook, indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` makes of indices (B, …, Q), in x's layout."""
        output = super().get_output_from_indices(indices)
        return output.movedim(-1, 1) if self.accept_image_fmap else output

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize (B, N, dim), (B, dim), or (B, dim, H, W) with `accept_image_fmap`.

        Args:
            mask: (B, N) bool, True = counts. Masked positions have index −1.
            indices: (B, N, Q), codes to predict; or a list of what `torch.stack` makes that.
            return_all_codes: also return every level's codes, (Q, B, …, codebook_dim).
            sample_codebook_temp: of levels that draw their codes.
            freeze_codebook: leave the codes alone in this call.
            beam_size: refused, unless 1.
            rand_quantize_dropout_fixed_seed: of quantizer dropout; None draws one.
        Returns:
            quantized, in x's shape and dtype; indices (B, …, Q) int64, −1 for dropped levels;
            losses (Q,) float32, 0 for dropped levels. With `indices`: quantized, and the sum over
            levels of the mean cross-entropy (nats) of `indices` under softmax(score of r_q).
        Raises:
            ValueError: shapes disagree, or `indices` have dropped levels.
        """
        refuse_unsupported("ResidualVQ.forward", {"beam_size": beam_size or 1}, {"beam_size": 1})
        rows = x.movedim(1, -1) if self.accept_image_fmap else x
        shape = rows.shape[:-1]
        if rows.shape[-1] != self.dim:
            raise ValueError(
                f"ResidualVQ: x must have {self.dim} channels in dimension "
                f"{1 if self.accept_image_fmap else -1}; got {tuple(x.shape)}."
            )
        rows = rows.reshape(1, shape.numel(), self.dim)
        row_mask = None if mask is None else self._row_mask(mask, shape)
        predicted = None if indices is None else self._predicted(indices, shape)
        z = projected(self.project_in, rows)
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        depth = self._depth(rand_quantize_dropout_fixed_seed, x.device, predicted is None)
        if self._fits_the_op(z, row_mask, predicted):
            found = ops.residual_quantize(z[0], self.codebooks)  # type: ignore[arg-type]
            quantized, level_indices = found.quantized[None], found.indices[None]
            losses = z.new_zeros(self.num_quantizers, dtype=torch.float32)
        else:
            quantized, level_indices, losses = self._through_levels(
                z,
                depth,
                predicted,
                mask=row_mask,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook or None,
            )
        out = projected(self.project_out, quantized.to(rows.dtype))
        if row_mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else rows
            out = torch.where(row_mask[..., None], out, padding)
        out = out.reshape(*shape, self.dim)
        out = out.movedim(-1, 1) if self.accept_image_fmap else out
        if predicted is not None:
            return out, losses.sum()
        level_indices = level_indices.reshape(*shape, self.num_quantizers)
        if not return_all_codes:
            return out, level_indices, losses
        return out, level_indices, losses, self.get_codes_from_indices(level_indices)

    def _fits_the_op(self, z: Tensor, row_mask: Tensor | None, predicted: Tensor | None) -> bool:
        """Whether all levels go through one call of `fastvq.ops.residual_quantize`."""
        layer = self._layer(0)
        plain = row_mask is None and predicted is None and not self.training
        needs_graph = torch.is_grad_enabled() and (z.requires_grad or layer.learnable_codebook)
        return plain and not needs_graph and self.uniform_codebook_size and not layer.use_cosine_sim

    def _through_levels(
        self, z: Tensor, depth: int, predicted: Tensor | None, **call: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the codes (1, N, d), indices (1, N, Q), and losses (Q,) or (depth,)."""
        residual, total = z, torch.zeros_like(z)
        residuals, levels, losses = [], [], []
        for level in range(depth):
            residuals.append(residual)
            given = None if predicted is None else predicted[..., level]
            codes, *index, loss = self._layer(level)(residual, indices=given, **call)
            total = total + codes
            passed = codes.detach()
            if self.quant_grad_frac > 0.0:
                passed = self.quant_grad_frac * codes + (1.0 - self.quant_grad_frac) * passed
            residual = residual - passed
            levels.extend(index)
            losses.append(loss)
        frozen = self._layer(0).freeze_codebook or call["freeze_codebook"]
        if self.shared_codebook and self.training and not frozen:
            self._update_shared(torch.cat(residuals, dim=1).detach())
        dropped = self.num_quantizers - depth
        losses += [torch.zeros_like(losses[0])] * dropped
        if not levels:
            return total, z.new_empty(0), torch.stack(losses)
        levels += [torch.full_like(levels[0], -1)] * dropped
        return total, torch.stack(levels, dim=-1), torch.stack(losses)

    def _update_shared(self, residuals: Tensor) -> None:
        """The end of a step of the shared codebook: follow the averages, restart dead codes."""
        layer = self._layer(0)
        if layer.ema_update:
            layer._codebook.update_ema()
        layer.update_in_place_optimizer()
        layer.expire_codes_(residuals)

    def _row_mask(self, mask: Tensor, shape: torch.Size) -> Tensor:
        """The mask as (1, N)."""
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"ResidualVQ.forward: mask must be bool {tuple(shape)} to match x; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        return mask.reshape(1, -1)

    def _predicted(self, indices: Tensor | Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The codes to predict as (1, N, Q)."""
        given = indices if isinstance(indices, Tensor) else torch.stack(list(indices))
        if given.shape != (*shape, self.num_quantizers):
            raise ValueError(
                f"ResidualVQ.forward: indices must be {(*shape, self.num_quantizers)} to match x; "
                f"got {tuple(given.shape)}."
            )
        if not torch.compiler.is_compiling() and (given < 0).any():
            raise ValueError(
                "ResidualVQ.forward: indices must have no dropped level (−1); take them from "
                "evaluation, where no level is dropped."
            )
        return given.reshape(1, shape.numel(), self.num_quantizers)


def _codebook_sizes(
    codebook_size: int | tuple[int, ...], num_quantizers: int | None
) -> tuple[int, ...]:
    """K of every level."""
    if not isinstance(codebook_size, tuple):
        if num_quantizers is None:
            raise ValueError(
                "ResidualVQ: num_quantizers must be given, or codebook_size a tuple with a size "
                f"for every level; got codebook_size={codebook_size} alone."
            )
        check_int("ResidualVQ", "num_quantizers", num_quantizers)
        return (codebook_size,) * num_quantizers
    if num_quantizers not in (None, len(codebook_size)):
        raise ValueError(
            f"ResidualVQ: codebook_size must hold num_quantizers={num_quantizers} sizes; "
            f"got {codebook_size}."
        )
    return codebook_size
