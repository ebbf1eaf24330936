"""A training step around the search: forward, backward to x, EMA statistics.

Candidates: the search alone, which the step is measured against; the step in ops; the step of the
modules, ours and vector-quantize-pytorch's with the same arguments; and a plain torch quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvq
from benchmarks.ops.nearest_code import CASES as SEARCHES
from benchmarks.ops.nearest_code import _fits, inputs
from benchmarks.suites import Context, Prepared
from fastvq import ops

_MODULE_SIZES = ((64, 64, 16), (8192, 8192, 256))
CASES = {
    "cpu": [*({"N": n, "K": k, "D": d} for n, k, d in _MODULE_SIZES), *SEARCHES["cpu"]],
    "cuda": SEARCHES["cuda"],
}
QUICK_CASES = [{"N": 512, "K": 64, "D": 16}]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, codebook = inputs(case, context.device)
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(context.device)
    prepared = Prepared()
    prepared.candidates["fastvq, search alone"] = lambda: ops.nearest_code(x, codebook)
    for gradient in ("straight_through", "rotation"):
        step = _ops_step(x, codebook, upstream, gradient)
        _check(step, _ops_step(x, codebook, upstream, gradient, backend="reference"))
        prepared.candidates[f"fastvq, ops, {gradient}"] = step
    prepared.candidates["fastvq.VectorQuantize"] = _module_step(
        fastvq.VectorQuantize, x, codebook, upstream
    )
    prepared.rival("vector-quantize-pytorch", lambda: _lucidrains(x, codebook, upstream))
    prepared.rival("plain torch", lambda: _plain_torch(x, codebook, upstream))
    return prepared


def _check(step: Callable[[], Any], truth: Callable[[], Any]) -> None:
    """Ours equals the reference on these inputs, or no time is reported."""
    for ours, expected in zip(step(), truth()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def _ops_step(
    x: Tensor, codebook: Tensor, upstream: Tensor, gradient: str, backend: str | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        out = ops.vector_quantize(x, codebook, gradient=gradient, backend=backend)
        loss = out.commitment.mean()
        (grad,) = torch.autograd.grad((out.quantized, loss), x, (upstream, torch.ones_like(loss)))
        counts, sums = ops.code_statistics(x.detach(), out.indices, len(codebook), backend=backend)
        return out.indices, loss, grad, counts, sums

    return step


def _module_step(
    module_class: Any, x: Tensor, codebook: Tensor, upstream: Tensor
) -> Callable[[], object]:
    module = module_class(x.shape[1], len(codebook)).to(x.device).train()
    module._codebook.embed.data.copy_(codebook)
    module._codebook.embed_avg.data.copy_(codebook)

    def step() -> object:
        quantized, _, loss = module(x[None])
        loss = loss.sum()
        return torch.autograd.grad((quantized, loss), x, (upstream[None], torch.ones_like(loss)))

    return step


def _lucidrains(x: Tensor, codebook: Tensor, upstream: Tensor) -> Callable[[], object]:
    from vector_quantize_pytorch import VectorQuantize

    _fits(x, codebook, 4)
    return _module_step(VectorQuantize, x, codebook, upstream)


def _plain_torch(x: Tensor, codebook: Tensor, upstream: Tensor) -> Callable[[], object]:
    """The quantizer that papers' code bases carry: expanded distances, index_add_ statistics."""
    _fits(x, codebook, 3)

    def step() -> object:
        with torch.no_grad():
            distance = (codebook**2).sum(1) - 2 * x @ codebook.T + (x**2).sum(1, keepdim=True)
            indices = distance.argmin(dim=1)
            counts = torch.bincount(indices, minlength=len(codebook))
            sums = torch.zeros_like(codebook).index_add_(0, indices, x)
        q = F.embedding(indices, codebook)
        loss = F.mse_loss(x, q)
        quantized = x + (q - x).detach()
        grad = torch.autograd.grad((quantized, loss), x, (upstream, torch.ones_like(loss)))
        return grad, counts, sums

    return step
