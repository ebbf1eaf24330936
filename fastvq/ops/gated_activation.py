"""The gate of one stack as one pass: what the class and the map add, tanh·σ, dropout.

    y = dropout(tanh(f₁ + a₁) ⊙ σ(f₂ + a₂)),   f = Σ of one or two feature maps,
    a = class bias + condition's map

Indices 1 and 2 are the two halves of the channels. `gated_masked_conv` calls both directions
between its convolutions; neither is registered or differentiable by itself. Nothing but the
features is needed to go back: the gate and the mask are computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.reference.gated_masked_conv import keep_mask

VERTICAL, HORIZONTAL = 0, 1


class Conditioning(NamedTuple):
    """What both stacks get beside their features; the first 2C channels are the vertical's."""

    class_bias: Tensor | None  # (B, 4C)
    mapped: Tensor | None  # (B, 4C, H, W): the condition through its 1×1 convolution
    seed: Tensor | None  # int64 (), of the dropout masks; None drops nothing
    dropout: float

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by; with dropout = 1 there are none."""
        return 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0


def gate(
    features: Tensor, more: Tensor | None, given: Conditioning, stack: int, backend: str
) -> Tensor:
    """(B, C, H, W) gated features, channels_last.

    Args:
        features: (B, 2C, H, W), channels_last.
        more: the same, to be added to it, or None.
        given: of both stacks.
        stack: VERTICAL or HORIZONTAL.
        backend: "cpp" or "reference"
    """
    values, gates = _added_up(features, more, given, stack).chunk(2, dim=1)
    gated = torch.tanh(values).mul_(torch.sigmoid(gates))
    return _dropped(gated, given, stack)


def gate_backward(
    grad: Tensor,
    features: Tensor,
    more: Tensor | None,
    given: Conditioning,
    stack: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient to the features, its sum over each picture, and the gated features again.

    Args:
        grad: (B, C, H, W), to the gated features; channels_last. The others as for `gate`.
    Returns:
        (B, 2C, H, W), (B, 2C) in at least float32, (B, C, H, W).
    """
    values, gates = _added_up(features, more, given, stack).chunk(2, dim=1)
    values, gates = torch.tanh(values), torch.sigmoid(gates)
    grad = _dropped(grad, given, stack)
    to_values = grad * gates * (1.0 - values * values)
    to_gates = grad * values * gates * (1.0 - gates)
    grad_features = torch.cat([to_values, to_gates], dim=1)
    sums = grad_features.sum(dim=(2, 3), dtype=_accumulator(grad.dtype))
    return grad_features, sums, _dropped(values.mul_(gates), given, stack)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _added_up(features: Tensor, more: Tensor | None, given: Conditioning, stack: int) -> Tensor:
    if more is not None:
        features = features + more
    if given.class_bias is not None:
        features = features + given.class_bias.chunk(2, dim=1)[stack][:, :, None, None]
    if given.mapped is not None:
        features = features + given.mapped.chunk(2, dim=1)[stack]
    return features


def _dropped(gated: Tensor, given: Conditioning, stack: int) -> Tensor:
    if given.seed is None:
        return gated
    keep = keep_mask(given.seed, stack, gated.shape, given.dropout)
    return torch.where(keep, gated * given.scale, 0.0)
