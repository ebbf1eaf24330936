"""The loop over positions: noise, an executor's logits, the draw, and the settling of doubt.

What is drawn and why it does not depend on the method is explained in `draw`.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvq.sampling import cpu_rows
from fastvq.sampling.cached import CachedExecutor
from fastvq.sampling.cpu_rows import CpuRowExecutor
from fastvq.sampling.draw import draw, exact_draw, logit_tolerance
from fastvq.sampling.full import FullExecutor
from fastvq.sampling.memory import check_memory
from fastvq.sampling.noise import gumbel_noise
from fastvq.sampling.plan import PriorPlan
from fastvq.sampling.precision import full_float32
from fastvq.sampling.request import Conditioning, Request

# Noise is made for a stretch of a row at a time: at most this many numbers (32 MiB).
_NOISE_BLOCK = 2**22


class Executor(Protocol):
    """Gives the logits of one position after another; see `CachedExecutor.step`."""

    def step(self, codes: Tensor, row: int, column: int, want_logits: bool) -> Tensor | None: ...


def eval_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in eval mode with its floating-point parameters in `dtype`."""
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


def working_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for a float64 model, float32 for all others (16-bit weights convert exactly)."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


class Settler:
    """Takes the canonical draw where a draw is in doubt: plain float64 forward, that sample alone.

    The float64 copy of the model is made at the first doubt; most short runs never need it.

    Args:
        model: called as `model(codes, class_labels, condition)`.
        conditioning: class labels and map of every sample.
        request: what is being drawn.
    """

    def __init__(self, model: nn.Module, conditioning: Conditioning, request: Request) -> None:
        self._model = model
        self._conditioning = conditioning
        self._request = request
        self._double: nn.Module | None = None
        self.count = 0

    def settle(
        self,
        codes: Tensor,
        doubtful: Tensor,
        row: int,
        column: int,
        logits: Tensor,
        noise: Tensor | None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """The canonical codes (m,) at (row, column) of the m doubtful samples.

        Args:
            codes: (n, H, W), complete before the position.
            doubtful: (n,) bool.
            logits, noise: (n, K), as `draw` saw them.
            conditioning: of these codes, where they are a part of what is drawn.
        Raises:
            RuntimeError: the model's logits are not finite.
        """
        settled = []
        for sample in doubtful.nonzero()[:, 0].split(1):
            told = (conditioning or self._conditioning).pick(sample, torch.float64)
            canonical = self._logits(codes[sample], told)[:, :, row, column]
            if not canonical.isfinite().all():
                raise RuntimeError(
                    f"sample: the model's logits at row {row}, column {column} must be finite; "
                    "got NaN or Inf. Look for NaN in its weights or condition."
                )
            error = (logits[sample] - canonical).abs().amax(dim=1, keepdim=True)
            if not (error <= logit_tolerance(canonical)).all():
                warnings.warn(
                    f"sample: float32 logits differ from float64 by {float(error):.2g}, more than "
                    f"the tolerance {float(logit_tolerance(canonical)):.2g}; codes may depend on "
                    "the method. model.double() samples in float64.",
                    stacklevel=2,
                )
            sample_noise = None if noise is None else noise[sample]
            settled.append(exact_draw(canonical, sample_noise, self._request.rule))
        self.count += len(settled)
        return torch.cat(settled)

    def _logits(self, codes: Tensor, told: Conditioning) -> Tensor:
        """Canonical logits (1, K, H, W) of one sample."""
        if self._double is None:
            self._double = eval_copy(self._model, torch.float64)
        logits: Tensor = self._double(codes.clamp(min=0), told.class_labels, told.condition)
        return logits


def _noise(request: Request, start: int, count: int) -> Tensor | None:
    """(count, n, K) float64 Gumbel noise of some positions, or None where the temperature is 0."""
    if request.rule.temperature == 0:
        return None
    first = request.first_sample
    samples = torch.arange(first, first + request.num_samples, device=request.device)
    positions = torch.arange(start, start + count, device=request.device)
    return gumbel_noise(request.seed, samples, request.level, positions, request.num_codes)


def position_noise(request: Request, position: int) -> Tensor | None:
    """(n, K) float64 Gumbel noise of one position, or None where the temperature is 0."""
    noise = _noise(request, position, 1)
    return None if noise is None else noise[0]


class _Noise:
    """Gumbel noise of one position after another, made a stretch of a row at a time."""

    def __init__(self, request: Request) -> None:
        self._request = request
        per_position = max(1, request.num_samples * request.num_codes)
        self._stretch = max(1, min(request.width, _NOISE_BLOCK // per_position))
        self._start = -1
        self._block: Tensor | None = None

    def at(self, position: int) -> Tensor | None:
        """(n, K) float64, or None where the temperature is 0."""
        start = position - position % self._stretch
        if start != self._start:
            self._start = start
            self._block = _noise(self._request, start, self._stretch)
        return None if self._block is None else self._block[position - start]


def _progress_bar(request: Request) -> Any:
    """A tqdm bar that counts codes, or None where no progress is asked for."""
    if not request.progress:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise RuntimeError(
            "sample: progress=True needs tqdm, which is not installed: pip install tqdm."
        ) from error
    total = request.num_samples * request.height * request.width
    return tqdm(total=total, unit="code", unit_scale=True, desc=f"level {request.level}")


def _blank(request: Request) -> Tensor:
    """(n, H, W) int64: the given codes, −1 elsewhere."""
    shape = (request.num_samples, request.height, request.width)
    codes = torch.full(shape, -1, dtype=torch.int64, device=request.device)
    if request.given is not None:
        codes.copy_(request.given)
    return codes


def _run_rows(executor: CpuRowExecutor, settler: Settler, request: Request, bar: Any) -> Tensor:
    """Draw every code in raster order, a row at a time; (n, H, W) int64."""
    codes = _blank(request)
    for row in range(request.height):
        for column, doubtful, logits in executor.draw_row(codes, row):
            noise = position_noise(request, row * request.width + column)
            settled = settler.settle(codes, doubtful, row, column, logits, noise)
            codes[doubtful, row, column] = settled
        if bar is not None:
            bar.update(request.num_samples * request.width)
    return codes


def _run(executor: Executor, settler: Settler, request: Request, bar: Any) -> Tensor:
    """Draw every code in raster order; (n, H, W) int64."""
    codes = _blank(request)
    known = (codes >= 0).all(dim=0).tolist()
    noise_source = _Noise(request)
    for row in range(request.height):
        for column in range(request.width):
            wanted = not known[row][column]
            logits = executor.step(codes, row, column, wanted)
            if wanted:
                assert logits is not None
                noise = noise_source.at(row * request.width + column)
                chosen, doubtful = draw(logits, noise, request.rule)
                here = codes[:, row, column]
                unknown = here < 0
                doubtful &= unknown
                if doubtful.any():
                    chosen[doubtful] = settler.settle(codes, doubtful, row, column, logits, noise)
                here.copy_(torch.where(unknown, chosen, here))
            if bar is not None:
                bar.update(request.num_samples)
    return codes


def generate(
    model: nn.Module,
    plan: PriorPlan | None,
    conditioning: Conditioning,
    request: Request,
) -> Tensor:
    """Draw the maps a request asks for.

    Args:
        model: a prior, called as `model(codes, class_labels, condition)`; left as it is.
        plan: its weights in `working_dtype`, for the cached method; None: one whole forward per
            code.
        conditioning: class labels and map; a float64 map is rounded for the executor and used
            whole by the canonical draw.
        request: what to draw and how.
    Returns:
        (n, H, W) int64.
    Raises:
        RuntimeError: the model's logits are not finite; `progress` without tqdm; too little memory.
    """
    if request.num_samples == 0:
        shape = (0, request.height, request.width)
        return torch.zeros(shape, dtype=torch.int64, device=request.device)
    if plan is not None:
        check_memory(plan, request)
    bar = _progress_bar(request)
    try:
        with torch.inference_mode(), full_float32(request.device):
            settler = Settler(model, conditioning, request)
            dtype = working_dtype(next(model.parameters()))
            told = conditioning.to(dtype)
            if plan is None:
                executor = FullExecutor(eval_copy(model, dtype), told)
                codes = _run(executor, settler, request, bar)
            elif cpu_rows.can_run(plan):
                codes = _run_rows(CpuRowExecutor(plan, told, request), settler, request, bar)
            else:
                size = (request.num_samples, request.height, request.width)
                codes = _run(CachedExecutor(plan, told, *size), settler, request, bar)
    finally:
        if bar is not None:
            bar.close()
    return codes.clone()  # outside inference mode: a tensor autograd may keep
