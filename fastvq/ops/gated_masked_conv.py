"""gated_masked_conv: one layer of a gated PixelCNN, both stacks, in one differentiable op.

Between the convolutions everything is one pass per stack (`gated_activation`). Saved for the
backward pass are the two inputs and the vertical stack's features before their gate, 4C numbers
a pixel: gates, dropout masks and the horizontal features are computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.reference import gated_masked_conv as reference

from . import checks
from .backends import choose
from .gated_activation import HORIZONTAL, VERTICAL, Conditioning, gate, gate_backward
from .gated_convolutions import Convolution, channels_last, pointwise
from .masked_conv2d import MASK_TYPES
from .registration import register


class GatedWeights(NamedTuple):
    """Weights and biases of a layer with C channels and kernel size k.

    The vertical kernel has the live rows only: k // 2, and with mask type "B" one more.
    """

    vertical_weight: Tensor  # (2C, C, rows, k)
    vertical_bias: Tensor  # (2C,)
    horizontal_weight: Tensor  # (2C, C, 1, k); masked columns are never read
    horizontal_bias: Tensor  # (2C,)
    link_weight: Tensor  # (2C, 2C, 1, 1)
    link_bias: Tensor  # (2C,)
    out_weight: Tensor  # (C, C, 1, 1)
    out_bias: Tensor  # (C,)


def gated_masked_conv(
    vertical: Tensor,
    horizontal: Tensor,
    weights: GatedWeights,
    *,
    mask_type: str,
    dilation: int = 1,
    class_bias: Tensor | None = None,
    condition: Tensor | None = None,
    condition_weight: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    residual: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Vertical and horizontal features of the next layer of a gated PixelCNN.

        v' = W_v * vertical + b_v                    rows i − r·d … i − d, with "B" also row i
        h' = W_h * horizontal + b_h + W_vh v' + b_vh     columns j − r·d …, as `masked_conv2d`
        vertical out   = dropout(tanh(v'₁ + y₁) ⊙ σ(v'₂ + y₂))
        horizontal out = W_o dropout(tanh(h'₁ + y₃) ⊙ σ(h'₂ + y₄)) + b_o (+ horizontal)

    with r = k // 2, d the dilation, y = class_bias + condition_weight · condition, and indices the
    C channels that belong to each half of each stack. Weights under the horizontal mask may hold
    anything and receive zero gradient. Which elements dropout keeps is a function of the seed, the
    stack and the element's place alone (`fastvq.reference.gated_masked_conv.keep_mask`).
    Under autocast the inputs are cast as for `torch.nn.functional.conv2d`; the residual is then
    added in its own dtype.

    Backend "cpp" filters float32 convolutions of at least 16 channels and 1024 pixels by Winograd's
    algorithm, two outputs per axis: an output still depends on the pixels that it sees alone, bit
    by bit, and its rounding error is bounded by sizes summed over its tile instead of its own terms
    (Lavin and Gray 2015, arXiv:1509.09308).

    Args:
        vertical: (B, C, H, W) float32, float16, bfloat16 or float64; any strides; B may be 0.
        horizontal: the same.
        weights: of the same dtype.
        mask_type: "A" or "B".
        dilation: distance between taps in pixels, ≥ 1.
        class_bias: (B, 4C), the vertical stack's 2C first; or None.
        condition: (B, E, H, W), with condition_weight (4C, E, 1, 1); or None.
        dropout: probability of dropping an element of a gated stack, where a seed is given.
        seed: int64 (); None drops nothing.
        residual: add `horizontal` to the horizontal output.
        backend: "triton", "cpp" or "reference"; None chooses.
    Returns:
        (vertical, horizontal), each (B, C, H, W); channels_last where `vertical` and
        `horizontal` are, else contiguous. Differentiable once in every float argument.
    Raises:
        ValueError: shapes disagree, or an unknown option.
        TypeError: not tensors, or dtypes differ.
        RuntimeError: the backend asked for cannot run this call.
    van den Oord et al. 2016, arXiv:1606.05328, eq. 2-4 and figure 2.
    """
    op = "gated_masked_conv"
    weights = GatedWeights(*weights)
    added = {
        "class_bias": class_bias,
        "condition": condition,
        "condition_weight": condition_weight,
    }
    _check_shapes(vertical, horizontal, weights, mask_type, added)
    checks.check_int(op, "dilation", dilation)
    if seed is not None and not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{op}: dropout must be in 0 … 1; got {dropout}.")
    chosen = choose(op, backend, vertical, horizontal)
    floats = _under_autocast(vertical, horizontal, *added.values(), *weights)
    _check_dtypes(floats[0], ["horizontal", *added, *GatedWeights._fields], floats[1:])
    casts = residual and floats[1] is not horizontal
    if floats[1] is floats[0]:  # torch.compile refuses one tensor as two inputs of a Function
        floats[1] = floats[1].view_as(floats[1])
    if backend == "reference":
        out_v, out_h = reference.gated_masked_conv(
            *(floats[0], floats[1], tuple(floats[5:]), floats[2], floats[3], floats[4], seed),
            mask_type=mask_type,
            dilation=dilation,
            dropout=dropout,
            residual=residual and not casts,
        )
    else:
        options = (dropout, mask_type, dilation, residual and not casts, chosen)
        out_v, out_h = _GatedMaskedConv.apply(seed, *options, *floats)
    return out_v, out_h + horizontal if casts else out_h


