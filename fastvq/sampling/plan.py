"""A prior's weights in plain form: what an executor needs to draw codes, and nothing else.

A plan is built from the modules of `fastvq.models.PixelCNN` and read by the executors (`cached`).
It holds matrices laid out for row-vector products, y = x @ weight + bias, with the masked taps
already gone. How they are multiplied, and in which order, is the executor's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.causal_attention import CausalSelfAttention
from fastvq.nn.gated_causal_conv import GatedCausalConv1d
from fastvq.nn.gated_layer import GatedLayer
from fastvq.nn.gated_masked_conv import GatedMaskedConv2d


@dataclass(frozen=True)
class CausalLayerPlan:
    """One `GatedCausalConv1d`, and the horizontal stack of any gated layer.

    C hidden channels, k kernel_size, T taps, of which tap t reads column j − (k // 2 − t)·dilation.
    S is 2C; of a `GatedLayerPlan` it is 4C, the vertical stack's half first.
    """

    horizontal_weight: Tensor  # (T·C, 2C), rows by (tap, channel)
    horizontal_bias: Tensor  # (2C,): the convolution's and, where there is one, the link's
    out_weight: Tensor  # (C, C)
    out_bias: Tensor  # (C,)
    class_bias: Tensor | None  # (num_classes, S)
    condition_weight: Tensor | None  # (condition_channels, S)
    kernel_size: int
    taps: int
    dilation: int
    residual: bool

    @property
    def reach(self) -> int:
        """How many columns back the layer sees; with a vertical stack also rows up and columns on.

        The vertical stack sees as many columns to either side.
        """
        return self.dilation * (self.kernel_size // 2)


@dataclass(frozen=True)
class GatedLayerPlan(CausalLayerPlan):
    """One `GatedMaskedConv2d`: the horizontal stack, and the vertical one with R rows.

    Vertical tap (a, b) of R × k reads row i − (up − a·dilation) and column
    j + (b − k // 2)·dilation, up = dilation·(k // 2).
    """

    vertical_weight: Tensor  # (R·k·C, 2C), rows by (row, column, channel)
    vertical_bias: Tensor  # (2C,)
    link_weight: Tensor  # (2C, 2C)
    rows: int


@dataclass(frozen=True)
class AttentionPlan:
    """One `CausalSelfAttention`; `position_weight` maps the two coordinates.

    A sequence is one row: its row coordinate is 0 and has weight 0.
    """

    weight: Tensor  # (C, 3C): queries, keys, values
    position_weight: Tensor  # (2, 3C)
    bias: Tensor  # (3C,)
    out_weight: Tensor  # (C, C)
    out_bias: Tensor  # (C,)
    heads: int


@dataclass(frozen=True)
class HeadPlan:
    """ReLU, matrix, ReLU, matrix: features to logits."""

    hidden_weight: Tensor  # (C, M)
    hidden_bias: Tensor  # (M,)
    logit_weight: Tensor  # (M, K)
    logit_bias: Tensor  # (K,)


@dataclass(frozen=True)
class PriorPlan:
    """A whole prior: embedding, layers in order, head. All tensors share dtype and device."""

    embedding: Tensor  # (K, C)
    layers: tuple[CausalLayerPlan | AttentionPlan, ...]
    head: HeadPlan

    @property
    def dimensions(self) -> int:
        """2 for a prior over maps, 1 for one over sequences, which has no vertical stack."""
        return 2 if isinstance(self.layers[0], GatedLayerPlan) else 1


def _matrix(conv: nn.Module, dtype: torch.dtype) -> Tensor:
    """(taps·in, out): a convolution's weight as the matrix that multiplies its gathered taps."""
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
    weight = conv.weight.detach().to(dtype).flatten(2)
    return weight.permute(2, 1, 0).reshape(-1, weight.shape[0]).contiguous()


def _bias(conv: nn.Module, dtype: torch.dtype) -> Tensor:
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
    assert conv.bias is not None
    return conv.bias.detach().to(dtype)


def _horizontal(layer: GatedLayer, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a `CausalLayerPlan`."""
    taps = layer.kernel_size // 2 + (layer.mask_type == "B")
    class_bias = condition_weight = None
    if layer.class_bias is not None:
        class_bias = layer.class_bias.weight.detach().to(dtype)
    if layer.condition_map is not None:
        condition_weight = _matrix(layer.condition_map, dtype)
    return {
        # The taps after the current column (and with "A" the current one) are masked.
        "horizontal_weight": _matrix(layer.horizontal, dtype)[: taps * layer.hidden_channels],
        "horizontal_bias": _bias(layer.horizontal, dtype),
        "out_weight": _matrix(layer.horizontal_out, dtype),
        "out_bias": _bias(layer.horizontal_out, dtype),
        "class_bias": class_bias,
        "condition_weight": condition_weight,
        "kernel_size": layer.kernel_size,
        "taps": taps,
        "dilation": layer.dilation,
        "residual": layer.residual,
    }


def _plan_gated(layer: GatedMaskedConv2d, dtype: torch.dtype) -> GatedLayerPlan:
    horizontal = _horizontal(layer, dtype)
    horizontal["horizontal_bias"] = horizontal["horizontal_bias"] + _bias(layer.link, dtype)
    return GatedLayerPlan(
        **horizontal,
        vertical_weight=_matrix(layer.vertical, dtype),
        vertical_bias=_bias(layer.vertical, dtype),
        link_weight=_matrix(layer.link, dtype),
        rows=layer.vertical.kernel_size[0],
    )


def _plan_attention(layer: CausalSelfAttention, dtype: torch.dtype) -> AttentionPlan:
    weight = _matrix(layer.query_key_value, dtype)
    return AttentionPlan(
        weight=weight[: layer.channels],
        position_weight=F.pad(weight[layer.channels :], (0, 0, 2 - layer.dimensions, 0)),
        bias=_bias(layer.query_key_value, dtype),
        out_weight=_matrix(layer.out, dtype),
        out_bias=_bias(layer.out, dtype),
        heads=layer.heads,
    )


def plan_prior(
    embedding: nn.Embedding,
    layers: Iterable[nn.Module],
    head: tuple[nn.Module, nn.Module],
    dtype: torch.dtype,
) -> PriorPlan:
    """The plan of a prior made of these modules, its weights converted to `dtype`.

    Args:
        embedding: (K, C).
        layers: `GatedMaskedConv2d` or `GatedCausalConv1d`, and `CausalSelfAttention`, in the order
            they act.
        head: the two 1×1 convolutions of the head.
        dtype: float32 or float64.
    Raises:
        TypeError: a layer of another kind.
    """
    plans: list[CausalLayerPlan | AttentionPlan] = []
    for layer in layers:
        if isinstance(layer, GatedMaskedConv2d):
            plans.append(_plan_gated(layer, dtype))
        elif isinstance(layer, GatedCausalConv1d):
            plans.append(CausalLayerPlan(**_horizontal(layer, dtype)))
        elif isinstance(layer, CausalSelfAttention):
            plans.append(_plan_attention(layer, dtype))
        else:
            raise TypeError(
                "plan_prior: layers must be gated layers or CausalSelfAttention; got "
                f'{type(layer).__name__}. Use method="full".'
            )
    hidden, logits = head
    return PriorPlan(
        embedding=embedding.weight.detach().to(dtype),
        layers=tuple(plans),
        head=HeadPlan(
            hidden_weight=_matrix(hidden, dtype),
            hidden_bias=_bias(hidden, dtype),
            logit_weight=_matrix(logits, dtype),
            logit_bias=_bias(logits, dtype),
        ),
    )
