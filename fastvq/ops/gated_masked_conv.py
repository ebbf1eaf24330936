"""gated_masked_conv: one layer of a gated PixelCNN, both stacks, in one differentiable op.

Between the convolutions everything is one pass per stack (`gated_activation`). Saved for the
backward pass are the two inputs and the vertical stack's features before their gate, 4C numbers
a pixel: gates, dropout masks and the horizontal features are computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.reference import gated_masked_conv as reference

from . import checks
from .backends import choose
from .gated_activation import HORIZONTAL, VERTICAL, Conditioning, gate, gate_backward
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
    checks.check_positive_int(op, "dilation", dilation)
    if seed is not None and not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{op}: dropout must be in 0 … 1; got {dropout}.")
    chosen = choose(op, backend, vertical, horizontal)
    floats = _under_autocast(vertical, horizontal, *added.values(), *weights)
    _check_dtypes(floats[0], ["horizontal", *added, *GatedWeights._fields], floats[1:])
    casts = residual and floats[1] is not horizontal
    if floats[1] is floats[0]:  # torch.compile refuses one tensor as two inputs of a Function
        floats[1] = floats[1].view_as(floats[1])
    options = (dropout, mask_type, dilation, residual and not casts)
    if backend == "reference":
        out_v, out_h = reference.gated_masked_conv(
            floats[0],
            floats[1],
            floats[5:],
            *floats[2:5],
            seed,
            **dict(zip(("dropout", "mask_type", "dilation", "residual"), options)),
        )
    else:
        out_v, out_h = _GatedMaskedConv.apply(seed, *options, chosen, *floats)
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
            mapped = F.conv2d(_channels_last(self.condition), self.condition_weight)
        return Conditioning(self.class_bias, mapped, self.seed, self.dropout)

    @property
    def seen_vertical(self) -> Tensor:
        """The vertical input under its kernel's window, zeros outside the picture."""
        side, (rows, _) = self.reach, self.weights[0].shape[2:]
        below = (rows - 1) * self.dilation - side
        x = self.vertical[:, :, : max(self.vertical.shape[2] + below, 0)]
        height = self.vertical.shape[2] + (rows - 1) * self.dilation
        return _channels_last(F.pad(x, (side, side, height - x.shape[2], 0)))

    @property
    def seen_horizontal(self) -> Tensor:
        """The horizontal input under the live part of its kernel."""
        width = self.horizontal.shape[3] + (self.live_columns - 1) * self.dilation
        padded = F.pad(self.horizontal, (self.reach, 0, 0, 0))
        return _channels_last(padded[..., :width])

    @property
    def reach(self) -> int:
        return self.dilation * (self.weights[0].shape[3] // 2)

    @property
    def live_columns(self) -> int:
        return self.weights[2].shape[3] // 2 + (self.mask_type == "B")

    @property
    def live_horizontal_weight(self) -> Tensor:
        return self.weights[2][..., : self.live_columns].contiguous()

    def horizontal_features(self, vertical_features: Tensor) -> tuple[Tensor, Tensor]:
        """W_h * horizontal + b_h and W_vh v' + b_vh: the gate adds them up."""
        seen, taps = self.seen_horizontal, self.live_horizontal_weight
        own = F.conv2d(seen, taps, self.weights[3], dilation=self.dilation)
        return own, F.conv2d(vertical_features, self.weights[4], self.weights[5])


def _channels_last(x: Tensor) -> Tensor:
    """The same numbers with the channels of a pixel side by side, sizes of 1 included."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Both outputs, and v' as the backward pass wants it."""
    layer = _Layer(*arguments)
    if layer.vertical.numel() == 0:
        return tuple(empty.zero_() for empty in _forward_fake(*arguments))  # type: ignore[return-value]
    if layer.backend == "triton":
        return _forward_triton(layer)
    w_v, b_v, *_, w_o, b_o = layer.weights
    given = layer.given
    features = F.conv2d(layer.seen_vertical, w_v, b_v, dilation=layer.dilation)
    features = _channels_last(features)
    gated_v = gate(features, None, given, VERTICAL, layer.backend)
    own, link = layer.horizontal_features(features)
    gated_h = gate(_channels_last(own), _channels_last(link), given, HORIZONTAL, layer.backend)
    out_h = F.conv2d(gated_h, w_o, b_o)
    if layer.residual:
        out_h = out_h.add_(layer.horizontal)
    outs = [
        _in_format_of(x, out) for x, out in ((layer.vertical, gated_v), (layer.horizontal, out_h))
    ]
    return outs[0], outs[1], features


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


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory layout of `_empty_as(x)`; not copied where it has it."""
    empty = _empty_as(x)
    return y if y.stride() == empty.stride() else empty.copy_(y)


def _backward(
    grad_vertical: Tensor, grad_horizontal: Tensor, features: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients to vertical, horizontal, class_bias, condition, condition_weight, weights.

    Those to an absent tensor are empty. The sum of the link's gradient to v' over all pixels is
    W_vhᵀ times that of h', so no bias needs a pass of its own.
    """
    layer = _Layer(*arguments)
    grads = _backward_fake(grad_vertical, grad_horizontal, features, *arguments)
    if layer.vertical.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    if layer.backend == "triton":
        return _backward_triton(grad_vertical, grad_horizontal, features, layer, grads)
    w_v, _, _, _, w_vh, _, w_o, _ = layer.weights
    given, backend = layer.given, layer.backend
    grad_horizontal = _channels_last(grad_horizontal)
    grad_gated = _convolution_input_grad(grad_horizontal, w_o)
    own, link = map(_channels_last, layer.horizontal_features(features))
    grad_h, sums_h, gated_h = gate_backward(grad_gated, own, link, given, HORIZONTAL, backend)
    del own, link, grad_gated
    grad_w_o = _convolution_weight_grad(grad_horizontal, gated_h, w_o)
    del gated_h
    grad_seen_h, grad_w_h = _convolution_grads(
        grad_h, layer.seen_horizontal, layer.live_horizontal_weight, layer.dilation
    )
    grad_v, grad_w_vh = _convolution_grads(grad_h, features, w_vh, 1)
    gate_v, sums_v, _ = gate_backward(
        _channels_last(grad_vertical), features, None, given, VERTICAL, backend
    )
    grad_v = grad_v + gate_v
    grad_seen_v, grad_w_v = _convolution_grads(grad_v, layer.seen_vertical, w_v, layer.dilation)
    total_h = sums_h.sum(dim=0)
    total_v = sums_v.sum(dim=0) + total_h @ w_vh[:, :, 0, 0].to(total_h.dtype)
    found: list[Tensor | None] = [
        _uncut(grad_seen_v, layer.vertical, layer.reach, layer.reach),
        _uncut(grad_seen_h, layer.horizontal, 0, layer.reach),
        torch.cat([sums_v, sums_h], dim=1),
        *_condition_grads(layer, gate_v, grad_h),
        *(grad_w_v, total_v),
        *(F.pad(grad_w_h, (0, layer.weights[2].shape[3] - layer.live_columns)), total_h),
        *(grad_w_vh, total_h),
        *(grad_w_o, grad_horizontal.sum(dim=(0, 2, 3))),
    ]
    for out, value in zip(grads, found):
        if out.numel():
            out.copy_(value)
    if layer.residual:
        grads[1].add_(grad_horizontal)
    return grads


def _forward_triton(layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    from fastvq.kernels.triton import gated_masked_conv as kernels

    out_v, out_h, features = kernels.gated_masked_conv_forward(kernels.Layer(*_for_triton(layer)))
    return _in_format_of(layer.vertical, out_v), _in_format_of(layer.horizontal, out_h), features


def _backward_triton(
    grad_vertical: Tensor,
    grad_horizontal: Tensor,
    features: Tensor,
    layer: _Layer,
    empty: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    from fastvq.kernels.triton import gated_masked_conv as kernels

    found = kernels.gated_masked_conv_backward(
        grad_vertical, grad_horizontal, features, kernels.Layer(*_for_triton(layer))
    )
    grads = [
        like if value is None else value.view(like.shape) if i > 1 else _in_format_of(like, value)
        for i, (like, value) in enumerate(zip(empty, found))
    ]
    return tuple(grads)


def _for_triton(layer: _Layer) -> tuple[Any, ...]:
    return tuple(value for name, value in layer._asdict().items() if name != "backend")


def _backward_fake(
    grad_vertical: Tensor, grad_horizontal: Tensor, features: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    layer = _Layer(*arguments)
    absent = layer.vertical.new_empty
    return (
        _empty_as(layer.vertical),
        _empty_as(layer.horizontal),
        *(
            absent(0) if tensor is None else tensor.new_empty(tensor.shape)
            for tensor in (layer.class_bias, layer.condition, layer.condition_weight)
        ),
        *(weight.new_empty(weight.shape) for weight in layer.weights),
    )


def _condition_grads(layer: _Layer, gate_v: Tensor, gate_h: Tensor) -> list[Tensor | None]:
    """To the condition and to its weight, from both stacks' gradients before the gates."""
    if layer.condition is None or layer.condition_weight is None:
        return [None, None]
    condition = _channels_last(layer.condition)
    halves = [
        _convolution_grads(grad, condition, weight.contiguous(), 1)
        for grad, weight in zip((gate_v, gate_h), layer.condition_weight.chunk(2, dim=0))
    ]
    return [halves[0][0] + halves[1][0], torch.cat([halves[0][1], halves[1][1]])]


def _convolution_grads(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = _convolution_backward(grad, x, weight, dilation, (True, True))
    return grad_x, grad_weight


def _convolution_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Through a 1×1 convolution, whose input is not needed."""
    batch, _, height, width = grad.shape
    x = grad.new_empty((batch, height, width, weight.shape[1])).permute(0, 3, 1, 2)
    return _channels_last(_convolution_backward(grad, x, weight, 1, (True, False))[0])


def _convolution_weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _convolution_backward(grad, x, weight, 1, (False, True))[1]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, wanted: tuple[bool, bool]
) -> Any:
    return torch.ops.aten.convolution_backward(
        *(grad, x, weight, None),
        *([1, 1], [0, 0], [dilation, dilation]),
        *(False, [0, 0], 1),
        [*wanted, False],
    )


def _uncut(grad_seen: Tensor, x: Tensor, above: int, left: int) -> Tensor:
    """Undo `seen_*`: the part that shows the picture, and zeros for what no window showed."""
    height, width = x.shape[2:]
    shown = grad_seen[:, :, above:, left : left + width]
    return F.pad(shown, (0, width - shown.shape[3], 0, height - shown.shape[2]))


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
        grads = _BACKWARD(
            grad_vertical,
            grad_horizontal,
            *(features, seed, *ctx.options),
            *(*floats[:5], floats[5:]),
        )
        wanted = [grad if tensor is not None else None for grad, tensor in zip(grads, floats)]
        return (*[None] * 6, *wanted)


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
    f" {_ARGUMENTS})"
    " -> (" + ", ".join(["Tensor"] * 13) + ")",
    _backward,
    _backward_fake,
)
