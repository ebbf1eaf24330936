"""quantize_to_indices: vector quantization to codes that something else has chosen.

For indices that are not the nearest code's: sampled ones, the second nearest, another model's. The
gradients are those of `vector_quantize`, by the same raw ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends import choose
from .code_statistics import rows_of_codes
from .vector_quantize import VectorQuantizeOutput, input_gradients


def quantize_to_indices(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    gradient: str = "straight_through",
    backend: str | None = None,
) -> VectorQuantizeOutput:
    """Replace each row by the code it was given; losses and gradients as `vector_quantize`.

        quantized[n] = q[n] = codebook[indices[n]]
        commitment[n] = ‖x[n] − sg[q[n]]‖²,   codebook[n] = ‖sg[x[n]] − q[n]‖²

    A row with index −1 gets zeros, or NaN where the row itself is not finite, zero losses and no
    gradient.

    Args:
        x: (N, D) or (heads, N, D); float32, float16, bfloat16 or float64.
        codebook: (K, D), or (heads, K, D).
        indices: (N,) or (heads, N) int64, each −1 or in 0 … K−1; values are not checked.
        gradient: "straight_through" or "rotation".
        backend: of the backward pass, as `vector_quantize`.
    Returns:
        As `vector_quantize`; `indices` as given.
    Raises:
        ValueError, TypeError, RuntimeError: as `vector_quantize`.
    """
    op = "quantize_to_indices"
    checks.check_rows(op, x)
    checks.check_codebook(op, codebook, x)
    checks.check_choice(op, "gradient", gradient, ("straight_through", "rotation"))
    if indices.dtype != torch.int64 or indices.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: indices must be int64 {tuple(x.shape[:-1])} to match x {checks.shape(x)}; "
            f"got {indices.dtype} {checks.shape(indices)}."
        )
    checks.check_device(op, "indices", indices, x)
    chosen = choose("vector_quantize", backend, x, codebook)
    outputs = _QuantizeToIndices.apply(x, codebook, indices, gradient, chosen)
    return VectorQuantizeOutput(outputs[0], indices, *outputs[1:])


class _QuantizeToIndices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, indices: Tensor, gradient: str, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, codebook, indices)
        ctx.gradient, ctx.backend = gradient, backend
        ctx.set_materialize_grads(False)
        quantized = rows_of_codes(codebook, indices)
        wide = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
        rows = torch.where((indices >= 0)[..., None], x, 0.0).to(wide)
        distance = (rows - quantized).square().sum(dim=-1)
        finite = x.isfinite().all(dim=-1)
        quantized = torch.where(finite[..., None], quantized, torch.nan)
        return quantized, distance, distance.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_quantized: Tensor | None,
        grad_commitment: Tensor | None,
        grad_codebook_loss: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        found = input_gradients(ctx, grad_quantized, grad_commitment, grad_codebook_loss)
        return *found, None, None, None
