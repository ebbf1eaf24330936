"""Sequences: a prior over them seen as one over maps one row high, and endless sampling.

`stream` draws a sequence stretch after stretch. Each is a row of the executors in `cached` and
`cpu_rows`; between two of them every layer keeps its last inputs, as many as it can see, and the
codes are kept as far as the whole prior can see. Memory is therefore constant. Attention sees
everything, so a prior with attention cannot be streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastvq.sampling import cpu_rows
from fastvq.sampling.cached import CachedExecutor
from fastvq.sampling.cpu_rows import CpuRowExecutor
from fastvq.sampling.draw import draw
from fastvq.sampling.loop import Settler, position_noise
from fastvq.sampling.memory import check_memory
from fastvq.sampling.plan import AttentionPlan, CausalLayerPlan, PriorPlan
from fastvq.sampling.precision import full_float32
from fastvq.sampling.request import Conditioning, Request

ConditionOf = Callable[[int, int], Tensor]


class OneRow(nn.Module):
    """A prior over sequences, called on maps one row high."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    @property
    def receptive_field(self) -> tuple[int | None, int | None]:
        """How far back a prediction sees: no rows, and the prior's steps."""
        field: tuple[int | None, int | None] = self.prior.receptive_field  # type: ignore[assignment]
        return field

    def forward(
        self, codes: Tensor, class_labels: Tensor | None, condition: Tensor | None
    ) -> Tensor:
        """(n, 1, T) int64, (n,) int64, (n, channels, 1, T) → (n, K, 1, T)."""
        seen = None if condition is None else condition[:, :, 0]
        logits: Tensor = self.prior(codes[:, 0], class_labels, seen)
        return logits[:, :, None]


class _Stream:
    """The stretches of n sequences, one after the other.

    Buffers, for n samples, C channels, W columns and a prior that sees R steps back: as in the
    executors for one row, and (n, R + W) codes.

    Args:
        model: a prior in the form of `OneRow`.
        plan: its weights.
        class_labels: (n,) int64, or None.
        condition_of: (start, stop) → the condition (n, channels, stop − start) of these steps.
        prefix: (n, P) int64 codes, −1 where to be drawn.
        request: of one stretch.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PriorPlan,
        class_labels: Tensor | None,
        condition_of: ConditionOf | None,
        prefix: Tensor,
        request: Request,
    ) -> None:
        n, width = request.num_samples, request.width
        self._request, self._prefix, self._labels = request, prefix, class_labels
        self._condition_of = condition_of
        self._reach = sum(
            layer.reach for layer in plan.layers if isinstance(layer, CausalLayerPlan)
        )
        self._seen = torch.full((n, self._reach), -1, dtype=torch.int64, device=request.device)
        self._start = 0
        self._condition: Tensor | None = None
        if condition_of is not None:
            first = condition_of(0, width)
            self._condition = plan.embedding.new_zeros(n, first.shape[1], 1, width)
        told = Conditioning(class_labels, self._condition)
        self._settler = Settler(model, told, request)
        self._rows: CpuRowExecutor | None = None
        self._columns: CachedExecutor | None = None
        if cpu_rows.can_run(plan):
            self._rows = CpuRowExecutor(plan, told, request)
        else:
            self._columns = CachedExecutor(plan, told, n, 1, width)

    def draw_stretch(self) -> Tensor:
        """The next (n, W) codes."""
        executor = self._rows or self._columns
        assert executor is not None
        width, start = self._request.width, self._start
        if start > 0:
            executor.carry(self._seen[:, -1])
        if self._condition is not None:
            assert self._condition_of is not None
            self._condition[:, :, 0] = self._condition_of(start, start + width)
        codes = torch.full_like(self._seen[:, :1], -1).repeat(1, width)[:, None]
        known = self._prefix[:, start : start + width]
        codes[:, 0, : known.shape[1]] = known
        if self._rows is not None:
            self._draw_row(self._rows, codes)
        else:
            assert self._columns is not None
            self._draw_columns(self._columns, codes)
        self._start += width
        self._seen = torch.cat([self._seen, codes[:, 0]], dim=1)[:, -self._reach :]
        return codes[:, 0]

    def _draw_row(self, executor: CpuRowExecutor, codes: Tensor) -> None:
        for column, doubtful, logits in executor.draw_row(codes, 0, self._start):
            noise = position_noise(self._request, self._start + column)
            codes[doubtful, 0, column] = self._settled(codes, doubtful, column, logits, noise)

    def _draw_columns(self, executor: CachedExecutor, codes: Tensor) -> None:
        for column in range(self._request.width):
            unknown = codes[:, 0, column] < 0
            logits = executor.step(codes, 0, column, bool(unknown.any()))
            if logits is None:
                continue
            noise = position_noise(self._request, self._start + column)
            chosen, doubtful = draw(logits, noise, self._request.rule)
            doubtful &= unknown
            if doubtful.any():
                settled = self._settled(codes, doubtful, column, logits, noise)
                chosen[doubtful] = settled
            codes[:, 0, column] = torch.where(unknown, chosen, codes[:, 0, column])

    def _settled(
        self, codes: Tensor, doubtful: Tensor, column: int, logits: Tensor, noise: Tensor | None
    ) -> Tensor:
        """The canonical codes, from the steps that the prior can see and no others."""
        position = self._start + column
        back = min(self._reach, position)
        window = torch.cat([self._seen, codes[:, 0, : column + 1]], dim=1)[:, -1 - back :]
        condition = None
        if self._condition_of is not None:
            condition = self._condition_of(position - back, position + 1)[:, :, None]
        told = Conditioning(self._labels, condition)
        return self._settler.settle(window[:, None], doubtful, 0, back, logits, noise, told)


def stream(
    model: nn.Module,
    plan: PriorPlan,
    class_labels: Tensor | None,
    condition_of: ConditionOf | None,
    prefix: Tensor,
    request: Request,
) -> Iterator[Tensor]:
    """Endless sequences, (n, request.width) codes at a time, the prefix first.

    The codes are those of `generate` for as many codes.

    Args:
        model, plan, class_labels, condition_of, prefix, request: see `_Stream`.
    Raises:
        ValueError: the prior has attention.
        RuntimeError: the model's logits are not finite, or too little memory.
    """
    if any(isinstance(layer, AttentionPlan) for layer in plan.layers):
        raise ValueError(
            "stream: the prior must be without attention (attention_every=0), which sees every "
            "earlier code and the length of the whole; got one with it. Use sample."
        )
    check_memory(plan, request)
    with torch.inference_mode(), full_float32(request.device):
        running = _Stream(model, plan, class_labels, condition_of, prefix, request)

    def stretches() -> Iterator[Tensor]:
        while True:
            with torch.inference_mode(), full_float32(request.device):
                codes = running.draw_stretch()
            yield codes.clone()  # outside inference mode: a tensor autograd may keep

    return stretches()
