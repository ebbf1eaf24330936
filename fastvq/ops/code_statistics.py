"""code_statistics: how many rows chose each code, and the sum of those rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.reference import code_statistics as reference

from . import checks
from .backends import CPU_EXTENSION, choose
from .nearest_code import DTYPE_CODES
from .registration import register


def code_statistics(
    x: Tensor, indices: Tensor, num_codes: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows assigned to each code.

        counts[k] = |{n : indices[n] = k}|,   sums[k] = Σ_{n : indices[n] = k} x[n]

    Rows with index −1 are skipped. Sums are taken in row order in float64 and rounded once:
    bitwise the same on every run and thread count. Differentiable in `x`.

    Args:
        x: (N, D) or (heads, N, D); float32, float16, bfloat16 or float64 (reference only).
        indices: (N,) or (heads, N) int64, each −1 or in 0 … num_codes−1.
        num_codes: K ≥ 1.
        backend: "triton", "cpp" or "reference"; None chooses.
    Returns:
        counts (K,) and sums (K, D), with the heads leading where `x` has them; float32
        (float64 if `x` is).
    Raises:
        ValueError: shapes disagree or an index is out of range (the Triton kernels find that one
            on the device: it stops them as it stops PyTorch's own indexing, and nothing waits).
        TypeError: not tensors, or not of the dtypes above.
        RuntimeError: the backend asked for cannot run this call.
    van den Oord et al. 2017, arXiv:1711.00937, appendix A.1, eq. 6–7.
    """
    op = "code_statistics"
    checks.check_rows(op, x)
    checks.check_int(op, "num_codes", num_codes)
    _check_indices(indices, x)
    chosen = choose(op, backend, x)
    if chosen == "reference" or (chosen == "triton" and not indices.is_cuda):
        _check_range(indices, num_codes)
    if backend == "reference":
        return reference.code_statistics(x, indices, num_codes)
    return _CodeStatistics.apply(x, indices, num_codes, chosen)


def statistics_of_search(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """`code_statistics` without its checks and gradient, for indices that a search returned.

    Checking the indices' values would wait for the device at every training step.
    """
    chosen = choose("code_statistics", None, x)
    counts, sums = torch.ops.fastvq.code_statistics(x.detach(), indices, num_codes, chosen)
    return counts, sums


def _check_indices(indices: Tensor, x: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = str(indices.dtype) if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"code_statistics: indices must be an int64 tensor; got {got}.")
    if indices.shape != x.shape[:-1]:
        raise ValueError(
            f"code_statistics: indices must be {tuple(x.shape[:-1])} to match x "
            f"{checks.shape(x)}; got {checks.shape(indices)}."
        )
    checks.check_device("code_statistics", "indices", indices, x)


def _check_range(indices: Tensor, num_codes: int) -> None:
    """What the kernels check for themselves."""
    if torch.compiler.is_compiling() or indices.numel() == 0:
        return
    lowest, highest = indices.aminmax()
    if lowest < -1 or highest >= num_codes:
        wrong = int(lowest) if lowest < -1 else int(highest)
        raise ValueError(
            f"code_statistics: indices must be −1 or in 0 … {num_codes - 1}; got {wrong}. "
            f"Are there really {num_codes} codes?"
        )


def segment_sums(x: Tensor, indices: Tensor, num_codes: int, backend: str) -> tuple[Tensor, Tensor]:
    """Counts and sums by a backend that was already chosen; arguments already checked."""
    if indices.numel() == 0:
        counts, sums = _empty_outputs(x, num_codes)
        return counts.zero_(), sums.zero_()
    if backend == "reference":
        return reference.code_statistics(x, indices, num_codes)
    if backend == "triton":
        return _sums_triton(x, indices, num_codes)
    return _sums_cpp(x, indices, num_codes)


def _sums_triton(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    from fastvq.kernels.triton.code_statistics import code_statistics_forward

    return code_statistics_forward(x, indices, num_codes)


def _sums_cpp(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    assert CPU_EXTENSION is not None
    x, indices = x.contiguous(), indices.contiguous()
    counts, sums = _empty_outputs(x, num_codes)
    CPU_EXTENSION.code_statistics(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        indices.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        x.shape[0] if x.dim() == 3 else 1,
        *(x.shape[-2], num_codes, x.shape[-1]),
        torch.get_num_threads(),
    )
    return counts, sums


def _empty_outputs(x: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads = x.shape[:-2]
    return (
        x.new_empty((*heads, num_codes), dtype=dtype),
        x.new_empty((*heads, num_codes, x.shape[-1]), dtype=dtype),
    )


def rows_of_codes(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices] per head, with zeros where the index is −1: the transpose of the sums."""
    if table.dim() == 2:
        rows = table[indices.clamp(min=0)]
    else:
        rows = table.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, table.shape[-1]))
    return torch.where((indices >= 0)[..., None], rows, 0.0)


class _CodeStatistics(torch.autograd.Function):
    """grad_x[n] = grad_sums[indices[n]]; counts are constant in x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, num_codes: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        counts, sums = _SUMS(x, indices, num_codes, backend)
        ctx.save_for_backward(indices)
        ctx.x_dtype = x.dtype
        ctx.mark_non_differentiable(counts)
        return counts, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return rows_of_codes(grad_sums, indices).to(ctx.x_dtype), None, None, None


_SUMS = register(
    "code_statistics(Tensor x, Tensor indices, SymInt num_codes, str backend) -> (Tensor, Tensor)",
    segment_sums,
    lambda x, indices, num_codes, backend: _empty_outputs(x, num_codes),
)
