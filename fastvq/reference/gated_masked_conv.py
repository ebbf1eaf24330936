"""Definition of one gated PixelCNN layer: both stacks, their link, their gates, dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .masked_conv2d import masked_conv2d

# SplitMix64 (Steele, Lea and Flood 2014): its increment and its two multipliers, as int64.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def gated_masked_conv(
    vertical: Tensor,
    horizontal: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    class_bias: Tensor | None = None,
    condition: Tensor | None = None,
    condition_weight: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    mask_type: str,
    dilation: int = 1,
    dropout: float = 0.0,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Vertical and horizontal features of the next layer.

        v' = W_v * vertical + b_v                    rows i − r·d … i − d, with "B" also row i
        h' = W_h * horizontal + b_h + W_vh v' + b_vh     masked: see `masked_conv2d`
        y  = class_bias + condition_weight · condition      4C channels, v's 2C first
        vertical out   = dropout(gate(v' + y_v))
        horizontal out = W_o dropout(gate(h' + y_h)) + b_o (+ horizontal)

    with gate(a, b) = tanh(a) ⊙ σ(b) over the two halves of the channels.

    Args:
        vertical, horizontal: (B, C, H, W).
        weights: W_v (2C, C, rows, k), b_v, W_h (2C, C, 1, k), b_h, W_vh (2C, 2C, 1, 1), b_vh,
            W_o (C, C, 1, 1), b_o; rows = k // 2, with mask type "B" one more.
        class_bias: (B, 4C) or None.
        condition: (B, E, H, W), with condition_weight (4C, E, 1, 1); or None.
        seed: int64 (), of the dropout's masks; None drops nothing.
    Returns:
        (vertical, horizontal), each (B, C, H, W).
    van den Oord et al. 2016, arXiv:1606.05328, eq. 2-4 and figure 2.
    """
    w_v, b_v, w_h, b_h, w_vh, b_vh, w_o, b_o = weights
    height, side = vertical.shape[2], dilation * (w_v.shape[3] // 2)
    # The window of a row ends at that row ("B") or d rows above it ("A").
    below = 0 if mask_type == "B" else dilation
    padded = F.pad(vertical, (side, side, side, dilation))
    seen = padded[:, :, : height + side - below]
    features_v = F.conv2d(seen, w_v, b_v, dilation=dilation)
    features_h = masked_conv2d(horizontal, w_h, b_h, mask_type=mask_type, dilation=dilation)
    features_h = features_h + F.conv2d(features_v, w_vh, b_vh)
    if class_bias is not None:
        for_v, for_h = class_bias[:, :, None, None].chunk(2, dim=1)
        features_v, features_h = features_v + for_v, features_h + for_h
    if condition is not None and condition_weight is not None:
        for_v, for_h = F.conv2d(condition, condition_weight).chunk(2, dim=1)
        features_v, features_h = features_v + for_v, features_h + for_h
    gated = []
    for stack, features in enumerate((features_v, features_h)):
        values, gates = features.chunk(2, dim=1)
        kept = torch.tanh(values) * torch.sigmoid(gates)
        if seed is not None:
            keep = keep_mask(seed, stack, kept.shape, dropout)
            kept = torch.where(keep, kept / max(1.0 - dropout, 2.0**-32), 0.0)
        gated.append(kept)
    out_h = F.conv2d(gated[1], w_o, b_o)
    return gated[0], out_h + horizontal if residual else out_h


def keep_mask(seed: Tensor, stack: int, shape: torch.Size, dropout: float) -> Tensor:
    """Which elements dropout keeps: a function of the seed and of where an element is.

        bits(p, c) = 32-bit half c mod 2, low half first, of mix(s + γ·(p·⌈C/2⌉ + c//2 + 1))
        s = mix(seed + γ·(stack + 1)),   kept where bits ≥ ⌊dropout · 2³² + ½⌋

    p counts pixels (b, i, j) in that order; mix and γ are SplitMix64's.

    Args:
        seed: int64 ().
        stack: 0 for the vertical one, 1 for the horizontal one.
        shape: (B, C, H, W).
    Returns:
        (B, C, H, W) bool.
    """
    batch, channels, height, width = shape
    pairs = (channels + 1) // 2
    count = torch.arange(1, batch * height * width * pairs + 1, device=seed.device)
    stream = _mix(seed + torch.full_like(seed, stack + 1) * _INCREMENT)
    bits = _mix(stream + count * _INCREMENT)
    halves = torch.stack([bits & 0xFFFFFFFF, _shift_right(bits, 32)], dim=-1)
    keep = halves >= int(dropout * 2**32 + 0.5)
    by_pixel = keep.view(batch, height, width, 2 * pairs)[..., :channels]
    return by_pixel.permute(0, 3, 1, 2)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """int64's own >> would copy the sign in."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _mix(bits: Tensor) -> Tensor:
    for by, multiplier in zip((30, 27), _MULTIPLIERS):
        bits = (bits ^ _shift_right(bits, by)) * multiplier
    return bits ^ _shift_right(bits, 31)