def _check_shapes(
    vertical: Tensor,
    horizontal: Tensor,
    weights: GatedWeights,
    mask_type: str,
    added: dict[str, Tensor | None],
) -> None:
    op = "gated_masked_conv"
    checks.check_float(op, "vertical", vertical)
    checks.check_choice(op, "mask_type", mask_type, MASK_TYPES)
    if vertical.dim() != 4:
        raise ValueError(f"{op}: vertical must be (B, C, H, W); got {checks.shape(vertical)}.")
    if (added["condition"] is None) != (added["condition_weight"] is None):
        raise ValueError(f"{op}: condition and condition_weight must be given together.")
    batch, channels, height, width = vertical.shape
    kernel = weights.horizontal_weight.shape[-1]
    if kernel % 2 == 0:
        raise ValueError(
            f"{op}: horizontal_weight must have an odd kernel, so that it has a centre; got "
            f"{checks.shape(weights.horizontal_weight)}."
        )
    both, rows = 2 * channels, kernel // 2 + (mask_type == "B")
    inputs = 1 if added["condition"] is None else added["condition"].shape[1]
    expected = {
        "horizontal": (batch, channels, height, width),
        "vertical_weight": (both, channels, rows, kernel),
        "vertical_bias": (both,),
        "horizontal_weight": (both, channels, 1, kernel),
        "horizontal_bias": (both,),
        "link_weight": (both, both, 1, 1),
        "link_bias": (both,),
        "out_weight": (channels, channels, 1, 1),
        "out_bias": (channels,),
        "class_bias": (batch, 2 * both),
        "condition": (batch, inputs, height, width),
        "condition_weight": (2 * both, inputs, 1, 1),
    }
    given = {"horizontal": horizontal, **weights._asdict(), **added}
    for name, tensor in given.items():
        if tensor is None:
            continue
        checks.check_float(op, name, tensor)
        checks.check_device(op, name, tensor, vertical)
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{op}: {name} must be {expected[name]} to match vertical "
                f"{checks.shape(vertical)} and mask type {mask_type}; got {checks.shape(tensor)}."
            )


def _check_dtypes(vertical: Tensor, names: list[str], tensors: list[Tensor | None]) -> None:
    for name, tensor in zip(names, tensors):
        if tensor is not None and tensor.dtype != vertical.dtype:
            raise TypeError(
                f"gated_masked_conv: {name} must have the dtype of vertical ({vertical.dtype}); "
                f"got {tensor.dtype}. Convert one of them, or run under torch.autocast."
            )


