"""Drawing one code of every map from a gated PixelCNN: the products, the attention, the draw.

What a row owes to the rows above (the vertical stack, the link, class and map) arrives as the terms
of the first product of each layer. The order of the launches, and the buffers between them, are
`fastvq.sampling.gpu_rows`'s.

Every kernel reads the position that is drawn from device memory, and none is launched with a size
that depends on it: a CUDA graph holds one code's launches and is replayed for every code.

All sums and features are float32. Weights are float32, or bfloat16 of which every product is still
exact to float32's rounding: a feature is the sum of three bfloat16 numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl

# What a product reads at a time: outputs of one program, inputs of one step of its loop. Alone, a
# sample is a sum over the inputs, without the matrix units; beside others it is a row of a tile.
_ALONE = {"BLOCK_S": 1, "BLOCK_O": 4, "BLOCK_I": 256, "num_warps": 4}
_BESIDE = {"BLOCK_S": 16, "BLOCK_O": 16, "BLOCK_I": 64, "num_warps": 4, "num_stages": 2}
_ATTENTION_POSITIONS = 64

# SplitMix64's constants and the doubt's tolerance: fastvq/sampling's `noise` and `draw`.
_INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
_TOLERANCE = tl.constexpr(2.0**-14)
# Room for the float64 arithmetic of what is compared with it.
_ROUNDING = tl.constexpr(1e-12)


class Columns(NamedTuple):
    """A buffer with a vector for each sample and column, or for each sample: (n, columns, C).

    `tensor` points at column 0 of the row; `sample`, `column` and `position` are its strides, the
    latter two 0 where the buffer has no such dimension.
    """

    tensor: Tensor
    sample: int
    column: int = 0
    position: int = 0


@triton.jit
def _gate(values, gates):
    """tanh of the values times sigmoid of the gates; beyond 10, tanh is 1 in float32."""
    values = tl.minimum(tl.maximum(values, -10.0), 10.0)
    gates = tl.maximum(gates, -40.0)
    e = tl.exp(2.0 * values)
    return (e - 1.0) / ((e + 1.0) * (1.0 + tl.exp(-gates)))


@triton.jit
def _widened(a, b, c, weight):
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), weight.to(tl.float32)


@triton.jit
def _add_product(sums, x, weight, BLOCK_S: tl.constexpr, INTERPRETED: tl.constexpr):
    """sums + x · weightᵀ; with one sample the terms stay apart, for one reduction at the end."""
    if BLOCK_S == 1:
        sums += x * weight.to(tl.float32)
    elif weight.dtype == tl.bfloat16:
        # x = a + b + c to 24 bits: three products on the matrix units, each exact.
        a = x.to(tl.bfloat16)
        x -= a.to(tl.float32)
        b = x.to(tl.bfloat16)
        c = (x - b.to(tl.float32)).to(tl.bfloat16)
        weight = tl.trans(weight)
        if INTERPRETED:  # its products take no bfloat16
            a, b, c, weight = _widened(a, b, c, weight)
        sums = tl.dot(c, weight, sums)
        sums = tl.dot(b, weight, sums)
        sums = tl.dot(a, weight, sums)
    else:
        sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
    return sums


@triton.jit
def _row_product_kernel(
    x_ptr,
    weight_ptr,
    terms_ptr,
    residual_ptr,
    y_ptr,
    head_ptr,
    position_ptr,
    num_samples,
    width,
    dilation,
    stride_xs,
    stride_xc,
    stride_ts,
    stride_tc,
    stride_tp,
    stride_rs,
    stride_rc,
    stride_ys,
    stride_yc,
    stride_yp,
    INPUTS: tl.constexpr,
    TAPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEAD: tl.constexpr,
    GATED: tl.constexpr,
    RECTIFIED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # A program owns BLOCK_S samples and BLOCK_O outputs, of both halves where they are gated: the
    # features before the gate are never written. The first HEAD outputs go to a buffer of their
    # own.
    position = tl.load(position_ptr)
    column = position % width
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_s, in_o = s < num_samples, o < OUTPUTS
    ROWS: tl.constexpr = BLOCK_O if BLOCK_S == 1 else BLOCK_S
    COLUMNS: tl.constexpr = BLOCK_I if BLOCK_S == 1 else BLOCK_O
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tap in tl.static_range(TAPS):
        for start in range(0, INPUTS, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            in_i = i < INPUTS
            x = tl.load(
                x_ptr + (s * stride_xs + (column + tap * dilation) * stride_xc)[:, None] + i,
                mask=in_s[:, None] & in_i,
                other=0.0,
            )
            if RECTIFIED:
                x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            at = weight_ptr + (o * TAPS + tap)[:, None] * INPUTS + i
            mask = in_o[:, None] & in_i
            sums = _add_product(sums, x, tl.load(at, mask=mask, other=0.0), BLOCK_S, INTERPRETED)
            if GATED:
                weight = tl.load(at + OUTPUTS * TAPS * INPUTS, mask=mask, other=0.0)
                gates = _add_product(gates, x, weight, BLOCK_S, INTERPRETED)
    if BLOCK_S == 1:
        sums = tl.sum(sums, axis=1)[None, :]
        gates = tl.sum(gates, axis=1)[None, :]

    mask = in_s[:, None] & in_o
    terms = terms_ptr + (s * stride_ts + column * stride_tc + position * stride_tp)[:, None] + o
    y = sums + tl.load(terms, mask=mask, other=0.0)
    if GATED:
        y = _gate(y, gates + tl.load(terms + OUTPUTS, mask=mask, other=0.0))
    if HAS_RESIDUAL:
        at = residual_ptr + (s * stride_rs + column * stride_rc)[:, None] + o
        y += tl.load(at, mask=mask, other=0.0)
    at = y_ptr + (s * stride_ys + column * stride_yc + position * stride_yp)[:, None] + o - HEAD
    tl.store(at, y, mask=mask & (o >= HEAD))
    if HEAD > 0:
        tl.store(head_ptr + (s * HEAD)[:, None] + o, y, mask=mask & (o < HEAD))


@triton.jit
def _attend_kernel(
    query_ptr,
    cache_ptr,
    y_ptr,
    position_ptr,
    num_positions,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns one head of one sample and walks the keys and values up to the position, with
    # a running maximum: the scores are never written.
    sample, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    CHANNELS: tl.constexpr = HEADS * SIZE
    d = tl.arange(0, BLOCK_D)
    in_d = d < SIZE
    own = sample * CHANNELS + head * SIZE + d
    query = tl.load(query_ptr + own, mask=in_d, other=0.0) * scale
    position = tl.load(position_ptr)
    most = -float("inf")
    total = 0.0
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, position + 1, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        seen = p <= position
        at = cache_ptr + ((sample * num_positions + p) * (2 * CHANNELS))[:, None] + head * SIZE + d
        mask = seen[:, None] & in_d
        keys = tl.load(at, mask=mask, other=0.0)
        values = tl.load(at + CHANNELS, mask=mask, other=0.0)
        scores = tl.where(seen, tl.sum(query[None, :] * keys, axis=1), -float("inf"))
        above = tl.maximum(most, tl.max(scores, axis=0))
        weights = tl.exp(scores - above)
        kept = tl.exp(most - above)
        sums = sums * kept + tl.sum(weights[:, None] * values, axis=0)
        total = total * kept + tl.sum(weights, axis=0)
        most = above
    tl.store(y_ptr + own, sums / total, mask=in_d)


@triton.jit
def _mix(bits):
    """SplitMix64's output function."""
    bits = (bits ^ (bits >> 30)) * _MULTIPLIER_1
    bits = (bits ^ (bits >> 27)) * _MULTIPLIER_2
    return bits ^ (bits >> 31)


