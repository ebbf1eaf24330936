"""`LFQ`, a drop-in for the module of that name in vector-quantize-pytorch.

Lives here: lookup-free quantization with its projections, layouts and losses. The two entropies are
`binary_entropy.py`; several LFQs on each other's residuals are `residual_lfq.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.ops.checks import check_indices, check_int

from .binary_entropy import binary_entropies, half_signs, sign_codes
from .finite_rows import all_finite, projected
from .precision import without_autocast

# So few vectors and codes go through the entropies all at once: what an operation costs to start
# outweighs its work. With 1024 codes it is quicker for up to about so many vectors.
_FEW_ROWS, _FEW_CODES = 16, 2048


class LFQOutput(NamedTuple):
    """What `LFQ` returns; shapes as there."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LFQLossBreakdown(NamedTuple):
    """The terms of the loss, unweighted: two entropies in nats, and a mean square."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """scale · x/‖x‖ · W with the columns of W (dim_in, dim_out) scaled to length one."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0)
        return product * self.scale


class LFQ(nn.Module):
    """Quantize every channel to its sign; the codebook is {−s, s}^d, never searched.

        q_d = s if z_d > 0 else −s,   index = Σ_d [z_d > 0] · 2^(d_last − d)
        loss = w_e · (E_n h(p(·|z_n)) − γ · h(E_n p(·|z_n))) + w_c · mean (z − sg[q])²

    p(k|z) = softmax_k(2τ z·c_k) over all 2^d codes, h is the entropy in nats with probabilities
    below 1e-5 counts as 1e-5 in its logarithm, τ is `inv_temperature`. Loss in training only, else
    0. The gradient of the quantized z to z is straight-through. Entropies take memory of N·2^(d/2)
    and not of N·2^d (see `binary_entropy.py`), always in float32.

    A vector that is not finite gets index −1, NaN, and no part in any loss. With
    `torch.distributed` running, the batch mean E_n of the second entropy is over all processes.

    Args:
        dim: channels of x; num_codebooks · log2(codebook_size) if None.
        codebook_size: 2^d; 2^dim if None.
        entropy_loss_weight, commitment_loss_weight, diversity_gamma: w_e, w_c, γ.
        straight_through_activation: applied to z where gradients pass.
        num_codebooks: codes per vector, from as many slices of its channels.
        keep_num_codebooks_dim: give indices a last dimension of num_codebooks; None: if it is > 1.
        codebook_scale: s.
        frac_per_sample_entropy: use a random fraction of the vectors in both entropies.
        has_projections: None means where dim is not num_codebooks · d.
        projection_has_bias: of both projections.
        soft_clamp_input_value: v ≥ s, to bound z by v·tanh(z/v).
        cosine_sim_project_in: project in by cosine similarity, times
            `cosine_sim_project_in_scale` (s if None).
        channel_first: None means x is (B, dim, …) if it has four dimensions or more.
        experimental_softplus_entropy_loss: softplus(entropy term + `entropy_loss_offset`).
        spherical: put z and the codes on the sphere of radius s (BSQ).
        force_quantization_f32: False leaves half-precision codes in their dtype.
        orthogonal_rotation: rotate codes by a fixed random orthogonal matrix.
    Raises:
        ValueError: an argument out of its range, or arguments that exclude another.
    Yu et al. 2023, arXiv:2310.05737, eq. 3–5. Spherical: Zhao et al. 2024, arXiv:2406.07548.
    """

    mask: Tensor
    zero: Tensor
    orthogonal_rot: Tensor
    _first_signs: Tensor
    _last_signs: Tensor
    _signs: Tensor | None

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module = nn.Identity(),  # noqa: B008 — it has no state
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        if codebook_size is None:
            if dim is None:
                raise ValueError("LFQ: dim or codebook_size must be given; got neither.")
            check_int("LFQ", "dim", dim)
            codebook_size = 2**dim
        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            raise ValueError(
                f"LFQ: codebook_size must be a power of 2, at least 2; got {codebook_size}. "
                f"The next is {2 ** max(1, math.ceil(math.log2(max(codebook_size, 2))))}."
            )
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        if num_codebooks > 1 and not keep:
            raise ValueError(
                f"LFQ: keep_num_codebooks_dim=False needs num_codebooks=1; got {num_codebooks}."
            )
        if not 0.0 < frac_per_sample_entropy <= 1.0:
            raise ValueError(
                f"LFQ: frac_per_sample_entropy must be in (0, 1]; got {frac_per_sample_entropy}."
            )
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"LFQ: soft_clamp_input_value must be at least codebook_scale ({codebook_scale}); "
                f"got {soft_clamp_input_value}."
            )
        bits = codebook_size.bit_length() - 1
        width = bits * num_codebooks
        self.dim = width if dim is None else dim
        self.has_projections = self.dim != width if has_projections is None else has_projections
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            if cosine_sim_project_in:
                given = cosine_sim_project_in_scale
                self.project_in = CosineSimLinear(
                    self.dim, width, codebook_scale if given is None else given
                )
            else:
                self.project_in = nn.Linear(self.dim, width, bias=projection_has_bias)
            self.project_out = nn.Linear(width, self.dim, bias=projection_has_bias)
        self.codebook_size, self.codebook_dim = codebook_size, bits
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim, self.channel_first = keep, channel_first
        self.activation = straight_through_activation
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(bits, bits)))
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.commitment_loss_weight = commitment_loss_weight
        self.codebook_scale = codebook_scale
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.force_quantization_f32 = force_quantization_f32
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        first, last = half_signs(bits, self.mask.device)
        self.register_buffer("_first_signs", first, persistent=False)
        self.register_buffer("_last_signs", last, persistent=False)
        few = sign_codes(bits, self.mask.device) if codebook_size <= _FEW_CODES else None
        self.register_buffer("_signs", few, persistent=False)

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, dim={self.dim}, codebooks={self.num_codebooks}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: the module's floating dtype."""
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """(codebook_size, d): the code of every index before `spherical`, made anew."""
        return self.bits_to_codes(
            (sign_codes(self.codebook_dim, self.mask.device) > 0).to(self.dtype)
        )

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """0 → −s, 1 → s."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def maybe_l2norm(self, t: Tensor) -> Tensor:
        """With `spherical`, t scaled to length s."""
        return F.normalize(t, dim=-1) * self.codebook_scale if self.spherical else t

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """What `forward` makes of these indices, in x's layout; codes of zeros for −1.

        Args:
            project_out: False leaves the projection out.
        """
        check_indices("LFQ.indices_to_codes", "indices", indices, self.codebook_size)
        image = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        first = image if self.channel_first is None else self.channel_first
        if not self.keep_num_codebooks_dim:
            indices = indices[..., None]
        bits = ((indices[..., None] & self.mask) != 0).to(self.dtype)
        codes = torch.where((indices >= 0)[..., None], self._codes_of(bits > 0), 0.0)
        codes = codes.to(self.dtype)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.t()
        codes = codes.flatten(-2)
        if project_out:
            codes = self.project_out(codes)
        return codes.movedim(-1, 1) if first else codes

    def _codes_of(self, positive: Tensor) -> Tensor:
        scale = self.codebook_scale
        return self.maybe_l2norm(torch.where(positive, scale, -scale))

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> LFQOutput | tuple[LFQOutput, LFQLossBreakdown]:
        """Quantize (B, N, dim), or a map (B, dim, H, W, …).

        Args:
            inv_temperature: τ.
            return_loss_breakdown: also return the `LFQLossBreakdown`.
            mask: (B, N) bool, True = counts in the losses.
        Returns:
            quantized, in x's shape and dtype; indices, int64 in x's shape without its channels,
            with a last dimension `num_codebooks` where it is kept; the loss ().
        Raises:
            ValueError: x has another number of channels.
        """
        first = x.dim() >= 4 if self.channel_first is None else self.channel_first
        rows = x.movedim(1, -1) if first else x
        if rows.shape[-1] != self.dim:
            raise ValueError(
                f"LFQ: x must have {self.dim} channels in dimension {1 if first else -1}; "
                f"got {tuple(x.shape)}."
            )
        z = projected(self.project_in, rows)
        if self.soft_clamp_input_value is not None:
            z = (z / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        z = z.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            z = z @ self.orthogonal_rot
        with without_autocast(x.device):
            z = self.maybe_l2norm(z)
            dtype = z.dtype
            if self.force_quantization_f32:
                z = z.float()
            positive = z > 0
            indices = (positive * self.mask).sum(dim=-1)
            quantized = codes = self._codes_of(positive).to(z.dtype)
            # None: all of them.
            finite = None if all_finite(z) else z.isfinite().all(dim=-1)
            if finite is not None:
                indices = torch.where(finite, indices, -1)
                quantized = torch.where(finite[..., None], codes, torch.nan)
            losses, loss = LFQLossBreakdown(self.zero, self.zero, self.zero), self.zero
            if self.training:
                losses, loss = self._losses(z, codes, finite, mask, inv_temperature)
                surrogate = self.activation(z)
                if finite is not None:
                    surrogate = torch.where(finite[..., None], surrogate, 0.0)
                # surrogate − sg[surrogate] is exactly zero: the value is the code.
                quantized = quantized + (surrogate - surrogate.detach())
            quantized = quantized.to(dtype)
        if self.orthogonal_rotation:
            quantized = quantized @ self.orthogonal_rot.t()
        quantized = projected(self.project_out, quantized.flatten(-2))
        if first:
            quantized = quantized.movedim(-1, 1)
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        out = LFQOutput(quantized, indices, loss)
        return (out, losses) if return_loss_breakdown else out

    def _losses(
        self,
        z: Tensor,
        codes: Tensor,
        finite: Tensor | None,
        mask: Tensor | None,
        inv_temperature: float,
    ) -> tuple[LFQLossBreakdown, Tensor]:
        """The terms of the loss, and the loss, over the vectors that count."""
        rows = z.reshape(-1, self.num_codebooks, self.codebook_dim)
        if mask is not None and mask.numel() != len(rows):
            raise ValueError(
                f"LFQ.forward: mask must be bool {tuple(z.shape[:-2])} to match x; "
                f"got {tuple(mask.shape)}."
            )
        counts = rows.new_ones(len(rows), dtype=torch.float32)
        if finite is not None:
            counts *= finite.reshape(-1, self.num_codebooks).all(dim=-1)
            rows = torch.where((counts > 0)[:, None, None], rows, 0.0)
        if mask is not None:
            counts *= mask.reshape(-1)
        commitment = self.zero
        if self.commitment_loss_weight > 0.0:
            squares = (rows - codes.view_as(rows)).float().square().flatten(1).sum(dim=1)
            terms = counts.sum() * rows.shape[1:].numel()
            commitment = (squares @ counts) / terms.clamp(min=1)
        sampled, weights = self._sampled(rows, counts, mask)
        # The size of a code's channels.
        size = self.codebook_scale / (math.sqrt(self.codebook_dim) if self.spherical else 1.0)
        signs: tuple[Tensor, ...] = self._first_signs.float(), self._last_signs.float()
        if self._signs is not None and len(sampled) * self.num_codebooks <= _FEW_ROWS:
            signs = (self._signs.float(),)
        per_sample, batch = binary_entropies(
            sampled.float(), weights, 2.0 * inv_temperature * size, signs
        )
        entropy = per_sample - self.diversity_gamma * batch
        if self.experimental_softplus_entropy_loss:
            entropy = F.softplus(entropy + self.entropy_loss_offset)
        loss = entropy * self.entropy_loss_weight
        if self.commitment_loss_weight > 0.0:
            loss = loss + commitment * self.commitment_loss_weight
        return LFQLossBreakdown(per_sample, batch, commitment), loss

    def _sampled(self, rows: Tensor, counts: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows in the entropies, a random fraction where one is asked for, and their counts."""
        if self.frac_per_sample_entropy == 1.0:
            return rows, counts
        if mask is not None:
            rows, counts = rows[mask.reshape(-1)], counts[mask.reshape(-1)]
        share = int(len(rows) * self.frac_per_sample_entropy)
        drawn = (torch.randn(len(rows)).argsort(dim=-1) < share).to(rows.device)
        return rows[drawn], counts[drawn]
