"""residual_quantize: a sequence of codebooks, each on what the last one left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.reference import residual_quantize as reference

from . import checks
from .backends import CPU_EXTENSION, choose
from .code_statistics import rows_of_codes
from .nearest_code import DTYPE_CODES, search
from .registration import register


class ResidualQuantizeOutput(NamedTuple):
    """What `residual_quantize` returns: quantized (N, D), indices (N, Q)."""

    quantized: Tensor
    indices: Tensor


def residual_quantize(
    x: Tensor, codebooks: Tensor, *, backend: str | None = None
) -> ResidualQuantizeOutput:
    """Quantize rows by Q codebooks in turn, each on the residual of those before it.

        r₀ = x;   i_q = nearest_code(r_q, codebooks[q]);   r_{q+1} = r_q − codebooks[q, i_q]
        quantized = Σ_q codebooks[q, i_q]

    Residuals and the running sum are float32 (float64 if an input is), rounded once a level;
    every index is exact for the residual it was given. The gradient to x is straight-through;
    none reaches the codebooks.

    Args:
        x: (N, D) float32, float16, bfloat16 or float64 (reference only); any strides.
        codebooks: (Q, K, D), Q ≥ 1, same device.
        backend: "triton", "cpp" or "reference"; None chooses.
    Returns:
        A named tuple: quantized (N, D) in the codebooks' dtype; indices (N, Q) int64. A row
        without a nearest code at some level gets −1 from there on, NaN, and no gradient.
    Raises:
        ValueError, TypeError, RuntimeError: as `nearest_code`.
    Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1.
    """
    op = "residual_quantize"
    checks.check_rows(op, x)
    checks.check_float(op, "codebooks", codebooks)
    matches = codebooks.dim() == 3 and codebooks.shape[2] == x.shape[-1]
    if x.dim() != 2 or not matches or 0 in codebooks.shape[:2]:
        raise ValueError(
            f"{op}: x must be (N, D) and codebooks (Q, K, D) with Q, K ≥ 1; got "
            f"{checks.shape(x)} and {checks.shape(codebooks)}."
        )
    checks.check_device(op, "codebooks", codebooks, x)
    chosen = choose(op, backend, x, codebooks)
    if backend == "reference":
        return ResidualQuantizeOutput(*reference.residual_quantize(x, codebooks))
    return ResidualQuantizeOutput(*_ResidualQuantize.apply(x, codebooks.detach(), chosen))


def _forward(x: Tensor, codebooks: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        return _forward_cpp(x, codebooks)
    if backend == "triton":
        return _forward_triton(x, codebooks)
    wide = torch.float64 if torch.float64 in (x.dtype, codebooks.dtype) else torch.float32
    residual = x.to(wide, copy=True)
    total = torch.zeros_like(residual)
    indices = x.new_empty((len(x), len(codebooks)), dtype=torch.int64)
    lost = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for level, book in enumerate(codebooks):
        index, _ = search(residual, book, "l2", backend)
        lost = lost | (index < 0)
        index = torch.where(lost, -1, index)
        chosen = rows_of_codes(book, index).to(wide)
        residual.sub_(chosen)
        total.add_(chosen)
        indices[:, level] = index
    return torch.where(lost[:, None], torch.nan, total).to(codebooks.dtype), indices


def _forward_cpp(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    assert CPU_EXTENSION is not None
    x, codebooks = x.contiguous(), codebooks.contiguous()
    quantized, indices = _empty_outputs(x, codebooks)
    CPU_EXTENSION.residual_quantize(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        codebooks.data_ptr(),
        DTYPE_CODES[codebooks.dtype],
        *(codebooks.shape[0], x.shape[0], *codebooks.shape[1:]),
        quantized.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
    )
    return quantized, indices


def _empty_outputs(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=codebooks.dtype),
        x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64),
    )


def _forward_triton(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    from fastvq.kernels.triton.residual_quantize import subtract_codes, sum_of_codes

    # The one scratch of the input's size; the first level searches x itself.
    residual = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    indices = x.new_empty((len(codebooks), len(x)), dtype=torch.int64)
    for level, book in enumerate(codebooks):
        source = x if level == 0 else residual
        found, _ = search(source, book, "l2", "triton", return_distance=False)
        indices[level] = found
        if level + 1 < len(codebooks):
            subtract_codes(source, book, found, residual)
    return sum_of_codes(codebooks, indices.T), indices.T.contiguous()


class _ResidualQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebooks: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        quantized, indices = torch.ops.fastvq.residual_quantize(x, codebooks, backend)
        ctx.save_for_backward(indices)
        ctx.x_dtype = x.dtype
        ctx.mark_non_differentiable(indices)
        return quantized, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        found = (indices >= 0).all(dim=1)[:, None]
        return torch.where(found, grad, 0.0).to(ctx.x_dtype), None, None


register(
    "residual_quantize(Tensor x, Tensor codebooks, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda x, codebooks, backend: _empty_outputs(x, codebooks),
)
