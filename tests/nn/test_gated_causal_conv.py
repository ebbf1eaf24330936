"""GatedCausalConv1d: its equation, what it sees, its refusals."""

from __future__ import annotations

import pytest
import torch

from fastvq.nn import GatedCausalConv1d, GatedMaskedConv2d, ResidualStack


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_follows_its_equation(mask_type: str) -> None:
    torch.manual_seed(0)
    layer = GatedCausalConv1d(3, 5, mask_type, 2, num_classes=2, condition_channels=4).double()
    x, condition = torch.randn(2, 3, 11).double(), torch.randn(2, 4, 11).double()
    labels = torch.tensor([1, 0])
    features = torch.zeros(2, 6, 11).double() + layer.horizontal.bias[:, None]
    for tap in range(2 + (mask_type == "B")):
        back = (2 - tap) * 2
        shifted = torch.nn.functional.pad(x, (back, 0))[:, :, :11]
        features = features + torch.einsum(
            "oc,bct->bot", layer.horizontal.weight[:, :, tap], shifted
        )
    features = features + layer.class_bias.weight[labels][:, :, None]
    features = features + torch.einsum(
        "oc,bct->bot", layer.condition_map.weight[:, :, 0], condition
    )
    gated = features[:, :3].tanh() * features[:, 3:].sigmoid()
    expected = torch.einsum("oc,bct->bot", layer.horizontal_out.weight[:, :, 0], gated)
    expected = expected + layer.horizontal_out.bias[:, None] + (x if mask_type == "B" else 0)
    # float64, sums of fewer than 30 terms below 10
    torch.testing.assert_close(layer(x, labels, condition), expected, rtol=0, atol=1e-13)


def test_is_the_horizontal_stack_of_the_layer_of_pictures() -> None:
    """On a row with nothing above and a silent vertical stack both give the same features."""
    torch.manual_seed(0)
    pictures = GatedMaskedConv2d(4, 3, "B", 2).double()
    row = GatedCausalConv1d(4, 3, "B", 2).double()
    with torch.no_grad():
        pictures.link.weight.zero_()
        pictures.link.bias.zero_()
        row.horizontal.weight.copy_(pictures.horizontal.weight[:, :, 0])
        row.horizontal.bias.copy_(pictures.horizontal.bias)
        row.horizontal_out.weight.copy_(pictures.horizontal_out.weight[:, :, 0])
        row.horizontal_out.bias.copy_(pictures.horizontal_out.bias)
    x = torch.randn(2, 4, 9).double()
    _, expected = pictures(torch.zeros(2, 4, 1, 9).double(), x[:, :, None])
    torch.testing.assert_close(row(x), expected[:, :, 0], rtol=0, atol=1e-13)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="GatedCausalConv1d: kernel_size must be odd"):
        GatedCausalConv1d(4, 4)
    with pytest.raises(ValueError, match="GatedCausalConv1d: dilation must be at least 1"):
        GatedCausalConv1d(4, 3, dilation=0)
    with pytest.raises(ValueError, match="GatedCausalConv1d: class_labels must be given exactly"):
        GatedCausalConv1d(4, 3)(torch.zeros(1, 4, 5), torch.zeros(1).long())
    with pytest.raises(ValueError, match="GatedCausalConv1d: condition must be given exactly"):
        GatedCausalConv1d(4, 3, condition_channels=2)(torch.zeros(1, 4, 5))


def test_residual_stack_over_sequences() -> None:
    stack = ResidualStack(4, 2, 2, dimensions=1)
    assert stack(torch.randn(2, 4, 7)).shape == (2, 4, 7)
    with pytest.raises(ValueError, match="ResidualBlock: dimensions must be 1"):
        ResidualStack(4, 2, 1, dimensions=3)
