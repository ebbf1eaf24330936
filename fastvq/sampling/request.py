"""What is asked of a sampler, as plain data, checked once.

`Request` says which codes to draw and how; `Conditioning` what the prior is told besides. Executors
and the loop in `loop` read both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvq.sampling.draw import Filter
from fastvq.sampling.noise import fresh_seed

METHODS = ("cached", "full")


@dataclass(frozen=True)
class Conditioning:
    """Class labels (n,) int64 and condition map (n, channels, H, W), each or None; H is 1 for
    sequences."""

    class_labels: Tensor | None
    condition: Tensor | None

    def pick(self, samples: Tensor) -> Conditioning:
        """Of these samples only, an index (m,)."""
        labels, condition = self.class_labels, self.condition
        return Conditioning(
            None if labels is None else labels[samples],
            None if condition is None else condition[samples],
        )

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same with the map in `dtype`."""
        condition = None if self.condition is None else self.condition.to(dtype)
        return Conditioning(self.class_labels, condition)


@dataclass(frozen=True)
class Request:
    """Draw `num_samples` maps of `height` × `width` codes out of `num_codes`.

    A sequence, of 1 of `dimensions`, is a map one row high.

    `samples` (n,) int64 are the samples' indices in the noise, and `level` says which prior of a
    hierarchy draws. `given` (n, H, W) holds known codes, −1 elsewhere; None: all unknown.
    `verify`: each map is proven by a float64 forward.
    """

    dimensions: int
    height: int
    width: int
    num_samples: int
    num_codes: int
    rule: Filter
    seed: int
    samples: Tensor
    level: int
    given: Tensor | None
    device: torch.device
    progress: bool
    verify: bool

    def pick(self, samples: Tensor) -> Request:
        """The same of these samples only, an index (m,); what is given is up to the caller."""
        count = len(samples)
        return replace(self, num_samples=count, samples=self.samples[samples], given=None)

    @property
    def what(self) -> str:
        """What each sample is, for a message."""
        if self.dimensions == 1:
            return f"sequences of {self.width} codes"
        return f"maps of {self.height} × {self.width} codes"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_seed(seed: int | None) -> int:
    """The seed as an int; a fresh one from torch's global generator where None."""
    if seed is None:
        return fresh_seed()
    if not _is_int(seed):
        raise TypeError(f"sample: seed must be an int or None; got {type(seed).__name__}.")
    return seed


def _check_rule(
    temperature: float, top_k: int | None, top_p: float | None, num_codes: int
) -> Filter:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"sample: temperature must be finite and at least 0 (0 is greedy); got {temperature}."
        )
    if top_k is not None and not (_is_int(top_k) and 1 <= top_k <= num_codes):
        raise ValueError(
            f"sample: top_k must be an int in 1 … num_codes={num_codes}, or None for no limit; "
            f"got {top_k!r}."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p must be in (0, 1], or None for no limit; got {top_p!r}.")
    return Filter(float(temperature), top_k, None if top_p is None else float(top_p))


def check_shape(shape: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """The shape as a tuple of so many positive ints; a sequence's may be one int."""
    sizes: tuple[int, ...] = ()
    if isinstance(shape, Sequence):
        sizes = tuple(shape)
    elif dimensions == 1:
        sizes = (shape,)
    if len(sizes) != dimensions or not all(_is_int(size) and size >= 1 for size in sizes):
        rule = "two positive ints (H, W)" if dimensions == 2 else "a positive int, T or (T,)"
        raise ValueError(f"sample: shape must be {rule}; got {shape!r}.")
    return sizes


def _check_given(given: Tensor, num_samples: int, shape: tuple[int, ...], num_codes: int) -> Tensor:
    if given.dtype != torch.int64:
        raise TypeError(f"sample: given must be int64 codes, -1 where unknown; got {given.dtype}.")
    if tuple(given.shape) not in (shape, (num_samples, *shape)):
        raise ValueError(
            f"sample: given must be {shape} or {(num_samples, *shape)}; got {tuple(given.shape)}."
        )
    if given.numel() and (given.min() < -1 or given.max() >= num_codes):
        raise ValueError(
            f"sample: given must hold codes in 0 … {num_codes - 1}, and -1 where unknown; got "
            f"values from {int(given.min())} to {int(given.max())}."
        )
    return given.expand(num_samples, *shape)


def make_request(
    shape: int | Sequence[int],
    n: int,
    *,
    dimensions: int = 2,
    num_codes: int,
    device: torch.device,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    given: Tensor | None = None,
    seed: int | None = None,
    first_sample: int = 0,
    level: int = 0,
    progress: bool = False,
    verify: bool = False,
) -> Request:
    """A checked `Request`.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names it.
    """
    sizes = check_shape(shape, dimensions)
    if not (_is_int(n) and n >= 0):
        raise ValueError(f"sample: n must be an int, at least 0; got {n!r}.")
    if not (_is_int(first_sample) and first_sample >= 0):
        raise ValueError(f"sample: first_sample must be an int, at least 0; got {first_sample!r}.")
    height, width = (1, *sizes)[-2:]
    if given is not None:
        given = _check_given(given, n, sizes, num_codes).to(device).view(n, height, width)
    return Request(
        dimensions=dimensions,
        height=height,
        width=width,
        num_samples=n,
        num_codes=num_codes,
        rule=_check_rule(temperature, top_k, top_p, num_codes),
        seed=check_seed(seed),
        samples=torch.arange(first_sample, first_sample + n, device=device),
        level=level,
        given=given,
        device=device,
        progress=progress,
        verify=verify,
    )


def check_method(method: str) -> None:
    """Refuse a method other than those in `METHODS`."""
    if method not in METHODS:
        raise ValueError(f"sample: method must be one of {METHODS}; got {method!r}.")
