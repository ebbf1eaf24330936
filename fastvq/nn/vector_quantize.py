"""`VectorQuantize`, a drop-in for the module of that name in vector-quantize-pytorch.

Lives here: the argument list, the layouts (channel first, pictures, videos, heads), projections and
the return values of that library. The codebook and its updates are `codebook.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codebook import Codebook


class LossBreakdown(NamedTuple):
    """The terms of the loss, unweighted."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Nearest codes of vectors, with the arguments and results of vector-quantize-pytorch.

        z = project_in(x),   index[n] = argmin_k ‖z[n] − e[k]‖²,   quantize = project_out(e[index])
        loss = commitment_weight · mean ‖z − sg[e[index]]‖²   (training only, else 0)

    The mean divides by counted vectors times channels. The codes follow z by moving averages (see
    `fastvq.nn.Codebook`); with `learnable_codebook` they are a parameter, and the loss, of the
    same value, also has its gradient to the codes. The gradient of `quantize` to z is the rotation
    trick's unless `rotation_trick=False`, then straight-through. Where that library's indices
    depend on rounding these are exact, and state stays float32 in a half-precision model.

    Arguments keep their order, names and defaults. Those that this version does not support are
    refused by name when set to anything but their default. With several processes statistics,
    k-means and revived codes are always shared.

    Args:
        dim: channels of x.
        codebook_size: K.
        codebook_dim: channels of a code (per head); `dim` if None. Linear projections, `project_in`
            and `project_out`, join the two where `codebook_dim` · `heads` is not `dim`.
        heads: split z into this many vectors, each with its own index.
        separate_codebook_per_head: a codebook for each head instead of one for all.
        decay, eps: of the moving averages.
        freeze_codebook: never change the codes.
        kmeans_init, kmeans_iters: start from k-means on the first training batch.
        threshold_ema_dead_code: restart codes whose running count is below this many rows.
        channel_last: x is (B, N, dim), else (B, dim, N).
        accept_image_fmap, accept_3d_fmap: x is (B, dim, H, W), or (B, dim, T, H, W).
        commitment_weight: weight of the loss.
        rotation_trick: None means True.
        ema_update: None means `not learnable_codebook`; False leaves the codes to other means.
        learnable_codebook: codes are a parameter; excludes `ema_update=True`.
        return_zeros_for_masked_padding: masked positions come back as zeros, else as x.
    Raises:
        ValueError: an unsupported argument, or one out of its range.
    van den Oord et al. 2017, arXiv:1711.00937; Fifty et al. 2024, arXiv:2410.06424 (rotation).
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
        _refuse("VectorQuantize", dict(locals()), _UNSUPPORTED_ARGUMENTS)
        if sync_codebook is False:
            raise ValueError(
                "VectorQuantize: sync_codebook=False is not supported yet; leave it at None."
            )
        learnable = bool(learnable_codebook)
        if learnable and ema_update:
            raise ValueError(
                "VectorQuantize: learnable_codebook=True excludes ema_update=True; "
                "a code is moved by the loss or by averages."
            )
        if heads < 1:
            raise ValueError(f"VectorQuantize: heads must be at least 1; got {heads}.")
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError(
                "VectorQuantize: accept_image_fmap and accept_3d_fmap exclude another."
            )
        code_dim = dim if codebook_dim is None else codebook_dim
        projects = code_dim * heads != dim
        self.project_in = nn.Linear(dim, code_dim * heads) if projects else nn.Identity()
        self.project_out = nn.Linear(code_dim * heads, dim) if projects else nn.Identity()
        self._codebook = Codebook(
            codebook_size,
            code_dim,
            num_codebooks=heads if separate_codebook_per_head else 1,
            learnable=learnable,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iterations=kmeans_iters,
            revive_below=0.0,
            revive_below_count=float(threshold_ema_dead_code),
            gradient="straight_through" if rotation_trick is False else "rotation",
        )
        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.has_projections = projects
        self.freeze_codebook = freeze_codebook
        self.ema_update = not learnable if ema_update is None else ema_update
        self.learnable_codebook = learnable
        self.channel_last = channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.commitment_weight = commitment_weight
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

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
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: Tensor | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantize x: (B, N, dim), (B, dim), or as the layout arguments say.

        Args:
            mask: (B, N) bool (or the shape of the map), True = counts.
            lens: (B,) instead of a mask: the first lens[b] vectors of each example count.
            freeze_codebook: leave the codes alone in this call; None asks the module's.
            return_loss_breakdown: also return the `LossBreakdown`.
        Returns:
            quantize in x's shape and dtype; indices, int64 in x's shape without its channels, with
            a last dimension `heads` where there are several; loss (). Masked positions have index
            −1.
        Raises:
            ValueError: an unsupported argument is set, or shapes disagree.
        """
        _refuse("VectorQuantize.forward", dict(locals()), _UNSUPPORTED_FORWARD)
        rows, shape = self._to_rows(x)
        if lens is not None:
            if mask is not None:
                raise ValueError("VectorQuantize.forward: mask and lens exclude another.")
            mask = torch.arange(shape[-1], device=x.device) < lens[:, None]
        if mask is not None:
            if mask.shape != shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"VectorQuantize.forward: mask must be bool {tuple(shape)} to match x; "
                    f"got {mask.dtype} {tuple(mask.shape)}."
                )
            mask = mask.reshape(-1)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        follows = self.ema_update if ema_update is None else ema_update
        z = self._split_heads(self.project_in(rows))
        head_mask = None if mask is None else mask.repeat_interleave(self._heads_in_rows)
        out = self._codebook(
            z, head_mask, freeze=frozen or not (follows or self.learnable_codebook)
        )
        quantize = self.project_out(self._join_heads(out.quantized))
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else rows
            quantize = torch.where(mask[:, None], quantize, padding)
        commitment = out.commitment
        if self.learnable_codebook and not frozen:
            commitment = commitment + (out.codebook - out.codebook.detach())
        zero = commitment.new_zeros(())
        loss = self.commitment_weight * commitment if self.training else zero
        result = (self._from_rows(quantize, shape), self._index_map(out.indices, shape), loss)
        if return_loss_breakdown:
            return *result, LossBreakdown(commitment if self.training else zero, zero, zero, zero)
        return result

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code rows of the indices that `forward` returned; zeros for −1.

        Returns:
            (B, N, D); (B, N, heads, D) for a codebook shared by several heads; (B, N, heads·D) for
            separate ones. Channels go where x has them, for one head or separate codebooks.
        """
        codes = self.codebook
        if self.separate_codebook_per_head:
            offset = torch.arange(self.heads, device=indices.device) * self.codebook_size
            found = F.embedding(indices.clamp(min=0) + offset, codes.flatten(0, 1))
        else:
            found = F.embedding(indices.clamp(min=0), codes)
        found = torch.where((indices >= 0)[..., None], found, 0.0)
        if self.separate_codebook_per_head:
            found = found.flatten(-2)
        elif self.heads > 1:
            return found
        return found if self._channels_last else found.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` makes of these indices: codes, projected out, in x's layout."""
        codes = self.get_codes_from_indices(indices)
        if self.heads > 1 and not self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        elif not self._channels_last:
            codes = codes.movedim(1, -1)
        output: Tensor = self.project_out(codes)
        return output if self._channels_last else output.movedim(-1, 1)

    @property
    def _channels_last(self) -> bool:
        return self.channel_last and not (self.accept_image_fmap or self.accept_3d_fmap)

    @property
    def _heads_in_rows(self) -> int:
        """How many rows of the one codebook a vector becomes."""
        return 1 if self.separate_codebook_per_head else self.heads

    def _to_rows(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """x as (rows, dim), and its shape without channels."""
        dims = 4 if self.accept_image_fmap else 5 if self.accept_3d_fmap else 3
        channels = x.dim() - 1 if self._channels_last or x.dim() == 2 else 1
        if x.dim() not in ((2, 3) if dims == 3 else (dims,)) or x.shape[channels] != self.dim:
            raise ValueError(
                f"VectorQuantize: x must have {dims} dimensions with {self.dim} channels in "
                f"dimension {-1 if self._channels_last else 1}; got {tuple(x.shape)}."
            )
        moved = x.movedim(channels, -1)
        return moved.reshape(-1, self.dim), moved.shape[:-1]

    def _from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        output = rows.reshape(*shape, self.dim)
        return output if self._channels_last or len(shape) == 1 else output.movedim(-1, 1)

    def _split_heads(self, z: Tensor) -> Tensor:
        """(rows, heads·D) → (rows·heads, D), or (heads, rows, D) for separate codebooks."""
        if self.heads == 1:
            return z
        split = z.unflatten(-1, (self.heads, -1))
        return split.transpose(0, 1) if self.separate_codebook_per_head else split.flatten(0, 1)

    def _join_heads(self, q: Tensor) -> Tensor:
        """The inverse of `_split_heads`."""
        if self.heads == 1:
            return q
        split = q.transpose(0, 1) if q.dim() == 3 else q.unflatten(0, (-1, self.heads))
        return split.flatten(-2)

    def _index_map(self, indices: Tensor, shape: torch.Size) -> Tensor:
        if self.heads == 1:
            return indices.reshape(shape)
        joined = indices.transpose(0, 1) if indices.dim() == 2 else indices
        return joined.reshape(*shape, self.heads)


# Arguments of the constructor, and of forward, that are not supported, with their defaults.
_UNSUPPORTED_ARGUMENTS: dict[str, Any] = {
    "sync_kmeans": True,
    "use_cosine_sim": False,
    "layernorm_after_project_in": False,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "manual_ema_update": False,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
    "route_gradients_to_input": True,
}
_UNSUPPORTED_FORWARD: dict[str, Any] = {
    "indices": None,
    "topk": None,
    "sample_codebook_temp": None,
    "codebook_transform_fn": None,
    "ema_update_weight": None,
    "accum_ema_update": False,
}


def _refuse(where: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """ValueError for the first argument that is not at its default."""
    for name, default in defaults.items():
        value = given[name]
        if value is not default and (isinstance(value, Tensor) or value != default):
            shown = value if isinstance(value, (bool, int, float)) else type(value).__name__
            raise ValueError(
                f"{where}: {name}={shown} is not supported yet; leave it at {default}."
            )
