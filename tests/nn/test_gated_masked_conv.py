"""One gated layer against loops over pixels, and what each stack may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvq.nn.gated_masked_conv import GatedMaskedConv2d

SIZES = [(4, 5), (1, 6), (6, 1), (1, 1)]


def _gate(features: Tensor) -> Tensor:
    half = len(features) // 2
    return torch.tanh(features[:half]) * torch.sigmoid(features[half:])


def _by_loops(
    layer: GatedMaskedConv2d,
    vertical: Tensor,
    horizontal: Tensor,
    labels: Tensor | None,
    condition: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The layer's equations for one example, pixel by pixel and tap by tap."""
    channels, height, width = vertical.shape
    r, d, current = layer.kernel_size // 2, layer.dilation, layer.mask_type == "B"
    out_v, out_h = torch.zeros_like(vertical), torch.zeros_like(horizontal)
    for i in range(height):
        for j in range(width):
            features_v = layer.vertical.bias.clone()
            features_h = layer.horizontal.bias.clone()
            for a in range(r + current):
                for b in range(layer.kernel_size):
                    y, x = i - (r - a) * d, j + (b - r) * d
                    if y >= 0 and 0 <= x < width:
                        features_v += layer.vertical.weight[:, :, a, b] @ vertical[:, y, x]
            for b in range(r + current):
                x = j - (r - b) * d
                if x >= 0:
                    features_h += layer.horizontal.weight[:, :, 0, b] @ horizontal[:, i, x]
            features_h += layer.link.weight[:, :, 0, 0] @ features_v + layer.link.bias
            if labels is not None:
                features_v += layer.class_bias.weight[labels][: 2 * channels]
                features_h += layer.class_bias.weight[labels][2 * channels :]
            if condition is not None:
                mapped = layer.condition_map.weight[:, :, 0, 0] @ condition[:, i, j]
                features_v += mapped[: 2 * channels]
                features_h += mapped[2 * channels :]
            out_v[:, i, j] = _gate(features_v)
            out_h[:, i, j] = layer.horizontal_out.weight[:, :, 0, 0] @ _gate(features_h)
            out_h[:, i, j] += layer.horizontal_out.bias
            if layer.residual:
                out_h[:, i, j] += horizontal[:, i, j]
    return out_v, out_h


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize(("kernel", "dilation", "residual"), [(3, 1, True), (5, 2, False)])
def test_equals_the_equations(
    size: tuple[int, int], mask_type: str, kernel: int, dilation: int, residual: bool
) -> None:
    torch.manual_seed(0)
    layer = GatedMaskedConv2d(3, kernel, mask_type, dilation, 4, 2, residual=residual).double()
    vertical, horizontal = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    labels, condition = torch.tensor([3, 1]), torch.randn(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        got = layer(vertical, horizontal, labels, condition)
        for one in range(2):
            expected = _by_loops(layer, vertical[one], horizontal[one], labels[one], condition[one])
            for ours, loops in zip(got, expected):
                # float64 sums of fewer than 100 terms of size below 10, times slopes below 1
                torch.testing.assert_close(ours[one], loops, rtol=0, atol=1e-11)


def test_type_a_never_adds_its_input() -> None:
    assert not GatedMaskedConv2d(4, 3, "A", residual=True).residual
    assert GatedMaskedConv2d(4, 3, "B", residual=True).residual


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = GatedMaskedConv2d(8, 3, dropout=0.5)
    x = torch.randn(1, 8, 4, 5)
    assert not torch.equal(layer(x, x)[0], layer(x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x)[0], layer(x, x)[0])


def test_refusals() -> None:
    for kernel in (1, 4):
        with pytest.raises(ValueError, match="kernel_size must be odd and at least 3"):
            GatedMaskedConv2d(4, kernel)
    with pytest.raises(ValueError, match="dilation must be at least 1; got 0"):
        GatedMaskedConv2d(4, 3, dilation=0)
    x, labels, condition = torch.randn(1, 4, 3, 3), torch.tensor([0]), torch.randn(1, 2, 3, 3)
    plain, told = GatedMaskedConv2d(4, 3), GatedMaskedConv2d(4, 3, "B", 1, 5, 2)
    with pytest.raises(ValueError, match="class_labels must be given exactly when"):
        plain(x, x, labels)
    with pytest.raises(ValueError, match="condition must be given exactly when"):
        plain(x, x, None, condition)
    with pytest.raises(ValueError, match="class_labels must be given exactly when"):
        told(x, x, None, condition)
    with pytest.raises(ValueError, match="condition must be given exactly when"):
        told(x, x, labels)


def _gradients(layer: GatedMaskedConv2d, run: object, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    vertical, horizontal = run(x, x.flip(0))
    loss = (vertical * horizontal).sum()
    return [vertical, horizontal, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def test_dropout_survives_checkpointing_and_compiling() -> None:
    layer = GatedMaskedConv2d(6, 3, dropout=0.4)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    plain = _gradients(layer, layer, x)

    def again(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(layer, *inputs, use_reentrant=False)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (again, compiled):
        for found, expected in zip(_gradients(layer, run, x), plain):
            assert torch.equal(found, expected)


def test_stack_of_twelve_sees_the_past_and_only_it() -> None:
    layers = [GatedMaskedConv2d(4, 3, "A" if i == 0 else "B").double() for i in range(12)]
    embedded = torch.randn(1, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    vertical = horizontal = embedded
    for layer in layers:
        vertical, horizontal = layer(vertical, horizontal)
    row, column = 5, 3
    (grad,) = torch.autograd.grad(horizontal[0, :, row, column].sum(), embedded)
    seen = (grad[0] != 0).any(dim=0).flatten()
    before = torch.arange(72) < row * 8 + column
    assert torch.equal(seen, before)


def test_trains_under_autocast_with_float32_features() -> None:
    layer = GatedMaskedConv2d(4, 3, num_classes=3)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        vertical, horizontal = layer(x, x, torch.tensor([0, 2]))
    assert (vertical.dtype, horizontal.dtype) == (torch.bfloat16, torch.float32)
    (vertical.float() * horizontal).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.any() for parameter in layer.parameters())
