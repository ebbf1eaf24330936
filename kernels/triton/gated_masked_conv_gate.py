"""One stack of a gated layer up to its gate, and the way back through the gate.

    y = dropout(tanh(f₁) ⊙ σ(f₂)),    f = taps · x (+ link · v′) + biases + what class and map add

Both halves of f are made side by side in one block of results, so that the gate is taken where the
products end. tanh and σ come from one exponential each, e = exp(−2|f₁|) and exp(−|f₂|), neither of
which overflows: tanh = ±(1 − e)/(1 + e), σ = 1/(1 + e) or e/(1 + e). Of the hardware's exponential
(relative error below 2⁻²²) and quotient (two units in the last place) and the roundings after them
each is within 2⁻²¹ of the truth, the gate within 2⁻²⁰, both absolute; the slopes 4e/(1 + e)² and
e/(1 + e)² have no difference to cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .halves import halves
from .masked_conv2d_taps import add_products, add_taps, first_pixel, places

# SplitMix64 (Steele, Lea and Flood 2014).
INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_MULTIPLIER = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * FIRST_MULTIPLIER
    bits = (bits ^ (bits >> 27)) * SECOND_MULTIPLIER
    return bits ^ (bits >> 31)


@triton.jit
def _keep(dropout, pixel, first, STACK: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether dropout keeps channels first … of each pixel: a function of seed, stack and place."""
    seed_ptr, least, _ = dropout
    PAIRS: tl.constexpr = (CHANNELS + 1) // 2
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    stream = _mix(seed + tl.full((), STACK + 1, tl.uint64) * INCREMENT)
    count = (pixel * PAIRS + 1)[:, None] + (first // 2 + tl.arange(0, BLOCK // 2))[None, :]
    # One hash serves two channels: its low half the even one, its high half the odd one.
    bits = _mix(stream + count.to(tl.uint64) * INCREMENT)
    keeps = tl.join((bits & 0xFFFFFFFF).to(tl.int64) >= least, (bits >> 32).to(tl.int64) >= least)
    return tl.reshape(keeps, (pixel.shape[0], BLOCK))


@triton.jit
def _tanh(x):
    """tanh(x) and its slope."""
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    value = (1.0 - e) * r
    return tl.where(x < 0, -value, value), 4.0 * e * r * r


@triton.jit
def _sigmoid(x):
    """σ(x) and its slope."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e, 1.0) * r, e * r * r


@triton.jit
def _block(
    pixels, height, width, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of this program: first pixel and channel, places, channels, rows of 2C, and what exists."""
    COLUMN_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0)
    first_c = block % COLUMN_BLOCKS * BLOCK_C
    column = tl.arange(0, 2 * BLOCK_C)
    half_row = (first_c + column % BLOCK_C) % CHANNELS
    f_row = half_row + column // BLOCK_C * CHANNELS
    first = first_pixel(block // COLUMN_BLOCKS, BLOCK_P, pixels)
    place = places(first, BLOCK_P, pixels, height, width)
    c = first_c + tl.arange(0, BLOCK_C)
    exists = (place[0] < pixels)[:, None] & (c < CHANNELS)[None, :]
    return first, first_c, place, c, f_row, exists


@triton.jit
def _gate(
    features,
    class_ptr,
    condition,
    f_row,
    place,
    first,
    pixels,
    CHANNELS: tl.constexpr,
    CONDITION_CHANNELS: tl.constexpr,
    STACK: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """tanh, its slope, σ and its slope, once class and map are added: of 4C, this stack's 2C."""
    added_row = f_row + STACK * 2 * CHANNELS
    if CONDITION_CHANNELS > 0:
        condition_ptr, weight_ptr, steps = condition
        features = add_products(
            *(features, condition_ptr, weight_ptr, added_row, place, steps),
            *(CONDITION_CHANNELS, BLOCK_D, PRECISION, STAGES, INTERPRETED),
        )
    if HAS_CLASS:
        # One row for each picture that the block touches, which mostly are one or two.
        _, picture, _, _, height, width = place
        last = first + tl.minimum(BLOCK_P, pixels - first) - 1
        for now in tl.range(first // width // height, last // width // height + 1):
            at = class_ptr + tl.cast(now, tl.int64) * (4 * CHANNELS) + added_row
            bias = tl.load(at).to(tl.float32)
            features += tl.where((picture == now)[:, None], bias[None, :], 0.0)
    values, gates = halves(features)
    return _tanh(values) + _sigmoid(gates)


@triton.jit
def _convolved(
    own,
    link,
    f_row,
    place,
    dilation,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    UP: tl.constexpr,
    STACK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A stack's features before class and map: its convolution and, of the horizontal, the link.

    `own` and `link` are (input, packed weight, bias, steps) each.
    """
    x_ptr, weight_ptr, bias_ptr, steps = own
    features = add_taps(
        tl.zeros((BLOCK_P, 2 * BLOCK_C), tl.float32),
        *(x_ptr, weight_ptr, f_row, place, dilation, 2 * CHANNELS * CHANNELS, steps),
        *(CHANNELS, TAPS, KERNEL_WIDTH, UP, BLOCK_D, PRECISION, STAGES, INTERPRETED),
    )
    features += tl.load(bias_ptr + f_row).to(tl.float32)[None, :]
    if STACK == 1:
        link_ptr, link_weight_ptr, link_bias_ptr, link_steps = link
        features = add_products(
            *(features, link_ptr, link_weight_ptr, f_row, place, link_steps),
            *(2 * CHANNELS, BLOCK_D, PRECISION, STAGES, INTERPRETED),
        )
        features += tl.load(link_bias_ptr + f_row).to(tl.float32)[None, :]
    return features


@triton.jit
def gated_masked_conv_kernel(
    own,
    link,
    class_ptr,
    condition,
    dropout,
    features_ptr,
    out_ptr,
    pixels,
    height,
    width,
    dilation,
    CHANNELS: tl.constexpr,
    CONDITION_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    UP: tl.constexpr,
    STACK: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # A program owns BLOCK_P pixels and BLOCK_C gated channels of one stack. On chip stay both
    # halves of the features. Written are the gated channels and, of the vertical stack (0), the
    # features that the link reads; never the horizontal stack's, the class's or the map's share.
    block = _block(pixels, height, width, CHANNELS, BLOCK_P, BLOCK_C)
    first, first_c, place, c, f_row, exists = block
    pixel = place[0]
    features = _convolved(
        *(own, link, f_row, place, dilation, CHANNELS, TAPS, KERNEL_WIDTH, UP, STACK),
        *(BLOCK_P, BLOCK_C, BLOCK_D, PRECISION, STAGES, INTERPRETED),
    )
    if STACK == 0:
        # Rounded as the link and the way back read it.
        rounded = features.to(features_ptr.dtype.element_ty)
        value, gate = halves(rounded)
        _store_pair(features_ptr, value, gate, pixel, c, exists, CHANNELS)
        features = rounded.to(tl.float32)
    value, _, gate, _ = _gate(
        *(features, class_ptr, condition, f_row, place, first, pixels),
        *(CHANNELS, CONDITION_CHANNELS, STACK, HAS_CLASS),
        *(BLOCK_P, BLOCK_D, PRECISION, STAGES, INTERPRETED),
    )
    gated = value * gate
    if DROPS:
        keep = _keep(dropout, pixel, first_c, STACK, CHANNELS, BLOCK_C)
        gated = tl.where(keep, gated * dropout[2], 0.0)
    at = out_ptr + (pixel * CHANNELS)[:, None] + c[None, :]
    tl.store(at, gated.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def gated_masked_conv_backward_kernel(
    own,
    link,
    class_ptr,
    condition,
    dropout,
    grad_ptr,
    through,
    features_ptr,
    gated_ptr,
    grad_gate_ptr,
    grad_features_ptr,
    pixels,
    height,
    width,
    dilation,
    CHANNELS: tl.constexpr,
    CONDITION_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    UP: tl.constexpr,
    STACK: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # A program owns BLOCK_P pixels and BLOCK_C gated channels of one stack. On chip stay the
    # features, made again (of the vertical stack, 0, read again), and the gradient of what they
    # gated. Written is the gradient of the features: of the horizontal stack together with what the
    # gate let through, of the vertical one together with what comes back through the link.
    # `through` is (gradient, packed weight, steps) of the 1×1 convolution after the gate ("1"), or
    # of the link ("0").
    block = _block(pixels, height, width, CHANNELS, BLOCK_P, BLOCK_C)
    first, first_c, place, c, f_row, exists = block
    pixel = place[0]
    through_ptr, through_weight_ptr, through_steps = through
    if STACK == 0:
        at = features_ptr + (pixel * (2 * CHANNELS))[:, None] + f_row[None, :]
        features = tl.load(at, mask=(pixel < pixels)[:, None], other=0.0).to(tl.float32)
        at = grad_ptr + (pixel * CHANNELS)[:, None] + c[None, :]
        grad = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    else:
        features = _convolved(
            *(own, link, f_row, place, dilation, CHANNELS, TAPS, KERNEL_WIDTH, UP, STACK),
            *(BLOCK_P, BLOCK_C, BLOCK_D, PRECISION, STAGES, INTERPRETED),
        )
        grad = add_products(
            tl.zeros((BLOCK_P, BLOCK_C), tl.float32),
            *(through_ptr, through_weight_ptr, c % CHANNELS, place, through_steps),
            *(CHANNELS, BLOCK_D, PRECISION, STAGES, INTERPRETED),
        )
    value, value_slope, gate, gate_slope = _gate(
        *(features, class_ptr, condition, f_row, place, first, pixels),
        *(CHANNELS, CONDITION_CHANNELS, STACK, HAS_CLASS),
        *(BLOCK_P, BLOCK_D, PRECISION, STAGES, INTERPRETED),
    )
    if DROPS:
        keep = _keep(dropout, pixel, first_c, STACK, CHANNELS, BLOCK_C)
        grad = tl.where(keep, grad * dropout[2], 0.0)
    if STACK == 1:
        gated = value * gate
        if DROPS:
            gated = tl.where(keep, gated * dropout[2], 0.0)
        at = gated_ptr + (pixel * CHANNELS)[:, None] + c[None, :]
        tl.store(at, gated.to(gated_ptr.dtype.element_ty), mask=exists)
    grad_value = grad * gate * value_slope
    grad_gate = grad * value * gate_slope
    if STACK == 1 or HAS_CLASS or CONDITION_CHANNELS > 0:
        _store_pair(grad_gate_ptr, grad_value, grad_gate, pixel, c, exists, CHANNELS)
    if STACK == 0:
        back = add_products(
            tl.zeros((BLOCK_P, 2 * BLOCK_C), tl.float32),
            *(through_ptr, through_weight_ptr, f_row, place, through_steps),
            *(2 * CHANNELS, BLOCK_D, PRECISION, STAGES, INTERPRETED),
        )
        back_value, back_gate = halves(back)
        grad_value += back_value
        grad_gate += back_gate
        _store_pair(grad_features_ptr, grad_value, grad_gate, pixel, c, exists, CHANNELS)


@triton.jit
def _store_pair(out_ptr, first, second, pixel, c, exists, CHANNELS: tl.constexpr):
    """Both halves of 2C channels, rounded."""
    at = out_ptr + (pixel * (2 * CHANNELS))[:, None] + c[None, :]
    tl.store(at, first.to(out_ptr.dtype.element_ty), mask=exists)
    tl.store(at + CHANNELS, second.to(out_ptr.dtype.element_ty), mask=exists)
