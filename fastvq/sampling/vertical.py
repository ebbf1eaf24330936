"""The vertical stack of cached sampling: once per row, what the rows above say about it.

When all rows above are known, the vertical stack of a row is computed whole (each layer keeps its
last input rows in a ring), and from it everything that reaches the horizontal stack without the
row's own codes: the link, the class bias, the condition map, the biases.

Buffers, for n samples, C channels, W columns (depth = (kernel_size // 2)·dilation + 1 rows):

* ring, per gated layer: (depth, W + 2·pad, n, C), zero-padded columns;
* row terms, per gated layer: (W, n, 2C), what the row adds to each column's gate.

How the horizontal stack goes on from there is the executor's business (`cached`, `cpu_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.sampling.plan import CausalLayerPlan, GatedLayerPlan, PriorPlan
from fastvq.sampling.request import Conditioning


def gate(features: Tensor) -> Tensor:
    """tanh of the first half of the last dimension times sigmoid of the second."""
    values, gates = features.chunk(2, dim=-1)
    return values.tanh() * gates.sigmoid()


class _RowTerms:
    """What a row adds to each column's gate in one layer, from class and map."""

    def __init__(self, plan: CausalLayerPlan, conditioning: Conditioning, n: int, width: int):
        self._plan = plan
        self._width = width
        self.row_term = plan.out_weight.new_zeros(width, n, 2 * plan.out_weight.shape[0])
        self._class_term: Tensor | None = None
        if plan.class_bias is not None:
            self._class_term = plan.class_bias[conditioning.class_labels]
        self._condition = conditioning.condition

    def fill(self, row: int) -> None:
        """Fill the terms of a row that has no rows above."""
        self.row_term.copy_(self._plan.horizontal_bias.expand_as(self.row_term))
        for added in self._conditioning_terms(row):
            self.row_term += added

    def _conditioning_terms(self, row: int) -> list[Tensor]:
        """What class and map add to the row, each broadcastable to (W, n, S)."""
        terms = []
        if self._class_term is not None:
            terms.append(self._class_term)
        if self._plan.condition_weight is not None:
            assert self._condition is not None
            terms.append(self._condition[:, :, row].permute(2, 0, 1) @ self._plan.condition_weight)
        return terms


class _VerticalLayer(_RowTerms):
    """One gated layer's ring of input rows, and its step: a row."""

    _plan: GatedLayerPlan

    def __init__(self, plan: GatedLayerPlan, conditioning: Conditioning, n: int, width: int):
        super().__init__(plan, conditioning, n, width)
        self._reach = plan.reach
        channels = plan.out_weight.shape[0]
        shape = (self._reach + 1, width + 2 * self._reach, n, channels)
        self._ring = plan.out_weight.new_zeros(shape)

    def store(self, row: int, features: Tensor) -> None:
        """Keep this layer's vertical input of a row, (W, n, C)."""
        inner = slice(self._reach, self._reach + self._width)
        self._ring[row % len(self._ring), inner] = features

    def start_row(self, row: int) -> Tensor:
        """Vertical output of the row, (W, n, C); fills the row's terms of the horizontal stack."""
        plan = self._plan
        gathered = [
            self._ring[
                (row - self._reach + a * plan.dilation) % len(self._ring),
                b * plan.dilation : b * plan.dilation + self._width,
            ]
            for a in range(plan.rows)
            for b in range(plan.kernel_size)
        ]
        taps = torch.cat(gathered, dim=-1).flatten(0, 1)
        vertical = torch.addmm(plan.vertical_bias, taps, plan.vertical_weight)
        horizontal = torch.addmm(plan.horizontal_bias, vertical, plan.link_weight)
        vertical = vertical.view_as(self.row_term)
        horizontal = horizontal.view_as(self.row_term)
        for added in self._conditioning_terms(row):
            for_vertical, for_horizontal = added.chunk(2, dim=-1)
            vertical = vertical + for_vertical
            horizontal = horizontal + for_horizontal
        self.row_term.copy_(horizontal)
        return gate(vertical)


class VerticalStack:
    """The vertical stack of all gated layers; of a prior over sequences, their conditioning alone.

    Args:
        plan: the prior's weights.
        conditioning: class labels and map of every sample; the map in the plan's dtype.
        num_samples: n.
        width: W.
    """

    def __init__(
        self, plan: PriorPlan, conditioning: Conditioning, num_samples: int, width: int
    ) -> None:
        self._embedding = plan.embedding
        self._layers: list[_VerticalLayer] = []
        self._sequence_layers: list[_RowTerms] = []
        for layer in plan.layers:
            if isinstance(layer, GatedLayerPlan):
                self._layers.append(_VerticalLayer(layer, conditioning, num_samples, width))
            elif isinstance(layer, CausalLayerPlan):
                self._sequence_layers.append(_RowTerms(layer, conditioning, num_samples, width))

    @property
    def row_terms(self) -> list[Tensor]:
        """Each gated layer's (W, n, 2C) terms of the row started last, written in place."""
        return [layer.row_term for layer in (*self._layers, *self._sequence_layers)]

    def start_row(self, codes: Tensor, row: int) -> None:
        """Fill the terms of a row; the first layer sees the rows above, later ones this row too.

        Args:
            codes: (n, H, W) int64, complete above the row.
        """
        for sequence_layer in self._sequence_layers:
            sequence_layer.fill(row)
        if not self._layers:
            return
        first = self._layers[0]
        if row > 0:
            above = self._embedding[codes[:, row - 1]]
            first.store(row - 1, above.transpose(0, 1))
        vertical = first.start_row(row)
        for layer in self._layers[1:]:
            layer.store(row, vertical)
            vertical = layer.start_row(row)