@triton.jit
def _gumbel(state, k):
    """−log(−log u), u = (m + ½)·2⁻⁵² with m the top 52 of code k's 64 bits; float64."""
    bits = _mix(state + (k + 1).to(tl.uint64) * _INCREMENT) >> 12
    uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _sum_where(condition, weights):
    return tl.sum(tl.where(condition, weights, 0.0), axis=0)


@triton.jit
def _top_k_bounds(ordered, delta, top_k, rank):
    """(sure, floor): top-k keeps for certain what lies above `sure`, and nothing below `floor`."""
    after = tl.max(tl.where(rank == top_k, ordered, -float("inf")), axis=0)
    last = tl.max(tl.where(rank == top_k - 1, ordered, -float("inf")), axis=0)
    return after + 2 * delta, last - 2 * delta


@triton.jit
def _top_p_floor(scaled, ordered, weights, sure, floor, delta, top_p):
    """The least value that top-p may keep, of those from `floor` on; see `_draw_code_kernel`."""
    most = top_p * tl.exp(2 * delta) * _sum_where(scaled >= floor, weights)
    top = tl.max(ordered, axis=0)
    within = tl.where(ordered > sure, tl.exp(ordered - top), 0.0)
    before = tl.cumsum(within, axis=0) - within
    # The first that is out at face value. Every code 2 delta below it has more mass before it; it
    # may itself be kept unless the codes that are above it for certain are too much already.
    border = tl.max(tl.where(before > most, ordered, -float("inf")), axis=0)
    is_out = _sum_where((scaled > border + 2 * delta) & (scaled > sure), weights) > most
    above = tl.min(tl.where(scaled > border, scaled, float("inf")), axis=0)
    return tl.maximum(floor, tl.where(is_out, above, border - 2 * delta))


