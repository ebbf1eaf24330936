"""The filtered convolutions: values and gradients, what they see, every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops.winograd_sizes import roundings, winograd_sizes
from tolerances import assert_within, rounding_bound, sum_bound
from torch import Tensor

from fastvq.ops import live_taps

_C = pytest.importorskip("_fastvq_C", reason="the C++ kernels are not built")

# Batch, channels, height, width; output channels; rows and columns of taps; first tap. Odd, even
# and one-wide pictures of at least 1024 pixels together, planes and blocks begun and ended, every
# form along both axes.
CASES = [
    ((17, 16, 7, 9), 16, (1, 2), (0, -1)),
    ((19, 16, 8, 7), 17, (2, 1), (-1, 0)),
    ((8, 70, 11, 13), 130, (2, 3), (-1, -1)),
    ((8, 130, 12, 12), 64, (2, 3), (0, -1)),
    ((1, 33, 1, 1100), 48, (1, 5), (0, -4)),
    ((7, 20, 150, 1), 40, (5, 2), (-5, -1)),
    ((4, 16, 17, 19), 16, (4, 4), (-4, -4)),
    ((6, 16, 9, 20), 24, (3, 5), (-2, -2)),
    ((1, 16, 3, 1500), 16, (2, 5), (-2, -2)),
]


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class _Call:
    """One convolution's arguments, and its three directions by the kernels and in float64."""

    def __init__(self, shape, outputs, kernel, first) -> None:
        self.first = first
        self.x, self.grad = torch.randn(shape), torch.randn(shape[0], outputs, *shape[2:])
        self.weight = torch.randn(outputs, shape[1], *kernel)
        self.taps = tuple(
            live_taps.Tap(u, v, first[0] + u, first[1] + v)
            for u in range(kernel[0])
            for v in range(kernel[1])
        )
        every = ((0, outputs), (0, shape[1]))
        self.parts = (live_taps.Part(*every, (0, 0)),)
        self.parts_of_x = (live_taps.Part(*reversed(every), (0, 0)),)

    def run(self, winograd: bool = True) -> list[Tensor]:
        """The output and the gradients to x and weight."""
        y, grad_x = torch.empty_like(self.grad), torch.empty_like(self.x)
        grad_weight = torch.zeros_like(self.weight)
        how = {"winograd": winograd}
        live_taps.forward(self.x, self.weight, None, y, self.taps, self.parts, **how)
        live_taps.backward_x(self.grad, self.weight, grad_x, self.taps, self.parts_of_x, **how)
        live_taps.backward_weight(
            self.grad, self.x, grad_weight, None, self.taps, self.parts, **how
        )
        return [y, grad_x, grad_weight]

    def truth(self, convolve, sizes: bool = False) -> list[Tensor]:
        x, weight, grad = (one.double() for one in (self.x, self.weight, self.grad))
        if sizes:
            x, weight, grad = x.abs(), weight.abs(), grad.abs()
        x.requires_grad_(), weight.requires_grad_()
        y = convolve(x, weight)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        (up, left), (rows, columns) = self.first, weight.shape[2:]
        return F.conv2d(F.pad(x, (-left, left + columns - 1, -up, up + rows - 1)), weight)

    def sizes(self, x: Tensor, weight: Tensor) -> Tensor:
        return winograd_sizes(x, weight, self.first)

    def sees(self, place: tuple[int, int]) -> Tensor:
        """(H, W) bool: which outputs a pixel is seen by."""
        one = torch.zeros(1, 1, *self.x.shape[2:], dtype=torch.float64)
        one[0, 0, place[0], place[1]] = 1.0
        return self.plain(one, torch.ones(1, 1, *self.weight.shape[2:]).double())[0, 0] > 0


@pytest.mark.parametrize("isa", _C.isa_available())
def test_equals_the_truth(isa, monkeypatch) -> None:
    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
    for case in CASES:
        call = _Call(*case)
        found, plain = call.run(), call.run(winograd=False)
        sizes = call.truth(call.sizes, sizes=True)
        tiles = call.grad[:, 0].numel()
        summed = (call.weight.shape[1], call.weight.shape[0], tiles)
        for value, other, true, size, n in zip(found, plain, call.truth(call.plain), sizes, summed):
            assert not torch.equal(value, other)  # or it was not filtered
            assert_within(value, true, sum_bound(roundings(n), size))


def test_adds_into_the_output() -> None:
    call = _Call(*CASES[2])
    bias, before = torch.randn(130), torch.randn_like(call.grad)
    y, expected = before.clone(), torch.empty_like(before)
    live_taps.forward(call.x, call.weight, None, expected, call.taps, call.parts, winograd=True)
    live_taps.forward(call.x, call.weight, bias, y, call.taps, call.parts, add=True, winograd=True)
    exact = expected.double() + bias.double()[:, None, None] + before.double()
    assert_within(y, exact, 2 * rounding_bound(exact.abs() + before.abs(), torch.float32))


@pytest.mark.parametrize("isa", _C.isa_available())
def test_outputs_see_their_own_pixels_alone(isa, monkeypatch) -> None:
    """NaN anywhere: exactly the outputs that see it become NaN, the others keep every bit."""
    monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
    for kernel, first in (((2, 3), (-1, -1)), ((3, 5), (-3, -2)), ((1, 4), (0, -4))):
        call = _Call((36, 16, 5, 6), 16, kernel, first)
        clean = call.run()[0]
        pixels = [(i, j) for i in range(5) for j in range(6)]
        for image, (i, j) in enumerate(pixels):
            call.x[image, 3, i, j] = torch.nan
        y = call.run()[0]
        assert torch.equal(y[30:], clean[30:])
        for image, place in enumerate(pixels):
            seen = call.sees(place)
            assert y[image][:, seen].isnan().all()
            assert torch.equal(y[image][:, ~seen], clean[image][:, ~seen])


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (9, 8)])
def test_weight_gradients_leave_out_what_no_tap_sees(size) -> None:
    """Overhanging tiles would multiply it by a gradient of zero."""
    call = _Call((17, 16, *size), 16, (2, 2), (-2, -2))
    clean = call.run()
    call.x[:, :, -1] = torch.nan
    call.x[:, :, :, -1] = torch.inf
    found = call.run()
    assert all(torch.equal(a, b) for a, b in zip(found, clean))


def test_same_on_every_thread_count_and_again() -> None:
    for case in (CASES[2], CASES[4], CASES[7]):
        call, results = _Call(*case), []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(call.run())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_only_float32_rectangles_are_filtered() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        call = _Call(*CASES[2])
        call.x, call.weight, call.grad = (one.to(dtype) for one in (call.x, call.weight, call.grad))
        assert all(torch.equal(a, b) for a, b in zip(call.run(), call.run(winograd=False)))
    missing = _Call(*CASES[2])
    missing.taps = missing.taps[1:]
    assert all(torch.equal(a, b) for a, b in zip(missing.run(), missing.run(winograd=False)))
