"""Every convolution of PyTorch's that an op runs on CUDA is told to be repeatable.

A CPU's tensors stand in for a GPU's: which bits come out, tests/cuda shows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.ops import gated_convolutions, live_rectangles
from fastvq.ops.repeatable import repeatable

cudnn = torch.backends.cudnn


Seen = dict[str, set[tuple[bool, bool]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(deterministic, benchmark) at every convolution, by direction."""
    found: Seen = {}

    def watch(owner: object, name: str) -> None:
        convolve = getattr(owner, name)

        def watched(*args, **kwargs):
            found.setdefault(name, set()).add((cudnn.deterministic, cudnn.benchmark))
            return convolve(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(F, "conv2d")
    watch(torch.ops.aten, "convolution_backward")
    return found


@pytest.fixture(autouse=True)
def _switches_of_the_user():
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = False, True
    yield
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    cudnn.deterministic, cudnn.benchmark = before


def _run_rectangles(x: Tensor, weight: Tensor, channel_groups: int) -> None:
    mask = live_rectangles.Mask("B", 1, 1, channel_groups)
    y = torch.empty_like(x)
    live_rectangles.forward(x, weight, None, mask, y)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    live_rectangles.backward(y, x, weight, mask, grad_x, grad_weight)


def _run_layer(x: Tensor, weight: Tensor) -> None:
    conv = gated_convolutions.Convolution(weight, 3, -1, -1, 1, "reference")
    y = conv.forward(x, None)
    conv.backward_x(y)
    conv.backward_weight(y, x)


@pytest.mark.parametrize("there", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "run",
    [
        lambda x, weight: _run_rectangles(x, weight, 1),
        lambda x, weight: _run_rectangles(x, weight, 2),
        _run_layer,
    ],
    ids=["rectangles", "ordered channels", "layer"],
)
def test_switches_during_convolutions(
    run, there: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_if_there(device: torch.device):
        assert device.type == "cpu"
        return repeatable(torch.device(there))

    for module in (live_rectangles, gated_convolutions):
        monkeypatch.setattr(module, "repeatable", as_if_there)
    run(torch.ones(2, 4, 5, 6), torch.ones(4, 4, 3, 3))
    expected = {(True, False)} if there == "cuda" else {(False, True)}
    assert seen == {"conv2d": expected, "convolution_backward": expected}


def test_an_error_leaves_the_switches_alone() -> None:
    with pytest.raises(ValueError, match="inside"), repeatable(torch.device("cuda")):
        raise ValueError("inside")
