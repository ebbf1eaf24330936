"""What only a GPU can show of the masked convolutions: large pictures, TF32, graphs, no waiting."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_within, rounding_bound, sum_bound
from torch import Tensor

from fastvq import nn, ops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("without_tf32")]

CHANNELS, KERNEL = 96, 5


def _tensors(dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(8, CHANNELS, 33, 31, device="cuda")
    weight = torch.randn(CHANNELS, CHANNELS, KERNEL, KERNEL, device="cuda")
    bias, grad = torch.randn(CHANNELS, device="cuda"), torch.randn_like(x)
    return [t.to(dtype) for t in (x.to(memory_format=torch.channels_last), weight, bias, grad)]


def _step(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, backend=None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = ops.masked_conv2d(*leaves, mask_type="B", backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16", "float32", "tf32"])
def test_against_float64(arithmetic: str) -> None:
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    tensors = _tensors(dtype)
    truths = _step(*(t.double() for t in tensors), backend="reference")
    sizes = _step(*(t.double().abs() for t in tensors), backend="reference")
    taps, pixels = CHANNELS * (KERNEL**2 // 2 + 1), tensors[0][:, 0].numel()
    counts = [taps + 1, taps, pixels, pixels]
    for ours, truth, size, count in zip(_step(*tensors), truths, sizes, counts):
        # Matrix units may truncate sums; TF32 operands too: 2·2⁻¹⁰ of each product.
        operands = 2.0**-9 * size if arithmetic == "tf32" else 0.0
        bound = sum_bound(2 * count + 12, size) + 2 * rounding_bound(truth, dtype) + operands
        assert_within(ours, truth, bound)


def test_the_default_is_a_triton_kernel_and_repeatable() -> None:
    tensors = _tensors(torch.bfloat16)
    assert ops.explain("masked_conv2d", *tensors[:2]).startswith("masked_conv2d: triton")
    first = _step(*tensors)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, _step(*tensors)))


@pytest.mark.parametrize("options", [{"groups": 4}, {"channel_groups": 3}], ids=str)
def test_the_vendors_convolutions_are_repeatable(options: dict[str, int]) -> None:
    x, weight, bias, grad = _tensors(torch.bfloat16)
    weight = weight[:, : CHANNELS // options.get("groups", 1)]
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]

    def step() -> list[Tensor]:
        y = ops.masked_conv2d(*leaves, mask_type="B", **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        first = step()
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(first, step()))
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.benchmark = before


def test_more_than_two_to_the_31_numbers() -> None:
    width = 2**25 + 64
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of GPU memory")
    x = torch.zeros(1, 64, 1, width, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    x[..., -32:] = torch.randn(1, 64, 1, 32, device="cuda")
    weight = torch.randn(64, 64, 1, 3, device="cuda", dtype=torch.bfloat16)
    y = ops.masked_conv2d(x, weight, mask_type="B", backend="triton")
    tail = ops.masked_conv2d(x[..., -64:], weight, mask_type="B", backend="triton")
    assert torch.equal(y[..., -32:], tail[..., -32:])
    assert not y[..., :-32].any()


def test_a_layer_waits_for_nothing_and_fits_a_graph() -> None:
    layer = nn.GatedMaskedConv2d(64, 3, num_classes=10).to("cuda", torch.bfloat16)
    x = torch.randn(4, 64, 16, 16, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    labels = torch.arange(4, device="cuda")

    def step() -> tuple[Tensor, ...]:
        out = layer(x, x, labels)
        return (*out, *torch.autograd.grad(out, [x, *layer.parameters()], [x, x]))

    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))
