"""Causal self-attention against an explicit softmax over earlier pixels."""

from __future__ import annotations

import pytest
import torch

from fastvq.nn.causal_attention import CausalSelfAttention, coordinates


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("heads", [1, 4])
def test_equals_an_explicit_softmax(size: tuple[int, int], heads: int) -> None:
    torch.manual_seed(0)
    channels, count = 8, size[0] * size[1]
    layer = CausalSelfAttention(channels, heads).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    weight, bias = layer.query_key_value.weight[:, :, 0, 0], layer.query_key_value.bias
    out_weight, out_bias = layer.out.weight[:, :, 0, 0], layer.out.bias
    rows = [2 * (i + 0.5) / size[0] - 1 for i in range(size[0]) for _ in range(size[1])]
    columns = [2 * (j + 0.5) / size[1] - 1 for _ in range(size[0]) for j in range(size[1])]
    position = torch.tensor([rows, columns], dtype=torch.float64)
    with torch.no_grad():
        for one in range(2):
            flat = x[one].flatten(1)
            projected = weight @ torch.cat([flat, position]) + bias[:, None]
            q, k, v = projected.view(3, heads, channels // heads, count)
            for p in range(count):
                scores = torch.einsum("hc,hcs->hs", q[:, :, p], k[:, :, : p + 1])
                weights = (scores / (channels // heads) ** 0.5).softmax(dim=1)
                merged = torch.einsum("hs,hcs->hc", weights, v[:, :, : p + 1]).flatten()
                expected = flat[:, p] + out_weight @ merged + out_bias
                # float64 sums of at most 35 terms of size below 10
                torch.testing.assert_close(
                    layer(x)[one].flatten(1)[:, p], expected, rtol=0, atol=1e-12
                )


def test_coordinates_are_centred_at_any_size() -> None:
    assert coordinates(1, 1, like=torch.zeros(1)).flatten().tolist() == [0, 0]
    both = coordinates(2, 4, like=torch.zeros(1, dtype=torch.float64))
    assert both[0].tolist() == [[-0.5] * 4, [0.5] * 4]
    assert both[1, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = CausalSelfAttention(8, 2, dropout=0.5)
    x = torch.randn(1, 8, 3, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_refuses_channels_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of heads; got 6 channels and 4 heads"):
        CausalSelfAttention(6, 4)
