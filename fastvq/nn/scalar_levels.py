"""Rounding channels to levels, exactly: the arithmetic of `fsq.py`.

Lives here: the level of every number, its code, and the straight-through gradient. Indices,
projections and layouts are `fsq.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# With so many levels float32 still tells a level within a quarter: its tanh errs by at most 4 ulp,
# its argument and the two operations after it by one each, together by 8·2⁻²⁴·L < ¼.
_FLOAT32_LEVELS = 2**16
# Up to so many levels, bounds that are wider than the levels by ε = 1e-3 stay below another one.
_BOUNDED_LEVELS = 256


class _Constants(NamedTuple):
    """Per channel, (d, 1) but for the steps, in one dtype."""

    shift: Tensor  # s
    height: Tensor  # levels per unit of the bounded number
    base: Tensor  # the level of zero, and ½ + ¼
    slope: Tensor  # codes per unit of the bounded number
    center: Tensor  # the level of code 0, or 2/(L−1)
    last: Tensor  # L − 1
    steps: Tensor  # (d, max L): the least number of each level; −∞ for the first, ∞ past the last


class ScalarLevels:
    """Levels of channels, long rows (d, N), by either expression of `FSQ`.

    The rounded expression in floating point tells the level but for its last bit: with ¼ added
    before rounding down, it is the true level or the next. Which one, a comparison with the place
    where the next begins decides, computed in float64: for a float32 number the least float32 that
    is no smaller, so that comparing in float32 is exact.

    Args:
        levels: L of each channel.
        symmetric: the expression of `preserve_symmetry`.
        hard: clamp instead of tanh.
        eps: ε of the other expression.
    """

    def __init__(
        self, levels: Sequence[int], symmetric: bool, hard: bool, eps: float = 1e-3
    ) -> None:
        self.symmetric, self.hard = symmetric, hard
        most = max(levels)
        self._least_dtype = torch.float32 if most <= _FLOAT32_LEVELS else torch.float64
        self._last_level = most - 1
        self._overshoots = most > _BOUNDED_LEVELS or eps > 1e-3
        self._shifts = not symmetric and any(count % 2 == 0 for count in levels)
        exact = _constants(levels, symmetric, hard, eps)
        rounded = _Constants(*(constant.float() for constant in exact))
        rounded = rounded._replace(steps=_rounded_up(exact.steps))
        self._constants = {torch.float64: exact, torch.float32: rounded}

    def to(self, device: torch.device) -> None:
        """Move the constants; they have no other dtype to go to."""
        for dtype, constants in self._constants.items():
            self._constants[dtype] = _Constants(*(constant.to(device) for constant in constants))

    @property
    def steps(self) -> Tensor:
        """(d, max L − 1) float64: the least number of levels 1 … L−1, then ∞."""
        return self._constants[torch.float64].steps[:, 1:]

    def __call__(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (d, N) in the dtype of channels, and their levels, floating point; NaN for NaN."""
        dtype = channels.dtype
        if dtype != torch.float64:
            channels = channels.float()
        constants = self._constants[channels.dtype]
        bounded = self._bounded(channels, constants)
        with torch.no_grad():
            level = self._level(channels.detach(), bounded.detach())
        codes = _Rounded.apply(bounded, level, constants.center, constants.slope, self.symmetric)
        return codes.to(dtype), level

    def _bounded(self, channels: Tensor, constants: _Constants) -> Tensor:
        if self._shifts:
            channels = channels + constants.shift
        return channels.clamp(-1.0, 1.0) if self.hard else channels.tanh()

    def _level(self, channels: Tensor, bounded: Tensor) -> Tensor:
        dtype = torch.promote_types(channels.dtype, self._least_dtype)
        constants = self._constants[dtype]
        if dtype != channels.dtype:
            channels = channels.to(dtype)
            bounded = self._bounded(channels, constants)
        level = (bounded * constants.height).add_(constants.base).floor_()
        if self._overshoots:
            level = torch.minimum(level.clamp_(min=0.0), constants.last)
        # The clamp is for NaN, which may be any integer.
        place = level.long().clamp_(0, self._last_level)
        return level.sub_(constants.steps.gather(1, place).gt_(channels))


class _Rounded(torch.autograd.Function):
    """The codes of levels (d, N), with the gradient of the bounded numbers that were rounded."""

    @staticmethod
    def forward(
        ctx: Any, bounded: Tensor, level: Tensor, center: Tensor, slope: Tensor, symmetric: bool
    ) -> Tensor:
        ctx.symmetric = symmetric
        ctx.save_for_backward(slope)
        level = level.float()
        if symmetric:
            codes = (level * center.float()).sub_(1.0)
        else:
            codes = (level - center.float()).div_(center.float())
        return codes.to(bounded.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad if ctx.symmetric else grad * slope, None, None, None, None


def _constants(levels: Sequence[int], symmetric: bool, hard: bool, eps: float) -> _Constants:
    """In float64."""
    columns = []
    steps = torch.full((len(levels), max(levels)), torch.inf, dtype=torch.float64)
    steps[:, 0] = -torch.inf
    for channel, count in enumerate(levels):
        if symmetric:
            height, offset, shift = (count - 1) / 2.0, 0.0, 0.0
            middle, center, slope = height, 2.0 / (count - 1), 1.0
        else:
            height = (count - 1) * (1.0 + eps) / 2.0
            offset = 0.5 if count % 2 == 0 else 0.0
            shift = offset / height
            shift = shift if hard else math.atanh(shift)
            middle = center = float(count // 2)
            slope = height / center
        for level in range(1, count):
            bounded = (level - middle - 0.5 + offset) / height
            steps[channel, level] = (bounded if hard else math.atanh(bounded)) - shift
        columns.append([shift, height, middle - offset + 0.75, slope, center, count - 1.0])
    table = torch.tensor(columns, dtype=torch.float64).t()[..., None].contiguous()
    shifts, heights, bases, slopes, centers, lasts = table.unbind()
    return _Constants(shifts, heights, bases, slopes, centers, lasts, steps)


def _rounded_up(steps: Tensor) -> Tensor:
    """The least float32 that is at least each step: a float32 reaches the one if the other."""
    nearest = steps.float()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.double() < steps, above, nearest)
