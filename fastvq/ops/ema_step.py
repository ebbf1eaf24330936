"""ema_step: codes follow the rows that chose them by moving averages, in place.

Lives here: the step of the rule "smoothed_divisor", that of the other rules' two averages, and the
choice between one C++ pass and tensor arithmetic. When a codebook takes a step is `fastvq.nn`'s
matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import CPU_EXTENSION
from .nearest_code import DTYPE_CODES
from .registration import register

# A sum this large is cut off: two of them still have a difference, so that averages of huge
# rows lose accuracy but never become NaN.
LARGEST_SUM = 2.0**125


def ema_step(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    unit: bool = False,
) -> None:
    """One step of the averages, and of the codes that follow them, in place.

        N[k] ← γN[k] + (1−γ)n[k],   m[k] ← γm[k] + (1−γ)s[k]
        e[k] = m[k] / Ñ[k],   Ñ[k] = ΣN · (N[k] + ε) / (ΣN + Kε)

    A codebook without a row in the batch (n = 0 for every k) stays as it is. Sums are cut off at
    ±2¹²⁵. The state and the statistics are float32; arguments are not checked.

    Args:
        cluster_size: N (h, K).
        embed_avg: m (h, K, D).
        embed: e (h, K, D); None leaves the codes to the caller.
        counts: n (h, K).
        sums: s (h, K, D).
        decay: γ.
        eps: ε.
        unit: bring the codes to length one, a length below 1e-6 counted as 1e-6.
    van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """
    if runs_in_cpp(cluster_size, embed_avg, embed):
        _STEP(cluster_size, embed_avg, embed, counts, sums, decay, eps, unit, "cpp")
    else:
        _step(cluster_size, embed_avg, embed, counts, sums, decay, eps, unit, "reference")


def ema_step_of_rows(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float,
    eps: float,
    unit: bool = False,
) -> Tensor:
    """`ema_step` with the statistics of rows x (h, N, D) whose codes are indices (h, N), −1 none.

    The state must be one that `runs_in_cpp`; x is float32, float16 or bfloat16.

    Returns:
        The counts (h, K).
    """
    counts: Tensor = _STEP_OF_ROWS(cluster_size, embed_avg, embed, x, indices, decay, eps, unit)
    return counts


def runs_in_cpp(*state: Tensor | None) -> bool:
    """Whether the C++ step takes this state: on the CPU, float32 and contiguous."""
    if CPU_EXTENSION is None:
        return False
    for tensor in state:
        if tensor is not None and not (
            tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
        ):
            return False
    return True


def average_(
    cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, step: Tensor
) -> None:
    """N and m moved towards a batch's n and s by the fraction `step` (h, 1) or (h, K)."""
    cluster_size.lerp_(counts, step)
    embed_avg.lerp_(sums.clamp(-LARGEST_SUM, LARGEST_SUM), step[..., None])


def some_rows(counts: Tensor) -> Tensor:
    """(h, 1): 1 where the batch has a counted row, else 0."""
    return counts.sum(dim=1, keepdim=True).clamp(max=1.0)


def laplace_smoothed(counts: Tensor, eps: float) -> Tensor:
    """ΣN · (N[k] + ε) / (ΣN + Kε) over the last dimension."""
    total = counts.sum(dim=-1, keepdim=True)
    return (counts + eps) * (total / (total + counts.shape[-1] * eps))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length one; a length below 1e-6 counts as 1e-6."""
    return F.normalize(x, dim=-1, eps=1e-6)


def _step(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    unit: bool,
    backend: str,
) -> None:
    if backend == "cpp":
        assert CPU_EXTENSION is not None
        counts, sums = counts.contiguous(), sums.contiguous()
        CPU_EXTENSION.ema_step(
            *_averages(cluster_size, embed_avg, embed, decay, eps, unit),
            counts.data_ptr(),
            sums.data_ptr(),
            torch.get_num_threads(),
        )
        return
    some = some_rows(counts)
    average_(cluster_size, embed_avg, counts, sums, some * (1.0 - decay))
    if embed is not None:
        codes = embed_avg / laplace_smoothed(cluster_size, eps)[..., None]
        codes = unit_rows(codes) if unit else codes
        embed.copy_(torch.where(some[..., None] > 0, codes, embed))


def _step_of_rows(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor,
    x: Tensor,
    indices: Tensor,
    decay: float,
    eps: float,
    unit: bool,
) -> Tensor:
    assert CPU_EXTENSION is not None
    x, indices = x.contiguous(), indices.contiguous()
    counts = torch.empty_like(cluster_size)
    CPU_EXTENSION.ema_step_of_rows(
        *_averages(cluster_size, embed_avg, embed, decay, eps, unit),
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        indices.data_ptr(),
        x.shape[1],
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return counts


def _averages(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor | None,
    decay: float,
    eps: float,
    unit: bool,
) -> tuple[float, ...]:
    """How the C++ calls take the state and the rule; autograd is told that the state changes."""
    for tensor in (cluster_size, embed_avg, embed):
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    return (
        cluster_size.data_ptr(),
        embed_avg.data_ptr(),
        0 if embed is None else embed.data_ptr(),
        *embed_avg.shape,
        decay,
        eps,
        unit,
    )


_STEP = register(
    "ema_step(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!)? embed, Tensor counts,"
    " Tensor sums, float decay, float eps, bool unit, str backend) -> ()",
    _step,
    lambda *arguments: None,
)
_STEP_OF_ROWS = register(
    "ema_step_of_rows(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) embed, Tensor x,"
    " Tensor indices, float decay, float eps, bool unit) -> Tensor",
    _step_of_rows,
    lambda cluster_size, *arguments: torch.empty_like(cluster_size),
)