@triton.jit
def _draw_code_kernel(
    logits_ptr,
    states_ptr,
    codes_ptr,
    doubts_ptr,
    embedding_ptr,
    input_ptr,
    position_ptr,
    rule_ptr,
    num_positions,
    width,
    top_k,
    stride_is,
    stride_ic,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    DRAWN: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A program owns one sample: it draws its code unless it is known, says whether an error within
    # the tolerance could have flipped the draw, and writes the code's embedding as the first
    # layer's input. Noise and scores stay on chip.
    #
    # The proof is that of fastvq/sampling/draw.py; but where that bounds what top-k and top-p keep
    # for every code, this does so for two alone, so that one sort serves: the winner must be kept
    # for certain, and it must lead over all that may be kept.
    sample = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr)
    here = sample * num_positions + position
    code = tl.load(codes_ptr + here)
    if DRAWN:
        k = tl.arange(0, BLOCK_K)
        inside = k < K
        logits = tl.load(logits_ptr + sample * K + k, mask=inside, other=0.0)
        finite = tl.min((tl.abs(logits) < float("inf")).to(tl.int32), axis=0) == 1
        # A code is drawn from whatever is there: who settles the doubt finds what is not finite.
        logits = tl.where(finite, logits, 0.0)
        largest = tl.max(tl.abs(logits), axis=0).to(tl.float64)
        logits = tl.where(inside, logits, -float("inf"))
        delta = _TOLERANCE * tl.maximum(largest, 1.0)
        scores = logits.to(tl.float64)
        certain = finite
        if not GREEDY:
            temperature, top_p = tl.load(rule_ptr), tl.load(rule_ptr + 1)
            scaled = scores / temperature
            delta = delta / temperature
            state = tl.load(states_ptr + sample).to(tl.uint64)
            state = _mix(state + (position + 1).to(tl.uint64) * _INCREMENT)
            scores = scaled + _gumbel(state, k)
            if TOP_K or TOP_P:
                ordered = tl.sort(logits, descending=True).to(tl.float64) / temperature
                wide = delta + _ROUNDING
                sure = tl.full((), -float("inf"), tl.float64)
                floor = sure
                if TOP_K:
                    sure, floor = _top_k_bounds(ordered, wide, top_k, k)
                least = floor
                if TOP_P:
                    weights = tl.exp(scaled - tl.max(scaled, axis=0))
                    least = _top_p_floor(scaled, ordered, weights, sure, floor, wide, top_p)
                scores = tl.where(scaled >= least, scores, -float("inf"))
        best = tl.max(scores, axis=0)
        winner = tl.min(tl.where(scores == best, k, BLOCK_K), axis=0)
        second = tl.max(tl.where(k == winner, -float("inf"), scores), axis=0)
        certain = certain & (best - second >= 2 * delta)
        if TOP_K or TOP_P:
            value = tl.max(tl.where(k == winner, scaled, -float("inf")), axis=0)
            certain = certain & (value > sure)
            if TOP_P:
                before = (scaled >= value - 2 * wide) & (scaled >= floor) & (k != winner)
                most = _sum_where(before, weights) * tl.exp(2 * wide)
                certain = certain & (most < top_p * _sum_where(scaled > sure, weights))
        drawn = code < 0
        tl.store(doubts_ptr + here, (drawn & ~certain).to(tl.int8))
        code = tl.where(drawn, winner.to(tl.int64), code)
        tl.store(codes_ptr + here, code)
    c = tl.arange(0, BLOCK_C)
    embedded = tl.load(embedding_ptr + code * CHANNELS + c, mask=c < CHANNELS, other=0.0)
    at = input_ptr + sample * stride_is + (position % width) * stride_ic + c
    tl.store(at, embedded, mask=c < CHANNELS)


