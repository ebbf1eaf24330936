"""The masked convolutions as modules; the op's own arithmetic is tested with the op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvq import ops
from fastvq.nn.masked_conv import CausalConv1d, MaskedConv2d


def _mask(height: int, width: int, mask_type: str) -> torch.Tensor:
    """(kh, kw): 1 before the centre in raster order, and at it with type B."""
    flat = torch.zeros(height * width, dtype=torch.float64)
    flat[: height * width // 2 + (mask_type == "B")] = 1
    return flat.view(height, width)


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("kernel", [1, 3, (1, 5), (5, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_equals_a_convolution_with_a_masked_weight(
    mask_type: str, kernel: int | tuple[int, int], dilation: int
) -> None:
    torch.manual_seed(0)
    conv = MaskedConv2d(3, 4, kernel, mask_type, dilation).double()
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    weight = conv.weight * _mask(*conv.kernel_size, mask_type)
    expected = F.conv2d(x, weight, conv.bias, padding=conv.padding, dilation=dilation)
    # float64 sums of at most 3·15 terms, each at most about 4: 45·2⁻⁵³·180 < 1e-12
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_one_dimension_is_height_one(mask_type: str) -> None:
    torch.manual_seed(0)
    line = CausalConv1d(3, 4, 5, mask_type, 2).double()
    plane = MaskedConv2d(3, 4, (1, 5), mask_type, 2).double()
    plane.load_state_dict({"weight": line.weight[:, :, None], "bias": line.bias})
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    # the bound of the test above
    torch.testing.assert_close(line(x), plane(x[:, :, None])[:, :, 0], rtol=0, atol=1e-12)


def test_attributes_and_keys_are_those_of_the_torch_modules() -> None:
    for ours, theirs in (
        (MaskedConv2d(3, 4, 5, dilation=2), nn.Conv2d(3, 4, 5, padding=4, dilation=2)),
        (CausalConv1d(3, 4, 5, dilation=2), nn.Conv1d(3, 4, 5, padding=4, dilation=2)),
    ):
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
            assert getattr(ours, name) == getattr(theirs, name)
    assert MaskedConv2d(3, 4, 3, bias=False).bias is None
    assert "mask_type=A" in repr(CausalConv1d(3, 4, 3, "A"))


@pytest.mark.parametrize("kind", [MaskedConv2d, CausalConv1d])
def test_refusals(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*got 4"):
        kind(3, 4, 4)
    with pytest.raises(ValueError, match=r"mask_type must be .A.*got 'C'"):
        kind(3, 4, 3, "C")


def test_groups_and_ordered_channels_reach_the_op() -> None:
    x = torch.randn(1, 6, 4, 5)
    for options in ({"groups": 2}, {"channel_groups": 3}):
        conv = MaskedConv2d(6, 6, 3, "A", **options)
        expected = ops.masked_conv2d(x, conv.weight, conv.bias, mask_type="A", **options)
        assert torch.equal(conv(x), expected)
    line = CausalConv1d(6, 4, 3, groups=2)
    assert line.weight.shape == (4, 3, 3)
    expected = ops.causal_conv1d(x[:, :, 0], line.weight, line.bias, groups=2)
    assert torch.equal(line(x[:, :, 0]), expected)
    with pytest.raises(ValueError, match="channel_groups must divide in_channels=6"):
        MaskedConv2d(6, 6, 3, channel_groups=4)
