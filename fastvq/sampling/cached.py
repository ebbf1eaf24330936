"""Exact incremental sampling in plain PyTorch: every feature is computed once.

Once per row, when all rows above are known: the vertical stack of that row (each layer keeps its
last input rows in a ring), and from it all that reaches the horizontal stack without the row's own
codes: the link, the class bias, the condition map, the biases. Per code: the live horizontal taps
of the current row, the 1×1s, one query per attention layer against the keys and values kept so
far, and the head.

Buffers, for n samples, C channels, W columns (depth = (kernel_size // 2)·dilation + 1 rows):

* vertical ring, per gated layer: (depth, W + 2·pad, n, C), zero-padded columns;
* row terms, per gated layer: (W, n, 2C), what the row adds to each column's gate;
* horizontal inputs, per gated layer: (n, pad + W, C), of the current row only;
* keys and values, per attention layer: (n, heads, H·W, C / heads).

Only the executor lives here; the loop over positions is `loop`, the weights `plan`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.nn.causal_attention import coordinates
from fastvq.sampling.plan import AttentionPlan, GatedLayerPlan, PriorPlan
from fastvq.sampling.request import Conditioning


def _gate(features: Tensor) -> Tensor:
    """tanh of the first half of the last dimension times sigmoid of the second."""
    values, gates = features.chunk(2, dim=-1)
    return values.tanh() * gates.sigmoid()


class _GatedState:
    """Buffers of one gated layer, and its two steps: a row, and a column of that row."""

    def __init__(self, plan: GatedLayerPlan, conditioning: Conditioning, n: int, width: int):
        self._plan = plan
        self._width = width
        self._reach = plan.dilation * (plan.kernel_size // 2)
        channels = plan.out_weight.shape[0]
        new = plan.out_weight.new_zeros
        self._ring = new(self._reach + 1, width + 2 * self._reach, n, channels)
        self._row_input = new(n, self._reach + width, channels)
        self._row_term = new(width, n, 2 * channels)
        self._class_term: Tensor | None = None
        if plan.class_bias is not None:
            self._class_term = plan.class_bias[conditioning.class_labels]
        self._condition = conditioning.condition
        # Views made once: indexing costs as much as a small product.
        span = (plan.taps - 1) * plan.dilation + 1
        self._taps = [
            self._row_input[:, column : column + span : plan.dilation] for column in range(width)
        ]
        self._adjacent = plan.dilation == 1 or plan.taps == 1
        if self._adjacent:
            self._taps = [taps.flatten(1) for taps in self._taps]
        self._inputs = list(self._row_input[:, self._reach :].unbind(1))
        self._terms = list(self._row_term.unbind(0))

    def store_vertical(self, row: int, features: Tensor) -> None:
        """Keep this layer's vertical input of a row, (W, n, C)."""
        inner = slice(self._reach, self._reach + self._width)
        self._ring[row % len(self._ring), inner] = features

    def store_horizontal(self, column: int, features: Tensor) -> None:
        """Keep this layer's horizontal input of a column of the current row, (n, C)."""
        self._inputs[column].copy_(features)

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
        vertical = vertical.view_as(self._row_term)
        horizontal = horizontal.view_as(self._row_term)
        for added in self._conditioning_terms(row):
            for_vertical, for_horizontal = added.chunk(2, dim=-1)
            vertical = vertical + for_vertical
            horizontal = horizontal + for_horizontal
        self._row_term.copy_(horizontal)
        return _gate(vertical)

    def _conditioning_terms(self, row: int) -> list[Tensor]:
        """What class and map add to the row, each broadcastable to (W, n, 4C)."""
        terms = []
        if self._class_term is not None:
            terms.append(self._class_term)
        if self._plan.condition_weight is not None:
            assert self._condition is not None
            terms.append(self._condition[:, :, row].permute(2, 0, 1) @ self._plan.condition_weight)
        return terms

    def step(self, column: int) -> Tensor:
        """Horizontal output of one column, (n, C), from the inputs stored up to it."""
        plan = self._plan
        taps = self._taps[column]
        if not self._adjacent:
            taps = taps.flatten(1)
        features = torch.addmm(self._terms[column], taps, plan.horizontal_weight)
        out = torch.addmm(plan.out_bias, _gate(features), plan.out_weight)
        if plan.residual:
            out += self._inputs[column]
        return out


class _AttentionState:
    """Keys and values of one attention layer, and its step: one query."""

    def __init__(self, plan: AttentionPlan, n: int, height: int, width: int):
        self._plan = plan
        channels = plan.out_weight.shape[0]
        size = channels // plan.heads
        self._keys_values = plan.out_weight.new_zeros(2, n, plan.heads, height * width, size)
        position = coordinates(height, width, plan.out_weight).flatten(1).T
        self._position_term = position @ plan.position_weight + plan.bias  # (H·W, 3C)

    def step(self, position: int, features: Tensor) -> Tensor:
        """Output at a position in raster order, (n, C), from the features there, (n, C)."""
        plan = self._plan
        n, channels = features.shape
        projected = torch.addmm(self._position_term[position], features, plan.weight)
        projected = projected.view(n, 3, plan.heads, channels // plan.heads)
        self._keys_values[:, :, :, position] = projected[:, 1:].transpose(0, 1)
        keys, values = self._keys_values[:, :, :, : position + 1]
        attended = F.scaled_dot_product_attention(projected[:, 0, :, None], keys, values)
        return torch.addmm(plan.out_bias, attended.reshape(n, channels), plan.out_weight) + features


class CachedExecutor:
    """Logits of one position at a time, every position exactly once and in raster order.

    Args:
        plan: the prior's weights.
        conditioning: class labels and map of every sample; the map in the plan's dtype.
        num_samples: n.
        height, width: of the map.
    """

    def __init__(
        self, plan: PriorPlan, conditioning: Conditioning, num_samples: int, height: int, width: int
    ) -> None:
        self._plan = plan
        self._width = width
        self._states: list[_GatedState | _AttentionState] = []
        for layer in plan.layers:
            if isinstance(layer, GatedLayerPlan):
                self._states.append(_GatedState(layer, conditioning, num_samples, width))
            else:
                self._states.append(_AttentionState(layer, num_samples, height, width))
        self._gated = [state for state in self._states if isinstance(state, _GatedState)]

    def step(self, codes: Tensor, row: int, column: int, want_logits: bool) -> Tensor | None:
        """Logits (n, K) at (row, column) given the codes before it, or None where not wanted.

        Args:
            codes: (n, H, W) int64; whatever stands at or after the position is not read.
        """
        first = self._gated[0]
        if column == 0:
            self._start_row(codes, row)
        else:
            first.store_horizontal(column - 1, self._plan.embedding[codes[:, row, column - 1]])
        features = first.step(column)
        for state in self._states[1:]:
            if isinstance(state, _GatedState):
                state.store_horizontal(column, features)
                features = state.step(column)
            else:
                features = state.step(row * self._width + column, features)
        if not want_logits:
            return None
        head = self._plan.head
        hidden = torch.addmm(head.hidden_bias, features.relu(), head.hidden_weight)
        return torch.addmm(head.logit_bias, hidden.relu_(), head.logit_weight)

    def _start_row(self, codes: Tensor, row: int) -> None:
        """The vertical stack of a row: the first layer sees the rows above, later ones this too."""
        if row > 0:
            above = self._plan.embedding[codes[:, row - 1]]
            self._gated[0].store_vertical(row - 1, above.transpose(0, 1))
        vertical = self._gated[0].start_row(row)
        for state in self._gated[1:]:
            state.store_vertical(row, vertical)
            vertical = state.start_row(row)
