"""Exact incremental sampling on CPUs: a whole row of codes in one call of the C++ core.

The vertical stack of a row is a few large products and stays in PyTorch (`vertical`). The columns
of the row, draws included, are `kernels/cpu/sample_row`: it stops where a draw is in doubt, and
goes on once the caller has settled it. Samples are split over threads; a sample's codes depend on
neither the split nor the batch.

Buffers, for n samples, C channels, H × W maps: as in `cached`, keys as (n, heads, C / heads, H·W).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.nn.causal_attention import coordinates
from fastvq.ops.backends import CPU_EXTENSION
from fastvq.sampling.plan import AttentionPlan, CausalLayerPlan, PriorPlan
from fastvq.sampling.request import Conditioning, Request
from fastvq.sampling.vertical import VerticalStack

_PANEL = 16  # kPanel in kernels/cpu/sample_row.h, whose structs the two formats here mirror
_LAYER = struct.Struct("13q")
_PROBLEM = struct.Struct("10q8qq" + "dqdQq")


class Doubt(NamedTuple):
    """Samples whose draw at one column of the current row must be settled."""

    column: int
    doubtful: Tensor  # (n,) bool
    logits: Tensor  # (n, K), valid where doubtful


def can_run(plan: PriorPlan) -> bool:
    """Whether the C++ core draws from this plan: float32 on a CPU, gated layers and attention."""
    weight = plan.embedding
    return (
        CPU_EXTENSION is not None and weight.device.type == "cpu" and weight.dtype == torch.float32
    )


def _packed(weight: Tensor) -> Tensor:
    """(in, out) → (⌈out / 16⌉, in, 16), zero beyond `out`."""
    padded = F.pad(weight, (0, -weight.shape[1] % _PANEL))
    return padded.unflatten(1, (-1, _PANEL)).transpose(0, 1).contiguous()


class CpuRowExecutor:
    """Draws rows in raster order.

    Args:
        plan: the prior's weights; `can_run(plan)`.
        conditioning: class labels and map of every sample; the map in float32.
        request: what to draw; its noise and rule are used here too.
    """

    def __init__(self, plan: PriorPlan, conditioning: Conditioning, request: Request) -> None:
        n, height, width = request.num_samples, request.height, request.width
        self._request = request
        self._vertical = VerticalStack(plan, conditioning, n, width)
        self._kept: list[Tensor] = []  # what the addresses point to
        self._embedding = plan.embedding
        self._inputs: list[Tensor] = []  # of each gated layer, (n, reach + W, C)
        terms = iter(self._vertical.row_terms)
        layers = [
            self._gated(layer, next(terms))
            if isinstance(layer, CausalLayerPlan)
            else self._attention(layer)
            for layer in plan.layers
        ]
        self._layers = self._bytes(b"".join(layers))
        head, new = plan.head, plan.embedding.new_empty
        hidden, num_codes = head.logit_weight.shape
        self._logits = new(n, num_codes)
        self._doubtful = new(n, dtype=torch.bool)
        first = request.first_sample
        samples = torch.arange(first, first + n)
        self._weights = [
            self._address(tensor)
            for tensor in (
                plan.embedding,
                _packed(head.hidden_weight),
                head.hidden_bias,
                _packed(head.logit_weight),
                head.logit_bias,
            )
        ]
        self._outputs = [self._address(self._logits), self._address(self._doubtful)]
        self._sizes = [n, plan.embedding.shape[1], hidden, num_codes, height, width]
        self._samples = self._address(samples)
        self._num_layers = len(layers)
        # A range of samples for each thread, as sample_row.cpp divides them; its next column.
        blocks = max(1, min(torch.get_num_threads(), n))
        self._columns = torch.zeros(blocks, dtype=torch.int64)
        ends = n * torch.arange(1, blocks + 1) // blocks
        self._range_of = torch.searchsorted(ends, torch.arange(n), right=True)

    def carry(self, last: Tensor) -> None:
        """Go on to the next stretch of a sequence, as wide as this one, which is complete.

        Args:
            last: (n,) int64, the codes of its last column.
        """
        width = self._request.width
        self._inputs[0][:, -1] = self._embedding[last]
        for inputs in self._inputs:
            reach = inputs.shape[1] - width
            inputs[:, :reach] = inputs[:, width:].clone()

    def draw_row(self, codes: Tensor, row: int, position: int | None = None) -> Iterator[Doubt]:
        """Draw the unknown codes (−1) of a row in place, stopping at each doubt.

        Args:
            codes: (n, H, W) int64, contiguous, complete above the row. Whoever iterates writes the
                settled codes before asking for the next doubt.
            position: of the row's first code in the noise; None: in raster order.
        """
        assert CPU_EXTENSION is not None
        self._vertical.start_row(codes, row)
        width = self._request.width
        problem = self._problem(codes, row, row * width if position is None else position)
        self._columns.zero_()
        blocks = len(self._columns)
        while True:
            self._doubtful.zero_()
            CPU_EXTENSION.sample_row(problem.data_ptr(), self._columns.data_ptr(), blocks)
            stopped = sorted({int(column) for column in self._columns if column < width})
            if not stopped:
                return
            own_column = self._columns[self._range_of]
            for column in stopped:
                yield Doubt(column, self._doubtful & (own_column == column), self._logits)
            self._columns.add_(self._columns < width)

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    @staticmethod
    def _bytes(content: bytes) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.int64)

    def _gated(self, plan: CausalLayerPlan, terms: Tensor) -> bytes:
        """The fields of `SampleRowLayer`."""
        n, channels = self._request.num_samples, plan.out_weight.shape[0]
        self._inputs.append(terms.new_zeros(n, plan.reach + self._request.width, channels))
        return _LAYER.pack(
            0,
            self._address(_packed(plan.horizontal_weight)),
            self._address(_packed(plan.out_weight)),
            self._address(plan.out_bias),
            self._address(terms),
            self._address(self._inputs[-1]),
            *(0, 0),
            *(plan.taps, plan.dilation, plan.reach, plan.residual),
            0,
        )

    def _attention(self, plan: AttentionPlan) -> bytes:
        """The fields of `SampleRowLayer`."""
        request, channels = self._request, plan.out_weight.shape[0]
        positions = request.height * request.width
        shape = (request.num_samples, plan.heads, channels // plan.heads, positions)
        position = coordinates(request.height, request.width, like=plan.out_weight).flatten(1).T
        return _LAYER.pack(
            1,
            self._address(_packed(plan.weight)),
            self._address(_packed(plan.out_weight)),
            self._address(plan.out_bias),
            self._address(position @ plan.position_weight + plan.bias),
            0,
            self._address(plan.out_weight.new_empty(shape)),
            self._address(plan.out_weight.new_empty(shape)),
            *(0, 0, 0, 0),
            plan.heads,
        )

    def _problem(self, codes: Tensor, row: int, position: int) -> Tensor:
        """The fields of `SampleRowProblem`."""
        assert codes.is_contiguous()
        rule = self._request.rule
        return self._bytes(
            _PROBLEM.pack(
                self._layers.data_ptr(),
                self._num_layers,
                *self._weights,
                codes.data_ptr(),
                *self._outputs,
                *self._sizes,
                *(row, position),
                self._samples,
                rule.temperature,
                rule.top_k or 0,
                1.0 if rule.top_p is None else rule.top_p,
                self._request.seed % 2**64,
                self._request.level,
            )
        )
