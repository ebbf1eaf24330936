"""The C++ convolutions over live taps: every instruction set, dtype, layout and thread count."""

from __future__ import annotations

import pytest
import torch
from ops.masked_conv_cases import inputs_of, step, truths_and_bounds
from tolerances import assert_within
from torch import Tensor

from fastvq import ops
from fastvq.ops import live_taps

_C = pytest.importorskip("_fastvq_C", reason="the C++ kernels are not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
# Batch, channels, height, width; output channels; kernel; dilation. Planes of 64 channels and the
# tiles of every width begun and ended; odd widths; rows and columns longer than a block.
SHAPES = [
    ((2, 3, 5, 7), 4, (3, 3), 1),
    ((1, 70, 3, 9), 130, (3, 5), 1),
    ((1, 129, 2, 5), 17, (3, 3), 1),
    ((2, 33, 4, 32), 48, (5, 5), 2),
    ((1, 2, 1, 1100), 3, (1, 3), 5),
    ((1, 2, 150, 1), 35, (3, 3), 1),
    ((3, 5, 2, 600), 2, (3, 3), 1),
    ((2, 5, 3, 3), 6, (7, 7), 4),
    ((2, 8, 4, 4), 8, (1, 1), 1),
]


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _step(grad: Tensor, *inputs: Tensor, **options: str | int) -> list[Tensor]:
    return step(lambda *t: ops.masked_conv2d(*t, backend="cpp", **options), grad, *inputs)


@pytest.mark.parametrize("isa", _C.isa_available())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_the_truth(isa, dtype, memory_format, monkeypatch) -> None:
    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
    for i, (shape, outputs, kernel, dilation) in enumerate(SHAPES):
        grad, *inputs = inputs_of(shape, outputs, kernel, dtype=dtype, memory_format=memory_format)
        mask = {"mask_type": "AB"[i % 2], "dilation": dilation}
        exact, bounds = truths_and_bounds(grad, *inputs, *mask.values())
        for value, true, bound in zip(_step(grad, *inputs, **mask), exact, bounds):
            assert value.dtype == dtype
            assert_within(value, true, bound)


@pytest.mark.parametrize("isa", _C.isa_available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordered_channels_that_cut_words_and_planes(isa, dtype, monkeypatch) -> None:
    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
    for channels, outputs in ((9, 15), (150, 6), (6, 150)):
        grad, *inputs = inputs_of((1, channels, 3, 5), outputs, (3, 3), dtype=dtype)
        exact, bounds = truths_and_bounds(grad, *inputs, "A", 1, 1, 3)
        ours = _step(grad, *inputs, mask_type="A", channel_groups=3)
        for value, true, bound in zip(ours, exact, bounds):
            assert_within(value, true, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_on_every_thread_count_and_again(dtype) -> None:
    for shape in ((5, 70, 9, 33), (1, 20, 1, 2000)):
        grad, *inputs = inputs_of(shape, 80, (3, 3), dtype=dtype)
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(_step(grad, *inputs, mask_type="B"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("isa", _C.isa_available())
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_seen_may_hold_anything(isa, dtype, monkeypatch) -> None:
    """Odd sizes: no word pairs something seen with something that is not."""
    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
    for mask_type, own in (("A", 0), ("B", 1)):
        grad, x, weight, bias = inputs_of((1, 3, 4, 5), 5, (3, 3), dtype=dtype)
        y = _step(grad, x, weight, bias, mask_type=mask_type)
        raster = torch.arange(20).view(4, 5)
        for pixel in range(20):
            later = raster >= pixel + own
            hidden = torch.where(later, torch.nan, x)
            mine = torch.where(raster == pixel, grad, 0.0)
            ours = _step(mine, hidden, weight, bias, mask_type=mask_type)
            assert torch.equal(ours[0][..., raster <= pixel], y[0][..., raster <= pixel])
            # A gradient of one pixel: finite weights' gradients need every later pixel unread
            # except where zeros of the gradient meet them.
            assert ours[1].isfinite().all()
        # The last pixel is nobody's past under type "A", though its neighbour in a word is.
        x[..., -1, -1] = torch.nan
        ours = _step(grad, x, weight, bias, mask_type=mask_type)
        live = torch.arange(9).view(3, 3) < 4
        assert ours[2][..., live].isfinite().all()


def test_adds_into_the_output() -> None:
    """The vertical stack's rectangle, rows above and the own row, as a set of live taps."""
    taps = tuple(live_taps.Tap(u, v, u - 1, v - 1) for u in range(2) for v in range(3))
    x, weight = torch.randn(2, 5, 4, 6), torch.randn(7, 5, 2, 3)
    parts, _ = live_taps.masked_parts("B", 1, 1, 5, 7)
    before = torch.randn(2, 7, 4, 6)
    y = before.clone()
    live_taps.forward(x, weight, None, y, taps, parts, add=True)
    padded = torch.nn.functional.pad(x.double(), (1, 1, 1, 0))
    exact = torch.nn.functional.conv2d(padded, weight.double()) + before
    size = torch.nn.functional.conv2d(padded.abs(), weight.double().abs()) + before.abs()
    # 30 products and what was there.
    assert_within(y, exact, 32 * 2.0**-24 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_expanded_pictures(dtype) -> None:
    grad, x, weight, bias = inputs_of((2, 6, 6, 10), 7, (3, 3), dtype=dtype)
    strided = torch.randn(2, 9, 12, 20).to(dtype)[:, 1:7, ::2, ::2]
    strided.copy_(x)
    expected = _step(grad, x, weight, bias, mask_type="B")
    leaves = [strided.requires_grad_(), weight.requires_grad_()]
    y = ops.masked_conv2d(*leaves, bias, mask_type="B", backend="cpp")
    ones = grad[:, :, :1, :1].expand(y.shape)
    assert torch.equal(y, expected[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            torch.autograd.grad(y, leaves, ones, retain_graph=True),
            torch.autograd.grad(y, leaves, ones.contiguous()),
        )
    )
