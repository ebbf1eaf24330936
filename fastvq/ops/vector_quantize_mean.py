"""vector_quantize_mean: vector quantization with the mean of its losses, for a training step.

The search and the gradients are those of `vector_quantize`, by the same kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends import CPU_EXTENSION, choose
from .registration import register
from .vector_quantize import VectorQuantizeOutput, _forward, _forward_fake, input_gradients


def vector_quantize_mean(
    x: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "l2",
    gradient: str = "straight_through",
) -> VectorQuantizeOutput:
    """`vector_quantize`, its two losses as means over the rows that have a code, and D.

        commitment = Σ_n ‖x[n] − sg[q[n]]‖² / (D · |{n : indices[n] ≥ 0}|),   codebook likewise

    0 where no row has a code. Arguments and the other results are those of `vector_quantize`;
    the mask's shape and the names of options are not checked.

    Returns:
        A named tuple: quantized, indices, and the means ().
    Raises:
        ValueError, TypeError, RuntimeError: x or the codebook, as `vector_quantize`.
    """
    checks.check_rows("vector_quantize", x)
    checks.check_codebook("vector_quantize", codebook, x)
    backend = choose("vector_quantize", None, x, codebook)
    if torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad):
        outputs = _VectorQuantizeMean.apply(x, codebook, mask, metric, gradient, backend)
        quantized, indices, commitment, codebook_loss = outputs
    else:
        quantized, indices, commitment, _ = _MEAN_FORWARD(x, codebook, mask, metric, backend)
        codebook_loss = None
    if codebook_loss is None:
        codebook_loss = commitment.detach()
    return VectorQuantizeOutput(quantized, indices, commitment, codebook_loss)


def _mean_forward(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantized, indices, the mean of both losses and what it divided by."""
    quantized, indices, distance = _forward(x, codebook, mask, metric, backend)
    if backend != "cpp":
        counted = indices >= 0
        total = torch.where(counted, distance, 0.0).sum()
        divisor = (counted.sum() * x.shape[-1]).clamp(min=1).to(total.dtype)
        return quantized, indices, total / divisor, divisor
    assert CPU_EXTENSION is not None
    mean, divisor = distance.new_empty(()), distance.new_empty(())
    CPU_EXTENSION.counted_mean(
        distance.data_ptr(),
        indices.data_ptr(),
        *(distance.numel(), x.shape[-1]),
        *(mean.data_ptr(), divisor.data_ptr()),
    )
    return quantized, indices, mean, divisor


def _mean_forward_fake(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, indices, distance = _forward_fake(x, codebook, mask, metric, backend)
    return quantized, indices, distance.new_empty(()), distance.new_empty(())


class _VectorQuantizeMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        metric: str,
        gradient: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        quantized, indices, mean, divisor = _MEAN_FORWARD(x, codebook, mask, metric, backend)
        ctx.save_for_backward(x, codebook, indices, divisor)
        ctx.gradient, ctx.backend = gradient, backend
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        # A codebook that gets no gradient needs no loss of its own.
        codebook_loss = mean.clone() if ctx.needs_input_grad[1] else None
        return quantized, indices, mean, codebook_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_quantized: Tensor | None,
        _: Tensor | None,
        grad_commitment: Tensor | None,
        grad_codebook_loss: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        _, _, indices, divisor = ctx.saved_tensors
        by_row = [
            None if grad is None else (grad / divisor).expand(indices.shape)
            for grad in (grad_commitment, grad_codebook_loss)
        ]
        return *input_gradients(ctx, grad_quantized, *by_row), None, None, None, None


_MEAN_FORWARD = register(
    "vector_quantize_mean(Tensor x, Tensor codebook, Tensor? mask, str metric, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _mean_forward,
    _mean_forward_fake,
)
