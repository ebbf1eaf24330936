"""What the tests of the masked convolutions share: the truth in float64, and its error bounds."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from tolerances import rounding_bound, sum_bound
from torch import Tensor

BUILT = importlib.util.find_spec("_fastvq_C") is not None
CPP = pytest.param("cpp", marks=pytest.mark.skipif(not BUILT, reason="no C++ kernels"))
BACKENDS = [None, CPP, "reference"]


def live_weights(weight: Tensor, mask_type: str, channel_groups: int = 1) -> Tensor:
    """(O, C, kh, kw) bool: which weights a mask leaves, by the raster order of taps."""
    outputs, inputs, kh, kw = weight.shape
    raster = torch.arange(kh * kw).view(kh, kw)
    centre = (kh // 2) * kw + kw // 2
    live = (raster < centre).expand(weight.shape).clone()
    of_output = torch.arange(outputs) * channel_groups // outputs
    of_input = torch.arange(inputs) * channel_groups // inputs
    earlier = of_input < of_output[:, None]
    itself = of_input == of_output[:, None]
    live[:, :, kh // 2, kw // 2] = earlier | itself if mask_type == "B" else earlier
    return live


def truth(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    dilation: int = 1,
    groups: int = 1,
    channel_groups: int = 1,
) -> Tensor:
    """The textbook form, in float64: the weight times its mask."""
    masked = torch.where(live_weights(weight, mask_type, channel_groups), weight, 0.0).double()
    padding = [dilation * (size // 2) for size in weight.shape[2:]]
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), masked, bias, padding=padding, dilation=dilation, groups=groups)


def step(forward, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    y = forward(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def truths_and_bounds(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *mask: str | int
) -> tuple[list[Tensor], list[Tensor]]:
    """Truth, and the error of float32 sums rounded to the inputs' dtype.

    A sum of n products has a rounding for each product and each addition: at most n + 1 of them
    touch one term, and the result is rounded once more.
    """
    inputs = [one.double() for one in (x, weight, bias)]
    exact = step(lambda *leaves: truth(*leaves, *mask), grad.double(), *inputs)
    sizes = step(
        lambda *leaves: truth(*leaves, *mask), grad.double().abs(), *(one.abs() for one in inputs)
    )
    outputs, groups = weight.shape[0], x.shape[1] // max(weight.shape[1], 1)
    pixels = grad[:, 0].numel()
    terms = [weight[0].numel() + 1, weight[:, 0].numel() // groups, pixels, pixels]
    assert outputs == grad.shape[1]
    bounds = [
        sum_bound(count + 1, size) + rounding_bound(value, x.dtype)
        for count, size, value in zip(terms, sizes, exact)
    ]
    return exact, bounds


def inputs_of(
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: tuple[int, int],
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """A gradient of the output, x, weight and bias, standard normal."""
    return [
        torch.randn(shape[0], outputs, *shape[2:]).to(dtype).to(memory_format=memory_format),
        torch.randn(shape).to(dtype).to(memory_format=memory_format),
        torch.randn(outputs, shape[1] // groups, *kernel).to(dtype),
        torch.randn(outputs).to(dtype),
    ]
