"""vector_quantize: the nearest code row, both losses, and the gradients of VQ-VAE."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.reference import vector_quantize as reference

from . import checks
from .backends import CPU_EXTENSION, choose
from .code_statistics import rows_of_codes, segment_sums
from .nearest_code import DTYPE_CODES, METRICS, search
from .registration import register


class VectorQuantizeOutput(NamedTuple):
    """What `vector_quantize` returns. Shapes as there."""

    quantized: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "l2",
    gradient: str = "straight_through",
    backend: str | None = None,
) -> VectorQuantizeOutput:
    """Replace each row by its nearest code; losses and gradients as in VQ-VAE.

        i = nearest_code(x),   q = codebook[i]
        quantized[n] = q[n]
        commitment[n] = ‖x[n] − sg[q[n]]‖²,   codebook[n] = ‖sg[x[n]] − q[n]‖²

    `quantized` is exactly the chosen row. Its gradient g reaches x as g (straight-through) or
    as λRᵀg (rotation: R turns x's direction into q's, λ = ‖q‖/‖x‖, lengths below 1e-6 counted
    as 1e-6); it never reaches the codebook. sg[·] is the stop-gradient.

    Args:
        x: (N, D) or (heads, N, D); float32, float16, bfloat16 or float64 (reference search).
        codebook: (K, D), or (heads, K, D).
        mask: (N,) or (heads, N) bool, True = counts. A masked row gets index −1, zeros, zero
            losses and no gradient.
        metric: "l2" or "dot".
        gradient: "straight_through" or "rotation".
        backend: "triton", "cpp" or "reference"; None chooses. "reference" also takes
            PyTorch's own gradients.
    Returns:
        A named tuple: quantized, shaped as x in the codebook's dtype; indices (N,) int64;
        commitment (N,), differentiable in x, and codebook (N,), differentiable in the
        codebook: sums over D, float32 whatever the input (float64 if an input is). A row
        without a nearest code (NaN or ±Inf in it) gets −1, NaN and no gradient.
    Raises:
        ValueError, TypeError, RuntimeError: as `nearest_code`; a mask of another shape or type.
    van den Oord et al. 2017, arXiv:1711.00937, eq. 1–3. Rotation: Fifty et al. 2024,
    arXiv:2410.06424, eq. 4.
    """
    op = "vector_quantize"
    checks.check_rows(op, x)
    checks.check_codebook(op, codebook, x)
    checks.check_choice(op, "metric", metric, METRICS)
    checks.check_choice(op, "gradient", gradient, ("straight_through", "rotation"))
    if mask is not None:
        _check_mask(mask, x)
    chosen = choose(op, backend, x, codebook)
    if backend == "reference":
        outputs = reference.vector_quantize(
            x, codebook, mask=mask, metric=metric, gradient=gradient
        )
    else:
        outputs = _VectorQuantize.apply(x, codebook, mask, metric, gradient, chosen)
    return VectorQuantizeOutput(*outputs)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"vector_quantize: mask must be a bool tensor, True where the row counts; got {got}."
        )
    if mask.shape not in (x.shape[:-1], x.shape[-2:-1]):
        raise ValueError(
            f"vector_quantize: mask must be {tuple(x.shape[:-1])} to match x "
            f"{checks.shape(x)}; got {checks.shape(mask)}."
        )
    checks.check_device("vector_quantize", "mask", mask, x)


def _wide(x: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32


def _forward(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """quantized, indices and the squared distance, which is the value of both losses."""
    if backend == "cpp":
        return _forward_cpp(x, codebook, mask, metric)
    if backend == "triton":
        return _forward_triton(x, codebook, mask, metric)
    indices, distance = search(x, codebook, metric, backend)
    if metric != "l2":
        distance = _squared_distance(x, codebook, indices)
    quantized = rows_of_codes(codebook, indices)
    lost = indices < 0
    if mask is not None:
        lost = lost & mask
        counted = mask.expand_as(indices)
        indices = torch.where(counted, indices, -1)
        distance = torch.where(counted, distance, 0.0)
        quantized = torch.where(counted[..., None], quantized, 0.0)
    return torch.where(lost[..., None], torch.nan, quantized), indices, distance


def _forward_cpp(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    assert CPU_EXTENSION is not None
    x, codebook = x.contiguous(), codebook.contiguous()
    quantized, indices, distance = _forward_fake(x, codebook, mask, metric, "cpp")
    if mask is not None:
        mask = mask.contiguous()
    CPU_EXTENSION.vector_quantize(
        *_coded_rows(x, codebook),
        *((0, 0) if mask is None else (mask.data_ptr(), mask.numel())),
        METRICS.index(metric),
        quantized.data_ptr(),
        indices.data_ptr(),
        distance.data_ptr(),
        torch.get_num_threads(),
    )
    return quantized, indices, distance


def _forward_triton(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    from fastvq.kernels.triton.vector_quantize import vector_quantize_forward

    found, _ = search(x, codebook, metric, "triton", return_distance=False)
    return vector_quantize_forward(x, codebook, mask, found)


def _coded_rows(x: Tensor, codebook: Tensor) -> tuple[int, ...]:
    """How the C++ calls take contiguous rows and their codebooks; a shared one is one book."""
    books = codebook.shape[0] if codebook.dim() == 3 else 1
    return (
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        codebook.data_ptr(),
        DTYPE_CODES[codebook.dtype],
        *(books, x.shape[:-1].numel() // books, *codebook.shape[-2:]),
    )


def _squared_distance(x: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    difference = x.to(_wide(x, codebook)) - rows_of_codes(codebook, indices)
    return torch.where(indices >= 0, (difference**2).sum(dim=-1), torch.nan)


def _forward_fake(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=codebook.dtype),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows, dtype=_wide(x, codebook)),
    )


def _backward_x(
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
    backend: str,
) -> Tensor:
    """Gradient to x, of at least one of the two; rows without an index get none."""
    if backend == "cpp":
        return _backward_x_cpp(grad_quantized, grad_commitment, x, codebook, indices, gradient)
    if backend == "triton":
        from fastvq.kernels.triton.vector_quantize import vector_quantize_backward_x

        return vector_quantize_backward_x(
            grad_quantized, grad_commitment, x, codebook, indices, gradient
        )
    rows, q = _rows_and_codes(x, codebook, indices)
    grad = torch.zeros_like(rows)
    if grad_quantized is not None:
        grad = grad_quantized.to(rows.dtype)
        if gradient == "rotation":
            grad = _rotate_back(grad, rows, q)
    if grad_commitment is not None:
        grad = grad + 2.0 * grad_commitment[..., None] * (rows - q)
    return torch.where((indices >= 0)[..., None], grad, 0.0).to(x.dtype)


def _backward_x_cpp(
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
) -> Tensor:
    assert CPU_EXTENSION is not None
    x, codebook = x.contiguous(), codebook.contiguous()
    grad_x = torch.empty_like(x)
    if grad_quantized is not None:
        grad_quantized = grad_quantized.to(codebook.dtype).contiguous()
    weight, stride = _weights(grad_commitment)
    CPU_EXTENSION.vector_quantize_backward_x(
        *_coded_rows(x, codebook),
        indices.data_ptr(),
        0 if grad_quantized is None else grad_quantized.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        stride,
        gradient == "rotation",
        grad_x.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x


def _weights(grad: Tensor | None) -> tuple[Tensor | None, int]:
    """The gradient of a loss by row as the C++ calls take it; one number for all has stride 0."""
    if grad is None:
        return None, 0
    if not any(grad.stride()):
        return grad, 0
    return grad.contiguous(), 1


def _backward_codebook(
    grad_codebook_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, backend: str
) -> Tensor:
    """Gradient to the codebook: summed over the rows that chose each code, in row order."""
    if backend == "cpp":
        return _backward_codebook_cpp(grad_codebook_loss, x, codebook, indices)
    if backend == "triton":
        from fastvq.kernels.triton.code_statistics import codebook_gradient

        return codebook_gradient(grad_codebook_loss, x, codebook, indices)
    rows, q = _rows_and_codes(x, codebook, indices)
    pull = 2.0 * grad_codebook_loss[..., None] * (q - rows)
    pull = torch.where((indices >= 0)[..., None], pull, 0.0)
    _, grad = segment_sums(pull, indices, codebook.shape[-2], backend)
    if grad.dim() > codebook.dim():  # one codebook shared by the heads
        grad = grad.sum(dim=0)
    return grad.to(codebook.dtype)


def _backward_codebook_cpp(
    grad_codebook_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
) -> Tensor:
    if indices.numel() == 0:
        return torch.zeros_like(codebook)
    assert CPU_EXTENSION is not None
    x, codebook = x.contiguous(), codebook.contiguous()
    grad = codebook.new_empty(codebook.shape, dtype=torch.float32)
    weight, stride = _weights(grad_codebook_loss)
    assert weight is not None
    CPU_EXTENSION.vector_quantize_backward_codebook(
        *_coded_rows(x, codebook),
        indices.data_ptr(),
        weight.data_ptr(),
        stride,
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    return grad.to(codebook.dtype)


def _rows_and_codes(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(x, codebook)
    rows = torch.where((indices >= 0)[..., None], x, 0.0)
    return rows.to(wide), rows_of_codes(codebook, indices).to(wide)


def _rotate_back(grad: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """λRᵀg = λ(g − 2w(w·g) + 2x̂(q̂·g)), the transpose of x → λRx with R held constant."""
    x_length = x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    q_length = q.norm(dim=-1, keepdim=True)
    x_unit, q_unit = x / x_length, q / q_length.clamp(min=1e-6)
    w = F.normalize(x_unit + q_unit, dim=-1, eps=1e-12)
    along_w = (grad * w).sum(dim=-1, keepdim=True)
    along_q = (grad * q_unit).sum(dim=-1, keepdim=True)
    return (q_length / x_length) * (grad - 2 * along_w * w + 2 * along_q * x_unit)


def input_gradients(
    ctx: Any,
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    grad_codebook_loss: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and to the codebook, the first inputs of a Function, where they are needed.

    The Function has saved x, codebook and indices, and holds `gradient` and `backend`. Its losses
    are by row.
    """
    x, codebook, indices = ctx.saved_tensors[:3]
    grad_x = grad_codebook = None
    if ctx.needs_input_grad[0] and not (grad_quantized is None and grad_commitment is None):
        grad_x = _BACKWARD_X(
            grad_quantized, grad_commitment, x, codebook, indices, ctx.gradient, ctx.backend
        )
    if ctx.needs_input_grad[1] and grad_codebook_loss is not None:
        grad_codebook = _BACKWARD_CODEBOOK(grad_codebook_loss, x, codebook, indices, ctx.backend)
    return grad_x, grad_codebook


