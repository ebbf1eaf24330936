"""Cached generation in eager PyTorch: what a careful user writes without kernels of their own.

The algorithm of Ramachandran et al. 2017, arXiv:1704.06001: every layer keeps the inputs its
convolutions need again; the vertical stack is computed a row at a time, the horizontal one a pixel
at a time, by the model's own convolutions. Attention keeps keys and values. The draw is the
Gumbel-max rule on fastvq's noise, so that the codes can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.models import PixelCNN
from fastvq.nn.causal_attention import CausalSelfAttention, coordinates
from fastvq.nn.gated_masked_conv import GatedMaskedConv2d
from fastvq.sampling.noise import gumbel_noise


class EagerCached:
    """Draws the first rows of maps.

    Args:
        prior: without class labels, in eval mode and float32.
        condition: (n, channels, H, W), or None.
    """

    def __init__(self, prior: nn.Module, condition: Tensor | None) -> None:
        assert isinstance(prior, PixelCNN)
        self._prior = prior
        self._condition = condition

    @torch.inference_mode()
    def draw(self, shape: tuple[int, int], n: int, rows: int, *, seed: int, device: str) -> Tensor:
        """(n, rows, W) int64."""
        height, width = shape
        prior = self._prior
        layers = [
            _Gated(layer, n, width, self._condition)
            if isinstance(layer, GatedMaskedConv2d)
            else _Attention(layer, n, height, width)
            for layer in prior.layers
        ]
        gated = [layer for layer in layers if isinstance(layer, _Gated)]
        codes = torch.zeros(n, rows, width, dtype=torch.int64, device=device)
        samples = torch.arange(n, device=device)
        for row in range(rows):
            vertical = self._above(codes, row)
            for layer in gated:
                vertical = layer.start_row(row, vertical)
            for column in range(width):
                features = self._before(codes, row, column)
                for layer in layers:
                    features = layer.step(row, column, features)
                logits = prior.head(features)[:, :, 0, 0]
                at = torch.tensor([row * width + column], device=device)
                noise = gumbel_noise(seed, samples, 0, at, logits.shape[1])[0]
                codes[:, row, column] = (logits.double() + noise).argmax(dim=1)
        return codes

    def _above(self, codes: Tensor, row: int) -> Tensor:
        """The embedded row above, (n, C, 1, W); zeros above the first."""
        if row == 0:
            n, _, width = codes.shape
            return self._prior.embedding.weight.new_zeros(n, self._channels, 1, width)
        return self._prior.embedding(codes[:, row - 1]).transpose(1, 2)[:, :, None]

    def _before(self, codes: Tensor, row: int, column: int) -> Tensor:
        """The embedded code to the left, (n, C, 1, 1); zeros left of the first."""
        if column == 0:
            return self._prior.embedding.weight.new_zeros(len(codes), self._channels, 1, 1)
        return self._prior.embedding(codes[:, row, column - 1])[:, :, None, None]

    @property
    def _channels(self) -> int:
        return self._prior.embedding.weight.shape[1]


class _Gated:
    """The kept inputs of one gated layer.

    The first layer, of mask type "A", is given the row above and the code to the left in the place
    of the current ones, and keeps them as such.
    """

    def __init__(
        self, layer: GatedMaskedConv2d, n: int, width: int, condition: Tensor | None
    ) -> None:
        self._layer, self._condition, self._width = layer, condition, width
        self._reach = reach = layer.dilation * (layer.kernel_size // 2)
        live = layer.kernel_size // 2 + (layer.mask_type == "B")
        self._span = (live - 1) * layer.dilation + 1
        new = layer.link.weight.new_zeros
        self._rows = new(n, layer.hidden_channels, self._span, width + 2 * reach)
        self._columns = new(n, layer.hidden_channels, 1, width + reach)
        self._weight = layer.horizontal.weight[..., :live].contiguous()
        self._terms = new(0)

    def start_row(self, row: int, vertical: Tensor) -> Tensor:
        layer, reach = self._layer, self._reach
        self._rows = self._rows.roll(-1, dims=2)
        self._rows[:, :, -1, reach : reach + self._width] = vertical[:, :, 0]
        features = layer.vertical(self._rows)
        self._terms = layer.link(features)
        if layer.condition_map is not None:
            assert self._condition is not None
            added = layer.condition_map(self._condition[:, :, row : row + 1]).chunk(2, dim=1)
            features, self._terms = features + added[0], self._terms + added[1]
        self._columns.zero_()
        return _gate(features)

    def step(self, row: int, column: int, features: Tensor) -> Tensor:
        layer, reach = self._layer, self._reach
        self._columns[..., reach + column] = features[..., 0]
        last = reach + column + 1
        seen = self._columns[..., last - self._span : last]
        bias, dilation = layer.horizontal.bias, layer.dilation
        horizontal = F.conv2d(seen, self._weight, bias, dilation=(1, dilation))
        horizontal = horizontal + self._terms[..., column : column + 1]
        out = layer.horizontal_out(_gate(horizontal))
        return out + features if layer.residual else out


class _Attention:
    """The kept keys and values of one attention layer."""

    def __init__(self, layer: CausalSelfAttention, n: int, height: int, width: int) -> None:
        self._layer, self._width = layer, width
        weight = layer.out.weight
        size = layer.channels // layer.heads
        self._keys_values = weight.new_zeros(2, n, layer.heads, height * width, size)
        self._places = coordinates(height, width, like=weight)

    def step(self, row: int, column: int, features: Tensor) -> Tensor:
        layer, n = self._layer, len(features)
        place = self._places[:, row, column].expand(n, 2)[:, :, None, None]
        projected = layer.query_key_value(torch.cat([features, place], dim=1))
        query, *key_value = projected.view(n, 3, layer.heads, 1, -1).unbind(1)
        position = row * self._width + column
        self._keys_values[:, :, :, position] = torch.stack(key_value)[:, :, :, 0]
        keys, values = self._keys_values[:, :, :, : position + 1]
        attended = F.scaled_dot_product_attention(query, keys, values)
        return features + layer.out(attended.reshape(n, layer.channels, 1, 1))


def _gate(features: Tensor) -> Tensor:
    values, gates = features.chunk(2, dim=1)
    return values.tanh() * gates.sigmoid()
