"""masked_conv2d and causal_conv1d: values, gradients, causality, whatever masked taps hold."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import UNIT_ROUNDOFF, assert_within

from fastvq import ops

KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (1, 5), (5, 1), (3, 7)]


def _mask(weight, mask_type):
    kh, kw = weight.shape[2:]
    raster = torch.arange(kh * kw).view(kh, kw)
    centre = (kh // 2) * kw + kw // 2
    return raster < centre if mask_type == "A" else raster <= centre


def _truth(x, weight, bias, mask_type, dilation):
    """The textbook form, in float64: the weight times its mask."""
    masked = torch.where(_mask(weight, mask_type), weight, 0.0).double()
    padding = [dilation * (size // 2) for size in weight.shape[2:]]
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), masked, bias, padding=padding, dilation=dilation)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_values_and_gradients(dilation, kernel, mask_type, backend):
    for height, width in [(6, 9), (1, 1), (2, 13)]:
        x = torch.randn(2, 3, height, width, requires_grad=True)
        weight = torch.randn(4, 3, *kernel, requires_grad=True)
        bias = torch.randn(4, requires_grad=True)
        grad = torch.randn(2, 4, height, width)
        options = {"mask_type": mask_type, "dilation": dilation}
        y = ops.masked_conv2d(x, weight, bias, backend=backend, **options)
        y.backward(grad)
        ours = [y, x.grad, weight.grad, bias.grad]
        wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        truth = _truth(*wide, mask_type, dilation)
        truth.backward(grad.double())
        sizes = [t.detach().abs().double().requires_grad_() for t in (x, weight, bias)]
        size = _truth(*sizes, mask_type, dilation)
        size.backward(grad.double().abs())
        terms = [
            3 * weight[0, 0].numel() + 1,
            4 * weight[0, 0].numel(),
            grad[:, 0].numel(),
            grad[:, 0].numel(),
        ]
        truths = [truth, *(t.grad for t in wide)]
        magnitudes = [size, *(t.grad for t in sizes)]
        for value, exact, count, magnitude in zip(ours, truths, terms, magnitudes):
            # A sum of `count` products: one rounding for each product and each addition.
            assert_within(value, exact, (count + 1) * UNIT_ROUNDOFF[torch.float32] * magnitude)
        assert (weight.grad[..., ~_mask(weight, mask_type)] == 0).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_masked_taps_and_future_pixels_may_hold_anything(mask_type, backend):
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 5, 3)
    options = {"mask_type": mask_type, "backend": backend}
    y = ops.masked_conv2d(x, weight, **options)
    poisoned = torch.where(_mask(weight, mask_type), weight, torch.nan)
    assert torch.equal(ops.masked_conv2d(x, poisoned, **options), y)
    row, column = 2, 3
    future = torch.arange(30).view(5, 6) >= row * 6 + column + (mask_type == "B")
    seen = ops.masked_conv2d(torch.where(future, torch.nan, x), weight, **options)
    upto = torch.arange(30).view(5, 6) <= row * 6 + column
    assert torch.equal(seen[..., upto], y[..., upto])


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_gradcheck(mask_type):
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in [(1, 2, 4, 3), (2, 2, 3, 3), (2,)]
    )
    for dilation in (1, 3):
        assert torch.autograd.gradcheck(
            lambda *t, d=dilation: ops.masked_conv2d(*t, mask_type=mask_type, dilation=d),
            (x, weight, bias),
        )


def test_strides_empty_batch_and_channels_last():
    weight = torch.randn(3, 2, 3, 3)
    x = torch.randn(2, 2, 5, 7)
    y = ops.masked_conv2d(x, weight, mask_type="B")
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.masked_conv2d(last, weight, mask_type="B"), y)
    assert ops.masked_conv2d(x[:0], weight, mask_type="A").shape == (0, 3, 5, 7)


def test_autocast_casts_as_conv2d_does():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_conv2d(x, weight, mask_type="B")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    low = [t.detach().bfloat16().double() for t in (x, weight)]
    truth = _truth(*low, None, "B", 1)
    size = _truth(*(t.abs() for t in low), None, "B", 1)
    # Two rectangles, each summed in float32 and rounded to bfloat16, and their sum rounded.
    assert_within(y, truth, 4 * UNIT_ROUNDOFF[torch.bfloat16] * size)


def test_opcheck_and_compile():
    x, weight, bias = torch.randn(1, 2, 4, 5), torch.randn(3, 2, 3, 3), torch.randn(3)
    raw = torch.ops.fastvq
    torch.library.opcheck(raw.masked_conv2d.default, (x, weight, bias, "A", 1, 1, 1, "cpp"))
    torch.library.opcheck(
        raw.masked_conv2d.default, (x, weight[..., :1, :1], None, "A", 1, 1, 1, "reference")
    )
    grad = torch.randn(1, 3, 4, 5)
    torch.library.opcheck(
        raw.masked_conv2d_backward.default, (grad, x, weight, "B", 2, 1, 1, [True] * 3, "cpp")
    )
    compiled = torch.compile(ops.masked_conv2d, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    y = compiled(x, weight, bias, mask_type="A")
    assert torch.equal(y, ops.masked_conv2d(x, weight, bias, mask_type="A"))
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_causal_conv1d(mask_type, backend):
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64)
    for dilation in (1, 2):
        y = ops.causal_conv1d(
            x, weight, bias, mask_type=mask_type, dilation=dilation, backend=backend
        )
        truth = _truth(x[:, :, None], weight[:, :, None], bias, mask_type, dilation)[:, :, 0]
        torch.testing.assert_close(y, truth)
    assert torch.autograd.gradcheck(
        lambda x, w: ops.causal_conv1d(x, w, mask_type=mask_type, backend=backend), (x, weight)
    )


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
    ],
)
def test_bad_input(x, weight, options, error, words):
    with pytest.raises(error, match=words):
        ops.masked_conv2d(x, weight, **{"mask_type": "B", **options})