def row_product(
    x: Columns,
    weight: Tensor,
    terms: Columns,
    y: Columns,
    position: Tensor,
    width: int,
    *,
    taps: int = 1,
    dilation: int = 1,
    gated: bool = False,
    rectified: bool = False,
    residual: Columns | None = None,
    head: Tensor | None = None,
) -> None:
    """One product of every sample's features at the position that is drawn, written to y.

        y = f(Σ_tap weight[:, tap] · x[column + tap·dilation] + terms) + residual

    f is the gate where `gated` (of 2C outputs, values first, C are left), else nothing.

    Args:
        x: inputs, float32; `rectified` takes their positive part first.
        weight: (outputs, taps, inputs) float32 or bfloat16, contiguous.
        terms: of every output.
        y: where the outputs go, all but the first `head.shape[1]`.
        position: (1,) int64, raster index in the map.
        width: of the map.
        head: (n, outputs that go here), contiguous, or None.
    """
    outputs, inputs = weight.shape[0] // (1 + gated), weight.shape[2]
    num_samples = y.tensor.shape[0]
    tile = dict(_ALONE if num_samples == 1 else _BESIDE)
    tile["BLOCK_I"] = min(tile["BLOCK_I"], max(16, triton.next_power_of_2(inputs)))
    old = y if residual is None else residual
    grid = (triton.cdiv(num_samples, tile["BLOCK_S"]), triton.cdiv(outputs, tile["BLOCK_O"]))
    _row_product_kernel[grid](
        x.tensor,
        weight,
        terms.tensor,
        old.tensor,
        y.tensor,
        y.tensor if head is None else head,
        position,
        num_samples,
        width,
        dilation,
        *(x.sample, x.column),
        *(terms.sample, terms.column, terms.position),
        *(old.sample, old.column),
        *(y.sample, y.column, y.position),
        INPUTS=inputs,
        TAPS=taps,
        OUTPUTS=outputs,
        HEAD=0 if head is None else head.shape[1],
        GATED=gated,
        RECTIFIED=rectified,
        HAS_RESIDUAL=residual is not None,
        INTERPRETED=not weight.is_cuda,
        enable_fp_fusion=True,
        **tile,
    )


def attend(query: Tensor, cache: Tensor, y: Tensor, position: Tensor, heads: int) -> None:
    """One query of every sample and head against the keys and values up to the position.

    Args:
        query, y: (n, C) float32, heads side by side.
        cache: (n, positions, 2C) float32: keys, then values.
        position: (1,) int64.
    """
    num_samples, channels = query.shape
    size = channels // heads
    _attend_kernel[num_samples, heads](
        query,
        cache,
        y,
        position,
        cache.shape[1],
        size**-0.5,
        HEADS=heads,
        SIZE=size,
        BLOCK_P=_ATTENTION_POSITIONS,
        BLOCK_D=triton.next_power_of_2(size),
        enable_fp_fusion=True,
        num_warps=4,
    )


def draw_code(
    logits: Tensor | None,
    states: Tensor,
    codes: Tensor,
    doubts: Tensor,
    embedding: Tensor,
    first_input: Columns,
    position: Tensor,
    rule: Tensor,
    *,
    greedy: bool,
    top_k: int | None,
    top_p: bool,
) -> None:
    """Draw every sample's code at the position where it is −1, and embed it.

    Args:
        logits: (n, K) float32; None where every sample's code is known.
        states: (n,) int64, the noise's state before the position enters it.
        codes: (n, H, W) int64; written.
        doubts: (n, H, W) int8: 1 where an error within the tolerance could flip the draw, or a
            logit is not finite.
        embedding: (K, C) float32.
        first_input: the first layer's input, written at the position's column.
        position: (1,) int64.
        rule: (2,) float64, temperature and top-p, read unless `greedy` and where `top_p`.
    """
    num_codes, channels = embedding.shape
    block = triton.next_power_of_2(max(num_codes, 2))
    cut = not greedy and top_k is not None and top_k < num_codes
    _draw_code_kernel[(codes.shape[0],)](
        embedding if logits is None else logits,
        states,
        codes,
        doubts,
        embedding,
        first_input.tensor,
        position,
        rule,
        codes[0].numel(),
        codes.shape[2],
        top_k if cut else 0,
        *(first_input.sample, first_input.column),
        K=num_codes,
        CHANNELS=channels,
        DRAWN=logits is not None,
        GREEDY=greedy,
        TOP_K=cut,
        TOP_P=not greedy and top_p,
        BLOCK_K=block,
        BLOCK_C=triton.next_power_of_2(channels),
        enable_fp_fusion=True,
        num_warps=min(16, max(4, block // 128)),
    )
