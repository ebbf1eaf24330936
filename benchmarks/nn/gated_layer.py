"""One gated PixelCNN layer, forward and backward, beside the same layer in plain PyTorch.

The rival is the usual layer: each stack's input padded and cropped so that an ordinary convolution
over the live rectangle sees nothing later, then addition, chunk, tanh, σ and product. It is timed
in both memory formats. Before a time is reported, outputs and all gradients are compared: ours with
the same layer in float64, which plain PyTorch computes, on one example, and the rivals' with ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suites import Context, Prepared, Work, WrongResult
from fastvq.nn import GatedMaskedConv2d

CASES = {
    device: [
        {
            "B": 16 if device == "cpu" else 64,
            "H": 32,
            "W": 32,
            "C": channels,
            "k": kernel,
            "dtype": dtype,
        }
        for dtype in (("float32",) if device == "cpu" else ("bfloat16", "float32"))
        for kernel in (3, 5)
        for channels in (64, 128, 256)
    ]
    for device in ("cpu", "cuda")
}
QUICK_CASES = [{"B": 2, "H": 16, "W": 15, "C": 16, "k": 3, "dtype": "float32"}]
# Of the float32 results' norms; the order of sums differs.
_MOST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.05}


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    dtype = getattr(torch, case["dtype"])
    layer = GatedMaskedConv2d(case["C"], case["k"]).to(context.device, dtype)
    shape = (4, case["B"], case["C"], case["H"], case["W"])
    inputs = torch.randn(shape, device=context.device).to(dtype)
    _check(layer, inputs[:, :1], case["dtype"])
    prepared = Prepared(_work(layer, inputs))
    ours = _step(layer, layer, inputs, torch.channels_last)
    prepared.candidates["fastvq"] = ours
    expected = [result.clone() for result in ours()]
    rivals: list[tuple[str, Callable, torch.memory_format]] = [
        ("fastvq, contiguous", layer, torch.contiguous_format),
        ("eager padded crop", padded_crop(layer), torch.contiguous_format),
        ("eager padded crop, channels_last", padded_crop(layer), torch.channels_last),
    ]
    if context.device == "cuda":
        compiled = torch.compile(padded_crop(layer))
        rivals.append(("compiled padded crop, channels_last", compiled, torch.channels_last))
    for name, run, memory_format in rivals:

        def checked(
            run: Callable = run, memory_format: torch.memory_format = memory_format
        ) -> Callable[[], object]:
            step = _step(layer, run, inputs, memory_format)
            difference = _difference(step(), expected)
            if not difference <= _MOST_DIFFERENCE[case["dtype"]]:
                raise RuntimeError(f"results differ by {difference:.1e} of their norm")
            return step

        prepared.rival(name, checked)
    return prepared


def _check(layer: GatedMaskedConv2d, inputs: Tensor, dtype: str) -> None:
    """Our step is that of the layer in float64, or no time is reported."""
    twin = copy.deepcopy(layer).double()
    truth = _step(twin, twin, inputs.double(), torch.contiguous_format)()
    difference = _difference(_step(layer, layer, inputs, torch.channels_last)(), truth)
    if not difference <= _MOST_DIFFERENCE[dtype]:
        raise WrongResult(f"results differ by {difference:.1e} of their norm from float64's")


def _difference(results: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    """The largest difference of a result from its truth, as a share of the truth's norm."""
    return max(
        float((result.double() - truth.double()).norm() / truth.double().norm())
        for result, truth in zip(results, truths)
    )


def _work(layer: GatedMaskedConv2d, inputs: Tensor) -> Work:
    """The live taps' products, forward, to the input and to the weights.

    Two inputs, two upstream gradients, two outputs and two gradients; weights and their gradients.
    """
    live = layer.kernel_size // 2 + 1
    weights = (layer.vertical, layer.link, layer.horizontal_out)
    taps = sum(part.weight.numel() for part in weights)
    taps += layer.horizontal.weight[..., :live].numel()
    _, batch, _, height, width = inputs.shape
    moved = inputs.element_size() * (2 * inputs.numel() + 2 * taps)
    dtype = str(inputs.dtype).removeprefix("torch.")
    return Work(6.0 * batch * height * width * taps, float(moved), dtype)


def padded_crop(layer: GatedMaskedConv2d) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The layer as users write it, with mask type "B", from the same weights."""
    side, live = layer.kernel_size // 2, layer.kernel_size // 2 + 1

    def run(vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        features_v = layer.vertical(F.pad(vertical, (side, side, side, 0)))
        taps = layer.horizontal.weight[..., :live]
        features_h = F.conv2d(F.pad(horizontal, (side, 0, 0, 0)), taps, layer.horizontal.bias)
        features_h = features_h + layer.link(features_v)
        out = layer.horizontal_out(_gate(features_h)) + horizontal
        return _gate(features_v), out

    return run


def _gate(features: Tensor) -> Tensor:
    values, gates = features.chunk(2, dim=1)
    return torch.tanh(values) * torch.sigmoid(gates)


def _step(
    layer: GatedMaskedConv2d, run: Callable, inputs: Tensor, memory_format: torch.memory_format
) -> Callable[[], tuple[Tensor, ...]]:
    vertical, horizontal, *upstream = (
        part.contiguous(memory_format=memory_format) for part in inputs
    )
    leaves = [vertical.requires_grad_(), horizontal.requires_grad_(), *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        outputs = run(vertical, horizontal)
        grads = torch.autograd.grad(outputs, leaves, upstream)
        return (*(output.detach() for output in outputs), *grads)

    return step
