"""A training step around the search: forward, backward to x, EMA statistics.

Candidates: the step of the modules, ours and vector-quantize-pytorch's with the same arguments;
our step in ops, and the search alone, which the step is measured against; and plain torch
quantizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvq
from benchmarks.ops.nearest_code import CASES as SEARCHES
from benchmarks.ops.nearest_code import fits, inputs
from benchmarks.suites import Context, Prepared, Work, WrongResult
from fastvq import ops

CASES = {
    "cpu": [{"N": 8192, "K": 8192, "D": 256}, *SEARCHES["cpu"]],
    "cuda": SEARCHES["cuda"],
}
QUICK_CASES = [{"N": 4096, "K": 512, "D": 64}]
# Share of rows that may get another code from a float32 search; more is another function.
_MOST_MISSES = 0.05

Step = Callable[[], tuple[Tensor, ...]]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, codebook = inputs(case, context.device)
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(context.device)
    prepared = Prepared(work(case, context.device))
    truths = {
        gradient: _ops_step(x, codebook, upstream, gradient, backend="reference")()
        for gradient in ("straight_through", "rotation")
    }
    # The modules' default.
    _check_module(_module_step(fastvq.VectorQuantize, x, codebook, upstream)(), truths["rotation"])
    prepared.candidates["fastvq.VectorQuantize"] = _module_step(
        fastvq.VectorQuantize, x, codebook, upstream
    )
    for gradient, truth in truths.items():
        step = _ops_step(x, codebook, upstream, gradient)
        _check(step(), truth)
        prepared.candidates[f"fastvq, ops, {gradient}"] = step
    prepared.candidates["fastvq, search alone"] = lambda: ops.nearest_code(x, codebook)

    def rival(make: Callable[[Tensor, Tensor, Tensor], Step], gradient: str) -> Step:
        misses = _misses(make(x, codebook, upstream)(), truths[gradient])
        if misses > _MOST_MISSES * len(x):
            raise RuntimeError(f"{misses} of {len(x)} rows differ from the exact index")
        return make(x, codebook, upstream)

    for name, make, gradient in (
        ("vector-quantize-pytorch", _lucidrains, "rotation"),
        ("plain torch", _plain_torch, "straight_through"),
        ("plain torch, compiled", _plain_torch_compiled, "straight_through"),
    ):
        prepared.rival(name, lambda make=make, gradient=gradient: rival(make, gradient))
    return prepared


def work(case: dict[str, Any], device: str) -> Work:
    """The search's product; x, codes and the upstream gradient in; rows, gradient, sums out."""
    n, k, d = case["N"], case["K"], case["D"]
    moved = 4.0 * (4 * n * d + 2 * k * d + k) + 8.0 * n
    return Work(2.0 * n * k * d + 6.0 * n * d, moved, "float16" if device == "cuda" else "float32")


def _check(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """Ours equals the reference on these inputs, or no time is reported."""
    for mine, expected in zip(ours, truth):
        try:
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        except AssertionError as error:
            line = str(error).splitlines()[0]
            raise WrongResult(f"fastvq's step: {line}: no time is reported") from error


def _check_module(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    try:
        misses = _misses(ours, truth)
    except AssertionError as error:
        line = str(error).splitlines()[0]
        raise WrongResult(f"VectorQuantize's gradient: {line}: no time is reported") from error
    if misses:
        raise WrongResult("VectorQuantize's index is not exact: no time is reported")


def _misses(step: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> int:
    """Rows of another index; raises where rows of the same index have another gradient."""
    differs = step[0].reshape(-1) != truth[0]
    if not differs.any():
        torch.testing.assert_close(step[1].reshape(()), truth[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        step[2].reshape(truth[2].shape)[~differs], truth[2][~differs], rtol=1e-3, atol=1e-4
    )
    return int(differs.sum())


def _ops_step(
    x: Tensor, codebook: Tensor, upstream: Tensor, gradient: str, backend: str | None = None
) -> Step:
    def step() -> tuple[Tensor, ...]:
        out = ops.vector_quantize(x, codebook, gradient=gradient, backend=backend)
        loss = out.commitment.mean() / x.shape[1]  # of elements, as the modules' is
        (grad,) = torch.autograd.grad((out.quantized, loss), x, (upstream, torch.ones_like(loss)))
        counts, sums = ops.code_statistics(x.detach(), out.indices, len(codebook), backend=backend)
        return out.indices, loss.detach(), grad, counts, sums

    return step


def _module_step(module_class: Any, x: Tensor, codebook: Tensor, upstream: Tensor) -> Step:
    module = module_class(x.shape[1], len(codebook)).to(x.device).train()
    module._codebook.embed.data.copy_(codebook)
    module._codebook.embed_avg.data.copy_(codebook)

    def step() -> tuple[Tensor, ...]:
        quantized, indices, loss = module(x[None])
        loss = loss.sum()
        weights = (upstream[None], torch.ones_like(loss))
        (grad,) = torch.autograd.grad((quantized, loss), x, weights)
        return indices, loss.detach(), grad

    return step


def _lucidrains(x: Tensor, codebook: Tensor, upstream: Tensor) -> Step:
    from vector_quantize_pytorch import VectorQuantize

    fits(x, codebook, 4)
    return _module_step(VectorQuantize, x, codebook, upstream)


def _nearest_and_sums(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distance = (codebook**2).sum(1) - 2 * x @ codebook.T + (x**2).sum(1, keepdim=True)
    indices = distance.argmin(dim=1)
    ones = torch.ones_like(indices, dtype=torch.float32)
    counts = torch.zeros(len(codebook), device=x.device).index_add_(0, indices, ones)
    return indices, counts, torch.zeros_like(codebook).index_add_(0, indices, x)


def _plain_torch(
    x: Tensor,
    codebook: Tensor,
    upstream: Tensor,
    search: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = _nearest_and_sums,
) -> Step:
    """The quantizer that papers' code bases carry: expanded distances, index_add_ statistics."""
    fits(x, codebook, 3)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            indices, counts, sums = search(x, codebook)
        q = F.embedding(indices, codebook)
        loss = F.mse_loss(x, q)
        quantized = x + (q - x).detach()
        (grad,) = torch.autograd.grad((quantized, loss), x, (upstream, torch.ones_like(loss)))
        return indices, loss.detach(), grad, counts, sums

    return step


def _plain_torch_compiled(x: Tensor, codebook: Tensor, upstream: Tensor) -> Step:
    search = torch.compile(_nearest_and_sums, dynamic=False)
    return _plain_torch(x, codebook, upstream, search)