class _VectorQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        metric: str,
        gradient: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, distance = _FORWARD(x, codebook, mask, metric, backend)
        ctx.save_for_backward(x, codebook, indices)
        ctx.gradient, ctx.backend = gradient, backend
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return quantized, indices, distance, distance.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_quantized: Tensor | None,
        _: Tensor | None,
        grad_commitment: Tensor | None,
        grad_codebook_loss: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        found = input_gradients(ctx, grad_quantized, grad_commitment, grad_codebook_loss)
        return *found, None, None, None, None


_FORWARD = register(
    "vector_quantize(Tensor x, Tensor codebook, Tensor? mask, str metric, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_BACKWARD_X = register(
    "vector_quantize_backward_x(Tensor? grad_quantized, Tensor? grad_commitment, Tensor x,"
    " Tensor codebook, Tensor indices, str gradient, str backend) -> Tensor",
    _backward_x,
    lambda gq, gc, x, codebook, indices, gradient, backend: x.new_empty(x.shape),
)
_BACKWARD_CODEBOOK = register(
    "vector_quantize_backward_codebook(Tensor grad_codebook_loss, Tensor x, Tensor codebook,"
    " Tensor indices, str backend) -> Tensor",
    _backward_codebook,
    lambda grad, x, codebook, indices, backend: codebook.new_empty(codebook.shape),
)
