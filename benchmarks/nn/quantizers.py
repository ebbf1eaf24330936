"""Training steps of quantizer modules beside the modules of vector-quantize-pytorch they replace.

A step is the forward pass and the backward pass to the input and the parameters, buffers updated as
in training. Both start from one state; before a time is reported, indices, outputs, losses and the
gradient of the input are compared, with our module in float64 and with theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastvq
from benchmarks.suites import Context, Prepared, Work, WrongResult

# Arguments and channels of each module, and multiply-adds per vector of its product with the codes.
_MODULES: dict[str, tuple[dict[str, Any], int, int]] = {
    "VectorQuantize": ({"dim": 64, "codebook_size": 1024}, 64, 1024 * 64),
    "ResidualVQ": ({"dim": 128, "codebook_size": 1024, "num_quantizers": 8}, 128, 8 * 1024 * 128),
    "SimVQ": ({"dim": 64, "codebook_size": 1024}, 64, 1024 * 64),
    "FSQ": ({"levels": [8, 5, 5, 5]}, 4, 0),
    "ResidualFSQ": ({"levels": [8, 5, 5, 3], "num_quantizers": 4}, 4, 0),
    "LFQ": ({"codebook_size": 1024}, 10, 0),
    "ResidualLFQ": ({"dim": 10, "codebook_size": 1024, "num_quantizers": 4}, 10, 0),
}
CASES = {
    device: [
        {"module": name, "B": batch, "N": count}
        for name in _MODULES
        for batch, count in ((1, 1), (1, 64), (4, 1024))
    ]
    for device in ("cpu", "cuda")
}
QUICK_CASES = [{"module": "FSQ", "B": 1, "N": 64}]
# Share of vectors that may get another code, where theirs is a float32 search or tanh that falls on
# the other side; more than this is another function.
_MOST_MISSES = 0.01


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    arguments, channels, products = _MODULES[case["module"]]
    generator = torch.Generator().manual_seed(1)
    shape = (case["B"], case["N"], channels)
    x = (0.5 * torch.randn(shape, generator=generator)).to(context.device).requires_grad_()
    upstream = torch.randn(shape, generator=generator).to(context.device)
    torch.manual_seed(0)
    ours = getattr(fastvq, case["module"])(**arguments).to(context.device).train()
    # x and the upstream gradient in, the quantized vectors and the gradient out.
    prepared = Prepared(Work(2.0 * products * shape[0] * shape[1], 16.0 * x.numel()))
    name = f"fastvq.{case['module']}"
    prepared.candidates[name] = _step(ours, x, upstream)
    first = _step(copy.deepcopy(ours), x, upstream)()
    _check(first, ours, x, upstream)

    def rival() -> Callable[[], object]:
        import vector_quantize_pytorch

        theirs = getattr(vector_quantize_pytorch, case["module"])(**arguments)
        theirs = theirs.to(context.device).train()
        theirs.load_state_dict(ours.state_dict())
        misses = _misses(first, _step(copy.deepcopy(theirs), x, upstream)())
        prepared.notes["vector-quantize-pytorch"] = (
            "same results" if misses == 0 else f"{misses} vectors chose other codes"
        )
        return _step(theirs, x, upstream)

    prepared.rival("vector-quantize-pytorch", rival)
    return prepared


def _check(first: tuple[Tensor, ...], ours: nn.Module, x: Tensor, upstream: Tensor) -> None:
    """Our step equals that of the same module in float64, which plain PyTorch computes."""
    rows = x.detach().double().requires_grad_()
    exact = _step(copy.deepcopy(ours).double(), rows, upstream.double())()
    rounded = (one.float() if one.is_floating_point() else one for one in exact)
    try:
        _misses(first, tuple(rounded))
    except (AssertionError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise WrongResult(f"{type(ours).__name__}: {line}: no time is reported") from error


def _step(module: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> tuple[Tensor, ...]:
        quantized, indices, *loss = module(x)
        outputs = [quantized, *(one for one in loss if one.requires_grad)]
        weights = [upstream, *(torch.ones_like(one) for one in outputs[1:])]
        grads = torch.autograd.grad(outputs, [x, *parameters], weights, allow_unused=True)
        return indices, quantized.detach(), grads[0], *(one.detach() for one in loss)

    return step


def _misses(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> int:
    """Vectors of other indices; raises where there are many, or where equal indices do not do."""
    flat = [
        results[0].flatten(0, 1).flatten(1) if results[0].dim() > 2 else results[0].flatten()
        for results in (ours, theirs)
    ]
    differs = flat[0] != flat[1]
    differs = differs.any(dim=1) if differs.dim() > 1 else differs
    misses = int(differs.sum())
    if misses > _MOST_MISSES * len(differs):
        raise RuntimeError(f"{misses} of {len(differs)} vectors chose other codes")
    for position in (1, 2):
        mine, yours = (results[position].flatten(0, 1)[~differs] for results in (ours, theirs))
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-4)
    if misses == 0:
        torch.testing.assert_close(ours[3:], theirs[3:], rtol=1e-4, atol=1e-4)
    return misses
