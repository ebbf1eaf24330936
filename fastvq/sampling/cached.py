"""Exact incremental sampling in plain PyTorch: every feature is computed once.

Once per row: the vertical stack (`vertical`). Per code: the live horizontal taps of the current
row, the 1×1s, one query per attention layer against the keys and values kept so far, and the head.

Buffers, for n samples, C channels, W columns:

* horizontal inputs, per gated layer: (n, pad + W, C), of the current row only;
* keys and values, per attention layer: (n, heads, H·W, C / heads).

Only the executor lives here; the loop over positions is `loop`, the weights `plan`. Any device and
dtype; on CPUs in float32 `cpu_rows` does the same in C++.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.nn.causal_attention import coordinates
from fastvq.sampling.plan import AttentionPlan, CausalLayerPlan, PriorPlan
from fastvq.sampling.request import Conditioning
from fastvq.sampling.vertical import VerticalStack, gate


class _GatedState:
    """Horizontal inputs of one gated layer, and its step: a column of the current row."""

    def __init__(self, plan: CausalLayerPlan, row_term: Tensor, n: int, width: int):
        self._plan = plan
        channels = plan.out_weight.shape[0]
        self._row_input = row_input = plan.out_weight.new_zeros(n, plan.reach + width, channels)
        # Views made once: indexing costs as much as a small product.
        span = (plan.taps - 1) * plan.dilation + 1
        self._taps = [
            row_input[:, column : column + span : plan.dilation] for column in range(width)
        ]
        self._adjacent = plan.dilation == 1 or plan.taps == 1
        if self._adjacent:
            self._taps = [taps.flatten(1) for taps in self._taps]
        self._inputs = list(row_input[:, plan.reach :].unbind(1))
        self._terms = list(row_term.unbind(0))

    def store(self, column: int, features: Tensor) -> None:
        """Keep this layer's horizontal input of a column of the current row, (n, C)."""
        self._inputs[column].copy_(features)

    def carry(self) -> None:
        """Let the row's last inputs stand before the first column."""
        reach = self._plan.reach
        self._row_input[:, :reach] = self._row_input[:, -reach:].clone()

    def step(self, column: int) -> Tensor:
        """Horizontal output of one column, (n, C), from the inputs stored up to it."""
        plan = self._plan
        taps = self._taps[column]
        if not self._adjacent:
            taps = taps.flatten(1)
        features = torch.addmm(self._terms[column], taps, plan.horizontal_weight)
        out = torch.addmm(plan.out_bias, gate(features), plan.out_weight)
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
        position = coordinates(height, width, like=plan.out_weight).flatten(1).T
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
        self._vertical = VerticalStack(plan, conditioning, num_samples, width)
        terms = iter(self._vertical.row_terms)
        self._states: list[_GatedState | _AttentionState] = []
        for layer in plan.layers:
            if isinstance(layer, CausalLayerPlan):
                self._states.append(_GatedState(layer, next(terms), num_samples, width))
            else:
                self._states.append(_AttentionState(layer, num_samples, height, width))

    def carry(self, last: Tensor) -> None:
        """Go on to the next stretch of a sequence, as wide as this one, which is complete.

        Args:
            last: (n,) int64, the codes of its last column.
        """
        for number, state in enumerate(self._states):
            assert isinstance(state, _GatedState)
            if number == 0:
                state.store(self._width - 1, self._plan.embedding[last])
            state.carry()

    def step(self, codes: Tensor, row: int, column: int, want_logits: bool) -> Tensor | None:
        """Logits (n, K) at (row, column) given the codes before it, or None where not wanted.

        Args:
            codes: (n, H, W) int64; whatever stands at or after the position is not read.
        """
        first = self._states[0]
        assert isinstance(first, _GatedState)
        if column == 0:
            self._vertical.start_row(codes, row)
        else:
            first.store(column - 1, self._plan.embedding[codes[:, row, column - 1]])
        features = first.step(column)
        for state in self._states[1:]:
            if isinstance(state, _GatedState):
                state.store(column, features)
                features = state.step(column)
            else:
                features = state.step(row * self._width + column, features)
        if not want_logits:
            return None
        head = self._plan.head
        hidden = torch.addmm(head.hidden_bias, features.relu(), head.hidden_weight)
        return torch.addmm(head.logit_bias, hidden.relu_(), head.logit_weight)
