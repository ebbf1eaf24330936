"""masked_conv2d: values, gradients, causality, whatever masked taps and future pixels hold."""

import functools
import importlib

import pytest
import torch
from ops.masked_conv_cases import (
    BACKENDS,
    BUILT,
    CPP,
    inputs_of,
    live_weights,
    step,
    truth,
    truths_and_bounds,
)
from tolerances import UNIT_ROUNDOFF, assert_within

from fastvq import ops

KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (1, 5), (5, 1), (3, 7)]


def _mask(weight, mask_type):
    return live_weights(weight, mask_type)[0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_values_and_gradients(dilation, kernel, mask_type, backend):
    for height, width in [(6, 9), (1, 1), (2, 13)]:
        grad, *inputs = inputs_of((2, 3, height, width), 4, kernel)
        exact, bounds = truths_and_bounds(grad, *inputs, mask_type, dilation)
        convolve = functools.partial(
            ops.masked_conv2d, mask_type=mask_type, dilation=dilation, backend=backend
        )
        ours = step(convolve, grad, *inputs)
        for value, true, bound in zip(ours, exact, bounds):
            assert_within(value, true, bound)
        assert (ours[2][..., ~_mask(inputs[1], mask_type)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize(("groups", "channel_groups"), [(2, 1), (3, 1), (1, 3), (1, 2)])
def test_groups_and_ordered_channels(groups, channel_groups, mask_type, backend):
    for kernel in [(3, 3), (1, 1), (1, 3)]:
        grad, *inputs = inputs_of((2, 6, 4, 5), 12, kernel, groups=groups)
        mask = (mask_type, 1, groups, channel_groups)
        exact, bounds = truths_and_bounds(grad, *inputs, *mask)
        options = dict(zip(("mask_type", "dilation", "groups", "channel_groups"), mask))
        ours = step(
            lambda *leaves, o=options: ops.masked_conv2d(*leaves, backend=backend, **o),
            grad,
            *inputs,
        )
        for value, true, bound in zip(ours, exact, bounds):
            assert_within(value, true, bound)
        live = live_weights(inputs[1], mask_type, channel_groups)
        assert (ours[2][~live] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_red_comes_before_green_before_blue(backend):
    """What no output may see is NaN: later pixels, and later channels of the same pixel."""
    for mask_type, own in (("A", 0), ("B", 1)):
        x, weight = torch.randn(1, 6, 3, 4), torch.randn(9, 6, 3, 3)
        options = {"mask_type": mask_type, "channel_groups": 3, "backend": backend}
        y = ops.masked_conv2d(x, weight, **options)
        live = live_weights(weight, mask_type, 3)
        poisoned = ops.masked_conv2d(x, torch.where(live, weight, torch.nan), **options)
        assert torch.equal(poisoned, y)
        for group in range(3):
            hidden = x.clone()
            hidden[:, 2 * (group + own) :, 1, 2] = torch.nan
            hidden[:, :, 1, 3:] = hidden[:, :, 2:] = torch.nan
            seen = ops.masked_conv2d(hidden, weight, **options)
            mine = slice(3 * group, 3 * group + 3)
            assert torch.equal(seen[:, mine, 1, 2], y[:, mine, 1, 2])
            assert torch.equal(seen[:, :, 0], y[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_masked_taps_and_future_pixels_may_hold_anything(mask_type, backend):
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 5, 3)
    options = {"mask_type": mask_type, "backend": backend}
    y = ops.masked_conv2d(x, weight, **options)
    for junk in (torch.nan, torch.inf):
        poisoned = torch.where(_mask(weight, mask_type), weight, junk)
        assert torch.equal(ops.masked_conv2d(x, poisoned, **options), y)
        ours = [
            step(lambda x, w: ops.masked_conv2d(x, w, **options), torch.ones_like(y), x, w)
            for w in (weight, poisoned)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*ours))
        for pixel in range(30):
            future = torch.arange(30).view(5, 6) >= pixel + (mask_type == "B")
            seen = ops.masked_conv2d(torch.where(future, junk, x), weight, **options)
            upto = torch.arange(30).view(5, 6) <= pixel
            assert torch.equal(seen[..., upto], y[..., upto])


def _sees(pixel, size, kernel, layers):
    """The input pixels that `pixel` sees through type "A", then "B" layers, by their definition."""
    (height, width), (kh, kw) = size, kernel
    seen = {pixel}
    for layer in range(layers):
        taps = [
            (u - kh // 2, v - kw // 2)
            for u in range(kh)
            for v in range(kw)
            if (u, v) < (kh // 2, kw // 2) + (() if layer == layers - 1 else (0,))
        ]
        moved = {(i + a, j + b) for i, j in seen for a, b in taps}
        seen = {(i, j) for i, j in moved if 0 <= i < height and 0 <= j < width}
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(3, 3), (3, 5)])
def test_twelve_layers_see_earlier_pixels_and_no_later(kernel, backend):
    size, layers = (4, 5), 12
    x = torch.rand(1, 2, *size, requires_grad=True)
    weights = [torch.rand(2, 2, *kernel) + 0.1 for _ in range(layers)]
    y = x
    for layer, weight in enumerate(weights):
        y = ops.masked_conv2d(y, weight, mask_type="B" if layer else "A", backend=backend)
    for i in range(size[0]):
        for j in range(size[1]):
            (grad,) = torch.autograd.grad(y[0, 1, i, j], x, retain_graph=True)
            seen = {tuple(place) for place in grad[0].abs().sum(dim=0).nonzero().tolist()}
            assert seen == _sees((i, j), size, kernel, layers)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_gradcheck(mask_type):
    for options in ({}, {"dilation": 3}, {"groups": 2}, {"channel_groups": 2}):
        shapes = [(1, 2, 4, 3), (2, 2 // options.get("groups", 1), 3, 3), (2,)]
        inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        convolve = functools.partial(ops.masked_conv2d, mask_type=mask_type, **options)
        assert torch.autograd.gradcheck(convolve, inputs)
        assert torch.autograd.gradcheck(functools.partial(convolve, backend="reference"), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_empty_batch_and_memory_format(backend):
    options = {"mask_type": "B", "backend": backend}
    weight, x = torch.randn(3, 2, 3, 3), torch.randn(2, 2, 5, 7)
    y = ops.masked_conv2d(x, weight, **options)
    last = x.to(memory_format=torch.channels_last)
    # The same numbers in the same order, whatever the strides.
    for other in (last, torch.randn(2, 2, 5, 14)[..., ::2].copy_(x), last[:, :, :, :]):
        torch.testing.assert_close(ops.masked_conv2d(other, weight, **options), y)
    wide = torch.randn(2, 2, 1, 1).expand(2, 2, 5, 7)
    kept = wide.contiguous()
    torch.testing.assert_close(
        ops.masked_conv2d(wide, weight, **options), ops.masked_conv2d(kept, weight, **options)
    )
    empty = x[:0].clone().requires_grad_()
    weight.requires_grad_()
    nothing = ops.masked_conv2d(empty, weight, **options)
    assert nothing.shape == (0, 3, 5, 7)
    nothing.sum().backward()
    assert empty.grad.shape == (0, 2, 5, 7)
    assert (weight.grad == 0).all()
    if backend != "reference":
        result = ops.masked_conv2d(last, weight, **options)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert ops.masked_conv2d(x, weight, **options).is_contiguous()


def test_only_wanted_gradients():
    x, weight, bias = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.randn(3)
    everything = step(
        lambda *leaves: ops.masked_conv2d(*leaves, mask_type="B"),
        torch.ones(1, 3, 4, 4),
        *(x, weight, bias),
    )[1:]
    for wanted in range(3):
        leaves = [one.clone() for one in (x, weight, bias)]
        leaves[wanted].requires_grad_()
        ops.masked_conv2d(*leaves, mask_type="B").sum().backward()
        assert torch.equal(leaves[wanted].grad, everything[wanted])


def test_autocast_casts_as_conv2d_does():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_conv2d(x, weight, mask_type="B")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    low = [t.detach().bfloat16().double() for t in (x, weight)]
    exact = truth(*low, None, "B")
    size = truth(*(t.abs() for t in low), None, "B")
    # Two rectangles, each summed in float32 and rounded to bfloat16, and their sum rounded.
    assert_within(y, exact, 4 * UNIT_ROUNDOFF[torch.bfloat16] * size)


@pytest.mark.parametrize("backend", [CPP, "reference"])
def test_opcheck_and_compile(backend):
    x, weight, bias = torch.randn(1, 2, 4, 5), torch.randn(4, 2, 3, 3), torch.randn(4)
    raw, grad = torch.ops.fastvq, torch.randn(1, 4, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    for picture, wanted, *mask in (
        (x, [True, True, True], "A", 1, 1, 1),
        (last, [False, True, False], "B", 2, 2, 1),
        (x, [True, False, True], "B", 1, 1, 2),
    ):
        kernel = weight[:, : 2 // mask[2]].contiguous()
        torch.library.opcheck(raw.masked_conv2d.default, (picture, kernel, bias, *mask, backend))
        torch.library.opcheck(
            raw.masked_conv2d_backward.default,
            (grad, picture, kernel, *mask, wanted, backend),
        )
    centre = (x, weight[..., :1, :1], None, "A", 1, 1, 1, backend)
    torch.library.opcheck(raw.masked_conv2d.default, centre)
    compiled = torch.compile(ops.masked_conv2d, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    y = compiled(x, weight, bias, mask_type="A")
    assert torch.equal(y, ops.masked_conv2d(x, weight, bias, mask_type="A"))
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_explain_names_the_kernel_or_why_not(monkeypatch):
    x, weight = torch.randn(1, 64, 8, 8), torch.randn(64, 64, 3, 3)
    monkeypatch.delenv("FASTVQ_CPU_ISA", raising=False)
    has_avx2 = BUILT and "avx2" in importlib.import_module("_fastvq_C").isa_available()
    for op, inputs in (
        ("masked_conv2d", (x, weight)),
        ("causal_conv1d", (x[:, :, 0], weight[:, :, 0])),
    ):
        first = ops.explain(op, *inputs).splitlines()[0]
        assert (first == f"{op}: cpp") == has_avx2
    depthwise = ops.explain("masked_conv2d", x, weight[:, :1])
    assert "PyTorch's own convolution" in depthwise.splitlines()[0]
    assert ("groups of 1 contiguous channels are too small" in depthwise) == has_avx2
    if BUILT:
        monkeypatch.setenv("FASTVQ_CPU_ISA", "generic")
        assert "16-byte vectors" in ops.explain("masked_conv2d", x, weight)
    wide = ops.explain("masked_conv2d", x.double(), weight.double())
    assert "PyTorch's own convolution" in wide.splitlines()[0]


@pytest.mark.parametrize(
    ("x", "weight", "options", "error", "words"),
    [
        (torch.ones(2, 3, 4), torch.ones(1, 3, 3, 3), {}, ValueError, r"x must be \(B, C, H, W\)"),
        (
            torch.ones(2, 3, 4, 4),
            torch.ones(1, 2, 3, 3),
            {},
            ValueError,
            r"weight must be \(O, 3, kh, kw\) to match x \(2, 3, 4, 4\); got \(1, 2, 3, 3\)",
        ),
        (torch.ones(2, 3, 4, 4), torch.ones(1, 3, 2, 3), {}, ValueError, "odd kernel"),
        (
            torch.ones(2, 3, 4, 4),
            torch.ones(1, 3, 3, 3),
            {"mask_type": "C"},
            ValueError,
            'mask_type must be "A" or "B"',
        ),
        (
            torch.ones(2, 3, 4, 4),
            torch.ones(1, 3, 3, 3),
            {"dilation": 0},
            ValueError,
            "dilation must be at least 1; got 0",
        ),
        (
            torch.ones(2, 3, 4, 4).half(),
            torch.ones(1, 3, 3, 3),
            {},
            TypeError,
            "weight must have the dtype of x",
        ),
        (
            torch.ones(2, 3, 4, 4),
            torch.ones(1, 3, 3, 3),
            {"groups": 2},
            ValueError,
            "groups must divide the 3 channels of x",
        ),
        (
            torch.ones(2, 4, 4, 4),
            torch.ones(3, 2, 3, 3),
            {"groups": 2},
            ValueError,
            "groups must divide the 3 output channels",
        ),
        (
            torch.ones(2, 3, 4, 4),
            torch.ones(4, 3, 3, 3),
            {"channel_groups": 3},
            ValueError,
            "channel_groups must divide the 3 input and 4 output channels; got 3",
        ),
        (
            torch.ones(2, 4, 4, 4),
            torch.ones(4, 2, 3, 3),
            {"channel_groups": 2, "groups": 2},
            ValueError,
            "channel_groups must be 1 where groups is not",
        ),
    ],
)
def test_bad_input(x, weight, options, error, words):
    with pytest.raises(error, match=words):
        ops.masked_conv2d(x, weight, **{"mask_type": "B", **options})