def _under_autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors in autocast's dtype where it is on, as PyTorch's convolutions take them."""
    assert tensors[0] is not None
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type) or tensors[0].dtype == torch.float64:
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


class _Layer(NamedTuple):
    """What both directions are told, in the order of the raw ops' arguments."""

    seed: Tensor | None
    dropout: float
    mask_type: str
    dilation: int
    residual: bool
    backend: str
    vertical: Tensor
    horizontal: Tensor
    class_bias: Tensor | None
    condition: Tensor | None
    condition_weight: Tensor | None
    weights: list[Tensor]

    @property
    def given(self) -> Conditioning:
        mapped = None
        if self.condition is not None:
            assert self.condition_weight is not None
            mapped = pointwise(self.condition_weight, self.backend).forward(self.condition, None)
        return Conditioning(self.class_bias, mapped, self.seed, self.dropout)

    @property
    def convolutions(self) -> tuple[Convolution, Convolution, Convolution, Convolution]:
        """Vertical, horizontal, link and out."""
        w_v, _, w_h, _, w_vh, _, w_o, _ = self.weights
        kernel, d = w_v.shape[3], self.dilation
        reach, live = d * (kernel // 2), kernel // 2 + (self.mask_type == "B")
        return (
            Convolution(w_v, kernel, -reach, -reach, d, self.backend),
            Convolution(w_h, live, 0, -reach, d, self.backend),
            pointwise(w_vh, self.backend),
            pointwise(w_o, self.backend),
        )

    def horizontal_features(self, features: Tensor) -> Tensor:
        """h' from the horizontal input and v'."""
        _, conv, link, _ = self.convolutions
        own = conv.forward(self.horizontal, self.weights[3])
        return link.forward(features, self.weights[5], onto=own)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Both outputs, and v' as the backward pass wants it."""
    layer = _Layer(*arguments)
    if layer.vertical.numel() == 0:
        return tuple(empty.zero_() for empty in _forward_fake(*arguments))  # type: ignore[return-value]
    if layer.backend == "triton":
        return _forward_triton(layer)
    given, (conv_v, _, _, conv_o) = layer.given, layer.convolutions
    features = conv_v.forward(layer.vertical, layer.weights[1])
    gated_v = gate(features, given, VERTICAL, layer.backend)
    gated_h = gate(layer.horizontal_features(features), given, HORIZONTAL, layer.backend)
    residual = channels_last(layer.horizontal.clone()) if layer.residual else None
    out_h = conv_o.forward(gated_h, layer.weights[7], onto=residual)
    return (
        _laid_out_as(_empty_as(layer.vertical), gated_v),
        _laid_out_as(_empty_as(layer.horizontal), out_h),
        features,
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer = _Layer(*arguments)
    batch, channels, height, width = layer.vertical.shape
    features = layer.vertical.new_empty((batch, height, width, 2 * channels)).permute(0, 3, 1, 2)
    return _empty_as(layer.vertical), _empty_as(layer.horizontal), features


def _empty_as(x: Tensor) -> Tensor:
    """An output of x's shape: channels_last where x is that and not contiguous too."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.new_empty(x.shape)
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _laid_out_as(like: Tensor, value: Tensor) -> Tensor:
    """`value` in the dtype and memory layout of `like`; copied, into `like`, where it differs."""
    same = value.stride() == like.stride() and value.dtype == like.dtype
    return value if same else like.copy_(value)


def _backward(
    grad_vertical: Tensor,
    grad_horizontal: Tensor,
    features: Tensor,
    wanted: list[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Gradients to vertical, horizontal, class_bias, condition, condition_weight, weights.

    Those to an absent tensor, and to an unwanted one of the inputs, are empty. Over all pixels the
    link's gradient to v' adds up to W_vhᵀ times the sum of that to h', so no bias needs a pass of
    its own.
    """
    layer, features = _Layer(*arguments), channels_last(features)
    grads = _backward_fake(grad_vertical, grad_horizontal, features, wanted, *arguments)
    if layer.vertical.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    if layer.backend == "triton":
        from_triton = _backward_triton(grad_vertical, grad_horizontal, features, wanted, layer)
        return tuple(
            grad if value is None else _laid_out_as(grad, value.view(grad.shape))
            for grad, value in zip(grads, from_triton)
        )
    given, backend = layer.given, layer.backend
    conv_v, conv_h, link, conv_o = layer.convolutions
    grad_out = channels_last(grad_horizontal)
    grad_h, sums_h, gated_h = gate_backward(
        conv_o.backward_x(grad_out),
        layer.horizontal_features(features),
        *(given, HORIZONTAL, backend),
        reuse=True,
    )
    grad_w_o = conv_o.backward_weight(grad_out, gated_h)
    del gated_h
    grad_v, sums_v, _ = gate_backward(
        channels_last(grad_vertical), features, given, VERTICAL, backend, reuse=False
    )
    of_condition = _condition_grads(layer, grad_v, grad_h, wanted[2])
    grad_v = link.backward_x(grad_h, onto=grad_v)
    total_h = sums_h.sum(dim=0)
    total_v = sums_v.sum(dim=0) + total_h @ link.weight[:, :, 0, 0].to(total_h.dtype)
    found: list[Tensor | None] = [
        conv_v.backward_x(grad_v) if wanted[0] else None,
        _horizontal_grad(layer, grad_h, grad_out) if wanted[1] else None,
        torch.cat([sums_v, sums_h], dim=1),
        *of_condition,
        *(conv_v.backward_weight(grad_v, layer.vertical), total_v),
        *(conv_h.backward_weight(grad_h, layer.horizontal), total_h),
        *(link.backward_weight(grad_h, features), total_h.clone()),
        *(grad_w_o, grad_horizontal.sum(dim=(0, 2, 3))),
    ]
    return tuple(
        _laid_out_as(grad, value) if grad.numel() and value is not None else grad
        for grad, value in zip(grads, found)
    )


def _forward_triton(layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    from fastvq.kernels.triton import gated_masked_conv as kernels

    out_v, out_h, features = kernels.gated_masked_conv_forward(kernels.Layer(*_for_triton(layer)))
    return (
        _laid_out_as(_empty_as(layer.vertical), out_v),
        _laid_out_as(_empty_as(layer.horizontal), out_h),
        features,
    )


def _backward_triton(
    grad_vertical: Tensor,
    grad_horizontal: Tensor,
    features: Tensor,
    wanted: list[bool],
    layer: _Layer,
) -> list[Tensor | None]:
    from fastvq.kernels.triton import gated_masked_conv as kernels

    return kernels.gated_masked_conv_backward(
        grad_vertical, grad_horizontal, features, wanted, kernels.Layer(*_for_triton(layer))
    )


def _for_triton(layer: _Layer) -> tuple[Any, ...]:
    return tuple(value for name, value in layer._asdict().items() if name != "backend")


def _backward_fake(
    grad_vertical: Tensor,
    grad_horizontal: Tensor,
    features: Tensor,
    wanted: list[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    layer = _Layer(*arguments)
    conditioning = [
        layer.class_bias,
        layer.condition if wanted[2] else None,
        layer.condition_weight,
    ]
    empty = layer.vertical.new_empty(0)
    return (
        _empty_as(layer.vertical) if wanted[0] else empty,
        _empty_as(layer.horizontal) if wanted[1] else empty.clone(),
        *(
            empty.clone() if tensor is None else tensor.new_empty(tensor.shape)
            for tensor in conditioning
        ),
        *(weight.new_empty(weight.shape) for weight in layer.weights),
    )


def _horizontal_grad(layer: _Layer, grad_h: Tensor, grad_out: Tensor) -> Tensor:
    conv_h = layer.convolutions[1]
    return conv_h.backward_x(grad_h, onto=grad_out.clone() if layer.residual else None)


def _condition_grads(
    layer: _Layer, grad_v: Tensor, grad_h: Tensor, wanted: bool
) -> list[Tensor | None]:
    """To the condition, if wanted, and to its weight, from both stacks before the gates."""
    if layer.condition is None or layer.condition_weight is None:
        return [None, None]
    grad_condition, grad_weights = None, []
    for grad, weight in zip((grad_v, grad_h), layer.condition_weight.chunk(2, dim=0)):
        conv = pointwise(weight, layer.backend)
        if wanted:
            grad_condition = conv.backward_x(grad, onto=grad_condition)
        grad_weights.append(conv.backward_weight(grad, layer.condition))
    return [grad_condition, torch.cat(grad_weights)]


class _GatedMaskedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        seed, *options = arguments[:6]
        floats = arguments[6:]
        out_v, out_h, features = _FORWARD(*arguments[:11], list(arguments[11:]))
        ctx.save_for_backward(features, seed, *floats)
        ctx.options = options
        return out_v, out_h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_vertical: Tensor, grad_horizontal: Tensor) -> tuple[Any, ...]:
        features, seed, *floats = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        grads = _BACKWARD(
            grad_vertical,
            grad_horizontal,
            features,
            [needed[0], needed[1], needed[3]],
            *(seed, *ctx.options),
            *(*floats[:5], floats[5:]),
        )
        return (
            *[None] * 6,
            *(grad if need else None for grad, need in zip(grads, needed)),
        )


_ARGUMENTS = (
    "Tensor? seed, float dropout, str mask_type, int dilation, bool residual, str backend,"
    " Tensor vertical, Tensor horizontal, Tensor? class_bias, Tensor? condition,"
    " Tensor? condition_weight, Tensor[] weights"
)
_FORWARD = register(
    f"gated_masked_conv({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_BACKWARD = register(
    "gated_masked_conv_backward(Tensor grad_vertical, Tensor grad_horizontal, Tensor features,"
    f" bool[3] wanted, {_ARGUMENTS})"
    " -> (" + ", ".join(["Tensor"] * 13) + ")",
    _backward,
    _backward_fake,
)
