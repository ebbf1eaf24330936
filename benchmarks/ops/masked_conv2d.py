"""A training step of one masked convolution: fastvq against what PyTorch users write.

A step is the forward pass and the gradients of input, weight and bias. Rivals: the whole
convolution with a weight that is multiplied by its mask, and the two rectangles of live taps, each
padded on both sides and cropped. `dtype` "bf16" runs under autocast: bfloat16 pictures, float32
weights. Floating-point operations of a step: 6·B·H·W·C²·taps, the taps being k² for the whole
convolution and k²//2 + 1 for the others; on a 2-core Zen 4 at 3.7 GHz at most 235 GFLOP/s in
float32 (two 256-bit multiply-adds per cycle and core), twice that in bfloat16. On a GPU "float32"
forbids TF32, and "tf32" allows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suites import Context, Prepared, Work, WrongResult
from fastvq import ops

_KERNELS = (3, 5, 7)
_SIZES = {
    "cpu": {"float32": (64, 128, 256), "bf16": (64, 128, 256)},
    "cuda": {"float32": (128, 256), "tf32": (128, 256), "bf16": (64, 128, 256, 512)},
}
CASES = {
    device: [
        {"B": 16 if device == "cpu" else 64, "C": C, "H": 32, "k": k, "dtype": dtype}
        for dtype, widths in sizes.items()
        for C in widths
        for k in _KERNELS
    ]
    for device, sizes in _SIZES.items()
}
QUICK_CASES = [{"B": 4, "C": 32, "H": 16, "k": 3, "dtype": "float32"}]
_FORMATS = {"": torch.contiguous_format, ", channels_last": torch.channels_last}
# Of the largest element. Sums of a few thousand standard normal products; bfloat16 rounds results,
# and the two rectangles before they are added.
_TOLERANCE = {"float32": 1e-4, "tf32": 4e-3, "bf16": 2e-2}

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    k, dtype = case["k"], case["dtype"]
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    mask = (torch.arange(k * k) <= k * k // 2).view(k, k).float().to(context.device)
    few = _inputs({**case, "B": 2}, context.device, torch.contiguous_format)
    wide = [one.double() for one in few]
    exact = _step(lambda *t: _whole(*t, mask.double()), wide, "float64")()
    prepared = Prepared(_work(case))
    convolutions: dict[str, Convolution] = {
        "fastvq": _fastvq,
        "weight × mask": lambda *t: _whole(*t, mask),
        "padded rectangles, cropped": _rectangles,
    }
    for suffix, memory_format in _FORMATS.items():
        for name, convolution in convolutions.items():

            def checked(
                convolution: Convolution = convolution,
                memory_format: torch.memory_format = memory_format,
            ) -> Callable[[], object]:
                few = _inputs({**case, "B": 2}, context.device, memory_format)
                for value, true in zip(_step(convolution, few, dtype)(), exact):
                    error = (value.double() - true).abs().max() / true.abs().max()
                    if not error <= _TOLERANCE[dtype]:
                        raise RuntimeError(f"differs from float64 by {float(error):.2g}")
                return _step(convolution, _inputs(case, context.device, memory_format), dtype)

            if name == "fastvq":
                try:
                    prepared.candidates[name + suffix] = checked()
                except RuntimeError as error:
                    raise WrongResult(f"fastvq{suffix} {error}: no time is reported") from error
            else:
                prepared.rival(name + suffix, checked)
    return prepared


def _work(case: dict[str, Any]) -> Work:
    """A step over the live taps; x, its upstream and the weight in, y and gradients out."""
    pixels, channels = case["B"] * case["H"] ** 2, case["C"]
    weights = channels**2 * (case["k"] ** 2 // 2 + 1)
    size, dtype = (2, "bfloat16") if case["dtype"] == "bf16" else (4, "float32")
    return Work(6.0 * pixels * weights, size * 4.0 * pixels * channels + 8.0 * weights, dtype)


def _inputs(case: dict[str, Any], device: str, memory_format: torch.memory_format) -> list[Tensor]:
    """The output's gradient, x, weight and bias: the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    B, C, H, k = (case[name] for name in "BCHk")
    shapes = ((B, C, H, H), (B, C, H, H), (C, C, k, k), (C,))
    grad, x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    if case["dtype"] == "bf16":
        grad, x = grad.bfloat16(), x.bfloat16()
        weight, bias = weight.bfloat16().float(), bias.bfloat16().float()
    formatted = (one.to(device, memory_format=memory_format) for one in (grad, x, weight))
    return [*formatted, bias.to(device)]


def _step(
    convolution: Convolution, inputs: list[Tensor], dtype: str
) -> Callable[[], tuple[Tensor, ...]]:
    grad, *leaves = inputs
    leaves = [one.requires_grad_() for one in leaves]

    def run() -> tuple[Tensor, ...]:
        on = torch.autocast(grad.device.type, torch.bfloat16) if dtype == "bf16" else None
        with on or contextlib.nullcontext():
            y = convolution(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, grad))

    return run


def _fastvq(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.masked_conv2d(x, weight, bias, mask_type="B")


def _whole(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return F.conv2d(x, weight * mask, bias, padding=weight.shape[2] // 2)


def _rectangles(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    reach = weight.shape[2] // 2
    above = F.conv2d(x, weight[:, :, :reach], bias, padding=(reach, reach))
    row = F.conv2d(x, weight[:, :, reach : reach + 1, : reach + 1], padding=(0, reach))
    return above[:, :, : x.shape[2]] + row[:, :, :, : x.shape[3]]
