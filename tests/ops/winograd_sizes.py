"""What bounds the rounding errors of a convolution by Winograd's minimal filtering.

Two outputs of r taps are y_j = Σ_i A_ji (Σ_l G_il g_l) (Σ_k B_ik d_k). Each of the three sums, the
products and their sum over channels (or, for the weight's gradient, over tiles) are rounded, so
that with n roundings one after the other, to first order,

    |error of y_j| ≤ n·u·Σ_{l,k} T_jlk |g_l| |d_k|,    T_jlk = Σ_i |A_ji| |G_il| |B_ik|.

Without the absolute values T would be 1 where k = j + l and 0 elsewhere: the plain convolution.
Scaling a row of B and undoing it in G leaves T as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_POINTS = {2: [0, 1], 3: [0, 1, -1], 4: [0, 1, -0.5, -2], 5: [0, 0.75, -0.75, 1.5, -1.5]}


@functools.cache
def _form(taps: int) -> Tensor:
    """T, (outputs, taps, inputs), float64."""
    if taps == 1:
        return torch.ones(1, 1, 1, dtype=torch.float64)
    points = torch.tensor(_POINTS[taps], dtype=torch.float64)
    powers = points[:, None] ** torch.arange(taps + 1)
    infinity = torch.zeros(1, taps + 1, dtype=torch.float64)
    infinity[0, -1] = 1.0
    data = torch.cat([powers, infinity]).inverse().T  # B
    weight = torch.cat([powers[:, :-1], infinity[:, 1:]])  # G
    result = torch.stack([1.0 - infinity[0], torch.cat([points, points.new_ones(1)])])  # A
    return torch.einsum("ji,il,ik->jlk", result.abs(), weight.abs(), data.abs())


# Roundings of one axis: a multiplication and an addition for each of at most 6 terms, in the
# transform of the data (or the gradient) and in that of the result; its factors are exact.
_OF_AXIS = 24


def roundings(summed: int) -> int:
    """n for a sum over `summed` channels or tiles: 1 for the weight, 1 for a bias, 1 to store."""
    return summed + 1 + 2 * _OF_AXIS + 3


def _sizes(x: Tensor, weight: Tensor, first: tuple[int, int]) -> Tensor:
    """Σ T|g||d| of every output; tap (u, v) reads the pixel (i, j) + first + (u, v)."""
    forms = [_form(taps) for taps in weight.shape[2:]]
    counts = [-(-size // len(form)) for size, form in zip(x.shape[2:], forms)]
    pads: list[int] = []
    for size, form, count, start in zip(x.shape[2:], forms, counts, first):
        seen = len(form) * count + form.shape[1] - 1
        pads = [-start, seen - size + start, *pads]
    windows = F.pad(x, pads)
    for axis, form in zip((2, 3), forms):
        windows = windows.unfold(axis, form.shape[2], len(form))
    # Tiles s and t of outputs j and J.
    half = torch.einsum("bcstkK,jlk,JLK->bcstjJlL", windows, *forms)
    sizes = torch.einsum("bcstjJlL,oclL->bosjtJ", half, weight)
    whole = sizes.flatten(2, 3).flatten(3, 4)
    return whole[:, :, : x.shape[2], : x.shape[3]]


class _Sizes(torch.autograd.Function):
    """The gradient to x is the size of a filtering of its own, with the taps mirrored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, first: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.first = first
        return _sizes(x, weight, first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        mirrored = weight.transpose(0, 1).flip(2, 3)
        last = [-(at + taps - 1) for at, taps in zip(ctx.first, weight.shape[2:])]
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            (of_weight,) = torch.autograd.grad(_sizes(x, leaf, ctx.first), leaf, grad)
        return _sizes(grad, mirrored, (last[0], last[1])), of_weight, None


def winograd_sizes(x: Tensor, weight: Tensor, first: tuple[int, int]) -> Tensor:
    """(B, O, H, W) of non-negative x (B, C, H, W) and weight (O, C, R, K), float64; its gradients
    are the sizes of the gradients' filterings."""
    return _Sizes.apply(x, weight, first)
