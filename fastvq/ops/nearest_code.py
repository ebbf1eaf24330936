"""nearest_code: the exact index of the nearest codebook row."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastvq.reference import nearest_code as reference

from . import checks
from .backends import CPU_EXTENSION, choose
from .registration import register

METRICS = ("l2", "dot")
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    precision: str = ...,
    backend: str | None = ...,
    return_distance: Literal[False] = ...,
) -> Tensor: ...
@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    precision: str = ...,
    backend: str | None = ...,
    return_distance: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    precision: str = "exact",
    backend: str | None = None,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the nearest code under squared Euclidean distance (or the dot product).

        index[n] = argmin_k Σ_d (x[n, d] − codebook[k, d])²      ("dot": argmax_k Σ_d x·c)

    Exact: the argmin of that sum in float64, added in the order d = 0 … D−1, each term
    rounded before it is added; equal scores go to the lowest index. It is the same index on
    every backend, batch split and thread count, whatever the TF32 or autocast settings. A row
    that holds NaN or ±Inf gets −1; a code row that does is never chosen; where every code row
    does, the index is −1. Nothing of size N×K is allocated.

    Args:
        x: (N, D) or (heads, N, D); float32, float16, bfloat16 or float64 (reference only);
            any strides.
        codebook: (K, D), shared by the heads, or (heads, K, D); same device, any of the dtypes.
        metric: "l2" or "dot".
        precision: "exact", or "fast", which may skip the check of close calls: the code returned
            has a distance within (8·2⁻¹¹ + 2⁻¹²)·(‖x‖ + C)·C + (D+4)·2⁻²²·(‖x‖ + C)² of the
            least, C the largest ‖c‖ ("dot": half of it). Only "triton" skips it.
        backend: "triton", "cpp" or "reference"; None chooses (see `fastvq.ops.explain`).
        return_distance: also return the winner's distance.
    Returns:
        (N,) or (heads, N) int64, non-differentiable. With `return_distance`, a pair of it and
        the winner's Σ(x−c)² (its dot product for "dot"): the deciding score rounded to
        float32 (float64 where an input is), NaN where the index is −1; non-differentiable.
    Raises:
        ValueError: shapes disagree, K or D is 0, devices differ, or an unknown option.
        TypeError: not tensors, or not of the dtypes above.
        RuntimeError: the backend asked for cannot run this call.
    van den Oord et al. 2017, arXiv:1711.00937, eq. 1–2.
    """
    op = "nearest_code"
    checks.check_rows(op, x)
    checks.check_codebook(op, codebook, x)
    checks.check_choice(op, "metric", metric, METRICS)
    checks.check_choice(op, "precision", precision, ("exact", "fast"))
    chosen = choose(op, backend, x, codebook)
    indices, distance = torch.ops.fastvq.nearest_code(
        x.detach(), codebook.detach(), metric, chosen, precision, return_distance
    )
    return (indices, distance) if return_distance else indices


def search(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    backend: str,
    precision: str = "exact",
    return_distance: bool = True,
) -> tuple[Tensor, Tensor]:
    """Indices and distances by a backend that was already chosen; arguments already checked.

    Without `return_distance` the second is empty.
    """
    if backend == "triton":
        return _search_triton(x, codebook, metric, precision, return_distance)
    if backend == "cpp":
        return _search_cpp(x, codebook, metric, return_distance)
    indices, distance = reference.nearest_code(x, codebook, metric=metric)
    return indices, distance if return_distance else distance.new_empty(0)


def _search_triton(
    x: Tensor, codebook: Tensor, metric: str, precision: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    from fastvq.kernels.triton.nearest_code import nearest_code_forward

    indices, distance = nearest_code_forward(
        x if x.dim() == 3 else x[None],
        codebook if codebook.dim() == 3 else codebook[None],
        metric=metric,
        exact=precision == "exact",
        distance=return_distance,
    )
    return indices.view(x.shape[:-1]), distance.view(x.shape[:-1]) if return_distance else distance


def _search_cpp(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    assert CPU_EXTENSION is not None
    x, codebook = x.contiguous(), codebook.contiguous()
    indices, distance = _empty_outputs(x, codebook, return_distance)
    num_rows, dim = x.shape[-2:]
    num_codes = codebook.shape[-2]
    codebook_step = num_codes * dim * codebook.element_size() if codebook.dim() == 3 else 0
    for head in range(len(x) if x.dim() == 3 else 1):
        first = head * num_rows
        CPU_EXTENSION.nearest_code(
            x.data_ptr() + first * dim * x.element_size(),
            DTYPE_CODES[x.dtype],
            codebook.data_ptr() + head * codebook_step,
            DTYPE_CODES[codebook.dtype],
            indices.data_ptr() + first * indices.element_size(),
            distance.data_ptr() + first * distance.element_size() if return_distance else 0,
            *(num_rows, num_codes, dim),
            METRICS.index(metric),
            torch.get_num_threads(),
        )
    return indices, distance


def _empty_outputs(
    x: Tensor, codebook: Tensor, return_distance: bool = True
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (x.dtype, codebook.dtype)
    return (
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty(
            x.shape[:-1] if return_distance else (0,),
            dtype=torch.float64 if wide else torch.float32,
        ),
    )


register(
    "nearest_code(Tensor x, Tensor codebook, str metric, str backend, "
    'str precision="exact", bool return_distance=True) -> (Tensor, Tensor)',
    search,
    lambda x, codebook, metric, backend, precision="exact", return_distance=True: _empty_outputs(
        x, codebook, return_distance
    ),
)
