"""The gate of one stack as one pass: what the class and the map add, tanh·σ, dropout.

    y = dropout(tanh(f₁ + a₁) ⊙ σ(f₂ + a₂)),   a = class bias + condition's map

Indices 1 and 2 are the two halves of the channels. `gated_masked_conv` calls both directions
between its convolutions; neither is registered or differentiable by itself. Nothing but the
features is needed to go back: the gate and the mask are computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.reference.gated_masked_conv import keep_mask

from .backends import CPU_EXTENSION
from .nearest_code import DTYPE_CODES

# Pixels whose gradients the C++ pass adds up together: kPixelsPerSum in gated_activation.h.
_PIXELS_PER_SUM = 128
# SplitMix64 (Steele, Lea and Flood 2014): its increment and its two multipliers.
_INCREMENT, *_MULTIPLIERS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

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


def gate(features: Tensor, given: Conditioning, stack: int, backend: str) -> Tensor:
    """(B, C, H, W) gated features, channels_last.

    Args:
        features: (B, 2C, H, W), channels_last.
        given: of both stacks.
        stack: VERTICAL or HORIZONTAL.
        backend: "cpp" or "reference"
    """
    if backend == "cpp":
        return _gate_cpp(features, given, stack)
    values, gates = _added_up(features, given, stack).chunk(2, dim=1)
    gated = torch.tanh(values).mul_(torch.sigmoid(gates))
    return _dropped(gated, given, stack)


def gate_backward(
    grad: Tensor, features: Tensor, given: Conditioning, stack: int, backend: str, *, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient to the features, its sum over each picture, and the gated features again.

    Args:
        grad: (B, C, H, W), to the gated features; channels_last. The others as for `gate`.
        reuse: let the results overwrite `features` and `grad`.
    Returns:
        (B, 2C, H, W), (B, 2C) in at least float32, (B, C, H, W).
    """
    if backend == "cpp":
        return _gate_backward_cpp(grad, features, given, stack, reuse)
    values, gates = _added_up(features, given, stack).chunk(2, dim=1)
    values, gates = torch.tanh(values), torch.sigmoid(gates)
    grad = _dropped(grad, given, stack)
    to_values = grad * gates * (1.0 - values * values)
    to_gates = grad * values * gates * (1.0 - gates)
    grad_features = torch.cat([to_values, to_gates], dim=1)
    sums = grad_features.sum(dim=(2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
    return grad_features, sums, _dropped(values.mul_(gates), given, stack)


def _added_up(features: Tensor, given: Conditioning, stack: int) -> Tensor:
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


def _gate_cpp(features: Tensor, given: Conditioning, stack: int) -> Tensor:
    assert CPU_EXTENSION is not None
    gated = _pixels_of(features, features.shape[1] // 2)
    arguments, _kept = _call(features, given, stack)
    CPU_EXTENSION.gated_activation(*arguments, gated.data_ptr(), torch.get_num_threads())
    return gated


def _gate_backward_cpp(
    grad: Tensor, features: Tensor, given: Conditioning, stack: int, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert CPU_EXTENSION is not None
    batch, both, height, width = features.shape
    grad_features, gated = features, grad
    if not reuse:
        grad_features, gated = _pixels_of(features, both), _pixels_of(features, both // 2)
    per_picture = -(-height * width // _PIXELS_PER_SUM)
    sums = features.new_empty((batch, per_picture, both), dtype=torch.float32)
    arguments, _kept = _call(features, given, stack)
    CPU_EXTENSION.gated_activation_backward(
        *arguments,
        *(tensor.data_ptr() for tensor in (grad, grad_features, sums, gated)),
        torch.get_num_threads(),
    )
    return grad_features, sums.sum(dim=1), gated


def _pixels_of(features: Tensor, channels: int) -> Tensor:
    """Uninitialised, channels_last."""
    batch, _, height, width = features.shape
    return features.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _call(
    features: Tensor, given: Conditioning, stack: int
) -> tuple[tuple[float, ...], list[Tensor]]:
    """What the C++ passes take first, and the tensors that must outlive the call."""
    batch, both, height, width = features.shape
    offset = stack * both * features.element_size()
    bias, mapped, kept = given.class_bias, given.mapped, []
    if bias is not None:
        kept.append(bias := bias.contiguous())
    if mapped is not None:
        kept.append(mapped := mapped.permute(0, 2, 3, 1).contiguous())
    stream = threshold = 0
    if given.seed is not None:
        stream = _mixed(int(given.seed) + (stack + 1) * _INCREMENT)
        threshold = int(given.dropout * 2**32 + 0.5)
    return (
        features.data_ptr(),
        *(0 if bias is None else bias.data_ptr() + offset, 2 * both),
        *(0 if mapped is None else mapped.data_ptr() + offset, 2 * both),
        DTYPE_CODES[features.dtype],
        *(batch, height * width, both // 2),
        *(stream, threshold, given.scale),
    ), kept


def _mixed(bits: int) -> int:
    """SplitMix64's output function; see `fastvq.reference.gated_masked_conv.keep_mask`."""
    bits %= 2**64
    for by, multiplier in zip((30, 27), _MULTIPLIERS):
        bits = (bits ^ (bits >> by)) * multiplier % 2**64
    return bits ^ (bits >> 31)
